"""OLMoE (arXiv 2409.02060): a mixture of experts in each layer; queries and keys are normalised as a whole, and, like
values, clipped in some models."""

from dataclasses import replace
from functools import partial

from evojax_merge.models.config_keys import SIZE, SWITCH, above, or_null
from evojax_merge.models.families import llama_like, mixture
from evojax_merge.models.families.llama_like import BIASES
from evojax_merge.models.families.olmo2 import WHOLE_NORMS

LEAVES = tuple(replace(leaf, shape=WHOLE_NORMS.get(leaf.name, leaf.shape)) for leaf in llama_like.LEAVES)
OLMOE = mixture.mixture_of_experts(
    "olmoe",
    "OlmoeConfig",
    mixture.expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    {
        "attention_bias": SWITCH, "clip_qkv": or_null(above(0)), "norm_topk_prob": SWITCH, "num_experts": SIZE,
        "num_experts_per_tok": SIZE,
    },
    partial(
        mixture.read_mixture, "olmoe", mlp="intermediate_size",
        keys=BIASES | {"weights_sum_to_one": "norm_topk_prob", "clip": "clip_qkv"}, qk_norm=True,
    ),
    attention_leaves=LEAVES,
)  # fmt: skip
