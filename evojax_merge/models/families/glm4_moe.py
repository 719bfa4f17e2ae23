"""GLM-4.5 and 4.6: a part of each head is rotated; the first layers have an MLP, and the others a mixture of experts,
which the router chooses by sigmoids and a bias within some groups; with heads for several tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from evojax_merge.models.architecture import NEXT_LAYERS, ROUTER, Leaf
from evojax_merge.models.config_keys import SIZE, SWITCH, Expected, above, whole
from evojax_merge.models.families import llama_like, mixture
from evojax_merge.models.families.mixture import DENSE, SPARSE, Gate, MixtureConfig

ROUTER_KEYS: dict[str, Expected] = {
    "first_k_dense_replace": whole(0, 2**31 - 1),
    "moe_intermediate_size": SIZE,
    "n_group": SIZE,
    "n_routed_experts": SIZE,
    "n_shared_experts": whole(0, 2**31 - 1),
    "norm_topk_prob": SWITCH,
    "num_experts_per_tok": SIZE,
    "num_mtp_layers": whole(0, 2**31 - 1),
    "num_nextn_predict_layers": whole(0, 2**31 - 1),
    "routed_scaling_factor": above(0),
    "topk_group": SIZE,
}


def correction_leaf(tensor: str, stack: str = SPARSE, *axes: str) -> Leaf:
    """The numbers that are added to the scores of experts where the router chooses."""
    return Leaf("router_correction", f"model.layers.{{layer}}.{tensor}", ROUTER, (*axes, "experts"), stack)


SPARSE_LEAVES = (
    *mixture.expert_leaves("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", SPARSE),
    correction_leaf("mlp.gate.e_score_correction_bias"),
    *mixture.shared_leaves("mlp.shared_experts", SPARSE),
    *mixture.dense_leaves(),
)


def read_gate(hf: Mapping[str, Any], **values: Any) -> Gate:
    """The router's rule. Raises ValueError for groups that do not divide the experts, or hold too few of a token's."""
    experts, groups, per_token = hf["n_routed_experts"], hf["n_group"] or 1, hf["topk_group"] or 1
    gate = Gate(groups=groups, groups_per_token=per_token, scale=float(hf["routed_scaling_factor"]), **values)
    if experts % groups or per_token > groups or (experts // groups < gate.group_top and per_token < groups):
        raise ValueError(
            f"n_group: {groups}, topk_group: {per_token}; expected a divisor of n_routed_experts: {experts}, in groups "
            f"of at least {gate.group_top}, and at most as many of a token"
        )
    if hf["num_experts_per_tok"] > experts // groups * per_token:
        raise ValueError(f"num_experts_per_tok: {hf['num_experts_per_tok']}; expected at most those of topk_group")
    return gate


def read_layers(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `read_mixture` for a model whose first layers have an MLP and the others a mixture."""
    dense = min(hf["first_k_dense_replace"], hf["num_hidden_layers"])
    return {
        "layer_types": (DENSE,) * dense + (SPARSE,) * (hf["num_hidden_layers"] - dense), "experts": "n_routed_experts",
        "dense_mlp": hf["intermediate_size"], "shared_mlp": hf["moe_intermediate_size"] * hf["n_shared_experts"],
        "weights_sum_to_one": hf["norm_topk_prob"],
    }  # fmt: skip


def dense_first(types: Sequence[str], key: str = "first_k_dense_replace") -> dict[str, Any]:
    """The number of first layers with an MLP, as a key of config.json; the names of their types end with `DENSE`.
    Raises ValueError where such a layer comes later."""
    is_dense = [name.endswith(DENSE) for name in types]
    dense = sum(is_dense)
    if any(is_dense[dense:]):
        late = dense + is_dense[dense:].index(True)
        raise ValueError(f"{key}: layer {late} has an MLP, behind layers with a mixture of experts")
    return {key: dense}


def read(hf: Mapping[str, Any]) -> MixtureConfig:
    return mixture.read_mixture(
        "glm4_moe", hf, keys={"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"},
        gate=read_gate(hf, scores="sigmoid", added=1e-20), **read_layers(hf),
    )  # fmt: skip


GLM4_MOE = mixture.mixture_of_experts(
    "glm4_moe",
    "Glm4MoeConfig",
    SPARSE_LEAVES,
    ROUTER_KEYS | llama_like.PARTIAL_KEYS | {"attention_bias": SWITCH, "use_qk_norm": SWITCH},
    read,
    layer_types=mixture.dense_and_sparse(llama_like.attention),
    type_keys=dense_first,
    aside=(NEXT_LAYERS,),
    no_adapter="PEFT cannot tell its shared experts from its experts",
)
