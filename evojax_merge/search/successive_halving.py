"""Successive halving over examples: poor candidates stop early.

The search split is divided into equal shards of examples. In the first rung of a generation all candidates are
evaluated on one shard; the better half is evaluated on as many examples again, and so forth: each rung doubles the
examples and halves the candidates, and the last few are evaluated on all of them. Candidates are compared by their
predicted fitness on all examples (search.surrogate). The shards take turns at being first: none counts more than
another in the long run, and a search cannot overfit to the first shard. With one shard every candidate is evaluated on
everything. Instead of shards that take turns, examples can be chosen for each generation (search.example_choice).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores, TaskScores, means, ranked_fitness, task_weights
from evojax_merge.search.protocols import GenomeEvaluator, goal_of
from evojax_merge.search.surrogate import HISTORY, SurrogateData, append_candidates, empty_surrogate, predict_fitness
from evojax_merge.tasks.task import SplittableTask, Task


def example_lengths(task: Task, tokenizer: Any, context: int) -> np.ndarray:
    """The number of tokens of each example's requests, int[N]."""
    requests, lengths = task.requests(tokenizer, context), np.zeros(task.size, int)
    for row in requests.rows:
        lengths[row.example] += len(row.tokens)
    return lengths


T = TypeVar("T", bound=SplittableTask)


def stratified_shards(
    where: str, tasks: Sequence[T], length: Callable[[T], np.ndarray], rungs: int, seed: int
) -> list[list[T]]:
    """The tasks' examples in 2^(rungs - 1) shards (see `stratified_parts`); fewer where a task has fewer examples.
    Raises InputError where a task has not enough examples for two shards."""
    least = min((task for task in tasks if task.weight > 0), key=lambda task: task.size)
    if rungs > 1 and least.size < 2:
        raise InputError(
            where, f"{rungs}; successive halving needs two examples or more, and {least.name} has one to search on"
        )
    return stratified_parts(tasks, length, 2 ** (min(rungs, least.size.bit_length()) - 1), seed)


def stratified_parts(tasks: Sequence[T], length: Callable[[T], np.ndarray], shards: int, seed: int) -> list[list[T]]:
    """The tasks' examples in so many parts, by the seed, stratified by task and length. Tasks of weight 0 are whole."""
    if shards == 1:
        return [list(tasks)]
    assigned = [
        assign_by_length(length(task), shards, np.random.default_rng([seed, i])) if task.weight > 0 else None
        for i, task in enumerate(tasks)
    ]
    return [
        [
            task if owner is None else task.subset(np.flatnonzero(owner == shard).tolist())
            for task, owner in zip(tasks, assigned, strict=True)
        ]
        for shard in range(shards)
    ]


def assign_by_length(example_lengths: np.ndarray, shards: int, rng: np.random.Generator) -> np.ndarray:
    """The shard of each example, int[N]. In order of length, each shard gets one of every `shards` examples, so that
    all shards fill batches of the same shapes."""
    owner = np.empty(len(example_lengths), int)
    # Shuffled first: the order of equals must not be the file's.
    shuffled = rng.permutation(len(example_lengths))
    order = shuffled[np.argsort(example_lengths[shuffled], kind="stable")]
    for begin in range(0, len(order), shards):
        part = order[begin : begin + shards]
        owner[part] = rng.permutation(shards)[: len(part)]
    return owner


def rung_shards(shards: int) -> list[int]:
    """The number of shards that a candidate has been evaluated on after each rung."""
    return [2**rung for rung in range(shards.bit_length())]


