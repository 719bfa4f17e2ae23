"""The common parts of mixtures of experts: the tensors, the router, and the experts' forward pass.

A Llama-like decoder in which each layer has E gated MLPs (*experts*) in place of one. A router gives every token its A
experts and their weights, and only these experts are computed. Letters: N tokens, E experts, A of them for each token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.architecture import LAYERS, ROUTER, Architecture, LayerType, Leaf
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SIZE, SWITCH, Expected
from evojax_merge.models.families import llama_like
from evojax_merge.models.layers import ACTIVATIONS, Weights, dense, matmul, rms_norm, without_upcast
from evojax_merge.models.sharding import MODEL_AXIS, cut_at, map_shards, shards_of
from evojax_merge.models.sources import FIRST_EXPERT

# A leaf int32[E] of candidates that share K experts: the one that stands at each of the router's E numbers.
SLOTS = "slots"
# On a CPU: the number of sizes of a block of one expert's tokens, and the least step in rows between them.
SIZES, LEAST_STEP = 8, 32
# On a GPU: the largest number of tokens on which every expert runs, and, above it, the number of blocks (of one
# expert's tokens each) that run at a time.
FEW_TOKENS, BLOCKS_AT_ONCE = 1024, 16


@dataclass(frozen=True)
class Gate:
    """The rule by which a router weighs experts.

    scores: the function of the router's logits, softmax or sigmoid. groups: the number of groups of experts;
    groups_per_token: the number of groups, of the largest sums of `group_top` scores, that a token's experts are in.
    scale: the factor of the weights. least_sum, added: the lower bound of the sum that the weights are divided by, and
    the number that is added to it.
    """

    scores: str = "softmax"
    groups: int = 1
    groups_per_token: int = 1
    group_top: int = 2
    scale: float = 1.0
    least_sum: float = 0.0
    added: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(LlamaLikeConfig):
    """A Llama-like decoder whose MLPs are mixtures; `mlp` is the width of an expert.

    weights_sum_to_one: whether the weights of a token's experts are normalised to sum to 1. shared_mlp: the width of an
    expert that takes every token; 0: there is none. dense_mlp: the width of the MLP of layers without experts; gate:
    see `Gate`. `transposed`: whether the experts' matrices are `[in, out]`.
    """

    experts: int
    experts_per_token: int
    weights_sum_to_one: bool
    shared_mlp: int = 0
    dense_mlp: int = 0
    gate: Gate = Gate()

    parts: ClassVar[Mapping[str, int]] = {"gate": -2, "up": -2, "down": -1}
    transposed: ClassVar[bool] = False

    def inner(self, project: Callable[[str], jax.Array]) -> jax.Array:
        """The vectors that an expert's last matrix is multiplied with; project: the name of another matrix -> the
        products of the inputs with it."""
        return ACTIVATIONS[self.activation](project("gate")) * project("up")


Config = TypeVar("Config", bound=MixtureConfig)

# ---------------------------------------------------------------------------------------------------------------
# Tensors


def expert_leaves(router: str, experts: str, gate: str, up: str, down: str, stack: str = LAYERS) -> tuple[Leaf, ...]:
    """The router's leaf `[E, hidden]`, and the leaves of the experts. router, experts: the names of a layer's modules,
    without `model.layers.{layer}.`; gate, up, down: the names of an expert's modules."""
    layer = "model.layers.{layer}."
    expert = f"{layer}{experts}.{{expert}}."
    wide = ("experts", "mlp", "hidden")
    return (
        Leaf("router", f"{layer}{router}.weight", ROUTER, ("experts", "hidden"), stack),
        Leaf("gate", f"{expert}{gate}.weight", "mlp", wide, stack, sharded_axis=-2),
        Leaf("up", f"{expert}{up}.weight", "mlp", wide, stack, sharded_axis=-2),
        Leaf(
            "down", f"{expert}{down}.weight", "mlp", ("experts", "hidden", "mlp"), stack, sharded_axis=-1,
            writes_residual=True,
        ),
    )  # fmt: skip


