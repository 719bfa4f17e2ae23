"""From a search's archive to the winner: re-scoring, and the comparison on held-out examples."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import TokenizerChoice
from evojax_merge.errors import Failed
from evojax_merge.evaluation.batched_tasks import BatchedTask
from evojax_merge.evaluation.devices import ONE_DEVICE, Devices
from evojax_merge.evaluation.evaluator import Evaluator, MergeEvaluator
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.evaluation.scores import fitness, means
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.problem import SearchProblem, failure_hint
from evojax_merge.report.comparison import Result, Row, model_name
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import Archive, rescore

CandidateEvaluator = SpaceEvaluator[MergeEvaluator] | SpaceEvaluator[PathEvaluator]


def open_evaluators(
    problem: SearchProblem,
    splits: Sequence[list[BatchedTask]],
    devices: Devices = ONE_DEVICE,
    progress: Callable[[int], None] = lambda done: None,
    log: Callable[[str], None] = lambda text: None,
) -> list[SpaceEvaluator[Any]]:
    """Load the bank; what scores genomes on each of `splits` (see `SearchProblem.batched_tasks`). `progress` is told
    the bytes that were loaded, `log` what went otherwise than planned."""
    settings = problem.config.evaluation
    # Their batches have the same shapes, and so what fits one fits all.
    chunk_sizes: dict[Any, int] = {}
    decoders = [
        Evaluator(
            problem.decoder, problem.tokenizer, tasks, settings.compute_dtype, settings.chunk, devices, log, chunk_sizes
        )
        for tasks in splits
    ]
    evaluators = problem.candidates.open_evaluators(decoders, devices, progress)
    return [SpaceEvaluator(problem.space, one, devices) for one in evaluators]


def select_best(
    problem: SearchProblem,
    full: CandidateEvaluator,
    heldout: CandidateEvaluator,
    archive: Archive,
    progress: Callable[[int], None] = lambda done: None,
) -> Result:
    """Re-score the finalists on the whole search split, then score everyone on the held-out split. Raises Failed where
    no finalist has finite scores."""
    candidates = problem.candidates
    finalists = rescore(problem.space, full, archive, progress)
    if not finalists:
        raise Failed(_no_winner(problem))
    best, (label, plain) = finalists[0], problem.space.baseline()
    baseline = float(fitness(full.tasks, full.score(plain[None], progress))[0])
    rows = [_stored_row(problem, role, path, heldout.evaluator.evaluator, progress) for role, path in problem.models]
    scores = heldout.score(np.stack([best.genome, plain]), progress)
    values, tables = fitness(heldout.tasks, scores), means(heldout.tasks, scores)
    if candidates.baseline_role is not None:
        role = candidates.baseline_role
        rows.append(Row(role, f"{role} {candidates.name}", float(values[1]), tables[1]))
    rows.append(Row("winner", f"evolved {candidates.name}", float(values[0]), tables[0]))
    report = candidates.report(best.genome, [model_name(parent) for parent in problem.parents])
    return Result(best.genome, best.fitness, (label, baseline), rows, report)


def _no_winner(problem: SearchProblem) -> str:
    """Every generation had a candidate with finite scores, and none of them has on the whole search split."""
    search, metrics = problem.search, ", ".join(f"{task.name} ({task.metric})" for task in problem.full)
    return (
        f"no winner: after {search.generations} generations of {problem.strategy.population} candidates, none of the "
        f"{search.finalists} best, what the strategy proposed and the start has finite scores on the whole search "
        f"split of {metrics}. {failure_hint(problem.full[0])}"
    )


def _stored_row(
    problem: SearchProblem, role: str, path: Path, heldout: Evaluator, progress: Callable[[int], None]
) -> Row:
    """A stored model's held-out scores."""
    aligned = problem.sources.vocabulary is not None
    sources, config = (
        open_sources([path, problem.tokenizer_folder], TokenizerChoice(1)) if aligned else open_sources([path])
    )
    evaluator = replace(heldout, config=config)
    scores = evaluator.stored(load_stored(sources, config, 0, evaluator.compute_dtype), progress)
    return Row(role, model_name(path), float(fitness(heldout.tasks, scores)[0]), means(heldout.tasks, scores)[0])


def passes_to_select(problem: SearchProblem, full: CandidateEvaluator, heldout: CandidateEvaluator) -> int:
    """How many steps of progress `select_best` reports at most."""
    return full.passes(problem.search.finalists + 3) + heldout.passes(len(problem.models) + 2)


def recipe_text(problem: SearchProblem, genome: np.ndarray) -> str:
    """A genome's recipe as YAML, as `evojax-merge merge` and mergekit take it."""
    document = problem.candidates.to_recipe(genome)
    if problem.sources.vocabulary is not None:
        document["tokenizer_source"] = str(problem.tokenizer_folder)
        if problem.tokenizer_folder == problem.base:
            # A method that takes no base leaves it out, but for the tokenizer.
            document = {"merge_method": document["merge_method"], "base_model": str(problem.base)} | document
    return dump_yaml(document)
