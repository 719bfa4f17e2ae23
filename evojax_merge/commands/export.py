"""`evojax-merge export`: the winner of a run, its best candidate so far, or a member of its front."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from evojax_merge import plugins
from evojax_merge.backends.backend import Backend
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


@dataclass(frozen=True)
class _Output:
    """The model to write of a run: `out`, in a dtype, or as an adapter of a rank; None: as it was searched, and
    whole."""

    folder: RunFolder
    out: Path
    dtype: str | None
    overwrite: bool
    rank: int | None

    def write(self, stream: RecipeStream, text: str, card: str | None = None) -> None:
        """Write the model of a recipe. `text`: the recipe as YAML; `card`: None makes one from the recipe."""
        out, rank, parts = self.out, self.rank, self.folder.parts
        check_new_model(out, self.overwrite, [*parts, *local_inputs(stream), *parts_of_runs(out)])
        if any(recipe.method.random for recipe in (*(stage.recipe for stage in stream.stages), stream.result)):
            check_masks(self.folder)
        with prepare_stream(stream, out, self.dtype, find=resolve_reference) as stream_plan:
            searched = stream_plan.result.recipe.out_dtype
            card = card_in_dtype(card or card_of_merge(out, stream_plan, text), searched, self.dtype)
            write: Callable[..., RankError | None] = partial(merge_to, recipe=in_dtype(text, self.dtype))
            if rank is not None:
                base = prepare_adapter(stream_plan, rank)
                write = partial(write_as_adapter, rank=rank, describe=partial(adapter_card, base=base, rank=rank))
            keep = [*stream_plan.inputs, *parts]
            error = write_model(stream_plan, out, card, "exporting", self.overwrite, keep, write)
        if error is not None:
            console.print(str(error), soft_wrap=True)
        console.print(f"wrote {out}", soft_wrap=True)

    def write_genome(self, best_so_far: bool) -> None:
        """Write the winner, or the best candidate so far, of a backend that makes candidates of genomes."""
        folder = self.folder
        for value, option in ((self.dtype, "--dtype"), (self.rank, "--as-adapter")):
            if value is not None:
                raise InputError(
                    folder.path, f"{option}: is for language models, and this run has others; leave it out"
                )
        check_new_model(self.out, self.overwrite, folder.parts)
        with locked(folder.path, resume=True):
            check_inputs(folder)
            problem = build_problem(folder.config, config_from(folder.config, read_run_config(folder.config), [], None))
            result, saved = read_result(folder.result), Checkpoints(folder).restore(say)
            if best_so_far and saved is not None:
                genome, _ = saved.best(problem.space.dims)
            elif result is not None and not best_so_far:
                genome = np.array(result.genome, np.float32)
            else:
                what = "has no winner yet; finish it with search … --resume, or pass --best-so-far"
                raise InputError(folder.path, what)
            export_candidate(problem.exporting(), genome, self.out, folder.parts)
        console.print(f"wrote {self.out}", soft_wrap=True)

    def write_best_so_far(self) -> None:
        """Write the best candidate that an unfinished run has saved, as every generation scored it."""
        path = self.folder.path
        # The lock keeps any other process from going on with the run meanwhile.
        with locked(path, resume=True):
            running, config = _stage_begun_last(self.folder)
            check_inputs(running)
            problem = build_problem(running.config, config, chained=True)
            saved = Checkpoints(running).restore(say)
            if saved is None:
                raise InputError(path, "has saved no generation yet; continue it with search … --resume")
            genome, fitness = saved.best(problem.space.dims)
            if not math.isfinite(fitness):
                raise Failed(
                    f"{path}: of no candidate of {saved.generations} generations the fitness on all examples is known "
                    "(gradients on minibatches, or of a companion, do not tell it); continue the search with --resume"
                )
            state = saved.strategy_state(problem.seed, problem.strategy, problem.space)
            text = problem.within(context_of(problem.strategy, state)).backend.recipe(genome)
            self.write(parse_stream(running.recipe, parse_documents(running.recipe, text)), text)
        chosen_on = "whole search split" if problem.splits.validation is None else "validation split"
        console.print(
            f"the best candidate of {saved.generations} generations, fitness {fitness:.4f} on the examples that every "
            f"generation is scored on (a finished run chooses its winner on the {chosen_on})", soft_wrap=True,
        )  # fmt: skip


def export(
    run: Path, out: Path, dtype: str | None, overwrite: bool, best_so_far: bool, member: int | None = None,
    rank: int | None = None,
) -> None:  # fmt: skip
    """Write a run's winner, its best candidate so far, or a member of its front: as a model, or, where a rank is given,
    as an adapter of its base of that rank."""
    plugins.load()
    folder = run_at(run)
    config = read_run_config(folder.config)
    plugins.load_named(f"{folder.config}: plugins", config.get("plugins", []), folder.path)
    recover(out)
    backend = config.get("backend", Config.model_fields["backend"].default)
    merges_recipes = find_backend(f"{folder.config}: backend", backend, folder.path).merges_recipes
    output, finished = _Output(folder, out, dtype, overwrite, rank), folder.is_finished()
    if member is not None and merges_recipes:
        file = find_member(folder, member)
        output.write(read_stream(file), file.read_text(encoding="utf-8"))
    elif not merges_recipes:
        output.write_genome(best_so_far and not finished)
    elif best_so_far and not (finished and folder.recipe.exists()):
        output.write_best_so_far()
    elif folder.recipe.exists():
        stream, file = read_stream(folder.recipe), folder.model / "README.md"
        card = read_regular(file, "a model card", MAX_DOCUMENT).decode(errors="replace") if file.exists() else None
        output.write(stream, folder.recipe.read_text(encoding="utf-8"), card)
    elif folder.params.exists():
        raise InputError(run, f"is a run of search_pytrees, whose winner is a pytree: best/{folder.params.name}")
    else:
        more = "finish it with search … --resume, or pass --best-so-far"
        raise InputError(run, f"has no winner yet (no best/recipe.yaml); {more}")


def export_candidate(backend: Backend, genome: np.ndarray, out: Path, keep: Sequence[Path]) -> None:
    """Write the candidate of a genome, whose backend makes candidates of genomes. keep: files and folders that must not
    be replaced."""
    recipe = backend.recipe(genome)
    models = {backend.references[model]: model for model in backend.merged_from(genome)}
    card = merge_card(out.name, [backend.name], models, recipe)
    backend.export(recipe, genome, out, card, partial(check_output, out, keep))


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
