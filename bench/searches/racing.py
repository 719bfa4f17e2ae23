"""The passes that successive halving saves, and the winners that it finds, over ten seeds (30 minutes).

    python -m bench racing

For each seed six searches of the demo family's merge: every candidate on every example (*whole*); a race in four rungs,
for as many generations; a longer race, for as many generations as 40% of the passes allow (one pass: one candidate on
one example); both again with examples that an item response model chooses (*chosen*, *longer chosen*), which take as
many passes; and *fewer*, without a race, as many generations as the first race's passes allow. The winners meet on the
whole search split and on the held-out one. A choice is called equal where the winner's mean on the
search split is at most one paired standard error below that of the whole search: the standard error of the mean over
examples of the difference between the two.

What is to be expected of two equally good searches is seen beside it: in how many pairs of seeds the one's whole search
chose equally to the other's.

How well a race ranks is seen generation by generation on the populations of the whole search: whether its
best is the best of all on all examples, and the rank correlation within the upper half, which is what recombination
weighs; with shards that take turns, and with chosen examples. Beside it: every candidate on the same random part of the
examples, as many passes in all, by their means.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.shared.machine import describe
from evojax_merge.evaluation.scores import ScoredTask, TaskScores
from evojax_merge.problem import SearchProblem, build_problem, read_config
from evojax_merge.search.example_choice import ExampleChoice, choose_examples, length_strata
from evojax_merge.search.loop import Archive, evolve
from evojax_merge.search.protocols import GenomeEvaluator, Progress, State
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.search.successive_halving import (
    ExampleOrder,
    HalvingResult,
    SplittableTask,
    example_lengths,
    init_surrogate,
    order_shards,
    rung_shards,
    rung_size,
    shard_order,
    stratified_shards,
    successive_halving,
)
from evojax_merge.search.surrogate import SurrogateData
from evojax_merge.steps.selection import open_evaluators, rescore
from evojax_merge.tasks.splits import Splits
from evojax_merge.tasks.task import Task
from evojax_merge.tasks.text import TextTask

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
SHOWN = "whole_answers/accuracy"
# The share of the passes without a race that the longer race may take.
SPENT = 0.4
SEARCHES = ("whole", "race", "chosen", "longer race", "longer chosen", "fewer")


@dataclass(frozen=True)
class Choice:
    """A search's winner: its scores on each example of the search split and of the held-out one (`float32[N]`), its
    held-out exact match; and what it took to find it: passes, and seconds in which generations were scored, the first
    (which compiles) not counted."""

    searched: np.ndarray
    heldout: np.ndarray
    accuracy: float
    passes: int
    seconds: float


@dataclass(frozen=True)
class Ranking:
    """One generation's ranks, compared with those on all examples."""

    best: bool
    upper_half: float


# How: a ranking for each generation.
Rankings = dict[str, list[Ranking]]


@dataclass(frozen=True)
class Recorded:
    """An evaluator that keeps what it found: genomes `float32[P, D]` and scores `float32[P, N]`, each time."""

    evaluator: GenomeEvaluator
    found: list[tuple[np.ndarray, np.ndarray]]

    @property
    def tasks(self) -> Sequence[ScoredTask]:
        return self.evaluator.tasks

    def passes(self, population: int) -> int:
        return self.evaluator.passes(population)

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        scores = self.evaluator.score(genomes, progress)
        self.found.append((genomes, matrix_of(self, scores)))
        return scores


@dataclass(frozen=True)
class Replayed:
    """A block of a population's known score matrix `float32[P, N]`, the scores of one task."""

    tasks: Sequence[SplittableTask]
    genomes: np.ndarray
    matrix: np.ndarray

    def passes(self, population: int) -> int:
        return population

    def subset(self, examples: Sequence[np.ndarray]) -> "Replayed":
        (task,), (own,) = self.tasks, examples
        return Replayed([task.subset(own.tolist())], self.genomes, self.matrix[:, own])

    def score(self, genomes: np.ndarray, progress: Progress = lambda done: None) -> TaskScores:
        (task,) = self.tasks
        numbers = (self.genomes[None] == genomes[:, None]).all(axis=-1).argmax(axis=1)
        return TaskScores({task.name: {task.metric: self.matrix[numbers]}})


