"""Model cards: the merged models, the recipe, and the scores."""

import itertools
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from evojax_merge.backends.backend import Backend
from evojax_merge.checkpoints.derived import parts_of
from evojax_merge.checkpoints.references import hub_id
from evojax_merge.mergekit.as_adapter import RankError
from evojax_merge.mergekit.as_fp8 import FP8_DTYPE
from evojax_merge.mergekit.write import dump_documents, in_dtype
from evojax_merge.problem import SearchProblem
from evojax_merge.report.comparison import Result, model_name
from evojax_merge.report.front_matter import changed_front_matter, front_matter, with_scores
from evojax_merge.report.tables import Table, markdown_table
from evojax_merge.schema.yaml_reader import parse_documents, take_last
from evojax_merge.tasks.task import GUARD_WEIGHT
from evojax_merge.zoo import PREFIX

# Keys of recipes whose texts are prompts: of `calibration`, and of experts.
PROMPTS = ("prompt", "positive_prompts", "negative_prompts")
# A change of a card's front matter: no results.
UNSCORED: dict[str, Any] = {"model-index": None}


def public_names(folders: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """The public names of models: their hub ids, else the names of their folders (or runs). Folders that share a name,
    or whose name is taken, are numbered; revisions on the hub are distinguished by their commits."""
    names: list[str] = []
    for folder in folders:
        name = model_name(folder)
        if name in names and hub_id(folder) is not None:
            name = f"{name}@{folder.name}"
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        names.append(next(unused for unused in candidates if unused not in names and unused not in taken))
    return names


def map_texts(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A document of YAML or JSON with other texts. `change` takes the key that a text stands under, and the text; a
    key is a text under no key ("")."""
    if isinstance(value, dict):
        keys = {k: change("", k) if isinstance(k, str) else k for k in value}
        return {keys[k]: map_texts(part, change, str(k)) for k, part in value.items()}
    if isinstance(value, list | tuple):
        return [map_texts(part, change, key) for part in value]
    return change(key, value) if isinstance(value, str) else value


def _public_documents(documents: Sequence[Any], references: Mapping[str, str], prompts: str = "") -> list[Any]:
    """A recipe's documents in which models that lie on this machine have their public names. prompts: stands in place
    of each prompt; empty: they stay."""

    def replaced(key: str, value: str) -> str:
        if not key:
            return value
        if prompts and key in PROMPTS:
            return prompts
        # Any other path, alone or behind a stage's name and a +, is cut to its last part, for the rest of it says
        # nothing to others.
        parts = [value] if os.path.lexists(value) else value.split("+")
        names = [references.get(part) or (Path(part).name if os.path.isabs(part) else "") or part for part in parts]
        return references.get(value, "+".join(names))

    return [map_texts(document, replaced) for document in documents]


def public_recipe(recipe: str, where: Path, names: Mapping[str, str], prompts: str) -> str:
    """A recipe as YAML, in which models have their public `names`, and other absolute paths are cut to their last part;
    unchanged where it has none. `where` names it in messages; prompts: see `_public_documents`."""
    documents = parse_documents(where, recipe, take_last)
    public = _public_documents(documents, names, prompts)
    return recipe if public == documents else dump_documents(public)


def _hub_ids(model: Path) -> list[str]:
    """The hub ids of a model's parts; none where a part has no id."""
    ids = [hub_id(part) for part in parts_of(model)]
    return [hub_name for hub_name in ids if hub_name is not None] if None not in ids else []


def merge_card(
    name: str,
    methods: Sequence[str],
    models: Mapping[str, Path],
    recipe: str,
    scores: Mapping[str, float] = MappingProxyType({}),
    beyond_recipe: str = "",
) -> str:
    """The card of a merge. methods: those of its stages, the last one's last; models: the folder of each model of the
    recipe, by its reference there, the base first; recipe: its YAML, shown unchanged unless it names paths of this
    machine; scores: held-out scores by `task/metric`; beyond_recipe: what the merge has that a merge of its recipe has
    not."""
    documents = parse_documents("recipe", recipe, take_last)
    stages = {document["name"] for document in documents if isinstance(document, dict) and "name" in document}
    names = dict(zip(models, public_names(list(models.values()), stages), strict=True))
    # Readers of the card can resolve the hub's models, with their revisions, and those of the zoo.
    local = {
        reference: model
        for reference, model in names.items()
        if reference.partition("@")[0] != model and not reference.startswith(PREFIX)
    }
    linked = dict.fromkeys(hub_name for model in models.values() for hub_name in _hub_ids(model))
    listed = "\n".join(f"- `{model}`" for model in names.values())
    public = _public_documents(documents, local)
    text = (recipe if public == documents else dump_documents(public)).rstrip()
    made_by = " and ".join(f"`{method}`" for method in methods)
    # A longer fence than any in the text, which could end it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return (
        f"{front_matter(name, list(linked), list(models.values()), scores)}\n# {name}\n\nA merge of\n\n{listed}\n\n"
        f"by {made_by}, made with evojax-merge.\n\n## Recipe\n\n{fence}yaml\n{text}\n{fence}\n"
        + (f"\n{beyond_recipe}\n" if beyond_recipe else "")
    )


def search_card(name: str, problem: SearchProblem[Backend], result: Result, recipe: str, generations: int) -> str:
    """The card of a search's winner. generations: the number of searched generations."""
    splits = problem.splits
    validation, heldout = splits.validation, splits.heldout
    tasks = "\n".join(
        f"- `{task.name}`: metric {task.metric}, weight {task.weight if task.weight > GUARD_WEIGHT else 0:g}, "
        + ("guarded, " if task.name in problem.guards else "")
        + (f"{task.size} search{f', {validation[i].size} validation' if validation and task.weight else ''}"
           f" and {heldout[i].size} held-out examples" if task.is_divisible else "no examples")
        for i, task in enumerate(problem.splits.search)
    )  # fmt: skip
    front = ""
    if result.members:
        better = "Of what the search ended with, nothing is better than these in every task"
        front = (
            f"\n### The front\n\nThe winner has the best weighted mean. {better}:\n\n{markdown_table(result.front())}\n"
        )
    facts, measured = problem.backend.facts, result.measured()
    more = "" if measured is None else f" {measured}"
    models = {facts.references[path]: path for path in problem.backend.describe(result.genome).sources}
    scores = result.winner.scores if result.rows and result.held_out else {}
    table = "## Held-out scores\n\nOn examples that the search never saw:" if result.held_out else "## Final scores"
    return (
        merge_card(name, [facts.name], models, recipe, scores, facts.beyond_recipe)
        + result.report.card_section()
        + f"\n## How it was found\n\n{problem.strategy.name} over {facts.genome}, "
        f"{generations} generations, seed {problem.seed}. Fitness is the weighted mean of\n\n{tasks}\n\n"
        f"{result.chosen_on()}{more}\n\n{table}\n\n{markdown_table(result.rows)}\n"
        + front
        + "".join(f"\n**{sentence}**\n" for sentence in result.verdicts())
    )


def card_in_dtype(card: str, searched: str | None, dtype: str | None) -> str:
    """The card of a winner that is written in another dtype than that of its search; None: the same. Its front matter
    has no results: this model was not scored."""
    if dtype is None or dtype == searched:
        return card
    note = f"Written in {dtype}. It was searched, and scored, in {searched}: scores of this model may differ a little."
    # A recipe has no FP8.
    recipe_dtype = None if dtype == FP8_DTYPE else dtype
    return _with_note(changed_front_matter(in_dtype(card, recipe_dtype), UNSCORED), note)


def adapter_card(card: str, error: RankError, *, base: Path, of_merge: bool = True) -> str:
    """The card of a model as that of an adapter of its base. of_merge: the card has the scores of a merge."""
    (name,) = public_names([base])
    note = (
        f"A LoRA adapter of `{name}`, of {error.rank_words}: what changes of each matrix, cut to that rank, which "
        f"leaves out {error.total:.1%} of it (Frobenius norm; {error.worst:.1%} of {error.tensor}). "
    )
    note += "Scores in this card are those of the whole merge. " if of_merge else ""
    ids = _hub_ids(base)
    links = {"base_model": ids or None, "base_model_relation": "adapter" if ids else None}
    card = _with_note(
        changed_front_matter(card, links | {"library_name": "peft"} | UNSCORED), f"{note}The adapter was not scored."
    )
    return f"{card}\n## Left out by layer\n\n{left_out_table(error).markdown()}\n"


def polished_card(card: str, name: str, scores: Mapping[str, float]) -> str:
    """The card of a winner as that of the polished winner, a model `name`. scores: its held-out scores, by
    `task/metric`."""
    note = (
        "The polished winner: the winner, whose recipe follows, with the adapter that was trained on it. The results "
        "in this card's front matter are those of the polished winner."
    )
    return _with_note(with_scores(card, name, scores), note)


def left_out_table(error: RankError) -> Table:
    """The share of each layer's change that an adapter leaves out."""
    return Table(("layer", "left out"), [[layer, share] for layer, share in error.layers.items()], {1})


def _with_note(card: str, note: str) -> str:
    """A card with a paragraph behind its title; at its end where it has none."""
    before, mark, text = card.partition("\n# ")
    title, _, text = text.partition("\n")
    return f"{before}{mark}{title}\n\n**{note}**\n{text}" if mark else f"{card}\n**{note}**\n"
