"""`evojax-merge extract-lora`: a fine-tune as a LoRA adapter of its base."""

from functools import partial
from pathlib import Path
from typing import Any

from evojax_merge import plugins
from evojax_merge.checkpoints.writer import check_new_model
from evojax_merge.commands.evaluate import evaluate
from evojax_merge.commands.merge import local_inputs, parts_of_runs, write_model
from evojax_merge.errors import InputError, print_warning
from evojax_merge.mergekit.as_adapter import (
    AdapterOptions,
    RankError,
    modules_of,
    prepare_adapter,
    write_as_adapter,
)
from evojax_merge.mergekit.stages import prepare_stream
from evojax_merge.mergekit.streams import parse_stream, stream_warnings
from evojax_merge.mergekit.write import dump_documents
from evojax_merge.report.card import adapter_card, left_out_table, merge_card
from evojax_merge.report.notices import Log
from evojax_merge.steps.stored_models import read_tasks
from evojax_merge.system.console import console
from evojax_merge.system.file_system import recover
from evojax_merge.system.without_torch import leave_torch_out
from evojax_merge.zoo.references import resolve_reference

# The relative distance from which on a model was hardly made from its base; that of fine-tunes is some hundredths.
FAR = 0.5


def extract_lora(
    model: str, base: str, out: Path, options: dict[str, Any], overwrite: bool, tasks: Path | None = None
) -> None:
    """Write the adapter and report on the terminal. options: the fields of `AdapterOptions`. tasks: base, model and
    adapter are scored on them."""
    if tasks is not None:
        read_tasks(tasks, "all")  # A fault in it ends the command before the work.
    else:
        leave_torch_out()
    error = write_extracted(model, base, out, AdapterOptions(**options), overwrite, print_warning)
    console.print(left_out_table(error).terminal("What is left out of each layer's change"))
    console.print(str(error), soft_wrap=True)
    console.print(f"wrote {out} ({error.rank_words})", soft_wrap=True)
    if tasks is not None:
        evaluate([base, model, str(out.absolute())], tasks, None)


def write_extracted(model: str, base: str, out: Path, options: AdapterOptions, overwrite: bool, warn: Log) -> RankError:
    """Write the adapter that makes the model of its base."""
    plugins.load()
    recover(out)
    if model == base:
        raise InputError(model, "is its own base; expected a model that was made from it")
    # The model itself, as a merge in which its base counts for nothing.
    models = [{"model": base, "parameters": {"weight": 0.0}}, {"model": model, "parameters": {"weight": 1.0}}]
    recipe = {"merge_method": "linear", "base_model": base, "models": models}
    stream = parse_stream(Path("extract-lora"), [recipe])
    check_new_model(out, overwrite, [*local_inputs(stream), *parts_of_runs(out)])
    with prepare_stream(stream, out, find=resolve_reference) as stream_plan:
        folder = prepare_adapter(stream_plan, option="extract-lora")
        for line in (
            *stream_warnings(stream),
            *stream_plan.warnings,
            *options.unmatched(modules_of(stream_plan.result)),
        ):
            warn(line)
        given = {"model": model, "base": base, **{name: value for name, value in vars(options).items() if value}}
        folders = stream_plan.paths
        card = merge_card(out.name, ["extract-lora"], folders, dump_documents([given]))
        describe = partial(adapter_card, base=folder, of_merge=False)
        write = partial(write_as_adapter, options=options, describe=describe)
        # An adapter's size shows when it is written.
        error: RankError = write_model(stream_plan, out, card, "extracting", overwrite, stream_plan.inputs, write, 0)
    if error.distance > FAR:
        warn(
            f"{model}: is {error.distance:.2f} times the norm of {base} away from it (independent initialisations: "
            "1.41); was it made from this base? evojax-merge inspect compares models"
        )
    return error
