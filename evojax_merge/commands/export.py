"""`evojax-merge export`: the winner of a run, its best candidate so far, or a member of its front."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from evojax_merge import plugins
from evojax_merge.backends.backend import Backend, BackendFactory
from evojax_merge.backends.registry import find_backend
from evojax_merge.checkpoints.writer import check_new_model, check_output
from evojax_merge.commands.merge import card_of_merge, local_inputs, parts_of_runs, write_model
from evojax_merge.config.search_config import Config
from evojax_merge.errors import Failed, InputError
from evojax_merge.mergekit.as_adapter import RankError, prepare_adapter, write_as_adapter
from evojax_merge.mergekit.execute import merge_to
from evojax_merge.mergekit.stages import prepare_stream
from evojax_merge.mergekit.streams import RecipeStream, parse_stream, read_stream
from evojax_merge.mergekit.write import in_dtype
from evojax_merge.problem import (
    build_problem,
    config_from,
    stage_config,
)
from evojax_merge.report.card import adapter_card, card_in_dtype, merge_card
from evojax_merge.schema.yaml_reader import parse_documents
from evojax_merge.search.checkpoints import Checkpoints
from evojax_merge.search.protocols import context_of
from evojax_merge.search.run_folder import check_inputs, check_masks, find_member, is_run, locked, run_at
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import MAX_DOCUMENT, read_result, read_run_config
from evojax_merge.system.console import console, say
from evojax_merge.system.file_system import recover
from evojax_merge.system.regular_file import read_regular
from evojax_merge.zoo.references import resolve_reference


def export(
    run: Path, out: Path, dtype: str | None, overwrite: bool, best_so_far: bool, member: int | None = None,
    rank: int | None = None,
) -> None:  # fmt: skip
    """Write a run's winner, its best candidate so far, or a member of its front: as a model, or, where a rank is given,
    as an adapter of its base of that rank."""
    plugins.load()
    folder = run_at(run)
    plugins.load_named(f"{folder.config}: plugins", read_run_config(folder.config).get("plugins", []), folder.path)
    recover(out)
    if member is not None and _factory(folder).merges_recipes:
        file = find_member(folder, member)
        _export(folder, read_stream(file), file.read_text(encoding="utf-8"), None, out, dtype, overwrite, rank)
        return
    finished = folder.is_finished()
    if not _factory(folder).merges_recipes:
        _export_genome(folder, out, dtype, overwrite, rank, best_so_far and not finished)
        return
    if best_so_far and not (finished and folder.recipe.exists()):
        _export_best_so_far(folder, out, dtype, overwrite, rank)
        return
    if not folder.recipe.exists():
        if folder.params.exists():
            raise InputError(run, f"is a run of search_pytrees, whose winner is a pytree: best/{folder.params.name}")
        more = "finish it with search … --resume, or pass --best-so-far"
        raise InputError(run, f"has no winner yet (no best/recipe.yaml); {more}")
    stream, card_file = read_stream(folder.recipe), folder.model / "README.md"
    card = (
        read_regular(card_file, "a model card", MAX_DOCUMENT).decode(errors="replace") if card_file.exists() else None
    )
    _export(folder, stream, folder.recipe.read_text(encoding="utf-8"), card, out, dtype, overwrite, rank)


def _export(
    folder: RunFolder, stream: RecipeStream, text: str, card: str | None, out: Path, dtype: str | None, overwrite: bool,
    rank: int | None,
) -> None:  # fmt: skip
    """Write the model of a run's recipe, or its adapter of a rank. `text`: the recipe as YAML; `card`: None makes one
    from the recipe."""
    check_new_model(out, overwrite, [*folder.parts, *local_inputs(stream), *parts_of_runs(out)])
    if any(recipe.method.random for recipe in (*(stage.recipe for stage in stream.stages), stream.result)):
        check_masks(folder)
    with prepare_stream(stream, out, dtype, find=resolve_reference) as stream_plan:
        searched = stream_plan.result.recipe.out_dtype
        card = card_in_dtype(card or card_of_merge(out, stream_plan, text), searched, dtype)
        write: Callable[..., RankError | None] = partial(merge_to, recipe=in_dtype(text, dtype))
        if rank is not None:
            base = prepare_adapter(stream_plan, rank)
            write = partial(write_as_adapter, rank=rank, describe=partial(adapter_card, base=base, rank=rank))
        keep = [*stream_plan.inputs, *folder.parts]
        error = write_model(stream_plan, out, card, "exporting", overwrite, keep, write)
    if error is not None:
        console.print(str(error), soft_wrap=True)
    console.print(f"wrote {out}", soft_wrap=True)


def _factory(folder: RunFolder) -> BackendFactory:
    """The factory of a run's backend."""
    name = read_run_config(folder.config).get("backend", Config.model_fields["backend"].default)
    return find_backend(f"{folder.config}: backend", name, folder.path)


