"""The common parts of mixtures of experts: the tensors, the router, and the experts' forward pass.

A Llama-like decoder in which each layer has E gated MLPs (*experts*) in place of one. A router gives every token its A
experts and their weights, and only these experts are computed. Letters: N tokens, E experts, A of them for each token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
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

# On a CPU: the number of sizes of a block of one expert's tokens, and the least step in rows between them.
SIZES, LEAST_STEP = 8, 32
# On a GPU: the largest number of tokens on which every expert runs, and, above it, the number of blocks (of one
# expert's tokens each) that run at a time.
FEW_TOKENS, BLOCKS_AT_ONCE = 1024, 16


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(LlamaLikeConfig):
    """A Llama-like decoder whose MLPs are mixtures; `mlp` is the width of an expert.

    weights_sum_to_one: whether the weights of a token's experts are normalised to sum to 1. shared_mlp: the width of an
    expert that takes every token; 0: there is none.
    """

    experts: int
    experts_per_token: int
    weights_sum_to_one: bool
    shared_mlp: int = 0


# ---------------------------------------------------------------------------------------------------------------
# Tensors


def expert_leaves(router: str, experts: str, gate: str, up: str, down: str) -> tuple[Leaf, ...]:
    """The router's leaf `[E, hidden]`, and the leaves of the experts. router, experts: the names of a layer's modules,
    without `model.layers.{layer}.`; gate, up, down: the names of an expert's modules."""
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
    """The weights float32[N, A] of each token's experts, for tokens `[N, hidden]`, and the experts' numbers,
    int32[N, A]: the A largest of a softmax over all experts, in float32."""
    logits = matmul(x, weights["router"], jnp.float32)
    shares, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config.experts_per_token)
    if config.weights_sum_to_one:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return shares, experts


def ragged_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Sort the tokens by expert, and multiply each expert's run of tokens by its weights, for which TPUs have a
    kernel."""
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

    All of its arguments and results have a leading axis of experts or of tokens.
    """

    @jax.custom_batching.custom_vmap
    def run(*operands: Any) -> Any:
        return compute(*operands)

    @run.def_vmap
    def of_all(candidates: int, batched: Sequence[Any], *operands: Any) -> Any:
        def each(leaf: jax.Array, has_candidates: bool) -> jax.Array:
            return leaf if has_candidates else jnp.broadcast_to(leaf, (candidates, *leaf.shape))

        weights, x, experts, *rest = jax.tree.map(each, operands, tuple(batched))
        experts = experts + weights["gate"].shape[1] * jnp.arange(candidates, dtype=experts.dtype)[:, None, None]
        joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (weights, x, experts, *rest))
        results = jax.tree.map(lambda leaf: leaf.reshape(candidates, -1, *leaf.shape[1:]), run(*joined))
        return results, jax.tree.map(lambda _: True, results)

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def joined_ragged_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """`ragged_experts`, which treats several candidates as one candidate with all of their experts."""
    return side_by_side(partial(ragged_experts, config))(weights, x, experts)


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
    outputs = jax.vmap(lambda expert: llama_like.gated_mlp(config, expert, x))(weights)
    return outputs[experts, jnp.arange(len(x))[:, None]]


def gathered_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Sort the tokens by expert, cut them into blocks of one size, each of a single expert, and multiply several blocks
    at a time by copies of their experts' weights.

    On a GPU XLA multiplies every row with every expert in a ragged matmul, and the host waits for the device where the
    program computes a loop's number of steps. The number of blocks here is the largest that may occur: with blocks of
    half an expert's average number of rows, one and a half times the rows.
    """
    tokens, per_token = experts.shape
    chosen, total, count = experts.reshape(-1), experts.size, len(weights["gate"])
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
        return llama_like.gated_mlp(config, expert_weights, x[jnp.minimum(slots // per_token, tokens - 1)])

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
    number of rows, up to a third above the average, so that most experts' tokens are one block with little padding.
    Each size is a branch of the program."""
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


