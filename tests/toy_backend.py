"""A backend of one's own: networks of two layers in .npy files, and a kind of task that draws its own examples."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import evojax_merge as em
from evojax_merge.tasks.task import Opening, TaskConfig, TaskKind

Network = dict[str, dict[str, Any]]


def load(folder: Path) -> Network:
    return {layer: {"w": np.load(folder / f"{layer}.w.npy"), "b": np.load(folder / f"{layer}.b.npy")}
            for layer in ("first", "second")}  # fmt: skip


def save(network: Network, folder: Path) -> None:
    for layer, arrays in network.items():
        for name, array in arrays.items():
            np.save(folder / f"{layer}.{name}.npy", array)


def margins(network: Network, rows: dict[str, Any]) -> jax.Array:
    """float32[N]: how much more likely the right class is than the other."""
    hidden = jnp.tanh(rows["x"] @ network["first"]["w"] + network["first"]["b"])
    logits = hidden @ network["second"]["w"] + network["second"]["b"]
    return (logits[:, 1] - logits[:, 0]) * (2 * rows["y"] - 1)


class BlobsConfig(TaskConfig):
    """Two clouds of points, of which a network tells which one a point is of."""

    kind: Literal["blobs"]
    angle: float
    count: int = 60


def open_blobs(config: BlobsConfig, opening: Opening) -> em.ArrayTask:
    rng = np.random.default_rng([opening.seed, config.count])
    y = rng.integers(0, 2, config.count)
    centre = np.array([np.cos(config.angle), np.sin(config.angle)])
    x = rng.normal(size=(config.count, 2)) * 0.5 + np.outer(2 * y - 1, centre)
    rows = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    return em.ArrayTask(config.name, rows, margins, weight=config.weight)


em.register_task(TaskKind(BlobsConfig, open_blobs))
em.register_backend("network", em.FunctionFactory(load, save))
