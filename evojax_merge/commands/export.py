"""`evojax-merge export`: the winner of a run, its best candidate so far, or a member of its front."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge import plugins
from evojax_merge.backends.backend import Backend
from evojax_merge.backends.registry import find_backend
from evojax_merge.checkpoints.writer import CARD, MAX_SHARD_BYTES, check_new_model, check_output
from evojax_merge.commands import merge
from evojax_merge.commands.moe import write_mixture
from evojax_merge.config.search_config import Config
from evojax_merge.errors import Failed, InputError, print_warning
from evojax_merge.mergekit.as_adapter import AdapterOptions, prepare_adapter, write_as_adapter
from evojax_merge.mergekit.as_fp8 import FP8_DTYPE
from evojax_merge.mergekit.as_gguf import is_gguf_name
from evojax_merge.mergekit.execute import MergeSettings
from evojax_merge.mergekit.other_formats import MOE, other_format
from evojax_merge.mergekit.stages import prepare_stream
from evojax_merge.mergekit.streams import RecipeStream, parse_stream
from evojax_merge.mergekit.write import dump_documents, in_dtype
from evojax_merge.problem import (
    build_problem,
    config_from,
    stage_config,
)
from evojax_merge.report.card import adapter_card, card_in_dtype, merge_card, polished_card
from evojax_merge.report.comparison import POLISHED
from evojax_merge.schema.yaml_reader import load_documents, parse_documents, read_text
from evojax_merge.search.checkpoints import Checkpoints
from evojax_merge.search.protocols import context_of
from evojax_merge.search.run_folder import check_inputs, check_masks, find_member, is_run, locked, run_at
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import MAX_DOCUMENT, read_result, read_run_config
from evojax_merge.system.console import console, say
from evojax_merge.system.file_system import recover
from evojax_merge.system.regular_file import read_regular
from evojax_merge.system.without_torch import leave_torch_out
from evojax_merge.zoo.references import resolve_reference


@dataclass(frozen=True)
class _Output:
    """The model to write of a run: `out`, in a dtype, as an adapter of a rank, or as a GGUF file of a type; None: as it
    was searched, and whole."""

    folder: RunFolder
    out: Path
    dtype: str | None
    overwrite: bool
    rank: int | None
    type: str | None
    max_shard_bytes: int

    def write(self, path: Path, text: str, card: str | None = None) -> None:
        """Write the model of a recipe. `text`: the recipe as YAML, whose relative paths start in the folder of `path`;
        `card`: None makes one from the recipe."""
        documents = parse_documents(path, text)
        if len(documents) == 1 and other_format(documents[0]) == MOE:
            self._write_mixture(documents[0], card)
        else:
            self._write_merge(parse_stream(path, documents), text, card)

    def _write_mixture(self, document: dict[str, Any], card: str | None) -> None:
        unfit = {"--as adapter": self.rank is not None, "--dtype": self.dtype == FP8_DTYPE}
        unfit["a GGUF file"] = self.type is not None or is_gguf_name(self.out)
        option = next((option for option, is_asked in unfit.items() if is_asked), None)
        if option is not None:
            raise InputError(
                self.folder.path, f"{option}: a mixture is exported as a folder; leave it out, and merge the folder "
                "with a recipe of it alone (passthrough) to have it in another form",
            )  # fmt: skip
        options = merge.MergeOptions(dtype=self.dtype, overwrite=self.overwrite, max_shard_bytes=self.max_shard_bytes)
        write_mixture(document, self.out, options, True, print_warning, card, self.folder.parts)
        console.print(f"wrote {self.out}", soft_wrap=True)

    def _write_merge(self, stream: RecipeStream, text: str, card: str | None) -> None:
        leave_torch_out()
        out, rank, parts = self.out, self.rank, self.folder.parts
        keep = [*parts, *merge.local_inputs(stream), *merge.parts_of_runs(out)]
        merge.check_new_output(out, self.overwrite, keep, self.type, self.dtype)
        if any(recipe.method.random for recipe in stream.merges):
            check_masks(self.folder)
        settings = MergeSettings(merge.planned_dtype(self.dtype))
        with prepare_stream(stream, out, settings, resolve_reference) as stream_plan:
            searched = stream_plan.result.recipe.out_dtype
            card = card_in_dtype(card or merge.card_of_merge(out, stream_plan, text), searched, self.dtype)
            recipe = in_dtype(text, merge.planned_dtype(self.dtype))
            write, nbytes = merge.writer_of(
                stream_plan, out, self.dtype, self.type, self.max_shard_bytes, recipe, print_warning
            )
            if rank is not None:
                base = prepare_adapter(stream_plan, rank)
                options, describe = AdapterOptions(rank), partial(adapter_card, base=base)
                # An adapter's size shows when it is written.
                write, nbytes = partial(write_as_adapter, options=options, describe=describe), 0
            keep = [*stream_plan.inputs, *parts]
            error = merge.write_model(stream_plan, out, card, "exporting", self.overwrite, keep, write, nbytes)
        if error is not None:
            console.print(str(error), soft_wrap=True)
        console.print(f"wrote {out}", soft_wrap=True)

    def write_genome(self, best_so_far: bool) -> None:
        """Write the winner, or the best candidate so far, of a backend that makes candidates of genomes."""
        folder = self.folder
        gguf_name = self.type or (self.out.name if is_gguf_name(self.out) else None)
        for value, option in ((self.dtype, "--dtype"), (self.rank, "--as adapter"), (gguf_name, "a GGUF file")):
            if value is not None:
                raise InputError(
                    folder.path,
                    f"{option} is for language models that recipes make, and this run has others; write a plain folder",
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
            text = problem.within(context_of(problem.strategy, state)).backend.describe(genome).recipe
            self.write(running.recipe, text)
        chosen_on = "whole search split" if problem.splits.validation is None else "validation split"
        console.print(
            f"the best candidate of {saved.generations} generations, fitness {fitness:.4f} on the examples that every "
            f"generation is scored on (a finished run chooses its winner on the {chosen_on})", soft_wrap=True,
        )  # fmt: skip


def export(
    run: Path, out: Path, dtype: str | None, overwrite: bool, best_so_far: bool, member: int | None = None,
    rank: int | None = None, type_name: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
    polished: bool = False,
) -> None:  # fmt: skip
    """Write a run's winner, its best candidate so far, or a member of its front: as a model, as a GGUF file of a type,
    or, where a rank is given, as an adapter of its base of that rank. polished: the winner with its adapter."""
    plugins.load()
    folder = run_at(run)
    config = read_run_config(folder.config)
    plugins.load_named(f"{folder.config}: plugins", config.get("plugins", []), folder.path)
    recover(out)
    backend = config.get("backend", Config.model_fields["backend"].default)
    merges_recipes = find_backend(f"{folder.config}: backend", backend, folder.path).merges_recipes(config)
    output, finished = _Output(folder, out, dtype, overwrite, rank, type_name, max_shard_bytes), folder.is_finished()
    if polished:
        if best_so_far or member is not None or not folder.adapter.is_dir():
            what = "polished: is the winner of a finished search with search.then: polish, and better than the merge"
            raise InputError("--as", f"{what}; {folder.adapter} is missing, or another candidate was asked for")
        _write_polished(output)
    elif member is not None and merges_recipes:
        file = find_member(folder, member)
        output.write(file, read_text(file))
    elif not merges_recipes:
        output.write_genome(best_so_far and not finished)
    elif best_so_far and not (finished and folder.recipe.exists()):
        output.write_best_so_far()
    elif folder.recipe.exists():
        output.write(folder.recipe, read_text(folder.recipe), _winners_card(folder))
    else:
        more = "finish it with search … --resume, or pass --best-so-far"
        raise InputError(run, f"has no winner yet (no best/recipe.yaml); {more}")


def _write_polished(output: _Output) -> None:
    """Write the winner with the adapter by which it is polished, in the dtypes of the winner's recipe."""
    folder, card = output.folder, _winners_card(output.folder)
    documents = load_documents(folder.recipe)
    recipe = documents[-1] if documents and isinstance(documents[-1], dict) else {}
    model = "+".join(map(os.path.abspath, (folder.model, folder.adapter)))
    document = {"merge_method": "passthrough", "models": [{"model": model}]}
    document |= {key: recipe[key] for key in ("dtype", "out_dtype") if key in recipe}
    if card is not None:
        result = read_result(folder.result)
        rows = [] if result is None else [row for row in result.table if row.role == POLISHED]
        card = polished_card(card, folder.path.name, rows[0].heldout_scores if rows else {})
    # No file of the run has this recipe.
    output.write(folder.adapter, dump_documents([document]), card)


