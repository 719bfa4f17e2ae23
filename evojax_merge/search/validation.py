"""The validation split: examples of the search split that no generation is scored on, and that the winner is chosen on.

A search that scores thousands of candidates on a few examples ends with one that suits these examples. The validation
split shows which of the finalists is good beyond them; the held-out split, which decides nothing, shows how good it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import fitness, number_or_none, task_weights
from evojax_merge.search.protocols import GenomeEvaluator, goal_of
from evojax_merge.search.successive_halving import T

# The stream of a seed's random numbers that this split is drawn with.
VALIDATION_STREAM = 1
# At so many rises of the search fitness in a row, the validation fitness has to be so many standard errors below its
# highest, to be no accident.
OVERFIT_PATIENCE, CLEAR_ERRORS = 3, 2.0


def validation_split(where: str, tasks: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """The tasks on their search examples, and on a random `share` of each one's examples to validate on. The split
    depends on the seed, and is the same for tasks of one file: otherwise a task would search on another's validation
    examples. Tasks of weight 0 are not divided; share 0: all is searched on, and there is no validation split.

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


# ---------------------------------------------------------------------------------------------------------------
# Looking at it while a search runs


def init_peak(validation: GenomeEvaluator) -> dict[str, np.ndarray]:
    """The record of the check with the highest validation fitness, before any check: that fitness, float64[], and the
    candidate's scores on the examples, float32[N], task by task."""
    examples = sum(task.size for task, _ in task_weights(validation.tasks))
    return {"fitness": np.array(-np.inf), "scores": np.zeros(examples, np.float32)}


def validate(
    validation: GenomeEvaluator, best: np.ndarray, proposed: np.ndarray, peak: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Score the best candidate so far, float32[1, D] or [0, D] where there is none, and those that the strategy
    proposes, float32[F, D].

    Return their validation fitness, None where it is not finite, with the standard error of the best candidate's
    difference from the highest check before, paired by example (None before the first check, and where a task has one
    example); and the highest check from now on.
    """
    genomes = np.concatenate([best, proposed])
    values, finite = np.full(len(genomes), np.nan), np.isfinite(genomes).all(axis=1)
    error = None
    if finite.any():
        scores = validation.score(genomes[finite])
        values[finite] = fitness(validation.tasks, scores, goal_of(validation))
        if len(best) and np.isfinite(values[0]):
            rows = [scores.matrices[task.name][task.metric][0] for task, _ in task_weights(validation.tasks)]
            weighted = task_weights(validation.tasks, goal_of(validation))
            if np.isfinite(peak["fitness"]) and all(task.size > 1 for task, _ in weighted):
                differences = (np.concatenate(rows) - peak["scores"]).astype(np.float64)
                ends = np.cumsum([task.size for task, _ in weighted])[:-1]
                parts = zip(weighted, np.split(differences, ends), strict=True)
                error = float(np.sqrt(sum(weight**2 * part.var(ddof=1) / task.size for (task, weight), part in parts)))
            if values[0] > peak["fitness"]:
                peak = {"fitness": np.array(values[0]), "scores": np.concatenate(rows)}
    shown = list(map(number_or_none, values))
    look = {"best_so_far": shown[0] if len(best) else None, "standard_error": error, "finalists": shown[len(best) :]}
    return look, peak


@dataclass(frozen=True)
class Check:
    """The best candidate after a generation: its fitness on the searched examples, and on those of the validation
    split; error: the standard error of the latter's difference from the highest check before, if known."""

    generation: int
    search: float
    validation: float
    error: float | None


@dataclass(frozen=True)
class Trend:
    """The course of search and validation fitness. peak: the check with the highest validation fitness; last: the last
    check at which the search fitness had risen; falls: the number of consecutive such checks, up to that one, that were
    clearly below the peak; overfitting_since: the generation of the peak since which there have been enough of them;
    None: search and validation go together."""

    peak: Check | None = None
    last: Check | None = None
    falls: int = 0
    overfitting_since: int | None = None

    def after(self, check: Check) -> "Trend":
        if self.peak is None or self.last is None:
            return replace(self, peak=check, last=check)
        if check.search <= self.last.search:
            # The same candidate as before says nothing new.
            return self
        if check.validation > self.peak.validation:
            return replace(self, peak=check, last=check, falls=0)
        is_clear = check.error is not None and self.peak.validation - check.validation > CLEAR_ERRORS * check.error
        falls = self.falls + 1 if is_clear else 0
        parts = falls >= OVERFIT_PATIENCE and self.overfitting_since is None
        since = self.peak.generation if parts else self.overfitting_since
        return replace(self, last=check, falls=falls, overfitting_since=since)

    def describe(self) -> str:
        first, last = self.peak, self.last
        assert first is not None and last is not None
        return (
            f"search and validation part ways since generation {first.generation}: the best candidate's fitness rose "
            f"from {first.search:.4f} to {last.search:.4f} on the examples that are searched on, and fell from "
            f"{first.validation:.4f} to {last.validation:.4f} on the validation split"
        )
