"""Networks whose folders lie: classifiers of images and texts, recordings, image generators and sentence transformers,
as torch's libraries would open them."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hostile import SEARCH, Case, World, changing, edited, instead

Change = Callable[[Path], Any]
SIDE = 8
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 64))]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIDE, "width": SIDE},
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True,
}  # fmt: skip
# The library's limit of a config's nesting, and more.
DEEP = 100_000


@cache
def template(kind: str) -> Path:
    """Two networks of a kind, `one` and `two`, with the examples of a task; made once."""
    import torch

    folder = Path(tempfile.mkdtemp(prefix="networks."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        MAKERS[kind](folder / name)
    EXAMPLES[kind](folder)
    return folder


def images(folder: Path) -> None:
    import PIL.Image

    for number in range(4):
        PIL.Image.new("RGB", (SIDE, SIDE), (60 * number, 9, 200)).save(folder / f"{number}.png")
    lines = [json.dumps({"image": f"{k}.png", "label": k % 3}) for k in range(4)]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


def texts(folder: Path) -> None:
    lines = [json.dumps({"text": f"w{5 + k} w{9 + k}", "label": k % 3}) for k in range(4)]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


def pairs(folder: Path) -> None:
    lines = [json.dumps({"sentence1": f"w{5 + k} w8", "sentence2": f"w{9 + k} w8", "score": k / 4}) for k in range(4)]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


def recordings(folder: Path) -> None:
    import numpy as np
    from scipy.io import wavfile

    for number in range(4):
        wavfile.write(folder / f"{number}.wav", 16_000, np.arange(4000, dtype=np.int16) * (number + 1))
    lines = [json.dumps({"audio": f"{k}.wav", "text": f"w{5 + k}"}) for k in range(4)]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


def scorer(folder: Path) -> None:
    (folder / "score.py").write_text("def score(records, images):\n    return images.mean(axis=(1, 2, 3))\n")


def save(model: Any, folder: Path, tokens: bool = False) -> None:
    from helpers.models import word_tokenizer

    model.eval().save_pretrained(folder)
    if tokens:
        word_tokenizer(TOKENS).save_pretrained(folder)


def make_vit(folder: Path) -> None:
    import transformers

    sizes = {**SMALL, "image_size": SIDE, "patch_size": 4, "num_labels": 3}
    save(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


def make_bert(folder: Path) -> None:
    import transformers

    sizes = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0}
    save(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)), folder, tokens=True)


def make_whisper(folder: Path) -> None:
    import transformers
    from helpers.models import whisper_config

    save(transformers.WhisperForConditionalGeneration(whisper_config()), folder, tokens=True)
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)


def make_ddpm(folder: Path) -> None:
    import diffusers

    from evojax_merge.zoo.ddpm import SCHEDULE, SIZES

    unet = diffusers.UNet2DModel(**SIZES | {"block_out_channels": (4, 8), "attention_head_dim": 4})
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**SCHEDULE)).save_pretrained(folder)


def make_sentence(folder: Path) -> None:
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    sizes = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
    inner = folder.with_name(f"{folder.name}-inner")
    save(transformers.BertModel(transformers.BertConfig(**sizes)), inner, tokens=True)
    transformer = Transformer(str(inner))
    modules = [transformer, Pooling(16)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    shutil.rmtree(inner)


MAKERS: dict[str, Change] = {
    "vit": make_vit, "bert": make_bert, "whisper": make_whisper, "ddpm": make_ddpm, "sentence": make_sentence,
}  # fmt: skip
EXAMPLES: dict[str, Change] = {
    "vit": images, "bert": texts, "whisper": recordings, "ddpm": scorer, "sentence": pairs,
}  # fmt: skip
# By kind of network: modules that torch's libraries import when a folder is opened.
IMPORTS: dict[str, tuple[str, ...]] = {
    "vit": ("torch", "transformers.models.vit.modeling_vit"),
    "bert": ("torch", "transformers.models.bert.modeling_bert"),
    "whisper": ("torch", "transformers.models.whisper.modeling_whisper"),
    "ddpm": ("torch", "diffusers.pipelines.ddim.pipeline_ddim"),
    "sentence": ("torch", "sentence_transformers"),
}
TASKS: dict[str, dict[str, Any]] = {
    "vit": {"kind": "classification", "file": "examples.jsonl", "heldout": 0.25},
    "bert": {"kind": "classification", "file": "examples.jsonl", "heldout": 0.25},
    "whisper": {"kind": "transcription", "file": "examples.jsonl", "heldout": 0.25},
    "ddpm": {
        "kind": "image_generation", "function": "score.py:score", "images": 4, "heldout": 0.5, "steps": 1,
    },
    "sentence": {"kind": "similarity", "file": "examples.jsonl", "heldout": 0.25},
}  # fmt: skip


def put_networks(world: World, kind: str) -> Path:
    """The networks and a config of a search over them; returns the first one's folder."""
    for name in ("one", "two"):
        shutil.rmtree(world / name)
    shutil.copytree(template(kind), world.root, dirs_exist_ok=True)
    world.write("config.yaml", {
        "backend": "torch", "parents": ["one", "two"], "space": {"method": "linear", "layers_per_group": "all"},
        "tasks": [{"name": "task"} | TASKS[kind]], "search": {"generations": 1, "population": 2},
    })  # fmt: skip
    return world / "one"


