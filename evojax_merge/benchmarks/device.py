"""Measurements of the device at hand: merging, scoring, decoding, and a generation of a search.

Merges of a base and two parents whose weights are random and are made on the device: no file holds any. Their shape is
the largest of SHAPES that the program's own plan says fits (on a CPU one for which a minute is enough), in bfloat16
where the device multiplies it natively, else in float32. The first of several devices is measured.

- a generation: of searches by likelihood, by answers and by gradients, everything included but the first ones, which
  compile; and its seconds over the plan's bound, by which later plans estimate.
- likelihood: a scoring pass of full batches, of a stored model and of TIES merges that are computed inside it, as a
  share of the best matrix product. The FLOPs are those of the layers' and the head's products.
- decoding: greedy, a token of each prompt a step, without draft tokens, which random weights say nothing about; the
  prompts' prefill is not counted. The weights are read in every step.
- merging: candidates of one tensor, one after the other. Bytes are those that have to be moved: every source is read
  for each candidate, and a float32 result is read and written. The share is one of the rate of an addition to a large
  array in place.
"""

import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from merge_kernels import tabulate

from evojax_merge.backends.decoder.kinds.merge import MergeCandidates
from evojax_merge.benchmarks.header_models import MISTRAL_7B, PROMPT, problem_for, write_examples, write_models
from evojax_merge.benchmarks.kernels import Kernels, build_problem, medians
from evojax_merge.benchmarks.references import copy_bandwidth, matrix_peak, median_seconds
from evojax_merge.benchmarks.scored_rows import of_rows, work
from evojax_merge.checkpoints.abstract_bank import abstract_bank, abstract_stored
from evojax_merge.checkpoints.parents import tensor_shapes
from evojax_merge.errors import Failed, InputError
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.devices import ONE_DEVICE, tree_nbytes
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.evaluation.generation import row_update, unstacks_layers
from evojax_merge.evaluation.memory import is_out_of_memory
from evojax_merge.evaluation.passes import SharedModel
from evojax_merge.evaluation.targets import Target
from evojax_merge.evaluation.timings import Timing, WorkKind, timing
from evojax_merge.models.bank import Bank, LeafBank
from evojax_merge.models.sources import StackedWeights
from evojax_merge.problem import SearchProblem
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.steps.planning import make_plan


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """The config of a Llama whose output head is not its embedding."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


# From the largest: Mistral 7B's, about those of Llama 3.2 3B and 1B, smaller ones for CPUs, and one for tests.
SHAPES = {
    "7B": MISTRAL_7B,
    "3B": llama(3072, 8192, 28, 24, 8, 32000),
    "1B": llama(2048, 8192, 16, 32, 8, 32000),
    "100M": llama(768, 2048, 12, 12, 4, 16384),
    "10M": llama(256, 768, 8, 4, 2, 8192),
    "tiny": llama(64, 128, 2, 4, 2, 1024),
}
PARENTS = 2
METHODS = ("linear", "ties", "dare_ties", "slerp")


@dataclass(frozen=True)
class Sizes:
    """How much is measured. shapes: of models, from the largest; entries and candidates: of a merged tensor; passes:
    that a share of the peak is measured over; prompts: that are decoded together, and new_tokens of each; examples,
    population and generations: of a search; repeats: runs that a median is taken of."""

    shapes: Sequence[str]
    entries: int
    new_tokens: int
    examples: int
    candidates: int = 32
    passes: int = 4
    prompts: Sequence[int] = (1, 8, 32)
    population: int = 8
    generations: int = 3
    repeats: int = 3


ACCELERATOR = Sizes(("7B", "3B", "1B", "100M", "10M"), entries=2**24, new_tokens=128, examples=64)
CPU = Sizes(("10M", "tiny"), entries=2**20, new_tokens=16, examples=5, candidates=8, prompts=(1, 8))
# Weights: the base's standard deviation, and that of a parent's step away from it.
SCALE, STEP = 0.02, 0.002


@dataclass(frozen=True)
class Measurement:
    """A row of a part of the benchmark. figures: by the names of the part's columns; workload: of what is measured,
    which two measurements must share to be compared."""

    part: str
    name: str
    workload: str
    figures: Mapping[str, float]


@dataclass
class Benchmark:
    """The figures that were measured on a device. copy_bandwidth: bytes a second of one addition to a large array;
    matrix_peak: FLOP a second of the best matrix product; left_out: rows that were not measured, with their
    reasons."""

    shape: str
    parameters: int
    dtype: str
    copy_bandwidth: float = 0.0
    matrix_peak: float = 0.0
    rows: list[Measurement] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class Budget:
    """Seconds for rows that are measured one after the other; `announce` is called with each row's name. references:
    the seconds that each of the device's references may take."""

    def __init__(self, seconds: float, announce: Callable[[str], None]) -> None:
        self.end, self.longest = time.perf_counter() + seconds, 0.0
        self.references = seconds / 20
        self.announce = announce
        self.left_out: list[str] = []

    def row(self, name: str, measure: Callable[[], Measurement]) -> list[Measurement]:
        """The row that `measure` gives, in a list; none where less than the longest row so far took is left of the
        time, or where the memory does not hold it."""
        self.announce(name)
        start = time.perf_counter()
        if start + self.longest >= self.end:
            self.left_out.append(f"{name} (no time is left)")
            return []
        try:
            measured = [measure()]
        except (jax.errors.JaxRuntimeError, MemoryError, Failed) as error:
            if not (isinstance(error, Failed) or is_out_of_memory(error)):
                raise
            measured = []
            self.left_out.append(f"{name} ({error if isinstance(error, Failed) else 'out of memory'})")
        self.longest = max(self.longest, time.perf_counter() - start)
        return measured


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


