"""GPT-2 (Radford et al., Language Models are Unsupervised Multitask Learners, 2019): LayerNorm, learned positions, one
projection for queries, keys and values, an MLP without gate.

Its linear layers are transformers' Conv1D: their weights are `[in, out]`, in the file as in the leaves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS, Architecture, Leaf, SharedWeights
from evojax_merge.models.config import NO_WINDOW, DecoderConfig
from evojax_merge.models.config_keys import CONTEXT, DEPTH, EPSILON, SIZE, SWITCH, one_of, or_null
from evojax_merge.models.families.llama_like import FINAL_NORM_BIAS, LAYER_NORMS, SHARED, renamed
from evojax_merge.models.layers import ACTIVATIONS, Attend, KeyValue, SequenceLayout, Weights, layer_norm
from evojax_merge.models.sharding import replicate


@dataclass(frozen=True, kw_only=True)
class GPT2Config(DecoderConfig):
    mlp: int
    norm_eps: float
    activation: str


def layer_matrices(layer: str, modules: Mapping[str, str], transposed: bool) -> Iterator[Leaf]:
    """The matrices of a layer, each with its bias. layer: the beginning of their names in the file; modules: the
    module of each leaf."""
    for name, (component, inputs, outputs) in {
        "qkv": ("attention", "hidden", "queries_keys_values"), "o": ("attention", "hidden", "hidden"),
        "up": ("mlp", "hidden", "mlp"), "down": ("mlp", "mlp", "hidden"),
    }.items():  # fmt: skip
        writes, module = name in ("o", "down"), f"{layer}{modules[name]}"
        yield Leaf(
            name, f"{module}.weight", component, (inputs, outputs) if transposed else (outputs, inputs), LAYERS,
            sharded_axis=-2 if writes == transposed else -1, writes_residual=writes, transposed=transposed,
        )  # fmt: skip
        yield Leaf(f"{name}_bias", f"{module}.bias", component, (outputs,), LAYERS, writes_residual=writes)


MODULES = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
NAMES = {
    "model.layers": "transformer.h", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f",
}  # fmt: skip
EMBED, FINAL_NORM, HEAD = SHARED
LEAVES = (
    *(renamed(leaf, NAMES) for leaf in LAYER_NORMS),
    *layer_matrices("transformer.h.{layer}.", MODULES, transposed=True),
    renamed(EMBED, NAMES),
    Leaf("positions", "transformer.wpe.weight", "embedding", ("positions", "hidden")),
    *(renamed(leaf, NAMES) for leaf in (FINAL_NORM, FINAL_NORM_BIAS, HEAD)),
)
FILTERS = {
    "attention": ".attn.", "mlp": ".mlp.", "norm": ".ln_", "embed": "wte", "positions": "wpe",
    "final_norm": "ln_f.weight", "final_norm_bias": "ln_f.bias", "head": "lm_head",
}  # fmt: skip


def dimensions(config: GPT2Config) -> dict[str, int]:
    return {
        "hidden": config.hidden,
        "queries_keys_values": 3 * config.hidden,
        "mlp": config.mlp,
        "vocab": config.vocab,
        "positions": config.positions or 0,
    }


def conv1d(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """`x @ W + b` with `W: [in, out]`."""
    return jnp.einsum("...i,io->...o", x, weights[name]) + weights[f"{name}_bias"]


def embed(
    config: DecoderConfig, source: SharedWeights, tokens: jax.Array, layout: SequenceLayout, offset: int = 0
) -> jax.Array:
    """The tokens' embeddings plus those of their positions, whose rows begin at `offset`."""
    assert config.positions is not None
    # Draft tokens may follow a row that fills the whole context; they are never accepted.
    positions = jnp.minimum(layout.positions, config.positions - 1)
    return source.rows("embed", tokens) + source.rows("positions", positions + offset)


def block(
    config: GPT2Config, weights: Weights, x: jax.Array, tables: None, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    with jax.named_scope("attention"):
        normed = layer_norm(x, weights["attention_norm"], weights["attention_norm_bias"], config.norm_eps)
        with jax.named_scope("qkv"):
            # The shards of queries, keys and values on one device belong to different heads.
            qkv = replicate(conv1d(normed, weights, "qkv"))
            qkv = qkv.reshape(*x.shape[:2], 3, config.heads, config.head_dim)
        attn_out, kept = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + conv1d(attn_out, weights, "o")
    normed = layer_norm(x, weights["mlp_norm"], weights["mlp_norm_bias"], config.norm_eps)
    with jax.named_scope("mlp"):
        up = ACTIVATIONS[config.activation](conv1d(normed, weights, "up"))
        return x + conv1d(up, weights, "down"), kept


def final_norm(config: Any, source: SharedWeights, x: jax.Array) -> jax.Array:
    return layer_norm(x, source.leaf("final_norm"), source.leaf("final_norm_bias"), config.norm_eps)


def read_config(hf: Mapping[str, Any]) -> GPT2Config:
    hidden, heads, layers = hf["n_embd"], hf["n_head"], hf["n_layer"]
    if hidden % heads:
        raise ValueError(f"n_embd: {hidden} is not a multiple of n_head: {heads}")
    return GPT2Config(
        architecture="gpt2",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=hf["vocab_size"],
        windows=(NO_WINDOW,) * layers,
        head_is_embedding=hf["tie_word_embeddings"],
        positions=hf["n_positions"],
        mlp=hf["n_inner"] or 4 * hidden,
        norm_eps=hf["layer_norm_epsilon"],
        activation=hf["activation_function"],
    )


# Any other key that the class reads, such as scale_attn_by_inverse_layer_idx, must have its default value.
GPT2 = Architecture(
    model_type="gpt2",
    leaves=LEAVES,
    keys={
        "activation_function": one_of(*ACTIVATIONS),
        "layer_norm_epsilon": EPSILON,
        "n_embd": SIZE,
        "n_head": SIZE,
        "n_inner": or_null(SIZE),
        "n_layer": DEPTH,
        "n_positions": CONTEXT,
        "tie_word_embeddings": SWITCH,
        "vocab_size": SIZE,
    },
    read_config=read_config,
    dimensions=dimensions,
    embed=embed,
    position_tables=lambda config, layout: None,
    block=block,
    final_norm=final_norm,
    config_class="GPT2Config",
    defaults={"tie_word_embeddings": True},
    filters=FILTERS,
    buffers=(".attn.bias", ".attn.masked_bias"),
)
