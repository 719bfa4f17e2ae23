"""Successive halving over examples: poor candidates stop early.

The search split is divided into equal shards of examples. In the first rung of a generation all candidates are
evaluated on one shard; the better half is evaluated on as many examples again, and so forth: each rung doubles the
examples and halves the candidates, and the last few are evaluated on all of them. Candidates are compared by their
predicted fitness on all examples (search.surrogate). The shards take turns at being first: none counts more than
another in the long run, and a search cannot overfit to the first shard. With one shard every candidate is evaluated on
everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import ScoredTask, Scores, TaskScores, fitness, means, task_weights
from evojax_merge.search.protocols import GenomeEvaluator, Progress
from evojax_merge.search.surrogate import HISTORY, SurrogateData, append_candidates, empty_surrogate, predict_fitness
from evojax_merge.tasks.task import Task


def example_lengths(task: Task, tokenizer: Any, context: int) -> np.ndarray:
    """How many tokens each example's requests have, int[N]."""
    requests, found = task.requests(tokenizer, context), np.zeros(task.size, int)
    for row in (*requests.scored, *requests.prompts):
        found[row.example] += len(row.tokens)
    return found


class SplittableTask(ScoredTask, Protocol):
    def subset(self, examples: Sequence[int]) -> Any:
        """The same task on some of its examples."""
        ...


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
    """The tasks' examples in so many parts, stratified by task and by length. The same for a seed. Tasks of weight 0
    are not divided."""
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
    """On how many shards a candidate has been evaluated after each rung."""
    return [2**rung for rung in range(shards.bit_length())]


def rung_size(population: int, rung: int) -> int:
    """How many candidates a rung has."""
    return -(-population // 2**rung)


def shard_order(shards: int, seed: int, generation: int) -> list[int]:
    """The order in which a generation takes the shards. In `shards` generations each of them is first once."""
    order = np.random.default_rng([seed, shards, generation // shards]).permutation(shards)
    return np.roll(order, -(generation % shards)).tolist()


@dataclass(frozen=True)
class HalvingResult:
    """What a generation of P candidates showed. fitness: float64[P], on the examples that each one was evaluated on,
    NaN where it failed; examples: int[P], how many those are; complete: bool[P], who was evaluated on all. scores: the
    matrix of all examples, in the shards' order; its `predicted` is the fitness on all examples, predicted for those
    that are not complete. scores_of_best: the best one's, `task/metric` -> mean. first: everyone's scores on the first
    shard. surrogate: the data for the next generation's predictions."""

    fitness: np.ndarray
    examples: np.ndarray
    complete: np.ndarray
    scores: Scores
    scores_of_best: dict[str, float]
    first: TaskScores
    surrogate: SurrogateData


@dataclass(frozen=True)
class PartialScores:
    """Scores of candidates on some of the examples. numbers: int[S], which candidates; the rest as `predict_fitness`
    takes it: contributions: float32[S, M]; evaluated: int[M]; counts: float[M]."""

    numbers: np.ndarray
    contributions: np.ndarray
    evaluated: np.ndarray
    counts: np.ndarray


def init_surrogate(shards: Sequence[GenomeEvaluator], dims: int) -> SurrogateData:
    """The surrogate's data before the first generation. With one shard nothing is ever predicted or kept."""
    examples = sum(task.size for shard in shards for task, _ in task_weights(shard.tasks))
    return empty_surrogate(HISTORY if len(shards) > 1 else 1, dims, examples)


def successive_halving(
    shards: Sequence[GenomeEvaluator],
    order: Sequence[int],
    genomes: np.ndarray,
    surrogate: SurrogateData,
    progress: Progress = lambda done: None,
) -> HalvingResult:
    """Evaluate genomes `float32[P, D]` by successive halving over shards of examples, which are taken in `order`."""
    population, tasks = len(genomes), shards[0].tasks
    values, predicted, examples = np.full(population, np.nan), np.full(population, np.nan), np.zeros(population, int)
    matrix = empty_matrix(shards, population)
    evaluated: dict[int, TaskScores] = {}
    stopped: list[PartialScores] = []
    running, begin = np.arange(population), 0
    for rung, end in enumerate(rung_shards(len(shards))):
        for shard in order[begin:end]:
            evaluated[shard] = shards[shard].score(genomes[running], progress)
            enter_scores(matrix, shards, shard, running, evaluated[shard])
        if rung == 0:
            first = evaluated[order[0]]
        # In the shards' own order, so that a candidate's fitness does not depend on which one was first.
        joined = _joined([evaluated[shard] for shard in sorted(evaluated)])
        values[running] = fitness(tasks, joined)
        examples[running] = sum(task.size for shard in evaluated for task in shards[shard].tasks)
        part = _partial_scores(shards, evaluated, running)
        if end == len(shards):
            predicted[running] = values[running]
            if stopped:
                whole = np.isfinite(values[running])
                surrogate = append_candidates(surrogate, genomes[running[whole]], part.contributions[whole])
            break
        predicted[running] = np.where(np.isfinite(values[running]), _predicted(surrogate, genomes, part), np.nan)
        best = _best(predicted[running], rung_size(population, rung + 1))
        if not best.size:
            break
        left = np.setdiff1d(np.arange(len(running)), best)
        stopped.append(PartialScores(running[left], part.contributions[left], part.evaluated, part.counts))
        running, evaluated, begin = (
            running[best],
            {shard: _rows(scores, best) for shard, scores in evaluated.items()},
            end,
        )
    complete = np.isfinite(values) & (examples == sum(task.size for shard in shards for task in shard.tasks))
    # Those that were evaluated on everything tell most of their own generation.
    for group in stopped:
        there = np.isfinite(values[group.numbers])
        predicted[group.numbers] = np.where(there, _predicted(surrogate, genomes, group), np.nan)
    leader = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)[running]))
    matrix = replace(matrix, predicted=predicted)
    return HalvingResult(values, examples, complete, matrix, means(tasks, joined)[leader], first, surrogate)


