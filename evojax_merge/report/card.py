"""Model cards: what was merged, how, with which scores."""

import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.derived import parts_of
from evojax_merge.checkpoints.folder import hub_id
from evojax_merge.mergekit.as_adapter import RankError
from evojax_merge.mergekit.write import dump_documents, in_dtype
from evojax_merge.problem import SearchProblem
from evojax_merge.report.comparison import Result, model_name
from evojax_merge.report.front_matter import changed_front_matter, front_matter
from evojax_merge.report.tables import markdown_table
from evojax_merge.tasks.task import Task
from evojax_merge.yaml_reader import parse_documents, take_last
from evojax_merge.zoo import PREFIX


def public_names(folders: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """What models are called where others read it: by their hub ids, else by their folders' (or runs') names. Of one
    name, or of one that is taken, folders are numbered, and revisions on the hub told apart by their commits."""
    names: list[str] = []
    for folder in folders:
        name = model_name(folder)
        if name in names and hub_id(folder) is not None:
            name = f"{name}@{folder.name}"
        others = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(one for one in itertools.chain([name], others) if one not in names and one not in taken))
    return names


def _public_documents(documents: Sequence[Any], references: Mapping[str, str]) -> list[Any]:
    """A recipe's documents in which models that lie on this machine have the names that others know them by."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(one) for key, one in value.items()}
        if isinstance(value, list):
            return [replaced(one) for one in value]
        if not isinstance(value, str):
            return value
        # Whatever else names a place of this machine, be it behind a stage's name and a +, says no more to others than
        # its last part.
        parts = [value] if os.path.lexists(value) else value.split("+")
        own = [Path(one).name if os.path.isabs(one) and os.path.lexists(one) else one for one in parts]
        return references.get(value, "+".join(own))

    return [replaced(document) for document in documents]


def _hub_ids(model: Path) -> list[str]:
    """The hub ids of what a model is made of; none where some of it has none."""
    ids = [hub_id(part) for part in parts_of(model)]
    return [one for one in ids if one is not None] if None not in ids else []


def merge_card(name: str, methods: Sequence[str], models: Mapping[str, Path], recipe: str) -> str:
    """The card of a merge. methods: those of its stages, the last one's last; models: where each model of the recipe
    lies, by its reference there, the base first; recipe: its YAML, which is shown as it was written unless it names
    places of this machine."""
    documents = parse_documents("recipe", recipe, take_last)
    stages = {document["name"] for document in documents if isinstance(document, dict) and "name" in document}
    names = dict(zip(models, public_names(list(models.values()), stages), strict=True))
    # Others have the hub, with its revisions, and the zoo as well.
    local = {
        reference: own
        for reference, own in names.items()
        if reference.partition("@")[0] != own and not reference.startswith(PREFIX)
    }
    linked = dict.fromkeys(one for reference, own in names.items() for one in _hub_ids(models[reference]) or [own])
    listed = "\n".join(f"- `{own}`" for own in names.values())
    public = _public_documents(documents, local)
    text = (recipe if public == documents else dump_documents(public)).rstrip()
    made_by = " and ".join(f"`{method}`" for method in methods)
    # A longer fence than any in the text, or that would end it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return (
        f"{front_matter(list(linked), list(models.values()))}\n# {name}\n\nA merge of\n\n{listed}\n\n"
        f"by {made_by}, made with evojax-merge.\n\n## Recipe\n\n{fence}yaml\n{text}\n{fence}\n"
    )


def _sizes(task: Task, validation: Task | None, heldout: Task) -> str:
    """In words, how many examples of a task are in each split."""
    searched = f"{task.size} search" if validation is None else f"{task.size} search, {validation.size} validation"
    return f"{searched} and {heldout.size} held-out examples"


def _front_section(result: Result) -> str:
    if not result.members:
        return ""
    return (
        "\n### The front\n\nThe winner has the best weighted mean. Of what the search ended with, nothing is better "
        f"than these in every task:\n\n{markdown_table(result.front())}\n"
    )


def search_card(name: str, problem: SearchProblem, result: Result, recipe: str, generations: int) -> str:
    """The card of a search's winner. generations: how many have been searched."""
    splits = problem.splits
    validation, heldout = splits.validation, splits.heldout
    tasks = "\n".join(
        f"- `{task.name}`: metric {task.metric}, weight {task.weight:g}, "
        f"{_sizes(task, validation[i] if validation and task.weight else None, heldout[i])}"
        for i, task in enumerate(problem.splits.search)
    )
    models = {problem.references[path]: path for path in problem.candidates.merged_from(result.genome)}
    return (
        merge_card(name, [problem.candidates.name], models, recipe)
        + result.report.card_section()
        + f"\n## How it was found\n\n{problem.strategy.name} over {problem.candidates.describe()}, "
        f"{generations} generations, seed {problem.config.seed}. Fitness is the weighted mean of\n\n{tasks}\n\n"
        f"{result.chosen_on()}\n\n## Held-out scores\n\nOn examples that the search never saw:\n\n"
        f"{markdown_table(result.rows)}\n"
        + _front_section(result)
        + "".join(f"\n**{sentence}**\n" for sentence in result.verdicts())
    )


def card_in_dtype(card: str, searched: str | None, dtype: str | None) -> str:
    """The card of a winner that is written in another dtype than the one that it was searched in; None: the same."""
    if dtype is None or dtype == searched:
        return card
    note = f"Written in {dtype}. It was searched, and scored, in {searched}: scores of this model may differ a little."
    return _with_note(in_dtype(card, dtype), note)


def adapter_card(card: str, error: RankError, *, base: Path, rank: int) -> str:
    """The card of a merge as that of an adapter of its base."""
    (name,) = public_names([base])
    note = (
        f"A LoRA adapter of `{name}`, of rank {rank}: what the merge changes of each matrix, cut to that rank, which "
        f"leaves out {error.total:.1%} of it (Frobenius norm; {error.worst:.1%} of {error.tensor}). Scores in this "
        "card are those of the whole merge. The adapter was not scored."
    )
    ids = _hub_ids(base) or [name]
    changes = {"base_model": ids, "base_model_relation": "adapter", "library_name": "peft"}
    return _with_note(changed_front_matter(card, changes), note)


def _with_note(card: str, note: str) -> str:
    """A card with a paragraph behind its title; at its end where it has none."""
    before, mark, rest = card.partition("\n# ")
    title, _, rest = rest.partition("\n")
    return f"{before}{mark}{title}\n\n**{note}**\n{rest}" if mark else f"{card}\n**{note}**\n"
