"""Searches as objects: models, the space of their merges, and a study that searches it.

Each object is a part of a config document, checked where it is made. A study runs as `evojax-merge search` runs the
document, and its run folder is the same to the byte.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evojax_merge import plugins
from evojax_merge.api import Location, as_yaml, bars_on_terminals, genome_array, merge, with_warnings
from evojax_merge.arguments import check_arguments
from evojax_merge.backends.decoder.opening import build_space, check_models
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.tokens import TokenizerChoice
from evojax_merge.commands.search import run_search
from evojax_merge.config import Config, SpaceConfig, parse
from evojax_merge.errors import Failed, InputError, shown
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.evaluation.scores import Scores, TaskScores, fitness, means, score_matrix
from evojax_merge.mergekit.streams import plain_recipe
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.models.config import DecoderConfig
from evojax_merge.problem import build_problem, config_from
from evojax_merge.references import resolve_reference
from evojax_merge.report.comparison import model_names
from evojax_merge.report.described import Described
from evojax_merge.report.frame import history_frame
from evojax_merge.run import Run, open_run
from evojax_merge.search.answers import ask, metrics, tell
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import Generation, generation_key, history_row, init_state, next_state
from evojax_merge.search.protocols import wants_gradients
from evojax_merge.search.run_folder import Checkpoints, check_place, is_run, read_result
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.successive_halving import HalvingResult
from evojax_merge.search.surrogate import empty_surrogate
from evojax_merge.selection import open_evaluator
from evojax_merge.spaces.parameter import ParameterSpace
from evojax_merge.spaces.search_parameters import find_method, options_of
from evojax_merge.yaml_reader import parse_documents

# The name of a study's document in messages.
WHERE = Path("Study")
Split = Literal["search", "validation", "heldout"]


@dataclass(frozen=True, repr=False)
class Models(Described):
    """Models of one architecture, by their headers, for a search to merge. base, parents: the names that were given;
    folders: the parents' folders; base_folder: the base's; decoder: the architecture's config."""

    base: str | None
    parents: tuple[str, ...]
    base_folder: Path | None
    folders: tuple[Path, ...]
    decoder: DecoderConfig
    tokenizer_source: str | None = None
    other_modules: str | None = None

    @property
    def names(self) -> list[str]:
        """The parents' names in tables."""
        return model_names(self.folders)

    def document(self) -> dict[str, Any]:
        """The models' keys of a config."""
        keys = {
            "base": self.base, "parents": list(self.parents), "tokenizer_source": self.tokenizer_source,
            "other_modules": self.other_modules,
        }  # fmt: skip
        return {key: value for key, value in keys.items() if value is not None}

    def facts(self) -> dict[str, Any]:
        base = None if self.base_folder is None else model_names([self.base_folder])[0]
        return {"base": base, "parents": self.names, "layers": self.decoder.layers}


def load_models(
    base: Location | None,
    parents: Sequence[Location],
    *,
    tokenizer_source: Location | None = None,
    other_modules: Location | None = None,
) -> Models:
    """Open models for a search, by their headers alone.

    base: the model that task vectors are taken from, or None. base, parents: folders, GGUF files, hub ids, adapters
    (`base+adapter`) or `zoo:` names; relative paths start in the working directory. tokenizer_source, other_modules: as
    in a config.
    """
    check_arguments(load_models, locals())
    plugins.load()
    if not parents:
        raise InputError("load_models: parents", "is empty; expected models to merge")
    where, root = "load_models", Path.cwd()
    base_name = None if base is None else str(base)
    names = tuple(map(str, parents))
    base_folder = None if base_name is None else resolve_reference(f"{where}: base", base_name, root)
    folders = tuple(resolve_reference(f"{where}: parents[{k}]", name, root) for k, name in enumerate(names))
    opened, choice = [*([] if base_folder is None else [base_folder]), *folders], None
    tokenizer = None if tokenizer_source is None else str(tokenizer_source)
    if tokenizer is not None:
        folder = (
            base_folder if tokenizer == "base" else resolve_reference(f"{where}: tokenizer_source", tokenizer, root)
        )
        if folder not in opened:
            raise InputError(f"{where}: tokenizer_source", f"{tokenizer}; expected base or one of the parents")
        choice = TokenizerChoice(opened.index(folder))
    _, decoder = open_sources(opened, choice)
    other = None if other_modules is None else str(other_modules)
    return Models(base_name, names, base_folder, folders, decoder, tokenizer, other)


