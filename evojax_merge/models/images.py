"""Images in front of a decoder and inside of it: the features of all images of a search, and their tokens' positions.

An image is a run of negative tokens (see `decoder.embed`). With M-RoPE (arXiv 2409.12191) each token has three
positions: in time, in height and in width. A text's three are equal; those of an image of h x w tokens count its rows
and columns, and the text after it goes on behind the larger of h and w. So a token's positions depend on the images
before it, and not on its number alone.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import jax
import numpy as np
from flax import struct


@struct.dataclass
class ImageInputs:
    """The images of a pass's tokens. features: `[R, hidden]`, the rows that stand in front of the first layer;
    deepstack: `[D, R, hidden]`, the rows that are added behind each of the first D layers, or None; positions:
    int32[B, T, 3], each token's position in time, height and width, or None where positions count tokens."""

    features: jax.Array
    deepstack: jax.Array | None = None
    positions: jax.Array | None = None


@dataclass(frozen=True)
class Grid:
    """An image of `height` x `width` tokens in M-RoPE. An image without a grid counts its tokens."""

    height: int
    width: int

    @cached_property
    def offsets(self) -> np.ndarray:
        """int32[height * width, 3]: the position of each token in time, height and width, less its number."""
        places = np.indices((1, self.height, self.width), np.int32).reshape(3, -1).T
        return places - np.arange(len(places), dtype=np.int32)[:, None]

    @property
    def spared(self) -> int:
        """The number of positions that the image takes less than it has tokens."""
        return self.height * self.width - max(self.height, self.width)


@dataclass(frozen=True)
class GridPositions:
    """The positions of R rows of images. offsets: int32[R, 3], a row's position in time, height and width, less its
    number in its image; spared: int32[R], in the last row of an image the number of positions that it takes less than
    it has rows, elsewhere 0."""

    offsets: np.ndarray
    spared: np.ndarray

    @classmethod
    def of(cls, grids: list[Grid]) -> Self:
        """The positions of the rows of images, one image after the other."""
        spared = [np.append(np.zeros(len(grid.offsets) - 1, np.int32), np.int32(grid.spared)) for grid in grids]
        return cls(np.concatenate([grid.offsets for grid in grids]), np.concatenate(spared))

    def shift(self, tokens: np.ndarray) -> np.ndarray:
        """int32[…]: the number by which the positions of a text behind tokens `int32[…, T]` are less than their
        number."""
        return self._spared(tokens).sum(axis=-1, dtype=np.int32)

    def places(
        self, tokens: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray, before: np.ndarray
    ) -> np.ndarray:
        """int32[B, T, 3]: the positions of tokens in time, height and width.

        positions, segment_ids: int32[B, T], as in `SequenceLayout`; before: int32[H], the tokens of a prefix that all
        rows follow. The tokens of a segment stand side by side, behind those that all segments share.
        """
        spared = self._spared(tokens)
        earlier = np.cumsum(spared, axis=1) - spared
        begins = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
        first = np.maximum.accumulate(np.where(begins, np.arange(tokens.shape[1]), 0), axis=1)
        shared = np.where(segment_ids == 0, spared, 0).sum(axis=1, keepdims=True)
        shift = earlier - np.take_along_axis(earlier, first, axis=1) + np.where(segment_ids > 0, shared, 0)
        offsets = np.where((tokens < 0)[..., None], self.offsets[np.maximum(~tokens, 0)], 0)
        return ((positions - shift - self.shift(before))[..., None] + offsets).astype(np.int32)

    def _spared(self, tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens < 0, self.spared[np.maximum(~tokens, 0)], 0)


@dataclass(frozen=True)
class ImageTable:
    """The images of a search, on the devices or abstract. features, deepstack: see `ImageInputs`; positions: None where
    positions count tokens."""

    features: Any
    deepstack: Any = None
    positions: GridPositions | None = None

    def inputs(
        self, tokens: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray, before: np.ndarray
    ) -> ImageInputs:
        """The images of tokens `int32[B, T]` (see `GridPositions.places`)."""
        places: Any = None
        if self.positions is not None:
            places = self.positions.places(tokens, positions, segment_ids, before)
        return ImageInputs(self.features, self.deepstack, places)

    def within(self, layers: int) -> "ImageTable":
        """The same for a model of so few layers."""
        return self if self.deepstack is None else replace(self, deepstack=self.deepstack[:layers])
