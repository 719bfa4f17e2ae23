"""OLMo 2 (arXiv 2501.00656): RMSNorm behind attention and MLP in place of before them; queries and keys are normalised
as a whole, not by head."""

from dataclasses import replace
from functools import partial

import jax

from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import (
    BIASES,
    INNER_PROJECTIONS,
    SHARED,
    gated_mlp,
    llama_like,
    norm,
    norm_leaf,
    read_config,
)
from evojax_merge.models.layers import (
    Attend,
    CosSin,
    KeyValue,
    Weights,
    apply_rope,
    dense,
    dense_heads,
)

WHOLE_NORMS = {"q_norm": ("queries",), "k_norm": ("keys",)}
LEAVES = (
    norm_leaf("post_attention_norm", "post_attention_layernorm", writes_residual=True),
    norm_leaf("post_mlp_norm", "post_feedforward_layernorm", writes_residual=True),
    *(replace(leaf, shape=WHOLE_NORMS.get(leaf.name, leaf.shape)) for leaf in INNER_PROJECTIONS),
    *SHARED,
)


def block(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    with jax.named_scope("attention"):
        query, key = (norm(config, weights, f"{name}_norm", dense(x, weights, name)) for name in ("q", "k"))
        query, key = (part.reshape(*x.shape[:2], -1, config.head_dim) for part in (query, key))
        cos, sin = (table.astype(x.dtype) for table in rope)
        value = dense_heads(x, weights, "v", config.head_dim)
        attn_out, kept = attend(apply_rope(query, cos, sin), apply_rope(key, cos, sin), value)
        x = x + norm(config, weights, "post_attention_norm", dense(attn_out, weights, "o"))
    return x + norm(config, weights, "post_mlp_norm", gated_mlp(config, weights, x)), kept


OLMO2 = llama_like(
    "olmo2",
    "Olmo2Config",
    {"attention_bias": SWITCH},
    partial(read_config, "olmo2", keys=BIASES, qk_norm=True, norm="rms_float32"),
    leaves=LEAVES,
    block=block,
)
