"""A selection of the benchmarks on whatever device JAX finds (9 minutes at most).

    python -m bench device             # prints the tables
    python -m bench device --append    # writes them to bench/results/device.md, over an older section of the device

Merges of a base and two parents whose weights are random and are made on the device: no file holds any. Their shape is
the largest of SHAPES that the program's own plan says fits (on a CPU one for which a few minutes are enough), in
bfloat16 where the device multiplies it natively, else in float32. Of several devices the first is measured.

- merging: 32 candidates of one tensor, one after the other, as in bench/merging/kernels.py. Bytes are those that have
  to be moved: for each candidate every source is read, and a float32 result is read and written. The device's copy is
  of one addition to a large array.
- likelihood: a scoring pass of full batches, of a stored model and of TIES merges that are computed inside it, as a
  share of the best matrix product (see bench/evaluation/evaluate.py for what is counted).
- decoding: greedy, a token of each prompt a step, without draft tokens, which random weights say nothing about; the
  prompts' prefill is not counted. The weights are read in every step.
- a generation: of a search by likelihood with CMA-ES, everything included but the first one, which compiles.

A row is begun only where as long as the longest row so far took is left of `--seconds`.
"""

import argparse
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from textwrap import wrap
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import tabulate

from bench.merging.kernels import Kernels, build_problem, medians
from bench.shared.header_models import MISTRAL_7B, PROMPT, problem_for, write_examples, write_models
from bench.shared.machine import copy_bandwidth, describe, device_name, matrix_peak, seconds_of
from bench.shared.scored_rows import of_rows, work
from evojax_merge.backends.decoder.candidates import MergeCandidates
from evojax_merge.checkpoints.abstract_bank import abstract_bank, abstract_stored
from evojax_merge.checkpoints.parents import tensor_shapes
from evojax_merge.errors import Failed
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.devices import tree_nbytes
from evojax_merge.evaluation.evaluator import DecoderEvaluator, MergeEvaluator, row_update
from evojax_merge.evaluation.memory import is_out_of_memory
from evojax_merge.evaluation.passes import SharedModel
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target, live_target
from evojax_merge.file_system import atomic_write
from evojax_merge.models.bank import Bank, LeafBank
from evojax_merge.models.sources import StackedWeights
from evojax_merge.planning import make_plan
from evojax_merge.problem import SearchProblem
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import MemoryStorage, Reporter, evolve

RESULTS = Path(__file__).resolve().parents[1] / "results" / "device.md"
# Characters of a line of it.
LINE = 120


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """The config of a Llama whose output head is not its embedding."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


# From the largest: Mistral 7B's, about those of Llama 3.2 3B and 1B, a tenth of it, and one for tests.
SHAPES = {
    "7B": MISTRAL_7B,
    "3B": llama(3072, 8192, 28, 24, 8, 32000),
    "1B": llama(2048, 8192, 16, 32, 8, 32000),
    "100M": llama(768, 2048, 12, 12, 4, 16384),
    "tiny": llama(64, 128, 2, 4, 2, 1024),
}
CPU_SHAPES = ("100M", "tiny")
PARENTS = 2
METHODS = ("linear", "ties", "dare_ties", "slerp")
# Of a merged tensor: entries, on a CPU and on others, and candidates.
CPU_ENTRIES, ENTRIES, CANDIDATES = 2**22, 2**24, 32
# Weights: the base's standard deviation, and that of a parent's step away from it.
SCALE, STEP = 0.02, 0.002
# Passes that a share of the peak is measured over.
PASSES = 4
# Prompts that are decoded together, and the tokens that each is given, on a CPU and on others.
PROMPTS, CPU_NEW_TOKENS, NEW_TOKENS = (1, 8, 32), 32, 128
# A search: candidates, generations, and examples, on a CPU and on others.
POPULATION, GENERATIONS, CPU_EXAMPLES, EXAMPLES = 8, 3, 5, 64
REPEATS = 3


class Budget:
    """Seconds for rows that are measured one after the other. `left_out`: the names of those that were not."""

    def __init__(self, seconds: float) -> None:
        self.end, self.longest = time.perf_counter() + seconds, 0.0
        self.left_out: list[str] = []

    def row(self, name: str, measure: Callable[[], Sequence[str]]) -> list[list[str]]:
        """The row `name` of a table with what `measure` finds, in a list; none where it does not fit into what is left
        of the time, or into the memory."""
        start = time.perf_counter()
        if start + self.longest >= self.end:
            self.left_out.append(name)
            return []
        try:
            cells = measure()
        except (jax.errors.JaxRuntimeError, MemoryError, Failed) as error:
            if not (isinstance(error, Failed) or is_out_of_memory(error)):
                raise
            self.left_out.append(f"{name} (out of memory)")
            return []
        self.longest = max(self.longest, time.perf_counter() - start)
        return [[name, *cells]]


# ---------------------------------------------------------------------------------------------------------------
# Models of random weights


@partial(jax.jit, static_argnums=(1, 2))
def random_sources(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """`[S, …]`: a base's tensor, and those of S - 1 models a small step away from it. Vectors are gains, of about 1."""
    base = SCALE * jax.random.normal(key, shape[1:])
    steps = STEP * jax.random.normal(jax.random.fold_in(key, 1), shape)
    is_parent = jnp.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) > 0
    return (base + jnp.where(is_parent, steps, 0) + float(len(shape) == 2)).astype(dtype)


