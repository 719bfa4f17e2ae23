"""From a search's outcome to the winner: re-scoring, the held-out table, the recipe, the model. May import every
room but report and cli.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.recipe_writer import dump_yaml, recipe_document
from evojax_merge.checkpoints.tokens import TokenizerChoice
from evojax_merge.checkpoints.writer import atomic_write
from evojax_merge.evaluation.evaluator import Evaluator, fitness, means
from evojax_merge.models.bank import Bank, Recipe, candidate
from evojax_merge.search.loop import Outcome, rescore
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.search.setup import Problem
from evojax_merge.spaces.parameter import uniform_start


@dataclass(frozen=True)
class Row:
    """One line of the final table: held-out scores of a model."""

    role: str
    name: str
    fitness: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Result:
    """The winner and what it was compared with. `values`: parameter -> float[groups, columns]."""

    genome: np.ndarray
    search_fitness: float
    uniform_search_fitness: float
    rows: list[Row]
    values: dict[str, np.ndarray]
    groups: list[str]

    @property
    def winner(self) -> Row:
        return next(row for row in self.rows if row.role == "winner")


def uniform_genome(problem: Problem) -> np.ndarray:
    """Equal weights 1/K; the other searched parameters where the search starts."""
    space = problem.space
    values = {axis.name: np.asarray(axis.start) for axis in space.axes}
    for axis in space.axes:
        if axis.name == "weight":
            values["weight"] = np.clip(uniform_start(space.method, "weight", space.parents), axis.low, axis.high)
    return space.genome(values)


def choose_winner(
    problem: Problem,
    bank: Bank,
    full: Evaluator,
    heldout: Evaluator,
    outcome: Outcome,
    progress: Callable[[int], None] = lambda done: None,
) -> Result:
    """Re-score the finalists on the full search split, then score everyone on the held-out split."""
    finalists = rescore(problem, bank, full, outcome, progress)
    if not finalists:
        raise RuntimeError("no candidate of the search has a finite score; there is no winner")
    best = finalists[0]
    uniform = uniform_genome(problem)
    to_recipes = jax.jit(jax.vmap(problem.space.recipe))
    both = to_recipes(jnp.asarray(np.stack([best.genome, uniform])))
    uniform_fitness = fitness(
        full.tasks, full.population(bank, problem.spec, jax.tree.map(lambda leaf: np.asarray(leaf)[1:], both), progress)
    )
    rows = []
    for role, path in problem.models:
        aligned = problem.sources.vocabulary is not None
        sources, config = (
            open_sources([path, problem.tokenizer_folder], TokenizerChoice(1)) if aligned else open_sources([path])
        )
        stored = replace(heldout, config=config)
        scores = stored.stored(load_stored(sources, config, 0, heldout.compute_dtype), progress)
        rows.append(Row(role, path.name, float(fitness(heldout.tasks, scores)[0]), means(heldout.tasks, scores)[0]))
    scores = heldout.population(bank, problem.spec, both, progress)
    values, tables = fitness(heldout.tasks, scores), means(heldout.tasks, scores)
    rows.append(Row("uniform", f"uniform {problem.spec.method_name}", float(values[1]), tables[1]))
    rows.append(Row("winner", f"evolved {problem.spec.method_name}", float(values[0]), tables[0]))
    parameters = {name: np.asarray(v) for name, v in problem.space.values(jnp.asarray(best.genome)).items()}
    return Result(best.genome, best.fitness, float(uniform_fitness[0]), rows, parameters, problem.space.groups)


def passes_to_choose(problem: Problem, full: Evaluator, heldout: Evaluator) -> int:
    """How many steps of progress `choose_winner` reports at most."""
    finalists = problem.config.search.finalists + 2
    return full.passes(finalists + 1) + heldout.passes(len(problem.models) + 2)


def genome_recipe(problem: Problem, genome: np.ndarray) -> Recipe:
    """The recipe of one genome, as NumPy arrays."""
    recipes = jax.jit(jax.vmap(problem.space.recipe))(jnp.asarray(genome)[None])
    return jax.tree.map(np.asarray, candidate(recipes, 0))


def write_recipe(problem: Problem, genome: np.ndarray, path: Path) -> None:
    """Write a genome's recipe as `evojax-merge merge` and mergekit take it."""
    document = recipe_document(
        genome_recipe(problem, genome), problem.spec, problem.decoder,
        None if problem.base is None else str(problem.base), [str(parent) for parent in problem.parents],
    )  # fmt: skip
    if problem.sources.vocabulary is not None:
        document["tokenizer_source"] = str(problem.tokenizer_folder)
    atomic_write(path, dump_yaml(document))


def write_result(result: Result, folder: RunFolder) -> None:
    """`result.json`: the table and the winner's parameters by group. Nothing in it depends on the clock."""

    def plain(row: Row) -> dict[str, Any]:
        return {
            "role": row.role,
            "name": row.name,
            "heldout_fitness": row.fitness,
            "heldout_scores": row.scores,
        }

    document = {
        "table": [plain(row) for row in result.rows],
        "search_fitness": {"winner": result.search_fitness, "uniform": result.uniform_search_fitness},
        "groups": result.groups,
        "parameters": {name: np.round(values.astype(float), 7).tolist() for name, values in result.values.items()},
        "genome": [float(gene) for gene in result.genome],
    }
    atomic_write(folder.result, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
