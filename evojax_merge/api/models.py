"""The public API, for notebooks and scripts of one's own: `import evojax_merge as em`.

These functions raise `InputError` or `Failed` where the commands would print a line and end, and print nothing but
progress bars on a terminal. The commands' warnings become Python warnings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from merge_kernels import Method

from evojax_merge import plugins
from evojax_merge.api.python_calls import Location, PythonCall, as_path, genome_array, ignore, plain_data
from evojax_merge.api.trials import Run, open_run
from evojax_merge.checkpoints import bank as checkpoints_bank
from evojax_merge.checkpoints.derived import ignored_revisions
from evojax_merge.checkpoints.folder import FLOAT_DTYPES
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.checkpoints.writer import MAX_SHARD_BYTES
from evojax_merge.commands.extract_lora import write_extracted
from evojax_merge.commands.merge import MergeOptions, planned_dtype, transplant_recipe, write_merge
from evojax_merge.commands.moe import write_mixture
from evojax_merge.commands.search import default_out, run_search
from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import MAX_SEED, Config, Numbers, TaskFile
from evojax_merge.errors import InputError, did_you_mean, warn_program
from evojax_merge.evaluation.scores import Scores, score_matrix
from evojax_merge.mergekit.as_adapter import AdapterOptions
from evojax_merge.mergekit.streams import plain_recipe
from evojax_merge.models.bank import Bank, MergeSpec
from evojax_merge.models.config import DecoderConfig
from evojax_merge.problem import build_problem, config_from, read_config
from evojax_merge.report.comparison import model_names
from evojax_merge.report.described import Described, Table, parameter_table
from evojax_merge.report.progress import bytes_bar
from evojax_merge.schema.arguments import check_arguments
from evojax_merge.schema.section import Form
from evojax_merge.schema.yaml_reader import parse_documents
from evojax_merge.search.recording import Generation
from evojax_merge.spaces.search_parameters import constants_of, method_with_base, options_of
from evojax_merge.steps import stored_models
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.tasks.kinds import find_kind
from evojax_merge.zoo.references import resolve_reference

Overrides = Annotated[Sequence[str], Form('a list of texts, such as ["search.generations=20"]')]


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise InputError("dtype", f"unknown dtype {dtype!r}{did_you_mean(str(dtype), FLOAT_DTYPES)}")


def _check_seed(seed: int | None) -> None:
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise InputError("seed", f"{seed!r}; expected a whole number from 0 to {MAX_SEED:,}")


# ---------------------------------------------------------------------------------------------------------------
# Merging and scoring


def merge(
    recipe: Location | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    out: Location,
    *,
    dtype: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    allow_crimes: bool = False,
    strict: bool = False,
    type: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Do the merge of a mergekit recipe, and write the model to `out`, which is returned: a folder, or a GGUF file
    where its name ends in .gguf.

    recipe: a YAML file, or its content as a mapping, or as a list of mappings for several documents; relative paths
    then start in the working directory. dtype, seed: replace the recipe's; with several documents, `dtype` is for the
    result and `seed` for all documents. overwrite: replace `out`, if it is a model that evojax-merge wrote.
    allow_nonfinite: merge even where a parent holds NaN or Inf. allow_crimes: merge models of different architectures
    whose tensors agree. strict: raise InputError for keys, parameters and values of the recipe that have no meaning, in
    place of a warning. type: the type of a GGUF file (q8_0, …). max_shard_bytes: the most bytes in a file of weights.
    """
    check_arguments(merge, locals())
    _check_dtype(planned_dtype(dtype))
    _check_seed(seed)
    if isinstance(recipe, str | PathLike):
        source: Path | list[Any] = as_path(recipe)
    else:
        document = plain_data("recipe", recipe)
        source = [document] if isinstance(recipe, Mapping) else document
    with PythonCall():
        options = MergeOptions(
            dtype=dtype, seed=seed, overwrite=overwrite, allow_nonfinite=allow_nonfinite, allow_crimes=allow_crimes,
            strict=strict, max_shard_bytes=max_shard_bytes, type=type,
        )  # fmt: skip
        write_merge(source, as_path(out), options, ignore, warn_program)
    return as_path(out)


