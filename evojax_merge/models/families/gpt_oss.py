"""gpt-oss: mixtures of experts with biases and a clipped SwiGLU, attention sinks, and a sliding window in every second
layer.

The files hold the experts of a layer as two tensors `[experts, in, out]`, with the rows of gate and input in turns.
Published checkpoints have them in MXFP4, which `checkpoints.fp4` dequantises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS, ROUTER, Leaf
from evojax_merge.models.config_keys import SIZE, SWITCH, TEXTS, above, or_null
from evojax_merge.models.families import mixture
from evojax_merge.models.families.llama_like import BIASES, WINDOW
from evojax_merge.models.families.mixture import MixtureConfig, mixture_of_experts
from evojax_merge.models.layers import Attend, CosSin, KeyValue, Weights


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(MixtureConfig):
    """swiglu_alpha: the factor inside of the gate's sigmoid; swiglu_limit: the bound of gate and input."""

    swiglu_alpha: float
    swiglu_limit: float

    parts: ClassVar[Mapping[str, int]] = {"gate_up": -1, "gate_up_bias": -1, "down": -2}
    transposed: ClassVar[bool] = True

    def inner(self, project: Callable[[str], jax.Array]) -> jax.Array:
        both, limit = project("gate_up"), self.swiglu_limit
        gate, up = jnp.minimum(both[..., ::2], limit), jnp.clip(both[..., 1::2], -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.swiglu_alpha * gate)


_LAYER = "model.layers.{layer}."
_EXPERTS = f"{_LAYER}mlp.experts."
LEAVES = (
    Leaf("sinks", f"{_LAYER}self_attn.sinks", "attention", ("heads",), LAYERS),
    Leaf("router", f"{_LAYER}mlp.router.weight", ROUTER, ("experts", "hidden"), LAYERS),
    Leaf("router_bias", f"{_LAYER}mlp.router.bias", ROUTER, ("experts",), LAYERS),
    Leaf("gate_up", f"{_EXPERTS}gate_up_proj", "mlp", ("experts", "hidden", "gate_up"), LAYERS, -1),
    Leaf("gate_up_bias", f"{_EXPERTS}gate_up_proj_bias", "mlp", ("experts", "gate_up"), LAYERS, -1),
    Leaf(
        "down", f"{_EXPERTS}down_proj", "mlp", ("experts", "mlp", "hidden"), LAYERS, -2, writes_residual=True,
    ),
    Leaf("down_bias", f"{_EXPERTS}down_proj_bias", "mlp", ("experts", "hidden"), LAYERS, writes_residual=True),
)  # fmt: skip


def block(
    config: GptOssConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    sinks = partial(attend, sinks=weights["sinks"])
    return mixture.block(config, weights, x, rope, sinks)


def read(hf: Mapping[str, Any]) -> GptOssConfig:
    return mixture.read_mixture(
        "gpt_oss", hf, GptOssConfig, experts="num_local_experts", mlp="intermediate_size", keys=BIASES,
        swiglu_alpha=float(hf["swiglu_alpha"]), swiglu_limit=float(hf["swiglu_limit"]), weights_sum_to_one=True,
    )  # fmt: skip


GPT_OSS = mixture_of_experts(
    "gpt_oss",
    "GptOssConfig",
    LEAVES,
    {
        "attention_bias": SWITCH,
        "layer_types": or_null(TEXTS),
        "num_experts_per_tok": SIZE,
        "num_local_experts": SIZE,
        "sliding_window": WINDOW,
        "swiglu_alpha": above(0),
        "swiglu_limit": above(0),
    },
    read,
    {"router": "mlp.router", "mlp": ".mlp."},
    dimensions=lambda config: mixture.dimensions(config) | {"gate_up": 2 * config.mlp, "heads": config.heads},
    block=block,
    packed={},
    no_adapter="adapters of experts that lie in one tensor are not written",
)
