"""The memory of a program, read off its jaxpr: the buffers that live at a time on a device."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax

from evojax_merge.errors import Failed
from evojax_merge.evaluation import costs
from evojax_merge.evaluation.sharding_axes import Axis, axis_of, sharding_axes
from evojax_merge.evaluation.targets import Platform

# The newest JAX whose programs are known. How it writes them is no part of its interface.
KNOWN_JAX = (0, 12)
# Primitives whose result is stored when it has several uses, not computed for each.
COMPUTED_ONCE = costs.TRANSCENDENTAL | {"div"}
# Reductions take fused operands directly; all other kernels need theirs in memory.
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin",
    "concatenate", "stack",
}  # fmt: skip


def temporary_bytes(
    jaxpr: Any, donated: Sequence[Any] = (), platform: Platform | None = None, cut: Sequence[Axis] = (), shards: int = 1
) -> int:
    """The most bytes that a program has in memory of a device at a time beside its arguments, its results included:
    buffers live from their computation to their last use, in the order of the program, except that compilers delay
    operations on arguments alone until their results are needed. donated: the shapes and dtypes of arguments whose
    buffers results of the same shape and dtype reuse. platform: whose compiler's habits count (see `_Setting`). cut:
    for each argument the axis that `shards` devices cut, each of which has its part."""
    program = flat_program(jaxpr, tuple(cut), shards, platform)
    free = Counter((tuple(argument.shape), str(argument.dtype)) for argument in donated)
    in_place = []
    for number, aval in zip(program.results, jaxpr.out_avals, strict=True):
        kind = tuple(aval.shape), str(aval.dtype)
        if free[kind] > 0:
            free[kind] -= 1
            in_place.append(number)
    return _peak(program, in_place, _Setting(platform, shards))


@dataclass(frozen=True)
class Exchange:
    """An array that the devices which share a model exchange: summed up over them, or gathered from them. is_repeated:
    in a `while` loop."""

    nbytes: int
    is_sum: bool
    is_repeated: bool = False


def sent_bytes(exchanged: Mapping[Exchange, int], shards: int, steps: int = 1) -> float:
    """Bytes that each device sends to the next in a ring: a sum goes round twice. steps: how often the body of a
    `while` loop runs."""
    return sum(
        (2 if one.is_sum else 1) * (shards - 1) / shards * one.nbytes * count * (steps if one.is_repeated else 1)
        for one, count in exchanged.items()
    )


# The number of a value that is written out in the program.
LITERAL = -1


@dataclass(frozen=True)
class _Step:
    """An operation of a program without calls. Values are known by numbers; a value that is written out in the program
    is `LITERAL`. body: the most bytes that its loop's body or its branches need beside the step's results; is_batched:
    true for several matrix products side by side; repeated: operands of fewer entries than the result."""

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    sizes: tuple[int, ...]
    body: int = 0
    is_batched: bool = False
    repeated: tuple[int, ...] = ()


@dataclass
class FlatProgram:
    """A program's steps in their order, with calls written out. arguments, results: the numbers of its arguments and
    its results; axes, sizes: the axes at which the devices cut the results, and their bytes on a device; exchanges: how
    often each array is exchanged, in a `while` loop once; operations: the number of steps, those of loops' bodies once.
    """

    steps: list[_Step]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]
    exchanges: Counter[Exchange]
    operations: int


@dataclass(frozen=True)
class _Setting:
    """The compiler and the devices that a program is read for. shards: see `temporary_bytes`."""

    platform: Platform | None = None
    shards: int = 1

    @property
    def widens(self) -> bool:
        """Return whether slices of bfloat16 are read through float32. XLA's compiler for CPUs did so before JAX 0.11: a
        loop has a float32 copy of the arrays that its trips slice, unless a barrier stands before."""
        return self.platform == "cpu" and jax.__version_info__ < (0, 11)

    @property
    def delays(self) -> bool:
        """Return whether operations on arguments alone, such as picking or merging a layer, wait for their first use.
        XLA's compilers for accelerators order them so."""
        return self.platform in ("gpu", "tpu")

    @property
    def keeps_order(self) -> bool:
        """Return whether products side by side have the layout of their operands."""
        return self.platform == "gpu"

    @property
    def reuses_carried(self) -> bool:
        """Return whether a loop reuses the buffer of a carried value, once nothing in a trip needs that value."""
        return self.platform != "tpu"

    @property
    def shares_slices(self) -> bool:
        """Return whether slices that several candidates merge are copied first, those of a layer together. XLA's
        compiler for TPUs does so to read ahead: otherwise the merge of each candidate would pick them anew."""
        return self.platform == "tpu"

    @property
    def copies_slices(self) -> bool:
        """Return whether a part of an argument that a kernel takes is copied first, even one whose place is known
        beforehand: XLA's compiler for GPUs copies a layer of a stack."""
        return self.platform == "gpu"

    def nbytes(self, aval: Any, axis: Axis) -> int:
        """Bytes of a value on a device."""
        return costs.nbytes_of(aval) if axis is None else costs.nbytes_of(aval) // self.shards


