"""From a search's outcome to the winner: re-scoring, the held-out table, the recipe, the model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.folder import hub_id
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import TokenizerChoice
from evojax_merge.checkpoints.writer import atomic_write
from evojax_merge.errors import Failed
from evojax_merge.evaluation.evaluator import fitness, means
from evojax_merge.mergekit.write import dump_yaml, path_document, recipe_document
from evojax_merge.models.bank import MergeSpec, Recipe, take_candidate
from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.search.loop import Outcome, failure_hint, rescore
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.search.scorers import MergeScorer, PathScorer
from evojax_merge.search.setup import SearchProblem
from evojax_merge.search.strategy import default_population
from evojax_merge.spaces.parameter import ParameterSpace, uniform_start
from evojax_merge.tasks.task import Task


@dataclass(frozen=True)
class Row:
    """One line of the final table: held-out scores of a model."""

    role: str
    name: str
    fitness: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Result:
    """The winner and what it was compared with.

    `baseline`: the merge that nobody searched for (the uniform merge, or the first parent as it is) and its fitness on
    the search split. A merge has `values`: parameter -> float[groups, columns]; a path has `path`.
    """

    genome: np.ndarray
    search_fitness: float
    baseline: tuple[str, float]
    rows: list[Row]
    values: dict[str, np.ndarray]
    groups: list[str]
    path: LayerPath | None = None

    @property
    def winner(self) -> Row:
        return next(row for row in self.rows if row.role == "winner")

    @property
    def rivals(self) -> list[Row]:
        """What a search has to beat on held-out data: the base, the best parent, and the uniform merge, as far as there
        are such."""
        parents = [row for row in self.rows if row.role == "parent"]
        best = max(parents, key=lambda row: row.fitness if np.isfinite(row.fitness) else -np.inf)
        return [row for row in self.rows if row is best or row.role in ("base", "uniform")]

    def verdicts(self) -> list[str]:
        """A sentence, with both figures, for each rival that the winner is not better than on held-out data."""
        ours, sentences = self.winner.fitness, []
        for row in self.rivals:
            if ours > row.fitness or (np.isfinite(ours) and not np.isfinite(row.fitness)):
                continue
            named = "" if row.name == row.role else f" {row.name}"
            name = {"base": f"the base{named}", "uniform": "the uniform merge"}.get(row.role, f"the best parent{named}")
            if not np.isfinite(ours):
                sentences.append(
                    f"The evolved model has no finite score on held-out data; {name} has {row.fitness:.4f}."
                )
                continue
            if ours == row.fitness:
                sentences.append(f"On held-out data the evolved model is only as good as {name}: both have {ours:.4f}.")
                continue
            shown = [f"{value:.4f}" for value in (ours, row.fitness)]
            if shown[0] == shown[1]:
                shown = [repr(float(value)) for value in (ours, row.fitness)]
            sentences.append(
                f"On held-out data the evolved model is worse than {name}: it has {shown[0]}, that has {shown[1]}."
            )
        return sentences


def model_name(path: Path) -> str:
    """What a model is called in tables: its hub id, else its folder, or its run where a search made it."""
    known = hub_id(path)
    if known is not None:
        return known
    return path.parent.parent.name if path.parts[-2:] == ("best", "model") else path.name


def uniform_genome(space: ParameterSpace) -> np.ndarray:
    """Equal weights 1/K; the other searched parameters where the search starts."""
    values = {axis.name: np.asarray(axis.start) for axis in space.search_parameters}
    for axis in space.search_parameters:
        if axis.name == "weight":
            values["weight"] = np.clip(uniform_start(space.method, "weight", space.parents), axis.low, axis.high)
    return space.genome(values)


def select_best(
    problem: SearchProblem,
    full: MergeScorer | PathScorer,
    heldout: MergeScorer | PathScorer,
    outcome: Outcome,
    progress: Callable[[int], None] = lambda done: None,
) -> Result:
    """Re-score the finalists on the full search split, then score everyone on the held-out split. Raises Failed where
    no finalist has finite scores."""
    finalists = rescore(problem.space, full, outcome, progress)
    if not finalists:
        raise Failed(_no_winner(problem, full.tasks))
    best, space = finalists[0], problem.space
    label, plain = "first parent", space.start
    if isinstance(space, ParameterSpace):
        label, plain = "uniform merge", uniform_genome(space)
    baseline = float(fitness(full.tasks, full.score(plain[None], progress))[0])
    rows = [_stored_row(problem, role, path, heldout, progress) for role, path in problem.models]
    scores = heldout.score(np.stack([best.genome, plain]), progress)
    values, tables = fitness(heldout.tasks, scores), means(heldout.tasks, scores)
    if isinstance(space, ParameterSpace):
        rows.append(Row("uniform", f"uniform {problem.spec.method_name}", float(values[1]), tables[1]))
    rows.append(Row("winner", f"evolved {problem.spec.method_name}", float(values[0]), tables[0]))
    if not isinstance(space, ParameterSpace):
        path = space.paths(best.genome[None])[0]
        return Result(best.genome, best.fitness, (label, baseline), rows, {}, [], path)
    parameters = {name: np.asarray(v) for name, v in space.values(jnp.asarray(best.genome)).items()}
    return Result(best.genome, best.fitness, (label, baseline), rows, parameters, space.groups)


def _no_winner(problem: SearchProblem, tasks: Sequence[Task]) -> str:
    """Every generation had a candidate with finite scores, and none of them has on the whole search split."""
    search, metrics = problem.search, ", ".join(f"{task.name} ({task.metric})" for task in tasks)
    population = search.population or default_population(problem.space.dims)
    return (
        f"no winner: after {search.generations} generations of {population} candidates, none of the "
        f"{search.finalists} best, the distribution's mean and the start has finite scores on the whole search split "
        f"of {metrics}. {failure_hint(tasks[0])}"
    )


def _stored_row(
    problem: SearchProblem, role: str, path: Path, heldout: MergeScorer | PathScorer, progress: Callable[[int], None]
) -> Row:
    """A stored model's held-out scores."""
    aligned = problem.sources.vocabulary is not None
    sources, config = (
        open_sources([path, problem.tokenizer_folder], TokenizerChoice(1)) if aligned else open_sources([path])
    )
    inner = heldout.evaluator.evaluator if isinstance(heldout, PathScorer) else heldout.evaluator
    evaluator = replace(inner, config=config)
    scores = evaluator.stored(load_stored(sources, config, 0, evaluator.compute_dtype), progress)
    return Row(role, model_name(path), float(fitness(heldout.tasks, scores)[0]), means(heldout.tasks, scores)[0])