def rung_size(population: int, rung: int) -> int:
    """The number of candidates of a rung."""
    return -(-population // 2**rung)


def shard_order(shards: int, seed: int, generation: int) -> list[int]:
    """The order in which a generation takes the shards. In `shards` generations each of them is first once."""
    order = np.random.default_rng([seed, shards, generation // shards]).permutation(shards)
    return np.roll(order, -(generation % shards)).tolist()


@dataclass(frozen=True)
class Part:
    """Some of the examples. evaluator: scores genomes on them; numbers: for each task that counts, by its name, int[M],
    which of all N examples they are, ascending."""

    evaluator: GenomeEvaluator
    numbers: Mapping[str, np.ndarray]

    @property
    def size(self) -> int:
        return sum(task.size for task in self.evaluator.tasks)

    @property
    def columns(self) -> np.ndarray:
        """int[M]: the examples' numbers, task by task."""
        return np.concatenate([self.numbers[task.name] for task, _ in task_weights(self.evaluator.tasks)])

    def enter(self, scores: TaskScores, candidates: np.ndarray, matrix: Scores) -> None:
        """Enter the scores of the candidates with the numbers int[S] into the matrix of all."""
        tasks = [task for task, _ in task_weights(self.evaluator.tasks)]
        place = np.ix_(candidates, self.columns)
        matrix.values[place] = np.concatenate([scores.matrices[task.name][task.metric] for task in tasks], axis=1)
        matrix.evaluated[place] = True


@dataclass(frozen=True)
class ExampleOrder:
    """All N examples in parts, in the order in which the rungs of a generation take them. counts: float64[rungs, N],
    the number of examples of its task that each asked example stands for by the end of a rung: one over the probability
    with which it was to be asked by then."""

    parts: tuple[Part, ...]
    counts: np.ndarray


def shard_parts(shards: Sequence[GenomeEvaluator]) -> tuple[Part, ...]:
    """Shards as parts, which number the examples shard by shard, in each task by task."""
    parts, begin = [], 0
    for shard in shards:
        numbers = {}
        for task, _ in task_weights(shard.tasks):
            numbers[task.name] = np.arange(begin, begin + task.size)
            begin += task.size
        parts.append(Part(shard, numbers))
    return tuple(parts)


def order_shards(shards: Sequence[GenomeEvaluator], order: Sequence[int]) -> ExampleOrder:
    """The examples of shards that are taken in `order`. All examples of a task are equally likely to be asked."""
    parts = shard_parts(shards)
    ordered, ends = tuple(parts[number] for number in order), rung_shards(len(parts))
    counts = np.zeros((len(ends), sum(part.columns.size for part in parts)))
    for name in parts[0].numbers:
        everything = np.concatenate([part.numbers[name] for part in parts])
        for rung, end in enumerate(ends):
            counts[rung, everything] = everything.size / sum(part.numbers[name].size for part in ordered[:end])
    return ExampleOrder(ordered, counts)


@dataclass(frozen=True)
class HalvingResult:
    """The results of a generation of P candidates. fitness: float64[P], on the examples that each candidate was
    evaluated on, NaN where it failed; examples: int[P], their number; complete: bool[P], the candidates that were
    evaluated on all. scores: the matrix of all examples, by their numbers; its `predicted` is the fitness on all
    examples, predicted for candidates that are not complete. scores_of_best: the best candidate's, `task/metric` ->
    mean. first: everyone's scores on the first part. surrogate: the data for the next generation's predictions."""

    fitness: np.ndarray
    examples: np.ndarray
    complete: np.ndarray
    scores: Scores
    scores_of_best: dict[str, float]
    first: TaskScores
    surrogate: SurrogateData


def init_surrogate(shards: Sequence[GenomeEvaluator], dims: int) -> SurrogateData:
    """The surrogate's data before the first generation. With one shard nothing is ever predicted or kept."""
    examples = sum(task.size for shard in shards for task, _ in task_weights(shard.tasks))
    return empty_surrogate(HISTORY if len(shards) > 1 else 1, dims, examples)


# Yields what is to be scored: genomes, by an evaluator; and is sent their scores.
Halving = Generator[tuple[GenomeEvaluator, np.ndarray], Any, HalvingResult]


def successive_halving(order: ExampleOrder, genomes: np.ndarray, surrogate: SurrogateData) -> Halving:
    """Successive halving of genomes `float32[P, D]` over examples, which are taken in `order`."""
    parts, population, tasks = order.parts, len(genomes), order.parts[0].evaluator.tasks
    values, predicted, examples = np.full(population, np.nan), np.full(population, np.nan), np.zeros(population, int)
    matrix, goal = empty_matrix(parts, population), goal_of(parts[0].evaluator)
    # The share of each example in the fitness, float32[N].
    worth = (matrix.weights / np.bincount(matrix.task_of, minlength=len(matrix.weights)))[matrix.task_of]
    worth, offset = worth.astype(np.float32), goal.offset(tasks)

    def predict(candidates: np.ndarray, rung: int) -> None:
        """Predict the fitness on all examples of candidates that have been evaluated up to a rung."""
        shown = np.flatnonzero(matrix.evaluated[candidates[0]])
        contributions = np.take(matrix.values[candidates], shown, axis=1) * worth[shown]
        counts = order.counts[rung][shown]
        foreseen = predict_fitness(surrogate, genomes[candidates], contributions, shown, counts) - offset
        predicted[candidates] = np.where(np.isfinite(values[candidates]), foreseen, np.nan)

    evaluated: list[TaskScores] = []
    # The candidates that stop after each rung.
    stopped: list[np.ndarray] = []
    running, begin = np.arange(population), 0
    for rung, end in enumerate(rung_shards(len(parts))):
        for part in parts[begin:end]:
            evaluated.append((yield part.evaluator, genomes[running]))
            part.enter(evaluated[-1], running, matrix)
        if rung == 0:
            first = evaluated[0]
        joined = _joined(parts, evaluated)
        values[running] = ranked_fitness(tasks, joined, goal)
        examples[running] = sum(part.size for part in parts[:end])
        if end == len(parts):
            predicted[running] = values[running]
            if stopped:
                whole = running[np.isfinite(values[running])]
                surrogate = append_candidates(surrogate, genomes[whole], matrix.values[whole] * worth)
            break
        predict(running, rung)
        # The best, in their own order; fewer where fewer are finite.
        ranked = np.argsort(np.where(np.isfinite(predicted[running]), -predicted[running], np.inf), kind="stable")
        best = ranked[: rung_size(population, rung + 1)]
        best = np.sort(best[np.isfinite(predicted[running[best]])])
        if not best.size:
            break
        stopped.append(np.delete(running, best))
        running, evaluated, begin = running[best], [scores.candidates(best.tolist()) for scores in evaluated], end
    complete = np.isfinite(values) & (examples == sum(part.size for part in parts))
    # Candidates of this generation that were evaluated on everything predict its other candidates best.
    for rung, candidates in enumerate(stopped):
        if candidates.size:
            predict(candidates, rung)
    leader = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)[running]))
    matrix = replace(matrix, predicted=predicted)
    return HalvingResult(values, examples, complete, matrix, means(tasks, joined)[leader], first, surrogate)


