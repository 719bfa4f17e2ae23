"""Tiny vision-language models with their processors, and images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from helpers.models import word_tokenizer, words
from PIL import Image

from reference.vision_scores import load_seeing, records_score, seeing_logprobs, seeing_text

__all__ = ["load_seeing", "records_score", "seeing_logprobs", "seeing_text"]

IMAGE_TOKEN, VOCAB = 60, 64
# The sizes of the images: of one shape, wide, high, and smaller than the model's.
SIZES = ((12, 12), (40, 16), (15, 33), (7, 9))


def tokenizer(*special: str) -> Any:
    """A tokenizer of words whose token `IMAGE_TOKEN` and those before it are the special ones."""
    tokens = words(VOCAB)
    tokens[IMAGE_TOKEN + 1 - len(special) : IMAGE_TOKEN + 1] = special
    made = word_tokenizer(tokens)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def letter_tokenizer(*special: str) -> Any:
    """A byte-level tokenizer of the letters of `words`, in the one class that transformers takes for Qwen3.5."""
    tokens, letters = words(VOCAB), "Ġw0123456789"
    tokens[4 : 4 + len(letters)] = letters
    tokens[IMAGE_TOKEN + 1 - len(special) : IMAGE_TOKEN + 1] = special
    made = transformers.Qwen3_5Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def named_tokenizer(names: dict[str, str]) -> Any:
    """A tokenizer whose special tokens are attributes of these names, which the processor reads."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(*names.values()).backend_tokenizer, unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>", extra_special_tokens=names,
    )  # fmt: skip


def llava_processor() -> Any:
    pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    return transformers.LlavaProcessor(
        pixels, tokenizer("<image>"), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def llava_next_processor() -> Any:
    pixels = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, image_grid_pinpoints=TILES
    )
    return transformers.LlavaNextProcessor(
        pixels, tokenizer("<image>"), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def idefics3_processor() -> Any:
    pixels = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 24}, max_image_size={"longest_edge": 12})
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = (*tiles, "<global-img>", "<end_of_utterance>", "<fake_token_around_image>", "<image>")
    return transformers.Idefics3Processor(pixels, tokenizer(*special), image_seq_len=4)


def smolvlm_processor() -> Any:
    pixels = transformers.SmolVLMImageProcessor(size={"longest_edge": 24}, max_image_size={"longest_edge": 12})
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    made = tokenizer(*tiles, "<global-img>", "<end_of_utterance>", "<fake_token_around_image>", "<image>")
    return transformers.SmolVLMProcessor(pixels, made, transformers.SmolVLMVideoProcessor(), image_seq_len=4)


def internvl_processor() -> Any:
    pixels = transformers.GotOcr2ImageProcessor(size={"height": 8, "width": 8}, max_patches=4)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    made = named_tokenizer({**names, "video_token": "<video>"})
    return transformers.InternVLProcessor(pixels, made, transformers.InternVLVideoProcessor(), image_seq_length=4)


def pixtral_processor(merged: int = 1) -> Any:
    """The processor of images of any size, whose rows end with a token. merged: how many patches in each direction
    are one position."""
    pixels = transformers.PixtralImageProcessor(size={"longest_edge": 24}, patch_size={"height": 4, "width": 4})
    made = tokenizer("[IMG_BREAK]", "[IMG_END]", "[IMG]")
    return transformers.PixtralProcessor(pixels, made, patch_size=4, spatial_merge_size=merged)


def mistral3_processor() -> Any:
    return pixtral_processor(merged=2)


def gemma3_processor() -> Any:
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    made = named_tokenizer({"boi_token": "<begin>", "eoi_token": "<end>", "image_token": "<soft>"})
    return transformers.Gemma3Processor(pixels, made, image_seq_length=4)


def qwen_processor(kind: str, make_tokenizer: Callable[..., Any] = tokenizer) -> Any:
    size = {"shortest_edge": 64, "longest_edge": 1024}
    pixels = transformers.Qwen2VLImageProcessorPil(size=size, patch_size=4, merge_size=2, temporal_patch_size=2)
    made = make_tokenizer("<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>")
    frames = getattr(transformers, "Qwen3VLVideoProcessor" if kind == "Qwen3VL" else "Qwen2VLVideoProcessor")
    videos = frames(size=size, patch_size=4, merge_size=2, temporal_patch_size=2)
    return getattr(transformers, f"{kind}Processor")(pixels, made, videos)