def shared_leaves(module: str, stack: str = LAYERS) -> tuple[Leaf, ...]:
    """The leaves of an expert that takes every token. module: its name in a layer, without `model.layers.{layer}.`."""
    before = f"model.layers.{{layer}}.{module}"
    leaves = [
        Leaf(f"shared_{name}", f"{before}.{name}_proj.weight", "mlp", ("shared_mlp", "hidden"), stack, -2)
        for name in ("gate", "up")
    ]
    down = Leaf(
        "shared_down", f"{before}.down_proj.weight", "mlp", ("hidden", "shared_mlp"), stack, -1, writes_residual=True
    )
    return tuple(replace(leaf, present_if=lambda config: config.shared_mlp > 0) for leaf in (*leaves, down))


# The expert that takes every token, and its gate, by Qwen's names.
SHARED_EXPERT = (
    *shared_leaves("mlp.shared_expert"),
    Leaf("shared_expert_gate", "model.layers.{layer}.mlp.shared_expert_gate.weight", "mlp", ("one", "hidden"), LAYERS),
)
# The types of layers, and their stacks, of models in which some layers have an MLP in place of a mixture.
DENSE, SPARSE = "dense", "mixture"
_DENSE_NAMES = ("gate", "up", "down")


def dense_leaves() -> tuple[Leaf, ...]:
    """The leaves of the MLPs of layers without experts, by Llama's names."""
    return tuple(
        replace(leaf, name=f"dense_{leaf.name}", stack=DENSE,
                shape=tuple("dense_mlp" if axis == "mlp" else axis for axis in leaf.shape))
        for leaf in llama_like.PROJECTIONS if leaf.name in _DENSE_NAMES
    )  # fmt: skip


