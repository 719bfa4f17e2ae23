"""The account of a merge's tensors for the terminal, for the card and for result.json."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evojax_merge.mergekit.account import FATES, Fate, TensorFate
from evojax_merge.report.card import public_names
from evojax_merge.report.tables import Table

Groups = Mapping[tuple[Fate, str, str], list[str]]


def with_public_names(fates: Sequence[TensorFate], models: Mapping[str, Path]) -> list[TensorFate]:
    """The fates with the models' public names. models: the folder of each model, by the recipe's name of it."""
    names = dict(zip(models, public_names(list(models.values())), strict=True))
    return [replace(fate, model=names.get(fate.model, fate.model)) for fate in fates]


def grouped(fates: Sequence[TensorFate]) -> Groups:
    """The tensors by fate, in the order of `FATES`, reason and model."""
    groups: dict[tuple[Fate, str, str], list[str]] = {}
    for fate in sorted(fates, key=lambda fate: FATES.index(fate.fate)):
        groups.setdefault((fate.fate, fate.reason, fate.model), []).append(fate.tensor)
    return groups


def summary(fates: Sequence[TensorFate]) -> str:
    """The account in one line."""
    merged = sum(fate.fate == "merged" for fate in fates)
    count = len({fate.model for fate in fates})
    models = f"tensors of {count} models" if count > 1 else "tensors of one model"
    if merged == len(fates):
        return f"{models}: all {merged:,} merged"
    others = [
        f"{len(tensors):,} of {model} {fate} ({tensors[0]}{', …' if len(tensors) > 1 else ''}: {reason})"
        for (fate, reason, model), tensors in grouped(fates).items() if fate != "merged"
    ]  # fmt: skip
    return f"{models}: {merged:,} merged; {'; '.join(others)}"


def table(fates: Sequence[TensorFate]) -> Table:
    """The account with a row for each tensor."""
    rows = [[fate.model, fate.tensor, fate.fate, fate.reason] for fate in fates]
    return Table(("model", "tensor", "fate", "why"), rows, folded=(0, 1))


def card_section(fates: Sequence[TensorFate]) -> str:
    """The account as a section of a model's card."""
    lines = [
        [model, fate, len(tensors), f"`{tensors[0]}`" + (", …" if len(tensors) > 1 else ""), reason]
        for (fate, reason, model), tensors in grouped(fates).items()
    ]
    return f"\n## Tensors\n\n{Table(('model', 'fate', 'tensors', 'first', 'why'), lines, numbers=(2,)).markdown()}\n"


def document(fates: Sequence[TensorFate]) -> list[dict[str, Any]]:
    """The account for result.json: the names of all tensors but the merged ones, whose number it says."""
    return [
        {"fate": fate, "why": reason, "model": model, "count": len(tensors)}
        | ({} if fate == "merged" else {"tensors": tensors})
        for (fate, reason, model), tensors in grouped(fates).items()
    ]