@partial(jax.jit, static_argnums=(1, 2))
def random_stack(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """`[L, S, …]`: the same for each of L layers, one after the other."""
    return jax.lax.map(lambda one: random_sources(one, shape[1:], dtype), jax.random.split(key, shape[0]))


def key_of(name: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))


def random_stored(problem: SearchProblem) -> StackedWeights:
    """One model of the problem's shapes."""
    model, dtype = (
        abstract_stored(problem.backend.models.sources, problem.backend.models.decoder, problem.backend.compute_dtype),
        problem.backend.compute_dtype,
    )
    stacks = {
        stack: {
            name: random_stack(key_of(name), (leaf.shape[0], 1, *leaf.shape[1:]), dtype).reshape(leaf.shape)
            for name, leaf in leaves.items()
        }
        for stack, leaves in model.stacks.items()
    }
    shared = {
        name: random_sources(key_of(name), (1, *leaf.shape), dtype)[0] for name, leaf in model.shared.items()
    }  # fmt: skip
    return replace(model, stacks=stacks, shared=shared)


def random_bank(problem: SearchProblem) -> Bank:
    """A bank as a search over models of the problem's shapes loads it. The method's statistics of a tensor are those of
    a small one with as large weights: order statistics and ratios, which are the same for all."""
    assert isinstance(problem.backend.candidates, MergeCandidates)
    spec, dtype = problem.backend.candidates.spec, problem.backend.compute_dtype
    bank = abstract_bank(problem.backend.models.sources, problem.backend.models.decoder, spec)
    sample = np.asarray(random_sources(key_of("sample"), (1 + PARENTS, 256, 256), dtype))
    measured = tabulate(spec.method, spec.options, list(sample), spec.prepared_for(PARENTS), lambda k: np.zeros(0))

    def random_leaf(name: str, leaf: LeafBank, draw: Callable[..., jax.Array]) -> LeafBank:
        assert leaf.mask_keys is None, f"{spec.method_name} draws masks"
        statistics = {
            key: jnp.broadcast_to(measured.statistics[key], own.shape) for key, own in leaf.statistics.items()
        }
        return replace(leaf, sources=draw(key_of(name), leaf.sources.shape, dtype), statistics=statistics)

    return Bank(
        {
            stack: {name: random_leaf(name, leaf, random_stack) for name, leaf in leaves.items()}
            for stack, leaves in bank.stacks.items()
        },
        {name: random_leaf(name, leaf, random_sources) for name, leaf in bank.shared.items()},
    )


@dataclass
class Models:
    """A problem, with weights that are made when a row first asks for them."""

    problem: SearchProblem
    evaluator: DecoderEvaluator = field(init=False)

    def __post_init__(self) -> None:
        problem = self.problem
        self.evaluator = DecoderEvaluator(
            problem.backend.models.decoder, problem.backend.models.tokenizer, problem.prepare().shards[0],
            problem.backend.compute_dtype,
            target=problem.target,
        )  # fmt: skip

    @cached_property
    def stored(self) -> StackedWeights:
        return jax.block_until_ready(random_stored(self.problem))

    @cached_property
    def bank(self) -> Bank:
        # Both do not fit beside each other everywhere.
        self.__dict__.pop("stored", None)
        return jax.block_until_ready(random_bank(self.problem))


def open_problem(folder: Path, target: Target, shape: str | None) -> tuple[str, SearchProblem]:
    """A search by likelihood over merges by TIES, of models of a shape; None: of the largest that fits."""
    examples = EXAMPLES if target.is_accelerator else CPU_EXAMPLES
    # In bfloat16 wherever weights of bfloat16 would be computed in it.
    dtype = target.compute_dtype("auto", ["bfloat16"])
    write_examples(folder, examples + 1)
    names = [shape] if shape is not None else list(SHAPES) if target.is_accelerator else CPU_SHAPES
    for name in names:
        write_models(folder, SHAPES[name], PARENTS, dtype)
        problem = problem_for(
            folder, PARENTS, "ties", "likelihood", target, 1, dtype, population=POPULATION, generations=GENERATIONS
        )
        if make_plan(problem, problem.prepare()).fits:
            break
    return name, problem


