"""Nemotron-H (arXiv 2504.03624) and Nemotron 3: each layer is Mamba-2, attention without positions, an MLP of squared
ReLUs, or a mixture of such MLPs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax

from evojax_merge.models import mamba2
from evojax_merge.models.architecture import LAYERS, RECURRENCE, LayerType, Leaf
from evojax_merge.models.config_keys import (
    ANYTHING,
    EPSILON,
    KERNEL,
    OFF,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Expected,
    above,
    is_number,
    one_of,
    or_null,
)
from evojax_merge.models.families import llama_like, mixture
from evojax_merge.models.families.glm4_moe import correction_leaf, read_gate
from evojax_merge.models.families.llama_like import read_types
from evojax_merge.models.families.mixture import Gate, MixtureConfig
from evojax_merge.models.layers import ACTIVATIONS, Attend, KeyValue, Weights, dense, rms_norm
from evojax_merge.models.mamba2 import Mamba
from evojax_merge.models.recurrence import Recur

FULL, MAMBA, MLP, MOE = "full_attention", "linear_attention", "mlp", "moe"


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig(MixtureConfig):
    """mamba: the settings of Mamba layers; latent: the width of the vectors that experts work on, 0: the hidden
    size."""

    mamba: Mamba
    latent: int = 0

    parts: ClassVar[Mapping[str, int]] = {"up": -2, "down": -1}

    def inner(self, project: Callable[[str], jax.Array]) -> jax.Array:
        return ACTIVATIONS[self.activation](project("up"))


# ---------------------------------------------------------------------------------------------------------------
# Tensors

_MIXER = "backbone.layers.{layer}.mixer."
_SHARED = {"embed": "backbone.embeddings.weight", "final_norm": "backbone.norm_f.weight"}


def _of_mixer(leaf: Leaf) -> Leaf:
    tensor = _MIXER + leaf.tensor.partition("{layer}.")[2].partition(".")[2]
    if leaf.component == "attention":
        return replace(leaf, tensor=tensor, stack=FULL)
    shape = tuple("dense_mlp" if axis == "mlp" else axis for axis in leaf.shape)
    return replace(leaf, name=f"dense_{leaf.name}", tensor=tensor, stack=MLP, shape=shape)


def _of_experts(leaf: Leaf) -> Leaf:
    shape = tuple("latent" if leaf.has_experts and axis == "hidden" else axis for axis in leaf.shape)
    return replace(leaf, tensor=leaf.tensor.replace("model.layers.{layer}.", _MIXER), shape=shape)


def _is_latent(config: NemotronHConfig) -> bool:
    return config.latent > 0


def _latent_leaves() -> list[Leaf]:
    """The projections around experts that work on narrower vectors, and the experts' own last matrices, to which a
    layer's output is then proportional by the projection behind them."""
    leaves = [
        Leaf("into_latent", f"{_MIXER}fc1_latent_proj.weight", "mlp", ("latent", "hidden"), MOE),
        Leaf("from_latent", f"{_MIXER}fc2_latent_proj.weight", "mlp", ("hidden", "latent"), MOE, writes_residual=True),
        *(replace(leaf, name="latent_down", writes_residual=False) for leaf in EXPERTS if leaf.name == "down"),
    ]
    return [replace(leaf, present_if=_is_latent) for leaf in leaves]


EXPERTS = [
    _of_experts(leaf) for leaf in (
        *mixture.expert_leaves("gate", "experts", "gate_proj", "up_proj", "down_proj", MOE),
        correction_leaf("gate.e_score_correction_bias", MOE), *mixture.shared_leaves("shared_experts", MOE),
    ) if leaf.name not in ("gate", "shared_gate")
]  # fmt: skip
NAMES = {"q", "k", "v", "o", "up", "up_bias", "down", "down_bias"}
LEAVES = (
    Leaf("norm", "backbone.layers.{layer}.norm.weight", "norm", ("hidden",), LAYERS),
    *(_of_mixer(leaf) for leaf in llama_like.PROJECTIONS if leaf.name in NAMES),
    *mamba2.leaves(_MIXER, MAMBA),
    *(replace(leaf, present_if=lambda c: not _is_latent(c)) if leaf.name == "down" else leaf for leaf in EXPERTS),
    *_latent_leaves(),
    *(replace(leaf, tensor=_SHARED.get(leaf.name, leaf.tensor)) for leaf in llama_like.SHARED),
)


def dimensions(config: NemotronHConfig) -> dict[str, int]:
    latent = {"latent": config.latent or config.hidden}
    return mixture.dimensions(config) | mamba2.dimensions(config.mamba) | latent


# ---------------------------------------------------------------------------------------------------------------
# The forward pass


def attention_block(
    config: NemotronHConfig, weights: Weights, x: jax.Array, tables: Any, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["norm"], config.norm_eps)
        out, kept = attend(*llama_like.project_qkv(config, weights, normed, tables))
        return x + dense(out, weights, "o"), kept


def mamba_block(
    config: NemotronHConfig, weights: Weights, x: jax.Array, tables: Any, recur: Recur
) -> tuple[jax.Array, Any]:
    with jax.named_scope("mamba"):
        mixed, kept = mamba2.mix(config.mamba, weights, rms_norm(x, weights["norm"], config.norm_eps), recur)
        return x + mixed, kept


