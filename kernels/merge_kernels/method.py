"""The protocol of a merge method: a `Method`, its parameters and options, and the arrays that its functions take.

A method works in two steps. `Method.prepare` measures a tensor once, on the host: everything that does not depend on a
candidate. `Method.combine` merges the tensor for one candidate, on the device, elementwise.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.sums import Arrays

Rescale = Literal["none", "l1", "density"]
Base = Literal["required", "optional", "parent"]
Numbers = Mapping[str, Any]
# Parent k -> the row keys of its uniform numbers, `uint32[rows, 2]` (see noise.draw_row_keys).
RowKeys = Callable[[int], np.ndarray]
# The things that a method looks at beside the weights, on some prompts: nothing, the parents' inputs (those behind
# their own earlier layers, or behind merged ones), or their gradients.
LooksAt = Literal["", "inputs", "merged inputs", "gradients"]
# Parent k -> the moments of one of its tensors `[out, in]`: the covariance of its inputs, `[in, in]`, or the mean
# squares of its gradients, `[out, in]`; None: it has none.
TensorMoments = Callable[[int], np.ndarray | None]
Statistics = dict[str, np.ndarray]
# The names that recipes have for the fields of `Options`, which are mergekit's.
YAML_OPTIONS = ("normalize", "normalize_weights", "rescale", "filter_wise", "nuslerp_row_wise", "nuslerp_flatten")


@dataclass(frozen=True)
class Parameter:
    """A number of a recipe: its default, the default bounds of a search, and the values that have a meaning.

    - `default`: None: required in a recipe; in a search 1/K per parent (the uniform merge), else required.
    - `valid_min`, `valid_max`: the values that have a meaning.
    - `searched`: False: `prepare` depends on the parameter, so it is fixed for a whole run.
    - `quantised`: the parameter is a density, which a search rounds to the grid.
    - `start`: the value that a search begins at where there is no default, or one outside of the default bounds; None:
      the default.
    - `clipped_below`: mergekit reads a density below 0 as 0. False: mergekit refuses it. (It reads one above 1 as 1.)
    """

    name: str
    per_parent: bool
    default: float | None
    low: float
    high: float
    valid_min: float = -np.inf
    valid_max: float = np.inf
    searched: bool = True
    quantised: bool = False
    start: float | None = None
    clipped_below: bool = True


def constant(
    name: str, default: float, low: float, high: float, *, valid_min: float = 0.0, valid_max: float = np.inf,
    per_parent: bool = False,
) -> Parameter:  # fmt: skip
    """A parameter that `prepare` depends on, so that it is fixed for a whole run."""
    return Parameter(name, per_parent, default, low, high, valid_min, valid_max, searched=False)


def widest(dtypes: Iterable[Any]) -> np.dtype:
    """The narrowest dtype that holds the values of all."""
    return np.dtype(reduce(jnp.promote_types, dtypes))


def vector_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of stored vectors by the widest dtype of the sources: float32, or bfloat16 for 16 bits and fewer, whose
    task vectors are no more precise."""
    return np.dtype(np.float32 if dtype.itemsize > 2 else jnp.bfloat16)


# The weight of each parent, and the factor of the merge of task vectors, in every family that has one.
WEIGHT = Parameter("weight", per_parent=True, default=None, low=0.0, high=1.0)
LAMBDA = Parameter("lambda", per_parent=False, default=1.0, low=0.0, high=2.0)


@dataclass(frozen=True)
class Options:
    """Static switches of a merge.

    - `rescale`: none, l1 (restore each delta's L1 norm) or density (1/density).
    - `has_base`: the sources begin with a base, from which deltas are taken.
    - `axis`: the vectors of NuSLERP and Model Stock: None: the whole tensor, -1: its rows, 0: its columns.
    """

    normalize: bool = False
    rescale: Rescale = "none"
    has_base: bool = False
    axis: int | None = None


@dataclass(frozen=True)
class PrepareInputs:
    """One tensor of all models, on the host: the arguments of `Method.prepare`.

    - `sources`: arrays `[...]` of one shape, each in its own dtype, the base first where `options.has_base`.
    - `parameters`: float64 `[K]` or `[]` by name: all of a recipe's, or in a search those that are never searched.
    - `densities`: float64[G] for each value of the density: one per parent, or one; none for a method without one.
    - `row_keys(k)`: the row keys of parent k's uniform numbers, `uint32[rows, 2]`.
    - `moments(k)`: parent k's moments of the tensor (see `TensorMoments`), for a method that looks at activations.
    """

    sources: Sequence[np.ndarray]
    parameters: Numbers
    densities: Sequence[np.ndarray]
    row_keys: RowKeys
    moments: TensorMoments = lambda k: None

    def stored(self, vectors: np.ndarray) -> tuple[np.ndarray, ...]:
        """Vectors `[N, ...]`, one by one, in the dtype in which they are stored."""
        return tuple(vectors.astype(vector_dtype(widest(x.dtype for x in self.sources))))


