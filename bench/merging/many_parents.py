"""Compile time, memory and time of merges of 4 to 64 parents (5 minutes).

    python -m bench many-parents

Both forms are of the same kernels (`merge_kernels.sums`): *written out*, the program has a term for every parent, as
for few parents it always has; *loop* is what more than `UNROLLED` of them get. Seconds are medians, and what is
compiled is compiled once, which is shown apart; memory is what the compiler reports beyond arguments and results.

- A tensor: one merge of a matrix of 256 x 1024 in float32, beside mergekit in process (the faster of all of torch's
  threads and one).
- A search: a Llama of four layers of width 256 scores 8 x 64 tokens, merged inside the pass (models.sources.LazyMerge),
  with a density and a weight for every parent and layer.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import CombineInputs, combine, draw_row_keys, look_up, sums, tabulate

from bench.merging.kernels import mergekit_call
from bench.shared.machine import describe
from bench.shared.random_family import problem_for, write_rows
from evojax_merge.backends.decoder.kinds.merge import MergeCandidates
from evojax_merge.benchmarks.kernels import build_problem, medians, seed_of
from evojax_merge.checkpoints.bank import load_bank
from evojax_merge.models.bank import take_candidate
from evojax_merge.models.decoder import forward, target_logprobs
from evojax_merge.models.layers import padded_layout
from evojax_merge.models.sources import LazyMerge

METHODS = ("linear", "ties")
SIZE = 2**18
ROWS, WIDTH, VOCAB = 8, 64, 2048


@dataclass(frozen=True)
class Cost:
    """One program's seconds to trace and compile, bytes of temporaries, and seconds of a run."""

    compile: float
    temporary: int
    run: float


@dataclass(frozen=True)
class Row:
    """A merge of a number of parents, in both forms; `peer`: mergekit's seconds, None where it took no part."""

    what: str
    parents: int
    written_out: Cost | None
    loop: Cost
    peer: float | None = None


@contextmanager
def summed(in_a_loop: bool) -> Iterator[None]:
    """Kernels that are traced in this block sum over parents in that form, however many there are."""
    before = sums.UNROLLED
    sums.UNROLLED = 1 if in_a_loop else 10**6
    try:
        yield
    finally:
        sums.UNROLLED = before


def cost(function: Callable[..., Any], arguments: Sequence[Any], in_a_loop: bool, repeats: int) -> Cost:
    with summed(in_a_loop):
        start = time.perf_counter()
        # A function of its own, or JAX would take what it has traced in the other form.
        compiled = jax.jit(lambda *given: function(*given)).lower(*arguments).compile()
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    run = medians({"run": lambda: compiled(*arguments)}, repeats)["run"]
    return Cost(seconds, memory.temp_size_in_bytes, run)


def measure(
    what: str, parents: int, function: Callable[..., Any], arguments: Sequence[Any], written_out: int, repeats: int
) -> Row:
    """A row; written out up to so many parents."""
    both = cost(function, arguments, False, repeats) if parents <= written_out else None
    return Row(what, parents, both, cost(function, arguments, True, repeats))


def of_a_tensor(name: str, parents: int, written_out: int, repeats: int) -> Row:
    problem = build_problem(name, SIZE, parents, 1, "float32")
    method, shape = problem.method, problem.sources[0].shape
    prepared = tabulate(
        method, method.options, problem.sources, problem.constants,
        lambda k: draw_row_keys(0, seed_of(k), shape),
    )  # fmt: skip

    def merge(sources: Any, mask_keys: Any, table: Any, parameters: Any) -> jax.Array:
        statistics = look_up(method, table, parameters)
        return combine(method, method.options, CombineInputs(sources, mask_keys, statistics, parameters))

    mask_keys = jnp.asarray(np.stack(prepared.mask_keys)) if prepared.mask_keys else ()
    table = {key: jnp.asarray(rows) for key, rows in prepared.statistics.items()}
    parameters = {key: jnp.asarray(value[0], jnp.float32) for key, value in problem.numbers.items()}
    arguments = (jnp.asarray(np.stack(problem.sources)), mask_keys, table, parameters)
    row = measure(name, parents, merge, arguments, written_out, repeats)
    peer = mergekit_call(problem)
    if peer is None:
        return row
    seconds = medians({"all": lambda: peer(False), "one": lambda: peer(True)}, min(repeats, 3))
    return Row(name, parents, row.written_out, row.loop, min(seconds.values()))


def write_family(folder: Path, parents: int) -> None:
    """A base of four layers and fine-tunes of it: the base and noise."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evojax_merge.benchmarks.header_models import word_tokenizer

    tokenizer = word_tokenizer(VOCAB)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    stored = {name: values.clone() for name, values in model.named_parameters()}
    for name in ("base", *(str(k) for k in range(parents))):
        for key, parameter in model.named_parameters():
            noise = 0.0 if name == "base" else 0.002 * torch.randn_like(stored[key])
            parameter.data = stored[key] + noise
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def of_a_search(folder: Path, parents: int, written_out: int, repeats: int) -> Row:
    problem = problem_for(folder, str(folder / "base"), [str(folder / str(k)) for k in range(parents)], 4)
    candidates = problem.backend.candidates
    assert isinstance(candidates, MergeCandidates)
    spec, config, space = candidates.spec, problem.backend.models.decoder, candidates.space
    bank = load_bank(problem.backend.models.sources, config, spec)
    rng = np.random.default_rng(0)
    recipes = space.decode(rng.uniform(0, 1, (1, space.dims)).astype(np.float32))
    tokens, targets = (jnp.asarray(rng.integers(2, VOCAB, (ROWS, WIDTH)), jnp.int32) for _ in range(2))
    layout = padded_layout(WIDTH, jnp.zeros(ROWS, jnp.int32), jnp.full(ROWS, WIDTH, jnp.int32))

    def score(bank: Any, recipe: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        source = LazyMerge.of(bank, recipe, spec, prefetch_layers=True)
        hidden, _ = forward(config, source, tokens, layout)
        return target_logprobs(config, source, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1))[0].sum()

    arguments = (bank, take_candidate(recipes, 0), tokens, targets)
    return measure("search, ties", parents, score, arguments, written_out, repeats)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| merge | parents | compile, s: written out | loop | temporaries, MB: written out | loop "
        "| ms a candidate: written out | loop | mergekit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        pairs = [
            (f"{own.compile:.1f}", f"{own.temporary / 1e6:.1f}", f"{1e3 * own.run:.1f}") if own else ("–",) * 3
            for own in (row.written_out, row.loop)
        ]
        cells = [cell for pair in zip(*pairs, strict=True) for cell in pair]
        peer = "–" if row.peer is None else f"{1e3 * row.peer:,.0f}"
        lines.append(f"| {row.what} | {row.parents} | {' | '.join(cells)} | {peer} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of many parents, summed in a loop and written out.")
    parser.add_argument("--parents", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--written-out", type=int, default=64, metavar="K", help="up to so many parents (default: 64)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []

    def add(row: Row) -> None:
        rows.append(row)
        print(table(rows).splitlines()[-1], flush=True)

    for name in arguments.methods:
        for parents in arguments.parents:
            add(of_a_tensor(name, parents, arguments.written_out, arguments.repeats))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_family(folder, max(arguments.parents))
        write_rows(folder / "rows.jsonl", [f"w{i}" for i in range(2, VOCAB)], 500, 16)
        for parents in arguments.parents:
            add(of_a_search(folder, parents, arguments.written_out, arguments.repeats))
    print(f"\nMedians of {arguments.repeats}; {describe()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