def empty_matrix(parts: Sequence[Part], population: int) -> Scores:
    """The score matrix before anything was evaluated."""
    evaluator = parts[0].evaluator
    weighted = task_weights(evaluator.tasks, goal_of(evaluator))
    task_of = np.zeros(sum(part.columns.size for part in parts), int)
    for t, (task, _) in enumerate(weighted):
        for part in parts:
            task_of[part.numbers[task.name]] = t
    shape = (population, len(task_of))
    names, weights = tuple(task.name for task, _ in weighted), np.array([weight for _, weight in weighted])
    return Scores(np.full(shape, np.nan, np.float32), np.zeros(shape, bool), task_of, names, weights)


def rung_passes(shards: int, population: int, groups: int = 1) -> int:
    """The passes over a shard that each of so many groups of devices has in a generation where no candidate fails."""
    ends = rung_shards(shards)
    return sum(
        -(-rung_size(population, rung) // groups) * (end - begin)
        for rung, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
    )


def halving_passes(order: ExampleOrder, population: int) -> int:
    """The steps of progress that a generation reports where no candidate fails."""
    ends = rung_shards(len(order.parts))
    return sum(
        part.evaluator.passes(rung_size(population, rung))
        for rung, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        for part in order.parts[begin:end]
    )


def _joined(parts: Sequence[Part], evaluated: Sequence[TaskScores]) -> TaskScores:
    """The scores of the same candidates on the first parts, side by side in the order of the examples' numbers: a
    candidate's fitness on all of them does not depend on the order of the parts."""

    def joined(task: str, metric: str) -> np.ndarray:
        columns = np.concatenate([scores.matrices[task][metric] for scores in evaluated], axis=1)
        numbers = np.concatenate([part.numbers[task] for part, _ in zip(parts, evaluated, strict=False)])
        return np.take(columns, np.argsort(numbers), axis=1)

    first = evaluated[0].matrices
    return TaskScores({task: {metric: joined(task, metric) for metric in first[task]} for task in first})
