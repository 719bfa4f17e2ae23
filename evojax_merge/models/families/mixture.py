"""What mixtures of experts share: the tensors, the router, and the experts' forward pass.

A Llama-like decoder in which each layer has E gated MLPs (*experts*) in place of one. A router gives every token its A
experts and their weights, and only those are computed. Letters: N tokens, E experts, A of them for each token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from evojax_merge.models.architecture import LAYERS, ROUTER, Architecture, Leaf
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SIZE, Expected
from evojax_merge.models.families import llama_like
from evojax_merge.models.layers import ACTIVATIONS, Attend, CosSin, KeyValue, Weights, matmul, rms_norm
from evojax_merge.models.sharding import MODEL_AXIS, cut_at, map_shards, shards_of

# On a CPU blocks of one expert's tokens have one of so many sizes, which differ by multiples of so many rows.
SIZES, LEAST_STEP = 8, 32
# On a GPU every expert is computed of up to so many tokens; of more, so many blocks of one expert's tokens at a time.
FEW_TOKENS, BLOCKS_AT_ONCE = 1024, 16


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(LlamaLikeConfig):
    """A Llama-like decoder whose MLPs are mixtures; `mlp` is the width of an expert.

    weights_sum_to_one: whether the weights of a token's experts are normalised to that. shared_mlp: the width of an
    expert that takes every token; 0: there is none.
    """

    experts: int
    experts_per_token: int
    weights_sum_to_one: bool
    shared_mlp: int = 0


# ---------------------------------------------------------------------------------------------------------------
# Tensors


def expert_leaves(router: str, experts: str, gate: str, up: str, down: str) -> tuple[Leaf, ...]:
    """The router's tensor `[E, hidden]`, and those of all experts. router, experts: modules of a layer, before which
    `model.layers.{layer}.` stands; gate, up, down: modules of an expert."""
    layer = "model.layers.{layer}."
    expert = f"{layer}{experts}.{{expert}}."
    wide = ("experts", "mlp", "hidden")
    return (
        Leaf("router", f"{layer}{router}.weight", ROUTER, ("experts", "hidden"), LAYERS),
        Leaf("gate", f"{expert}{gate}.weight", "mlp", wide, LAYERS, sharded_axis=-2),
        Leaf("up", f"{expert}{up}.weight", "mlp", wide, LAYERS, sharded_axis=-2),
        Leaf(
            "down", f"{expert}{down}.weight", "mlp", ("experts", "hidden", "mlp"), LAYERS, sharded_axis=-1,
            writes_residual=True,
        ),
    )  # fmt: skip


def dimensions(config: MixtureConfig) -> dict[str, int]:
    return llama_like.dimensions(config) | {"experts": config.experts, "shared_mlp": config.shared_mlp, "one": 1}


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def route(config: MixtureConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights float32[N, A] of tokens `[N, hidden]` for their experts, and which these are, int32[N, A]: the A
    largest of a softmax over all experts, in float32."""
    logits = matmul(x, weights["router"], jnp.float32)
    shares, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.experts_per_token)
    if config.weights_sum_to_one:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return shares, experts


