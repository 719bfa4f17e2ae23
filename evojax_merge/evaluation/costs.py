"""The arithmetic, traffic and memory of a program, read off its jaxpr: without a compiler or a device, for any program.

A jaxpr says more plainly than a compiled program how often a loop's body runs, and is there in a fraction of the time.
It does not say what a compiler fuses. So this is an estimate: matrix products, reductions, gathers and loops are taken
to read their operands from memory and to leave their results there, and everything elementwise to be fused into its
uses, unless such a use is a matrix product or a loop.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from evojax_merge.evaluation.cut_axes import Axis, axis_of, cut_axes
from evojax_merge.evaluation.targets import Platform, Target
from evojax_merge.models.sharding import MODEL_AXIS

# Returns how often the body of a `scan` or `while` runs.
Trips = Callable[[Any], int]

# Primitives that are computed within their uses, from operands that are as large: they move and rearrange values, and
# count as no operation.
_MOVES = {
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "dynamic_slice", "rev", "pad",
    "iota", "copy", "copy_p", "stop_gradient", "optimization_barrier", "split", "bitcast_convert_type",
    "sharding_constraint",
}  # fmt: skip
# One operation for each value of the result. The compiler counts none for the transcendental ones.
_TRANSCENDENTAL = {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "rsqrt", "sqrt", "cbrt", "sin", "cos", "tan", "erf",
    "erfc", "erf_inv", "pow", "atan2", "asin", "acos", "atan", "sinh", "cosh",
}  # fmt: skip
_ELEMENTWISE = {
    "add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "floor", "ceil", "round", "clamp",
    "and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge", "select_n", "convert_element_type", "integer_pow",
    "square", "is_finite", "nextafter", "shift_left", "shift_right_logical", "shift_right_arithmetic",
}  # fmt: skip
_FUSED = _MOVES | _TRANSCENDENTAL | _ELEMENTWISE
# Primitives whose result is stored when it has several uses, not computed for each.
_COMPUTED_ONCE = _TRANSCENDENTAL | {"div"}
# Reductions take fused operands directly; all other kernels need theirs in memory.
_REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin",
    "concatenate",
}  # fmt: skip
# Kernels with a jaxpr of their own, which is not run on arrays in memory.
_KERNELS = ("scatter", "reduce", "select_and_scatter", "select_and_gather", "cumred", "pallas_call")


@dataclass(frozen=True)
class Product:
    """A matrix product, or a convolution: its FLOPs, the bytes of its operands and its result, and the dtype of its
    operands."""

    flops: int
    nbytes: int
    dtype: str
    is_convolution: bool = False

    def seconds(self, target: Target) -> float:
        """By the roofline: the longer of its arithmetic and its traffic."""
        return max(self.flops / target.peak(self.dtype), self.nbytes / target.bandwidth)


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic: matrix products and how often each is done, elementwise operations, and bytes that are
    moved beside the products' own (for merging: its sources and its results). called_seconds: of functions that are not
    traced, measured on this machine."""

    products: Mapping[Product, float] = field(default_factory=dict)
    elementwise: float = 0.0
    merge_bytes: float = 0.0
    called_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        products = Counter(self.products)
        products.update(Counter(other.products))
        called_seconds = self.called_seconds + other.called_seconds
        return Cost(
            products, self.elementwise + other.elementwise, self.merge_bytes + other.merge_bytes, called_seconds
        )

    def __mul__(self, times: float) -> "Cost":
        products = {product: count * times for product, count in self.products.items()}
        return Cost(products, self.elementwise * times, self.merge_bytes * times, self.called_seconds * times)

    @property
    def flops(self) -> float:
        return self.elementwise + sum(product.flops * count for product, count in self.products.items())

    @property
    def nbytes(self) -> float:
        return self.merge_bytes + sum(product.nbytes * count for product, count in self.products.items())

    def seconds(self, target: Target) -> float:
        """Device seconds by the roofline, one operation after the other: each matrix product takes the longer of its
        arithmetic and its traffic, and merging its traffic. Elementwise operations are taken to cost nothing beside
        these. The measured seconds of functions that are not traced are added."""
        products = sum(product.seconds(target) * count for product, count in self.products.items())
        return products + self.merge_seconds(target) + self.called_seconds

    def merge_seconds(self, target: Target) -> float:
        return self.merge_bytes / target.bandwidth

    def compute_seconds(self, target: Target) -> float:
        """The seconds of the matrix products whose arithmetic takes longer than their traffic."""
        return sum(
            product.seconds(target) * count
            for product, count in self.products.items()
            if product.flops / target.peak(product.dtype) >= product.nbytes / target.bandwidth
        )