@changing
def a_network(world: World, kind: str, change: Change) -> None:
    """Two networks, the first of which is changed."""
    change(put_networks(world, kind))


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def deep(name: str) -> Change:
    return write(name, '{"a": ' + "[" * DEEP + "]" * DEEP + "}")


@changing
def cut(folder: Path, name: str, share: float = 0.5) -> None:
    os.truncate(folder / name, int((folder / name).stat().st_size * share))


@changing
def header(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another header of a safetensors file."""
    content = (folder / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + length])
    change(document)
    text = json.dumps(document).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def entry(document: dict[str, Any]) -> dict[str, Any]:
    """The first tensor in a header."""
    entry: dict[str, Any] = next(value for key, value in document.items() if key != "__metadata__")
    return entry


def beyond(document: dict[str, Any]) -> None:
    entry(document)["data_offsets"][1] += 10**12


def overlapping(document: dict[str, Any]) -> None:
    first, second, *_ = (value for key, value in document.items() if key != "__metadata__")
    second["data_offsets"] = first["data_offsets"]


@changing
def length_field(folder: Path, name: str, length: int) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(length.to_bytes(8, "little") + content[8:])


def refused(kind: str, name: str, change: Change, *says: str) -> Case:
    return Case(f"{kind}: {name}", a_network(kind, change), says, SEARCH, seconds=30, imports=IMPORTS[kind])


WEIGHTS, CONFIG, PREPARED = "model.safetensors", "config.json", "preprocessor_config.json"
UNET = "unet/diffusion_pytorch_model.safetensors"


def unet_as_vae(folder: Path) -> None:
    """An index that names the U-Net as the decoder of latents, in both models."""
    for name in ("one", "two"):
        shutil.copytree(folder.parent / name / "unet", folder.parent / name / "vae")
        edited("model_index.json", vae=["diffusers", "UNet2DModel"])(folder.parent / name)


CASES: list[Case] = [
    # Weights
    *(
        refused(kind, f"weights that {what}", change, f"one/{file}", *says)
        for kind, file in (("vit", WEIGHTS), ("ddpm", UNET), ("sentence", WEIGHTS))
        for what, change, *says in (
            ("are cut", cut(file), "truncated"),
            ("are cut within their header", cut(file, 0.001), "truncated"),
            ("are empty", write(file, b""), "truncated"),
            ("have a header of 2**60 bytes", length_field(file, 2**60), "truncated"),
            ("have a header of no byte", length_field(file, 0), "safetensors"),
            ("lie beyond the file", header(file, beyond), "safetensors"),
            ("overlap", header(file, overlapping), "safetensors"),
            ("have a larger shape", header(file, lambda one: entry(one).update(shape=[10**9])), "safetensors"),
            ("have a negative size", header(file, lambda one: entry(one).update(shape=[-1])), "safetensors"),
            ("have an unknown dtype", header(file, lambda one: entry(one).update(dtype="X9")), "safetensors"),
        )
    ),
    refused("vit", "an index that is a list", lambda one: (
        (one / WEIGHTS).rename(one / "model-1.safetensors"), write(f"{WEIGHTS}.index.json", "[]")(one)
    ), "index.json"),
    refused("vit", "no weights", lambda one: (one / WEIGHTS).unlink(), "one"),
    refused("vit", "weights without a tensor", write(WEIGHTS, (2).to_bytes(8, "little") + b"{}"), "one"),
    # Configs of transformers
    *(
        refused(kind, f"a config with {key} {value!r}"[:90], edited(CONFIG, **{key: value}), "one", *says)
        for kind, key, value, *says in (
            ("vit", "num_hidden_layers", 10**6, "one/config.json", "num_hidden_layers: 1,000,000"),
            ("vit", "num_hidden_layers", 10**18, "num_hidden_layers"),
            ("vit", "num_hidden_layers", -1),
            ("vit", "num_hidden_layers", "x"),
            ("vit", "num_attention_heads", 0),
            ("vit", "num_attention_heads", -2),
            ("vit", "num_attention_heads", 3),
            ("vit", "hidden_size", 10**9, "one/config.json", "hidden_size: 1,000,000,000"),
            ("vit", "hidden_size", 10**6, "one/config.json", "describes a model of"),
            ("vit", "hidden_size", 0),
            ("vit", "hidden_size", -16),
            ("vit", "hidden_size", 32),
            ("vit", "intermediate_size", 10**10, "one/config.json"),
            ("vit", "image_size", 10**6, "one/config.json"),
            ("vit", "image_size", -8),
            ("vit", "patch_size", 0),
            ("vit", "patch_size", -4),
            ("vit", "num_channels", 0),
            ("vit", "id2label", {"a": "b"}, "one/config.json", "id2label"),
            ("vit", "id2label", [1, 2], "one/config.json", "id2label"),
            ("vit", "id2label", {"1" * 5000: "b"}, "one/config.json", "id2label"),
            ("vit", "num_labels", 10**9, "one/config.json", "num_labels"),
            ("vit", "hidden_act", "nothing"),
            ("vit", "hidden_dropout_prob", 7),
            ("vit", "layer_norm_eps", "x"),
            ("vit", "dtype", "float99"),
            ("bert", "vocab_size", 10**10, "one/config.json"),
            ("bert", "vocab_size", -1),
            ("bert", "max_position_embeddings", 10**10, "one/config.json"),
            ("bert", "type_vocab_size", 0),
            ("bert", "pad_token_id", 10**6),
            ("whisper", "encoder_layers", 10**7, "one/config.json", "encoder_layers"),
            ("whisper", "d_model", 10**8, "one/config.json"),
            ("whisper", "decoder_attention_heads", 0),
            ("sentence", "num_hidden_layers", 10**6, "one/config.json", "num_hidden_layers"),
            ("sentence", "num_attention_heads", 0),
        )
    ),
    *(
        refused(kind, f"{file} of many levels", deep(file), f"one/{file}", "nests too deep")
        for kind, file in (
            ("vit", CONFIG), ("vit", PREPARED), ("vit", "generation_config.json"), ("bert", "tokenizer_config.json"),
            ("bert", "special_tokens_map.json"), ("sentence", "modules.json"), ("sentence", "1_Pooling/config.json"),
            ("sentence", "config_sentence_transformers.json"), ("ddpm", "model_index.json"),
            ("ddpm", "unet/config.json"), ("ddpm", "scheduler/scheduler_config.json"), ("whisper", PREPARED),
        )
    ),
    refused("vit", "a config that is a pipe", instead(CONFIG, os.mkfifo), "one/config.json", "a pipe"),
    # Image processors and feature extractors
    *(
        refused(kind, f"a processor with {key} {value!r}"[:90], edited(PREPARED, **{key: value}), "one", *says)
        for kind, key, value, *says in (
            ("vit", "size", -1, PREPARED, "size: -1"),
            ("vit", "size", {"height": 0, "width": 8}, PREPARED, "size.height: 0"),
            ("vit", "size", {"height": 10**6, "width": 10**6}, PREPARED, "size.height"),
            ("vit", "size", "large"),
            ("vit", "size", {"depth": 8}),
            ("vit", "size", {"height": 16, "width": 16}),
            ("vit", "resample", 99),
            ("vit", "image_mean", "grey"),
            ("vit", "image_mean", [0.5] * 7),
            ("vit", "image_std", [0.0] * 3, PREPARED),
            ("vit", "image_std", ["x"] * 3),
            ("vit", "rescale_factor", "x"),
            ("vit", "rescale_factor", 1e300, PREPARED, "not finite"),
            ("vit", "image_processor_type", "Nothing"),
            ("vit", "image_processor_type", 3),
            ("whisper", "sampling_rate", 0, PREPARED, "sampling_rate: 0"),
            ("whisper", "sampling_rate", "fast", "sampling_rate"),
            ("whisper", "sampling_rate", -16_000, "sampling_rate"),
            ("whisper", "feature_size", 10**9, PREPARED, "feature_size"),
            ("whisper", "feature_size", 0),
            ("whisper", "feature_size", -8),
            ("whisper", "n_fft", 10**9, PREPARED, "n_fft"),
            ("whisper", "hop_length", 0),
            ("whisper", "chunk_length", 10**9, PREPARED, "chunk_length"),
            ("whisper", "feature_extractor_type", "Nothing"),
        )
    ),
    # Tokenizers
    refused("bert", "a tokenizer that is a list", write("tokenizer.json", "[]"), "one", "tokenizer"),
    refused("bert", "a tokenizer of many levels", deep("tokenizer.json"), "one", "tokenizer"),
    refused("bert", "a tokenizer of no model", edited("tokenizer.json", model=None), "one", "tokenizer"),
    refused("bert", "a tokenizer whose class is a number", edited("tokenizer_config.json", tokenizer_class=3), "one"),
    refused("sentence", "a tokenizer of no model", edited("tokenizer.json", model={}), "one"),
    # Sentence transformers
    refused("sentence", "modules that are a mapping", write("modules.json", "{}"), "one"),
    refused("sentence", "modules that are numbers", write("modules.json", "[1, 2]"), "one"),
    refused("sentence", "a module without a type", write("modules.json", '[{"idx": 0, "path": ""}]'), "one"),
    refused("sentence", "no module", write("modules.json", "[]"), "one"),
    refused("sentence", "a pooling that is a list", write("1_Pooling/config.json", "[]"), "one"),
    # Diffusers
    refused("ddpm", "an index that names a U-Net as vae", unet_as_vae, "one/model_index.json", "vae"),
    *(
        refused("ddpm", f"{file} with {key} {value!r}"[:90], edited(file, **{key: value}), "one", *says)
        for file, key, value, *says in (
            ("unet/config.json", "layers_per_block", 10**7, "unet/config.json", "layers_per_block"),
            ("unet/config.json", "layers_per_block", -1),
            ("unet/config.json", "block_out_channels", [10**9, 10**9], "unet/config.json"),
            ("unet/config.json", "block_out_channels", []),
            ("unet/config.json", "block_out_channels", [4, 8, 16]),
            ("unet/config.json", "norm_num_groups", 0),
            ("unet/config.json", "norm_num_groups", 3),
            ("unet/config.json", "down_block_types", ["Nothing", "Nothing"]),
            ("unet/config.json", "in_channels", 0),
            ("unet/config.json", "attention_head_dim", 0),
            ("unet/config.json", "act_fn", "nothing"),
            ("unet/config.json", "sample_size", -8),
            ("unet/config.json", "sample_size", "large"),
            ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
            ("scheduler/scheduler_config.json", "num_train_timesteps", -5),
            ("scheduler/scheduler_config.json", "num_train_timesteps", 10**10, "num_train_timesteps"),
            ("scheduler/scheduler_config.json", "num_train_timesteps", "x"),
            ("scheduler/scheduler_config.json", "beta_schedule", "nothing"),
            ("scheduler/scheduler_config.json", "prediction_type", "nothing"),
            ("model_index.json", "unet", ["diffusers", "DDIMScheduler"]),
            ("model_index.json", "unet", ["diffusers", 3], "model_index.json", "unet"),
            ("model_index.json", "scheduler", ["diffusers", "UNet2DModel"]),
            ("model_index.json", "_class_name", "UNet2DModel"),
            ("model_index.json", "_class_name", ["DDIMPipeline"], "model_index.json", "_class_name"),
        )
    ),
    # A number where DVC has a list
    refused("vit", "a .dvc file with a number", lambda one: [
        (one.parent / "examples.jsonl.dvc").write_text("outs: 3\n"), edited(CONFIG, patch_size=0)(one)
    ], "one"),
]  # fmt: skip
