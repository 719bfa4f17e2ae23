"""A generation with gradients: every candidate is evaluated on one minibatch of the examples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evojax_merge.config.search_config import GradientConfig, SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import fitness, means
from evojax_merge.search.protocols import GradientEvaluator, Progress, Strategy, differentiates, goal_of
from evojax_merge.search.successive_halving import HalvingResult, empty_matrix, enter_scores, shard_parts
from evojax_merge.search.surrogate import SurrogateData


def check_gradient_options(where: str, search: SearchConfig, strategy: Strategy) -> None:
    """Raises InputError for options of a search that its strategy could not follow."""
    what, options = differentiates(strategy), search.gradient
    if what is None and options != GradientConfig():
        raise InputError(
            where, f"gradient: {search.strategy} follows no gradient; leave the key out, or take gradient or hybrid"
        )
    if what != "fitness":
        return
    if search.rungs > 1:
        raise InputError(
            where, f"rungs: {search.rungs}; {strategy.name} does not race its candidates; it has gradient.minibatches"
        )
    if options.generations is not None or options.starts != GradientConfig().starts:
        raise InputError(
            where,
            f"gradient.generations, gradient.starts: are hybrid's; {strategy.name} has generations and population",
        )
    if options.minibatches > 1 and (search.stop.target is not None or search.stop.stagnation is not None):
        raise InputError(
            where, "stop.target, stop.stagnation: on minibatches no candidate's fitness on all examples is known; take "
            "stop.evaluations or stop.seconds, or gradient.minibatches: 1",
        )  # fmt: skip


def value_and_gradient(
    minibatches: Sequence[GradientEvaluator],
    number: int,
    genomes: np.ndarray,
    surrogate: SurrogateData,
    is_fitness: bool,
    progress: Progress = lambda done: None,
) -> HalvingResult:
    """Evaluate and differentiate genomes `float32[P, D]` on minibatch `number`. `is_fitness`: whether its score is the
    search's fitness, so that candidates that were evaluated on the only minibatch count as complete."""
    evaluator = minibatches[number]
    scores, gradients = evaluator.value_and_gradient(genomes, progress)
    values = fitness(evaluator.tasks, scores, goal_of(evaluator))
    parts = shard_parts(minibatches)
    matrix = empty_matrix(parts, len(genomes))
    enter_scores(matrix, parts[number], np.arange(len(genomes)), scores)
    best = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
    return HalvingResult(
        fitness=values,
        examples=np.full(len(genomes), sum(task.size for task in evaluator.tasks)),
        complete=np.isfinite(values) & (is_fitness and len(minibatches) == 1),
        scores=replace(matrix, predicted=values, gradients=gradients),
        scores_of_best=means(evaluator.tasks, scores)[best],
        first=scores,
        surrogate=surrogate,
    )
