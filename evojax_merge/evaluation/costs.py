"""The arithmetic, traffic and memory of a program, read off its jaxpr: without a compiler or a device, for any program.

A jaxpr says more plainly than a compiled program how often a loop's body runs, and is there in a fraction of the time.
It does not say what a compiler fuses. So this is an estimate: matrix products, reductions, gathers and loops are taken
to read their operands from memory and to leave their results there, and everything elementwise to be fused into its
uses, unless such a use is a matrix product or a loop.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isnan, prod
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from evojax_merge.evaluation.targets import Platform, Target
from evojax_merge.models.sharding import MODEL_AXIS

# Returns how often the body of a `scan` or `while` runs.
Trips = Callable[[Any], int]

# Primitives that are computed within their uses, from operands that are as large: they move and rearrange values, and
# count as no operation.
MOVES = {
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "dynamic_slice", "rev", "pad",
    "iota", "copy", "copy_p", "stop_gradient", "optimization_barrier", "split", "bitcast_convert_type",
    "sharding_constraint", "unstack",
}  # fmt: skip
# One operation for each value of the result. The compiler counts none for the transcendental ones.
TRANSCENDENTAL = {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "rsqrt", "sqrt", "cbrt", "sin", "cos", "tan", "erf",
    "erfc", "erf_inv", "pow", "atan2", "asin", "acos", "atan", "sinh", "cosh",
}  # fmt: skip
ELEMENTWISE = {
    "add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "floor", "ceil", "round", "clamp",
    "and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge", "select_n", "convert_element_type", "integer_pow",
    "square", "is_finite", "nextafter", "shift_left", "shift_right_logical", "shift_right_arithmetic",
}  # fmt: skip
FUSED = MOVES | TRANSCENDENTAL | ELEMENTWISE
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
    """Arithmetic and traffic of a group of devices that share a candidate: matrix products and how often each is done,
    elementwise operations, and bytes that are moved beside the products' own (for merging: its sources and its
    results). sent_bytes: that each device of the group sends to the next; brought_bytes, disk_bytes: of models that
    come to the group from the host, and from its files; called_seconds: of functions that are not traced, measured on
    this machine."""

    products: Mapping[Product, float] = field(default_factory=dict)
    elementwise: float = 0.0
    merge_bytes: float = 0.0
    called_seconds: float = 0.0
    sent_bytes: float = 0.0
    brought_bytes: float = 0.0
    disk_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        products = Counter(self.products)
        products.update(Counter(other.products))
        return Cost(products, **{key: value + getattr(other, key) for key, value in self._amounts.items()})

    def __mul__(self, times: float) -> "Cost":
        products = {product: count * times for product, count in self.products.items()}
        return Cost(products, **{key: value * times for key, value in self._amounts.items()})

    @property
    def _amounts(self) -> dict[str, float]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "products"}

    @property
    def flops(self) -> float:
        return self.elementwise + sum(product.flops * count for product, count in self.products.items())

    @property
    def nbytes(self) -> float:
        return self.merge_bytes + sum(product.nbytes * count for product, count in self.products.items())

    def seconds(self, target: Target, model: int = 1) -> float:
        """Seconds by the roofline of a group of `model` devices, one operation after the other: each matrix product
        takes the longer of its arithmetic and its traffic, merging its traffic, and exchanges theirs. Elementwise
        operations are taken to cost nothing beside these. The measured seconds of functions that are not traced are
        added. Models come from the host, or from files, meanwhile."""
        products = sum(product.seconds(target) * count for product, count in self.products.items())
        computed = (products + self.merge_seconds(target) + self.called_seconds) / model
        return max(
            computed + self.exchange_seconds(target, model), self.link_seconds(target, model),
            self.disk_seconds(target, model),
        )  # fmt: skip

    def merge_seconds(self, target: Target) -> float:
        return self.merge_bytes / target.bandwidth

    def exchange_seconds(self, target: Target, model: int) -> float:
        """Seconds of the sums and gathers over the devices of a group."""
        return seconds_of(self.sent_bytes, target.exchange_rate(model))

    def link_seconds(self, target: Target, model: int) -> float:
        """Seconds in which models come to the devices: each has a link of its own, and gets its part."""
        return seconds_of(self.brought_bytes / model, target.link)

    def disk_seconds(self, target: Target, model: int) -> float:
        """Seconds in which models come from files: hosts read their devices' parts."""
        return seconds_of(self.disk_bytes / max(1, model // target.devices_per_host), target.disk)

    def compute_seconds(self, target: Target) -> float:
        """The seconds of the matrix products whose arithmetic takes longer than their traffic."""
        return sum(
            product.seconds(target) * count
            for product, count in self.products.items()
            if product.flops / target.peak(product.dtype) >= product.nbytes / target.bandwidth
        )


def seconds_of(nbytes: float, rate: float) -> float:
    """Seconds in which so many bytes move; 0 where the rate is not known."""
    return 0.0 if isnan(rate) else nbytes / rate


def scan_length(eqn: Any) -> int:
    """The trips of a loop whose number of trips the program says; 1 for others."""
    return int(eqn.params["length"]) if eqn.primitive.name == "scan" else 1


def cost_of(jaxpr: Any, trips: Trips = scan_length, platform: Platform | None = None) -> Cost:
    """The cost of a closed jaxpr. Among branches the one with the most FLOPs counts, half of it where another computes
    nothing: blocks of a causal row are skipped so. Where the compilation target selects the branch, that of `platform`
    counts."""
    products, inner_products = Counter[Product](), Counter[Product]()
    elementwise = 0.0
    for eqn in jaxpr.jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            products[_product(eqn)] += 1
        elif name == "conv_general_dilated":
            products[_convolution(eqn)] += 1
        elif name == "ragged_dot_general":
            products[_ragged_product(eqn)] += 1
        elif name in ELEMENTWISE:
            elementwise += sum(size_of_aval(out.aval) for out in eqn.outvars)
        elif name in FUSED:
            continue
        elif inner := [cost_of(part, trips, platform) for part in jaxprs_of(eqn, platform)]:
            times: float = trips(eqn) if name in ("scan", "while") else 1
            if is_of_one_device(eqn):
                times = eqn.params["mesh"].shape[MODEL_AXIS]
            if name == "cond":
                times = 1.0 if all(cost.flops for cost in inner) else 0.5
                inner = [max(inner, key=lambda cost: cost.flops)]
            for cost in inner:
                elementwise += cost.elementwise * times
                for product, count in cost.products.items():
                    inner_products[product] += count * times  # type: ignore[assignment]
        elif name.startswith(("reduce_", "arg", "cum")):
            elementwise += sum(size_of_aval(operand.aval) for operand in eqn.invars)
    products.update(inner_products)
    return Cost(products, elementwise)


def is_of_one_device(eqn: Any) -> bool:
    """Return whether an equation's jaxpr is the program of one of the devices that share a model, on its part."""
    return eqn.primitive.name == "shard_map" and MODEL_AXIS in eqn.params["newly_manual_axes"]


def convolution_share(cost: Cost) -> float:
    """The share of a program's products that convolutions are, by FLOPs."""
    flops = sum(product.flops * count for product, count in cost.products.items() if product.is_convolution)
    return flops / max(1, sum(product.flops * count for product, count in cost.products.items()))


# ---------------------------------------------------------------------------------------------------------------


def size_of_aval(aval: Any) -> int:
    return prod(aval.shape) if hasattr(aval, "shape") else 1


def nbytes_of(aval: Any) -> int:
    try:
        return size_of_aval(aval) * jnp.dtype(aval.dtype).itemsize
    except (AttributeError, TypeError):  # A key, or a token.
        return 8 * size_of_aval(aval)


def _product(eqn: Any) -> Product:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, right = (operand.aval for operand in eqn.invars)
    inner, out = prod(left.shape[axis] for axis in contracted), eqn.outvars[0].aval
    return Product(2 * inner * size_of_aval(out), nbytes_of(left) + nbytes_of(right) + nbytes_of(out), str(left.dtype))


def _convolution(eqn: Any) -> Product:
    """A convolution as the product that it is: each of its results is one of a filter's numbers."""
    image, filters = (operand.aval for operand in eqn.invars)
    out, axis = eqn.outvars[0].aval, eqn.params["dimension_numbers"].rhs_spec[0]
    inner = size_of_aval(filters) // filters.shape[axis]
    nbytes = nbytes_of(image) + nbytes_of(filters) + nbytes_of(out)
    return Product(2 * inner * size_of_aval(out), nbytes, str(image.dtype), is_convolution=True)


def _ragged_product(eqn: Any) -> Product:
    """The product of N rows in E groups: each row with its group's matrix, so that no more matrices are read than there
    are rows; or, for the derivative by the matrices, each group's rows with as many others."""
    rows, right, sizes = (operand.aval for operand in eqn.invars)
    out, groups = eqn.outvars[0].aval, sizes.shape[-1]
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops, read = 2 * prod(rows.shape[axis] for axis in contracted) * size_of_aval(out), nbytes_of(right)
    if numbers.rhs_group_dimensions:
        read = read * min(groups, rows.shape[numbers.lhs_ragged_dimensions[0]]) // groups
    else:
        flops //= groups
    return Product(flops, nbytes_of(rows) + read + nbytes_of(out), str(rows.dtype))


def jaxprs_of(eqn: Any, platform: Platform | None) -> Iterator[Any]:
    """The closed jaxprs that an equation runs on its operands; not that with which a kernel, such as a scatter that
    adds, combines two entries, nor that of a Pallas kernel, which computes in a core's own memory. Among branches for a
    platform each, only the one for `platform`; for None the default."""
    if eqn.primitive.name.startswith(_KERNELS):
        return
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:
        name = "cuda" if platform == "gpu" else platform
        branch = next((i for i, names in enumerate(platforms) if names is not None and name in names), -1)
        yield closed(eqn.params["branches"][branch])
        return
    for name, value in eqn.params.items():
        # A custom derivative runs only its function.
        for part in () if name.startswith(("jvp", "fwd", "bwd")) else value if isinstance(value, tuple) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield closed(part)


def constants_and_carries(scan: Any) -> tuple[int, int]:
    """How many operands of a scan are the same in all trips, and how many it carries from one trip to the next."""
    if "num_carry" in scan.params:
        return scan.params["num_consts"], scan.params["num_carry"]
    # Since JAX 0.12 an equation has its operands as a tree.
    constants, carries, _ = scan.params["ft_in"].update(scan.invars).unpack()
    return len(list(constants)), len(list(carries))


def closed(jaxpr: Any) -> Any:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def is_call(eqn: Any, parts: Sequence[Any]) -> bool:
    """Return whether an equation runs one jaxpr on its operands, and gives its results."""
    if len(parts) != 1:
        return False
    inside = parts[0].jaxpr
    return len(inside.invars) == len(eqn.invars) and len(inside.outvars) == len(eqn.outvars)
