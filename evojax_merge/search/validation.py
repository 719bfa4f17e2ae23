"""The validation split: examples of the search split that no generation is scored on, and that the winner is chosen on.

A search that scores thousands of candidates on a few examples ends with one that suits these examples. Which of the
finalists is good beyond them is told by others; how good it is, by the held-out split, which decides nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import fitness
from evojax_merge.search.protocols import GenomeEvaluator
from evojax_merge.search.successive_halving import T

# Of the random numbers of a seed, those that this split is drawn with.
VALIDATION_STREAM = 1
# So many rises of the search fitness in a row have to come with a lower validation fitness, to be no accident.
PARTING_FALLS = 3


def validation_split(where: str, tasks: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """The tasks on what is searched on, and on a random `share` of each one's examples to validate on. The same for a
    seed, and for tasks of one file, whose examples would otherwise be searched on by another of them. Tasks of weight 0
    are not divided; share 0: all is searched on, and there is no validation split.

    Raises InputError where a task would have no example on one of the two sides.
    """
    if not share:
        return list(tasks), []
    searched, validation = [], []
    for task in tasks:
        if task.weight == 0:
            searched.append(task)
            validation.append(task)
            continue
        count = round(share * task.size)
        if not 0 < count < task.size:
            raise InputError(
                where,
                f"{share:g} of the {task.size} examples that {task.name} has to search on leaves none to "
                f"{'search' if count else 'validate'} on; expected a share that leaves some for both",
            )
        order = np.random.default_rng([seed, task.size, VALIDATION_STREAM]).permutation(task.size)
        searched.append(task.subset(sorted(order[count:].tolist())))
        validation.append(task.subset(sorted(order[:count].tolist())))
    return searched, validation


def validate(validation: GenomeEvaluator, best: np.ndarray, proposed: np.ndarray) -> dict[str, Any]:
    """The validation fitness of the best candidate so far, float32[1, D] or [0, D] where there is none, and of those
    that the strategy proposes, float32[F, D]; None where it is not finite."""
    genomes = np.concatenate([best, proposed])
    values, finite = np.full(len(genomes), np.nan), np.isfinite(genomes).all(axis=1)
    if finite.any():
        values[finite] = fitness(validation.tasks, validation.score(genomes[finite]))
    shown = [float(value) if np.isfinite(value) else None for value in values]
    return {"best_so_far": shown[0] if len(best) else None, "finalists": shown[len(best) :]}


@dataclass(frozen=True)
class Check:
    """What was the best candidate after a generation: its fitness on the searched examples, and on those of the
    validation split."""

    generation: int
    search: float
    validation: float


@dataclass(frozen=True)
class Trend:
    """Where search and validation go. `rises`: the last checks at which the search fitness had risen since the one
    before; `parted`: the generation since which each rise made the validation fitness fall; None: they go together."""

    rises: tuple[Check, ...] = ()
    parted: int | None = None

    def after(self, check: Check) -> "Trend":
        if self.rises and check.search <= self.rises[-1].search:
            return self
        rises = (*self.rises, check)[-PARTING_FALLS - 1 :]
        fell = len(rises) > PARTING_FALLS and all(
            later.validation < earlier.validation for earlier, later in pairwise(rises)
        )
        return replace(self, rises=rises, parted=rises[0].generation if fell and self.parted is None else self.parted)

    def describe(self) -> str:
        first, last = self.rises[0], self.rises[-1]
        return (
            f"search and validation part ways since generation {first.generation}: the best candidate's fitness rose "
            f"from {first.search:.4f} to {last.search:.4f} on the examples that are searched on, and fell from "
            f"{first.validation:.4f} to {last.validation:.4f} on the validation split"
        )
