"""Apertus (arXiv 2509.14233): queries and keys are normalised by head; an MLP without gate, with xIELU (arXiv
2411.13010), whose two slopes each layer learns."""

from functools import partial

import jax
import jax.numpy as jnp

from evojax_merge.models.architecture import LAYERS, Leaf
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import SWITCH, one_of
from evojax_merge.models.families import llama_like
from evojax_merge.models.families.llama_like import BIASES, FILTERS, PROJECTIONS, SHARED, norm, norm_leaf, read_config
from evojax_merge.models.layers import Attend, CosSin, KeyValue, Weights, dense

_ACTIVATION = "model.layers.{layer}.mlp.act_fn."
LEAVES = (
    norm_leaf("attention_norm", "attention_layernorm"),
    norm_leaf("mlp_norm", "feedforward_layernorm"),
    *(leaf for leaf in PROJECTIONS if leaf.component != "mlp" or leaf.name in ("up", "down")),
    Leaf("alpha_p", f"{_ACTIVATION}alpha_p", "mlp", ("one",), LAYERS),
    Leaf("alpha_n", f"{_ACTIVATION}alpha_n", "mlp", ("one",), LAYERS),
    Leaf("beta", f"{_ACTIVATION}beta", "mlp", (), LAYERS),
    Leaf("eps", f"{_ACTIVATION}eps", "mlp", (), LAYERS),
    *SHARED,
)


def xielu(weights: Weights, x: jax.Array) -> jax.Array:
    """xIELU: a parabola above 0, an exponential below."""
    beta = weights["beta"]
    above, below = jax.nn.softplus(weights["alpha_p"]), beta + jax.nn.softplus(weights["alpha_n"])
    curve = jnp.where(x > 0, above * x * x, (jnp.expm1(jnp.minimum(x, weights["eps"])) - x) * below)
    return curve + beta * x


def block(
    config: LlamaLikeConfig, weights: Weights, x: jax.Array, rope: CosSin, attend: Attend
) -> tuple[jax.Array, KeyValue]:
    x, kept = llama_like.attention(config, weights, x, rope, attend)
    with jax.named_scope("mlp"):
        inner = xielu(weights, dense(norm(config, weights, "mlp_norm", x), weights, "up"))
        return x + dense(inner, weights, "down"), kept


APERTUS = llama_like.llama_like(
    "apertus",
    "ApertusConfig",
    {"attention_bias": SWITCH, "hidden_act": one_of("xielu")},
    partial(read_config, "apertus", keys=BIASES, qk_norm=True),
    leaves=LEAVES,
    dimensions=lambda config: llama_like.dimensions(config) | {"one": 1},
    block=block,
    filters=FILTERS,
)
