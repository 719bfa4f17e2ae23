"""`evojax-merge merge`: one merge of a mergekit recipe, without a search."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from evojax_merge import plugins
from evojax_merge.checkpoints.references import local_path
from evojax_merge.checkpoints.writer import (
    MAX_SHARD_BYTES,
    check_new_model,
    check_output,
    require_space,
)
from evojax_merge.errors import InputError, print_warning
from evojax_merge.mergekit.account import TensorFate
from evojax_merge.mergekit.as_fp8 import FP8_DTYPE, Fp8Merge
from evojax_merge.mergekit.as_gguf import check_new_gguf, is_gguf_name, plan_gguf, write_as_gguf
from evojax_merge.mergekit.execute import MergeSettings, merge_to
from evojax_merge.mergekit.pipelines import PipelinePlan, prepare_pipelines
from evojax_merge.mergekit.stages import StreamPlan, merge_stream, prepare_stream
from evojax_merge.mergekit.streams import RecipeStream, parse_stream, stream_warnings
from evojax_merge.mergekit.unused_keys import blaming_slips, few_lines, without_unused_keys
from evojax_merge.mergekit.write import dump_documents
from evojax_merge.report.account import card_section, summary, table, with_public_names
from evojax_merge.report.card import merge_card
from evojax_merge.report.front_matter import changed_front_matter
from evojax_merge.report.notices import Log, log_unused_config_keys, print_warnings
from evojax_merge.report.progress import merge_bar
from evojax_merge.schema.yaml_reader import load_documents, read_text, refuse_repeated
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.system.console import console, say
from evojax_merge.system.file_system import recover
from evojax_merge.system.without_torch import leave_torch_out
from evojax_merge.zoo.references import resolve_reference

T = TypeVar("T")


@dataclass(frozen=True)
class MergeOptions(MergeSettings):
    """Options of a merge and of the written model.

    `strict`: an error, not a warning, also where mergekit ignores a key of a recipe or reads it as something else,
    where a filter means no tensor, and where a tensor is left out that the recipe says nothing about. `overwrite`:
    replace a model that evojax-merge wrote. `verbose`: print the fate of each tensor. `card`: write a card and the
    recipe as well. `max_shard_bytes`: the most bytes in a file of weights. `type`: the type of a GGUF file."""

    strict: bool = False
    overwrite: bool = False
    verbose: int = 0
    card: bool = True
    max_shard_bytes: int = MAX_SHARD_BYTES
    type: str | None = None


def merge(
    recipe: Path, out: Path, options: MergeOptions, quiet: bool = False, without_meaning: Sequence[str] = ()
) -> None:
    """Merge and report on the terminal. `without_meaning`: options that the command line accepts and that change
    nothing."""
    usual, console.quiet = console.quiet, console.quiet or quiet
    try:
        if without_meaning:
            print_warnings([f"{', '.join(without_meaning)}: mergekit's, without a meaning here; ignored"])
        write_merge(recipe, out, options, say, print_warning)
        console.print(f"wrote {out}", soft_wrap=True)
    finally:
        console.quiet = usual


def write_merge(recipe: Path | list[Any], out: Path, options: MergeOptions, log: Log, warn: Log) -> None:
    """Do the merge of a recipe (a file, or the documents of its YAML) and write the model."""
    plugins.load()
    recover(out)
    strict = options.strict
    twice: list[str] = []
    repeated = (
        refuse_repeated if strict else lambda place, key_note: twice.append(f"{place}: {key_note}; the last counts")
    )
    if isinstance(recipe, Path):
        path, given, text = recipe, load_documents(recipe, repeated), read_text(recipe)
    else:
        path, given, text = Path("recipe"), recipe, dump_documents(recipe)
    documents, ignored = (given, []) if strict else without_unused_keys(path, given)
    with ExitStack() as stack:
        with blaming_slips([] if strict else given):
            stream = parse_stream(path, documents)
        recipe_file = [recipe] if isinstance(recipe, Path) else []
        keep = [*local_inputs(stream), *recipe_file, *parts_of_runs(out)]
        check_new_output(out, options.overwrite, keep, options.type, options.dtype)
        with blaming_slips([] if strict else given):
            pipelines = prepare_pipelines(stream, options, resolve_reference)
        said_twice = few_lines(path, twice, "more keys stand twice")
        if pipelines is not None:
            if is_gguf_name(out):
                raise InputError(out, "is the name of a GGUF file, which diffusers folders have not; choose a folder")
            unmatched = unmatched_lines(path, pipelines, strict)
            fates = checked_account(path, pipelines, pipelines.models, strict)
            for line in (*said_twice, *ignored, *unmatched, *pipelines.warnings):
                warn(line)
            print_account(fates, options.verbose, log)
            write_pipeline(pipelines, out, options, text)
            return
        leave_torch_out()
        with blaming_slips([] if strict else given):
            settings = replace(options, dtype=planned_dtype(options.dtype))
            stream_plan = stack.enter_context(prepare_stream(stream, out, settings, resolve_reference))
        unmatched = unmatched_lines(path, stream_plan, strict)
        fates = checked_account(path, stream_plan, stream_plan.paths, strict)
        for line in (*said_twice, *ignored, *unmatched, *stream_warnings(stream), *stream_plan.warnings):
            warn(line)
        log_unused_config_keys(list(stream_plan.models.values()), log)
        print_account(fates, options.verbose, log)
        inputs = [file for file in stream_plan.inputs if recipe_file or file != path]
        card = card_of_merge(out, stream_plan, text) if options.card else None
        written = text if options.card else None
        write, nbytes = writer_of(stream_plan, out, options.dtype, options.type, options.max_shard_bytes, written, warn)
        write_model(stream_plan, out, card, "merging", options.overwrite, inputs, write, nbytes)


def transplant(model: str, donor: str, out: Path, given: Mapping[str, Any]) -> None:
    """Give a model a donor's tokenizer, and report on the terminal. given: the fields of `MergeOptions`, and keys of
    `Approximation`."""
    names = {field.name for field in fields(MergeOptions)}
    options = MergeOptions(**{name: value for name, value in given.items() if name in names})
    how = {name: value for name, value in given.items() if name not in names}
    write_merge([transplant_recipe(model, donor, how)], out, options, say, print_warning)
    console.print(f"wrote {out}", soft_wrap=True)


def transplant_recipe(model: str, donor: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that gives a model a donor's tokenizer and merges nothing."""
    source = {"of": donor, **how}
    return {"merge_method": "passthrough", "models": [{"model": model}], "tokenizer_source": source}