def moe(
    recipe: Location | Mapping[str, Any],
    out: Location,
    *,
    dtype: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    allow_same: bool = False,
) -> Path:
    """Write the mixture of experts that a recipe of mergekit-moe describes to the folder `out`, which is returned.

    recipe: a YAML file, or its content. dtype, seed, overwrite, allow_nonfinite: as in `merge`. allow_same: all experts
    may be one model, to be trained afterwards.
    """
    check_arguments(moe, locals())
    _check_dtype(dtype)
    _check_seed(seed)
    source = as_path(recipe) if isinstance(recipe, str | PathLike) else plain_data("recipe", recipe)
    with PythonCall():
        options = MergeOptions(dtype=dtype, seed=seed, overwrite=overwrite, allow_nonfinite=allow_nonfinite)
        write_mixture(source, as_path(out), options, allow_same, warn_program)
    return as_path(out)


def transplant_tokenizer(
    model: Location, donor: Location, out: Location, *, dtype: str | None = None, overwrite: bool = False, **how: Any
) -> Path:
    """Write a model with the donor's tokenizer to the folder `out`, which is returned. dtype, overwrite: as in `merge`;
    how: `approximate` and the other keys of a recipe's `tokenizer_source`."""
    recipe = transplant_recipe(str(model), str(donor), how)
    return merge(recipe, out, dtype=dtype, overwrite=overwrite)