def random_bank(problem: SearchProblem) -> Bank:
    """A bank as a search over models of the problem's shapes loads it. The method's statistics of a tensor are those of
    a small one with as large weights: order statistics and ratios, which are the same for all."""
    assert isinstance(problem.backend.candidates, MergeCandidates)
    spec, dtype = problem.backend.candidates.spec, problem.facts.compute_dtype
    bank = abstract_bank(problem.backend.models.sources, problem.backend.models.decoder, spec)
    sample = np.asarray(random_sources(key_of("sample"), (1 + PARENTS, 256, 256), dtype))
    measured = tabulate(spec.method, spec.options, list(sample), spec.prepared_for(PARENTS), lambda k: np.zeros(0))

    def random_leaf(name: str, leaf: LeafBank, draw: Callable[..., jax.Array]) -> LeafBank:
        assert leaf.mask_keys is None, f"{spec.method_name} draws masks"
        statistics = {
            key: jnp.broadcast_to(measured.statistics[key], rows.shape) for key, rows in leaf.statistics.items()
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
    evaluator: Evaluator = field(init=False)

    def __post_init__(self) -> None:
        problem = self.problem
        self.evaluator = Evaluator(
            problem.backend.models.decoder, problem.backend.models.tokenizer, problem.prepare().shards[0],
            problem.facts.compute_dtype,
            target=problem.target,
        )  # fmt: skip

    def workload(self, what: str) -> str:
        """The models and what they do, in words."""
        config, dtype = self.problem.backend.models.decoder, self.problem.facts.compute_dtype
        return f"{config.layers} layers of width {config.hidden} in {dtype}, {what}"

    @cached_property
    def stored(self) -> StackedWeights:
        """One model of the problem's shapes."""
        # Both do not fit beside each other everywhere.
        self.__dict__.pop("bank", None)
        dtype, opened = self.problem.facts.compute_dtype, self.problem.backend.models
        model = abstract_stored(opened.sources, opened.decoder, dtype)
        stacks = {
            stack: {
                name: random_stack(key_of(name), (leaf.shape[0], 1, *leaf.shape[1:]), dtype).reshape(leaf.shape)
                for name, leaf in leaves.items()
            }
            for stack, leaves in model.stacks.items()
        }
        shared = {name: random_sources(key_of(name), (1, *leaf.shape), dtype)[0] for name, leaf in model.shared.items()}
        return jax.block_until_ready(replace(model, stacks=stacks, shared=shared))

    @cached_property
    def bank(self) -> Bank:
        self.__dict__.pop("stored", None)
        return jax.block_until_ready(random_bank(self.problem))


def open_problem(folder: Path, target: Target, sizes: Sizes) -> tuple[str, SearchProblem]:
    """A search by likelihood over merges by TIES, of models of the first of the shapes that fits. Raises InputError
    where none does."""
    # In bfloat16 wherever weights of bfloat16 would be computed in it.
    dtype = target.compute_dtype("auto", ["bfloat16"])
    write_examples(folder, sizes.examples + 1)
    for name in sizes.shapes:
        write_models(folder, SHAPES[name], PARENTS, dtype)
        problem = problem_for(
            folder, PARENTS, "ties", "likelihood", target, 1, dtype, population=sizes.population,
            generations=sizes.generations,
        )  # fmt: skip
        plan = make_plan(problem, problem.prepare())
        if plan.fits:
            return name, problem
    raise InputError(f"--shape {name}", plan.verdict())


# ---------------------------------------------------------------------------------------------------------------
# Rows


STORED, MERGED = "a stored model", "TIES, merged inside the pass"
GRADIENT_STRATEGY = "gradient"
# The searches: their tasks, strategies, and the kinds of work that they are.
SEARCHES: dict[str, tuple[str, str, WorkKind]] = {
    "TIES, CMA-ES, by likelihood": ("likelihood", "cma_es", "scoring"),
    "TIES, CMA-ES, by answers": ("exact_match", "cma_es", "decoding"),
    "TIES, by gradients": ("likelihood", GRADIENT_STRATEGY, "gradient"),
}
# The column of a generation's seconds over its bound by the roofline.
BOUNDED = "times its bound"


def prompts_name(count: int) -> str:
    return f"{count} prompt{'s' if count > 1 else ''}"


@dataclass
class Measurer:
    """Measures the rows of a benchmark on models of random weights. copy: bytes a second; peak: FLOP a second; folder:
    of the models' headers."""

    models: Models
    folder: Path
    sizes: Sizes
    copy: float
    peak: float

    def merging(self, method: str) -> Measurement:
        sizes, dtype = self.sizes, self.models.problem.facts.compute_dtype
        problem = build_problem(method, sizes.entries, PARENTS, sizes.candidates, dtype)
        kernels = Kernels(problem, sizes.candidates)
        kernels.check()
        x = jnp.asarray(problem.sources[0])
        seconds = medians(
            {
                "merge": lambda: kernels.scan(kernels.shared, kernels.candidates),
                "one add": lambda: kernels.one_add(x, kernels.constants),
            },
            sizes.repeats,
        )
        merged = sizes.candidates * sizes.entries
        rate = merged * (len(problem.sources) * problem.sources[0].dtype.itemsize + 2 * 4) / seconds["merge"]
        return Measurement(
            "merging", method, f"{sizes.candidates} candidates of {sizes.entries:,} entries in {dtype}",
            {
                "parents": problem.parents, "M parameters/s": merged / seconds["merge"] / 1e6, "GB/s": rate / 1e9,
                "share of the addition's GB/s": rate / self.copy,
                "share of XLA's one add": seconds["one add"] / seconds["merge"],
            },
        )  # fmt: skip

    def scoring(self, is_merged: bool) -> Measurement:
        models, problem, passes_ = self.models, self.models.problem, self.sizes.passes
        (batched,) = models.evaluator.batched_tasks
        tokens, length = problem.backend.tokens_per_batch, max(len(row.tokens) for row in batched.requests.scored)
        rows = batched.requests.scored[: max(1, tokens // length)]
        # As many passes of the stored model as of candidates, each of which has one.
        asked = of_rows(batched, rows if is_merged else rows * passes_, tokens)
        evaluator = replace(models.evaluator, batched_tasks=[asked], chunk_sizes={})
        if is_merged:
            assert isinstance(problem.backend.candidates, MergeCandidates)
            genomes = np.random.default_rng(0).uniform(0, 1, (passes_, problem.space.dims)).astype(np.float32)
            recipes = problem.backend.candidates.space.decode(genomes)
            run = partial(evaluator.score, evaluator.merges(models.bank, problem.backend.candidates.spec, recipes))
        else:
            run = partial(evaluator.score_stored, models.stored)
        matrices = [matrix for metrics in run().matrices.values() for matrix in metrics.values()]
        if not all(np.isfinite(matrix).all() for matrix in matrices):
            raise Failed("likelihood: scores are not finite")
        seconds = median_seconds(run, self.sizes.repeats) / passes_
        rate = sum(work(problem.backend.models.decoder, rows)) / seconds
        return Measurement(
            "likelihood", MERGED if is_merged else STORED, models.workload(f"{len(rows)} x {length} tokens"),
            {
                "tokens a pass": len(rows) * length, "s a pass": seconds, "TFLOP/s": rate / 1e12,
                "share of the best product": rate / self.peak,
            },
        )  # fmt: skip

    def decoding(self, prompts: int) -> Measurement:
        models, problem, new = self.models, self.models.problem, self.sizes.new_tokens
        config, dtype = problem.backend.models.decoder, problem.facts.compute_dtype
        factory, everyone, no_draft = SharedModel(tuple(config.parts)), np.zeros(1), 1
        tokens = np.random.default_rng(0).integers(3, config.vocab, (prompts, PROMPT)).astype(np.int32)
        model, corpus, no_padding = models.stored, np.zeros((prompts, 0), np.int32), np.zeros(prompts, np.int32)
        laid_out: Any = model
        if unstacks_layers(models.evaluator, model):
            laid_out, _ = factory.unstack(None, model, everyone)

        spec = passes.DecodeSpec(
            config, factory, None, dtype, prompts, PROMPT, new, no_draft, new, row_update(problem.target), ()
        )
        state = passes.init_decode(spec, None, everyone)
        begun = passes.prefill(spec, (model, np.int32(0), tokens, no_padding, None, None), (everyone, None), state)

        def decode() -> float:
            # What is decoded into is given away.
            state = jax.block_until_ready(jax.tree.map(jnp.copy, begun))
            start = time.perf_counter()
            state = passes.decode(spec, (laid_out, tokens, corpus, None, None), (everyone, None), state)
            written = np.asarray(state.tokens)
            if not (written >= 0).all():
                raise Failed("decoding: logits are not finite")
            return time.perf_counter() - start

        decode()
        # The first token is prefill's.
        step = float(np.median([decode() for _ in range(self.sizes.repeats)])) / (new - 1)
        # A step takes one row of the embedding for each prompt.
        read = tree_nbytes(model) - tree_nbytes(model.shared["embed"])
        return Measurement(
            "decoding", prompts_name(prompts), models.workload(f"{new} new tokens after {PROMPT}"),
            {
                "new tokens of each": new, "tokens/s": prompts / step, "ms a step": 1000 * step,
                "weights, GB/s": read / step / 1e9, "share of the addition's GB/s": read / step / self.copy,
            },
        )  # fmt: skip

    def searching(self, name: str) -> Measurement:
        mode, strategy, _ = SEARCHES[name]
        models, target, sizes = self.models, self.models.problem.target, self.sizes
        problem = problem_for(
            self.folder, PARENTS, "ties", mode, target, 1, models.problem.facts.compute_dtype, strategy=strategy,
            population=1 if strategy == GRADIENT_STRATEGY else sizes.population, generations=sizes.generations + 1,
        )  # fmt: skip
        prepared, storage, ends = problem.prepare(), Storage(), [time.perf_counter()]
        population = problem.strategy.population
        on = problem.backend.evaluators(models.bank, prepared, population, ONE_DEVICE, lambda line: None)

        class Clock(Reporter):
            def finished(self, generation: Any) -> None:
                ends.append(time.perf_counter())

        evolve(problem, on, storage, Clock())
        first, _, *others = np.diff(ends)
        (batched,), seconds = on.search.evaluator.evaluator.batched_tasks, float(np.median(others))
        evaluated = float(np.median([row["seconds"] for row in storage.read_timing()[1:]]))
        rows = batched.requests.scored or batched.requests.prompts
        planned = make_plan(problem, prepared)
        workload = models.workload(f"{population} candidates of {len(rows)} examples")
        return Measurement(
            "a generation", name, workload,
            {
                "candidates": population, "examples": len(rows), "s": seconds, "s/candidate": seconds / population,
                BOUNDED: evaluated / planned.generation.seconds, "the first, with compiling, s": float(first),
            },
        )  # fmt: skip


def measure(target: Target, sizes: Sizes, budget: Budget) -> Benchmark:
    """The measurements that a budget of time has room for, a generation first. Rows that need the stored model come
    after those that need the bank, whose place it takes."""
    with tempfile.TemporaryDirectory() as folder:
        shape, problem = open_problem(Path(folder), target, sizes)
        shapes = tensor_shapes(problem.backend.models.decoder).values()
        parameters, dtype = sum(int(np.prod(one)) for one in shapes), problem.facts.compute_dtype
        benchmark = Benchmark(
            shape, parameters, dtype, copy_bandwidth(budget.references), matrix_peak(dtype, budget.references)
        )  # fmt: skip
        measurer = Measurer(Models(problem), Path(folder), sizes, benchmark.copy_bandwidth, benchmark.matrix_peak)
        runs: dict[str, Callable[[], Measurement]] = {
            **{name: partial(measurer.searching, name) for name in SEARCHES},
            MERGED: partial(measurer.scoring, True),
            STORED: partial(measurer.scoring, False),
            **{prompts_name(count): partial(measurer.decoding, count) for count in sizes.prompts},
            **{method: partial(measurer.merging, method) for method in METHODS},
        }
        for name, run in runs.items():
            benchmark.rows.extend(budget.row(name, run))
        benchmark.left_out = budget.left_out
        return benchmark


def timings_of(benchmark: Benchmark) -> list[Timing]:
    """The measured factors of each kind of work, for later plans."""
    nbytes = benchmark.parameters * np.dtype(jnp.dtype(benchmark.dtype)).itemsize * (1 + PARENTS)
    return [
        timing(SEARCHES[row.name][2], row.figures[BOUNDED], nbytes, "bench")
        for row in benchmark.rows
        if row.name in SEARCHES
    ]
