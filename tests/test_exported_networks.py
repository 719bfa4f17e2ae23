"""Networks of each kind are searched by one command, and the winner, which its own library opens in a process that
cannot import this package, has the scores of the held-out table."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from helpers.files import read_json, write_json, write_lines, write_yaml
from helpers.models import randomised, save
from helpers.sampling import sample
from helpers.searches import open_problem
from PIL import Image
from reference import network_scores
from scipy.io import wavfile

from evojax_merge.cli import cli

SIDE, CLASSES, EXAMPLES = 16, 3, 12
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, 64))]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIDE, "width": SIDE},
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True,
}  # fmt: skip
OWN = """
import torch


def make():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
"""
# The class of each kind of network in transformers, and its config.
NETWORKS: dict[str, tuple[str, Any]] = {
    "ViT": ("ViTForImageClassification", lambda: transformers.ViTConfig(**VISION, num_labels=CLASSES)),
    "ConvNeXt": ("ConvNextForImageClassification", lambda: transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, num_labels=CLASSES,
    )),
    "ResNet": ("ResNetForImageClassification", lambda: transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=CLASSES,
    )),
    "BERT": ("BertForSequenceClassification", lambda: transformers.BertConfig(**SMALL, num_labels=CLASSES)),
    "DeBERTa": ("DebertaV2ForSequenceClassification", lambda: transformers.DebertaV2Config(
        **SMALL, num_labels=CLASSES, relative_attention=True, pos_att_type=["p2c", "c2p"],
    )),
    "CLIP": ("CLIPModel", lambda: transformers.CLIPConfig(
        text_config=SMALL | {"bos_token_id": 1, "eos_token_id": 2}, vision_config=VISION, projection_dim=8,
    )),
    "T5": ("T5ForConditionalGeneration", lambda: transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=2,
    )),
    "Whisper": ("WhisperForConditionalGeneration", lambda: transformers.WhisperConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=50,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None, suppress_tokens=None,
    )),
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "sentence transformer": {"kind": "similarity", "metric": "pearson"},
    "CLIP": {
        "kind": "classification", "metric": "log_probability", "prompts": list(network_scores.PROMPTS),
        "classes": ["w5", "w6", "w7"],
    },
    "T5": {"kind": "text_to_text"},
    "Whisper": {"kind": "transcription", "target": "target"},
}  # fmt: skip


def write_models(kind: str, folder: Path) -> list[str]:
    """Two networks of a kind; their names in a config."""
    names = []
    for seed in (1, 2):
        model = folder / f"model{seed}"
        if kind == "own module":
            from safetensors.torch import save_model

            (folder / "own.py").write_text(OWN)
            namespace: dict[str, Any] = {}
            exec(OWN, namespace)
            model = folder / f"model{seed}.safetensors"
            save_model(randomised(namespace["make"](), seed), str(model))
        elif kind == "sentence transformer":
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

            encoder = randomised(transformers.BertModel(transformers.BertConfig(**SMALL)), seed)
            save(encoder, folder / f"encoder{seed}", TOKENS)
            modules = [Transformer(str(folder / f"encoder{seed}")), Pooling(16)]
            SentenceTransformer(modules=modules, device="cpu").save(str(model), create_model_card=False)
        else:
            name, config = NETWORKS[kind]
            save(randomised(getattr(transformers, name)(config()), seed), model, TOKENS)
            write_json(model / "preprocessor_config.json", PREPROCESSOR)
            if kind == "Whisper":
                transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(model)
        names.append(model.name)
    return names


def write_examples(kind: str, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The file of a task on a kind of network, and its records, with absolute paths."""
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(EXAMPLES):
        words = [f"w{i}" for i in rng.integers(4, 64, 5)]
        record = {"label": number % CLASSES}
        if kind == "own module":
            pixels = rng.normal(size=(4, 4)).astype(np.float32)
            records.append(record | {"pixels": pixels.tolist(), "make": str(folder / "own.py")})
            continue
        if kind in ("ViT", "ConvNeXt", "ResNet", "CLIP"):
            image = folder / f"{number}.png"
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)).save(image)
            record = {"image": image.name, "label": f"w{5 + number % CLASSES}" if kind == "CLIP" else number % CLASSES}
        elif kind == "Whisper":
            audio = folder / f"{number}.wav"
            wavfile.write(audio, 16_000, rng.integers(-9000, 9000, 8000).astype(np.int16))
            record = {"audio": audio.name, "target": " ".join(words[:2])}
        elif kind == "sentence transformer":
            record = {"sentence1": " ".join(words[:3]), "sentence2": " ".join(words[3:]), "score": number % 4}
        else:
            record |= {"text": " ".join(words[:3]), "target": " ".join(words[3:])}
            record = {name: record[name] for name in ("text", "target" if kind == "T5" else "label")}
        records.append(record)
    if kind == "own module":
        arrays = {"input": np.array([one["pixels"] for one in records], np.float32)}
        np.savez(folder / "examples.npz", **arrays, label=[one["label"] for one in records])
        return "examples.npz", records
    return write_lines(folder / "examples.jsonl", records).name, records


@pytest.mark.parametrize("kind", sample(network_scores.SCORES, 1))
def test_a_winner_has_its_scores_in_its_own_library(kind: str, tmp_path: Path) -> None:
    parents = write_models(kind, tmp_path)
    file, records = write_examples(kind, tmp_path)
    task = {"name": "task", "file": file, "heldout": 0.5, "kind": "classification"}
    if kind not in TASKS:
        task["metric"] = "log_probability"
    config = write_yaml(tmp_path / "config.yaml", {
        "backend": f"{tmp_path / 'own.py'}:make" if kind == "own module" else "torch", "parents": parents,
        "space": {"method": "linear", "layers_per_group": "all"}, "tasks": [task | TASKS.get(kind, {})],
        "search": {"generations": 1, "population": 3, "strategy": "random"},
    })  # fmt: skip
    result = CliRunner().invoke(cli, ["search", str(config), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, (result.output, result.exception)
    winner = read_json(tmp_path / "run" / "result.json")["table"][-1]
    assert winner["role"] == "winner"

    heldout = open_problem(config).splits.heldout[0]
    examples = {"kind": kind, "examples": [records[i] for i in heldout.indices]}
    write_json(tmp_path / "examples.json", examples)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = [sys.executable, network_scores.__file__, str(tmp_path / "run" / "best" / "model")]
    done = subprocess.run(
        [*program, str(tmp_path / "examples.json")], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (score,) = winner["heldout_scores"].values()
    assert float(done.stdout.split()[-1]) == pytest.approx(score, rel=1e-4, abs=1e-4)
