"""A merge of two 2 GB checkpoints of an image generator: seconds and memory (2 minutes, 6 GB of disk).

    python -m bench checkpoint

Two files of float16 tensors with SDXL's keys are merged by a recipe with weights by block, in a process of its own,
imports and start-up included. Copying reads both files and writes one, in blocks of 16 MB. Both are measured from a
cold page cache until all is on the disk, and again from a warm one. Seconds are of the clock and of the processor (user
and system); memory is the largest resident set, mapped files included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.shared.machine import describe
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec

WHOLE = "model.diffusion_model."
# Side of the square matrices that a block has.
SIDE = 2048
BLOCK = 16 * 2**20


def write_checkpoint(folder: Path, nbytes: int, seed: int) -> Path:
    """A checkpoint of 19 blocks, of square matrices of random numbers, written by tensor: a process that has once held
    it whole would count as the memory of those that it starts."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.02, (SIDE, SIDE)).astype(np.float16)
    names = [f"{WHOLE}{side}_blocks.{i}" for side in ("input", "output") for i in range(9)]
    names.append(f"{WHOLE}middle_block.1")
    each = nbytes // (2 * SIDE * SIDE * len(names))
    tensors = [f"{name}.1.transformer_blocks.{k}.ff.net.2.weight" for name in names for k in range(each)]
    specs = {tensor: TensorSpec(noise.shape, noise.dtype) for tensor in tensors}
    specs["conditioner.embedders.1.model.ln_final.bias"] = TensorSpec(noise.shape[:1], noise.dtype)
    folder.mkdir()
    with ShardWriter(folder, specs, sys.maxsize) as writer:
        for number, tensor in enumerate(writer.order):
            writer.write(tensor, np.roll(noise, 7919 * number) if specs[tensor].shape == noise.shape else noise[0])
    return folder / "model.safetensors"


def forget(files: Sequence[Path]) -> None:
    """Take files out of the page cache, and write out what waits there."""
    os.sync()
    for file in files:
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(sources: Sequence[Path], target: Path) -> None:
    """Read the sources, and write the first of them."""
    with target.open("wb") as out:
        for number, source in enumerate(sources):
            with source.open("rb") as file:
                while block := file.read(BLOCK):
                    if number == 0:
                        out.write(block)


def measured(work: Callable[[], object], to_disk: bool) -> tuple[float, float]:
    """Seconds, and seconds of the processors of this process and of those that it waited for."""
    began, before = time.perf_counter(), os.times()
    work()
    if to_disk:
        os.sync()
    return time.perf_counter() - began, sum(os.times()[:4]) - sum(before[:4])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench checkpoint", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each checkpoint")
    options = parser.parse_args()
    print(describe())
    print("| page cache | checkpoint | merge, s | processor, s | memory, MB | copy, s | processor, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [write_checkpoint(folder / str(k), int(options.gigabytes * 1e9), k) for k in range(2)]
        alpha = [{"filter": "IN04", "value": 0.2}, {"filter": "OUT03", "value": 0.9}, {"value": 0.5}]
        recipe = {
            "merge_method": "weighted_sum", "models": [{"model": str(file)} for file in files],
            "parameters": {"alpha": alpha},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        size = files[0].stat().st_size / 1e9
        arguments = ["merge", str(folder / "recipe.yaml"), str(folder / "out"), "--quiet", "--overwrite"]
        merge = partial(subprocess.run, [sys.executable, "-m", "evojax_merge", *arguments], check=True)
        for cache in ("cold", "warm"):
            times = []
            for work in (partial(copy, files, folder / "copy"), merge):
                if cache == "cold":
                    forget(files)
                times.append(measured(work, cache == "cold"))
            (folder / "copy").unlink()
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
            (copying, copy_processor), (merging, processor) = times
            print(
                f"| {cache} | {size:.2f} GB | {merging:.1f} | {processor:.1f} | {memory:,.0f} | {copying:.1f} | "
                f"{copy_processor:.1f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
