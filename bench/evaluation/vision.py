"""Seconds per candidate over models that see, against transformers' forward pass with images (3 minutes).

    python -m bench vision

LLaVAs of random weights, in the shape of the table-top family and of 100M parameters; two parents of one text model, of
which one sees. Ours: the search's evaluator merges a population's decoders and scores them, with the images' features,
which the tower makes once before the search. The peer, transformers, scores the same rows in one batch with a model
that is merged already: its vision tower, its projector and its decoder. Both take turns, and must agree on the model
that sees; processor seconds are those of all threads, user and system.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from bench.shared.header_models import word_tokenizer
from bench.shared.machine import describe, seconds_of
from evojax_merge.problem import SearchProblem, build_problem, config_from
from evojax_merge.selection import open_evaluator
from evojax_merge.zoo import evovlm
from evojax_merge.zoo.tiny_llama import Sizes, save_config
from evojax_merge.zoo.tiny_llava import TowerSizes, save_seeing_config

IMAGE = "<image>"


@dataclass(frozen=True)
class Shape:
    """A LLaVA's sizes, and the numbers of images and candidates that are scored."""

    decoder: Sizes
    tower: TowerSizes
    vocabulary: int
    images: int
    candidates: int


SHAPES = {
    "table-top": Shape(evovlm.SIZES, evovlm.TOWER_SIZES, len(evovlm.VOCABULARY), 64, 16),
    "100M": Shape(
        Sizes(hidden=768, layers=10, heads=12, mlp=2048, context=256),
        TowerSizes(hidden=384, layers=8, heads=6, mlp=1536, side=128, patch=16), 8192, 8, 4,
    ),
}  # fmt: skip


def write_models(shape: Shape, folder: Path) -> int:
    """A text model, `japanese` and `vision` beside it, of random weights. Returns the parameters of `vision`."""
    words = word_tokenizer(shape.vocabulary, ("<pad>", "</s>", "<unk>"))
    vocabulary = sorted(words.get_vocab(), key=words.get_vocab().get)
    torch.manual_seed(0)
    for name in ("base", "japanese", "vision"):
        (folder / name).mkdir()
        save_config(folder / name, shape.decoder, vocabulary)
    text = LlamaForCausalLM.config_class.from_pretrained(folder / "base")
    for name in ("base", "japanese"):
        LlamaForCausalLM(text).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    save_seeing_config(folder / "vision", folder / "base", shape.tower, shape.vocabulary, shape.vocabulary + 1)
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder / "vision"))
    model.save_pretrained(folder / "vision")
    words.add_special_tokens({"additional_special_tokens": [IMAGE]})
    words.save_pretrained(folder / "vision")
    return sum(values.numel() for values in model.parameters())


def write_problem(shape: Shape, folder: Path) -> SearchProblem:
    """The search of a linear merge, and questions of nine words, each about an image of its own, with five words to
    score."""
    rng, side = np.random.default_rng(0), shape.tower.side
    lines = []
    for number in range(shape.images):
        pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        words = [f"w{i}" for i in rng.integers(3, shape.vocabulary, 14)]
        lines.append(
            {"image": f"{number}.png", "prompt": f"{IMAGE} {' '.join(words[:9])}", "target": " ".join(words[9:])}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = {
        "base": "base", "parents": ["vision", "japanese"], "tokenizer_source": "vision",
        "space": {"method": "task_arithmetic"}, "export_dtype": "float32",
        "tasks": [{"name": "text", "kind": "likelihood", "file": "rows.jsonl", "heldout": "rows.jsonl"}],
        "search": {"population": shape.candidates},
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    return build_problem(config, config_from(config, document, [], None))


def peer_of(folder: Path) -> Callable[[], np.ndarray]:
    """Transformers' mean log-probability of each row's target, float[images], all rows in one batch."""
    processor = AutoProcessor.from_pretrained(folder / "vision")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "vision", dtype=torch.float32).eval()
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    inputs: dict[str, Any] = dict(
        processor(
            text=[f"{line['prompt']} {line['target']}" for line in lines],
            images=[Image.open(folder / line["image"]) for line in lines], return_tensors="pt",
        )
    )  # fmt: skip
    ids, count = inputs["input_ids"], len(lines[0]["target"].split())

    def score() -> np.ndarray:
        with torch.inference_mode():
            logits = model(**inputs).logits[:, -count - 1 : -1]
        shares = logits.log_softmax(-1).gather(-1, ids[:, -count:, None])
        return np.asarray(shares.mean(dim=(1, 2)))

    return score


def processor_seconds(run: Callable[[], Any]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def measure(name: str, rounds: int, folder: Path) -> str:
    """A line of the table."""
    shape = SHAPES[name]
    parameters = write_models(shape, folder)
    problem = write_problem(shape, folder)
    evaluator = open_evaluator(problem, problem.prepare().shards[0])
    genomes = np.random.default_rng(1).normal(size=(shape.candidates, problem.space.dims)).astype(np.float32)
    theirs = peer_of(folder)

    def ours() -> Any:
        return evaluator.score(genomes)

    stored = problem.backend.score_stored(folder / "vision", evaluator, lambda done: None)
    np.testing.assert_allclose(stored.matrices["text"]["log_probability"][0], theirs(), rtol=1e-3)
    ours()
    pairs = [(processor_seconds(ours), processor_seconds(theirs)) for _ in range(rounds)]
    mine, peer = np.median(pairs, axis=0)
    wall = np.median([(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)], axis=0)
    mine, seconds = mine / shape.candidates, wall[0] / shape.candidates
    return (
        f"| {name} ({parameters / 1e6:.1f} M) | {shape.images} | {mine * 1e3:,.1f} | {peer * 1e3:,.1f} "
        f"| {peer / mine:.1f} | {seconds * 1e3:,.1f} | {wall[1] * 1e3:,.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per candidate over models that see, against transformers.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}; {describe()}\n")
    print("| model | images | ours, processor ms per candidate | transformers | ratio | ours, ms | transformers, ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(name, arguments.rounds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
