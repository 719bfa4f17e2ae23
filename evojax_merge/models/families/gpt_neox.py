"""GPT-NeoX (arXiv 2204.06745) and Pythia: LayerNorm, RoPE on a part of each head, one projection for queries, keys and
values, attention and MLP side by side, an MLP without gate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from evojax_merge.models.architecture import Architecture
from evojax_merge.models.config import NO_WINDOW, RopeConfig
from evojax_merge.models.config_keys import CONTEXT, DEPTH, EPSILON, SIZE, SWITCH, above, one_of
from evojax_merge.models.families import llama_like
from evojax_merge.models.families.gpt2 import GPT2Config, dimensions, final_norm, layer_matrices
from evojax_merge.models.layers import (
    ACTIVATIONS,
    Attend,
    CosSin,
    KeyValue,
    Weights,
    apply_rope,
    dense,
    dense_heads,
    layer_norm,
    rope_tables,
)


@dataclass(frozen=True, kw_only=True)
class GPTNeoXConfig(GPT2Config):
    """`rotary_dim`: the number of entries of a head that are rotated. `parallel_residual`: whether the MLP gets the
    layer's input, as attention does, in place of attention's output."""

    rope: RopeConfig
    rotary_dim: int
    parallel_residual: bool
    attention_bias: bool


MODULES = {
    "qkv": "attention.query_key_value", "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
}  # fmt: skip
NAMES = {
    "model.layers": "gpt_neox.layers", "model.embed_tokens": "gpt_neox.embed_in",
    "model.norm": "gpt_neox.final_layer_norm", "lm_head": "embed_out",
}  # fmt: skip
EMBED, FINAL_NORM, HEAD = llama_like.SHARED
LEAVES = (
    *(llama_like.renamed(leaf, NAMES) for leaf in llama_like.LAYER_NORMS),
    *(
        replace(leaf, present_if=lambda c: c.attention_bias) if leaf.name in ("qkv_bias", "o_bias") else leaf
        for leaf in layer_matrices("gpt_neox.layers.{layer}.", MODULES, transposed=False)
    ),
    *(llama_like.renamed(leaf, NAMES) for leaf in (EMBED, FINAL_NORM, llama_like.FINAL_NORM_BIAS, HEAD)),
)
FILTERS = {
    "attention": ".attention.", "mlp": ".mlp.", "norm": "layernorm", "embed": "embed_in", "head": "embed_out",
    "final_norm": "final_layer_norm.weight", "final_norm_bias": "final_layer_norm.bias",
}  # fmt: skip


def block(
    config: GPTNeoXConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    def norm(x: jax.Array, name: str) -> jax.Array:
        return layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)

    with jax.named_scope("attention"):
        with jax.named_scope("qkv"):
            # In the file each head's queries, keys and values lie together, head after head.
            qkv = dense_heads(norm(x, "attention_norm"), weights, "qkv", 3 * config.head_dim)
            qkv = qkv.reshape(*x.shape[:2], config.heads, 3, config.head_dim)
            cos, sin = (table.astype(x.dtype) for table in rope)
        query, key = (apply_rope(qkv[:, :, :, i], cos, sin) for i in range(2))
        attn_out, kept = attend(query, key, qkv[:, :, :, 2])
        after_attention = x + dense(attn_out, weights, "o")
    normed = norm(x if config.parallel_residual else after_attention, "mlp_norm")
    with jax.named_scope("mlp"):
        up = ACTIVATIONS[config.activation](dense(normed, weights, "up"))
        return after_attention + dense(up, weights, "down"), kept


def read_config(hf: Mapping[str, Any]) -> GPTNeoXConfig:
    hidden, heads, layers = hf["hidden_size"], hf["num_attention_heads"], hf["num_hidden_layers"]
    if hidden % heads:
        raise ValueError(f"hidden_size: {hidden} is not a multiple of num_attention_heads: {heads}")
    head_dim = hidden // heads
    rotary_dim = int(head_dim * hf["rope_parameters"]["partial_rotary_factor"])
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_pct: {rotary_dim} of a head's {head_dim} entries; expected an even number")
    return GPTNeoXConfig(
        architecture="gpt_neox",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        vocab=hf["vocab_size"],
        windows=(NO_WINDOW,) * layers,
        head_is_embedding=hf["tie_word_embeddings"],
        mlp=hf["intermediate_size"],
        norm_eps=hf["layer_norm_eps"],
        activation=hf["hidden_act"],
        rope=llama_like.rope_config(hf["rope_parameters"], hf["max_position_embeddings"], rotary_dim),
        rotary_dim=rotary_dim,
        parallel_residual=hf["use_parallel_residual"],
        attention_bias=hf["attention_bias"],
    )


GPT_NEOX = Architecture(
    model_type="gpt_neox",
    leaves=LEAVES,
    keys={
        "attention_bias": SWITCH,
        "hidden_act": one_of(*ACTIVATIONS),
        "hidden_size": SIZE,
        "intermediate_size": SIZE,
        "layer_norm_eps": EPSILON,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": SIZE,
        "num_hidden_layers": DEPTH,
        "rope_parameters": llama_like.PARTIAL_ROPE,
        "rope_scaling": llama_like.PARTIAL_ROPE,
        "rotary_emb_base": above(1),
        "rotary_pct": llama_like.PARTIAL_ROTARY,
        "tie_word_embeddings": SWITCH,
        "use_parallel_residual": SWITCH,
        "vocab_size": SIZE,
    },
    read_config=read_config,
    dimensions=dimensions,
    embed=llama_like.embed,
    position_tables=lambda config, layout: rope_tables(config.rope, config.rotary_dim, layout),
    block=block,
    final_norm=final_norm,
    config_class="GPTNeoXConfig",
    filters=FILTERS,
    buffers=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
)
