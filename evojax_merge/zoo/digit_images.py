"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, in three parts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from evojax_merge.errors import InputError

# The digits that each of two experts learns.
LOW, HIGH = range(5), range(5, 10)


@dataclass(frozen=True)
class DigitImages:
    """images: float64[N, 8, 8] from 0 to 16; labels: int[N], their digits."""

    images: np.ndarray
    labels: np.ndarray

    def __getitem__(self, rows: Any) -> "DigitImages":
        return DigitImages(self.images[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


def load_digit_images(where: object, seed: int) -> tuple[DigitImages, DigitImages, DigitImages]:
    """(for training, for the search, held out): 800, 500 and 497 images, in an order that the seed draws. Raises
    InputError without scikit-learn; where: who asks, in messages."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(where, "needs scikit-learn: pip install 'evojax-merge[digits]'") from None
    dataset = load_digits()
    order = np.random.default_rng([seed, 0]).permutation(len(dataset.target))
    everything = DigitImages(dataset.images[order], dataset.target[order])
    return everything[:800], everything[800:1300], everything[1300:]
