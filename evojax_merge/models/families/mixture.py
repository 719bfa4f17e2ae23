"""What mixtures of experts share: the tensors, the router, and the experts' forward pass.

A Llama-like decoder in which each layer has E gated MLPs (*experts*) in place of one. A router gives every token its A
experts and their weights, and only those are computed. Letters: N tokens, E experts, A of them for each token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS, ROUTER, Architecture, Leaf
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SIZE, Expected
from evojax_merge.models.families import llama_like
from evojax_merge.models.layers import ACTIVATIONS, Attend, CosSin, KeyValue, Weights, matmul, rms_norm

# Rows of a block of one expert's tokens on a CPU, at least (with fewer tokens, as many as there are) and at most.
LEAST_BLOCK, LARGEST_BLOCK = 16, 256


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
    """The tokens sorted by expert, and matmuls of their runs: what accelerators have an instruction for."""
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=config.experts).astype(jnp.int32)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )

    def dot(rows: jax.Array, name: str) -> jax.Array:
        return jax.lax.ragged_dot_general(rows, weights[name], sizes, numbers)

    rows = x[order // experts.shape[1]]
    rows = dot(ACTIVATIONS[config.activation](dot(rows, "gate")) * dot(rows, "up"), "down")
    return rows[jnp.argsort(order)].reshape(*experts.shape, -1)


def block_rows(tokens: int, per_token: int, experts: int) -> int:
    """How many rows a block of one expert's tokens has: a quarter of what an expert takes on average, so that of each
    expert's last block not much is computed in vain, in a power of two."""
    quarter = max(1, tokens * per_token // (4 * experts))
    return min(tokens, max(LEAST_BLOCK, min(LARGEST_BLOCK, 1 << (quarter - 1).bit_length())))


def blocked_experts(config: MixtureConfig, weights: Weights, x: jax.Array, experts: jax.Array) -> jax.Array:
    """The tokens sorted by expert, in blocks of which each is one expert's, one block after the other.

    On a CPU XLA computes a ragged matmul as one of every row with every expert. Here what is computed in vain is the
    rest of each expert's last block.
    """
    tokens, per_token = experts.shape
    chosen, count = experts.reshape(-1), experts.size
    size = block_rows(tokens, per_token, config.experts)
    # Each expert with a token may leave a block of which all rows but one are free.
    most = (count + min(config.experts, count) * (size - 1)) // size
    sizes = jnp.bincount(chosen, length=config.experts)
    blocks = (sizes + size - 1) // size
    ends = jnp.cumsum(blocks)
    order = jnp.argsort(chosen, stable=True)
    owner = chosen[order]
    # How many rows of its expert's blocks, and of those of the experts before, stand before a row.
    slots = jnp.arange(count) + ((ends - blocks) * size - (jnp.cumsum(sizes) - sizes))[owner]
    slot_of = jnp.zeros(count, jnp.int32).at[order].set(slots.astype(jnp.int32))
    # Behind the last token a row of zeros, for the rows of blocks that are free.
    token_of = jnp.full(most * size, tokens, jnp.int32).at[slot_of].set(jnp.arange(count, dtype=jnp.int32) // per_token)
    padded = jnp.concatenate([x, jnp.zeros_like(x[:1])])
    expert_of = jnp.minimum(jnp.searchsorted(ends, jnp.arange(most), side="right"), config.experts - 1)

    @jax.checkpoint
    def run(expert: jax.Array, rows: jax.Array) -> jax.Array:
        own = {
            name: jax.lax.dynamic_index_in_dim(weights[name], expert, keepdims=False) for name in ("gate", "up", "down")
        }
        return llama_like.gated_mlp(config, own, padded[rows])

    def block(of: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        number, expert, rows = of
        # Differentiated, it is computed again: else each block would keep its expert's weights.
        return jax.lax.cond(
            number < ends[-1], run, lambda expert, rows: jnp.zeros((size, x.shape[1]), x.dtype), expert, rows
        )

    found = jax.lax.map(block, (jnp.arange(most), expert_of, token_of.reshape(most, size)))
    return found.reshape(most * size, -1)[slot_of].reshape(tokens, per_token, -1)


def mixture(config: MixtureConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """What the experts of each token, and the one that takes every token, make of `[B, T, hidden]`, added up."""
    rows = x.reshape(-1, x.shape[-1])
    with jax.named_scope("router"):
        shares, experts = route(config, weights, rows)
    own = {name: weights[name] for name in ("gate", "up", "down")}
    with jax.named_scope("experts"):
        # By what the program is compiled for, which need not be what is here.
        found = jax.lax.platform_dependent(
            own, rows, experts, cpu=partial(blocked_experts, config), default=partial(ragged_experts, config)
        )
        total = jnp.einsum("na,nah->nh", shares, found.astype(jnp.float32)).astype(x.dtype)
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