def check_new_output(
    out: Path, overwrite: bool, keep: Sequence[Path], type_name: str | None, dtype: str | None
) -> None:
    """Raises InputError where a model must not be written to `out`, a folder or a GGUF file of a type."""
    if is_gguf_name(out) and dtype == FP8_DTYPE:
        raise InputError("--dtype", f"{FP8_DTYPE}: is for folders; expected --type q8_0 for {out}")
    if is_gguf_name(out):
        check_new_gguf(out, overwrite, keep)
    elif type_name is not None:
        raise InputError("--type", f"{type_name}: is for GGUF files; expected a name that ends in .gguf, not {out}")
    else:
        check_new_model(out, overwrite, keep)


def planned_dtype(dtype: str | None) -> str | None:
    """The dtype of the merge itself, whose numbers are then quantised to FP8."""
    return None if dtype == FP8_DTYPE else dtype


def writer_of(
    stream_plan: StreamPlan, out: Path, dtype: str | None, type_name: str | None, max_shard_bytes: int,
    recipe: str | None, warn: Log,
) -> tuple[Callable[..., Any], int | None]:  # fmt: skip
    """Return the function that writes a planned merge, in the form that `merge_stream` takes, and the bytes of its
    tensors where these are not those of the merge. It writes a GGUF file of a type if `out` is the name of one, else a
    folder, in FP8 if `dtype` says so. recipe: the text that is written as well; None: none is."""
    if is_gguf_name(out):
        plan = plan_gguf(stream_plan.result, out, type_name)
        for line in plan.warnings:
            warn(line)
        return partial(write_as_gguf, plan=plan, recipe=recipe), sum(output.nbytes for output in plan.outputs)
    write = partial(merge_to, max_shard_bytes=max_shard_bytes, recipe=recipe)
    if dtype == FP8_DTYPE:
        return lambda merge_plan, *arguments, **more: write(Fp8Merge(merge_plan), *arguments, **more), None
    return write, None