def scan_length(eqn: Any) -> int:
    """The trips of a loop whose number of trips the program says; 1 for others."""
    return int(eqn.params["length"]) if eqn.primitive.name == "scan" else 1


def cost_of(jaxpr: Any, trips: Trips = scan_length, platform: Platform | None = None) -> Cost:
    """The cost of a closed jaxpr. Among branches the one with the most FLOPs counts; where the compilation target
    selects the branch, that of `platform`."""
    products: Counter[Product] = Counter()
    elementwise = 0.0
    inner_cost = Cost()
    for eqn in jaxpr.jaxpr.eqns:
        name = eqn.primitive.name
        inner = [cost_of(part, trips, platform) for part in _parts(eqn, platform)]
        if name == "dot_general":
            products[_product(eqn)] += 1
        elif name == "conv_general_dilated":
            products[_convolution(eqn)] += 1
        elif name == "ragged_dot_general":
            products[_ragged_product(eqn)] += 1
        elif name == "cond":
            inner_cost += max(inner, key=lambda cost: cost.flops)
        elif inner:
            times = trips(eqn) if name in ("scan", "while") else 1
            inner_cost += sum(inner, Cost()) * times
        elif name in _ELEMENTWISE:
            elementwise += sum(_size(out.aval) for out in eqn.outvars)
        elif name.startswith(("reduce_", "arg", "cum")):
            elementwise += sum(_size(operand.aval) for operand in eqn.invars)
    return Cost(products, elementwise) + inner_cost


def convolution_share(cost: Cost) -> float:
    """The share of a program's products that convolutions are, by FLOPs."""
    flops = sum(product.flops * count for product, count in cost.products.items() if product.is_convolution)
    return flops / max(1, sum(product.flops * count for product, count in cost.products.items()))


def temporary_bytes(
    jaxpr: Any, donated: Sequence[Any] = (), platform: Platform | None = None, cut: Sequence[Axis] = (), shards: int = 1
) -> int:
    """The most bytes that a program has in memory of a device at a time beside its arguments, its results included:
    buffers live from their computation to their last use, in the order of the program, except that compilers delay
    operations on arguments alone until their results are needed. donated: the shapes and dtypes of arguments whose
    buffers results of the same shape and dtype reuse. platform: whose compiler's habits count (see `_Setting`). cut:
    for each argument the axis that `shards` devices cut, each of which has its part."""
    setting = _Setting(platform, shards)
    program = _flattened(jaxpr, cut, setting)
    free = Counter((tuple(argument.shape), str(argument.dtype)) for argument in donated)
    in_place = []
    for number, aval in zip(program.results, jaxpr.out_avals, strict=True):
        kind = tuple(aval.shape), str(aval.dtype)
        if free[kind] > 0:
            free[kind] -= 1
            in_place.append(number)
    return _peak(program, in_place, setting)


def result_axes(jaxpr: Any, cut: Sequence[Axis], shards: int) -> tuple[Axis, ...]:
    """For each result of a program the axis that the devices cut (see `temporary_bytes`)."""
    return _flattened(jaxpr, cut, _Setting(None, shards)).axes


# ---------------------------------------------------------------------------------------------------------------


def _size(aval: Any) -> int:
    return prod(aval.shape) if hasattr(aval, "shape") else 1


def _nbytes(aval: Any) -> int:
    try:
        return _size(aval) * jnp.dtype(aval.dtype).itemsize
    except (AttributeError, TypeError):  # A key, or a token.
        return 8 * _size(aval)


def _product(eqn: Any) -> Product:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, right = (operand.aval for operand in eqn.invars)
    inner, out = prod(left.shape[axis] for axis in contracted), eqn.outvars[0].aval
    return Product(2 * inner * _size(out), _nbytes(left) + _nbytes(right) + _nbytes(out), str(left.dtype))