@lru_cache(maxsize=32)
def flat_program(jaxpr: Any, cut: tuple[Axis, ...], shards: int = 1, platform: Platform | None = None) -> FlatProgram:
    """A closed jaxpr with its calls written out, off which memory and results are read (see `temporary_bytes`). Raises
    Failed where a JAX newer than KNOWN_JAX writes programs in another way."""
    try:
        return _flattened(jaxpr, cut, _Setting(platform, shards))
    except (KeyError, AttributeError) as error:
        if jax.__version_info__[:2] <= KNOWN_JAX:
            raise
        newest = ".".join(map(str, KNOWN_JAX))
        raise Failed(
            f"JAX {jax.__version__} writes programs in a way that a plan does not read ({error!r}); expected JAX "
            f"{newest} or older: pip install 'jax=={newest}.*'"
        ) from error


def _flattened(jaxpr: Any, cut: Sequence[Axis], setting: _Setting, sliced: int = 0) -> FlatProgram:
    """A closed jaxpr with its calls written out. cut: its arguments' axes, all None where it is empty. Its last
    `sliced` arguments are slices of larger arrays."""
    steps: list[_Step] = []
    exchanged, inner_operations = Counter[Exchange](), 0
    counter = iter(range(10**9))
    axes: dict[int, Axis] = {LITERAL: None}

    def run(jaxpr: Any, given: Sequence[int]) -> tuple[int, ...]:
        nonlocal inner_operations
        numbers = dict(zip(jaxpr.jaxpr.invars, given, strict=True))
        numbers |= {constant: next(counter) for constant in jaxpr.jaxpr.constvars}

        def number(value: Any) -> int:
            return LITERAL if hasattr(value, "val") else numbers[value]

        for eqn in jaxpr.jaxpr.eqns:
            operands, name = tuple(number(value) for value in eqn.invars), eqn.primitive.name
            parts = list(costs.jaxprs_of(eqn, setting.platform))
            if name not in ("scan", "while", "cond", "shard_map") and costs.is_call(eqn, parts):
                numbers |= dict(zip(eqn.outvars, run(parts[0], operands), strict=True))
                continue
            results = tuple(next(counter) for _ in eqn.outvars)
            numbers |= dict(zip(eqn.outvars, results, strict=True))
            operand_axes = [axes.get(operand) for operand in operands]
            inside = [
                _flattened(part, given, setting, count) for part, given, count in _inside(eqn, parts, operand_axes)
            ]
            result_cuts = _results_axes(eqn, inside, operand_axes, setting.shards)
            axes.update(zip(results, result_cuts, strict=True))
            inner_operations += sum(program.operations for program in inside)
            exchanged.update(_exchanged(eqn, inside, operand_axes, result_cuts, setting))
            sizes = tuple(setting.nbytes(out.aval, axis) for out, axis in zip(eqn.outvars, result_cuts, strict=True))
            body, repeated = _body_bytes(eqn, inside, setting), _repeated(eqn, operands, inside)
            is_batched = name == "dot_general" and bool(eqn.params["dimension_numbers"][1][0])
            steps.append(_Step(name, operands, results, sizes, body, is_batched, repeated))
        return tuple(number(value) for value in jaxpr.jaxpr.outvars)

    given = tuple(next(counter) for _ in jaxpr.jaxpr.invars)
    axes.update(zip(given, cut or [None] * len(given), strict=True))
    inside = given
    if sliced:
        picked = jaxpr.jaxpr.invars[-sliced:]
        slices = tuple(next(counter) for _ in picked)
        axes.update(zip(slices, [axes[number] for number in given[-sliced:]], strict=True))
        for source, slice_, value in zip(given[-sliced:], slices, picked, strict=True):
            # A counter gives the index of the slice.
            size = setting.nbytes(value.aval, axes[slice_])
            steps.append(_Step("dynamic_slice", (source, next(counter)), (slice_,), (size,)))
        inside = (*given[:-sliced], *slices)
    results = run(jaxpr, inside)
    cuts = tuple(axes.get(number) for number in results)
    sizes = tuple(setting.nbytes(aval, axis) for aval, axis in zip(jaxpr.out_avals, cuts, strict=True))
    return FlatProgram(steps, given, results, cuts, sizes, exchanged, len(steps) + inner_operations)


