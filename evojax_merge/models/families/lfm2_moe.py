"""LFM2's mixtures: the first layers have an MLP, and the others experts, whose router takes sigmoids and, in most
models, a bias that only chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from evojax_merge.models.architecture import ATTENTION, LAYERS, RECURRENCE, LayerType
from evojax_merge.models.config_keys import EPSILON, KERNEL, SIZE, SWITCH, TEXTS, above, or_null, whole
from evojax_merge.models.families import lfm2, llama_like, mixture
from evojax_merge.models.families.glm4_moe import correction_leaf, dense_first
from evojax_merge.models.families.lfm2 import CONVOLUTION, FULL
from evojax_merge.models.families.llama_like import read_types
from evojax_merge.models.families.mixture import DENSE, SPARSE, Gate, MixtureConfig

_MIXERS: dict[str, tuple[mixture.Mixer, str]] = {
    FULL: (llama_like.attention, ATTENTION),
    CONVOLUTION: (lfm2.convolution, RECURRENCE),
}
_BLOCKS = {DENSE: mixture.dense_block, SPARSE: mixture.sparse_block}
_MLP_LEAVES = {"gate", "up", "down"}


@dataclass(frozen=True, kw_only=True)
class Lfm2MoeConfig(MixtureConfig):
    """has_correction: whether the router has a bias that only chooses."""

    has_correction: bool


LEAVES = (
    *(leaf for leaf in lfm2.LEAVES if leaf.name not in _MLP_LEAVES),
    *mixture.expert_leaves("feed_forward.gate", "feed_forward.experts", "w1", "w3", "w2", SPARSE),
    replace(correction_leaf("feed_forward.expert_bias"), present_if=lambda config: config.has_correction),
    *map(lfm2.renamed, mixture.dense_leaves()),
)


def layer_type(mixer: str, mlp: str) -> LayerType:
    mix, memory = _MIXERS[mixer]
    return LayerType(partial(_BLOCKS[mlp], mix), (LAYERS, mixer, mlp), memory)


def read(hf: Mapping[str, Any]) -> Lfm2MoeConfig:
    mixers, dense = read_types(hf, (FULL, CONVOLUTION)), hf["num_dense_layers"]
    return mixture.read_mixture(
        "lfm2_moe", {**hf, "hidden_act": "silu", "rms_norm_eps": hf["norm_eps"]}, Lfm2MoeConfig,
        keys={"o_bias": "conv_bias", "dense_mlp": "intermediate_size", "weights_sum_to_one": "norm_topk_prob",
              "has_correction": "use_expert_bias"},
        qk_norm=True, gate=Gate("sigmoid", scale=float(hf["routed_scaling_factor"]), added=1e-6),
        layer_types=tuple(f"{mixer}_{DENSE if i < dense else SPARSE}" for i, mixer in enumerate(mixers)),
        recurrent=lfm2.recurrent_shape(hf, mixers),
    )  # fmt: skip


LFM2_MOE = llama_like.llama_like(
    "lfm2_moe",
    "Lfm2MoeConfig",
    {
        "conv_L_cache": KERNEL,
        "conv_bias": SWITCH,
        "layer_types": or_null(TEXTS),
        "moe_intermediate_size": SIZE,
        "norm_eps": EPSILON,
        "norm_topk_prob": SWITCH,
        "num_dense_layers": whole(0, 2**31 - 1),
        "num_experts": SIZE,
        "num_experts_per_tok": SIZE,
        "routed_scaling_factor": above(0),
        "tie_embedding": SWITCH,
        "use_expert_bias": SWITCH,
    },
    read,
    leaves=LEAVES,
    dimensions=lambda config: {**lfm2.dimensions(config), **mixture.dimensions(config)},
    layer_types={f"{mixer}_{mlp}": layer_type(mixer, mlp) for mixer in _MIXERS for mlp in _BLOCKS},
    type_keys=partial(dense_first, key="num_dense_layers"),
    packed={
        "model.layers.{layer}.feed_forward.experts.gate_up_proj": ("gate", "up"),
        "model.layers.{layer}.feed_forward.experts.down_proj": ("down",),
    },
    filters={},
    defaults={"tie_word_embeddings": True},
    no_adapter="PEFT has no adapters for its convolutions and experts",
)
