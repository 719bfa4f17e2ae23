"""Mixtral: a Mistral with a mixture of experts, whose weights add up to 1, in every layer (arXiv 2401.04088)."""

from functools import partial

from evojax_merge.models.config_keys import SIZE
from evojax_merge.models.families.llama_like import WINDOW
from evojax_merge.models.families.llama_like_gguf import mixture_gguf
from evojax_merge.models.families.mixture import PACKED, expert_leaves, mixture_of_experts, read_mixture

MIXTRAL = mixture_of_experts(
    "mixtral",
    "MixtralConfig",
    expert_leaves("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
    {"num_experts_per_tok": SIZE, "num_local_experts": SIZE, "sliding_window": WINDOW},
    partial(read_mixture, "mixtral", experts="num_local_experts", mlp="intermediate_size", weights_sum_to_one=True),
    # Both the files' and transformers' tensor names contain these; mergekit matches the names.
    {"router": "gate.weight", "mlp": "experts"},
    packed=PACKED | {"model.layers.{layer}.mlp.gate.weight": ("router",)},
    gguf=mixture_gguf("llama", "num_local_experts", interleaved=True),
)
