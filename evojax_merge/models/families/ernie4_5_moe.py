"""ERNIE 4.5's mixtures: RoPE pairs neighbours; the layers of a range have mixtures, with an expert for every token and
a bias that only chooses, and the other layers an MLP."""

from collections.abc import Mapping, Sequence
from typing import Any

from evojax_merge.models.config_keys import EPSILON, OFF, SIZE, whole
from evojax_merge.models.families import llama_like, mixture
from evojax_merge.models.families.glm4_moe import correction_leaf
from evojax_merge.models.families.mixture import DENSE, SPARSE, Gate, MixtureConfig

CORRECTION = "moe_statics.e_score_correction_bias"


def has_experts(layer: int, first: int, last: int, interval: int) -> bool:
    return (layer + 1) % interval == 0 and first <= layer <= last


def type_keys(types: Sequence[str]) -> dict[str, int]:
    """The range and the interval of layers with experts. Raises ValueError for layers that are no such range."""
    layers = [layer for layer, name in enumerate(types) if name == SPARSE]
    first, last = (layers[0], layers[-1]) if layers else (len(types), len(types))
    for interval in range(1, len(types) + 1):
        if layers == [layer for layer in range(len(types)) if has_experts(layer, first, last, interval)]:
            return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": interval}
    raise ValueError(f"moe_layer_interval: layers {', '.join(map(str, layers))} have experts, at no interval")


def read(hf: Mapping[str, Any]) -> MixtureConfig:
    layers, last = hf["num_hidden_layers"], hf["moe_layer_end_index"]
    spread = hf["moe_layer_start_index"], layers - 1 if last == -1 else last, hf["moe_layer_interval"]
    return mixture.read_mixture(
        "ernie4_5_moe", hf, experts="moe_num_experts",
        keys={"experts_per_token": "moe_k", "dense_mlp": "intermediate_size"},
        interleaved=True, weights_sum_to_one=True, gate=Gate(least_sum=float(hf["moe_norm_min"])),
        shared_mlp=hf["moe_intermediate_size"] * hf["moe_num_shared_experts"],
        layer_types=tuple(SPARSE if has_experts(layer, *spread) else DENSE for layer in range(layers)),
    )  # fmt: skip


ERNIE4_5_MOE = mixture.mixture_of_experts(
    "ernie4_5_moe",
    "Ernie4_5_MoeConfig",
    (
        *mixture.expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", SPARSE),
        correction_leaf(f"mlp.{CORRECTION}", SPARSE, "one"),
        *mixture.shared_leaves("mlp.shared_experts", SPARSE),
        *mixture.dense_leaves(),
    ),
    {
        "moe_intermediate_size": SIZE,
        "moe_k": SIZE,
        "moe_layer_end_index": whole(-1, 2**31 - 1),
        "moe_layer_interval": SIZE,
        "moe_layer_start_index": whole(0, 2**31 - 1),
        "moe_norm_min": EPSILON,
        "moe_num_experts": SIZE,
        "moe_num_shared_experts": whole(0, 2**31 - 1),
        "use_bias": OFF,
    },
    read,
    {},
    layer_types=mixture.dense_and_sparse(llama_like.attention),
    type_keys=type_keys,
    packed=mixture.PACKED | {f"model.layers.{{layer}}.mlp.gate.{CORRECTION}": ("router_correction",)},
    aside=("model.mtp_",),
    defaults={"tie_word_embeddings": True},
    no_adapter="PEFT cannot tell its shared experts from its experts",
)
