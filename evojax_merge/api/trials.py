"""Candidates of a search as objects, and the run folder that holds them."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evojax_merge import plugins
from evojax_merge.api.python_calls import Location, PythonCall, as_path, ignore
from evojax_merge.backends.backend import Backend
from evojax_merge.backends.registry import find_backend
from evojax_merge.checkpoints.writer import check_new_model
from evojax_merge.commands.export import export_candidate
from evojax_merge.commands.merge import MergeOptions, write_merge
from evojax_merge.commands.moe import write_mixture
from evojax_merge.errors import InputError, warn_program
from evojax_merge.mergekit.other_formats import MOE, other_format
from evojax_merge.mergekit.streams import plain_recipe
from evojax_merge.problem import build_problem, config_from, open_backend
from evojax_merge.report.comparison import model_names, scores_title
from evojax_merge.report.described import Described, Table, parameter_table
from evojax_merge.report.frame import NamedValues, gene_values, history_frame
from evojax_merge.report.run_data import lead_over
from evojax_merge.report.run_tables import PrintedTable
from evojax_merge.report.stored_run import best_facts, last_stage, method_in, stored_values, winner_fitness
from evojax_merge.report.tables import lead_cell
from evojax_merge.schema.arguments import check_arguments
from evojax_merge.schema.yaml_reader import load_documents, parse_documents
from evojax_merge.search.checkpoints import Checkpoints
from evojax_merge.search.protocols import context_of
from evojax_merge.search.run_folder import check_inputs, check_masks, is_run, run_at
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import StoredResult, read_result, read_run_config
from evojax_merge.steps.selection import origin_of

NO_GENERATION = "there is no generation yet; Study.run, Study.tell and evolve make them"


@dataclass(frozen=True)
class TrialSource:
    """The search of trials. method: the method of its merges, or the kind of its space; named_values: the searched
    parameters of genomes by their names; backend: opens the models; check: raises InputError where the models are not
    what the search scored; keep: files and folders that no export may replace."""

    method: str
    named_values: NamedValues
    backend: Callable[[], Backend]
    merges_recipes: bool
    check: Callable[[], None] = lambda: None
    keep: tuple[Path, ...] = ()


@dataclass(frozen=True, repr=False)
class Trial(Described):
    """A candidate of a search. generation: the generation's number, from 1; candidate: its number in the generation,
    from 0; both None for a winner that was in no generation. fitness: None where the candidate failed; split: the
    examples that the fitness was measured on, `search` or `validation`; examples: the number of examples that it was
    evaluated on, None where that is not recorded; scores: its mean on each task; genome: float32[D]."""

    generation: int | None
    candidate: int | None
    fitness: float | None
    split: Literal["search", "validation"]
    examples: int | None
    scores: dict[str, float | None]
    genome: np.ndarray = field(compare=False)
    _source: TrialSource = field(compare=False)

    @property
    def origin(self) -> str:
        """The candidate's place in the generations; for a winner that was in none, the plain merge or the parent that
        it is, or that the strategy proposed it."""
        if self.generation is not None:
            return f"candidate {self.candidate} of generation {self.generation}"
        # The models' headers need not be there any more.
        with suppress(InputError, LookupError):
            return origin_of(self._source.backend(), self.genome)
        return "a finalist"

    @property
    def parameters(self) -> dict[str, float]:
        """The searched parameters by their names."""
        values = self._source.named_values(self.genome[None])
        return {name: float(column[0]) for name, column in values.items()}

    @property
    def recipe(self) -> Any:
        """The candidate as a mergekit recipe, which `merge` makes into a model of language: a mapping, or a list of
        them where it has several documents."""
        return plain_recipe(parse_documents("recipe", self._source.backend().describe(self.genome).recipe))

    def merged(self) -> Any:
        """The candidate as a pytree. Raises InputError for language models, which `export` writes."""
        backend: Any = self._source.backend()
        if not hasattr(backend, "merged"):
            raise InputError("Trial.merged", "is for models that are pytrees; `export` writes a model's folder")
        return backend.merged(self.genome)

    def export(self, out: Location, *, dtype: str | None = None, overwrite: bool = False) -> Path:
        """Write the candidate's model to the folder `out`, as it was scored unless `dtype` is another one."""
        check_arguments(Trial.export, locals())
        path = as_path(out)
        with PythonCall():
            self._source.check()
            if self._source.merges_recipes:
                options = MergeOptions(dtype=dtype, overwrite=overwrite)
                recipe = self.recipe
                if other_format(recipe) == MOE:
                    write_mixture(recipe, path, options, True, warn_program)
                    return path
                write_merge([recipe] if isinstance(recipe, Mapping) else recipe, path, options, ignore, warn_program)
                return path
            if dtype is not None:
                raise InputError("Trial.export: dtype", "is for language models; leave it out")
            backend = self._source.backend()
            check_new_model(path, overwrite, self._source.keep)
            export_candidate(backend, self.genome, path, self._source.keep)
        return path

    def facts(self) -> dict[str, Any]:
        return {
            "method": self._source.method, "origin": self.origin, "fitness": self.fitness, "split": self.split,
            "examples": self.examples,
        }  # fmt: skip

    def tables(self) -> dict[str, Table]:
        scores = [{"task": name, "score": value} for name, value in self.scores.items()]
        return {"scores": scores, "parameters": parameter_table(self.parameters)}


