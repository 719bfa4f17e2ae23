"""Tensors of a base that an adapter changes: low-rank sums, with or without magnitudes, and trained rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from merge_kernels import add_low_rank

from evojax_merge.checkpoints.decoder_folder import TensorSlice
from evojax_merge.checkpoints.folder import ChangedTensor, Tensor


@dataclass(frozen=True)
class AdaptedTensor(ChangedTensor):
    """A weight of the base with an adapter: `base + scale · B A`, in the base's dtype.

    base: `[out, in]`; a: `[r, in]`; b: `[out, r]`. transposed: the base's weight is stored as `[in, out]` (embeddings,
    and modules with fan_in_fan_out), and the transposed product is added to it.
    """

    base: Tensor
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False

    @property
    def parts(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.base, self.a, self.b

    @property
    def file(self) -> Path:
        return self.a.file

    @property
    def core(self) -> Tensor:
        return self.base

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        a, b = _float32(self.a), _float32(self.b) * np.float32(self.scale)
        return (b.T, a.T) if self.transposed else (a, b)

    def read(self) -> np.ndarray:
        # A search's programs expand factors with the same function, so that both compute the same values.
        return np.asarray(_expand(self.base.load(), *self.factors())).astype(self.dtype, copy=False)

    def content(self) -> Iterator[np.ndarray]:
        # The parts, not the product: its last bits depend on the machine, and random masks must not.
        yield from super().content()
        yield np.frombuffer(np.float64(self.scale).tobytes(), np.uint8)


@dataclass(frozen=True)
class DoraTensor(ChangedTensor):
    """A weight with a DoRA adapter: the rows of the unrounded `base + scale · B A`, rescaled to the norms
    `magnitude [out]`."""

    sum: AdaptedTensor
    magnitude: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.sum, self.magnitude

    def read(self) -> np.ndarray:
        unrounded = np.asarray(_expand(self.sum.base.load().astype(np.float32), *self.sum.factors()))
        axis = 0 if self.sum.transposed else 1
        norms = np.linalg.norm(unrounded, axis=axis, keepdims=True)
        return (np.expand_dims(_float32(self.magnitude).reshape(-1), axis) / norms * unrounded).astype(self.dtype)


@dataclass(frozen=True)
class ExpertColumns(TensorSlice):
    """The columns of one expert, which lie apart, of all experts' factors `B [out, r · E]`."""

    def load(self) -> np.ndarray:
        return np.ascontiguousarray(self.read())


def adapted_experts(parts: Sequence[np.ndarray], scale: float, outputs_first: bool) -> np.ndarray:
    """The experts of a layer, in one tensor `[E, in, out]` or, `outputs_first`, `[E, out, in]`, each with an adapter of
    its own."""
    base, a, b = (part.astype(np.float32, copy=False) for part in parts)
    a = a.reshape(len(base), -1, a.shape[-1])
    b = (b.reshape(len(b), -1, len(base)) * np.float32(scale)).transpose(2, 0, 1)
    return base + (b @ a if outputs_first else (b @ a).swapaxes(1, 2))


def trained_rows(parts: Sequence[np.ndarray], numbers: tuple[int, ...]) -> np.ndarray:
    """An embedding or head `[n, hidden]` of which the rows `numbers` are those of `rows [len(numbers), hidden]`."""
    values = np.array(parts[0])
    values[list(numbers)] = parts[1]
    return values


_expand = jax.jit(add_low_rank)


def _float32(tensor: Tensor) -> np.ndarray:
    return tensor.load().astype(np.float32, copy=False)
