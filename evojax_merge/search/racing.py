"""Racing over examples: poor candidates stop early. May import errors, evaluation and tasks.

The search split is cut into equal blocks of examples. In the first rung of a generation all candidates meet one block;
the better half goes on, meets as many examples again, and so forth: each rung doubles the examples and halves the
candidates, and the last few have met all of them. Who is better is what each would score on all examples, as far as
those that it met tell (foresight). The blocks take turns at being first: none counts more than another in the long run,
and a search cannot learn the first block by heart. A race over one block is no race: all meet all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.evaluation.evaluator import Progress, Scores, fitness, means, shares
from evojax_merge.search.foresight import WINDOW, Known, foresee, nothing_known, remember
from evojax_merge.tasks.task import Task

if TYPE_CHECKING:
    from evojax_merge.search.scorers import Scorer


def lengths(task: Task, tokenizer: Any, context: int) -> np.ndarray:
    """How many tokens each example asks, int[N]."""
    asked, found = task.ask(tokenizer, context), np.zeros(task.size, int)
    for row in (*asked.scored, *asked.prompts):
        found[row.example] += len(row.tokens)
    return found


def cut(
    where: str, tasks: Sequence[Task], length: Callable[[Task], np.ndarray], rungs: int, seed: int
) -> list[list[Task]]:
    """The tasks' examples dealt to 2^(rungs - 1) blocks, each of which has its share of every task, and of its short
    and long examples; fewer where a task has fewer examples. The same for a seed. Tasks of weight 0 are left whole.
    Raises InputError where a task has not enough for two blocks."""
    if rungs == 1:
        return [list(tasks)]
    least = min((task for task in tasks if task.weight > 0), key=lambda task: task.size)
    if least.size < 2:
        raise InputError(where, f"{rungs}; a race needs two examples or more, and {least.name} has one to search on")
    blocks = 2 ** (min(rungs, least.size.bit_length()) - 1)
    dealt = [
        deal(length(task), blocks, np.random.default_rng([seed, i])) if task.weight > 0 else None
        for i, task in enumerate(tasks)
    ]
    return [
        [
            task if owner is None else task.part(np.flatnonzero(owner == block).tolist())
            for task, owner in zip(tasks, dealt, strict=True)
        ]
        for block in range(blocks)
    ]


def deal(lengths: np.ndarray, blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Which block each example goes to, int[N]. In order of length, each block gets one of every `blocks` examples: the
    blocks then fill batches of the same shapes."""
    owner = np.empty(len(lengths), int)
    # Shuffled first: the order of equals must not be the file's.
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    for begin in range(0, len(order), blocks):
        part = order[begin : begin + blocks]
        owner[part] = rng.permutation(blocks)[: len(part)]
    return owner


def rung_ends(blocks: int) -> list[int]:
    """How many blocks a candidate has met after each rung."""
    return [2**rung for rung in range(blocks.bit_length())]


def survivors(population: int, rung: int) -> int:
    """How many candidates take part in a rung."""
    return -(-population // 2**rung)


def turn(blocks: int, seed: int, generation: int) -> list[int]:
    """The order in which a generation meets the blocks. In `blocks` generations each of them is first once."""
    order = np.random.default_rng([seed, blocks, generation // blocks]).permutation(blocks)
    return np.roll(order, -(generation % blocks)).tolist()


@dataclass(frozen=True)
class Raced:
    """What a race showed of P candidates. fitness: float64[P], on the examples that each one met, NaN where it failed;
    examples: int[P], how many those are; complete: bool[P], who met all of them. standing: float64[P], the fitness on
    all examples, foreseen for those that did not meet all, NaN where one failed. scores_of_best: the best one's,
    `task/metric` -> mean. first: everyone's scores on the first block. known: what the next generation's race knows."""

    fitness: np.ndarray
    examples: np.ndarray
    complete: np.ndarray
    standing: np.ndarray
    scores_of_best: dict[str, float]
    first: Scores
    known: Known


@dataclass(frozen=True)
class Measured:
    """What is known of some candidates. numbers: int[S], which ones; the rest as `foresee` takes it: worth:
    float32[S, M]; met: int[M]; counts: float[M]."""

    numbers: np.ndarray
    worth: np.ndarray
    met: np.ndarray
    counts: np.ndarray


def knowing_nothing(blocks: Sequence["Scorer"], dims: int) -> Known:
    """What the first generation's race knows. Where there is but one block, nothing is ever foreseen or kept."""
    examples = sum(task.size for block in blocks for task, _ in shares(block.tasks))
    return nothing_known(WINDOW if len(blocks) > 1 else 1, dims, examples)


def race(
    blocks: Sequence["Scorer"],
    order: Sequence[int],
    genomes: np.ndarray,
    known: Known,
    progress: Progress = lambda done: None,
) -> Raced:
    """Race genomes `float32[P, D]` over blocks of examples, which are met in this order."""
    population, tasks = len(genomes), blocks[0].tasks
    values, standing, examples = np.full(population, np.nan), np.full(population, np.nan), np.zeros(population, int)
    met: dict[int, Scores] = {}
    stopped: list[Measured] = []
    running, begin = np.arange(population), 0
    for rung, end in enumerate(rung_ends(len(blocks))):
        met |= {block: blocks[block].score(genomes[running], progress) for block in order[begin:end]}
        if rung == 0:
            first = met[order[0]]
        # In the blocks' own order, so that a candidate's fitness does not depend on whose turn it was.
        together = _joined([met[block] for block in sorted(met)])
        values[running] = fitness(tasks, together)
        examples[running] = sum(task.size for block in met for task in blocks[block].tasks)
        part = _measured(blocks, met, running)
        if end == len(blocks):
            standing[running] = values[running]
            if stopped:
                whole = np.isfinite(values[running])
                known = remember(known, genomes[running[whole]], part.worth[whole])
            break
        standing[running] = np.where(np.isfinite(values[running]), _foreseen(known, genomes, part), np.nan)
        best = _best(standing[running], survivors(population, rung + 1))
        if not best.size:
            break
        left = np.setdiff1d(np.arange(len(running)), best)
        stopped.append(Measured(running[left], part.worth[left], part.met, part.counts))
        running, met, begin = running[best], {block: _rows(scores, best) for block, scores in met.items()}, end
    complete = np.isfinite(values) & (examples == sum(task.size for block in blocks for task in block.tasks))
    # Those that met everything tell most of their own generation.
    for group in stopped:
        there = np.isfinite(values[group.numbers])
        standing[group.numbers] = np.where(there, _foreseen(known, genomes, group), np.nan)
    leader = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)[running]))
    return Raced(values, examples, complete, standing, means(tasks, together)[leader], first, known)


