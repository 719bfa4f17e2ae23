"""Ten LoRA adapters of SmolLM2-135M, as factors and as expanded weights (5 minutes, 8 GB of memory).

    python -m bench adapters

Ten random adapters of rank 16, of all seven projections of every layer of SmolLM2-135M (`zoo:smollm2/base`), scored on
8 x 256 tokens by a merge inside the pass: from the base and the adapters' factors, as a search holds them
(`models.bank.Factors`), and from the expanded weights of all eleven models. Seconds are medians of a compiled pass.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import add_low_rank

import evojax_merge as em
from bench.shared.machine import describe
from evojax_merge.checkpoints.adapter_writer import AdapterWriter
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.models.architecture import COMPONENTS, EMBEDDING, LAYERS, architecture_of, tensors_of
from evojax_merge.models.bank import Bank, LeafBank, MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.decoder import forward, target_logprobs
from evojax_merge.models.layers import padded_layout
from evojax_merge.models.sources import LazyMerge
from evojax_merge.zoo.references import resolve_reference

BASE = "zoo:smollm2/base"
ROWS, WIDTH = 8, 256


@dataclass(frozen=True)
class Cost:
    """Bytes of weights in the bank, seconds of a pass of one candidate, and the candidate's score."""

    held: int
    seconds: float
    score: float


def write_adapters(folder: Path, base: Path, count: int, rank: int) -> list[str]:
    """Random adapters, whose changes are some hundredths of the weights' size, as references."""
    _, config = open_sources([base])
    architecture, references = architecture_of(config), []
    embedding = architecture.leaf(EMBEDDING)
    assert embedding is not None
    sizes = architecture.dimensions(config)
    for k in range(count):
        rng, factors = np.random.default_rng(k), {}
        for name, leaf, _ in tensors_of(config):
            if leaf.stack is not None and len(leaf.shape) == 2:
                outputs, inputs = (sizes[axis] for axis in leaf.shape)
                a, b = (rng.normal(0, 0.02, shape) for shape in ((rank, inputs), (outputs, rank)))
                factors[name] = a.astype(np.float32), b.astype(np.float32)
        (folder / str(k)).mkdir()
        with AdapterWriter(folder / str(k), str(base), {embedding.tensor}) as writer:
            for name, pair in factors.items():
                writer.add_factors(name, *pair)
        references.append(f"{base}+{folder / str(k)}")
    return references


def expanded(bank: Bank) -> Bank:
    """The same bank with all models' weights, `[L, S, …]`."""

    def all_sources(leaf: jax.Array, factors: Any) -> jax.Array:
        if factors is None:
            return leaf
        over_parents = jax.vmap(add_low_rank, in_axes=(None, 0, 0))
        # A base first, as in the bank: the methods below take task vectors from it.
        return jnp.concatenate([leaf, over_parents(leaf[0], factors.a, factors.b)])

    stack = jax.jit(lambda leaf, factors: jax.lax.map(lambda own: all_sources(*own), (leaf, factors)))

    def expand(leaf: LeafBank, all_sources: Any) -> LeafBank:
        return replace(leaf, sources=all_sources(leaf.sources, leaf.factors), factors=None)

    return Bank(
        {
            stack_name: {name: expand(leaf, stack) for name, leaf in leaves.items()}
            for stack_name, leaves in bank.stacks.items()
        },
        {name: expand(leaf, all_sources) for name, leaf in bank.shared.items()},
    )


def uniform_recipe(bank: Bank, spec: MergeSpec, parents: int) -> Recipe:
    """Half of every delta's entries, weighted alike."""
    values = {"weight": 1 / parents, "density": 0.5, "lambda": 1.0}

    def parameters(*axes: int) -> dict[str, jax.Array]:
        return {
            p.name: jnp.full((*axes, parents) if p.per_parent else axes, values[p.name])
            for p in spec.method.parameters
            if p.searched
        }

    (layers,) = {leaf.sources.shape[0] for leaf in bank.stacks[LAYERS].values()}
    return Recipe({LAYERS: parameters(layers, len(COMPONENTS))}, {name: parameters() for name in bank.shared})


def measure(bank: Bank, spec: MergeSpec, config: DecoderConfig, parents: int, repeats: int) -> Cost:
    rng = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(rng.integers(0, config.vocab, (ROWS, WIDTH)), jnp.int32) for _ in range(2))
    layout = padded_layout(WIDTH, jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, WIDTH, jnp.int32))

    @jax.jit
    def score(bank: Bank, recipe: Recipe) -> jax.Array:
        source = LazyMerge.of(bank, recipe, spec)
        hidden, _ = forward(config, source, tokens, layout)
        return target_logprobs(config, source, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))[0].mean()

    recipe = uniform_recipe(bank, spec, parents)
    found = float(score(bank, recipe))
    seconds = median(lambda: score(bank, recipe).block_until_ready(), repeats)
    leaves = [*bank.shared.values(), *(leaf for stack in bank.stacks.values() for leaf in stack.values())]
    weights = [(leaf.sources, leaf.factors) for leaf in leaves]
    return Cost(sum(array.nbytes for array in jax.tree.leaves(weights)), seconds, found)


def median(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def row(method: str, costs: Sequence[Cost]) -> str:
    cells = [f"{1e-6 * one.held:,.0f} | {one.seconds:.2f}" for one in costs]
    return f"| {method} | {' | '.join(cells)} | {abs(costs[0].score - costs[1].score):.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapters of one base, as factors and expanded.")
    parser.add_argument("--parents", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    base = resolve_reference(BASE, BASE, Path.cwd())
    print(f"{arguments.parents} adapters of rank {arguments.rank}; {ROWS} x {WIDTH} tokens. {describe()}\n")
    print("| method | factors: MB of weights | s a candidate | expanded: MB | s a candidate | scores differ by |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as work:
        references = write_adapters(Path(work), base, arguments.parents, arguments.rank)
        for method in arguments.methods:
            loaded = em.load_bank(references, base, method=method)
            own = (loaded.spec, loaded.config, arguments.parents, arguments.repeats)
            print(row(method, [measure(bank, *own) for bank in (loaded.bank, expanded(loaded.bank))]), flush=True)


if __name__ == "__main__":
    main()
