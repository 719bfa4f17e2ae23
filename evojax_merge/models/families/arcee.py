"""Arcee's AFM: a Llama whose MLP has no gate."""

from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import BIASES, LEAVES, llama_like, read_config

ARCEE = llama_like(
    "arcee",
    "ArceeConfig",
    {"attention_bias": SWITCH, "mlp_bias": SWITCH},
    partial(read_config, "arcee", keys=BIASES | {"mlp_bias": "mlp_bias"}),
    leaves=tuple(leaf for leaf in LEAVES if leaf.name not in ("gate", "gate_bias")),
)