def empty_matrix(shards: Sequence[GenomeEvaluator], population: int) -> Scores:
    """The score matrix before anything was evaluated: the examples shard by shard, in each task by task."""
    weighted = task_weights(shards[0].tasks)
    sizes = [[task.size for task, _ in task_weights(shard.tasks)] for shard in shards]
    task_of = np.concatenate([np.repeat(np.arange(len(weighted)), size) for size in sizes])
    shape = (population, len(task_of))
    names, shares = tuple(task.name for task, _ in weighted), np.array([share for _, share in weighted])
    return Scores(np.full(shape, np.nan, np.float32), np.zeros(shape, bool), task_of, names, shares)


def enter_scores(
    matrix: Scores, shards: Sequence[GenomeEvaluator], shard: int, numbers: np.ndarray, scores: TaskScores
) -> None:
    """Enter what the candidates `numbers: int[S]` scored on a shard."""
    counts = [sum(task.size for task, _ in task_weights(one.tasks)) for one in shards]
    columns = slice(sum(counts[:shard]), sum(counts[: shard + 1]))
    rows = [scores.matrices[task.name][task.metric] for task, _ in task_weights(shards[shard].tasks)]
    matrix.values[numbers, columns] = np.concatenate(rows, axis=1)
    matrix.evaluated[numbers, columns] = True


def _partial_scores(
    shards: Sequence[GenomeEvaluator], evaluated: dict[int, TaskScores], numbers: np.ndarray
) -> PartialScores:
    """The candidates `numbers`, whose scores on some shards these are. Examples are numbered shard by shard."""
    sizes = [{task.name: task.size for task, _ in task_weights(shard.tasks)} for shard in shards]
    total = {name: sum(size[name] for size in sizes) for name in sizes[0]}
    done = {name: sum(sizes[shard][name] for shard in evaluated) for name in total}
    begins = np.cumsum([0, *(sum(size.values()) for size in sizes)])
    contributions, places, counts = [], [], []
    for shard in sorted(evaluated):
        places.append(np.arange(begins[shard], begins[shard + 1]))
        for task, share in task_weights(shards[shard].tasks):
            contributions.append(share / total[task.name] * evaluated[shard].matrices[task.name][task.metric])
            counts.append(np.full(task.size, total[task.name] / done[task.name]))
    return PartialScores(numbers, np.concatenate(contributions, axis=1), np.concatenate(places), np.concatenate(counts))


def _predicted(surrogate: SurrogateData, genomes: np.ndarray, group: PartialScores) -> np.ndarray:
    return predict_fitness(surrogate, genomes[group.numbers], group.contributions, group.evaluated, group.counts)


def halving_passes(shards: Sequence[GenomeEvaluator], order: Sequence[int], population: int) -> int:
    """How many steps of progress a generation reports where no candidate fails."""
    ends = rung_shards(len(shards))
    return sum(
        shards[shard].passes(rung_size(population, rung))
        for rung, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        for shard in order[begin:end]
    )


def describe_rungs(shards: Sequence[GenomeEvaluator], population: int) -> str:
    """One line: how many candidates of a generation are evaluated on how many examples."""
    sizes = np.cumsum([sum(task.size for task in shard.tasks) for shard in shards])
    rungs = [f"{rung_size(population, r)} on {sizes[end - 1]}" for r, end in enumerate(rung_shards(len(shards)))]
    return f"successive halving: {', '.join(rungs)} examples"


def describe_halving(history: Sequence[dict[str, Any]], examples: int) -> str:
    """One line: what successive halving saved over a run's history of evaluating every candidate on all `examples`."""
    done = sum(sum(row["examples"]) for row in history)
    total = sum(len(row["examples"]) for row in history) * examples
    saved = f"{1 - done / total:.0%} saved"
    return f"successive halving: {done:,} of {total:,} passes of a candidate over an example ({saved})"


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """The numbers of the `count` best candidates, in their own order; fewer where fewer are finite."""
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")[:count]
    return np.sort(order[np.isfinite(values[order])])


def _joined(parts: Sequence[TaskScores]) -> TaskScores:
    """The scores of the same candidates on several shards, side by side."""

    def joined(task: str, metric: str) -> np.ndarray:
        return np.concatenate([part.matrices[task][metric] for part in parts], axis=1)

    first = parts[0].matrices
    return TaskScores({task: {metric: joined(task, metric) for metric in first[task]} for task in first})


def _rows(scores: TaskScores, candidates: np.ndarray) -> TaskScores:
    return TaskScores(
        {
            task: {metric: matrix[candidates] for metric, matrix in metrics.items()}
            for task, metrics in scores.matrices.items()
        }
    )