# ---------------------------------------------------------------------------------------------------------------
# Rows


def require_finite(what: str, scores: TaskScores) -> None:
    for metrics in scores.matrices.values():
        for matrix in metrics.values():
            if not np.isfinite(matrix).all():
                raise SystemExit(f"{what}: scores are not finite")


def merging(method: str, target: Target, dtype: str, copy: float) -> list[str]:
    size = ENTRIES if target.is_accelerator else CPU_ENTRIES
    problem = build_problem(method, size, PARENTS, CANDIDATES, dtype)
    kernels = Kernels(problem, CANDIDATES)
    kernels.check()
    x = jnp.asarray(problem.sources[0])
    seconds = medians(
        {
            "ours": lambda: kernels.scan(kernels.shared, kernels.candidates),
            "one_add": lambda: kernels.one_add(x, kernels.constants),
        },
        REPEATS,
    )
    moved = CANDIDATES * size * (len(problem.sources) * problem.sources[0].dtype.itemsize + 2 * 4)
    rate = moved / seconds["ours"]
    return [
        f"{problem.parents}", f"{CANDIDATES * size / seconds['ours'] / 1e6:,.0f}", f"{rate / 1e9:,.1f}",
        f"{rate / copy:.0%}", f"{seconds['one_add'] / seconds['ours']:.0%}",
    ]  # fmt: skip


