"""The generation loop: ask, evaluate, tell, save. May import every room but report and cli.

A run is a function of its config: every generation draws from a key that depends on the seed and the generation
alone, and the state after each generation is saved, so that a run that was killed and resumed writes the same
history and finds the same winner as one that was not.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from evojax_merge.config import SearchConfig
from evojax_merge.evaluation.evaluator import fitness, means
from evojax_merge.evaluation.signals import warnings
from evojax_merge.search.run_folder import Checkpoints, RunFolder, append_line, truncate_lines
from evojax_merge.search.scorers import Scorer, Space
from evojax_merge.search.strategy import Strategy, default_population, make_strategy


@dataclass(frozen=True)
class Generation:
    """What one generation showed; `seconds` is how long its evaluation took."""

    number: int
    best: float | None
    mean: float | None
    sigma: float
    best_so_far: float | None
    failed: int
    seconds: float
    population: int


@dataclass(frozen=True)
class Outcome:
    """The best genomes of a search, best first: float32[A, D], and the mean of the final distribution."""

    genomes: np.ndarray
    fitness: np.ndarray
    mean: np.ndarray


class Reporter:
    """Told of progress; the command line draws it. Every method may be left as it is."""

    def evaluating(self, generation: int, passes: int) -> None: ...
    def advanced(self, passes: int) -> None: ...
    def finished(self, generation: Generation) -> None: ...
    def said(self, text: str) -> None: ...


def run_search(
    config: SearchConfig, seed: int, space: Space, scorer: Scorer, folder: RunFolder, reporter: Reporter
) -> Outcome:
    """Search from where the run folder stands (its start, or its last saved generation) to the config's end."""
    population = config.population or default_population(space.dims)
    strategy = make_strategy(space.dims, population, config.sigma, seed)
    reporter.said(
        f"{strategy.name}: {space.dims} dimensions, population {population}, {config.generations} generations"
    )
    checkpoints = Checkpoints(folder)
    try:
        state = _fresh_state(strategy, space.start, config.finalists)
        first = checkpoints.latest()
        if first is not None:
            state = checkpoints.load(first, state)
        for path in (folder.history, folder.timing):
            truncate_lines(path, first or 0)
        for number in range(first or 0, config.generations):
            genomes, asked = strategy.ask(state["strategy"], number)
            reporter.evaluating(number, scorer.passes(population))
            started = time.perf_counter()
            scores = scorer.score(np.asarray(genomes), reporter.advanced)
            seconds = time.perf_counter() - started
            values = fitness(scorer.tasks, scores)
            if number == 0:
                for line in warnings(scorer.tasks, scores):
                    reporter.said(line)
            state = _next_state(strategy, asked, number, genomes, values, state)
            row = _history_row(number, values, state, means(scorer.tasks, scores))
            append_line(folder.history, row)
            append_line(
                folder.timing,
                {"generation": number, "seconds": seconds, "seconds_per_candidate": seconds / population},
            )
            checkpoints.save(number + 1, state)
            reporter.finished(
                Generation(
                    number=number,
                    best=row["best"],
                    mean=row["mean"],
                    sigma=row["sigma"],
                    best_so_far=row["best_so_far"],
                    failed=row["failed"],
                    seconds=seconds,
                    population=population,
                )
            )
    finally:
        checkpoints.close()
    return _outcome(state)


def _fresh_state(strategy: Strategy, start: np.ndarray, archive: int) -> dict[str, Any]:
    return {
        "strategy": strategy.init(start),
        "genomes": np.zeros((archive, start.size), np.float32),
        "fitness": np.full(archive, -np.inf),
    }


def _next_state(
    strategy: Strategy, asked: Any, number: int, genomes: jax.Array, values: np.ndarray, state: dict[str, Any]
) -> dict[str, Any]:
    every = np.concatenate([state["fitness"], np.where(np.isfinite(values), values, -np.inf)])
    # Stable: of equals, the one that was found first stays.
    best = np.argsort(-every, kind="stable")[: len(state["fitness"])]
    return {
        "strategy": strategy.tell(asked, number, genomes, values),
        "genomes": np.concatenate([state["genomes"], np.asarray(genomes)])[best],
        "fitness": every[best],
    }


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def _history_row(
    number: int, values: np.ndarray, state: dict[str, Any], scores: list[dict[str, float]]
) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    best = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
    return {
        "generation": number,
        "best": _number(finite.max()) if finite.size else None,
        "mean": _number(finite.mean()) if finite.size else None,
        "worst": _number(finite.min()) if finite.size else None,
        "best_so_far": _number(state["fitness"][0]),
        "sigma": float(state["strategy"].std),
        "evaluations": (number + 1) * len(values),
        "failed": int(len(values) - finite.size),
        "scores_of_best": {name: _number(value) for name, value in scores[best].items()},
        "fitness": [_number(value) for value in values],
    }


def _outcome(state: dict[str, Any]) -> Outcome:
    found = np.isfinite(state["fitness"])
    return Outcome(
        np.asarray(state["genomes"])[found], np.asarray(state["fitness"])[found],
        np.asarray(state["strategy"].mean, np.float32),
    )  # fmt: skip


@dataclass(frozen=True)
class Finalist:
    """A candidate that was re-scored on the full search split."""

    genome: np.ndarray
    fitness: float


def rescore(space: Space, scorer: Scorer, outcome: Outcome, progress: Any) -> list[Finalist]:
    """The finalists (the best few of the search, the mean of its last distribution, the start) on the full search
    split, best first. Candidates that are not finite are left out."""
    genomes = np.concatenate([outcome.genomes, outcome.mean[None], space.start[None]])
    genomes = genomes[np.isfinite(genomes).all(axis=1)]
    _, kept = np.unique(genomes, axis=0, return_index=True)
    genomes = genomes[np.sort(kept)]
    values = fitness(scorer.tasks, scorer.score(genomes, progress))
    order = np.argsort(-np.where(np.isfinite(values), values, -np.inf), kind="stable")
    return [Finalist(genomes[i], float(values[i])) for i in order if np.isfinite(values[i])]