class Searched:
    """The candidates of a search: of its `history`, its `_result()` and their `_source`."""

    @property
    def trials(self: Any) -> list[Trial]:
        """Every candidate of every generation, in their order; for a search in stages, of the last one."""
        source = self._source
        return [
            Trial(
                row["generation"], number, row["fitness"][number], "search", row["examples"][number] or None,
                {name: values[number] for name, values in row["task_scores"].items()},
                np.array(row["genomes"][number], np.float32), source,
            )
            for row in self.history
            for number in range(len(row["fitness"]))
        ]  # fmt: skip

    @property
    def best(self: Any) -> Trial:
        """The winner that the search has chosen; before it has, and in a loop by hand, the candidate of the highest
        fitness on all examples. Raises InputError where there is no generation yet."""
        history, result, trials = self.history, self._result(), self.trials
        if result is not None and result.generations == len(history):
            genome = np.array(result.genome, np.float32)
            same = (trial for trial in trials if np.array_equal(trial.genome, genome))
            return next(same, Trial(None, None, *winner_fitness(history, result), None, {}, genome, self._source))
        finite = [trial for trial in trials if trial.fitness is not None]
        if not finite:
            raise InputError(f"{type(self).__name__}.best", NO_GENERATION)
        most = max(trial.examples or 0 for trial in finite)
        complete = [trial for trial in finite if trial.examples in (None, most)]
        return max(complete, key=lambda trial: trial.fitness or 0.0)

    def plot(self: Any) -> Any:
        """An Altair chart of the fitness over generations: best so far, best, mean, and validation where it was looked
        at. Raises InputError where there is no generation yet."""
        # Altair is imported where a chart is drawn.
        from evojax_merge.report.charts import history_chart

        if not self.history:
            raise InputError(f"{type(self).__name__}.plot", NO_GENERATION)
        return history_chart(self.history)


