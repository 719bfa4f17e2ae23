"""Seconds per candidate over networks of torch, against the loop that people write (2 minutes).

    python -m bench torch

Vision transformers, a convolutional network with batch norm and a UNet of diffusers, of random weights, and three
parents made of each by noise; a candidate is a linear merge with weights of its own for each block. Ours: the
search's evaluator, which merges and scores in one compiled program where JAX traces the network, and else calls the
network with each merge, on all cores side by side. The peer: state dicts averaged tensor by tensor in torch,
`load_state_dict`, and a forward pass, with the same weights. Both score the same examples in the same way, and must
agree. They take turns; the first pass of either is not counted. Seconds are those of the clock, and of the processor
(user and system): only the latter mean something on a machine that has other work.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax.numpy as jnp
import numpy as np
import torch
import transformers
import yaml
from safetensors.torch import save_file

from bench.shared.machine import describe
from evojax_merge.benchmarks.references import seconds_of
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.problem import build_problem, config_from
from evojax_merge.tasks.splits import Splits

PARENTS, CLASSES = 3, 10
# The UNet: its file is a backend of its own.
UNET = "UNet 32-64"
UNET_FILE = """
import torch
from diffusers import UNet2DModel


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, sample, timestep):
        return self.unet(sample, timestep).sample


def make():
    return Denoiser()
"""
# name -> its class in transformers, its config, and the side of its images.
SHAPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT 64 x 4": ("ViTForImageClassification", {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 32,
        "patch_size": 4,
    }, 32),
    "ViT 192 x 6": ("ViTForImageClassification", {
        "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768,
        "image_size": 32, "patch_size": 4,
    }, 32),
    "ResNet 32-64-128": ("ResNetForImageClassification", {
        "embedding_size": 16, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "layer_type": "basic",
    }, 32),
}  # fmt: skip


def make(name: str) -> Any:
    """A network of random weights."""
    if name == UNET:
        namespace: dict[str, Any] = {}
        exec(UNET_FILE, namespace)
        return namespace["make"]().eval()
    kind, sizes, _ = SHAPES[name]
    network = getattr(transformers, kind)
    return network(network.config_class(**sizes, num_labels=CLASSES)).eval()


def write_family(name: str, images: int, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The config of a search over parents around one random network, with a file of random examples, and the parents'
    state dicts."""
    torch.manual_seed(0)
    base = make(name)
    states = [
        {key: tensor + 0.02 * torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor.clone()
         for key, tensor in base.state_dict().items()}
        for _ in range(PARENTS)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    task: dict[str, Any] = {"name": "images", "file": "images.npz", "heldout": 0.5}
    if name == UNET:
        backend, parents = "unet.py:make", [f"parent{number}.safetensors" for number in range(PARENTS)]
        (folder / "unet.py").write_text(UNET_FILE)
        for parent, state in zip(parents, states, strict=True):
            save_file(state, folder / parent)
        sample, noise = rng.normal(size=(2, 2 * images, 3, 16, 16)).astype(np.float32)
        np.savez(folder / "images.npz", sample=sample, label=noise, timestep=rng.integers(0, 1000, 2 * images))
        task |= {"kind": "regression"}
    else:
        backend, parents = "torch", [f"parent{number}" for number in range(PARENTS)]
        for parent, state in zip(parents, states, strict=True):
            base.load_state_dict(state)
            base.save_pretrained(folder / parent)
        side = SHAPES[name][2]
        pixels = rng.normal(size=(2 * images, 3, side, side)).astype(np.float32)
        np.savez(folder / "images.npz", pixel_values=pixels, label=rng.integers(0, CLASSES, 2 * images))
        task |= {"kind": "classification", "metric": "log_probability"}
    config = folder / "config.yaml"
    space = {"method": "linear", "normalize": False}
    config.write_text(yaml.safe_dump({"backend": backend, "parents": parents, "space": space, "tasks": [task]}))
    return config, states


def averaged(states: list[dict[str, Any]], weights: dict[str, np.ndarray], group_of: Any) -> dict[str, Any]:
    """The loop's merge: each tensor as the weighted sum of the parents'."""
    return {
        key: sum(float(w) * state[key] for w, state in zip(weights[group_of(key)], states, strict=True))
        if tensor.is_floating_point() else tensor
        for key, tensor in states[0].items()
    }  # fmt: skip


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    begun = process_time()
    clock = seconds_of(run)
    return clock, process_time() - begun


def compared(name: str, candidates: int, images: int, rounds: int, folder: Path) -> tuple[str, np.ndarray]:
    """How the network is run, and the median seconds per candidate, float64[2, 2]: ours and the peer's, of the clock
    and of the processor."""
    config, states = write_family(name, images, folder)
    problem = build_problem(config, config_from(config, yaml.safe_load(config.read_text()), [], None))
    backend = problem.backend
    (tasks,) = problem.prepare().shards
    bank = backend.load(ONE_DEVICE, lambda done: None, None)
    evaluator = backend.evaluators(bank, Splits([tasks], [], None, []), candidates).shards[0]
    genomes = np.random.default_rng(1).normal(size=(candidates, backend.facts.space.dims)).astype(np.float32)
    module, space = make(name), backend.merge.space
    labels = {path[0].key: label for path, label in zip(backend.merge.tree.paths, backend.merge.labels, strict=True)}
    (rows,) = tasks[0].rows
    inputs = {key: torch.tensor(value) for key, value in rows["inputs"].items()}
    target = torch.tensor(rows["target"])

    def ours() -> np.ndarray:
        (matrix,) = evaluator.score(genomes).matrices["images"].values()
        return matrix.mean(axis=1)

    def theirs() -> np.ndarray:
        means = []
        for genome in genomes:
            values = np.asarray(space.parameters(jnp.asarray(genome))["weight"])
            weights = dict(zip(space.groups, values, strict=True))
            module.load_state_dict(averaged(states, weights, labels.__getitem__))
            with torch.inference_mode():
                if name == UNET:
                    means.append(-float((module(**inputs) - target).square().mean()))
                else:
                    scores = module(**inputs).logits.log_softmax(-1)
                    means.append(float(scores.gather(1, target[:, None].long()).mean()))
        return np.array(means)

    np.testing.assert_allclose(ours(), theirs(), rtol=1e-3)
    times = np.median([(seconds(ours), seconds(theirs)) for _ in range(rounds)], axis=0)
    way = "called" if any(backend._untraced.values()) else "traced"
    return way, times / candidates


def main() -> None:
    names = [*SHAPES, UNET]
    parser = argparse.ArgumentParser(description="Seconds per candidate, against a loop in torch.")
    parser.add_argument("--shapes", nargs="+", choices=names, default=names)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    software = f"torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"{arguments.candidates} candidates; {software}; {describe()}\n")
    print("| network | images | ours is | ours, ms | the loop, ms | ratio | ours, processor ms | the loop | ratio |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in arguments.shapes:
        for images in arguments.images:
            with tempfile.TemporaryDirectory() as folder:
                way, times = compared(name, arguments.candidates, images, arguments.rounds, Path(folder))
            (clock, processor), (peer_clock, peer_processor) = times * 1e3
            print(
                f"| {name} | {images} | {way} | {clock:.1f} | {peer_clock:.1f} | {peer_clock / clock:.1f} | "
                f"{processor:.1f} | {peer_processor:.1f} | {peer_processor / processor:.1f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
