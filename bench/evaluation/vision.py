"""Seconds per candidate over models that see, against a loop of transformers' forward pass with images (8 minutes).

    python -m bench vision

LLaVAs of random weights, a base and two parents, in the shape of `zoo:evovlm` and of 100M parameters, and random
pictures with one question each or with ten; of a question's answer the likelihood is scored, in float32. Ours: the
search's evaluator merges a population's decoders and scores them with the pictures' features, which the tower makes
once before the search; a picture stands once before its questions. The peer, for each candidate: the merged state dict
is loaded into the module, and batches of questions with their pictures go through its tower, its projector and its
decoder. The peer's merge is not counted: its state dicts are made before. Both score the same merges, and must agree.
They take turns; the first pass of either is not counted. Seconds are those of the processor, user and system, which
mean something on a machine that has other work.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import torch
import transformers
import yaml
from PIL import Image

from bench.shared.machine import describe
from evojax_merge.benchmarks.header_models import word_tokenizer
from evojax_merge.problem import SearchProblem, build_problem, config_from
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.zoo.evovlm import SEEING_VOCABULARY, SIDE, SIZES, TOWER

MODELS = ("base", "one", "two")
IMAGE, WORDS, ANSWER = "<image>", 7, 1


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaVA: of its decoder and its tower; side: of a picture, in pixels; pictures: how many are asked
    about; batch: questions in a batch of the peer."""

    decoder: dict[str, int]
    tower: dict[str, int]
    side: int
    pictures: int
    batch: int


SHAPES = {
    "table-top": Shape(
        {"hidden_size": SIZES.hidden, "num_hidden_layers": SIZES.layers, "num_attention_heads": SIZES.heads,
         "intermediate_size": SIZES.mlp, "vocab_size": len(SEEING_VOCABULARY)},
        {key: TOWER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                     "patch_size")}, side=SIDE, pictures=32, batch=32,
    ),
    "100M": Shape(
        {"hidden_size": 768, "num_hidden_layers": 10, "num_attention_heads": 12, "intermediate_size": 2048,
         "vocab_size": 8192},
        {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1536,
         "patch_size": 16}, side=160, pictures=4, batch=8,
    ),
}  # fmt: skip


def write_models(shape: Shape, folder: Path) -> int:
    """A LLaVA of random weights, and two others around it with its tower. Returns the number of its parameters."""
    words = word_tokenizer(shape.decoder["vocab_size"] - 1, ("<unk>", "</s>"))
    words.add_special_tokens({"additional_special_tokens": [IMAGE]})
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**shape.decoder, max_position_embeddings=512),
        vision_config=transformers.CLIPVisionConfig(**shape.tower, image_size=shape.side),
        image_token_index=words.convert_tokens_to_ids(IMAGE), vision_feature_layer=-1,
    )  # fmt: skip
    side = {"height": shape.side, "width": shape.side}
    pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": shape.side}, crop_size=side)
    processor = transformers.LlavaProcessor(
        pixels, words, patch_size=shape.tower["patch_size"], vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for name in MODELS:
        if name != "base":
            for parameter in (*model.model.language_model.parameters(), *model.lm_head.parameters()):
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return sum(values.numel() for values in model.parameters())


def write_problem(shape: Shape, questions: int, population: int, folder: Path) -> SearchProblem:
    """The search of a merge on `questions` questions about each picture."""
    rng, lines = np.random.default_rng(0), []
    for number in range(shape.pictures):
        Image.fromarray(rng.integers(0, 256, (shape.side, shape.side, 3)).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
        for _ in range(questions):
            words = [f"w{i}" for i in rng.integers(2, shape.decoder["vocab_size"] - 1, WORDS + ANSWER)]
            prompt, target = f"{IMAGE} {' '.join(words[:WORDS])}", " ".join(words[WORDS:])
            lines.append({"image": f"{number}.png", "prompt": prompt, "target": target})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = {
        "base": "base", "parents": ["one", "two"], "space": {"method": "task_arithmetic"}, "export_dtype": "float32",
        "tasks": [{"name": "text", "kind": "likelihood", "file": "rows.jsonl", "heldout": "rows.jsonl"}],
        "search": {"population": population},
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    return build_problem(config, config_from(config, document, [], None))


def merged_states(problem: SearchProblem, genomes: np.ndarray, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The state dicts of candidates as transformers loads them from their exports."""
    states = []
    for genome in genomes:
        problem.backend.export(problem.backend.describe(genome).recipe, genome, folder / "merged", "", lambda: None)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "merged", dtype=torch.float32)
        states.append(model.state_dict())
    return states


def loop_over(shape: Shape, states: Sequence[dict[str, torch.Tensor]], folder: Path) -> Callable[[], np.ndarray]:
    """The loop of the peer: the mean log-probability of the answers, float64[candidates]."""
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    module = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32).eval()
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    batches: list[dict[str, Any]] = [
        dict(processor(
            text=[f"{line['prompt']} {line['target']}" for line in part],
            images=[Image.open(folder / line["image"]) for line in part], return_tensors="pt",
        ))
        for part in (lines[begin : begin + shape.batch] for begin in range(0, len(lines), shape.batch))
    ]  # fmt: skip

    def score() -> np.ndarray:
        means = []
        for state in states:
            module.load_state_dict(state)
            shares = []
            for batch in batches:
                with torch.inference_mode():
                    # The logits of the answer alone.
                    logits = module(**batch, logits_to_keep=ANSWER + 1).logits[:, :-1]
                targets = batch["input_ids"][:, -ANSWER:, None]
                shares.append(logits.log_softmax(-1).gather(-1, targets).mean(dim=(1, 2)))
            means.append(float(torch.cat(shares).mean()))
        return np.array(means)

    return score


def processor_seconds(run: Callable[[], Any]) -> float:
    begun = process_time()
    run()
    return process_time() - begun


def measure(name: str, questions: int, population: int, peers: int, rounds: int, folder: Path) -> str:
    """A line of the table. peers: the number of the population's candidates that the peer scores."""
    shape = SHAPES[name]
    parameters = write_models(shape, folder)
    problem = write_problem(shape, questions, population, folder)
    evaluator = open_evaluator(problem, problem.prepare().shards[0])
    genomes = np.random.default_rng(1).normal(size=(population, problem.space.dims)).astype(np.float32)
    theirs = loop_over(shape, merged_states(problem, genomes[:peers], folder), folder)

    def ours() -> np.ndarray:
        return evaluator.score(genomes).matrices["text"]["log_probability"].mean(axis=1)

    np.testing.assert_allclose(ours()[:peers], theirs(), rtol=1e-4)
    pairs = [(processor_seconds(ours), processor_seconds(theirs)) for _ in range(rounds)]
    mine, peer = np.median(pairs, axis=0) * 1e3 / (population, peers)
    return (
        f"| {name} ({parameters / 1e6:.1f} M) | {shape.pictures} | {questions} | {population} | {mine:,.1f} "
        f"| {peer:,.1f} | {peer / mine:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per candidate over models that see, against transformers.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--questions", nargs="+", type=int, default=[10, 1])
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    software = f"torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"transformers {transformers.__version__}, {software}; {describe()}\n")
    print(
        "| model | pictures | questions each | population | ours, processor ms per candidate | transformers | ratio |"
    )
    print("| --- |" + " ---: |" * 6)
    for name in arguments.shapes:
        for questions in arguments.questions:
            with tempfile.TemporaryDirectory() as folder:
                line = measure(
                    name, questions, arguments.population, arguments.peers, arguments.rounds, Path(folder)
                )  # fmt: skip
            print(line, flush=True)


if __name__ == "__main__":
    main()
