"""How what a pass computes lies on the devices that share a model.

Such a pass is traced under a mesh whose axis `model` is the compiler's to use (`evaluation.devices.shard_population`).
The weights are cut along it (`Leaf.sharded_axis`), and each device merges its own part of them (`map_shards`). How
activations lie is said here, as in Megatron-LM (arXiv 1909.08053): every device has the whole residual stream,
attention is cut by heads and the MLP by its inner entries, so that a layer adds up its devices' parts twice. What
nothing is said about the compiler places by what it is computed from. Where nothing is shared, all of this is the
identity.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

MODEL_AXIS = "model"


def model_shards() -> int:
    """How many devices share each model of the pass that is being traced."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(MODEL_AXIS, 1)


def shards_of(size: int) -> int:
    """Into how many shards an axis of so many entries is cut: where they cannot be equal, into none."""
    shards = model_shards()
    return shards if size % shards == 0 else 1


def replicate(x: jax.Array) -> jax.Array:
    """An array of which each device has the whole."""
    return x if model_shards() == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * x.ndim))


def shard(x: jax.Array, axis: int, cut: bool = True) -> jax.Array:
    """An array that is cut at an axis; unless `cut`, or where it cannot be cut into equal shards, each device has the
    whole."""
    shards = model_shards()
    if shards == 1 or not cut or x.shape[axis] % shards:
        return replicate(x)
    return jax.lax.with_sharding_constraint(x, cut_at(x.ndim, axis))


def cut_at(ndim: int, axis: int | None) -> PartitionSpec:
    """That an array is cut at an axis; None: each device has the whole."""
    spec: list[str | None] = [None] * ndim
    if axis is not None:
        spec[axis] = MODEL_AXIS
    return PartitionSpec(*spec)


def map_shards(function: Callable[..., jax.Array], cuts: Any, cut: PartitionSpec, *arguments: Any) -> jax.Array:
    """`function(device, *arguments)` on each device, which is given its number int32[] among those that share a model,
    and its shards of the arguments. cuts: a PartitionSpec for each array of them; cut: that of the result.

    Unlike constraints, this leaves the compiler no choice. It makes one array of what is computed twice of the same
    numbers, such as a parent's weight for every entry of two matrices of one shape; where those are cut at different
    axes, it would exchange what is computed from it between the devices."""

    def local(*arguments: Any) -> jax.Array:
        return function(jax.lax.axis_index(MODEL_AXIS), *arguments)

    mapped = jax.shard_map(local, in_specs=cuts, out_specs=cut, axis_names={MODEL_AXIS}, check_vma=False)
    return mapped(*arguments)


def slice_shards(x: jax.Array, start: jax.Array | int, rows: int, shards: int, axis: int = 0) -> jax.Array:
    """From each of so many equal shards of an axis the same `rows` entries, from the shard's entry `start` on:
    `[…, shards * rows, …]`. No device needs what another has."""
    if shards == 1:
        return jax.lax.dynamic_slice_in_dim(x, start, rows, axis)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    apart = x.reshape(*before, shards, x.shape[axis] // shards, *after)
    return jax.lax.dynamic_slice_in_dim(apart, start, rows, axis + 1).reshape(*before, shards * rows, *after)
