"""Tiny image generators: diffusers folders, and files of tensors with the names of Stable Diffusion to FLUX."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

SIZE = 8


def make_ddpm(folder: Path, seed: int, steps: int = 1000, base: Path | None = None) -> Path:
    """A pipeline without texts; its network is `base`'s with noise, or random."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    if base is not None:
        other = UNet2DModel.from_pretrained(base / "unet")
        noise = {name: 0.05 * torch.randn_like(tensor) for name, tensor in unet.state_dict().items()}
        unet.load_state_dict({name: tensor + noise[name] for name, tensor in other.state_dict().items()})
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=steps)).save_pretrained(folder)
    return folder


def clip_tokenizer(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of letters, which is made of files in a folder, and the options of text encoders that go with it."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    files[0].write_text(json.dumps({word: i for i, word in enumerate(words)}))
    files[1].write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(*map(str, files), model_max_length=16)
    for file in files:
        file.unlink()
    return tokenizer, {
        "vocab_size": len(words), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53,
        "pad_token_id": 53,
    }  # fmt: skip


UNET = {
    "sample_size": 4, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4, "attention_head_dim": 4,
}  # fmt: skip


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def make_stable_diffusion(folder: Path, seed: int) -> Path:
    """A pipeline with a text encoder and an autoencoder, all random."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**UNET, cross_attention_dim=8)
    vae = autoencoder()
    tokenizer, options = clip_tokenizer(folder)
    encoder = CLIPTextModel(CLIPTextConfig(**options))
    StableDiffusionPipeline(
        vae, encoder, tokenizer, unet, DDIMScheduler(num_train_timesteps=50, clip_sample=False),
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sdxl(folder: Path, seed: int) -> Path:
    """A pipeline of SDXL's form, with two text encoders, all random."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **UNET, cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )  # fmt: skip
    vae = autoencoder()
    tokenizer, options = clip_tokenizer(folder)
    first, second = CLIPTextConfig(**options), CLIPTextConfig(**options, projection_dim=8)
    StableDiffusionXLPipeline(
        vae, CLIPTextModel(first), CLIPTextModelWithProjection(second), tokenizer, tokenizer, unet,
        DDIMScheduler(num_train_timesteps=50, clip_sample=False), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def file_tensors(kind: str, seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The tensors of a single file: sd1, sdxl, sd3 or flux; one or two for each block."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    whole = "model.diffusion_model."
    if kind == "flux":
        tensors = {f"{whole}img_in.weight": drawn(4, 3), f"{whole}final_layer.linear.bias": drawn(4)}
        for i in range(12):
            tensors[f"{whole}double_blocks.{i}.img_attn.qkv.weight"] = drawn(6, 4)
        for i in range(3):
            tensors[f"{whole}single_blocks.{i}.linear1.weight"] = drawn(6, 4)
        return tensors
    if kind == "sd3":
        tensors = {f"{whole}x_embedder.proj.weight": drawn(6, 4, 2, 2), f"{whole}final_layer.linear.bias": drawn(4)}
        for i in range(12):
            tensors[f"{whole}joint_blocks.{i}.x_block.attn.qkv.weight"] = drawn(6, 4)
            tensors[f"{whole}joint_blocks.{i}.context_block.attn.qkv.weight"] = drawn(6, 4)
        tensors["first_stage_model.decoder.conv_in.weight"] = drawn(5, 4, 3, 3)
        tensors["text_encoders.clip_l.transformer.text_model.final_layer_norm.bias"] = drawn(8)
        return tensors
    depth = 9 if kind == "sdxl" else 12
    tensors = {f"{whole}time_embed.0.weight": drawn(8, 4), f"{whole}out.2.weight": drawn(4, 4, 3, 3)}
    for i in range(depth):
        for side in ("input", "output"):
            tensors[f"{whole}{side}_blocks.{i}.0.in_layers.2.weight"] = drawn(5, 4, 3, 3)
    tensors[f"{whole}middle_block.1.transformer_blocks.0.attn1.to_q.weight"] = drawn(6, 4)
    tensors["first_stage_model.decoder.conv_in.weight"] = drawn(5, 4, 3, 3)
    if kind == "sdxl":
        tensors[f"{whole}label_emb.0.0.weight"] = drawn(8, 4)
        tensors["conditioner.embedders.1.model.ln_final.bias"] = drawn(8)
        return tensors
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = drawn(8)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(7)[None]
    return tensors


def save_file_of(kind: str, seed: int, file: Path, dtype: Any = np.float32) -> Path:
    metadata = {"format": "pt", "modelspec.title": f"number {seed}", "modelspec.hash_sha256": "0x0"}
    save_file(file_tensors(kind, seed, dtype), file, metadata)
    return file
