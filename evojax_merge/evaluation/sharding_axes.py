"""The axes of a program's values that are cut where several devices share a model, read off its jaxpr.

Arguments are cut by their shardings, and values that are computed from them follow: along the axis that an operation
keeps, as `models.sharding` says, or not at all. XLA's partitioner does the same where it has no choice.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from evojax_merge.models.sharding import MODEL_AXIS

# An axis, or None: each device has the whole.
Axis = int | None


def axis_of(spec: Iterable[Any]) -> Axis:
    """The axis that a PartitionSpec cuts into the shards of a model."""
    cut = (names == MODEL_AXIS or (isinstance(names, tuple) and MODEL_AXIS in names) for names in spec)
    return next((i for i, is_cut in enumerate(cut) if is_cut), None)


def sharding_axes(eqn: Any, given: Sequence[Axis], shards: int) -> list[Axis]:
    """The axis of each result of an equation without jaxprs of its own. given: the axes of its operands."""
    name, results = eqn.primitive.name, [out.aval for out in eqn.outvars]
    if name == "sharding_constraint":
        return [axis_of(eqn.params["sharding"].spec)]
    if name == "optimization_barrier":
        return list(given)
    if name == "gather":
        return [_gathered(eqn, given[0])]
    operands = [(value.aval, axis) for value, axis in zip(eqn.invars, given, strict=True)]
    if name == "dot_general":
        return [_of_product(eqn.params["dimension_numbers"], operands)]
    cut = [(aval, axis) for aval, axis in operands if axis is not None]
    if not cut:
        return [None] * len(results)
    aval, axis = cut[0]
    if name == "transpose":
        return [list(eqn.params["permutation"]).index(axis)]
    if name == "stack":
        return [axis + (axis >= eqn.params["axis"])]
    if name == "unstack":
        taken = eqn.params["axis"]
        return [None if axis == taken else axis - (axis > taken)] * len(results)
    if name == "broadcast_in_dim":
        return [eqn.params["broadcast_dimensions"][axis]]
    if name == "reshape":
        return [_reshaped(aval.shape, axis, results[0].shape, shards)]
    removed = eqn.params.get("axes", ()) if name.startswith(("reduce_", "arg")) else eqn.params.get("dimensions", ())
    if name == "squeeze" or name.startswith(("reduce_", "arg")):
        return [
            None if axis in removed else axis - sum(removed_axis < axis for removed_axis in removed) for _ in results
        ]
    # A result has the first of these axes that is as it was.
    return [
        next((a for operand, a in cut if operand.ndim == result.ndim and operand.shape[a] == result.shape[a]), None)
        for result in results
    ]


def _gathered(eqn: Any, axis: Axis) -> Axis:
    """The sharded axis of a gather's result: an axis that is taken as a whole stays; entries that are picked along the
    axis of the shards are summed up over the devices, each of which then has them all."""
    operand, numbers = eqn.invars[0].aval, eqn.params["dimension_numbers"]
    if axis is None or eqn.params["slice_sizes"][axis] != operand.shape[axis]:
        return None
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [i for i in range(len(operand.shape)) if i not in gone]
    picked: int = numbers.offset_dims[kept.index(axis)]
    return picked


def _of_product(numbers: Any, operands: Sequence[tuple[Any, Axis]]) -> Axis:
    (contracted, batch), (left, right) = numbers, operands
    before = len(batch[0])
    for (aval, axis), summed, shared in zip((left, right), contracted, batch, strict=True):
        free = [i for i in range(len(aval.shape)) if i not in summed and i not in shared]
        if axis in shared:
            return list(shared).index(axis)
        if axis in free:
            return before + free.index(axis)
        before += len(free)
    # Every device has the whole of a sum over the shards.
    return None


def _reshaped(shape: Sequence[int], axis: int, result: Sequence[int], shards: int) -> Axis:
    """The axis at which a result has equal parts of the same entries; None where it has none."""
    begins = prod(shape[:axis])
    return next(
        (i for i, length in enumerate(result) if prod(result[:i]) == begins and length > 1 and length % shards == 0),
        None,
    )
