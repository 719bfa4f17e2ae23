"""OLMo 2 (arXiv 2501.00656): RMSNorm behind attention and MLP in place of before them; queries and keys are normalised
as a whole, not by head."""

from dataclasses import replace
from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families import llama_like

WHOLE_NORMS = {"q_norm": ("queries",), "k_norm": ("keys",)}
LEAVES = (
    llama_like.norm_leaf("post_attention_norm", "post_attention_layernorm", writes_residual=True),
    llama_like.norm_leaf("post_mlp_norm", "post_feedforward_layernorm", writes_residual=True),
    *(replace(leaf, shape=WHOLE_NORMS.get(leaf.name, leaf.shape)) for leaf in llama_like.INNER_PROJECTIONS),
    *llama_like.SHARED,
)
OLMO2 = llama_like.llama_like(
    "olmo2",
    "Olmo2Config",
    {"attention_bias": SWITCH},
    partial(llama_like.read_config, "olmo2", keys=llama_like.BIASES, qk_norm=True, norm="rms_float32"),
    leaves=LEAVES,
)
