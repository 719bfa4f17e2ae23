"""`evojax-merge moe`: a mixture of experts out of dense models, as mergekit-moe's YAML describes it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.derived import ignored_revisions, split_reference
from evojax_merge.checkpoints.references import local_path
from evojax_merge.checkpoints.writer import check_new_model, check_output, require_space
from evojax_merge.commands.merge import MergeOptions, parts_of_runs
from evojax_merge.errors import InputError, print_warning
from evojax_merge.mergekit.as_gguf import is_gguf_name
from evojax_merge.mergekit.execute import merge_to
from evojax_merge.mergekit.mixtures import parse_mixture, plan_mixture
from evojax_merge.mergekit.write import dump_yaml
from evojax_merge.report.card import card_in_dtype, merge_card
from evojax_merge.report.notices import Log
from evojax_merge.report.progress import merge_bar
from evojax_merge.schema.yaml_reader import load_yaml, read_text
from evojax_merge.system.console import console
from evojax_merge.system.file_system import recover
from evojax_merge.system.without_torch import leave_torch_out
from evojax_merge.zoo.references import resolve_reference


def moe(recipe: Path, out: Path, options: MergeOptions, allow_same: bool, without_meaning: Sequence[str] = ()) -> None:
    """Make the mixture and report on the terminal. `without_meaning`: see `merge`."""
    leave_torch_out()
    if without_meaning:
        print_warning(f"{', '.join(without_meaning)}: mergekit's, without a meaning here; ignored")
    write_mixture(recipe, out, options, allow_same, print_warning)
    console.print(f"wrote {out}", soft_wrap=True)


def write_mixture(
    recipe: Path | dict[str, Any], out: Path, options: MergeOptions, allow_same: bool, warn: Log,
    card: str | None = None, keep: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Make the mixture of a recipe (a file, or the content of its YAML) and write the model. allow_same: the experts
    may all be one model; card: that of a search's winner, None: one is made; keep: files and folders that must not be
    replaced."""
    recover(out)
    if isinstance(recipe, Path):
        path, document, text = recipe, load_yaml(recipe), read_text(recipe)
    else:
        path, document, text = Path("recipe"), recipe, dump_yaml(recipe)
    parsed, ignored = parse_mixture(path, document)
    references = [parsed.base_model, *(expert.source_model for expert in parsed.all_experts)]
    parts = [part for name in references for part in split_reference(name, lambda _: False)]
    local = [place for part in parts if part and (place := local_path(part, path.parent)) is not None]
    keep = [*keep, *local, *([path] if isinstance(recipe, Path) else []), *parts_of_runs(out)]
    if is_gguf_name(out):
        raise InputError(
            out, "a mixture is written as a folder; choose a folder's name, and `evojax-merge merge` makes a GGUF file "
            "of that folder (merge_method: passthrough, models: [{model: FOLDER}])",
        )  # fmt: skip
    check_new_model(out, options.overwrite, keep)
    plan = plan_mixture(path, parsed, text, resolve_reference, path.parent, options, allow_same)
    for line in (*ignored, *ignored_revisions(references, path.parent), *plan.warnings):
        warn(line)
    check = partial(check_output, out, [*keep, *plan.inputs])
    check()
    require_space(out, plan.nbytes)
    if card is not None:
        card = card_in_dtype(card, parsed.dtype, options.dtype)
    elif options.card:
        card = merge_card(out.name, ["moe"], plan.models, text)
    with merge_bar("writing", "", plan.nbytes) as progress:
        merge_to(
            plan, out, card=card, max_shard_bytes=options.max_shard_bytes, overwrite=options.overwrite, check=check,
            progress=progress,
        )  # fmt: skip
