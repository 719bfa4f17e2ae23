"""Searches as objects: a study searches a space of the merges of models (`api.spaces`) by tasks.

Each object is a part of a config document. The tasks are checked where the study is made. A study runs as
`evojax-merge search` runs the document, and its run folder is the same to the byte.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np

from evojax_merge import plugins
from evojax_merge.api.models import with_warnings
from evojax_merge.api.python_calls import Location, PythonCall, as_path, genome_array, ignore, plain_data
from evojax_merge.api.spaces import Models, Space
from evojax_merge.api.trials import Run, Searched, TrialSource, score_table
from evojax_merge.backends.registry import find_backend
from evojax_merge.commands.search import run_search
from evojax_merge.config.search_config import Config
from evojax_merge.errors import Failed, InputError, shown
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.evaluation.scores import Scale, Scores, TaskScores, means, score_matrix
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.problem import build_problem, config_from, plugins_of, resolved_document
from evojax_merge.report.described import Described, Table, parameter_table
from evojax_merge.report.frame import history_frame
from evojax_merge.report.stored_run import best_facts
from evojax_merge.schema.arguments import check_arguments, check_call
from evojax_merge.schema.section import Form
from evojax_merge.search.answers import ask, metrics, tell
from evojax_merge.search.checkpoints import Checkpoints
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import generation_key, init_state, next_state
from evojax_merge.search.protocols import capabilities_of, context_of, wants_gradients
from evojax_merge.search.recording import Generation, history_row
from evojax_merge.search.run_folder import check_place, check_same_config, is_run
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import StoredResult, read_result
from evojax_merge.search.successive_halving import HalvingResult
from evojax_merge.search.surrogate import empty_surrogate
from evojax_merge.steps.goals import measured_scales, with_goal
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.tasks import Arrays
from evojax_merge.tasks.kinds import kind_of
from evojax_merge.tasks.python_functions import PREFIX, referenced_functions, remember_functions

# The name of a study's document in messages.
WHERE = Path("Study")


@dataclass(frozen=True)
class HostFitness:
    """A fitness that is called with each merged pytree in turn, instead of being compiled with the merge."""

    function: Callable[..., Any]


HostCallback = Annotated[HostFitness, Form("a host_callback")]


def host_callback(function: Callable[..., Any]) -> HostFitness:
    """Mark a fitness that JAX cannot trace: a simulator, a metric of another library, an evaluation in batches."""
    check_arguments(host_callback, locals())
    return HostFitness(function)


Task = Mapping[str, Any] | HostCallback | Callable[..., Any]
Split = Literal["search", "validation", "heldout"]


class Study(Searched, Described):
    """A search for the best merge of models.

    space: a `MergeSpace`, `LayerPathSpace`, `PoolSpace` or `MixtureSpace` of `models`. tasks: the task, or a list of
    the tasks, that candidates are scored on, made by `tasks.ExactMatch` and its like, or mappings in a config's form;
    for pytrees also functions (model) -> a number, which JAX traces, or `host_callback(function)`. strategy:
    `strategies.cma_es(population=16)` and its like, or a name, such as `auto`; None: CMA-ES with its default
    population, or that of a pool. out: the run folder, which `run` needs; of pytrees in memory also None: a temporary
    one, which is there as long as the study and the runs that it returned. seed: the seed of all random numbers.
    resume, overwrite: continue, or replace, the run that lies in `out`. evaluation, export_dtype, scale, log: as in a
    config. search: other keys of a config's `search`, such as `validation`, the share of the examples that is kept back
    to choose the winner on, `finalists`, `rungs`, `stop`, `budget` and `controls`.

    Names of plugins and of the program stand for what they register: strategies (`dir(em.strategies)`) in `strategy`,
    merge methods (`evojax-merge methods`) in `MergeSpace` and `PoolSpace`, kinds of tasks as `kind` of a mapping, and
    backends in `load_models`. In the `table` of a run, `interval` is that of the winner's lead over a model, at 95%.
    """

    def __init__(
        self,
        models: Models,
        space: Space,
        tasks: Annotated[Sequence[Task] | Task, Form("a task or a list of tasks, each of em.tasks or a function")],
        *,
        strategy: str | Mapping[str, Any] | None = None,
        out: Location | None = None,
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        evaluation: Mapping[str, Any] | None = None,
        export_dtype: str | None = None,
        scale: str | None = None,
        log: Sequence[str] = (),
        **search: Any,
    ) -> None:
        check_arguments(Study.__init__, locals())
        section = {"strategy": strategy} if isinstance(strategy, str) else strategy or {}
        if space.models is not models:
            raise InputError("Study: space", "is a space of other models; expected a space of `models`")
        if "generations" in search:
            raise InputError("Study: generations", "is what `run` is called with; leave it out here")
        twice = next((key for key in search if key in section), None)
        if twice is not None:
            raise InputError(f"Study: {twice}", "is given by `strategy` as well; expected one of them")
        listed: Sequence[Task] = tasks if isinstance(tasks, Sequence) else [tasks]
        document = {
            **models.document(),
            **space.document(),
            "tasks": [_section(f"Study: tasks[{i}]", models, task) for i, task in enumerate(listed)],
            "search": {**section, **search},
            "seed": seed,
        }
        optional = {"evaluation": evaluation, "export_dtype": export_dtype, "scale": scale, "log": list(log) or None}
        document |= {key: value for key, value in optional.items() if value is not None}
        self.models, self.space, self.seed = models, space, seed
        # The program may change its working directory between two calls.
        self.out = None if out is None else as_path(out).absolute()
        self._document: dict[str, Any] = plain_data(str(WHERE), document)
        self._functions = referenced_functions(self._document)
        # The pytrees in the sections live as long as the study.
        self._tasks = document["tasks"]
        self._resume, self._overwrite = resume, overwrite
        self._warned: set[str] = set()
        if self.out is None and log:
            raise InputError("Study: log", "there is no run folder to log in; give `out`")
        if self.out is None and (resume or overwrite):
            raise InputError(f"Study: {'resume' if resume else 'overwrite'}", "there is no run folder; give `out`")
        with PythonCall(self._warned):
            self._parsed: Config = config_from(WHERE, dict(self._document), [], None)
            self._problem = build_problem(WHERE, self._parsed)
            if self._problem.scale != "none":
                # Unlike metrics choose it; a config that says it is the same.
                self._document["scale"] = self._problem.scale
            if self.out is not None and check_place(self.out, resume=resume, overwrite=overwrite) and resume:
                check_same_config(RunFolder(self.out), resolved_document(self._parsed, self._problem))
        # The generations that `tell` ended, and the state of the search after them.
        self._rows: list[dict[str, Any]] = []
        self._state: dict[str, Any] | None = None
        self._first = 0
        self._latest: tuple[Scores, TaskScores] | None = None
        self._evaluators: dict[str, SpaceEvaluator[Any]] = {}

    @property
    def config(self) -> dict[str, Any]:
        """The study as the document of a config."""
        return self._document

    def to_yaml(self) -> str:
        """The config as a YAML file has it: `evojax-merge search` writes the same run with it, byte for byte, from any
        folder. It has as many generations as were searched, and the plugins that the study uses. A comment says what is
        missing: functions, pytrees and registrations of the Python program, and generations before there are any. The
        order of the parameters stays as it is: a genome depends on it."""
        document = {**self._document, "search": dict(self._document["search"])}
        document |= {key: _absolute(document[key]) for key in ("base", "parents", "backend") if key in document}
        document |= {key: _absolute(document[key]) for key in ("tokenizer_source", "other_modules") if key in document}
        document["tasks"] = [
            {key: _absolute(value) if key in {"heldout", *task.paths()} else value for key, value in section.items()}
            for section, task in zip(document["tasks"], self._problem.splits.search, strict=True)
        ]
        generations, used = len(self.history), plugins_of(self._parsed, self._problem)
        if generations:
            document["search"]["generations"] = generations
        if used:
            document["plugins"] = used
        text, missing = dump_yaml(document), []
        if not generations:
            missing.append("search.generations: the number that Study.run is asked for")
        if PREFIX in text:
            missing.append(f"{PREFIX}NAME@DIGEST: functions and pytrees of the Python program; put them into files")
        backend, search = self._parsed.backend, self._parsed.search
        registered: list[tuple[str, Any]] = [(backend, backend), (search.strategy, search.strategy)]
        registered += [(section.name, kind_of(section)) for section in self._parsed.tasks]
        registered += [(getattr(part, "name", backend), part) for part in self._problem.facts.extensions]
        names = dict.fromkeys(name for name, part in registered if plugins.registered_by_program(part))
        missing += [f"{name}: registered by the Python program; name its file in `plugins`" for name in names]
        return "".join(f"# Missing: {line}\n" for line in missing) + text

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
        generation. force: continue where the models or the passes do not fit into memory. A warning is given once for
        a study.
        """
        check_arguments(Study.run, locals())
        check_call("Study.run: on_generation", on_generation, ["generation"])
        budget = self._parsed.search.budget
        if (generations is None) == (budget is None):
            raise InputError(
                "Study.run: generations", "missing; expected a number, or a budget of the study" if budget is None
                else f"{generations}; the study has a budget, {budget}: leave them out",
            )  # fmt: skip
        if generations is not None and (generations := int(generations)) < 1:
            raise InputError("Study.run: generations", f"{generations}; expected 1 or more")
        if self._rows:
            raise InputError(
                "Study.run", f"{len(self._rows)} generations of this study were told by hand, in memory, and its run "
                "folder has none of them; use another Study",
            )  # fmt: skip
        if self.out is None and not self.models.held:
            raise InputError("Study.run: out", "missing; a run of models in files needs a run folder, give it to Study")
        if self.out is None:
            self._temporary = TemporaryDirectory(prefix="evojax-merge-")
            self.out = Path(self._temporary.name) / "run"
        config = self._parsed
        if generations is not None:
            wanted = len(self._saved_history()) + generations
            search = config.search.model_copy(update={"generations": wanted})
            config = config.model_copy(update={"search": search})
        begun: list[RunFolder] = []

        def start(folder: RunFolder) -> None:
            # `on_generation` may read the study's history, which is that of its run.
            begun.append(folder)
            self._resume = True

        try:
            with PythonCall(self._warned):
                remember_functions(self._functions)
                run_search(
                    WHERE, config, self.out, resume=self._resume, overwrite=self._overwrite, on_started=start,
                    on_generation=on_generation, force=force,
                )  # fmt: skip
                return with_warnings(Run(self.out, self))
        finally:
            self._state = None
            if begun:
                # A run that was refused leaves nothing to continue.
                self._resume, self._overwrite = is_run(RunFolder(self.out)), False

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
        with PythonCall():
            evaluator = self._evaluator(split).within(self._context())
            scores = evaluator.score(genomes)
        matrix = score_matrix(evaluator.tasks, scores, evaluator.goal)
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
        before = self._before()
        with PythonCall():
            strategy_state = tell(strategy, generation_key(self.seed, number), state_after_ask, genomes, matrix)
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
        row = history_row(number + 1, evaluations, genomes, shown_by, self._state, metrics(strategy, strategy_state))
        if not isinstance(scores, Scores):
            # Numbers of one's own do not say what they were measured on.
            row["examples"] = [None] * len(genomes)
        self._rows.append(row)

    def _asked(self) -> tuple[Any, Any]:
        strategy, state = self._problem.strategy, self._before()["strategy"]
        if wants_gradients(strategy, state):
            raise InputError(
                "Study.ask", f"the strategy {strategy.name} follows gradients, which a loop by hand does not have; "
                "use run, or another strategy",
            )  # fmt: skip
        with PythonCall():
            return ask(strategy, generation_key(self.seed, self._generations), state, self.space.dims)

    def _context(self) -> Any:
        """The part of the strategy's state that the space needs to decode genomes (see `CapableStrategy.context`)."""
        if not capabilities_of(self._problem.strategy).lends_context:
            return None
        _, state = self._asked()
        return context_of(self._problem.strategy, state)

    def _before(self) -> dict[str, Any]:
        """The state before the next generation: the state after the last `tell`, the run folder's saved state, or the
        first state."""
        if self._state is None:
            problem, surrogate = self._problem, empty_surrogate(1, self.space.dims, 0)
            with PythonCall():
                state = init_state(problem.search, self.seed, problem.strategy, problem.space, surrogate)
            saved = None if self.out is None or not self._resume else Checkpoints(RunFolder(self.out)).restore(ignore)
            if saved is not None:
                state |= saved.part({name: state[name] for name in ("strategy", "genomes", "fitness")})
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
            evaluator = open_evaluator(self._problem, tasks, bank=self._bank)
            self._evaluators[split] = with_goal(self._problem, evaluator, self._scales)
        return self._evaluators[split]

    @cached_property
    def _batches(self) -> Any:
        return self._problem.prepare()

    @cached_property
    def _scales(self) -> Mapping[str, Scale]:
        problem = self._problem
        if problem.scale == "none":
            return {}
        return measured_scales(problem, open_evaluator(problem, self._batches.search, bank=self._bank))

    @cached_property
    def _bank(self) -> Any:
        with PythonCall():
            return self._problem.backend.load(ONE_DEVICE, lambda done: None, None)

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

    def _result(self) -> StoredResult | None:
        """The `result.json` of the study's generations; None for those of a loop by hand."""
        saved = self.out is not None and not self._rows and bool(self._saved_history())
        return read_result(RunFolder(self.out).result) if saved and self.out is not None else None

    @cached_property
    def _source(self) -> TrialSource:
        factory = find_backend(f"{WHERE}: backend", self._parsed.backend, Path.cwd())
        keep = () if self.out is None else tuple(RunFolder(self.out).parts)
        return TrialSource(
            self.space.method, self.space.named_values,
            lambda: self._problem.within(self._context()).exporting(),
            factory.merges_recipes(vars(self._parsed)), keep=keep,
        )  # fmt: skip

    def to_frame(self) -> Any:
        """The history as a pandas table, a row for each candidate: see `Run.to_frame`."""
        return history_frame(self.history, self.space.named_values)

    def facts(self) -> dict[str, Any]:
        history = self.history
        return {
            "method": self.space.method,
            "parents": self.models.names,
            "dimensions": self.space.dims,
            "strategy": self._problem.strategy.name,
            "population": self._problem.strategy.population,
            "tasks": [task.name for task in self._problem.splits.search],
            **({} if self._problem.scale == "none" else {"scale": self._problem.scale}),
            "generations": len(history),
            **best_facts(history, self._result()),
            "out": None if self.out is None else str(self.out),
        }

    def tables(self) -> dict[str, Table]:
        history = self.history
        if not history:
            return self.space.tables()
        if not self._rows and self.out is not None and is_run(RunFolder(self.out)):
            scores = score_table(read_result(RunFolder(self.out).result))
        else:
            scores = [{"task": name, "score of the best": value} for name, value in self.best.scores.items()]
        return {"scores": scores, "parameters of the best": parameter_table(self.best.parameters)}