def halve(
    order: ExampleOrder, genomes: np.ndarray, data: SurrogateData, progress: Progress = lambda done: None
) -> HalvingResult:
    """Evaluate genomes by successive halving (see `successive_halving`)."""
    halving, scores = successive_halving(order, genomes, data), None
    while True:
        try:
            evaluator, asked = halving.send(scores)
        except StopIteration as end:
            halved: HalvingResult = end.value
            return halved
        scores = evaluator.score(asked, progress)


def matrix_of(evaluator: GenomeEvaluator, scores: TaskScores) -> np.ndarray:
    """float32[P, N] of the one task that is the fitness."""
    (task,) = (task for task in evaluator.tasks if task.weight > 0)
    return scores.matrices[task.name][task.metric]


class Kept(Storage):
    """A search in memory that can be gone on with."""

    def __init__(self) -> None:
        super().__init__()
        self._state: State = None

    def restore(self, like: State, log: Callable[[str], None]) -> tuple[State, int]:
        return (like, 0) if self._state is None else (self._state, len(self.read_history()))

    def save(self, generation: int, state: State, row: dict[str, Any], timing: dict[str, Any]) -> None:
        super().save(generation, state, row, timing)
        self._state = state


def search(
    problem: SearchProblem, seed: int, on: Splits[Any], storage: Kept, generations: int
) -> tuple[Archive, int, float]:
    """Search, or go on with one. (archive, passes, seconds)"""
    settings = problem.search.model_copy(update={"generations": generations})
    archive = evolve(replace(problem, search=settings, seed=seed), on, storage, Reporter())
    passes = sum(sum(row["examples"]) for row in storage.read_history())
    return archive, passes, sum(row["seconds"] for row in storage.read_timing()[1:])


def choose(
    problem: SearchProblem, found: tuple[Archive, int, float], full: GenomeEvaluator, heldout: GenomeEvaluator
) -> Choice:
    """The winner as the program chooses it: the best finalist on the whole search split."""
    archive, passes, seconds = found
    winner = rescore(problem.space, full, archive, lambda done: None)[0].genome[None]
    there = heldout.score(winner)
    task, metric = SHOWN.split("/")
    return Choice(
        matrix_of(full, full.score(winner))[0],
        matrix_of(heldout, there)[0],
        float(there.matrices[task][metric].mean()),
        passes,
        seconds,
    )