def extract_lora(
    model: Location,
    out: Location,
    *,
    base: Location,
    max_rank: int = 128,
    energy: float | None = None,
    distribute_scale: bool = True,
    embed_lora: bool = False,
    save_module: Sequence[str] = (),
    exclude_regex: Sequence[str] = (),
    include_regex: Sequence[str] = (),
    sv_epsilon: float = 0.0,
    skip_undecomposable: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the difference of a model to its base as a LoRA adapter, which PEFT loads, to the folder `out`, which is
    returned.

    max_rank: the largest rank of a matrix. energy: of each matrix the smallest rank that keeps this share of its
    squared change. distribute_scale: split the singular values between both factors. embed_lora: cut embeddings and the
    head to the rank as well, which are saved whole otherwise. save_module: modules that are saved whole, by names or
    last parts. exclude_regex, include_regex: the modules that are left out, and the only ones that are changed.
    sv_epsilon: leave out singular values of at most this size. skip_undecomposable: leave norms as they are.
    overwrite: replace `out`, if evojax-merge wrote it.
    """
    check_arguments(extract_lora, locals())
    options = AdapterOptions(
        max_rank, energy, distribute_scale, embed_lora, tuple(save_module), tuple(exclude_regex), tuple(include_regex),
        sv_epsilon, skip_undecomposable,
    )  # fmt: skip
    with PythonCall():
        write_extracted(str(model), str(base), as_path(out), options, overwrite, warn_program)
    return as_path(out)


def evaluate(
    models: Location | Run | Sequence[Location | Run],
    tasks: Location | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    split: stored_models.Split = "all",
) -> list[dict[str, Any]]:
    """Score stored models on the examples of the tasks: a row `{"model", "fitness", "scores"}` for each, with its mean
    score on every task by the task's name.

    models: folders, hub ids, `zoo:` names, or runs (or their folders), which stand for their winners. tasks: a YAML
    file with `tasks:` (such as a search's config), its content as a mapping, or a task or a list of tasks alone;
    relative paths then start in the working directory. split: `search`, `validation` or `heldout`, the examples that a
    search of these tasks, with its seed, has in this split; `all`: all examples, or, for a task with a second source of
    held-out examples, these.
    """
    check_arguments(evaluate, locals())
    asked = [models] if isinstance(models, str | PathLike | Run) else list(models)
    if not asked:
        raise InputError("models", "is empty; expected folders or hub ids")
    names = [str(model.path if isinstance(model, Run) else Path(model) if isinstance(model, PathLike) else model)
             for model in asked]  # fmt: skip
    if isinstance(tasks, str | PathLike):
        task_set = stored_models.read_tasks(as_path(tasks), split)
    else:
        plugins.load()
        where = "evaluate"
        document = plain_data(where, tasks)
        if isinstance(document, list):
            document = {"tasks": document}
        elif "name" in document or find_kind(document) is not None:
            document = {"tasks": [document]}
        task_set = stored_models.open_tasks(where, parse(Path(where), document, TaskFile), Path.cwd(), split)
    with PythonCall():
        rows = stored_models.score_models(names, task_set, ignore, warn_program)
    return stored_models.score_table(names, rows)


# ---------------------------------------------------------------------------------------------------------------
# Searching


def evolve(
    config: Location | Mapping[str, Any],
    *,
    out: Location | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int | None = None,
    overrides: Overrides = (),
    on_generation: Callable[[Generation], None] = lambda generation: None,
    force: bool = False,
) -> Run:
    """Search as `evojax-merge search` does, and return the run.

    config: a YAML file, or its content as a mapping; relative paths then start in the working directory. out: the run
    folder; None: the config's `out`, else runs/ and the file's name. resume, overwrite: continue, or replace, the run
    that lies there. overrides: `key.path=value`, in the form of --set. on_generation gets every generation. force:
    continue where the models or the passes do not fit into memory.
    """
    check_arguments(evolve, locals())
    path, parsed = _config(config, seed, overrides)
    folder = default_out(path, parsed) if out is None else as_path(out)
    with PythonCall():
        run_search(path, parsed, folder, resume=resume, overwrite=overwrite, on_generation=on_generation, force=force)
    return with_warnings(open_run(folder))


def with_warnings(run: Run) -> Run:
    """The run, once the program has its warnings."""
    for sentence in run.warnings:
        warn_program(sentence)
    return run


def _config(config: Location | Mapping[str, Any], seed: int | None, overrides: Sequence[str]) -> tuple[Path, Config]:
    plugins.load()
    _check_seed(seed)
    if isinstance(config, Mapping):
        path = Path("config")
        return path, config_from(path, plain_data("config", config), overrides, seed)
    return as_path(config), read_config(as_path(config), overrides, seed)


class Evaluator(Described):
    """A config's space and tasks, for a search loop of one's own: genomes in, scores out.

    config, seed, overrides: the same as for `evolve`; the config's strategy and budget are not used. split: the
    examples to score on, all of them whatever a task's `limit`: `search`, `validation` (where the config keeps some
    back), or `heldout`, which no search should see. The constructor loads the models.
    """

    def __init__(
        self,
        config: Location | Mapping[str, Any],
        *,
        seed: int | None = None,
        overrides: Overrides = (),
        split: Literal["search", "validation", "heldout"] = "search",
    ) -> None:
        check_arguments(Evaluator.__init__, locals())
        path, parsed = _config(config, seed, overrides)
        if parsed.stages is not None:
            raise InputError("config", "has stages, each with a space of its own; give one with space or data_flow")
        self._problem = build_problem(path, parsed)
        for line in ignored_revisions((parsed.base, *parsed.parents, parsed.other_modules), path.parent):
            warn_program(line)
        splits = self._problem.prepare()
        tasks = {"search": splits.search, "validation": splits.validation, "heldout": splits.heldout}[split]
        if tasks is None:
            raise InputError("split", "validation; the config's search has no validation split (search.validation)")
        with PythonCall():
            self._evaluator = open_evaluator(self._problem, tasks)

    def facts(self) -> dict[str, Any]:
        problem, tasks = self._problem, self._evaluator.tasks
        return {
            "method": problem.facts.name,
            "parents": model_names(problem.parents),
            "dimensions": self.dims,
            "tasks": [task.name for task in tasks],
            "examples": sum(task.size for task in tasks),
        }

    def tables(self) -> dict[str, Table]:
        space: Any = self._problem.space
        tasks = [
            {"task": task.name, "metric": task.metric, "examples": task.size, "weight": float(task.weight)}
            for task in self._evaluator.tasks
        ]
        if not hasattr(space, "named_values"):
            return {"tasks": tasks}
        values = space.named_values(self.start[None], model_names(self._problem.parents))
        return {"tasks": tasks, "start": parameter_table({name: float(column[0]) for name, column in values.items()})}

    @property
    def dims(self) -> int:
        """D, the number of genes of a genome."""
        return self._problem.space.dims

    @property
    def start(self) -> np.ndarray:
        """float32[D]: the genome with which a search begins, in the middle of the bounds or at the uniform merge."""
        return self._problem.space.start

    def scores(self, genomes: Any) -> Scores:
        """The score matrix of genomes float32[P, D]; `.fitness` float64[P] is higher for better candidates, NaN for
        those that failed."""
        genomes = genome_array("genomes", genomes, ("P", self.dims))
        if not len(genomes):
            raise InputError("genomes", "are empty; expected 1 or more")
        tasks = self._evaluator.tasks
        with PythonCall():
            return score_matrix(tasks, self._evaluator.score(genomes))

    def recipe(self, genome: Any) -> Any:
        """A genome float32[D] as a recipe, which `merge` makes into a model: a mapping, or a list of them where it has
        several documents."""
        text = self._problem.backend.describe(genome_array("genome", genome, (self.dims,))).recipe
        return plain_recipe(parse_documents("recipe", text))


# ---------------------------------------------------------------------------------------------------------------
# The bank


@dataclass(frozen=True)
class LoadedBank:
    """Models in memory, in a search's form: `bank`, all their weights with the statistics that `spec.method` measures,
    and the architecture's `config`. `models`: their folders, the base first where task vectors are taken from one."""

    bank: Bank
    spec: MergeSpec
    config: DecoderConfig
    models: tuple[Path, ...]


def load_bank(
    parents: Sequence[Location],
    base: Location | None = None,
    *,
    method: str = "linear",
    fixed: Mapping[str, Numbers] | None = None,
    normalize: bool | None = None,
    rescale: bool | str | None = None,
    seed: int = 0,
    export_dtype: str = "float32",
) -> LoadedBank:
    """Load models of one architecture into stacked JAX arrays, and measure the statistics that a merge method needs.

    parents, base: folders, hub ids or `zoo:` names. fixed: values of the method's parameters that are never searched
    (DELLA's epsilon); normalize, rescale: the method's switches, None for its defaults. seed: the seed of random
    methods' masks. export_dtype: the dtype that merges are rounded to.
    """
    check_arguments(load_bank, locals())
    plugins.load()
    _check_dtype(export_dtype)
    _check_seed(seed)
    where = "load_bank"
    chosen, has_base = method_with_base(where, method, base is not None, len(parents))
    options = options_of(where, chosen, has_base, normalize, rescale)
    spec = MergeSpec(method, options, seed, export_dtype, constants_of(where, chosen, len(parents), fixed or {}))
    named = [("base", base)] * has_base + [(f"parents[{k}]", parent) for k, parent in enumerate(parents)]
    paths = [resolve_reference(f"{where}: {name}", str(model), Path.cwd()) for name, model in named]
    sources, config = open_sources(paths)
    for line in (*ignored_revisions([str(model) for _, model in named], Path.cwd()), *sources.warnings):
        warn_program(line)
    with PythonCall(), bytes_bar("loading", checkpoints_bank.bank_bytes(sources, config)) as progress:
        return LoadedBank(checkpoints_bank.load_bank(sources, config, spec, progress), spec, config, tuple(paths))


# ---------------------------------------------------------------------------------------------------------------
# Registering


def register_method(method: Method) -> Method:
    """Register a merge method of your own under its name; see kernels/README.md."""
    registered: Method = plugins.register("method", method)
    return registered


def register_strategy(name: str, factory: Callable[..., Any]) -> Any:
    """Register a search strategy of your own under a name."""
    return plugins.register("strategy", name, factory)


def register_architecture(architecture: Any) -> Any:
    """Register an architecture of your own under the `model_type` of its checkpoints."""
    return plugins.register("architecture", architecture)


def register_task(kind: Any) -> Any:
    """Register a kind of task of your own under its name."""
    return plugins.register("task", kind)


def register_backend(name: str, factory: Any) -> Any:
    """Register a backend of your own: `backend: NAME` then opens a config's models with `factory`, such as a
    `FunctionFactory`."""
    return plugins.register("backend", name, factory)
