"""moe, extract-lora, transplant-tokenizer and GGUF files of models of 0.6 GB, against mergekit's commands (15 minutes).

    python -m bench tools

A base and its fine-tunes (float32, Llama) are written once to a temporary folder. Each program then does the same work
as a process of its own, imports and start-up included, one after the other in every round; shown are the medians. Peak
memory is the largest resident set of the process, mapped files included. A GGUF file in q8_0 has no peer here: beside
it stands the time in which its bytes are copied.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from bench.merging.merge import run, write_models
from bench.shared.machine import describe
from evojax_merge.benchmarks.header_models import word_tokenizer

TOOLS = ("moe", "extract-lora", "transplant-tokenizer")
VOCAB, NEW_TOKENS, RANK = 32000, 2000, 32
PROGRAMS = Path(sys.executable).parent


def write_donor(folder: Path, base: Path) -> Path:
    """A donor of the base's weights, whose tokenizer has new words for the last tokens."""
    word_tokenizer(VOCAB).save_pretrained(base)
    donor = folder / "donor"
    shutil.copytree(base, donor)
    file, text = donor / "tokenizer.json", (donor / "tokenizer.json").read_text()
    for number in range(VOCAB - NEW_TOKENS, VOCAB):
        text = text.replace(f'"w{number}"', f'"new{number}"')
    file.write_text(text)
    return donor


def write_mixture_recipe(folder: Path, base: Path, experts: list[Path]) -> Path:
    prompts = [[f"w{100 * i + j} w{700 * i + j}" for j in range(1, 9)] for i in range(len(experts))]
    listed = [
        {"source_model": str(model), "positive_prompts": texts} for model, texts in zip(experts, prompts, strict=True)
    ]
    recipe = folder / "moe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": str(base), "experts": listed, "dtype": "float32"}))
    return recipe


def commands(folder: Path, paths: list[Path]) -> dict[str, tuple[list[object], list[object]]]:
    """Our command line and mergekit's for each tool, without the output, which comes last."""
    base, *experts = paths
    recipe, donor = write_mixture_recipe(folder, base, experts[:2]), write_donor(folder, base)
    rank, method = ["--max-rank", RANK], ["-a", "omp"]
    extracted = ["mergekit-extract-lora", "--model", experts[0], "--base-model", base, *rank, "--out-path"]
    return {
        "moe": (["evojax-merge", "moe", recipe], ["mergekit-moe", recipe]),
        "extract-lora": (["evojax-merge", "extract-lora", experts[0], "--base", base, *rank], extracted),
        "transplant-tokenizer": (
            ["evojax-merge", "transplant-tokenizer", base, donor, *method],
            ["mergekit-tokensurgeon", base, donor, *method],
        ),
    }


def median(rounds: int, command: list[object], out: Path) -> np.ndarray:
    """Seconds and GB of a command that writes `out`."""
    figures = []
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        program, *arguments = map(str, command)
        figures.append(run([str(PROGRAMS / program), *arguments, str(out)]))
    return np.median(figures, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="moe, extract-lora, transplant-tokenizer and GGUF files.")
    parser.add_argument("--layers", type=int, default=8, help="of 15.7 M parameters each, beside 33 M (default 8)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        folder = Path(work)
        paths = write_models(folder, arguments.layers)
        out, lines = folder / "out", commands(folder, paths)
        size = (paths[0] / "model.safetensors").stat().st_size / 1e9
        print(f"models of {size:.2f} GB\n", flush=True)
        print("| tool | ours, s | mergekit, s | faster | ours, peak GB | mergekit, peak GB |\n| --- |" + " ---: |" * 5)
        for tool in arguments.tools:
            (a, memory_a), (b, memory_b) = (median(arguments.rounds, line, out) for line in lines[tool])
            print(f"| {tool} | {a:.1f} | {b:.1f} | {b / a:.1f} | {memory_a:.2f} | {memory_b:.2f} |", flush=True)
        recipe, file = folder / "copy.yaml", folder / "out.gguf"
        recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(paths[0])}]}))
        print("\n| GGUF | s | peak GB | file, GB | writing its bytes, s |\n| --- |" + " ---: |" * 4, flush=True)
        for kind in ("f16", "q8_0"):
            command = ["evojax-merge", "merge", recipe, "--type", kind, "--no-copy-tokenizer"]
            seconds, memory = median(arguments.rounds, command, file)
            content = file.read_bytes()
            start = time.perf_counter()
            (folder / "bytes").write_bytes(content)
            written = time.perf_counter() - start
            print(f"| {kind} | {seconds:.1f} | {memory:.2f} | {len(content) / 1e9:.2f} | {written:.1f} |", flush=True)
    print(f"\n{describe()}")


if __name__ == "__main__":
    main()