def _winners_card(folder: RunFolder) -> str | None:
    """The model card of a run's winner; None where it has none."""
    file = folder.model / CARD
    return read_regular(file, "a model card", MAX_DOCUMENT).decode(errors="replace") if file.exists() else None


def export_candidate(backend: Backend, genome: np.ndarray, out: Path, keep: Sequence[Path]) -> None:
    """Write the candidate of a genome, whose backend makes candidates of genomes. keep: files and folders that must not
    be replaced."""
    candidate = backend.describe(genome)
    facts = backend.facts
    models = {facts.references[model]: model for model in candidate.sources}
    card = merge_card(out.name, [facts.name], models, candidate.recipe, beyond_recipe=facts.beyond_recipe)
    backend.export(candidate.recipe, genome, out, card, partial(check_output, out, keep))


def _stage_begun_last(folder: RunFolder) -> tuple[RunFolder, Config]:
    """The run folder of a search that was broken off, and its config; for a chain, those of the stage that was
    running."""
    config = config_from(folder.config, read_run_config(folder.config), [], None)
    if config.stages is None:
        return folder, config
    before = [RunFolder(folder.stages / f"stage-{number}") for number in range(1, len(config.stages))]
    if folder.history.exists() or not before:
        winner = before[-1].winner if before else None
        return folder, stage_config(config, config.stages[-1], winner)
    begun = [stage for stage in before if is_run(stage)]
    if not begun:
        raise InputError(folder.path, "has saved no generation yet; continue it with search … --resume")
    return _stage_begun_last(begun[-1])