def _convolution(eqn: Any) -> Product:
    """A convolution as the product that it is: each of its results is one of a filter's numbers."""
    image, filters = (operand.aval for operand in eqn.invars)
    out, axis = eqn.outvars[0].aval, eqn.params["dimension_numbers"].rhs_spec[0]
    inner = _size(filters) // filters.shape[axis]
    nbytes = _nbytes(image) + _nbytes(filters) + _nbytes(out)
    return Product(2 * inner * _size(out), nbytes, str(image.dtype), is_convolution=True)


def _ragged_product(eqn: Any) -> Product:
    """The product of N rows in E groups: each row with its group's matrix, so that no more matrices are read than there
    are rows; or, for the derivative by the matrices, each group's rows with as many others."""
    rows, right, sizes = (operand.aval for operand in eqn.invars)
    out, groups = eqn.outvars[0].aval, sizes.shape[-1]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops, read = 2 * prod(rows.shape[axis] for axis in contracted) * _size(out), _nbytes(right)
    if numbers.rhs_group_dimensions:
        read = read * min(groups, rows.shape[numbers.lhs_ragged_dimensions[0]]) // groups
    else:
        flops //= groups
    return Product(flops, _nbytes(rows) + read + _nbytes(out), str(rows.dtype))


def _parts(eqn: Any, platform: Platform | None) -> Iterator[Any]:
    """The closed jaxprs that an equation runs on its operands; not that with which a kernel, such as a scatter that
    adds, combines two entries, nor that of a Pallas kernel, which computes in a core's own memory. Among branches for a
    platform each, only the one for `platform`; for None the default."""
    if eqn.primitive.name.startswith(_KERNELS):
        return
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:
        name = "cuda" if platform == "gpu" else platform
        branch = next((i for i, names in enumerate(platforms) if names is not None and name in names), -1)
        yield _closed(eqn.params["branches"][branch])
        return
    for name, value in eqn.params.items():
        # A custom derivative runs only its function.
        for part in () if name.startswith(("jvp", "fwd", "bwd")) else value if isinstance(value, tuple) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield _closed(part)


def _closed(jaxpr: Any) -> Any:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _is_call(eqn: Any, parts: Sequence[Any]) -> bool:
    """Return whether an equation runs one jaxpr on its operands, and gives its results."""
    if len(parts) != 1:
        return False
    inside = parts[0].jaxpr
    return len(inside.invars) == len(eqn.invars) and len(inside.outvars) == len(eqn.outvars)


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
class _Program:
    """A program's steps in their order, with calls written out. arguments, results: the numbers of its arguments and
    its results; axes, sizes: the results' sharded axes and their bytes on a device."""

    steps: list[_Step]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Setting:
    """The compiler and the devices that a program is read for. shards: see `temporary_bytes`."""

    platform: Platform | None = None
    shards: int = 1

    @property
    def widens(self) -> bool:
        """Return whether slices of bfloat16 are read through float32. XLA's compiler for CPUs does so: a loop has a
        float32 copy of the arrays that its trips slice, unless a barrier stands before."""
        return self.platform == "cpu"

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
        return _nbytes(aval) if axis is None else _nbytes(aval) // self.shards


