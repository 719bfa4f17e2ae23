"""OPT (arXiv 2205.01068): LayerNorm, learned positions, biases, an MLP without gate."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from evojax_merge.models.architecture import LAYERS, Architecture, Leaf
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.config_keys import ANYTHING, CONTEXT, DEPTH, SIZE, SWITCH, Expected, one_of, or_null
from evojax_merge.models.families import llama_like
from evojax_merge.models.families.gpt2 import embed
from evojax_merge.models.layers import ACTIVATIONS

# The first rows of the embedding of positions belong to no position.
OFFSET = 2
_DECODER, _LAYER = "model.decoder.", "model.decoder.layers.{layer}."
_NAMES = {"model.": _DECODER, "o_proj": "out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2"}


def _norm(name: str, module: str, **more: Any) -> tuple[Leaf, Leaf]:
    gain = Leaf(name, f"{module}.weight", "norm", ("hidden",), **more)
    return gain, replace(gain, name=f"{name}_bias", tensor=f"{module}.bias")


_WITHOUT = ("gate", "gate_bias", "q_norm", "k_norm")
LEAVES = (
    *_norm("attention_norm", f"{_LAYER}self_attn_layer_norm", stack=LAYERS),
    *_norm("mlp_norm", f"{_LAYER}final_layer_norm", stack=LAYERS),
    *(llama_like.renamed(leaf, _NAMES) for leaf in llama_like.PROJECTIONS if leaf.name not in _WITHOUT),
    *(llama_like.renamed(leaf, _NAMES) for leaf in llama_like.SHARED if leaf.name != "final_norm"),
    *_norm("final_norm", f"{_DECODER}final_layer_norm"),
    Leaf("positions", f"{_DECODER}embed_positions.weight", "embedding", ("positions", "hidden")),
)


def dimensions(config: LlamaLikeConfig) -> dict[str, int]:
    assert config.positions is not None
    return llama_like.dimensions(config) | {"positions": config.positions + OFFSET}


def read(hf: Mapping[str, Any]) -> LlamaLikeConfig:
    if hf["word_embed_proj_dim"] != hf["hidden_size"]:
        raise ValueError(f"word_embed_proj_dim: {hf['word_embed_proj_dim']}; expected hidden_size, {hf['hidden_size']}")
    settings = {
        "hidden_act": hf["activation_function"], "intermediate_size": hf["ffn_dim"], "num_key_value_heads": None,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    return llama_like.read_config(
        "opt", {**hf, **settings}, LlamaLikeConfig, dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "enable_bias"),
        norm="layer", positions=hf["max_position_embeddings"],
    )  # fmt: skip


_ON = Expected(lambda value: value is True, "true")
OPT = Architecture(
    model_type="opt",
    config_class="OPTConfig",
    read_config=read,
    leaves=LEAVES,
    dimensions=dimensions,
    embed=partial(embed, offset=OFFSET),
    block=llama_like.block,
    final_norm=llama_like.final_norm,
    position_tables=lambda config, layout: (),
    defaults={"tie_word_embeddings": True},
    filters={
        "attention": ".self_attn.", "mlp": ".fc", "norm": "layer_norm", "embed": "embed_tokens",
        "positions": "embed_positions", "final_norm": "decoder.final_layer_norm.weight",
        "final_norm_bias": "decoder.final_layer_norm.bias", "head": "lm_head",
    },
    keys={
        "activation_function": one_of(*ACTIVATIONS), "do_layer_norm_before": _ON, "dropout": ANYTHING,
        "enable_bias": SWITCH, "ffn_dim": SIZE, "hidden_size": SIZE, "init_std": ANYTHING,
        "layer_norm_elementwise_affine": _ON, "layerdrop": ANYTHING, "max_position_embeddings": CONTEXT,
        "num_attention_heads": SIZE, "num_hidden_layers": DEPTH, "tie_word_embeddings": SWITCH, "vocab_size": SIZE,
        "word_embed_proj_dim": or_null(SIZE),
    },
)  # fmt: skip
