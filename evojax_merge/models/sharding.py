"""The sharding of a pass's arrays over the devices that share a model.

Such a pass is traced under a mesh whose axis `model` is the compiler's to use (`evaluation.devices.shard_population`).
The weights are sharded along it (`Leaf.sharded_axis`), and each device merges its own part of them (`map_shards`). This
module sets the sharding of activations, as in Megatron-LM (arXiv 1909.08053): every device has the whole residual
stream, attention is sharded by heads and the MLP by its inner entries, so that a layer sums over devices twice. The
compiler places all other arrays by their inputs. Where devices share no model, all of these functions are the identity.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

MODEL_AXIS = "model"


def model_shards() -> int:
    """The number of devices that share each model of the pass that is being traced."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(MODEL_AXIS, 1)


def shards_of(size: int) -> int:
    """The number of shards of an axis of `size` entries; 1 where the shards would not be equal."""
    shards = model_shards()
    return shards if size % shards == 0 else 1


def replicate(x: jax.Array) -> jax.Array:
    """The array, with a whole copy on each device."""
    return x if model_shards() == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * x.ndim))


def shard(x: jax.Array, axis: int, cut: bool = True) -> jax.Array:
    """The array, sharded along an axis; unless `cut`, or where the shards would not be equal, each device has the
    whole."""
    shards = model_shards()
    if shards == 1 or not cut or x.shape[axis] % shards:
        return replicate(x)
    return jax.lax.with_sharding_constraint(x, cut_at(x.ndim, axis))


def cut_at(ndim: int, axis: int | None) -> PartitionSpec:
    """The PartitionSpec of an array that is sharded along an axis; None: each device has the whole."""
    spec: list[str | None] = [None] * ndim
    if axis is not None:
        spec[axis] = MODEL_AXIS
    return PartitionSpec(*spec)


def map_shards(function: Callable[..., jax.Array], cuts: Any, cut: PartitionSpec, *arguments: Any) -> jax.Array:
    """`function(device, *arguments)` on each device, with the device's number int32[] among the devices that share a
    model, and its shards of the arguments. cuts: a PartitionSpec for each array of the arguments; cut: that of the
    result.

    Unlike constraints, this leaves the compiler no choice. The compiler computes equal expressions once, such as a
    parent's weight for every entry of two matrices of one shape; where the matrices are sharded along different axes,
    it would exchange arrays that are computed from that weight between the devices.
    """

    def local(*arguments: Any) -> jax.Array:
        return function(jax.lax.axis_index(MODEL_AXIS), *arguments)

    mapped = jax.shard_map(local, in_specs=cuts, out_specs=cut, axis_names={MODEL_AXIS}, check_vma=False)
    return mapped(*arguments)


def slice_shards(x: jax.Array, start: jax.Array | int, rows: int, shards: int, axis: int = 0) -> jax.Array:
    """The same `rows` entries of each of `shards` equal shards of an axis, from the shard's entry `start` on:
    `[…, shards * rows, …]`. No device needs another device's entries."""
    if shards == 1:
        return jax.lax.dynamic_slice_in_dim(x, start, rows, axis)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    apart = x.reshape(*before, shards, x.shape[axis] // shards, *after)
    return jax.lax.dynamic_slice_in_dim(apart, start, rows, axis + 1).reshape(*before, shards * rows, *after)
