"""The four functions through which every method is used:

    prepared   = prepare(method, options, sources, parameters, row_keys)     host, once; exact, for one recipe
    prepared   = tabulate(method, options, sources, parameters, row_keys)    host, once; for every density on a grid
    statistics = look_up(method, prepared.statistics, parameters)            device, per candidate
    merged     = combine(method, options, CombineInputs(sources, prepared.mask_keys, statistics, parameters))
                                                                             device, per candidate

`sources` are K arrays `[...]` of one shape, after the base where `options.has_base`. `parameters` are numbers by name,
per parent `[K]` or shared `[]`: float64 on the host (a density counts entries), float32 on the device. `options` are
the static options. Results are float32; the caller casts. Tensors may be merged in pieces along their first axis,
as long as their statistics are those of the whole tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from merge_kernels.method import (
    CombineInputs,
    Method,
    Numbers,
    Options,
    Prepared,
    PrepareInputs,
    RowKeys,
    TensorMoments,
)
from merge_kernels.sums import is_looped

# A searched density is rounded to this grid, and the recipe carries the rounded value.
DENSITY_STEPS = 1000
GRID = np.arange(DENSITY_STEPS + 1, dtype=np.float64) / DENSITY_STEPS


def prepare(
    method: Method, options: Options, sources: Sequence[np.ndarray], parameters: Numbers, row_keys: RowKeys,
    moments: TensorMoments = lambda k: None,
) -> Prepared:  # fmt: skip
    """Measure one tensor for one recipe, exactly. Statistics have no grid axis."""
    _check_shapes(sources)
    density = method.density
    if density is None:
        return method.prepare(options, PrepareInputs(sources, parameters, (), row_keys, moments))
    values = np.atleast_1d(np.asarray(parameters[density.name], np.float64))
    densities = [np.array([value]) for value in values]
    prepared = method.prepare(options, PrepareInputs(sources, parameters, densities, row_keys, moments))
    return Prepared(prepared.mask_keys, {name: rows[..., 0] for name, rows in prepared.statistics.items()})


def tabulate(
    method: Method, options: Options, sources: Sequence[np.ndarray], parameters: Numbers, row_keys: RowKeys,
    moments: TensorMoments = lambda k: None,
) -> Prepared:  # fmt: skip
    """Measure one tensor for a search: for every density `0, 1/1000 … 1`. parameters: those that are never searched."""
    _check_shapes(sources)
    if method.density is None:
        return method.prepare(options, PrepareInputs(sources, parameters, (), row_keys, moments))
    count = len(sources) - int(options.has_base) if method.density.per_parent else 1
    return method.prepare(options, PrepareInputs(sources, parameters, [GRID] * count, row_keys, moments))


def _check_shapes(sources: Sequence[np.ndarray]) -> None:
    """Raises ValueError for unlike shapes, which NumPy would broadcast."""
    shapes = list(dict.fromkeys(source.shape for source in sources))
    if len(shapes) > 1:
        raise ValueError(f"sources have the shapes {', '.join(map(str, shapes))}; expected one shape")


def grid_index(density: jax.Array) -> jax.Array:
    """The place of a density on the grid: int32, nearest of `0 … DENSITY_STEPS`."""
    return jnp.clip(jnp.round(density * DENSITY_STEPS), 0, DENSITY_STEPS).astype(jnp.int32)


def look_up(
    method: Method, table: Mapping[str, jax.Array], parameters: Mapping[str, jax.Array]
) -> Mapping[str, jax.Array]:
    """The statistics of one candidate, out of the table: `[..., G] -> [...]`."""
    density = method.density
    if density is None:
        return table
    index = grid_index(parameters[density.name])
    if density.per_parent:
        return {name: jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0] for name, rows in table.items()}
    return {name: jnp.take(rows, index, axis=-1) for name, rows in table.items()}


def combine(method: Method, options: Options, inputs: CombineInputs) -> jax.Array:
    """One merged tensor, float32, of the sources' shape. Elementwise but for the broadcast of coefficients.

    `sum_over` needs the sources and mask keys apart where it writes a sum out, and stacked where the sum is a loop,
    which picks a parent by a number that is known only while the program runs.
    """
    sources, mask_keys = inputs.sources, inputs.mask_keys
    if not is_looped(len(sources) - int(options.has_base)):
        return method.combine(options, replace(inputs, sources=tuple(sources), mask_keys=tuple(mask_keys)))
    statistics, parameters = jax.tree.map(jnp.asarray, (dict(inputs.statistics), dict(inputs.parameters)))
    mask_keys = jnp.stack(mask_keys) if len(mask_keys) else ()
    return method.combine(options, CombineInputs(jnp.stack(sources), mask_keys, statistics, parameters))