def scoring(models: Models, merged: bool, peak: float) -> list[str]:
    evaluator, problem = models.evaluator, models.problem
    (own,) = evaluator.batched_tasks
    tokens, length = problem.backend.tokens_per_batch, max(len(row.tokens) for row in own.requests.scored)
    rows = own.requests.scored[: max(1, tokens // length)]
    # As many passes of the stored model as of candidates, each of which has one.
    asked = of_rows(own, rows if merged else rows * PASSES, tokens)
    evaluator = replace(evaluator, batched_tasks=[asked], chunk_sizes={})
    if merged:
        assert isinstance(problem.backend.candidates, MergeCandidates)
        genomes = np.random.default_rng(0).uniform(0, 1, (PASSES, problem.space.dims)).astype(np.float32)
        recipes = problem.backend.candidates.space.decode(genomes)
        run = partial(evaluator.population, models.bank, problem.backend.candidates.spec, recipes)
    else:
        run = partial(evaluator.stored, models.stored)
    require_finite("likelihood", run())
    seconds = float(np.median([seconds_of(run) for _ in range(REPEATS)])) / PASSES
    flops = sum(work(problem.backend.models.decoder, rows))
    return [
        f"{len(rows)} x {length}", f"{seconds:.3g}", f"{flops / seconds / 1e12:.3g}", f"{flops / seconds / peak:.0%}",
    ]  # fmt: skip


def decoding(models: Models, prompts: int, copy: float) -> list[str]:
    problem, target = models.problem, models.problem.target
    config, dtype, new = (
        problem.backend.models.decoder,
        problem.backend.compute_dtype,
        NEW_TOKENS if target.is_accelerator else CPU_NEW_TOKENS,
    )
    factory, everyone, no_draft = SharedModel(), np.zeros(1), 1
    tokens = np.random.default_rng(0).integers(3, config.vocab, (prompts, PROMPT)).astype(np.int32)
    model, corpus, no_padding = models.stored, np.zeros((prompts, 0), np.int32), np.zeros(prompts, np.int32)
    laid_out: Any = model
    if models.evaluator.unstacks_layers(model):
        laid_out, _ = factory.unstack(None, model, everyone)

    spec = passes.DecodeSpec(config, factory, None, dtype, prompts, PROMPT, new, no_draft, new, row_update(target), ())
    state = passes.init_decode(spec, None, everyone)
    begun = passes.prefill(spec, (model, np.int32(0), tokens, no_padding), (everyone, None), state)

    def decode() -> float:
        # What is decoded into is given away.
        state = jax.block_until_ready(jax.tree.map(jnp.copy, begun))
        start = time.perf_counter()
        state = passes.decode(spec, (laid_out, tokens, corpus, None), (everyone, None), state)
        written = np.asarray(state.tokens)
        if not (written >= 0).all():
            raise SystemExit("decoding: logits are not finite")
        return time.perf_counter() - start

    decode()
    # The first token is prefill's.
    step = float(np.median([decode() for _ in range(REPEATS)])) / (new - 1)
    # Of the embedding a step takes a row for each prompt.
    read = tree_nbytes(model) - tree_nbytes(model.shared["embed"])
    return [
        f"{new}", f"{prompts / step:,.1f}", f"{1000 * step:.3g}", f"{read / step / 1e9:,.1f}",
        f"{read / step / copy:.0%}",
    ]  # fmt: skip


def searching(models: Models, peak: float) -> list[str]:
    problem = models.problem
    assert isinstance(problem.backend.candidates, MergeCandidates)
    scorer = SpaceEvaluator(
        problem.space, MergeEvaluator(models.evaluator, models.bank, problem.backend.candidates.spec)
    )
    ends = [time.perf_counter()]

    class Clock(Reporter):
        def finished(self, generation: Any) -> None:
            ends.append(time.perf_counter())

    evolve(problem.search, 0, problem.strategy, problem.space, [scorer], MemoryStorage(), Clock())
    first, *others = np.diff(ends)
    rows, seconds = models.evaluator.batched_tasks[0].requests.scored, float(np.median(others))
    flops = POPULATION * sum(work(problem.backend.models.decoder, rows))
    return [
        f"{POPULATION}", f"{len(rows)}", f"{sum(len(row.tokens) for row in rows):,}", f"{seconds:.3g}",
        f"{seconds / POPULATION:.3g}", f"{flops / seconds / peak:.0%}", f"{first:.3g}",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# What is shown


def table(heads: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, with an empty line before it; nothing where no row was measured. heads: the
    columns' names, divided by ` | `."""
    if not rows:
        return []
    count = heads.count("|")
    return ["", f"| {heads} |", "| --- |" + " ---: |" * count, *(f"| {' | '.join(row)} |" for row in rows)]


def other_work() -> str:
    """Whether the host has other work, before any of this begins."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return f", beside other work (a load of {load:.0f} on {cores} cores)" if load > cores / 2 else ""


def measure(target: Target, shape: str | None, budget: Budget) -> str:
    """The device's section of bench/results/device.md, from its heading on."""
    beside = other_work()
    with tempfile.TemporaryDirectory() as folder:
        name, problem = open_problem(Path(folder), target, shape)
        dtype = problem.backend.compute_dtype
        models, copy, peak = Models(problem), copy_bandwidth(), matrix_peak(dtype)
        merged = [
            row for method in METHODS for row in budget.row(method, partial(merging, method, target, dtype, copy))
        ]
        decoded = [
            row for count in PROMPTS for row in budget.row(f"prompts: {count}", partial(decoding, models, count, copy))
        ]
        scored = [
            row
            for name, is_merged in (("a stored model", False), ("TIES, merged inside the pass", True))
            for row in budget.row(name, partial(scoring, models, is_merged, peak))
        ]
        searched = budget.row("TIES, CMA-ES, by likelihood", partial(searching, models, peak))
    parameters = sum(int(np.prod(shape)) for shape in tensor_shapes(problem.backend.models.decoder).values())
    said = (
        f"`make bench-device`: {describe()}{beside}. An addition to a large array moves {copy / 1e9:,.1f} GB/s, the "
        f"best matrix product in {dtype} does {peak / 1e12:.3g} TFLOP/s. The models are of the shape {name}, "
        f"{parameters / 1e6:,.0f} M parameters in {dtype}, a base and {PARENTS} parents."
    )
    lines = [
        f"## On {device_name()}",
        "",
        *wrap(said, LINE, break_long_words=False, break_on_hyphens=False),
        *table("merging | parents | M parameters/s | GB/s | share of the copy | share of XLA's one add", merged),
        *table("likelihood | tokens a pass | s | TFLOP/s | share of the best product", scored),
        *table("decoding together | new tokens of each | tokens/s | ms a step | weights, GB/s | share of the "
               "copy", decoded),
        *table("a generation | candidates | examples | tokens of each candidate | s | s/candidate | share of the best "
               "product | the first, with compiling, s", searched),
    ]  # fmt: skip
    if budget.left_out:
        lines += ["", *wrap(f"Left out: {'; '.join(budget.left_out)}.", LINE)]
    return "\n".join(lines) + "\n"


def with_section(text: str, section: str) -> str:
    """A page with a section in place of an older one with the same heading, else at its end."""
    heading, fresh = section.partition("\n")[0], section.removeprefix("## ")
    first, *sections = ("\n" + text.rstrip("\n") + "\n").split("\n## ")
    kept = [fresh if f"## {one}".partition("\n")[0] == heading else one for one in sections]
    return "\n## ".join([first, *kept, *([] if fresh in kept else [fresh])]).strip("\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="rows that would take longer are left out")
    parser.add_argument("--shape", choices=SHAPES, help="of the models; by default the largest that fits")
    parser.add_argument("--append", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="put the section there")
    arguments = parser.parse_args()
    # Nothing of this needs a second device.
    target = replace(live_target(), devices=1, hosts=1)
    section = measure(target, arguments.shape, Budget(arguments.seconds))
    print(section, flush=True)
    if arguments.append is not None:
        text = arguments.append.read_text(encoding="utf-8") if arguments.append.exists() else "# Devices\n"
        atomic_write(arguments.append, with_section(text, section))


if __name__ == "__main__":
    main()