class MergeSpace(Described):
    """The parameters of a merge that a search optimises. keys: the keys of a config's `space`, such as
    `layers_per_group`, `components`, `parameters` and `fixed`."""

    def __init__(self, models: Models, method: str, **keys: Any) -> None:
        check_arguments(MergeSpace.__init__, locals())
        plugins.load()
        where = "MergeSpace"
        self._document: dict[str, Any] = as_yaml(where, {"method": method, **keys})
        config: SpaceConfig = parse(Path(where), self._document, SpaceConfig)
        chosen, has_base = find_method(f"{where}: method", method), models.base is not None
        check_models(where, chosen, has_base, len(models.parents))
        options_of(where, chosen, chosen.uses_base(has_base), config.normalize, config.rescale)
        self.models = models
        self.method = method
        self._space = build_space(where, config, chosen, models.parents, models.decoder)

    @property
    def dims(self) -> int:
        """D, the number of genes of a genome."""
        return self._space.dims

    @property
    def start(self) -> np.ndarray:
        """float32[D]: the genome with which a search begins."""
        return self._space.start

    @property
    def groups(self) -> list[str]:
        """The groups of tensors that share their parameters."""
        return list(self._space.groups)

    def parameters(self, genome: Any) -> dict[str, float]:
        """The searched parameters that a genome float32[D] stands for: `weight[layers 0-3 attention][maths]` -> value,
        and so forth."""
        return _parameters(self._space, genome_array("genome", genome, (self.dims,)), self.models.names)

    def document(self) -> dict[str, Any]:
        """A config's `space`."""
        return self._document

    def facts(self) -> dict[str, Any]:
        searched = [parameter.name for parameter in self._space.search_parameters]
        return {
            "method": self.method, "parents": self.models.names, "parameters": searched, "groups": len(self.groups),
            "dimensions": self.dims,
        }  # fmt: skip


def _parameters(space: ParameterSpace, genome: np.ndarray, parents: Sequence[str]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in space.named_values(genome[None], parents).items()}


@dataclass(frozen=True, repr=False)
class Trial(Described):
    """A candidate of a study. generation: the generation's number, from 1; candidate: its number in the generation,
    from 0; both None for a winner that was in no generation. fitness: None where the candidate failed; examples: the
    number of examples that it was evaluated on; scores: its mean on each task; genome: float32[D]."""

    generation: int | None
    candidate: int | None
    fitness: float | None
    examples: int | None
    scores: dict[str, float | None]
    genome: np.ndarray = field(compare=False)
    _study: "Study" = field(compare=False)

    @property
    def parameters(self) -> dict[str, float]:
        """The searched parameters by their names."""
        return self._study.space.parameters(self.genome)

    @property
    def recipe(self) -> Any:
        """The candidate as a mergekit recipe, which `merge` makes into a model."""
        return plain_recipe(parse_documents("recipe", self._study._problem.backend.recipe(self.genome)))

    def export(self, out: Location, *, dtype: str | None = None, overwrite: bool = False) -> Path:
        """Write the candidate's model to the folder `out`, as it was scored unless `dtype` is another one."""
        check_arguments(Trial.export, locals())
        return merge(self.recipe, out, dtype=dtype, overwrite=overwrite)

    def facts(self) -> dict[str, Any]:
        place = {"generation": self.generation, "candidate": self.candidate}
        return {"method": self._study.space.method} | place | {"fitness": self.fitness, "examples": self.examples}