TILES = [[12, 24], [24, 12], [24, 24]]
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", "image_size": 12, "patch_size": 4, **VISION}
LLAMA, IMAGES = {"model_type": "llama", **TEXT}, {"image_token_index": IMAGE_TOKEN}
MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 8, **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}
PIXTRAL = {"model_type": "pixtral", "image_size": 24, "patch_size": 4, "head_dim": 8, **VISION}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_IMAGES = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN - 1, "vision_end_token_id": IMAGE_TOKEN - 2,
    "vision_start_token_id": IMAGE_TOKEN - 3,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN3_5_VISION = QWEN_VISION | {
    "model_type": "qwen3_5_vision", "intermediate_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16,
}  # fmt: skip
DELTA = {
    "head_dim": 16, "num_hidden_layers": 3, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "mrope_interleaved": True},
}  # fmt: skip
# model_type, or a name -> its settings, and its processor.
SEEING: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "llava": ({"text_config": LLAMA, "vision_config": CLIP, **IMAGES}, llava_processor),
    "llava_next": (
        {"text_config": MISTRAL, "vision_config": CLIP, "image_grid_pinpoints": TILES, **IMAGES}, llava_next_processor,
    ),
    "vipllava": ({"text_config": LLAMA, "vision_config": CLIP, "vision_feature_layers": [-1, 1], **IMAGES},
                 llava_processor),
    "gemma3": (
        {"text_config": {"model_type": "gemma3_text", "query_pre_attn_scalar": 24, "sliding_window": 5,
                         "layer_types": ["sliding_attention", "full_attention"], **TEXT, "head_dim": 8},
         "vision_config": {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 2, **VISION},
         "mm_tokens_per_image": 4, "boi_token_index": IMAGE_TOKEN - 2, "eoi_token_index": IMAGE_TOKEN - 1, **IMAGES},
        gemma3_processor,
    ),
    "idefics3": (
        {"text_config": LLAMA, "image_token_id": IMAGE_TOKEN, "scale_factor": 2,
         "vision_config": {"model_type": "idefics3_vision", "image_size": 12, "patch_size": 3, **VISION}},
        idefics3_processor,
    ),
    "smolvlm": (
        {"text_config": LLAMA, "image_token_id": IMAGE_TOKEN, "scale_factor": 2,
         "vision_config": {"model_type": "smolvlm_vision", "image_size": 12, "patch_size": 3, **VISION}},
        smolvlm_processor,
    ),
    "internvl": (
        {"text_config": QWEN2, "image_token_id": IMAGE_TOKEN - 1, "image_seq_length": 4,
         "vision_config": {"model_type": "internvl_vision", "image_size": [8, 8], "patch_size": [2, 2], **VISION}},
        internvl_processor,
    ),
    "mistral3": (
        {"text_config": MISTRAL, "vision_config": PIXTRAL, "spatial_merge_size": 2, **IMAGES}, mistral3_processor,
    ),
    "pixtral": (
        {"model_type": "llava", "text_config": MISTRAL, "vision_config": PIXTRAL, "vision_feature_layer": -1,
         "vision_feature_select_strategy": "full", **IMAGES},
        pixtral_processor,
    ),
    "qwen2_vl": (
        {"text_config": {"model_type": "qwen2_vl_text", **TEXT, "rope_parameters": MROPE}, **QWEN_IMAGES,
         "vision_config": {"model_type": "qwen2_vl_vision", **QWEN_VISION, "embed_dim": 16, "hidden_size": 32,
                           "mlp_ratio": 2}},
        partial(qwen_processor, "Qwen2VL"),
    ),
    "qwen2_5_vl": (
        {"text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": MROPE}, **QWEN_IMAGES,
         "vision_config": {"model_type": "qwen2_5_vl_vision", **QWEN_VISION, "intermediate_size": 24,
                           "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}},
        partial(qwen_processor, "Qwen2_5_VL"),
    ),
    "qwen3_vl": (
        {"text_config": {"model_type": "qwen3_vl_text", **TEXT, "head_dim": 8, "num_hidden_layers": 4,
                         "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}},
         "vision_config": {"model_type": "qwen3_vl_vision", **QWEN_VISION, "intermediate_size": 24, "depth": 3,
                           "out_hidden_size": 32, "num_position_embeddings": 16,
                           "deepstack_visual_indexes": [0, 1, 2]},
         **QWEN_IMAGES},
        partial(qwen_processor, "Qwen3VL"),
    ),
    "qwen3_vl_moe": (
        {"text_config": {"model_type": "qwen3_vl_moe_text", **TEXT, "head_dim": 8, "moe_intermediate_size": 24,
                         "num_experts": 4, "num_experts_per_tok": 2,
                         "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}},
         "vision_config": {"model_type": "qwen3_vl_moe_vision", **QWEN_VISION, "intermediate_size": 24,
                           "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
         **QWEN_IMAGES},
        partial(qwen_processor, "Qwen3VL"),
    ),
    "qwen3_5": (
        {"text_config": {"model_type": "qwen3_5_text", **TEXT, **DELTA}, "vision_config": QWEN3_5_VISION,
         **QWEN_IMAGES},
        partial(qwen_processor, "Qwen3VL", letter_tokenizer),
    ),
    "qwen3_5_moe": (
        {"text_config": {"model_type": "qwen3_5_moe_text", **TEXT, **DELTA, "moe_intermediate_size": 24,
                         "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 20},
         "vision_config": QWEN3_5_VISION | {"model_type": "qwen3_5_moe_vision"}, **QWEN_IMAGES},
        partial(qwen_processor, "Qwen3VL", letter_tokenizer),
    ),
}  # fmt: skip
# The text in an image's place, where it is not `<image>`.
QWEN_PLACE = "<|vision_start|> <|image_pad|> <|vision_end|>"
PLACEHOLDERS = {
    "gemma3": "<begin>", "internvl": "<IMG_CONTEXT>", "mistral3": "[IMG]", "pixtral": "[IMG]", "qwen2_vl": QWEN_PLACE,
    **dict.fromkeys(("qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"), QWEN_PLACE),
}  # fmt: skip


def seeing_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{"model_type": kind, **SEEING[kind][0]})
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    for name, values in model.named_parameters():
        torch.nn.init.normal_(values, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.make_processor = SEEING[kind][1]
    return model


def save_seeing(model: Any, folder: Path, seed: int, vision_noise: float = 0.0) -> Path:
    """A copy with noise in every tensor of the decoder, and of the other modules with this noise, and its processor."""
    torch.manual_seed(seed)
    state = {}
    for name, values in model.state_dict().items():
        in_decoder = any(part in name for part in ("language_model", "text_model", "lm_head"))
        state[name] = values + (0.05 if in_decoder else vision_noise) * torch.randn_like(values)
    copy = type(model)(model.config)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)
    model.make_processor().save_pretrained(folder)
    return folder


def write_images(folder: Path) -> list[Path]:
    """Images of unlike sizes, by their files."""
    rng, files = np.random.default_rng(0), []
    for number, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files