def ragged_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """The tokens sorted by expert, and matmuls of their runs, for which TPUs have a kernel."""
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=len(weights["gate"])).astype(jnp.int32)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )

    def dot(rows: jax.Array, name: str) -> jax.Array:
        return jax.lax.ragged_dot_general(rows, weights[name], sizes, numbers)

    rows = x[order // experts.shape[1]]
    rows = dot(ACTIVATIONS[config.activation](dot(rows, "gate")) * dot(rows, "up"), "down")
    return rows[jnp.argsort(order)].reshape(*experts.shape, -1)


def side_by_side(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute(weights, x, experts, …)` of one candidate, whose vmap is one call for all P of them: their experts are
    P E experts, and their tokens P N tokens. (A ragged matmul of a TPU takes no batch of groups.)

    All that it is given and finds has an axis of experts or of tokens in front.
    """

    @jax.custom_batching.custom_vmap
    def run(*given: Any) -> Any:
        return compute(*given)

    @run.def_vmap
    def of_all(candidates: int, batched: Sequence[Any], *given: Any) -> Any:
        def each(leaf: jax.Array, has_candidates: bool) -> jax.Array:
            return leaf if has_candidates else jnp.broadcast_to(leaf, (candidates, *leaf.shape))

        weights, x, experts, *rest = jax.tree.map(each, given, tuple(batched))
        experts = experts + weights["gate"].shape[1] * jnp.arange(candidates, dtype=experts.dtype)[:, None, None]
        joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (weights, x, experts, *rest))
        found = jax.tree.map(lambda leaf: leaf.reshape(candidates, -1, *leaf.shape[1:]), run(*joined))
        return found, jax.tree.map(lambda _: True, found)

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def joined_ragged_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """`ragged_experts`, of several candidates as of one with all of their experts."""
    return side_by_side(partial(ragged_experts, config))(weights, x, experts)


def _joined_forward(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> tuple[jax.Array, Any]:
    return joined_ragged_experts(config, weights, x, experts), (weights, x, experts)


def _joined_backward(config: MixtureConfig, operands: Any, cotangent: jax.Array) -> Any:
    def backward(weights: Weights, x: jax.Array, experts: jax.Array, cotangent: jax.Array) -> tuple[Weights, jax.Array]:
        # A TPU's kernel is of the product alone: derivatives by the weights would be of every row with every expert.
        _, pull_back = jax.vjp(lambda weights, x: gathered_experts(config, weights, x, experts), weights, x)
        return pull_back(cotangent)

    return (*side_by_side(backward)(*operands, cotangent), None)


joined_ragged_experts.defvjp(_joined_forward, _joined_backward)


def every_expert(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Every expert of every token, of which those that it has are picked."""
    found = jax.vmap(lambda own: llama_like.gated_mlp(config, own, x))(weights)
    return found[experts, jnp.arange(len(x))[:, None]]


def gathered_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """The tokens sorted by expert, in blocks of one size of which each is one expert's, and batched matmuls of several
    blocks with copies of their experts' weights.

    On a GPU XLA computes a ragged matmul as one of every row with every expert, and the host waits for the device where
    the number of a loop's steps is the program's to find. Here the blocks are as many as there may be: of half the size
    of what an expert takes on average, one and a half times the rows.
    """
    tokens, per_token = experts.shape
    chosen, total, count = experts.reshape(-1), experts.size, len(weights["gate"])
    size = max(LEAST_STEP, total // (2 * count))
    blocks = blocks_of(jnp.bincount(chosen, length=count), total, (size,))
    order = jnp.argsort(chosen, stable=True)
    # Of each place in the blocks, which expert of which token is computed there; `total`: none.
    within = jnp.arange(size)
    slots = jnp.where(
        within < blocks.rows[:, None], order[jnp.minimum(blocks.begin[:, None] + within, total - 1)], total
    )

    @jax.checkpoint  # Else the derivative would keep the weights of all blocks.
    def of_block(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert, slots = operands
        own = {name: leaf[expert] for name, leaf in weights.items()}
        return llama_like.gated_mlp(config, own, x[jnp.minimum(slots // per_token, tokens - 1)])

    found = jax.lax.map(of_block, (blocks.expert, slots), batch_size=min(len(slots), BLOCKS_AT_ONCE))
    place = jnp.zeros(total, slots.dtype).at[slots.reshape(-1)].set(jnp.arange(slots.size), mode="drop")
    return found.reshape(slots.size, -1)[place].reshape(tokens, per_token, -1)


def gpu_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Of few tokens every expert of each, for the weights of most experts are read anyway, and once."""
    compute = every_expert if len(x) <= FEW_TOKENS else gathered_experts
    return compute(config, weights, x, experts)


def block_sizes(tokens: int, per_token: int, experts: int) -> tuple[int, ...]:
    """How many rows a block of one expert's tokens may have, ascending: multiples of a sixth of what an expert takes on
    average, up to a third more than that, so that most experts' tokens are one block, of which little is computed in
    vain. Each size is a branch of the program."""
    sixth = -(-tokens * per_token // (6 * experts))
    step = LEAST_STEP * -(-sixth // LEAST_STEP)
    return tuple(sorted({min(tokens, step * number) for number in range(1, SIZES + 1)}))


@struct.dataclass
class Blocks:
    """Runs of rows of one expert, ascending: `count` int32[] of the J that there may be. Of each, int32[J]: size, which
    of the sizes it is computed in; its expert; begin, its first row; rows, how many of them are its expert's."""

    count: jax.Array
    size: jax.Array
    expert: jax.Array
    begin: jax.Array
    rows: jax.Array


def blocks_of(loads: jax.Array, total: int, sizes: tuple[int, ...]) -> Blocks:
    """The blocks of `total` rows that are sorted by expert. loads: int32[E], how many rows each expert has."""
    experts, largest = len(loads), sizes[-1]
    first, blocks = jnp.cumsum(loads) - loads, (loads + largest - 1) // largest
    ends = jnp.cumsum(blocks)
    # Each expert with a row may leave a block of which all rows but one are free.
    number = jnp.arange((total + min(experts, total) * (largest - 1)) // largest)
    expert = jnp.minimum(jnp.searchsorted(ends, number, side="right"), experts - 1)
    before = (number - (ends - blocks)[expert]) * largest
    rows = jnp.minimum(loads[expert] - before, largest)
    return Blocks(ends[-1], jnp.searchsorted(jnp.asarray(sizes), rows), expert, first[expert] + before, rows)


def blocked_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """The tokens sorted by expert, in blocks of which each is one expert's, one block after the other.

    On a CPU XLA computes a ragged matmul as one of every row with every expert. Here what is computed in vain is the
    rest of each expert's last block.
    """
    tokens, per_token = experts.shape
    chosen, total = experts.reshape(-1), experts.size
    sizes = block_sizes(tokens, per_token, config.experts)
    blocks = blocks_of(jnp.bincount(chosen, length=config.experts), total, sizes)
    order = jnp.argsort(chosen, stable=True)
    # The last block may reach behind the last row.
    rows = x[jnp.pad(order // per_token, (0, sizes[-1]))]
    place = jnp.zeros(total, order.dtype).at[order].set(jnp.arange(total, dtype=order.dtype))
    return run_blocks(config, sizes, weights, rows, blocks)[place].reshape(tokens, per_token, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_blocks(
    config: MixtureConfig, sizes: tuple[int, ...], weights: Weights, rows: jax.Array, blocks: Blocks
) -> jax.Array:
    """What experts make of their rows, `[R, hidden]`; of the largest size many rows behind the last block are free.

    Several candidates are computed one after the other: side by side each would compute its blocks in every size. The
    derivative is written out, since a loop whose number of steps the program does not know has none.
    """

    @jax.custom_batching.sequential_vmap
    def forward(weights: Weights, rows: jax.Array, blocks: Blocks) -> jax.Array:
        def of_size(size: int, block: Blocks) -> jax.Array:
            found = llama_like.gated_mlp(config, *_operands(weights, rows, block, size))
            return jnp.pad(found, ((0, sizes[-1] - size), (0, 0)))

        def step(number: jax.Array, found: jax.Array) -> jax.Array:
            block = _block(blocks, number)
            fresh = jax.lax.switch(block.size, [partial(of_size, size) for size in sizes], block)
            # What it has behind its rows is the next blocks' place, who come later.
            return jax.lax.dynamic_update_slice_in_dim(found, fresh, block.begin, 0)

        return jax.lax.fori_loop(0, blocks.count, step, jnp.zeros_like(rows))

    return forward(weights, rows, blocks)


def _run_blocks_forward(
    config: MixtureConfig, sizes: tuple[int, ...], weights: Weights, rows: jax.Array, blocks: Blocks
) -> tuple[jax.Array, Any]:
    return run_blocks(config, sizes, weights, rows, blocks), (weights, rows, blocks)


def _run_blocks_backward(config: MixtureConfig, sizes: tuple[int, ...], operands: Any, cotangent: jax.Array) -> Any:
    largest = sizes[-1]

    @jax.custom_batching.sequential_vmap
    def backward(weights: Weights, rows: jax.Array, blocks: Blocks, cotangent: jax.Array) -> tuple[Weights, jax.Array]:
        def of_size(size: int, block: Blocks, cotangent: jax.Array) -> tuple[Weights, jax.Array]:
            _, pull_back = jax.vjp(partial(llama_like.gated_mlp, config), *_operands(weights, rows, block, size))
            own, part = pull_back(cotangent[:size])
            return own, jnp.pad(part, ((0, largest - size), (0, 0)))

        def step(number: jax.Array, totals: tuple[Weights, jax.Array]) -> tuple[Weights, jax.Array]:
            (of_weights, of_rows), block = totals, _block(blocks, number)
            behind = jax.lax.dynamic_slice_in_dim(cotangent, block.begin, largest)
            behind = jnp.where(jnp.arange(largest)[:, None] < block.rows, behind, 0)
            own, part = jax.lax.switch(block.size, [partial(of_size, size) for size in sizes], block, behind)
            of_weights = {name: total.at[block.expert].add(own[name]) for name, total in of_weights.items()}
            return of_weights, jax.lax.dynamic_update_slice_in_dim(of_rows, part, block.begin, 0)

        return jax.lax.fori_loop(0, blocks.count, step, jax.tree.map(jnp.zeros_like, (weights, rows)))

    return (*backward(*operands, cotangent), None)


run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)


def _block(blocks: Blocks, number: jax.Array) -> Blocks:
    """One block, int32[] each."""
    of_each = (blocks.size, blocks.expert, blocks.begin, blocks.rows)
    return Blocks(blocks.count, *(leaf[number] for leaf in of_each))


def _operands(weights: Weights, rows: jax.Array, block: Blocks, size: int) -> tuple[Weights, jax.Array]:
    """The weights of a block's expert, and the block's rows."""
    own = {name: jax.lax.dynamic_index_in_dim(leaf, block.expert, keepdims=False) for name, leaf in weights.items()}
    return own, jax.lax.dynamic_slice_in_dim(rows, block.begin, size)


def weighted_experts(
    config: MixtureConfig, weights: Weights, x: jax.Array, shares: jax.Array, experts: jax.Array
) -> jax.Array:
    """What the experts of each token make of `[N, hidden]`, by their weights float32[N, A], added up."""
    # By what the program is compiled for, which need not be what is here.
    found = jax.lax.platform_dependent(
        weights, x, experts, cpu=partial(blocked_experts, config), cuda=partial(gpu_experts, config),
        default=partial(joined_ragged_experts, config),
    )  # fmt: skip
    # A batched product of a row with a matrix would not be fused with what picks the rows.
    weighted = (shares[:, a, None] * found[:, a].astype(jnp.float32) for a in range(shares.shape[1]))
    return sum(weighted, jnp.float32(0)).astype(x.dtype)


def mixture(config: MixtureConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """What the experts of each token, and the one that takes every token, make of `[B, T, hidden]`, added up."""
    rows = x.reshape(-1, x.shape[-1])
    with jax.named_scope("router"):
        shares, experts = route(config, weights, rows)
    own = {name: weights[name] for name in ("gate", "up", "down")}
    with jax.named_scope("experts"):
        if shards_of(config.mlp) == 1:
            total = weighted_experts(config, own, rows, shares, experts)
        else:
            # Each device has a part of every expert; left to itself the compiler adds up what it finds block by block.
            cuts = {"gate": cut_at(3, -2), "up": cut_at(3, -2), "down": cut_at(3, -1)}, *[cut_at(2, None)] * 3

            def part(device: jax.Array, *operands: Any) -> jax.Array:
                return jax.lax.psum(weighted_experts(config, *operands), MODEL_AXIS)

            total = map_shards(part, cuts, cut_at(2, None), own, rows, shares, experts)
    if config.shared_mlp:
        own = {name: weights[f"shared_{name}"] for name in ("gate", "up", "down")}
        open_ = jax.nn.sigmoid(matmul(rows, weights["shared_expert_gate"]))
        total = total + open_ * llama_like.gated_mlp(config, own, rows)
    return total.reshape(x.shape)


def block(
    config: MixtureConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    x, kept = llama_like.attention(config, weights, x, rope, attend)
    return x + mixture(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps)), kept


# ---------------------------------------------------------------------------------------------------------------
# config.json

# As transformers has the experts of all mixtures in memory, and writes them with `save_original_format=False`.
PACKED = {"experts.gate_up_proj": ("gate", "up"), "experts.down_proj": ("down",)}
# Experts of all layers beyond this number are a slip or a trap: each has names of its own before a tensor is read.
MOST_EXPERTS = 200_000
DENSE_LAYERS = "layers without experts among those with are not supported"
# How Qwen's configs may say that some layers are plain MLPs.
ALL_SPARSE: dict[str, Expected] = {
    "decoder_sparse_step": Expected(lambda value: value == 1, f"1; {DENSE_LAYERS}"),
    "mlp_only_layers": Expected(lambda value: value in (None, []), f"null or an empty list; {DENSE_LAYERS}"),
}
# The number of experts has two names in Qwen's configs.
QWEN_EXPERTS: dict[str, Expected] = ALL_SPARSE | {
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": Expected(lambda value: isinstance(value, bool), "true or false"),
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "num_local_experts": SIZE,
}


def mixture_config(dense: LlamaLikeConfig, *, mlp: int, experts: int, per_token: int, **rest: Any) -> MixtureConfig:
    """The config of a model whose attention and norms are `dense`'s. Raises ValueError where there are fewer experts
    than a token is to have, or more in all layers than any model has."""
    if per_token > experts:
        raise ValueError(f"num_experts_per_tok: {per_token}; expected at most the number of experts, {experts}")
    if experts * dense.layers > MOST_EXPERTS:
        raise ValueError(f"{experts} experts in {dense.layers} layers each; expected at most {MOST_EXPERTS:,} in all")
    return MixtureConfig(**(vars(dense) | {"mlp": mlp}), experts=experts, experts_per_token=per_token, **rest)


def mixture_of_experts(
    model_type: str,
    config_class: str,
    leaves: tuple[Leaf, ...],
    filters: dict[str, str],
    packed: dict[str, tuple[str, ...]],
    keys: dict[str, Expected],
    read: Callable[[Mapping[str, Any]], MixtureConfig],
) -> Architecture:
    """An architecture of a Llama's attention and norms, and of these leaves of mixtures.

    filters: of their components; the router's comes first, since a name that has it may have the other's, too. packed:
    see Architecture; of modules of `mlp`, beside the experts.
    """
    return Architecture(
        model_type=model_type,
        leaves=(*(leaf for leaf in llama_like.LEAVES if leaf.component != "mlp"), *leaves),
        keys=llama_like.KEYS | keys,
        read_config=read,
        dimensions=dimensions,
        embed=llama_like.embed,
        position_tables=llama_like.position_tables,
        block=block,
        final_norm=llama_like.final_norm,
        config_class=config_class,
        packed={f"model.layers.{{layer}}.mlp.{name}": held for name, held in (PACKED | packed).items()},
        filters=filters | {part: text for part, text in llama_like.FILTERS.items() if part not in filters},
    )