def compare(predicted: np.ndarray, truth: np.ndarray) -> Ranking:
    """standing, truth: float[P], higher is better."""
    order = np.argsort(-truth, kind="stable")
    half = order[: len(order) // 2]
    ranks = np.argsort(np.argsort(-predicted[half], kind="stable"))
    return Ranking(bool(np.argmax(predicted) == order[0]), float(np.corrcoef(ranks, np.arange(len(half)))[0, 1]))


def rank(
    found: Sequence[tuple[np.ndarray, np.ndarray]], task: TextTask, shards: Sequence[TextTask],
    strata: Sequence[np.ndarray], seed: int,
) -> Rankings:  # fmt: skip
    """The ranks that races give in each generation, and those of an even split of as many passes."""
    rankings: Rankings = {"race": [], "chosen": [], "even": []}
    place = {example: i for i, example in enumerate(task.examples)}
    columns = [[place[example] for example in shard.examples] for shard in shards]
    known = dict.fromkeys(("race", "chosen"), None)
    for generation, (genomes, matrix) in enumerate(found):
        truth = matrix.mean(axis=1, dtype=np.float64)
        replayed = [Replayed([shard], genomes, matrix[:, part]) for shard, part in zip(shards, columns, strict=True)]
        choice = ExampleChoice(Replayed([task], genomes, matrix), [strata], len(shards))
        for name in known:
            data = known[name] or init_surrogate(replayed, genomes.shape[1])
            order = (
                order_shards(replayed, shard_order(len(shards), seed, generation))
                if name == "race"
                else choose_examples(choice, data, seed, generation)
            )
            result = halve(order, genomes, data)
            known[name] = result.surrogate
            rankings[name].append(compare(result.scores.fitness, truth))
        share = int(result.examples.sum()) // len(matrix)
        part = np.random.default_rng([seed, generation]).permutation(task.size)[:share]
        rankings["even"].append(compare(matrix[:, part].mean(axis=1, dtype=np.float64), truth))
    return rankings


def run_seed(
    problem: SearchProblem, seed: int, rungs: int, wanted: Sequence[str]
) -> tuple[dict[str, Choice], Rankings | None]:
    """The wanted searches of a seed, and how races rank the populations of the one without, where it is wanted."""
    generations = problem.search.generations

    def lengths(task: Task) -> np.ndarray:
        return example_lengths(task, problem.backend.models.tokenizer, problem.backend.models.context)

    shards = stratified_shards("rungs", problem.splits.search, lengths, rungs, seed)
    (counted,) = (task for task in problem.splits.search if task.weight > 0)
    strata = length_strata(lengths(counted), len(shards))
    halved = replace(problem, splits=replace(problem.splits, shards=shards, choice=[counted]), strata=[strata])
    on_halves, on = (open_evaluators(one, one.prepare()) for one in (halved, problem))
    (searched,), full, heldout = on.shards, on.search, on.heldout
    kept = Recorded(searched, [])
    choices: dict[str, Choice] = {}
    (task,) = searched.tasks
    assert isinstance(task, TextTask)
    passes = generations * problem.strategy.population * task.size
    for name, racing in (("race", replace(on_halves, choice=None)), ("chosen", on_halves)):
        if name in wanted or f"longer {name}" in wanted:
            storage = Kept()
            outcome = search(halved, seed, racing, storage, generations)
            choices[name] = choose(problem, outcome, full, heldout)
        if f"longer {name}" in wanted:
            more = max(generations, int(SPENT * generations * passes / outcome[1]))
            outcome = search(halved, seed, racing, storage, more)
            choices[f"longer {name}"] = choose(problem, outcome, full, heldout)
    whole: Splits[Any] = Splits([kept], full, None, heldout)
    storage, share = Kept(), race_share(problem.strategy.population, rungs)
    for name, until in (("fewer", max(1, round(share * generations))), ("whole", generations)):
        if name in wanted:
            outcome = search(problem, seed, whole, storage, until)
            choices[name] = choose(problem, outcome, full, heldout)
    choices = {name: choices[name] for name in wanted}
    if "whole" not in wanted:
        return choices, None
    parts = [part for shard in shards for part in shard if part.weight > 0 and isinstance(part, TextTask)]
    return choices, rank(kept.found, task, parts, strata, seed)


def race_share(population: int, rungs: int) -> float:
    """The share of a generation's passes that a race takes."""
    ends = [0, *rung_shards(2 ** (rungs - 1))]
    asked = sum(rung_size(population, rung) * (end - begin) for rung, (begin, end) in enumerate(pairwise(ends)))
    return asked / (population * ends[-1])


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean over examples of one minus the other, and its standard error."""
    paired = one.astype(np.float64) - other
    return float(paired.mean()), float(paired.std(ddof=1) / np.sqrt(paired.size))


def is_equal(choice: Choice, other: Choice) -> bool:
    mean, error = difference(choice.searched, other.searched)
    return mean >= -error


def rows(seed: int, choices: dict[str, Choice]) -> list[str]:
    """One line for each search, against the first."""
    first, lines = next(iter(choices.values())), []
    for name, choice in choices.items():
        cells = [f"{1 - choice.passes / first.passes:.0%}", f"{1 - choice.seconds / first.seconds:.0%}"]
        for split in ("searched", "heldout"):
            own, other = getattr(choice, split), getattr(first, split)
            mean, error = difference(own, other)
            cells.append(f"{own.mean():.3f}" if choice is first else f"{mean:+.3f} ± {error:.3f}")
        cells += [f"{choice.accuracy:.0%}", "" if choice is first else "yes" if is_equal(choice, first) else "no"]
        lines.append(f"| {seed} | {name} | " + " | ".join(cells) + " |")
    return lines


def table(results: dict[int, dict[str, Choice]]) -> str:
    head = ["seed", "search", "passes saved", "time saved", "search split", "held out", "exact match", "equal"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    return "\n".join([*lines, *(line for seed, choices in results.items() for line in rows(seed, choices))])


def summary(results: dict[int, dict[str, Choice]]) -> str:
    """Over all seeds, each search against the first."""
    first, *others = next(iter(results.values()))
    lines = []
    for name in others:
        equal = sum(is_equal(choices[name], choices[first]) for choices in results.values())
        shown = []
        for split in ("searched", "heldout"):
            gaps = [difference(getattr(c[name], split), getattr(c[first], split))[0] for c in results.values()]
            error = np.std(gaps, ddof=1) / np.sqrt(len(gaps)) if len(gaps) > 1 else np.nan
            shown.append(f"{split} {np.mean(gaps):+.4f} ± {error:.4f}")
        accuracy = np.mean([choices[name].accuracy for choices in results.values()])
        lines.append(f"{name}: equal in {equal} of {len(results)}; mean {', '.join(shown)}; exact match {accuracy:.1%}")
    own = [choices[first] for choices in results.values()]
    pairs = [is_equal(one, other) for one in own for other in own if one is not other]
    means = [np.mean([getattr(choice, split).mean() for choice in own]) for split in ("searched", "heldout")]
    lines.append(f"{first}, another seed: equal in {sum(pairs)} of {len(pairs)}")
    lines.append(
        f"{first}: mean searched {means[0]:.4f}, heldout {means[1]:.4f}; exact match "
        f"{np.mean([choice.accuracy for choice in own]):.1%}"
    )
    return "\n".join(lines)


def ranking_table(rankings: Sequence[Rankings]) -> str:
    """Over all seeds, by thirds of the search."""
    lines = [
        "| generations | race: best is the best | race: upper half, rank correlation | chosen: best "
        "| chosen: upper half | even: best | even: upper half |",
        "| --- |" + " ---: |" * 6,
    ]
    generations = len(rankings[0]["race"])
    edges = [0, generations // 3, 2 * generations // 3, generations]
    for begin, end in [*pairwise(edges), (0, generations)]:
        cells = []
        for name in ("race", "chosen", "even"):
            part = [one for ranking in rankings for one in ranking[name][begin:end]]
            cells += [f"{np.mean([one.best for one in part]):.0%}", f"{np.mean([one.upper_half for one in part]):.2f}"]
        lines.append(f"| {begin + 1} to {end} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The passes that successive halving saves, and its winners.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--rungs", type=int, default=4)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=SEARCHES, help="the first is compared with")
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    problem = build_problem(CONFIG, read_config(CONFIG, [f"search.generations={arguments.generations}"], 0))
    results: dict[int, dict[str, Choice]] = {}
    rankings: list[Rankings] = []
    for seed in range(arguments.seeds):
        results[seed], ranking = run_seed(problem, seed, arguments.rungs, arguments.searches)
        rankings += [] if ranking is None else [ranking]
        print("\n".join(rows(seed, results[seed])), flush=True)
    print(f"\n{arguments.rungs} rungs, {arguments.generations} generations; {describe()}\n")
    print(f"{table(results)}\n\n{summary(results)}")
    if rankings:
        print(f"\n{ranking_table(rankings)}")


if __name__ == "__main__":
    main()
