"""Searching for a merge of any pytrees: Flax parameters, a whole nnx module, nested dicts and lists of arrays.

The search is the one for checkpoints, with pytrees in memory as its backend.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

from evojax_merge import plugins
from evojax_merge.api.python_calls import PythonCall
from evojax_merge.backends.function.backend import FunctionBackend, tree_facts
from evojax_merge.backends.function.opening import named_arrays, save_tree, tree_merge
from evojax_merge.backends.function.programs import score_count
from evojax_merge.backends.function.trees import TreeMerge, open_trees
from evojax_merge.config.documents import explain
from evojax_merge.config.search_config import (
    MAX_SEED,
    Bounds,
    EvaluationConfig,
    Numbers,
    SearchConfig,
    Section,
    SpaceConfig,
)
from evojax_merge.core import evolve_on
from evojax_merge.errors import LOG, InputError, print_warning
from evojax_merge.evaluation.targets import live_target
from evojax_merge.problem import SearchProblem, open_search, resolved_search, searchable
from evojax_merge.report.loggers import LoggedSearch, check_loggers, logged
from evojax_merge.report.progress import generation_line
from evojax_merge.schema.arguments import check_arguments, check_call
from evojax_merge.schema.section import Form
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.search.environment import recorded_session
from evojax_merge.search.loop import Generation, Reporter, Storage
from evojax_merge.search.protocols import differentiates
from evojax_merge.search.run_folder import opened, random_numbers
from evojax_merge.search.run_parts import check_room
from evojax_merge.spaces.search_parameters import method_with_base
from evojax_merge.steps.selection import open_evaluators, select_best
from evojax_merge.system.file_system import atomic_write, atomic_write_bytes
from evojax_merge.tasks.arrays import ArrayTask
from evojax_merge.tasks.opening import split_task
from evojax_merge.tasks.python_trees import digest_of, flatten

WHERE = "search_pytrees"
# The number of candidates that are compared on the validation split; without such a split the best candidate wins.
FINALISTS = 5


@dataclass(frozen=True)
class HostFitness:
    """A fitness that is called with each merged pytree in turn, instead of being compiled with the merge."""

    function: Callable[[Any], Any]


HostCallback = Annotated[HostFitness, Form("a host_callback")]


def host_callback(function: Callable[[Any], Any]) -> HostFitness:
    """Mark a fitness that JAX cannot trace: a simulator, a metric of another library, an evaluation in batches."""
    check_arguments(host_callback, locals())
    return HostFitness(function)


@dataclass(frozen=True)
class PytreeSearch:
    """The result of a search. best: the best merge; fitness, scores: its fitness and its scores per example
    (float32[N], N = 1 where the fitness is one number), on the examples that it was chosen on; parameters: by group,
    the searched parameters (one per parent, or one); history: a mapping a generation, as in a run folder's
    history.jsonl. chosen_on: the numbers of the validation split's examples, on which the winner was chosen; None
    without such a split; stopped: the criterion that ended the search before its last generation; table: the fitness of
    the base, the parents, the uniform merge and the winner on the held-out examples, a mapping each; notes: lines on
    the choice of the strategy."""

    best: Any = field(repr=False)
    fitness: float
    scores: np.ndarray = field(repr=False)
    parameters: dict[str, dict[str, tuple[float, ...]]]
    history: tuple[dict[str, Any], ...] = field(repr=False)
    chosen_on: tuple[int, ...] | None = field(repr=False, default=None)
    stopped: str | None = None
    table: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = field(repr=False, default=())


def search_pytrees(
    parents: Sequence[Any],
    fitness: Callable[..., Any] | HostCallback,
    *,
    base: Any = None,
    examples: Any = None,
    method: str = "linear",
    parameters: Mapping[str, Bounds | Mapping[str, Any]] | None = None,
    fixed: Mapping[str, Numbers] | None = None,
    normalize: bool | None = None,
    rescale: bool | str | None = None,
    groups: Callable[[str], str] | None = None,
    strategy: str = "cma_es",
    population: int | None = None,
    generations: int | None = None,
    budget: str | None = None,
    sigma: float = 1 / 6,
    seeds: Sequence[str] | None = None,
    controls: Sequence[str] = (),
    rungs: int = 1,
    rung_examples: str = "random",
    validation: float = 0.0,
    heldout: float = 0.0,
    validate_every: int | None = None,
    stop: Mapping[str, float] | None = None,
    gradient: Mapping[str, Any] | None = None,
    seed: int = 0,
    chunk: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log: Sequence[str] = (),
    on_generation: Callable[[Generation], None] = lambda generation: None,
) -> PytreeSearch:
    """Search for the merge of `parents` with the highest fitness.

    parents: pytrees of one structure, whose leaves have the same shapes; `base` one more, for methods that take task
    vectors. Floating-point leaves are merged; all others (counts, keys) are the base's, or the first parent's. fitness:
    a merged pytree -> a number, or an array [N] with one number per example, whose mean counts; higher is better, and a
    candidate whose fitness is not finite has failed. JAX traces it, unless it is `host_callback(...)`. examples: a
    pytree of arrays with a leading axis N; fitness is then called with the merged pytree and some rows of it, and
    returns one number for each, so that candidates can be compared on few examples first (`rungs` above 1: successive
    halving, as in a config; `rung_examples="item_response"`: on the examples that best distinguish candidates).

    method: any of merge_kernels.METHODS. parameters: the searched ones, with `low`, `high` and `start` (None: the
    method's first, within its usual bounds); `fixed`, `normalize`, `rescale` as in a config's space. groups: a leaf's
    path ("encoder/0/kernel") -> the name of the group whose parameters it shares; None: a group for each module of the
    top level. strategy, population, generations, budget, sigma, seeds, rungs, gradient: as in a config's search; the
    strategies `gradient` and `hybrid` differentiate a traced fitness, and `auto` takes the former for one. validation:
    the share of the examples that is kept out of the generations, and on which the winner is chosen; heldout: the share
    that decides nothing, and on which the winner is compared with the base, the parents, the uniform merge and the
    `controls` (`["greedy"]`) in `table`; validate_every: the number of generations between two evaluations on the
    validation split. stop: the criteria that end the search before its last generation, any of `evaluations`,
    `seconds`, `target` and `stagnation`, as in a config. chunk: the number of candidates that are computed together;
    None: one on a CPU, else all.

    out: a run folder: history.jsonl, checkpoints, result.json and best/params.safetensors (leaves by their paths).
    resume continues a run there; overwrite starts it again. log: the loggers that get the figures of each generation,
    as in a config.

    Deterministic for a seed. Raises InputError for arguments that cannot be merged or searched, and Failed where no
    candidate of a generation has a finite fitness.
    """
    given = SimpleNamespace(**locals())
    check_arguments(search_pytrees, vars(given))
    _check_combinations(given)
    plugins.load()
    section = _search_section(given)
    backend = _open_backend(given)
    with PythonCall():
        task = _task(fitness, examples, backend.merge)
    problem = _problem(given, section, backend, task)
    with PythonCall(), ExitStack() as stack:
        return _run(given, problem, stack)


def _check_combinations(given: Any) -> None:
    """Raises InputError for arguments that do not go together."""
    examples, out = given.examples, given.out
    leaves = [leaf for _, leaf in flatten(f"{WHERE}: examples", examples)[0]]
    sizes = sorted({np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves})
    if examples is not None and (len(sizes) != 1 or not sizes[0]):
        raise InputError(WHERE, f"examples: leading axes of {sizes}; expected arrays with one number of examples")
    function = given.fitness.function if isinstance(given.fitness, HostFitness) else given.fitness
    check_call(f"{WHERE}: fitness", function, ["merged", *([] if examples is None else ["examples"])])
    check_call(f"{WHERE}: on_generation", given.on_generation, ["generation"])
    if out is None and (given.resume or given.overwrite):
        raise InputError(WHERE, f"{'resume' if given.resume else 'overwrite'}: there is no run folder; give it `out`")
    if out is None and given.log:
        raise InputError(WHERE, "log: there is no run folder to log in; give it `out`")
    check_loggers(f"{WHERE}: log", given.log)
    if not given.parents:
        raise InputError(WHERE, "parents: is empty")


def _search_section(given: Any) -> SearchConfig:
    """The arguments as a config's section `search`. Raises InputError for values that it cannot have, and for those
    that need examples where there are none."""
    rungs, validation, heldout, chunk, seed = given.rungs, given.validation, given.heldout, given.chunk, given.seed
    method_with_base(WHERE, given.method, given.base is not None, len(given.parents))
    defaults = {"generations": given.generations, "budget": given.budget, "rungs": None if rungs == 1 else rungs}
    search: SearchConfig = _valid(
        "search", SearchConfig, strategy=given.strategy, population=given.population, sigma=given.sigma,
        **{key: value for key, value in defaults.items() if value is not None},
        finalists=FINALISTS if validation else 1, seeds=None if given.seeds is None else list(given.seeds),
        controls=list(given.controls), rung_examples=given.rung_examples, validation=validation,
        validate_every=given.validate_every, stop=dict(given.stop or {}), gradient=given.gradient or {},
    )  # fmt: skip
    if chunk is not None and chunk < 1:
        raise InputError(WHERE, f"chunk: {chunk}; expected 1 or more")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(WHERE, f"seed: {seed}; expected a whole number from 0 to {MAX_SEED:,}")
    for needs_examples, purpose in (
        (rungs > 1, f"rungs: {rungs} compares candidates on few examples first"),
        (heldout, f"heldout: {heldout:g} keeps examples back to compare models on"),
        (validation, f"validation: {validation:g} keeps examples back to choose the winner on"),
    ):
        if needs_examples and given.examples is None:
            raise InputError(WHERE, f"{purpose}; give it `examples`")
    if not 0 <= heldout < 1:
        raise InputError(WHERE, f"heldout: {heldout:g}; expected a share from 0 to below 1")
    return search


def _open_backend(given: Any) -> FunctionBackend:
    """The merges of the parents. Raises InputError for pytrees and parameters that do not fit the method."""
    parents, method = given.parents, given.method
    _, has_base = method_with_base(WHERE, method, given.base is not None, len(parents))
    names = ["base"] * has_base + [f"parents[{k}]" for k in range(len(parents))]
    tree = open_trees(WHERE, names, [given.base, *parents] if has_base else list(parents))
    searched = {
        name: value if isinstance(value, Bounds) else _valid(f"parameters.{name}", Bounds, **dict(value))
        for name, value in (given.parameters or {}).items()
    }
    space = SpaceConfig.model_construct(
        method=method, parameters=searched, fixed=dict(given.fixed or {}), normalize=given.normalize,
        rescale=given.rescale,
    )  # fmt: skip
    merge = tree_merge(WHERE, tree, space, has_base, given.groups, given.seed)
    settings = EvaluationConfig(chunk=given.chunk)
    facts = tree_facts(merge, list(map(FilePath, names)), names, settings, live_target())
    return FunctionBackend(facts, merge, save_tree)


def _task(fitness: Callable[..., Any] | HostFitness, examples: Any, merge: TreeMerge) -> ArrayTask:
    """The task whose score is the fitness function. Raises InputError where it returns another number of scores than
    there are examples."""
    function, is_traced = (fitness.function, False) if isinstance(fitness, HostFitness) else (fitness, True)
    task = ArrayTask(
        "fitness", examples, function, metric="fitness", traced=is_traced, where=f"{WHERE}: fitness", untraced=UNTRACED
    )
    count = score_count(merge, task)
    example_count = count if examples is None else len(jax.tree.leaves(examples)[0])
    if count not in (1, example_count):
        raise InputError(task.where, f"returned {count} numbers for {example_count} examples; expected one for each")
    return replace(task, indices=tuple(range(count)), count=count)


def _problem(given: Any, section: SearchConfig, backend: FunctionBackend, task: ArrayTask) -> SearchProblem:
    """The search for the best merge by the task. Raises InputError for a strategy that the task does not suit."""
    tasks = [(task, None) if not given.heldout else split_task(task, given.heldout, given.seed)]
    # Numbers without examples are scored together.
    limit = 1 if given.examples is None else None
    opened_search = open_search(WHERE, section, backend.facts.space, tasks, [limit])
    if differentiates(opened_search.strategy) is not None:
        if not task.traced:
            raise InputError(
                WHERE, f"strategy: {given.strategy} follows the gradient of the fitness, and host_callback has none; "
                "pass a function that JAX can trace, or take another strategy, such as cma_es",
            )  # fmt: skip
        parts = opened_search.search.gradient.minibatches
        if parts > 1 and given.examples is None:
            raise InputError(WHERE, f"gradient.minibatches: {parts} are parts of the examples; give it `examples`")
    return searchable(WHERE, opened_search, given.seed, backend, tasks, [None])


def _run(given: Any, problem: SearchProblem, stack: ExitStack) -> PytreeSearch:
    """Search, and choose the winner. The run folder, if there is one, is closed with the stack."""
    on_generation, backend = given.on_generation, problem.backend
    storage: Storage | FolderStorage = Storage()
    folder = None
    if given.out is not None:
        document = _document(problem, given.examples)
        run = opened(FilePath(given.out), document, resume=given.resume, overwrite=given.overwrite)
        folder = stack.enter_context(run)
        check_room(folder, problem.search.generations)
        stack.enter_context(recorded_session(folder))
        storage = FolderStorage(folder, Checkpoints(folder))
        on_generation = stack.enter_context(logged(given.log, LoggedSearch(folder, folder, document), on_generation))
    evaluators = open_evaluators(problem, problem.prepare())
    archive = evolve_on(problem, evaluators, storage, _Reporter(on_generation), hint=lambda task: HINT)
    chosen = select_best(problem, evaluators, archive)
    space = backend.merge.space
    values = {name: np.asarray(block) for name, block in space.values(jnp.asarray(chosen.genome)).items()}
    validation_split = problem.splits.validation
    result = PytreeSearch(
        best=backend.merged(chosen.genome),
        fitness=chosen.search_fitness if chosen.validation is None else chosen.validation[0],
        scores=chosen.scores,
        parameters={
            group: {name: tuple(block[g].tolist()) for name, block in values.items()}
            for g, group in enumerate(space.groups)
        },
        history=tuple(storage.read_history()),
        chosen_on=None if validation_split is None else validation_split[0].indices,
        stopped=None if archive.stopped is None else archive.stopped.describe(),
        table=tuple({"role": row.role, "name": row.name, "fitness": row.fitness} for row in chosen.rows),
        notes=problem.notes,
    )
    if folder is not None:
        from safetensors.numpy import save

        atomic_write_bytes(folder.params, save(named_arrays(result.best)))
        split = "search" if result.chosen_on is None else "validation"
        saved = {
            "generations": len(result.history), "chosen_on": split, f"{split}_fitness": {"winner": result.fitness},
            "parameters": result.parameters, "genome": [float(gene) for gene in chosen.genome],
        }  # fmt: skip
        atomic_write(folder.result, json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
    return result


def _document(problem: SearchProblem[FunctionBackend], examples: Any) -> dict[str, Any]:
    """The search for its run folder."""
    merge, space, spec = problem.backend.merge, problem.backend.merge.space, problem.backend.merge.spec
    columns = zip(problem.facts.references.values(), merge.tree.columns, strict=True)
    return {
        "search_pytrees": {
            "method": spec.method_name, "seed": problem.seed, "groups": list(space.groups),
            "parameters": {item.name: [item.low, item.high, *item.start] for item in space.search_parameters},
            "constants": {name: list(values) for name, values in space.constants}, "options": asdict(spec.options),
        },
        "search": resolved_search(problem.search, problem.strategy),
        "inputs": {name: digest_of(source) for name, source in columns}
        | ({} if examples is None else {"examples": digest_of(jax.tree.leaves(examples))}),
    } | random_numbers(spec.method.random)  # fmt: skip


UNTRACED = (
    "pass host_callback(fitness), which is called with each merged pytree (from evojax_merge import host_callback)"
)
HINT = "Look at what the fitness function returns for the parents, and at the bounds of the parameters"


class _Reporter(Reporter):
    """Hands each generation on, and prints nothing."""

    def __init__(self, on_generation: Callable[[Generation], None]) -> None:
        self._on_generation = on_generation

    def log(self, text: str) -> None:
        LOG.info("%s", text)

    def finished(self, generation: Generation) -> None:
        self.log(generation_line(generation))
        self._on_generation(generation)

    def warn(self, text: str) -> None:
        print_warning(text)


def _valid(where: str, schema: type[Section], **values: Any) -> Any:
    try:
        return schema(**values)
    except ValidationError as error:
        raise InputError(f"{WHERE}: {where}", explain(schema, error, values)) from None