def blocked_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """Sort the tokens by expert, cut them into blocks of a single expert each, and run one block after the other.

    On a CPU XLA multiplies every row with every expert in a ragged matmul. Here only the unused rows of each expert's
    last block are computed in vain.
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
    """The experts' outputs for their rows, `[R, hidden]`. `rows` ends with as many unused rows as the largest block
    has.

    Several candidates are computed one after the other: side by side each would compute its blocks in every size. The
    derivative is written out, since JAX has none for a loop whose number of steps is computed.
    """

    @jax.custom_batching.sequential_vmap
    def forward(weights: Weights, rows: jax.Array, blocks: Blocks) -> jax.Array:
        def of_size(size: int, block: Blocks) -> jax.Array:
            outputs = llama_like.gated_mlp(config, *_operands(weights, rows, block, size))
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
            _, pull_back = jax.vjp(partial(llama_like.gated_mlp, config), *_operands(weights, rows, block, size))
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
    of_each = (blocks.size, blocks.expert, blocks.begin, blocks.rows)
    return Blocks(blocks.count, *(leaf[number] for leaf in of_each))


def _operands(weights: Weights, rows: jax.Array, block: Blocks, size: int) -> tuple[Weights, jax.Array]:
    """The weights of a block's expert, and the block's rows."""
    expert_weights = {
        name: jax.lax.dynamic_index_in_dim(leaf, block.expert, keepdims=False) for name, leaf in weights.items()
    }
    return expert_weights, jax.lax.dynamic_slice_in_dim(rows, block.begin, size)


def weighted_experts(
    config: MixtureConfig, weights: Weights, x: jax.Array, shares: jax.Array, experts: jax.Array
) -> jax.Array:
    """The sum of the outputs of each token's experts for `[N, hidden]`, weighted by `shares` float32[N, A]."""
    # By the platform that the program is compiled for, which need not be this machine's.
    outputs = jax.lax.platform_dependent(
        weights, x, experts, cpu=partial(blocked_experts, config), cuda=partial(gpu_experts, config),
        default=partial(joined_ragged_experts, config),
    )  # fmt: skip
    # A batched product of a row with a matrix would not be fused with the gather of the rows.
    weighted = (shares[:, a, None] * outputs[:, a].astype(jnp.float32) for a in range(shares.shape[1]))
    return sum(weighted, jnp.float32(0)).astype(x.dtype)


def mixture(config: MixtureConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """The sum of the outputs of each token's experts, and of the expert that takes every token, for `[B, T,
    hidden]`."""
    rows = x.reshape(-1, x.shape[-1])
    with jax.named_scope("router"):
        shares, experts = route(config, weights, rows)
    expert_weights = {name: weights[name] for name in ("gate", "up", "down")}
    with jax.named_scope("experts"):
        if shards_of(config.mlp) == 1:
            total = weighted_experts(config, expert_weights, rows, shares, experts)
        else:
            # Each device has a shard of every expert; without map_shards the compiler would add up the devices' results
            # for each block.
            cuts = {"gate": cut_at(3, -2), "up": cut_at(3, -2), "down": cut_at(3, -1)}, *[cut_at(2, None)] * 3

            def part(device: jax.Array, *operands: Any) -> jax.Array:
                return jax.lax.psum(weighted_experts(config, *operands), MODEL_AXIS)

            total = map_shards(part, cuts, cut_at(2, None), expert_weights, rows, shares, experts)
    if config.shared_mlp:
        expert_weights = {name: weights[f"shared_{name}"] for name in ("gate", "up", "down")}
        open_ = jax.nn.sigmoid(matmul(rows, weights["shared_expert_gate"]))
        total = total + open_ * llama_like.gated_mlp(config, expert_weights, rows)
    return total.reshape(x.shape)


def block(
    config: MixtureConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    x, kept = llama_like.attention(config, weights, x, rope, attend)
    return x + mixture(config, weights, rms_norm(x, weights["mlp_norm"], config.norm_eps)), kept


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
    "norm_topk_prob": Expected(lambda value: isinstance(value, bool), "true or false"),
    "num_experts": SIZE,
    "num_experts_per_tok": SIZE,
    "num_local_experts": SIZE,
}


def read_mixture(
    model_type: str,
    hf: Mapping[str, Any],
    *,
    experts: str = "num_experts",
    mlp: str = "moe_intermediate_size",
    keys: Mapping[str, str] = MappingProxyType({}),
    **values: Any,
) -> MixtureConfig:
    """The config for the values `hf` of the keys of config.json. experts, mlp: the keys of the number of experts, and
    of their width; keys, values: see `llama_like.read_config`. Raises ValueError as that does, and where there are
    fewer experts than a token has, or more than MOST_EXPERTS in all layers."""
    read = {"mlp": mlp, "experts": experts, "experts_per_token": "num_experts_per_tok", **keys}
    config = llama_like.read_config(model_type, hf, MixtureConfig, read, **values)
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
    **fields: Any,
) -> Architecture:
    """An architecture with a Llama's attention and norms, and with mixtures of these leaves.

    filters: those of the mixtures' components; the router's comes first, since a name that contains it may contain the
    other, too. keys, read, fields: see `llama_like`.
    """
    of_mixtures: dict[str, Any] = {"dimensions": dimensions, "block": block, "packed": PACKED}
    return llama_like.llama_like(
        model_type,
        config_class,
        keys,
        read,
        leaves=(*(leaf for leaf in llama_like.LEAVES if leaf.component != "mlp"), *leaves),
        filters={**filters} | {part: text for part, text in llama_like.FILTERS.items() if part not in filters},
        **of_mixtures | fields,
    )