def export_candidate(backend: Backend, genome: np.ndarray, out: Path, keep: Sequence[Path]) -> None:
    """Write the candidate of a genome, whose backend makes candidates of genomes. keep: files and folders that must not
    be replaced."""
    recipe = backend.recipe(genome)
    models = {backend.references[model]: model for model in backend.merged_from(genome)}
    card = merge_card(out.name, [backend.name], models, recipe)
    backend.export(recipe, genome, out, card, partial(check_output, out, keep))


def _export_genome(
    folder: RunFolder, out: Path, dtype: str | None, overwrite: bool, rank: int | None, best_so_far: bool
) -> None:
    """Write a run's winner, or its best candidate so far, whose backend makes candidates of genomes."""
    for value, option in ((dtype, "--dtype"), (rank, "--as-adapter")):
        if value is not None:
            raise InputError(folder.path, f"{option}: is for language models, and this run has others; leave it out")
    check_new_model(out, overwrite, folder.parts)
    with locked(folder.path, resume=True):
        check_inputs(folder)
        problem = build_problem(folder.config, config_from(folder.config, read_run_config(folder.config), [], None))
        result, saved = read_result(folder.result), Checkpoints(folder).restore(say)
        if best_so_far and saved is not None:
            genome, _ = saved.best(problem.space.dims)
        elif result is not None and not best_so_far:
            genome = np.array(result.genome, np.float32)
        else:
            raise InputError(folder.path, "has no winner yet; finish it with search … --resume, or pass --best-so-far")
        export_candidate(problem.exporting(), genome, out, folder.parts)
    console.print(f"wrote {out}", soft_wrap=True)


def _export_best_so_far(folder: RunFolder, out: Path, dtype: str | None, overwrite: bool, rank: int | None) -> None:
    """Write the best candidate that an unfinished run has saved, as every generation scored it."""
    # The lock keeps any other process from going on with the run meanwhile.
    with locked(folder.path, resume=True):
        running, config = _stage_begun_last(folder)
        check_inputs(running)
        problem = build_problem(running.config, config, chained=True)
        saved = Checkpoints(running).restore(say)
        if saved is None:
            raise InputError(folder.path, "has saved no generation yet; continue it with search … --resume")
        genome, fitness = saved.best(problem.space.dims)
        if not math.isfinite(fitness):
            raise Failed(
                f"{folder.path}: of no candidate of {saved.generations} generations the fitness on all examples is "
                "known (gradients on minibatches, or of a companion, do not tell it); continue the search with --resume"
            )
        state = saved.strategy_state(problem.seed, problem.strategy, problem.space)
        problem = problem.within(context_of(problem.strategy, state))
        text = problem.backend.recipe(genome)
        stream = parse_stream(running.recipe, parse_documents(running.recipe, text))
        _export(folder, stream, text, None, out, dtype, overwrite, rank)
    chosen_on = "whole search split" if problem.splits.validation is None else "validation split"
    console.print(
        f"the best candidate of {saved.generations} generations, fitness {fitness:.4f} on the examples that every "
        f"generation is scored on (a finished run chooses its winner on the {chosen_on})",
        soft_wrap=True,
    )


def _stage_begun_last(folder: RunFolder) -> tuple[RunFolder, Config]:
    """The run folder of a search that was broken off, and its config; for a chain, those of the stage that was
    running."""
    config = config_from(folder.config, read_run_config(folder.config), [], None)
    if config.stages is None:
        return folder, config
    before = [RunFolder(folder.stages / f"stage-{number}") for number in range(1, len(config.stages))]
    if folder.history.exists() or not before:
        winner = str(before[-1].model) if before else None
        return folder, stage_config(config, config.stages[-1], winner)
    begun = [stage for stage in before if is_run(stage)]
    if not begun:
        raise InputError(folder.path, "has saved no generation yet; continue it with search … --resume")
    return _stage_begun_last(begun[-1])