def _exchanged(
    eqn: Any, inside: Sequence[FlatProgram], own: Sequence[Axis], results: Sequence[Axis], setting: _Setting
) -> Counter[Exchange]:
    """The exchanges of an equation: sums of products over a sharded axis, and arrays of which every device gets the
    whole. own, results: the sharded axes of its operands and its results."""
    name, total = eqn.primitive.name, Counter[Exchange]()
    if setting.shards == 1 or costs.is_of_one_device(eqn):
        return total
    if inside:
        times = eqn.params["length"] if name == "scan" else 1
        for program in inside if name != "cond" else [max(inside, key=lambda program: program.exchanges.total())]:
            for one, count in program.exchanges.items():
                total[replace(one, is_repeated=one.is_repeated or name == "while")] += times * count
        return total
    if any(axis is not None for axis in own) and all(axis is None for axis in results):
        is_sum = name in ("dot_general", "gather") or name.startswith(("reduce_", "arg"))
        total[Exchange(sum(costs.nbytes_of(out.aval) for out in eqn.outvars), is_sum)] += 1
    return total


def _repeated(eqn: Any, operands: Sequence[int], inside: Sequence[FlatProgram]) -> tuple[int, ...]:
    name = eqn.primitive.name
    if name == "shard_map":
        arguments = inside[0].arguments
        repeated = _repeated_origins(inside[0], {number: frozenset({number}) for number in arguments})
        return tuple(operand for operand, number in zip(operands, arguments, strict=True) if number in repeated)
    if name not in costs.ELEMENTWISE and name != "broadcast_in_dim":
        return ()
    count = costs.size_of_aval(eqn.outvars[0].aval)
    return tuple(
        operand for operand, value in zip(operands, eqn.invars, strict=True) if costs.size_of_aval(value.aval) < count
    )