class Study(Described):
    """A search for the best merge of models.

    space: the searched parameters of merges of `models`. tasks: the tasks that candidates are scored on, made by
    `tasks.ExactMatch` and its like, or mappings in a config's form. strategy: `strategies.cma_es(population=16)` and
    its like, or a name, such as `auto`; None: CMA-ES with its default population. out: the run folder, which `run`
    needs. seed: the seed of all random numbers. validation: the share of the examples that is kept back to choose the
    winner on. resume, overwrite: continue, or replace, the run that lies in `out`. evaluation, export_dtype: as in a
    config. search: other keys of a config's `search`, such as `finalists`, `rungs`, `stop` and `budget`.
    """

    def __init__(
        self,
        models: Models,
        space: MergeSpace,
        tasks: Sequence[Mapping[str, Any]],
        *,
        strategy: str | Mapping[str, Any] | None = None,
        out: Location | None = None,
        seed: int = 0,
        validation: float = 0.0,
        resume: bool = False,
        overwrite: bool = False,
        evaluation: Mapping[str, Any] | None = None,
        export_dtype: str | None = None,
        **search: Any,
    ) -> None:
        check_arguments(Study.__init__, locals())
        section = {"strategy": strategy} if isinstance(strategy, str) else strategy or {}
        if space.models is not models:
            raise InputError("Study: space", "is a space of other models; expected a MergeSpace of `models`")
        if "generations" in search:
            raise InputError("Study: generations", "is what `run` is called with; leave it out here")
        twice = next((key for key in search if key in section), None)
        if twice is not None:
            raise InputError(f"Study: {twice}", "is given by `strategy` as well; expected one of them")
        document = {
            **models.document(),
            "space": space.document(),
            "tasks": list(tasks),
            "search": {**section, "validation": validation, **search},
            "seed": seed,
        }
        document |= {} if evaluation is None else {"evaluation": evaluation}
        document |= {} if export_dtype is None else {"export_dtype": export_dtype}
        self.models, self.space, self.seed = models, space, seed
        self.out = None if out is None else Path(out)
        self._document: dict[str, Any] = as_yaml(str(WHERE), document)
        self._parsed: Config = config_from(WHERE, as_yaml(str(WHERE), document), [], None)
        self._problem = build_problem(WHERE, self._parsed)
        self._resume, self._overwrite = resume, overwrite
        if self.out is None and (resume or overwrite):
            raise InputError(f"Study: {'resume' if resume else 'overwrite'}", "there is no run folder; give `out`")
        if self.out is not None:
            check_place(self.out, resume=resume, overwrite=overwrite)
        # The generations that `tell` ended, and the state of the search after them.
        self._rows: list[dict[str, Any]] = []
        self._state: dict[str, Any] | None = None
        self._first = 0
        self._latest: tuple[Scores, TaskScores] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The study as the document of a config."""
        return self._document

    def to_yaml(self) -> str:
        """The config as a YAML file has it, for `evojax-merge search`. The order of the parameters stays as it is: a
        genome depends on it."""
        return dump_yaml(self._document)

    # -------------------------------------------------------------------------------------------------------------
    # The whole search

    def run(
        self,
        generations: int | None = None,
        on_generation: Callable[[Generation], None] = lambda generation: None,
        *,
        force: bool = False,
    ) -> Run:
        """Search `generations` more generations in the run folder, or as many as the study's `budget` pays for, choose
        the winner, write its model, and return the run.

        A second call, or a study with `resume`, continues from the last saved generation. on_generation gets every
        generation. force: continue where the models or the passes do not fit into memory.
        """
        check_arguments(Study.run, locals())
        budget = self._parsed.search.budget
        if (generations is None) == (budget is None):
            raise InputError(
                "Study.run: generations", "missing; expected a number, or a budget of the study" if budget is None
                else f"{generations}; the study has a budget, {budget}: leave them out",
            )  # fmt: skip
        if generations is not None and generations < 1:
            raise InputError("Study.run: generations", f"{generations}; expected 1 or more")
        if self.out is None:
            raise InputError("Study.run: out", "missing; a run needs a run folder, give it to Study")
        if self._rows:
            raise InputError(
                "Study.run", f"{len(self._rows)} generations of this study were told by hand, in memory, and its run "
                "folder has none of them; use another Study",
            )  # fmt: skip
        config = self._parsed
        if generations is not None:
            wanted = len(self._saved_history()) + generations
            search = config.search.model_copy(update={"generations": wanted})
            config = config.model_copy(update={"search": search})
        begun: list[RunFolder] = []
        try:
            with bars_on_terminals():
                run_search(
                    WHERE, config, self.out, resume=self._resume, overwrite=self._overwrite, on_started=begun.append,
                    on_generation=on_generation, force=force,
                )  # fmt: skip
        finally:
            self._state = None
            if begun:
                # A run that was refused leaves nothing to continue.
                self._resume, self._overwrite = is_run(RunFolder(self.out)), False
        return with_warnings(open_run(self.out))

    # -------------------------------------------------------------------------------------------------------------
    # A loop by hand, in memory

    def ask(self) -> np.ndarray:
        """The next generation's genomes, float32[P, D]. Every call returns the same genomes until `tell`."""
        genomes, _ = self._asked()
        return np.asarray(genomes)

    def evaluate(self, genomes: Any, *, split: Split = "search") -> Scores:
        """The scores of genomes float32[P, D] on the examples of a split; on `search`, the examples that generations
        use. `.fitness` float64[P] is higher for better candidates, NaN for those that failed."""
        check_arguments(Study.evaluate, locals())
        genomes = genome_array("genomes", genomes, ("P", self.space.dims))
        if not len(genomes):
            raise InputError("genomes", "are empty; expected 1 or more")
        evaluator = self._evaluator(split)
        scores = evaluator.score(genomes)
        # The sum is a run's, to the last bit.
        matrix = replace(score_matrix(evaluator.tasks, scores), predicted=fitness(evaluator.tasks, scores))
        if split == "search":
            self._latest = matrix, scores
        return matrix

    def tell(self, genomes: Any, scores: Any) -> None:
        """End a generation. genomes: the genomes from `ask`; scores: the result of `evaluate` for them, or a fitness of
        one's own, float[P], higher for better candidates and NaN for those that failed."""
        strategy, dims = self._problem.strategy, self.space.dims
        genomes = genome_array("genomes", genomes, (strategy.population, dims))
        matrix = _checked_scores(scores, len(genomes))
        values = matrix.fitness
        number = self._generations
        if not np.isfinite(values).any():
            raise Failed(f"generation {number + 1}: all {len(values)} candidates failed, none has a finite fitness")
        _, state_after_ask = self._asked()
        before, key = self._before(), generation_key(self.seed, number)
        strategy_state = tell(strategy, key, state_after_ask, genomes, matrix)
        examples = matrix.evaluated.sum(axis=1)
        complete = np.isfinite(values) & matrix.evaluated.all(axis=1)
        of_best: dict[str, float] = {}
        if self._latest is not None and self._latest[0] is scores:
            leader = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
            of_best = means(self._evaluator("search").tasks, self._latest[1])[leader]
        shown_by = HalvingResult(
            values, examples, complete, matrix, of_best, TaskScores({}), empty_surrogate(1, dims, 0)
        )
        self._state = next_state(strategy_state, genomes, shown_by, before)
        evaluations = len(genomes) + (self.history[-1]["evaluations"] if number else 0)
        self._rows.append(
            history_row(number + 1, evaluations, genomes, shown_by, self._state, metrics(strategy, strategy_state))
        )

    def _asked(self) -> tuple[Any, Any]:
        strategy, state = self._problem.strategy, self._before()["strategy"]
        if wants_gradients(strategy, state):
            raise InputError(
                "Study.ask", f"the strategy {strategy.name} follows gradients, which a loop by hand does not have; "
                "use run, or another strategy",
            )  # fmt: skip
        return ask(strategy, generation_key(self.seed, self._generations), state, self.space.dims)

    def _before(self) -> dict[str, Any]:
        """The state before the next generation: the state after the last `tell`, the run folder's saved state, or the
        first state."""
        if self._state is None:
            problem, surrogate = self._problem, empty_surrogate(1, self.space.dims, 0)
            state = init_state(problem.search, self.seed, problem.strategy, problem.space, surrogate)
            saved = None if self.out is None or not self._resume else Checkpoints(RunFolder(self.out)).restore(_ignore)
            if saved is not None:
                parts = {name: state[name] for name in ("strategy", "genomes", "fitness")}
                arrays = {path: leaf for path, leaf in saved.arrays.items() if path.partition(".")[0] in parts}
                state |= replace(saved, arrays=arrays).state(parts)
            self._state, self._first = state, 0 if saved is None else saved.generations
        return self._state

    def _evaluator(self, split: Split) -> SpaceEvaluator[Any]:
        if split not in self._evaluators:
            splits = self._batches
            # Generations are scored on a part of the search split where a task has a `limit`.
            search = splits.shards[0] if len(splits.shards) == 1 else splits.search
            tasks = {"search": search, "validation": splits.validation, "heldout": splits.heldout}[split]
            if tasks is None:
                raise InputError("Study.evaluate: split", "validation; the study keeps none back (validation)")
            self._evaluators[split] = open_evaluator(self._problem, tasks, bank=self._bank)
        return self._evaluators[split]

    @cached_property
    def _evaluators(self) -> dict[str, SpaceEvaluator[Any]]:
        return {}

    @cached_property
    def _batches(self) -> Any:
        return self._problem.prepare()

    @cached_property
    def _bank(self) -> Any:
        with bars_on_terminals():
            return self._problem.backend.load(ONE_DEVICE, lambda done: None)

    # -------------------------------------------------------------------------------------------------------------
    # Results

    @property
    def _generations(self) -> int:
        """The number of generations before the next one."""
        self._before()
        return self._first + len(self._rows)

    def _saved_history(self) -> list[dict[str, Any]]:
        if self.out is None or not self._resume or not is_run(RunFolder(self.out)):
            return []
        return RunFolder(self.out).read_history()

    @property
    def history(self) -> list[dict[str, Any]]:
        """One mapping a generation, as in `history.jsonl`: the run folder's generations, then the generations that
        `tell` ended."""
        saved = self._saved_history()
        return [*(saved[: self._first] if self._rows else saved), *self._rows]

    @property
    def trials(self) -> list[Trial]:
        """Every candidate of every generation, in their order."""
        return [self._trial(row, candidate) for row in self.history for candidate in range(len(row["fitness"]))]

    def _trial(self, row: Mapping[str, Any], candidate: int) -> Trial:
        scores = {name: values[candidate] for name, values in row["task_scores"].items()}
        genome = np.array(row["genomes"][candidate], np.float32)
        value, examples = row["fitness"][candidate], row["examples"][candidate]
        return Trial(row["generation"], candidate, value, examples, scores, genome, self)

    @property
    def best(self) -> Trial:
        """The winner that the run has chosen; before it has, and in a loop by hand, the candidate of the highest
        fitness on all examples. Raises InputError where there is no generation yet."""
        result = None if self._rows or not self._saved_history() else read_result(RunFolder(self._folder).result)
        trials = self.trials
        if result is not None and result.get("generations") == len(self.history):
            genome = np.array(result["genome"], np.float32)
            same = (trial for trial in trials if np.array_equal(trial.genome, genome))
            winner = Trial(None, None, result["search_fitness"]["winner"], None, {}, genome, self)
            return next(same, winner)
        finite = [trial for trial in trials if trial.fitness is not None]
        if not finite:
            raise InputError("Study.best", "there is no generation yet; call run, or tell")
        most = max(trial.examples or 0 for trial in finite)
        complete = [trial for trial in finite if trial.examples == most]
        return max(complete, key=lambda trial: trial.fitness or 0.0)

    @property
    def _folder(self) -> Path:
        assert self.out is not None
        return self.out

    def to_frame(self) -> Any:
        """The history as a pandas table, a row for each candidate: see `Run.to_frame`."""
        space = self._problem.space
        assert isinstance(space, ParameterSpace)
        return history_frame(self.history, partial(space.named_values, parents=self.models.names))

    def plot(self) -> Any:
        """An Altair chart of the fitness over generations: best so far, best, mean, and validation where it was looked
        at. Raises InputError where there is no generation yet."""
        from evojax_merge.report.charts import history_chart

        if not self.history:
            raise InputError("Study.plot", "there is no generation yet; call run, or tell")
        return history_chart(self.history)

    def facts(self) -> dict[str, Any]:
        history = self.history
        return {
            "method": self.space.method,
            "parents": self.models.names,
            "dimensions": self.space.dims,
            "strategy": self._problem.strategy.name,
            "population": self._problem.strategy.population,
            "tasks": [task.name for task in self._problem.splits.search],
            "generations": len(history),
            "best_fitness": history[-1]["best_so_far"] if history else None,
            "out": None if self.out is None else str(self.out),
        }


def _ignore(line: str) -> None:
    """Drop a message of a checkpoint's reader."""


def _checked_scores(scores: Any, population: int) -> Scores:
    """The scores of a population as they are, or a fitness float[P] as scores of one example."""
    expected = f"expected the Scores of {population} candidates, or {population} numbers"
    if isinstance(scores, Scores):
        if len(scores.values) != population:
            raise InputError("scores", f"are of {len(scores.values)} candidates; {expected}")
        return scores
    try:
        values = np.asarray(scores)
        values = values.astype(float) if values.dtype.kind in "fiu" else np.zeros(())
    except (TypeError, ValueError):
        values = np.zeros(())
    if values.shape != (population,):
        raise InputError("scores", f"{shown(scores)}; {expected}")
    values = np.where(np.isfinite(values), values, np.nan)
    shape = (population, 1)
    matrix = values.reshape(shape).astype(np.float32)
    return Scores(matrix, np.ones(shape, bool), np.zeros(1, int), ("fitness",), np.ones(1), predicted=values)
