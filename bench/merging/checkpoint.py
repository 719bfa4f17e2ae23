"""A merge of two 2 GB checkpoints of an image generator: seconds and memory (2 minutes, 6 GB of disk).

    python -m bench checkpoint

Two files of float16 tensors with SDXL's keys are merged by a recipe with a weight for each block, in a process of its
own. The disk's speed is that of reading both files and writing one, by Python, in blocks of 16 MB.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from bench.shared.machine import describe

WHOLE = "model.diffusion_model."
# Side of the square matrices that a block has.
SIDE = 2048
BLOCK = 16 * 2**20


def write_checkpoint(file: Path, nbytes: int, seed: int) -> None:
    """A checkpoint of 19 blocks, of square matrices of random numbers."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.02, (SIDE, SIDE)).astype(np.float16)
    names = [f"{WHOLE}{side}_blocks.{i}" for side in ("input", "output") for i in range(9)]
    names.append(f"{WHOLE}middle_block.1")
    each = nbytes // (2 * SIDE * SIDE * len(names))
    tensors = {
        f"{name}.1.transformer_blocks.{k}.ff.net.2.weight": np.roll(noise, 7919 * (k + 31 * n))
        for n, name in enumerate(names)
        for k in range(each)
    }
    tensors["conditioner.embedders.1.model.ln_final.bias"] = noise[0]
    save_file(tensors, file, {"format": "pt"})


def copied(sources: list[Path], target: Path) -> float:
    """Seconds of reading the sources and writing the first of them."""
    began = time.perf_counter()
    with target.open("wb") as out:
        for number, source in enumerate(sources):
            with source.open("rb") as file:
                while block := file.read(BLOCK):
                    if number == 0:
                        out.write(block)
        out.flush()
        os.fsync(out.fileno())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench checkpoint", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each checkpoint")
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{k}.safetensors" for k in range(2)]
        for k, file in enumerate(files):
            write_checkpoint(file, int(options.gigabytes * 1e9), k)
        alpha = [{"filter": "IN04", "value": 0.2}, {"filter": "OUT03", "value": 0.9}, {"value": 0.5}]
        recipe = {
            "merge_method": "weighted_sum", "models": [{"model": str(file)} for file in files],
            "parameters": {"alpha": alpha},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        seconds = copied(files, folder / "copy")
        (folder / "copy").unlink()
        began = time.perf_counter()
        arguments = ["merge", str(folder / "recipe.yaml"), str(folder / "out"), "--quiet"]
        subprocess.run([sys.executable, "-m", "evojax_merge", *arguments], check=True)
        merged = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = files[0].stat().st_size / 1e9
    print("| checkpoint | merge, s | processor, s | memory, MB | copied at the disk's speed, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    processor = used.ru_utime + used.ru_stime
    print(f"| {size:.2f} GB | {merged:.1f} | {processor:.1f} | {used.ru_maxrss / 1000:,.0f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
