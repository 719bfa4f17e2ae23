"""Falcon-H1 (arXiv 2507.22448): attention and Mamba-2 side by side in each layer, with multipliers of their inputs and
outputs, of keys, of the MLP, of embeddings and of logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from evojax_merge.models import mamba2
from evojax_merge.models.architecture import ATTENTION, LAYERS, RECURRENCE, LayerType
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import FINITE, SIZE, SWITCH, Expected, above, list_of, or_null
from evojax_merge.models.families import granite, llama_like
from evojax_merge.models.families.granite_hybrid import MAMBA_KEYS, read_mamba
from evojax_merge.models.families.llama_like import BIASES, project_qkv
from evojax_merge.models.layers import ACTIVATIONS, Attend, CosSin, KeyValue, Weights, dense, rms_norm
from evojax_merge.models.mamba2 import Mamba
from evojax_merge.models.recurrence import Recur

BOTH = "hybrid"
MULTIPLIERS = (
    "attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier", "key_multiplier",
    "lm_head_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FalconH1Config(LlamaLikeConfig):
    """mamba: the settings of Mamba; mlp_multipliers: of the gate, before its activation, and of the MLP's output; the
    others: of the input and the output of attention and of Mamba, of embeddings, keys and logits."""

    mamba: Mamba
    mlp_multipliers: tuple[float, float]
    attention_in_multiplier: float
    attention_out_multiplier: float
    embedding_multiplier: float
    key_multiplier: float
    lm_head_multiplier: float
    ssm_in_multiplier: float
    ssm_out_multiplier: float


# ---------------------------------------------------------------------------------------------------------------
# Tensors

_LAYER = "model.layers.{layer}."
RENAMED = {".mlp.": ".feed_forward.", "model.norm.weight": "model.final_layernorm.weight"}


LEAVES = (
    llama_like.norm_leaf("attention_norm", "input_layernorm"),
    llama_like.norm_leaf("mlp_norm", "pre_ff_layernorm"),
    *(llama_like.renamed(leaf, RENAMED) for leaf in (*llama_like.PROJECTIONS, *llama_like.SHARED)),
    *mamba2.leaves(f"{_LAYER}mamba.", LAYERS),
)


def dimensions(config: FalconH1Config) -> dict[str, int]:
    return llama_like.dimensions(config) | mamba2.dimensions(config.mamba)


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def block(
    config: FalconH1Config, weights: Weights, x: jax.Array, rope: CosSin, memory: tuple[Attend, Recur]
) -> tuple[jax.Array, tuple[KeyValue, Any]]:
    attend, recur = memory
    normed = rms_norm(x, weights["attention_norm"], config.norm_eps)
    with jax.named_scope("mamba"):
        mixed, state = mamba2.mix(config.mamba, weights, normed * config.ssm_in_multiplier, recur)
    with jax.named_scope("attention"):
        # RoPE is linear: a key's multiplier may follow it.
        query, key, value = project_qkv(config, weights, normed * config.attention_in_multiplier, rope)
        out, kept = attend(query, key * config.key_multiplier, value)
        out = dense(out, weights, "o") * config.attention_out_multiplier
    x = x + mixed * config.ssm_out_multiplier + out
    with jax.named_scope("mlp"):
        normed, (of_gate, of_output) = rms_norm(x, weights["mlp_norm"], config.norm_eps), config.mlp_multipliers
        gate = ACTIVATIONS[config.activation](dense(normed, weights, "gate") * of_gate)
        return x + dense(gate * dense(normed, weights, "up"), weights, "down") * of_output, (kept, state)


# ---------------------------------------------------------------------------------------------------------------
# config.json


KEYS: dict[str, Expected] = MAMBA_KEYS | {
    "attention_bias": SWITCH,
    "mamba_d_ssm": or_null(SIZE),
    "mamba_norm_before_gate": SWITCH,
    "mamba_rms_norm": SWITCH,
    "mlp_bias": SWITCH,
    "mlp_multipliers": or_null(list_of(FINITE, "2 numbers", 2)),
    "projectors_bias": SWITCH,
    "ssm_multipliers": or_null(list_of(FINITE, "5 numbers", 5)),
    **dict.fromkeys(MULTIPLIERS, above(0)),
}


def read(hf: Mapping[str, Any]) -> FalconH1Config:
    mamba = read_mamba(
        hf, gated_norm=hf["mamba_rms_norm"], norm_before_gate=hf["mamba_norm_before_gate"],
        multipliers=tuple(map(float, hf["ssm_multipliers"])), out_bias=hf["projectors_bias"],
    )  # fmt: skip
    return llama_like.read_config(
        "falcon_h1", hf, FalconH1Config, BIASES | {"mlp_bias": "mlp_bias"}, mamba=mamba, recurrent=mamba.shape,
        layer_types=(BOTH,) * hf["num_hidden_layers"], mlp_multipliers=tuple(map(float, hf["mlp_multipliers"])),
        **{name: float(hf[name]) for name in MULTIPLIERS},
    )  # fmt: skip


FALCON_H1 = llama_like.llama_like(
    "falcon_h1", "FalconH1Config", KEYS, read, leaves=LEAVES, dimensions=dimensions, embed=granite.embed, block=block,
    map_logits=lambda config, products: products * config.lm_head_multiplier, always_maps_logits=True,
    layer_types={BOTH: LayerType(block, (LAYERS,), (ATTENTION, RECURRENCE))}, filters={},
    no_adapter="PEFT has no adapters for its convolutions",
)  # fmt: skip
