"""Fitness of generators of digits, for configs/ddpm.yaml: all ten digits come out, and each picture is one."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

# The label of a picture that is no digit.
NONE = 10
# A labeller of pictures: (pictures float[N, 64]) -> probabilities float[N, 11].
Classifier = Callable[[np.ndarray], np.ndarray]


def variety(records: Sequence[Mapping[str, Any]], images: np.ndarray) -> np.ndarray:
    """The logarithm of the inception score, a picture at a time: 0 for a picture that is no digit, or where all are the
    same one, and on average log(10) = 2.3 where each is clearly a digit and all ten come equally often."""
    return _variety(network(), images)


def variety_by_neighbours(records: Sequence[Mapping[str, Any]], images: np.ndarray) -> np.ndarray:
    """The same by another classifier, which no search follows."""
    return _variety(neighbours(), images)


def _variety(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    chances = np.clip(classifier(images.reshape(len(images), 64)), 1e-9, None)[:, :NONE]
    return (chances * np.log(chances / chances.mean(axis=0))).sum(axis=1)


def examples() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, and pictures that are none: means of two digits, digits with shuffled or noisy pixels."""
    digits = load_digits()
    images, labels, rng = digits.data / 16, digits.target, np.random.default_rng(0)
    order = rng.permutation(len(images))
    mixed = ((images + images[order]) / 2)[labels != labels[order]]
    noisy = np.clip(images + rng.normal(0, 0.35, images.shape), 0, 1)
    none = np.concatenate([mixed, rng.permuted(images, axis=1), noisy])
    return np.concatenate([images, none]), np.concatenate([labels, np.full(len(none), NONE)])


@cache
def network() -> Classifier:
    """A small network."""
    model = MLPClassifier((64,), alpha=1e-2, max_iter=60, random_state=0)
    model.fit(*examples())
    return model.predict_proba


@cache
def neighbours() -> Classifier:
    """The nearest neighbours among the same examples."""
    return KNeighborsClassifier(9, weights="distance").fit(*examples()).predict_proba