@dataclass(frozen=True)
class Prepared:
    """Everything about a tensor that does not depend on a candidate.

    - `mask_keys`: none, one, or one array per parent: a number per entry, `uint16[*shape]`, or the row keys that such
      numbers are hashed from, `uint32[rows, 2]`; or vectors in the parents' place, float `[*shape]` (see `purified`).
    - `statistics`: arrays by name; their last axis is the grid's where they were tabulated.
    """

    mask_keys: tuple[np.ndarray, ...]
    statistics: Statistics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CombineInputs:
    """One tensor of all models and one candidate, on the device: the arguments of `Method.combine`, a pytree.

    - `sources`: arrays `[...]` of one shape, or one array `[S, ...]` of them stacked; the base first where
      `options.has_base`. They may be pieces of the tensor.
    - `mask_keys`: those of `Prepared` for these pieces, a sequence or stacked.
    - `statistics`: arrays by name, those of the whole tensor for the candidate's densities, without the grid's axis;
      for `combine_differentiable` the result of `look_up_differentiable`.
    - `parameters`: float32 `[K]` or `[]` by name.
    """

    sources: Arrays
    mask_keys: Arrays
    statistics: Any
    parameters: Mapping[str, jax.Array]


Prepare = Callable[[Options, PrepareInputs], Prepared]
Combine = Callable[[Options, CombineInputs], jax.Array]


def _prepare_nothing(options: Options, inputs: PrepareInputs) -> Prepared:
    return Prepared((), {})


@dataclass(frozen=True)
class Method:
    """One merge method.

    - `base`: required: deltas are taken from a base model; optional: they are where there is one; parent: a base model
      is one of the models that are merged. `base_is_first_parent`: it is the first of them, and a recipe names it.
    - `prepare(options, inputs)` measures a tensor, on the host.
    - `combine(options, inputs)` merges it, on the device: float32 `[...]`.
    - `mask_keys(K)`: the number of arrays of mask keys that are prepared. `random`: they are drawn. `has_row_keys`:
      they are two words for each row, such as the keys from which `combine` makes drawn numbers, and not a number per
      entry. `stores_vectors`: they are vectors in the place of the parents' task vectors, so that the merge of one
      parent alone need not be that parent.
    - `looks_at`: the moments that `prepare` looks at.
    - `averages`: with weights of sum 1, and other parameters that change nothing, the merge is the parents' weighted
      average.
    - `interpolates`: the parameter that leads from the first parent, at 0, to the second, at 1.
    - `copies`: the parameter that multiplies the one parent; at 1 the merge is that parent, bit for bit. Such a method
      stacks layers: a merge of slices may then take the tensors outside of the layers from any one model.
    - `validate(options, parameters)`: the reason why these numbers have no meaning, or None.
    - `yaml_options`: the names (of `YAML_OPTIONS`) under which a recipe may set `options`. `ignored_settings`:
      settings that a recipe may have and that change nothing.

    Tensors are merged in pieces, so `combine` is elementwise in the sources: everything that needs a whole tensor (a
    norm, a quantile) is a statistic that `prepare` measures. The sources and mask keys of many parents are stacked, and
    `combine` sums over them with `sum_over`, lest the program grow with them. A method is a constant of compiled
    programs, so it is hashable.
    """

    name: str
    parameters: tuple[Parameter, ...]
    base: Base
    combine: Combine
    prepare: Prepare = _prepare_nothing
    options: Options = Options()
    base_is_first_parent: bool = False
    min_parents: int = 1
    max_parents: int | None = None
    random: bool = False
    has_row_keys: bool = False
    stores_vectors: bool = False
    looks_at: LooksAt = ""
    mask_keys: Callable[[int], int] = lambda parents: 0
    averages: bool = False
    interpolates: str | None = None
    copies: str | None = None
    validate: Callable[[Options, Numbers], str | None] = lambda options, parameters: None
    yaml_options: tuple[str, ...] = ()
    ignored_settings: tuple[str, ...] = ()

    def parameter(self, name: str) -> Parameter:
        return next(p for p in self.parameters if p.name == name)

    @property
    def keeps_base(self) -> bool:
        """True if the merge of a base with no parents is the base: any number of parents adds to it."""
        return self.base == "required" and self.min_parents == 1 and self.max_parents is None

    @property
    def measures(self) -> bool:
        """True if `prepare` looks at a tensor."""
        return self.prepare is not _prepare_nothing

    def mask_key_array(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and the dtype of one array of mask keys of a tensor. dtype: the widest of the sources."""
        if self.has_row_keys:
            return (*shape[:1], 2), np.dtype(np.uint32)
        return shape, vector_dtype(dtype) if self.stores_vectors else np.dtype(np.uint16)

    @property
    def density(self) -> Parameter | None:
        """The parameter that the prepared tables have an axis for."""
        return next((p for p in self.parameters if p.quantised), None)

    def uses_base(self, base_given: bool) -> bool:
        """True if a merge takes deltas from a base. base_given: the recipe has a base model."""
        return self.base == "required" or (self.base == "optional" and base_given)