def _flattened(jaxpr: Any, cut: Sequence[Axis], setting: _Setting, sliced: int = 0) -> _Program:
    """A closed jaxpr with its calls written out. cut: its arguments' axes, all None where it is empty. Its last
    `sliced` arguments are slices of larger arrays."""
    steps: list[_Step] = []
    counter = iter(range(10**9))
    axes: dict[int, Axis] = {LITERAL: None}

    def run(jaxpr: Any, given: Sequence[int]) -> tuple[int, ...]:
        numbers = dict(zip(jaxpr.jaxpr.invars, given, strict=True))
        numbers |= {constant: next(counter) for constant in jaxpr.jaxpr.constvars}

        def number(value: Any) -> int:
            return LITERAL if hasattr(value, "val") else numbers[value]

        for eqn in jaxpr.jaxpr.eqns:
            operands, name = tuple(number(value) for value in eqn.invars), eqn.primitive.name
            parts = list(_parts(eqn, setting.platform))
            if name not in ("scan", "while", "cond", "shard_map") and _is_call(eqn, parts):
                numbers |= dict(zip(eqn.outvars, run(parts[0], operands), strict=True))
                continue
            results = tuple(next(counter) for _ in eqn.outvars)
            numbers |= dict(zip(eqn.outvars, results, strict=True))
            operand_axes = [axes.get(operand) for operand in operands]
            inside = [
                _flattened(part, given, setting, count) for part, given, count in _inside(eqn, parts, operand_axes)
            ]
            found = _results_axes(eqn, inside, operand_axes, setting.shards)
            axes.update(zip(results, found, strict=True))
            sizes = tuple(setting.nbytes(out.aval, axis) for out, axis in zip(eqn.outvars, found, strict=True))
            body, repeated = _body_bytes(eqn, inside, setting), _repeated(eqn, operands, inside)
            steps.append(_Step(name, operands, results, sizes, body, _is_batched(eqn), repeated))
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
    found = run(jaxpr, inside)
    cuts = tuple(axes.get(number) for number in found)
    sizes = tuple(setting.nbytes(aval, axis) for aval, axis in zip(jaxpr.out_avals, cuts, strict=True))
    return _Program(steps, given, found, cuts, sizes)


def _is_batched(eqn: Any) -> bool:
    return eqn.primitive.name == "dot_general" and bool(eqn.params["dimension_numbers"][1][0])


def _repeated(eqn: Any, operands: Sequence[int], inside: Sequence[_Program]) -> tuple[int, ...]:
    name = eqn.primitive.name
    if name == "shard_map":
        arguments = inside[0].arguments
        repeated = _repeated_origins(inside[0], {number: frozenset({number}) for number in arguments})
        return tuple(operand for operand, number in zip(operands, arguments, strict=True) if number in repeated)
    if name not in _ELEMENTWISE and name != "broadcast_in_dim":
        return ()
    count = _size(eqn.outvars[0].aval)
    return tuple(operand for operand, value in zip(operands, eqn.invars, strict=True) if _size(value.aval) < count)


