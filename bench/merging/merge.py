"""Whole merges of a 1.1 GB model from the command line, against mergekit-yaml (half an hour, 10 GB of disk).

    python -m bench merge

A base and three parents of 1.1 GB each (float32, Llama) are written once to a temporary folder (5 GB of disk, and as
much again for the outputs). Each program then merges the same recipe as a process of its own, imports and start-up
included, one after the other in every round; shown are the medians. Peak memory is the largest resident set of the
process, mapped files included. Copying one model's file, in the same round, shows what the disk alone takes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

from bench.shared.machine import describe

# By method the parameters of each model.
WEIGHT = {"weight": 0.4}
PRUNED = WEIGHT | {"density": 0.5}
METHODS: dict[str, dict[str, float]] = {
    "ties": PRUNED, "dare_ties": PRUNED, "della": PRUNED | {"epsilon": 0.1}, "breadcrumbs": PRUNED | {"gamma": 0.01},
    "sce": {}, "task_arithmetic": WEIGHT, "linear": WEIGHT, "slerp": {}, "model_stock": {}, "karcher": {},
}  # fmt: skip
# Parameters of a whole recipe.
WHOLE = {"sce": {"select_topk": 0.5}}
# Methods that draw random masks.
RANDOM = ("dare_ties", "della")
WITHOUT_BASE = ("linear", "karcher")
# Rows of mergekit that are not its merging: it has no float32 path other than this.
ENVIRONMENT = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


def write_models(folder: Path, layers: int) -> list[Path]:
    """Base and three parents: a Llama of width 1,024 and vocabulary 32,000, in one file each, deltas of 1%."""
    from transformers import LlamaConfig

    from evojax_merge.checkpoints.config_file import decoder_config
    from evojax_merge.checkpoints.parents import tensor_shapes
    from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True, dtype="float32",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    paths = [folder / name for name in ("base", "one", "two", "three")]
    for i, path in enumerate(paths):
        path.mkdir(parents=True)
        config.save_pretrained(path)
        shapes = tensor_shapes(decoder_config(path / "config.json"))
        specs = {name: TensorSpec(shape, np.dtype(np.float32)) for name, shape in shapes.items()}
        with ShardWriter(path, specs) as writer:
            for number, name in enumerate(writer.order):
                values = np.random.default_rng(number).standard_normal(shapes[name], np.float32)
                if i:
                    values += 0.01 * np.random.default_rng([number, i]).standard_normal(shapes[name], np.float32)
                writer.write(name, values)
    return paths


def recipe(method: str, paths: list[Path]) -> dict[str, object]:
    base, *parents = map(str, paths)
    if method == "slerp":
        document: dict[str, object] = {"models": [{"model": base}, {"model": parents[0]}], "parameters": {"t": 0.4}}
        return {"merge_method": method, "base_model": base, **document, "dtype": "float32"}
    models = [{"model": model, "parameters": METHODS[method]} for model in parents]
    document = {"merge_method": method, "models": models, "parameters": WHOLE.get(method, {}), "dtype": "float32"}
    return document if method in WITHOUT_BASE else document | {"base_model": base}


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, GB of the largest resident set) of a process, its children included."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0

    def watch() -> None:
        nonlocal peak
        try:
            root = psutil.Process(process.pid)
            while process.poll() is None:
                family = [root, *root.children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss for one in family))
                time.sleep(0.02)
        except psutil.Error:
            pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed:\n{errors.decode()[-2000:]}")
    return seconds, peak / 1e9


def largest_difference(one: Path, other: Path) -> float:
    """Largest difference of two merged models, relative to each tensor's largest entry."""
    from evojax_merge.checkpoints.folder import open_folder

    a, b = open_folder(one), open_folder(other)
    shared = [name for name in a.entries if name in b.entries]
    return max(float(np.abs(a.read(n) - b.read(n)).max() / np.abs(b.read(n)).max()) for n in shared)


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole merge against mergekit-yaml.")
    parser.add_argument("--layers", type=int, default=16, help="of 15.7 M parameters each, beside 33 M (default 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    programs = {name: str(Path(sys.executable).parent / name) for name in ("evojax-merge", "mergekit-yaml")}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        folder = Path(work)
        paths = write_models(folder, arguments.layers)
        size = (paths[0] / "model.safetensors").stat().st_size / 1e9
        print(f"base and three parents of {size:.2f} GB each\n", flush=True)
        print(
            "| method | ours, s | mergekit-yaml, s | faster | ours, peak GB | mergekit-yaml, peak GB "
            "| largest difference | copying one file, s |\n| --- |" + " ---: |" * 7,
            flush=True,
        )
        for method in arguments.methods:
            path = folder / f"{method}.yaml"
            path.write_text(yaml.safe_dump(recipe(method, paths)))
            ours, theirs, copies = [], [], []
            for _ in range(arguments.rounds):
                for name in ("ours", "theirs", "copy"):
                    shutil.rmtree(folder / name, ignore_errors=True)
                ours.append(run([programs["evojax-merge"], "merge", str(path), str(folder / "ours")]))
                theirs.append(run([programs["mergekit-yaml"], str(path), str(folder / "theirs"), "--quiet"]))
                start = time.perf_counter()
                shutil.copytree(paths[0], folder / "copy")
                copies.append(time.perf_counter() - start)
            (a, memory_a), (b, memory_b) = np.median(ours, axis=0), np.median(theirs, axis=0)
            # Random masks differ by design.
            same = "-" if method in RANDOM else f"{largest_difference(folder / 'ours', folder / 'theirs'):.1e}"
            print(
                f"| {method} | {a:.1f} | {b:.1f} | {b / a:.1f} | {memory_a:.2f} | {memory_b:.2f} | {same} "
                f"| {np.median(copies):.1f} |",
                flush=True,
            )
    print(f"\n{describe()}")


if __name__ == "__main__":
    main()
