"""The text decoder of Qwen3-VL-MoE: a Qwen3-MoE with M-RoPE, whose files hold the experts of a layer as two tensors.

They are merged as the tensors that they are: a method that measures a tensor measures all experts of a layer together.
Files of the first versions hold them as `[experts, in, out]`; transformers reads these and `[experts, out, in]`, which
is written.
"""

from functools import partial

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS, ROUTER, Leaf
from evojax_merge.models.config_keys import SWITCH
from evojax_merge.models.families import mixture
from evojax_merge.models.families.llama_like import BIASES
from evojax_merge.models.families.mixture import QWEN_EXPERTS, MixtureConfig, mixture_of_experts, read_mixture
from evojax_merge.models.families.qwen_vl import MROPE, in_turns, read_mrope
from evojax_merge.models.layers import Attend, CosSin, KeyValue, Weights

_MLP = "model.layers.{layer}.mlp."


def block(
    config: MixtureConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    gate, up = jnp.split(weights["gate_up"], 2, axis=-2)
    return mixture.block(config, weights | {"gate": gate, "up": up}, x, rope, attend)


QWEN3_VL_MOE_TEXT = mixture_of_experts(
    "qwen3_vl_moe_text",
    "Qwen3VLMoeTextConfig",
    (
        Leaf("router", f"{_MLP}gate.weight", ROUTER, ("experts", "hidden"), LAYERS),
        Leaf("gate_up", f"{_MLP}experts.gate_up_proj", "mlp", ("experts", "gate_up", "hidden"), LAYERS),
        Leaf("down", f"{_MLP}experts.down_proj", "mlp", ("experts", "hidden", "mlp"), LAYERS, writes_residual=True),
    ),
    {name: expected for name, expected in QWEN_EXPERTS.items() if name != "norm_topk_prob"}
    | {"attention_bias": SWITCH, "rope_parameters": MROPE, "rope_scaling": MROPE},
    partial(
        read_mrope, partial(read_mixture, "qwen3_vl_moe_text", keys=BIASES, qk_norm=True, weights_sum_to_one=True),
        in_turns, (24, 20, 20),
    ),
    dimensions=lambda config: mixture.dimensions(config) | {"gate_up": 2 * config.mlp},
    block=block,
    packed={},
    transposable=("gate_up", "down"),
)  # fmt: skip