def unmatched_lines(path: Path, plan: StreamPlan | PipelinePlan, strict: bool) -> list[str]:
    """A line about each filter of a planned recipe that means no tensor. Raises InputError for the first, with
    `strict`."""
    if strict and plan.unmatched:
        raise InputError(*plan.unmatched[0])
    lines = [f"{where}: {sentence}" for where, sentence in plan.unmatched]
    return few_lines(path, lines, "more filters mean no tensor")


def checked_account(
    path: Path, plan: StreamPlan | PipelinePlan, models: Mapping[str, Path], strict: bool
) -> list[TensorFate]:
    """The fates of a planned merge's tensors, with the models' public names. models: the folder of each model, by its
    name in the recipe. Raises InputError for a tensor that is left out, with `strict`."""
    fates = with_public_names(plan.account, models)
    left_out = [fate for fate in fates if fate.fate == "left out"]
    if strict and left_out:
        first = left_out[0]
        more = f" and {len(left_out) - 1} more are" if len(left_out) > 1 else " is"
        raise InputError(
            path, f"--strict: {first.tensor} of {first.model}{more} left out: {first.reason} (on_mismatch: in the "
            "recipe says what becomes of such tensors)",
        )  # fmt: skip
    return fates


def print_account(fates: Sequence[TensorFate], verbose: int, log: Log) -> None:
    """Print what becomes of a merge's tensors, in one line or, if verbose, in a table as well."""
    log(summary(fates))
    if verbose:
        console.print(table(fates).terminal())


def write_pipeline(pipelines: PipelinePlan, out: Path, options: MergeOptions, text: str) -> None:
    """Do the planned merge of diffusers folders. text: its recipe as YAML."""
    check = partial(check_output, out, [*pipelines.inputs, *parts_of_runs(out)])
    check()
    require_space(out, pipelines.nbytes)
    card = None
    if options.card:
        card = merge_card(out.name, [pipelines.recipe.method.name], pipelines.models, text)
        card = changed_front_matter(card, {"library_name": "diffusers"})
        card += card_section(with_public_names(pipelines.account, pipelines.models))
    with merge_bar("merging", "", sum(plan.nbytes for plan in pipelines.merges.values())) as progress:
        merge_to(
            pipelines, out, card=card, recipe=text if options.card else None, max_shard_bytes=options.max_shard_bytes,
            overwrite=options.overwrite, check=check, progress=progress,
        )  # fmt: skip


def write_model(
    stream_plan: StreamPlan, out: Path, card: str | None, label: str, overwrite: bool, keep: Sequence[Path],
    write: Callable[..., T], nbytes: int | None = None,
) -> T:  # fmt: skip
    """Do planned merges and write the result, unless `out` may not be written to (see `check_output`) or the disk is
    too full. `write`: see `merge_stream`. nbytes: the size of a result that is smaller than the merged model."""
    others = [*keep, *parts_of_runs(out)]
    check = partial(check_new_gguf, out, overwrite, others) if is_gguf_name(out) else partial(check_output, out, others)
    check()
    require_space(out, stream_plan.peak_bytes if nbytes is None or stream_plan.stages else nbytes)
    bar = partial(merge_bar, label)
    return merge_stream(stream_plan, out, write, card=card, overwrite=overwrite, check=check, bar=bar)


def card_of_merge(out: Path, stream_plan: StreamPlan, text: str) -> str:
    """The model card of a planned merge. text: its recipe as YAML."""
    methods = list(dict.fromkeys(merge_plan.recipe.method.name for merge_plan in stream_plan.merges))
    models = stream_plan.paths
    return merge_card(out.name, methods, models, text) + card_section(with_public_names(stream_plan.account, models))


def local_inputs(stream: RecipeStream) -> list[Path]:
    """The models on this machine that a recipe names, before any is opened."""
    references = {reference for recipe in stream.merges for reference in recipe.references}
    # A base and its adapter are joined by +, and a name of a stage is no folder's.
    names = {name for reference in references for name in (reference, *reference.split("+")) if name}
    local = (local_path(name, stream.path.parent) for name in names - {stage.name for stage in stream.stages})
    return [path for path in local if path is not None]


def parts_of_runs(out: Path) -> list[Path]:
    """The parts of the runs in whose folders `out` would lie."""
    # Parts of a run may be links.
    above = {*Path(os.path.realpath(out)).parents, *Path(os.path.abspath(out)).parents}
    runs = [RunFolder(folder) for folder in sorted(above)]
    return [part for run in runs if run.config.exists() and run.history.exists() for part in run.parts]
