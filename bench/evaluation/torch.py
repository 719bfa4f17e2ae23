"""Seconds per candidate over networks of torch, against the loop that people write (2 minutes).

    python -m bench torch

A vision transformer and a convolutional network with batch norm, of random weights, and three parents made of it by
noise; a candidate is a linear merge with weights of its own for each block. Ours: the search's evaluator over
`backend: torch`, which merges and scores in one compiled program where torchax is installed, and else calls the network
with each merge. The peer: state dicts averaged tensor by tensor in torch, `load_state_dict`, and a forward pass, with
the same weights. Both score the same images by the same labels' log-probability, and must agree. They take turns; the
first pass of either is not counted.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax.numpy as jnp
import numpy as np
import torch
import transformers
import yaml

from bench.shared.machine import describe, seconds_of
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.problem import build_problem, config_from

PARENTS, CLASSES = 3, 10
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


def write_family(name: str, images: int, folder: Path) -> Path:
    """Parents around one random network, a file of random images, and the config of a search over them."""
    kind, sizes, side = SHAPES[name]
    torch.manual_seed(0)
    network = getattr(transformers, kind)
    base = network(network.config_class(**sizes, num_labels=CLASSES)).eval()
    for number in range(PARENTS):
        parent = network(base.config).eval()
        parent.load_state_dict(
            {key: tensor + 0.02 * torch.randn_like(tensor).abs() if tensor.is_floating_point() else tensor
             for key, tensor in base.state_dict().items()}
        )  # fmt: skip
        parent.save_pretrained(folder / f"parent{number}")
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2 * images, 3, side, side)).astype(np.float32)
    np.savez(folder / "images.npz", pixel_values=pixels, label=rng.integers(0, CLASSES, 2 * images))
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump({
            "backend": "torch", "parents": [f"parent{number}" for number in range(PARENTS)],
            "space": {"method": "linear", "normalize": False},
            "tasks": [{"name": "images", "kind": "classification", "file": "images.npz", "metric": "log_probability",
                       "heldout": 0.5}],
        })
    )  # fmt: skip
    return config


def averaged(states: list[dict[str, Any]], weights: dict[str, np.ndarray], group_of: Any) -> dict[str, Any]:
    """The loop's merge: each tensor as the weighted sum of the parents'."""
    return {
        key: sum(float(w) * state[key] for w, state in zip(weights[group_of(key)], states, strict=True))
        if tensor.is_floating_point() else tensor
        for key, tensor in states[0].items()
    }  # fmt: skip


def compared(name: str, candidates: int, images: int, rounds: int, folder: Path) -> tuple[str, float, float]:
    """How the network is run, and the median seconds per candidate, ours and the peer's."""
    config = write_family(name, images, folder)
    problem = build_problem(config, config_from(config, yaml.safe_load(config.read_text()), [], None))
    backend = problem.backend
    (tasks,) = problem.prepare().shards
    evaluator = backend.evaluator(backend.load(ONE_DEVICE, lambda done: None), tasks, candidates)
    genomes = np.random.default_rng(1).normal(size=(candidates, backend.space.dims)).astype(np.float32)
    module = getattr(transformers, SHAPES[name][0]).from_pretrained(folder / "parent0").eval()
    states = [
        getattr(transformers, SHAPES[name][0]).from_pretrained(folder / f"parent{number}").state_dict()
        for number in range(PARENTS)
    ]
    space = backend.merge.space
    labels = {path[0].key: label for path, label in zip(backend.merge.tree.paths, backend.merge.labels, strict=True)}
    rows = tasks[0].rows[0]
    pixels, target = torch.tensor(rows["inputs"]["pixel_values"]), torch.tensor(rows["target"]).long()

    def ours() -> np.ndarray:
        return evaluator.score(genomes).matrices["images"]["log_probability"].mean(axis=1)

    def theirs() -> np.ndarray:
        means = []
        for genome in genomes:
            values = np.asarray(space.parameters(jnp.asarray(genome))["weight"])
            weights = dict(zip(space.groups, values, strict=True))
            module.load_state_dict(averaged(states, weights, labels.__getitem__))
            with torch.inference_mode():
                scores = module(pixel_values=pixels).logits.log_softmax(-1)
            means.append(float(scores.gather(1, target[:, None]).mean()))
        return np.array(means)

    np.testing.assert_allclose(ours(), theirs(), rtol=1e-3)
    mine, peer = np.median([(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)], axis=0)
    way = "called" if any(backend._untraced.values()) else "traced"
    return way, float(mine) / candidates, float(peer) / candidates


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds per candidate, against a loop in torch.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.candidates} candidates, {arguments.images} images; torch {torch.__version__}; {describe()}\n")
    print("| network | ours is | ours, ms | the loop, ms | ratio |\n| --- | --- | ---: | ---: | ---: |")
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            way, mine, peer = compared(name, arguments.candidates, arguments.images, arguments.rounds, Path(folder))
        print(f"| {name} | {way} | {mine * 1e3:.1f} | {peer * 1e3:.1f} | {peer / mine:.1f} |", flush=True)


if __name__ == "__main__":
    main()
