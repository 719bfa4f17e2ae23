"""Qwen1.5-MoE and Qwen2-MoE: a Qwen2 with a mixture of experts, and beside it an expert that takes every token, scaled
by a gate."""

from functools import partial

from evojax_merge.models.config_keys import SIZE, SWITCH
from evojax_merge.models.families.llama_like import QWEN_WINDOWS
from evojax_merge.models.families.llama_like_gguf import mixture_gguf
from evojax_merge.models.families.mixture import (
    QWEN_EXPERTS,
    SHARED_EXPERT,
    expert_leaves,
    mixture_of_experts,
    read_mixture,
)

READ = {
    "qkv_bias": "qkv_bias", "weights_sum_to_one": "norm_topk_prob", "shared_mlp": "shared_expert_intermediate_size",
}  # fmt: skip
QWEN2_MOE = mixture_of_experts(
    "qwen2_moe",
    "Qwen2MoeConfig",
    (
        *expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *SHARED_EXPERT,
    ),
    QWEN_EXPERTS | QWEN_WINDOWS | {"qkv_bias": SWITCH, "shared_expert_intermediate_size": SIZE},
    partial(read_mixture, "qwen2_moe", keys=READ),
    # PEFT confuses the shared expert's projections with the experts', which have the same names.
    no_adapter="PEFT cannot tell its shared expert from its experts",
    gguf=mixture_gguf("qwen2moe", "num_experts", weights_sum_to_one=False),
)  # fmt: skip