@dataclass(frozen=True, repr=False)
class Run(Searched, Described):
    """A search's run folder, with its candidates. Every property reads the current files, so that a running search can
    be watched; a property whose file does not exist yet is None, or empty."""

    path: Path
    # The study whose functions, pytrees or temporary run folder the run needs.
    _study: object = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_arguments(type(self).__init__, vars(self))

    def facts(self) -> dict[str, Any]:
        if not is_run(self._folder):
            return {"folder": str(self.path)}
        config, history = self.config, self.history
        last = history[-1] if history else {}
        return {
            "folder": str(self.path),
            "method": self.method,
            "parents": model_names([Path(parent) for parent in config.get("parents", ())]),
            "dimensions": len(last["genomes"][0]) if last.get("genomes") else None,
            "generations": len(history),
            **best_facts(history, read_result(self._folder.result)),
            "finished": self.finished,
        }

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The config with all defaults and absolute paths; `inputs`: a hash of every file that scores depend on."""
        return read_run_config(self._folder.config)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One mapping a generation: the fitness of every candidate, the best so far, and the strategy's metrics."""
        return self._folder.read_history()

    @property
    def timing(self) -> list[dict[str, Any]]:
        """The seconds of each generation."""
        return self._folder.read_timing()

    @property
    def finished(self) -> bool:
        """Return whether the search has chosen its winner after the last saved generation."""
        return self.model is not None and self._folder.is_finished()

    @property
    def result(self) -> dict[str, Any] | None:
        """`result.json`: the held-out table, the winner's parameters by group, its genome."""
        return None if read_result(self._folder.result) is None else json.loads(self._folder.result.read_bytes())

    @property
    def table(self) -> list[dict[str, Any]]:
        """The held-out scores of winner, base, parents, uniform merge and controls, a mapping each; `print` shows them
        as a table. interval: where the difference between the winner's fitness and the model's lies on other examples
        like these, in 95 of 100 draws; where it holds 0, the difference is within noise."""
        return PrintedTable((self.result or {}).get("table", []))

    @property
    def warnings(self) -> list[str]:
        """The sentences of the report in which the winner is worse than a model that it is compared with: in fitness,
        or, beyond noise, in a task."""
        return list((self.result or {}).get("warnings", []))

    @property
    def front(self) -> list[dict[str, Any]]:
        """The members of the front, for a strategy that keeps one, a mapping each: the member's number (`member`), its
        scores on the examples that the winner was chosen on and on the held-out ones, and its genome."""
        return list((self.result or {}).get("members", []))

    @property
    def recipe(self) -> Any:
        """The winner as a mergekit recipe whose model paths are valid in any working directory: a mapping, or a list of
        them where the recipe has several documents."""
        return plain_recipe(load_documents(self._folder.recipe)) if self._folder.recipe.is_file() else None

    @property
    def model(self) -> Path | None:
        """The winner's folder."""
        return self._folder.model if self._folder.model.is_dir() else None

    @property
    def method(self) -> str:
        """The name of the search's merge method, or of the kind of its space."""
        return method_in(self.config)

    @property
    def page(self) -> Path | None:
        """`report.html`: the run's figures and tables as one page for a browser."""
        return self._folder.page if self._folder.page.is_file() else None

    def to_frame(self) -> Any:
        """The history as a pandas table, a row for each candidate: `generation`, `candidate` (its number there, from
        0), `fitness`, `examples`, its mean on each task by the task's name, and its searched parameters, such as
        `weight[layers 0-3 attention][maths]`; `gene[0]` and so forth where the space has no named parameters. For a
        search in stages, the history is the last stage's. Names of parameters need the first parent's headers, where
        the models are language models."""
        return history_frame(self.history, self.named_values())

    def named_values(self) -> NamedValues:
        document = self.config
        plugins.load_named(f"{self._folder.config}: plugins", document.get("plugins", []), self._folder.path)
        stored = stored_values(self._folder)
        if stored is not gene_values or "tasks" not in document or "backend" not in document:
            return stored

        @cache
        def space() -> Any:
            return self._open().facts.space

        def values(genomes: np.ndarray) -> Mapping[str, np.ndarray]:
            with suppress(InputError):
                # A backend of a plugin may have a space of its own, which its models alone open.
                return named_values_of(space(), genomes, model_names(list(map(Path, document["parents"]))))
            return gene_values(genomes)

        return values

    def tables(self) -> dict[str, Table]:
        result = self._result()
        tables = {scores_title(result is None or result.held_out).lower(): score_table(result)}
        if is_run(self._folder) and self.history:
            # The models' headers need not be there any more, and an earlier version's history has other keys.
            with suppress(InputError, LookupError):
                tables["parameters of the best"] = parameter_table(self.best.parameters)
        return tables

    def _result(self) -> StoredResult | None:
        return read_result(self._folder.result)

    @property
    def _source(self) -> TrialSource:
        folder, document = self._folder, self.config
        name, named_values = document.get("backend", "decoder"), self.named_values()

        def check() -> None:
            check_inputs(folder)
            if "random_numbers" in document:
                check_masks(folder)

        return TrialSource(
            self.method, named_values, self._open, find_backend(f"{folder.config}: backend", name, folder.path)
            .merges_recipes(document), check, tuple(folder.parts),
        )  # fmt: skip

    def _open(self) -> Backend:
        """The models of the run's last stage."""
        with PythonCall():
            folder = self._folder
            config = last_stage(folder)
            if config.evaluation.recalibrate:
                return build_problem(folder.config, config_from(folder.config, self.config, [], None)).exporting()
            if config.pool is None:
                return open_backend(folder.config, config, chained=True)
            problem = build_problem(folder.config, config)
            saved = Checkpoints(folder).restore(ignore)
            if saved is None:
                return problem.backend
            state = saved.strategy_state(problem.seed, problem.strategy, problem.space)
            return problem.within(context_of(problem.strategy, state)).backend


def named_values_of(space: Any, genomes: np.ndarray, parents: Sequence[str]) -> Mapping[str, np.ndarray]:
    """The searched parameters of genomes float32[P, D] by their names, or their genes where the space has no names."""
    if not hasattr(space, "named_values"):
        return gene_values(genomes)
    values: Mapping[str, np.ndarray] = space.named_values(genomes, parents)
    return values


def score_table(result: StoredResult | None) -> Table:
    """The held-out scores of a `result.json`, a row for each model, with the winner's lead over it and the 95% interval
    of the lead."""
    result = result or StoredResult()
    rows = []
    for row in result.table:
        lead = lead_over(result, row)
        scores = {"model": row.name, "role": row.role, "fitness": row.heldout_fitness, **row.heldout_scores}
        rows.append({**scores, "the winner's lead (95%)": None if lead is None else lead_cell(lead, ".3g")})
    return rows


def open_run(folder: Location) -> Run:
    """The run folder of a search, finished or not. Raises InputError for any other folder."""
    check_arguments(open_run, locals())
    return Run(run_at(as_path(folder).absolute()).path)