def passes_to_select(problem: SearchProblem, full: MergeScorer | PathScorer, heldout: MergeScorer | PathScorer) -> int:
    """How many steps of progress `select_best` reports at most."""
    return full.passes(problem.search.finalists + 3) + heldout.passes(len(problem.models) + 2)


def genome_recipe(space: ParameterSpace, genome: np.ndarray) -> Recipe:
    """The recipe of one genome, as NumPy arrays."""
    recipes = jax.jit(jax.vmap(space.recipe))(jnp.asarray(genome)[None])
    return jax.tree.map(np.asarray, take_candidate(recipes, 0))


def recipe_text(problem: SearchProblem, genome: np.ndarray) -> str:
    """A genome's recipe as YAML, as `evojax-merge merge` and mergekit take it."""
    parents, space = [str(parent) for parent in problem.parents], problem.space
    if isinstance(space, ParameterSpace):
        assert isinstance(problem.spec, MergeSpec)
        base = None if problem.base is None else str(problem.base)
        document = recipe_document(genome_recipe(space, genome), problem.spec, problem.decoder, base, parents)
    else:
        assert isinstance(problem.spec, PathSpec)
        found = space.paths(genome[None])[0]
        assert found is not None
        document = path_document(found, problem.spec, parents)
    if problem.sources.vocabulary is not None:
        document["tokenizer_source"] = str(problem.tokenizer_folder)
    return dump_yaml(document)


def _winner_document(result: Result) -> dict[str, Any]:
    if result.path is not None:
        return {"path": {"layers": list(result.path.layers), "scales": list(result.path.scales)}}
    rounded = {name: np.round(values.astype(float), 7).tolist() for name, values in result.values.items()}
    return {"groups": result.groups, "parameters": rounded}


def write_result(result: Result, generations: int, folder: RunFolder) -> None:
    """`result.json`: the table and the winner's parameters by group. Nothing in it depends on the clock."""

    def plain(row: Row) -> dict[str, Any]:
        return {
            "role": row.role,
            "name": row.name,
            "heldout_fitness": row.fitness,
            "heldout_scores": row.scores,
        }

    winner = result.winner
    document = {
        "generations": generations,
        "table": [plain(row) for row in result.rows],
        # By role: whether the winner is better on held-out data, and both figures.
        "better_than": {
            row.role: {
                "name": row.name,
                "better": winner.fitness > row.fitness,
                "winner_heldout_fitness": winner.fitness,
                "heldout_fitness": row.fitness,
            }
            for row in result.rivals
        },
        "search_fitness": {"winner": result.search_fitness, result.baseline[0]: result.baseline[1]},
        **_winner_document(result),
        "genome": [float(gene) for gene in result.genome],
    }
    atomic_write(folder.result, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