def dimensions(config: MixtureConfig) -> dict[str, int]:
    widths = {"shared_mlp": config.shared_mlp, "dense_mlp": config.dense_mlp}
    return llama_like.dimensions(config) | widths | {"experts": config.experts, "one": 1}


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def route(config: MixtureConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights float32[N, A] of each token's experts, for tokens `[N, hidden]`, and the experts' numbers,
    int32[N, A]: those of the A largest scores, in float32. A leaf `router_correction` is added to the scores that
    choose, and not to the weights."""
    gate, logits = config.gate, matmul(x, weights["router"], jnp.float32)
    if "router_bias" in weights:
        logits = logits + weights["router_bias"].astype(jnp.float32)
    scores = jax.nn.sigmoid(logits) if gate.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores
    if "router_correction" in weights:
        choice = choice + weights["router_correction"].astype(jnp.float32).reshape(-1)
    if gate.groups_per_token < gate.groups:
        choice = _within_groups(gate, choice)
    _, experts = jax.lax.top_k(choice, config.experts_per_token)
    shares = jnp.take_along_axis(scores, experts, axis=-1)
    if config.weights_sum_to_one:
        shares = shares / (jnp.maximum(shares.sum(axis=-1, keepdims=True), gate.least_sum) + gate.added)
    return shares * gate.scale, experts


def _within_groups(gate: Gate, scores: jax.Array) -> jax.Array:
    """The scores `[N, E]`, with the least number outside of each token's groups."""
    by_group = scores.reshape(len(scores), gate.groups, -1)
    totals = jax.lax.top_k(by_group, gate.group_top)[0].sum(axis=-1)
    _, groups = jax.lax.top_k(totals, gate.groups_per_token)
    is_inside = (groups[:, :, None] == jnp.arange(gate.groups)).any(axis=1)
    return jnp.where(is_inside[:, :, None], by_group, -jnp.inf).reshape(scores.shape)


def expert_mlp(config: MixtureConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """The outputs of one expert, without the bias of its last matrix, for tokens `[N, hidden]`."""
    if config.transposed:
        weights = {name: leaf.T if leaf.ndim == 2 else leaf for name, leaf in weights.items()}
    with jax.named_scope("mlp"):
        return dense(config.inner(lambda name: dense(x, weights, name)), weights, "down")


def ragged_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Sort the tokens by expert, and multiply each expert's run of tokens by its weights, for which TPUs have a
    kernel."""
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=len(weights["down"])).astype(jnp.int32)
    inputs = 1 if config.transposed else 2
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (inputs,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )

    def dot(rows: jax.Array, name: str) -> jax.Array:
        products = jax.lax.ragged_dot_general(rows, weights[name], sizes, numbers)
        bias = weights.get(f"{name}_bias")
        return products if bias is None else products + bias[chosen[order]]

    rows = x[order // experts.shape[1]]
    rows = dot(config.inner(partial(dot, rows)), "down")
    return rows[jnp.argsort(order)].reshape(*experts.shape, -1)


def side_by_side(compute: Callable[..., Any], shares_experts: bool = False) -> Callable[..., Any]:
    """`compute(weights, x, experts, …)` of one candidate, whose vmap is one call for all P of them: their experts are
    P E experts, and their tokens P N tokens. (A ragged matmul of a TPU takes no batch of groups.)

    All of its arguments and results have a leading axis of experts or of tokens. shares_experts: whether experts that
    all candidates share stay E; the results must then be of tokens alone.
    """

    @jax.custom_batching.custom_vmap
    def run(*operands: Any) -> Any:
        return compute(*operands)

    @run.def_vmap
    def of_all(candidates: int, batched: Sequence[Any], *operands: Any) -> Any:
        def each(leaf: jax.Array, has_candidates: bool) -> jax.Array:
            return leaf if has_candidates else jnp.broadcast_to(leaf, (candidates, *leaf.shape))

        def join(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)

        weights = operands[0]
        x, experts, *rest = jax.tree.map(each, operands[1:], tuple(batched[1:]))
        if not shares_experts or any(jax.tree.leaves(batched[0])):
            weights = jax.tree.map(each, weights, batched[0])
            experts = experts + weights["down"].shape[1] * jnp.arange(candidates, dtype=experts.dtype)[:, None, None]
            weights = join(weights)
        joined = weights, *join((x, experts, *rest))
        results = jax.tree.map(lambda leaf: leaf.reshape(candidates, -1, *leaf.shape[1:]), run(*joined))
        return results, jax.tree.map(lambda _: True, results)

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def joined_ragged_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """`ragged_experts`, which treats several candidates as one candidate with all of their experts."""
    return side_by_side(partial(ragged_experts, config), shares_experts=True)(weights, x, experts)


def _joined_backward(config: MixtureConfig, operands: Any, cotangent: jax.Array) -> Any:
    def backward(weights: Weights, x: jax.Array, experts: jax.Array, cotangent: jax.Array) -> tuple[Weights, jax.Array]:
        # TPUs have a kernel for the product alone: derivatives by the weights would multiply every row with every
        # expert.
        _, pull_back = jax.vjp(lambda weights, x: gathered_experts(config, weights, x, experts), weights, x)
        return pull_back(cotangent)

    return (*side_by_side(backward)(*operands, cotangent), None)


joined_ragged_experts.defvjp(
    lambda config, *operands: (joined_ragged_experts(config, *operands), operands), _joined_backward
)


def every_expert(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Run every expert on every token, and pick the results of each token's experts."""
    outputs = jax.vmap(lambda expert: expert_mlp(config, expert, x))(weights)
    return outputs[experts, jnp.arange(len(x))[:, None]]


def gathered_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Sort the tokens by expert, cut them into blocks of one size, each of a single expert, and multiply several blocks
    at a time by copies of their experts' weights.

    On a GPU XLA multiplies every row with every expert in a ragged matmul, and the host waits for the device where the
    program computes a loop's number of steps. The number of blocks here is the largest that may occur: with blocks of
    half an expert's average number of rows, one and a half times the rows.
    """
    tokens, per_token = experts.shape
    chosen, total, count = experts.reshape(-1), experts.size, len(weights["down"])
    size = max(LEAST_STEP, total // (2 * count))
    blocks = blocks_of(jnp.bincount(chosen, length=count), total, (size,))
    order = jnp.argsort(chosen, stable=True)
    # The pair of token and expert, by number, that is computed at each place of the blocks; `total`: none.
    within = jnp.arange(size)
    slots = jnp.where(
        within < blocks.rows[:, None], order[jnp.minimum(blocks.begin[:, None] + within, total - 1)], total
    )

    @jax.checkpoint  # Without it the derivative would keep the weights of all blocks.
    def of_block(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, slots = operands
        expert_weights = {name: leaf[expert] for name, leaf in weights.items()}
        return expert_mlp(config, expert_weights, x[jnp.minimum(slots // per_token, tokens - 1)])

    outputs = jax.lax.map(of_block, (blocks.expert, slots), batch_size=min(len(slots), BLOCKS_AT_ONCE))
    place = jnp.zeros(total, slots.dtype).at[slots.reshape(-1)].set(jnp.arange(slots.size), mode="drop")
    return outputs.reshape(slots.size, -1)[place].reshape(tokens, per_token, -1)


def gpu_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """With few tokens, run every expert on all of them: most experts' weights are read in any case, and this reads them
    once."""
    compute = every_expert if len(x) <= FEW_TOKENS else gathered_experts
    return compute(config, weights, x, experts)


def block_sizes(tokens: int, per_token: int, experts: int) -> tuple[int, ...]:
    """The sizes in rows of a block of one expert's tokens, ascending: multiples of a sixth of an expert's average
    number of rows, up to a third above the average, so that most experts' tokens are one block with little padding."""
    sixth = -(-tokens * per_token // (6 * experts))
    step = LEAST_STEP * -(-sixth // LEAST_STEP)
    return tuple(sorted({min(tokens, step * number) for number in range(1, SIZES + 1)}))


@struct.dataclass
class Blocks:
    """Runs of one expert's rows each, ascending: `count` int32[] of at most J blocks. The other fields are int32[J]:
    size, the index of the block's size; expert; begin, the block's first row; rows, the number of its rows that are its
    expert's."""

    count: jax.Array
    size: jax.Array
    expert: jax.Array
    begin: jax.Array
    rows: jax.Array


def blocks_of(loads: jax.Array, total: int, sizes: tuple[int, ...]) -> Blocks:
    """The blocks of `total` rows that are sorted by expert. loads: int32[E], each expert's number of rows."""
    experts, largest = len(loads), sizes[-1]
    first, blocks = jnp.cumsum(loads) - loads, (loads + largest - 1) // largest
    ends = jnp.cumsum(blocks)
    # Each expert with a row may leave a block with one row in use.
    number = jnp.arange((total + min(experts, total) * (largest - 1)) // largest)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), experts - 1)
    before = (number - (ends - blocks)[expert]) * largest
    rows = jnp.minimum(loads[expert] - before, largest)
    return Blocks(ends[-1], jnp.searchsorted(jnp.asarray(sizes), rows), expert, first[expert] + before, rows)


def blocked_experts(
    config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array, first: jax.Array | None = None
) -> jax.Array:
    """Sort the tokens by expert, cut them into blocks of a single expert each, and run one block after the other.
    first: the number among the weights of the layer's first expert; None: 0.

    On a CPU XLA multiplies every row with every expert in a ragged matmul. Here only the unused rows of each expert's
    last block are computed in vain.
    """
    tokens, per_token = experts.shape
    chosen, total = experts.reshape(-1), experts.size
    sizes = block_sizes(tokens, per_token, config.experts)
    blocks = blocks_of(jnp.bincount(chosen, length=config.experts), total, sizes)
    if first is not None:
        blocks = replace(blocks, expert=blocks.expert + first)
    order = jnp.argsort(chosen, stable=True)
    # The last block may reach behind the last row.
    rows = x[jnp.pad(order // per_token, (0, sizes[-1]))]
    place = jnp.zeros(total, order.dtype).at[order].set(jnp.arange(total, dtype=order.dtype))
    return run_blocks(config, sizes, weights, rows, blocks)[place].reshape(tokens, per_token, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_blocks(
    config: MixtureConfig, sizes: tuple[int, ...], weights: Weights, rows: jax.Array, blocks: Blocks
) -> jax.Array:
    """The experts' outputs for their rows, `[R, hidden]`. `rows` ends with as many unused rows as the largest block
    has.

    Several candidates are computed one after the other: side by side each would compute its blocks in every size. The
    derivative is written out, since JAX has none for a loop whose number of steps is computed.
    """

    @jax.custom_batching.sequential_vmap
    def forward(weights: Weights, rows: jax.Array, blocks: Blocks) -> jax.Array:
        def of_size(size: int, block: Blocks) -> jax.Array:
            outputs = expert_mlp(config, *_operands(weights, rows, block, size))
            return jnp.pad(outputs, ((0, sizes[-1] - size), (0, 0)))

        def step(number: jax.Array, outputs: jax.Array) -> jax.Array:
            block = _block(blocks, number)
            fresh = jax.lax.switch(block.size, [partial(of_size, size) for size in sizes], block)
            # The block's padding lies where the next blocks' outputs will be written.
            return jax.lax.dynamic_update_slice_in_dim(outputs, fresh, block.begin, 0)

        return jax.lax.fori_loop(0, blocks.count, step, jnp.zeros_like(rows))

    return forward(weights, rows, blocks)


def _run_blocks_backward(config: MixtureConfig, sizes: tuple[int, ...], operands: Any, cotangent: jax.Array) -> Any:
    largest = sizes[-1]

    @jax.custom_batching.sequential_vmap
    def backward(weights: Weights, rows: jax.Array, blocks: Blocks, cotangent: jax.Array) -> tuple[Weights, jax.Array]:
        def of_size(size: int, block: Blocks, cotangent: jax.Array) -> tuple[Weights, jax.Array]:
            _, pull_back = jax.vjp(partial(expert_mlp, config), *_operands(weights, rows, block, size))
            weights_gradient, part = pull_back(cotangent[:size])
            return weights_gradient, jnp.pad(part, ((0, largest - size), (0, 0)))

        def step(number: jax.Array, totals: tuple[Weights, jax.Array]) -> tuple[Weights, jax.Array]:
            (of_weights, of_rows), block = totals, _block(blocks, number)
            behind = jax.lax.dynamic_slice_in_dim(cotangent, block.begin, largest)
            behind = jnp.where(jnp.arange(largest)[:, None] < block.rows, behind, 0)
            weights_gradient, part = jax.lax.switch(
                block.size, [partial(of_size, size) for size in sizes], block, behind
            )
            of_weights = {
                name: total.at[block.expert].add(weights_gradient[name]) for name, total in of_weights.items()
            }
            return of_weights, jax.lax.dynamic_update_slice_in_dim(of_rows, part, block.begin, 0)

        return jax.lax.fori_loop(0, blocks.count, step, jax.tree.map(jnp.zeros_like, (weights, rows)))

    return (*backward(*operands, cotangent), None)


run_blocks.defvjp(
    lambda config, sizes, *operands: (run_blocks(config, sizes, *operands), operands), _run_blocks_backward
)


def _block(blocks: Blocks, number: jax.Array) -> Blocks:
    """The block with this number; its fields are int32[]."""
    return Blocks(blocks.count, *(leaf[number] for leaf in (blocks.size, blocks.expert, blocks.begin, blocks.rows)))


def _operands(weights: Weights, rows: jax.Array, block: Blocks, size: int) -> tuple[Weights, jax.Array]:
    """The weights of a block's expert, and the block's rows."""
    expert_weights = {
        name: jax.lax.dynamic_index_in_dim(*without_upcast(leaf, block.expert), keepdims=False).astype(rows.dtype)
        for name, leaf in weights.items()
    }
    return expert_weights, jax.lax.dynamic_slice_in_dim(rows, block.begin, size)


def weighted_experts(
    config: MixtureConfig, weights: Weights, x: jax.Array, shares: jax.Array, experts: jax.Array,
    first: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The sum of the outputs of each token's experts for `[N, hidden]`, weighted by `shares` float32[N, A]. first: see
    `blocked_experts`."""

    def of_layer(compute: Callable[..., jax.Array], weights: Weights, x: Any, experts: Any, first: Any) -> jax.Array:
        if first is not None:
            cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=config.experts)
            weights = {name: cut(leaf).astype(x.dtype) for name, leaf in weights.items()}
        return compute(config, weights, x, experts)

    # By the platform that the program is compiled for, which need not be this machine's.
    outputs = jax.lax.platform_dependent(
        weights, x, experts, first, cpu=partial(blocked_experts, config), cuda=partial(of_layer, gpu_experts),
        default=partial(of_layer, joined_ragged_experts),
    )  # fmt: skip
    # A batched product of a row with a matrix would not be fused with the gather of the rows.
    weighted = (shares[:, a, None] * outputs[:, a].astype(jnp.float32) for a in range(shares.shape[1]))
    return sum(weighted, jnp.float32(0)).astype(x.dtype)


def mixture(config: MixtureConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """The sum of the outputs of each token's experts, and of the expert that takes every token, for `[B, T,
    hidden]`. Between leaves `into_latent` and `from_latent` the experts work on narrower vectors."""
    rows = x.reshape(-1, x.shape[-1])
    with jax.named_scope("router"):
        shares, experts = route(config, weights, rows)
        if SLOTS in weights:
            experts = weights[SLOTS][experts]
    expert_weights = {name: weights[name] for name in config.parts}
    inputs = dense(rows, weights, "into_latent") if "into_latent" in weights else rows
    first = weights.get(FIRST_EXPERT)
    with jax.named_scope("experts"):
        if shards_of(config.mlp) == 1:
            total = weighted_experts(config, expert_weights, inputs, shares, experts, first)
        else:
            # Each device has a shard of every expert; without map_shards the compiler would add up the devices' results
            # for each block.
            parts = {name: cut_at(weights[name].ndim, axis) for name, axis in config.parts.items()}
            cuts = parts, *[cut_at(2, None)] * 3, None if first is None else cut_at(0, None)

            def part(device: jax.Array, *operands: Any) -> jax.Array:
                return jax.lax.psum(weighted_experts(config, *operands), MODEL_AXIS)

            total = map_shards(part, cuts, cut_at(2, None), expert_weights, inputs, shares, experts, first)
    if "from_latent" in weights:
        total = dense(total, weights, "from_latent")
    if "down_bias" in weights:
        biases = (shares[:, a, None] * weights["down_bias"][experts[:, a]] for a in range(config.experts_per_token))
        total = total + sum(biases, jnp.float32(0)).astype(x.dtype)
    if config.shared_mlp:
        expert_weights = {name: weights[f"shared_{name}"] for name in config.parts}
        shared = dense(config.inner(lambda name: dense(rows, expert_weights, name)), expert_weights, "down")
        if "shared_expert_gate" in weights:
            shared = jax.nn.sigmoid(matmul(rows, weights["shared_expert_gate"])) * shared
        total = total + shared
    return total.reshape(x.shape)


# (config, a layer's weights, hidden states, its position tables, access to its memory) -> the hidden states plus the
# output of the layer's first half, such as attention, and what to keep in the memory.
Mixer = Callable[[Any, Weights, jax.Array, Any, Any], tuple[jax.Array, Any]]


def sparse_block(
    mixer: Mixer, config: MixtureConfig, weights: Weights, x: jax.Array, tables: Any, memory: Any
) -> tuple[jax.Array, Any]:
    x, kept = mixer(config, weights, x, tables, memory)
    return x + mixture(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps)), kept


def dense_block(
    mixer: Mixer, config: MixtureConfig, weights: Weights, x: jax.Array, tables: Any, memory: Any
) -> tuple[jax.Array, Any]:
    x, kept = mixer(config, weights, x, tables, memory)
    mlp = {name: weights[f"dense_{name}"] for name in _DENSE_NAMES}
    return x + llama_like.gated_mlp(config, mlp, rms_norm(x, weights["mlp_norm"], config.norm_eps)), kept


block = partial(sparse_block, llama_like.attention)


def dense_and_sparse(attention: Mixer) -> dict[str, LayerType]:
    """The types of layers of a model in which some layers have an MLP in place of a mixture."""
    return {
        DENSE: LayerType(partial(dense_block, attention), (LAYERS, DENSE)),
        SPARSE: LayerType(partial(sparse_block, attention), (LAYERS, SPARSE)),
    }


# ---------------------------------------------------------------------------------------------------------------
# config.json

# The form in which transformers has the experts of all mixtures in memory, and writes them with
# `save_original_format=False`.
PACKED = {
    "model.layers.{layer}.mlp.experts.gate_up_proj": ("gate", "up"),
    "model.layers.{layer}.mlp.experts.down_proj": ("down",),
}
QWEN_FILTERS = {"router": "mlp.gate.", "mlp": ".mlp."}
# The most experts of all layers together. A larger number in a config is a mistake or an attack: the program makes
# names for each expert before it reads a tensor.
MOST_EXPERTS = 200_000
DENSE_LAYERS = "layers without experts among those with are not supported"
# Keys by which Qwen's configs make some layers plain MLPs.
ALL_SPARSE: dict[str, Expected] = {
    "decoder_sparse_step": Expected(lambda value: value == 1, f"1; {DENSE_LAYERS}"),
    "mlp_only_layers": Expected(lambda value: value in (None, []), f"null or an empty list; {DENSE_LAYERS}"),
}
# The number of experts has two names in Qwen's configs.
QWEN_EXPERTS: dict[str, Expected] = ALL_SPARSE | {
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": SWITCH,
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "num_local_experts": SIZE,
}


def read_mixture(
    model_type: str,
    hf: Mapping[str, Any],
    kind: type[Config] = MixtureConfig,  # type: ignore[assignment]
    *,
    experts: str = "num_experts",
    mlp: str = "moe_intermediate_size",
    keys: Mapping[str, str] = MappingProxyType({}),
    **values: Any,
) -> Config:
    """The config for the values `hf` of the keys of config.json. experts, mlp: the keys of the number of experts, and
    of their width; kind, keys, values: see `llama_like.read_config`. Raises ValueError as that does, and where there
    are fewer experts than a token has, or more than MOST_EXPERTS in all layers."""
    read = {"mlp": mlp, "experts": experts, "experts_per_token": "num_experts_per_tok", **keys}
    config = llama_like.read_config(model_type, hf, kind, read, **values)
    if config.experts_per_token > config.experts:
        raise ValueError(
            f"num_experts_per_tok: {config.experts_per_token}; expected at most the number of experts, {config.experts}"
        )
    if config.experts * config.layers > MOST_EXPERTS:
        raise ValueError(
            f"{config.experts} experts in {config.layers} layers each; expected at most {MOST_EXPERTS:,} in all"
        )
    return config


def mixture_of_experts(
    model_type: str,
    config_class: str,
    leaves: tuple[Leaf, ...],
    keys: dict[str, Expected],
    read: Callable[[Mapping[str, Any]], MixtureConfig],
    filters: Mapping[str, str] = QWEN_FILTERS,
    attention_leaves: tuple[Leaf, ...] = llama_like.LEAVES,
    **fields: Any,
) -> Architecture:
    """An architecture with a Llama's attention and norms, or with those of `attention_leaves`, and with mixtures of
    these leaves.

    filters: those of the mixtures' components, empty where whole names are the filters; the router's comes first, since
    a name that contains it may contain the other, too. keys, read, fields: see `llama_like`.
    """
    others = {part: text for part, text in llama_like.FILTERS.items() if filters and part not in filters}
    of_mixtures: dict[str, Any] = {"dimensions": dimensions, "block": block, "packed": PACKED}
    return llama_like.llama_like(
        model_type,
        config_class,
        keys,
        read,
        leaves=(*(leaf for leaf in attention_leaves if leaf.component != "mlp"), *leaves),
        filters={**filters, **others},
        **of_mixtures | fields,
    )