def _absolute(value: Any) -> Any:
    """References of a config with whole paths in place of paths from the working directory; a name after a `.py:`
    stays."""
    if isinstance(value, list):
        return list(map(_absolute, value))
    if isinstance(value, dict):
        return {key: _absolute(part) if key == "of" else part for key, part in value.items()}
    if not isinstance(value, str):
        return value
    file, separator, name = value.rpartition(":") if ".py:" in value else (value, "", "")
    path = Path.cwd() / os.path.expanduser(file)
    return f"{path.resolve()}{separator}{name}" if os.path.exists(path) else value


def _section(where: str, models: Models, task: Task) -> Mapping[str, Any]:
    """A task's section of a config. A function alone is a task of pytrees. Raises InputError for one where the models
    are language models."""
    if isinstance(task, Mapping):
        given = task.get("function")
        if isinstance(given, HostFitness) and task.get("kind") == "arrays":
            return {**task, "function": given.function, "traced": False}
        return task
    if models.decoder is not None:
        raise InputError(where, "is a function alone; for language models use em.tasks.Function(f, file=…)")
    function, traced = (task.function, False) if isinstance(task, HostFitness) else (task, True)
    name = getattr(function, "__name__", "")
    return Arrays(function, name=name if name.isidentifier() else "fitness", traced=traced)


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
