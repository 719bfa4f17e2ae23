"""Qwen3-MoE: a Qwen3 with a mixture of experts in every layer, and one window for all layers where it has one."""

from functools import partial

from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families.llama_like import BIASES, QWEN_WINDOWS
from evojax_merge.models.families.llama_like_gguf import mixture_gguf
from evojax_merge.models.families.mixture import QWEN_EXPERTS, expert_leaves, mixture_of_experts, read_mixture

QWEN3_MOE = mixture_of_experts(
    "qwen3_moe",
    "Qwen3MoeConfig",
    expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    QWEN_EXPERTS
    | {name: QWEN_WINDOWS[name] for name in ("sliding_window", "use_sliding_window")}
    | {"attention_bias": SWITCH},
    partial(read_mixture, "qwen3_moe", keys=BIASES | {"weights_sum_to_one": "norm_topk_prob"}, qk_norm=True),
    gguf=mixture_gguf("qwen3moe", "num_experts", weights_sum_to_one=True),
)
