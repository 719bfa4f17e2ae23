"""Tiny LLaVAs: a CLIP tower for small pictures and a projector in front of a tiny Llama, and their files.

The weights have the names and the orientation of Hugging Face's files; the forward pass here is that of training.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.checkpoints.bank import stored_tensors
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import forward
from evojax_merge.models.images import ImageInputs
from evojax_merge.models.layers import SequenceLayout
from evojax_merge.models.sources import StackedWeights
from evojax_merge.zoo.tiny_llama import save_tensors

TOWER, PROJECTOR, DECODER = "vision_tower.vision_model.", "multi_modal_projector.", "language_model."
LAYER_NORM_EPS = 1e-5

VisionWeights = Mapping[str, jax.Array]


@dataclass(frozen=True)
class TowerSizes:
    """The sizes of a tower; side: of a picture, patch: of its square patches, in pixels."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    side: int
    patch: int

    @property
    def positions(self) -> int:
        """The number of a picture's positions in front of the decoder: one for each patch."""
        return (self.side // self.patch) ** 2


@struct.dataclass
class SeeingModel:
    """A decoder with a vision side. vision: the tensors of the tower and the projector by their names."""

    decoder: StackedWeights
    vision: dict[str, jax.Array]


def fresh_vision(sizes: TowerSizes, width: int, seed: int) -> dict[str, jax.Array]:
    """Random weights of a tower and of a projector to `width`: norms are one, biases zero, everything else is normal
    with variance 1 / fan-in."""
    rng = np.random.default_rng([seed, 4])
    hidden, mlp = sizes.hidden, sizes.mlp
    weights: dict[str, jax.Array] = {}

    def draw(name: str, *shape: int) -> None:
        std = float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else hidden**-0.5
        weights[name] = jnp.asarray(rng.normal(0.0, std, shape), jnp.float32)

    def linear(name: str, inner: int, outer: int) -> None:
        draw(f"{name}.weight", outer, inner)
        weights[f"{name}.bias"] = jnp.zeros(outer)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = jnp.ones(hidden), jnp.zeros(hidden)

    draw(f"{TOWER}embeddings.class_embedding", hidden)
    draw(f"{TOWER}embeddings.patch_embedding.weight", hidden, 3, sizes.patch, sizes.patch)
    draw(f"{TOWER}embeddings.position_embedding.weight", sizes.positions + 1, hidden)
    norm(f"{TOWER}pre_layrnorm")
    for layer in range(sizes.layers):
        place = f"{TOWER}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{place}self_attn.{name}", hidden, hidden)
        linear(f"{place}mlp.fc1", hidden, mlp)
        linear(f"{place}mlp.fc2", mlp, hidden)
        norm(f"{place}layer_norm1")
        norm(f"{place}layer_norm2")
    norm(f"{TOWER}post_layernorm")
    linear(f"{PROJECTOR}linear_1", hidden, width)
    linear(f"{PROJECTOR}linear_2", width, width)
    return weights


def features(sizes: TowerSizes, weights: VisionWeights, pixels: jax.Array) -> jax.Array:
    """`[B, positions, width]`: what stands in the pictures' positions. pixels: uint8[B, side, side, 3]."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: jax.Array) -> jax.Array:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    count, grid, patch = len(pixels), sizes.side // sizes.patch, sizes.patch
    cut = (pixels.astype(jnp.float32) / 127.5 - 1.0).reshape(count, grid, patch, grid, patch, 3)
    patches = cut.transpose(0, 1, 3, 5, 2, 4).reshape(count, grid * grid, 3 * patch * patch)
    embedded = patches @ weights[f"{TOWER}embeddings.patch_embedding.weight"].reshape(sizes.hidden, -1).T
    first = jnp.broadcast_to(weights[f"{TOWER}embeddings.class_embedding"], (count, 1, sizes.hidden))
    x = jnp.concatenate([first, embedded], axis=1) + weights[f"{TOWER}embeddings.position_embedding.weight"]
    x = norm(f"{TOWER}pre_layrnorm", x)
    for layer in range(sizes.layers):
        place = f"{TOWER}encoder.layers.{layer}."
        inner = norm(f"{place}layer_norm1", x)
        heads = (
            linear(f"{place}self_attn.{name}", inner).reshape(count, -1, sizes.heads, sizes.hidden // sizes.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x += linear(f"{place}self_attn.out_proj", jax.nn.dot_product_attention(*heads).reshape(x.shape))
        inner = linear(f"{place}mlp.fc1", norm(f"{place}layer_norm2", x))
        x += linear(f"{place}mlp.fc2", inner * jax.nn.sigmoid(1.702 * inner))
    inner = jax.nn.gelu(linear(f"{PROJECTOR}linear_1", x[:, 1:]), approximate=False)
    return linear(f"{PROJECTOR}linear_2", inner)


def seeing_forward(
    config: DecoderConfig, sizes: TowerSizes, model: SeeingModel, pixels: jax.Array, tokens: jax.Array,
    layout: SequenceLayout,
) -> jax.Array:  # fmt: skip
    """The final hidden states of rows that begin with a picture. tokens: int32[B, T], of which the first `positions`
    are the picture's, and are not read."""
    places, count = sizes.positions, len(pixels)
    table = features(sizes, model.vision, pixels)
    numbers = ~jnp.arange(count * places, dtype=jnp.int32).reshape(count, places)
    tokens = jnp.concatenate([numbers, tokens[:, places:]], axis=1)
    images = ImageInputs(table.reshape(count * places, -1))
    hidden, _ = forward(config, model.decoder, tokens, layout, images=images)
    return hidden


def save_seeing_weights(folder: Path, model: SeeingModel, config: DecoderConfig) -> None:
    """Save the weights."""
    decoder = {f"{DECODER}{name}": values for name, values in stored_tensors(model.decoder, config)}
    save_tensors(folder, decoder | {name: np.asarray(values) for name, values in model.vision.items()})


def save_seeing_config(folder: Path, text: Path, sizes: TowerSizes, image_token: int, vocabulary: int) -> None:
    """Save the config of a model whose decoder is that of the folder `text`, with a larger vocabulary, and the configs
    of its processor."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    decoder = LlamaConfig.from_pretrained(text)
    decoder.vocab_size = vocabulary
    tower = CLIPVisionConfig(
        hidden_size=sizes.hidden, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp, image_size=sizes.side, patch_size=sizes.patch, layer_norm_eps=LAYER_NORM_EPS,
    )  # fmt: skip
    LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], text_config=decoder, vision_config=tower,
        image_token_index=image_token, vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=sizes.positions, tie_word_embeddings=False, dtype="float32",
    ).save_pretrained(folder)  # fmt: skip
    half = [0.5, 0.5, 0.5]
    pixels = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": sizes.side},
        "crop_size": {"height": sizes.side, "width": sizes.side}, "do_resize": True, "do_center_crop": True,
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 3,
        "image_mean": half, "image_std": half,
    }  # fmt: skip
    placing = {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": sizes.patch,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    for file, content in (("preprocessor_config.json", pixels), ("processor_config.json", placing)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