def _repeated_origins(program: _Program, origins: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The origins whose values are repeated further on, for example for several candidates. origins: for each argument
    the values that it stands for; slices at places that are not known beforehand are origins of their own."""
    values = dict(origins)
    repeated: set[int] = set()
    for step in program.steps:
        if step.name in _FUSED:
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
        whole = eqn.params["num_consts"] + eqn.params["num_carry"]
        # A trip takes a slice of each operand: without its first axis.
        slices = [None if axis is None or axis == 0 else axis - 1 for axis in own[whole:]]
        yield parts[0], [*own[:whole], *slices], len(slices)
        return
    if name == "while":
        # The condition and the body have constants of their own, and both take the carried values.
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        yield _closed(eqn.params["cond_jaxpr"]), [*own[:first], *own[first + second :]], 0
        yield _closed(eqn.params["body_jaxpr"]), own[first:], 0
        return
    operands = own[1:] if name == "cond" else own
    for part in parts:
        count, carries_axes = len(part.jaxpr.invars), name in ("cond", "shard_map") and not _is_of_one_device(eqn)
        yield part, operands if carries_axes and count == len(operands) else [None] * count, 0


def _is_of_one_device(eqn: Any) -> bool:
    """Return whether an equation's jaxpr is the program of one of the devices that share a model, on its part."""
    return eqn.primitive.name == "shard_map" and MODEL_AXIS in eqn.params["newly_manual_axes"]


def _results_axes(eqn: Any, inside: Sequence[_Program], own: Sequence[Axis], shards: int) -> Sequence[Axis]:
    if shards == 1:
        return [None] * len(eqn.outvars)
    if not inside:
        return cut_axes(eqn, own, shards)
    # For a loop the axes of the body, which has more results than the condition.
    axes, name = max((program.axes for program in inside), key=len), eqn.primitive.name
    if _is_of_one_device(eqn):
        return [axis_of(spec) for spec in eqn.params["out_specs"]]
    if len(axes) != len(eqn.outvars):
        return [None] * len(eqn.outvars)
    if name == "scan":
        carries = eqn.params["num_carry"]
        # The results of all trips are stacked along a new first axis.
        return [*axes[:carries], *(None if axis is None else axis + 1 for axis in axes[carries:])]
    return axes


def _body_bytes(eqn: Any, inside: Sequence[_Program], setting: _Setting) -> int:
    """The most bytes that a loop's body, or the largest branch, needs at a time beside its results: the values that a
    loop carries from one trip to the next, and the results of its trips, have one place, which is counted with the
    loop's results."""
    name, copies = eqn.primitive.name, 0
    if name == "scan" and setting.widens:
        copies = _widened(eqn, inside[0], eqn.params["num_consts"], eqn.params["num_carry"])
    if name not in ("scan", "while"):
        return max((_peak(program, program.results, setting) for program in inside), default=0)
    constants = eqn.params["num_consts"] if name == "scan" else eqn.params["body_nconsts"]
    carries = eqn.params["num_carry"] if name == "scan" else len(eqn.outvars)
    body = inside[-1]
    carried = {}
    if setting.reuses_carried:
        carried = dict(zip(body.arguments[constants : constants + carries], body.sizes[:carries], strict=True))
    most = _peak(body, body.results[len(carried) :], setting, carried) - sum(carried.values())
    return copies + max(0, most, *(_peak(program, program.results, setting) for program in inside[:-1]))


def _widened(scan: Any, body: _Program, constants: int, carries: int) -> int:
    """Bytes of float32 copies of the bfloat16 arrays that are the same in every trip and are sliced in it."""
    picked = {step.operands[0] for step in body.steps if step.name in ("dynamic_slice", "gather")}
    given = list(zip(body.arguments, scan.invars, strict=True))
    return sum(
        2 * _nbytes(value.aval)
        for number, value in given[:constants] + given[constants + carries :]
        if number in picked and str(getattr(value.aval, "dtype", "")) == "bfloat16"
    )


def _peak(
    program: _Program, in_place: Iterable[int], setting: _Setting, carried: Mapping[int, int] = MappingProxyType({})
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
        if step.name not in _FUSED or any(number in roots[number] for number in step.results):
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
        elif step.name in _ELEMENTWISE or step.name in _TRANSCENDENTAL:
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


def _delayed(program: _Program, kept: frozenset[int]) -> list[_Step]:
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
        is_free = step.name in _FUSED and kept.isdisjoint(step.results)
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
    program: _Program,
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
    wanted = {
        operand
        for step in steps
        if step.name not in _FUSED and step.name not in _REDUCTIONS
        for operand in step.operands
    } | set(program.results)
    memory = {number: frozenset({number}) for number in carried}
    # The values that are arguments, in memory, or only rearranged from these; and those that are arguments, or only
    # rearranged from arguments.
    lying, moved = set(program.arguments), set(program.arguments)
    for step in steps:
        is_kernel = step.name not in _FUSED
        # A value that is only rearranged needs no buffer of its own; a slice only where its place is known beforehand.
        whole = step.operands[:1] if step.name == "dynamic_slice" else step.operands
        known_place = all(operand == LITERAL for operand in step.operands[len(whole) :])
        is_copied = setting.copies_slices and step.name == "slice" and whole[0] in moved
        rearranged = step.name in _MOVES - {"pad"} and known_place and not is_copied and lying.issuperset(whole)
        operand_roots = [_united(memory, [operand]) for operand in step.operands]
        together = frozenset[int]().union(*operand_roots)
        # A barrier returns each of its operands.
        passed = operand_roots if step.name == "optimization_barrier" else [together] * len(step.results)
        for number, roots in zip(step.results, passed, strict=True):
            # A sum of several values that goes on, such as the residual stream, takes the place of one of them.
            is_sum = step.name in ("add", "add_any") and sum(size[root] >= size[number] for root in roots) > 1
            is_reused = uses[number] > 1 and (is_sum or step.name in _COMPUTED_ONCE)
            is_stored = is_kernel or (number in wanted and not rearranged) or is_reused or number in kept
            memory[number] = frozenset({number}) if is_stored else roots
            lying |= {number} if is_stored or rearranged else set()
            moved |= {number} if rearranged and not is_stored and moved.issuperset(whole) else set()
    return memory