def mlp_block(
    config: NemotronHConfig, weights: Weights, x: jax.Array, tables: Any, memory: tuple[()]
) -> tuple[jax.Array, tuple[()]]:
    with jax.named_scope("mlp"):
        normed = rms_norm(x, weights["norm"], config.norm_eps)
        inner = ACTIVATIONS[config.activation](dense(normed, weights, "dense_up"))
        return x + dense(inner, weights, "dense_down"), memory


def mixture_block(
    config: NemotronHConfig, weights: Weights, x: jax.Array, tables: Any, memory: tuple[()]
) -> tuple[jax.Array, tuple[()]]:
    weights = weights | {"down": weights["latent_down" if config.latent else "down"]}
    return x + mixture.mixture(config, weights, rms_norm(x, weights["norm"], config.norm_eps)), memory


# ---------------------------------------------------------------------------------------------------------------
# config.json

KEYS: dict[str, Expected] = {
    "conv_kernel": KERNEL,
    "hybrid_override_pattern": TEXT,
    "layer_norm_epsilon": EPSILON,
    "layer_types": or_null(TEXTS),
    "layers_block_type": or_null(TEXTS),
    "mamba_head_dim": SIZE,
    "mamba_hidden_act": one_of("silu"),
    "mamba_num_heads": SIZE,
    "mlp_bias": SWITCH,
    "mlp_hidden_act": one_of(*ACTIVATIONS),
    "moe_intermediate_size": SIZE,
    "moe_latent_size": or_null(SIZE),
    "moe_shared_expert_intermediate_size": SIZE,
    "n_group": SIZE,
    "n_groups": SIZE,
    "n_routed_experts": SIZE,
    "norm_topk_prob": SWITCH,
    "num_experts_per_tok": SIZE,
    "routed_scaling_factor": above(0),
    "ssm_state_size": SIZE,
    # The class ties no head, whatever this says.
    "tie_word_embeddings": OFF,
    "time_step_min": Expected(lambda value: is_number(value) and 0 <= value < 1e30, "a number from 0"),
    "topk_group": SIZE,
    "use_bias": SWITCH,
    "use_conv_bias": SWITCH,
}
# Settings of programs and of the training, and those that the class declares and does not read.
UNREAD = (
    "chunk_size", "expand", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
    "mtp_layers_block_type", "n_shared_experts", "num_logits_to_keep", "num_nextn_predict_layers",
    "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_limit", "time_step_max",
    "use_mamba_kernels",
)  # fmt: skip


def read(hf: Mapping[str, Any]) -> NemotronHConfig:
    types = read_types(hf, (FULL, MAMBA, MLP, MOE))
    shape = mamba2.mamba_shape(
        hf["mamba_num_heads"], hf["mamba_head_dim"], hf["n_groups"], hf["ssm_state_size"], hf["conv_kernel"]
    )
    mamba = Mamba(
        shape=shape, step_limits=(float(hf["time_step_min"]), float("inf")), eps=hf["layer_norm_epsilon"],
        conv_bias=hf["use_conv_bias"], in_bias=hf["use_bias"], out_bias=hf["use_bias"],
    )  # fmt: skip
    # The layers have no positions.
    settings = {
        "hidden_act": hf["mlp_hidden_act"], "rms_norm_eps": hf["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    fields = {
        "mlp_bias": "mlp_bias", "dense_mlp": "intermediate_size", "shared_mlp": "moe_shared_expert_intermediate_size",
        "weights_sum_to_one": "norm_topk_prob",
    }  # fmt: skip
    has_experts = MOE in types
    if has_experts and hf["mlp_bias"]:
        raise ValueError("mlp_bias: true; expected false in a model with mixtures")
    # The class gives models without mixtures numbers of experts, too.
    return mixture.read_mixture(
        "nemotron_h", {**hf, **settings}, NemotronHConfig, experts="n_routed_experts", keys=fields, layer_types=types,
        mamba=mamba, recurrent=shape if MAMBA in types else None, latent=hf["moe_latent_size"] or 0,
        experts_per_token=hf["num_experts_per_tok"] if has_experts else 0,
        gate=read_gate(hf, scores="sigmoid", added=1e-20) if has_experts else Gate(),
    )  # fmt: skip


NEMOTRON_H = llama_like.llama_like(
    "nemotron_h", "NemotronHConfig", KEYS | dict.fromkeys(UNREAD, ANYTHING), read, leaves=LEAVES,
    dimensions=dimensions, block=attention_block, position_tables=lambda config, layout: (),
    layer_types={
        FULL: LayerType(attention_block, (LAYERS, FULL)), MAMBA: LayerType(mamba_block, (LAYERS, MAMBA), RECURRENCE),
        MLP: LayerType(mlp_block, (LAYERS, MLP), ()), MOE: LayerType(mixture_block, (LAYERS, MOE), ()),
    },
    filters={}, aside=("mtp.",), no_adapter="PEFT has no adapters for its convolutions", body_in_memory="model.",
)  # fmt: skip