def _measured(blocks: Sequence["Scorer"], met: dict[int, Scores], numbers: np.ndarray) -> Measured:
    """The candidates `numbers`, whose scores on some blocks these are. Examples are numbered block by block."""
    sizes = [{task.name: task.size for task, _ in shares(block.tasks)} for block in blocks]
    total = {name: sum(size[name] for size in sizes) for name in sizes[0]}
    done = {name: sum(sizes[block][name] for block in met) for name in total}
    begins = np.cumsum([0, *(sum(size.values()) for size in sizes)])
    worth, places, counts = [], [], []
    for block in sorted(met):
        places.append(np.arange(begins[block], begins[block + 1]))
        for task, share in shares(blocks[block].tasks):
            worth.append(share / total[task.name] * met[block].matrices[task.name][task.metric])
            counts.append(np.full(task.size, total[task.name] / done[task.name]))
    return Measured(numbers, np.concatenate(worth, axis=1), np.concatenate(places), np.concatenate(counts))


def _foreseen(known: Known, genomes: np.ndarray, group: Measured) -> np.ndarray:
    return foresee(known, genomes[group.numbers], group.worth, group.met, group.counts)


def race_passes(blocks: Sequence["Scorer"], order: Sequence[int], population: int) -> int:
    """How many steps of progress a race reports where no candidate fails."""
    ends = rung_ends(len(blocks))
    return sum(
        blocks[block].passes(survivors(population, rung))
        for rung, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        for block in order[begin:end]
    )


def describe_rungs(blocks: Sequence["Scorer"], population: int) -> str:
    """One line: how many candidates of a generation meet how many examples."""
    sizes = np.cumsum([sum(task.size for task in block.tasks) for block in blocks])
    rungs = [f"{survivors(population, r)} on {sizes[end - 1]}" for r, end in enumerate(rung_ends(len(blocks)))]
    return f"racing: {', '.join(rungs)} examples"


def describe_race(history: Sequence[dict[str, Any]], examples: int) -> str:
    """One line: what the races of a run's history saved of scoring every candidate on all `examples`."""
    done = sum(sum(row["examples"]) for row in history)
    asked = sum(len(row["examples"]) for row in history) * examples
    return f"racing: {done:,} of {asked:,} passes of a candidate over an example ({1 - done / asked:.0%} saved)"


def _best(values: np.ndarray, count: int) -> np.ndarray:
    """The numbers of the `count` best candidates, in their own order; fewer where fewer are finite."""
    order = np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")[:count]
    return np.sort(order[np.isfinite(values[order])])


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of the same candidates on several blocks, side by side."""

    def together(task: str, metric: str) -> np.ndarray:
        return np.concatenate([part.matrices[task][metric] for part in parts], axis=1)

    first = parts[0].matrices
    return Scores({task: {metric: together(task, metric) for metric in first[task]} for task in first})


def _rows(scores: Scores, candidates: np.ndarray) -> Scores:
    return Scores(
        {
            task: {metric: matrix[candidates] for metric, matrix in metrics.items()}
            for task, metrics in scores.matrices.items()
        }
    )
