"""Qwen1.5-MoE and Qwen2-MoE: a Qwen2 with a mixture of experts, and beside it an expert that takes every token, scaled
by a gate."""

from functools import partial

from evojax_merge.models.architecture import LAYERS, Leaf
from evojax_merge.models.config_keys import SIZE, SWITCH
from evojax_merge.models.families.llama_like import QWEN_WINDOWS
from evojax_merge.models.families.llama_like_gguf import llama_like_gguf, mixture_settings
from evojax_merge.models.families.mixture import QWEN_EXPERTS, expert_leaves, mixture_of_experts, read_mixture

SHARED = "model.layers.{layer}.mlp.shared_expert"
WIDE = ("shared_mlp", "hidden")


READ = {
    "qkv_bias": "qkv_bias", "weights_sum_to_one": "norm_topk_prob", "shared_mlp": "shared_expert_intermediate_size",
}  # fmt: skip
QWEN2_MOE = mixture_of_experts(
    "qwen2_moe",
    "Qwen2MoeConfig",
    (
        *expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        Leaf("shared_gate", f"{SHARED}.gate_proj.weight", "mlp", WIDE, LAYERS, sharded_axis=-2),
        Leaf("shared_up", f"{SHARED}.up_proj.weight", "mlp", WIDE, LAYERS, sharded_axis=-2),
        Leaf(
            "shared_down", f"{SHARED}.down_proj.weight", "mlp", ("hidden", "shared_mlp"), LAYERS, sharded_axis=-1,
            writes_residual=True,
        ),
        Leaf("shared_expert_gate", f"{SHARED}_gate.weight", "mlp", ("one", "hidden"), LAYERS),
    ),
    QWEN_EXPERTS | QWEN_WINDOWS | {"qkv_bias": SWITCH, "shared_expert_intermediate_size": SIZE},
    partial(read_mixture, "qwen2_moe", keys=READ),
    # PEFT confuses the shared expert's projections with the experts', which have the same names.
    no_adapter="PEFT cannot tell its shared expert from its experts",
    gguf=llama_like_gguf(
        "qwen2moe",
        partial(mixture_settings, experts_key="num_experts", weights_sum_to_one=False),
        has_experts=True,
    ),
)  # fmt: skip