def _repeated_origins(program: FlatProgram, origins: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The origins whose values are repeated further on, for example for several candidates. origins: for each argument
    the values that it stands for; slices at places that are not known beforehand are origins of their own."""
    values = dict(origins)
    repeated: set[int] = set()
    for step in program.steps:
        if step.name in costs.FUSED:
            is_slice = step.name == "dynamic_slice" and not origins
            values |= dict.fromkeys(
                step.results, frozenset(step.results) if is_slice else _united(values, step.operands)
            )
        repeated |= _united(values, step.repeated)
    return frozenset(repeated)


def _inside(eqn: Any, parts: Sequence[Any], own: Sequence[Axis]) -> Iterator[tuple[Any, Sequence[Axis], int]]:
    """Each jaxpr of an equation, the axes at which its arguments are cut, and how many of them are slices. own: the
    axes of the equation's operands."""
    name = eqn.primitive.name
    if name == "scan":
        whole = sum(costs.constants_and_carries(eqn))
        # A trip takes a slice of each operand: without its first axis.
        slices = [None if axis is None or axis == 0 else axis - 1 for axis in own[whole:]]
        yield parts[0], [*own[:whole], *slices], len(slices)
        return
    if name == "while":
        # The condition and the body have constants of their own, and both take the carried values.
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        yield costs.closed(eqn.params["cond_jaxpr"]), [*own[:first], *own[first + second :]], 0
        yield costs.closed(eqn.params["body_jaxpr"]), own[first:], 0
        return
    operands = own[1:] if name == "cond" else own
    for part in parts:
        count, carries_axes = len(part.jaxpr.invars), name in ("cond", "shard_map") and not costs.is_of_one_device(eqn)
        yield part, operands if carries_axes and count == len(operands) else [None] * count, 0


def _results_axes(eqn: Any, inside: Sequence[FlatProgram], own: Sequence[Axis], shards: int) -> Sequence[Axis]:
    if shards == 1:
        return [None] * len(eqn.outvars)
    if not inside:
        return sharding_axes(eqn, own, shards)
    # For a loop the axes of the body, which has more results than the condition.
    axes, name = max((program.axes for program in inside), key=len), eqn.primitive.name
    if costs.is_of_one_device(eqn):
        return [axis_of(spec) for spec in eqn.params["out_specs"]]
    if len(axes) != len(eqn.outvars):
        return [None] * len(eqn.outvars)
    if name == "scan":
        _, carries = costs.constants_and_carries(eqn)
        # The results of all trips are stacked along a new first axis.
        return [*axes[:carries], *(None if axis is None else axis + 1 for axis in axes[carries:])]
    return axes


def _body_bytes(eqn: Any, inside: Sequence[FlatProgram], setting: _Setting) -> int:
    """The most bytes that a loop's body, or the largest branch, needs at a time beside its results: the values that a
    loop carries from one trip to the next, and the results of its trips, have one place, which is counted with the
    loop's results."""
    name, copies = eqn.primitive.name, 0
    if name == "scan" and setting.widens:
        copies = _widened(eqn, inside[0], *costs.constants_and_carries(eqn))
    if name not in ("scan", "while"):
        return max((_peak(program, program.results, setting) for program in inside), default=0)
    is_scan = name == "scan"
    constants, carries = costs.constants_and_carries(eqn) if is_scan else (eqn.params["body_nconsts"], len(eqn.outvars))
    body = inside[-1]
    carried = {}
    if setting.reuses_carried:
        carried = dict(zip(body.arguments[constants : constants + carries], body.sizes[:carries], strict=True))
    most = _peak(body, body.results[len(carried) :], setting, carried) - sum(carried.values())
    return copies + max(0, most, *(_peak(program, program.results, setting) for program in inside[:-1]))


def _widened(scan: Any, body: FlatProgram, constants: int, carries: int) -> int:
    """Bytes of float32 copies of the bfloat16 arrays that are the same in every trip and are sliced in it."""
    picked = {step.operands[0] for step in body.steps if step.name in ("dynamic_slice", "gather")}
    given = list(zip(body.arguments, scan.invars, strict=True))
    return sum(
        2 * costs.nbytes_of(value.aval)
        for number, value in given[:constants] + given[constants + carries :]
        if number in picked and str(getattr(value.aval, "dtype", "")) == "bfloat16"
    )


def _peak(
    program: FlatProgram, in_place: Iterable[int], setting: _Setting, carried: Mapping[int, int] = MappingProxyType({})
) -> int:
    """The most bytes at a time beside the arguments. in_place: results that take the place of a buffer that is counted
    elsewhere. carried: arguments that count until their last use, and their bytes."""
    shared = _repeated_origins(program, {}) if setting.shares_slices else frozenset()
    steps = _delayed(program, shared) if setting.delays else program.steps
    size = dict(carried)
    for step in steps:
        size |= zip(step.results, step.sizes, strict=True)
    roots = _roots(program, steps, setting, size, carried, shared)
    last_use: dict[int, int] = {}
    for i, step in enumerate(steps):
        if step.name not in costs.FUSED or any(number in roots[number] for number in step.results):
            last_use |= dict.fromkeys(_united(roots, step.operands), i)
    last_use |= dict.fromkeys(_united(roots, program.results) | shared, len(steps))
    # A result that is only rearranged is an earlier value under another name.
    elsewhere = {root for number in in_place for root in _united(roots, [number]) if size[root] == size.get(number)}
    ends: dict[int, list[int]] = {}
    for number, i in last_use.items():
        ends.setdefault(i, []).append(number)
    batched = {number for step in steps if step.is_batched for number in step.results}
    live = dict(carried)
    peak = sum(live.values())
    for i, step in enumerate(steps):
        done = ends.get(i, [])
        if step.name in ("scan", "while", "dynamic_update_slice", "scatter"):
            # These operations reuse the buffers of their operands.
            for number in done:
                live.pop(number, None)
        elif step.name in costs.ELEMENTWISE or step.name in costs.TRANSCENDENTAL:
            # Elementwise results take the place of an operand of as many bytes that nothing else needs; except products
            # side by side, where compilers lay out results in another order than their operands.
            same = [n for n in done if n in live and size[n] in step.sizes]
            same = same if setting.keeps_order else [n for n in same if n not in batched]
            for number in same[:1]:
                live.pop(number)
        live |= {n: size[n] for n in step.results if n in roots[n] and n not in elsewhere}
        peak = max(peak, sum(live.values()) + step.body)
        for number in (*done, *(n for n in step.results if n not in last_use)):
            live.pop(number, None)
    return peak


def _delayed(program: FlatProgram, kept: frozenset[int]) -> list[_Step]:
    """The steps, in which operations that are no kernels and need arguments alone come only where another step first
    needs them. kept: values that are computed in their place and count as arguments."""
    steps = program.steps
    maker = {number: i for i, step in enumerate(steps) for number in step.results if number not in kept}
    waiting: set[int] = set()
    ordered: list[_Step] = []

    def release(numbers: Iterable[int]) -> None:
        needed, open_ = set(), [maker[number] for number in numbers if number in maker]
        while open_:
            i = open_.pop()
            if i in waiting:
                waiting.discard(i)
                needed.add(i)
                open_ += [maker[operand] for operand in steps[i].operands if operand in maker]
        ordered.extend(steps[i] for i in sorted(needed))

    for i, step in enumerate(steps):
        is_free = step.name in costs.FUSED and kept.isdisjoint(step.results)
        if is_free and all(maker[operand] in waiting for operand in step.operands if operand in maker):
            waiting.add(i)
        else:
            release(step.operands)
            ordered.append(step)
    release(program.results)
    return ordered


def _united(roots: Mapping[int, frozenset[int]], numbers: Iterable[int]) -> frozenset[int]:
    return frozenset[int]().union(*(roots.get(number, frozenset()) for number in numbers))


def _roots(
    program: FlatProgram,
    steps: Sequence[_Step],
    setting: _Setting,
    size: Mapping[int, int],
    carried: Iterable[int],
    kept: frozenset[int],
) -> dict[int, frozenset[int]]:
    """For each computed value the values in memory that it is made of, itself where it is stored: results and operands
    of kernels, values that several uses would compute again, the program's results, and `kept`. size: bytes of each
    value."""
    uses = Counter(operand for step in steps for operand in set(step.operands))
    fused = costs.FUSED | REDUCTIONS
    wanted = {operand for step in steps if step.name not in fused for operand in step.operands} | set(program.results)
    memory = {number: frozenset({number}) for number in carried}
    # The values that are arguments, in memory, or only rearranged from these; and those that are arguments, or only
    # rearranged from arguments.
    lying, moved = set(program.arguments), set(program.arguments)
    for step in steps:
        is_kernel = step.name not in costs.FUSED
        # A value that is only rearranged needs no buffer of its own; a slice only where its place is known beforehand.
        whole = step.operands[:1] if step.name == "dynamic_slice" else step.operands
        known_place = all(operand == LITERAL for operand in step.operands[len(whole) :])
        is_copied = setting.copies_slices and step.name == "slice" and whole[0] in moved
        rearranged = step.name in costs.MOVES - {"pad"} and known_place and not is_copied and lying.issuperset(whole)
        operand_roots = [_united(memory, [operand]) for operand in step.operands]
        together = frozenset[int]().union(*operand_roots)
        # A barrier returns each of its operands.
        passed = operand_roots if step.name == "optimization_barrier" else [together] * len(step.results)
        for number, roots in zip(step.results, passed, strict=True):
            # A sum of several values that goes on, such as the residual stream, takes the place of one of them.
            is_sum = step.name in ("add", "add_any") and sum(size[root] >= size[number] for root in roots) > 1
            is_reused = uses[number] > 1 and (is_sum or step.name in COMPUTED_ONCE)
            is_stored = is_kernel or (number in wanted and not rearranged) or is_reused or number in kept
            memory[number] = frozenset({number}) if is_stored else roots
            lying |= {number} if is_stored or rearranged else set()
            moved |= {number} if rearranged and not is_stored and moved.issuperset(whole) else set()
    return memory
