"""The front matter of model cards: reading it from the cards of the merged models, and writing ours.

A card is a stranger's file: a value that is not of the expected form is ignored.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.writer import CARD
from evojax_merge.errors import InputError, escaped_lines
from evojax_merge.schema.yaml_reader import parse_yaml

# The bytes of a card that are read; the hub's longest front matters (tables of benchmarks) are a tenth of it.
MAX_BYTES = 2**20
MAX_LANGUAGES = 500
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The front matter of the card in a model folder; empty where there is none that can be read."""
    file = folder / CARD
    try:
        if not file.is_file():
            return {}
        with file.open("rb") as handle:
            return _split(handle.read(MAX_BYTES).decode("utf-8", errors="replace"))[0]
    except OSError:
        return {}


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card and the text behind it; nothing and everything where none can be read."""
    match = FRONT_MATTER.match(card)
    try:
        document = None if match is None else parse_yaml(CARD, match[1])
    except (InputError, RecursionError):
        document = None
    return (document, card[match.end() :]) if match is not None and isinstance(document, dict) else ({}, card)


def _license(card: dict[str, Any]) -> dict[str, str] | None:
    """A license of the hub's list by its name; a license that is not on it, `other`, by its own name and link."""
    name = card.get("license")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,59}", name):
        return None
    terms = {"license": name.lower()}
    if terms["license"] == "other":
        for key, form in (("license_name", r"[\w.+-]{1,100}"), ("license_link", r"[!-~]{1,300}")):
            if isinstance(card.get(key), str) and re.fullmatch(form, card[key], re.ASCII):
                terms[key] = card[key]
    return terms


def _languages(card: dict[str, Any]) -> dict[str, list[str]] | None:
    language = card.get("language")
    listed = language if isinstance(language, list) else [language]
    # YAML reads the code of Norwegian as false.
    codes: list[Any] = ["no" if code is False else code for code in listed]
    if not 0 < len(codes) <= MAX_LANGUAGES:
        return None
    if not all(isinstance(code, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{1,29}", code) for code in codes):
        return None
    return {"language": sorted(set(codes))}


def _agreed(cards: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any]:
    """The result of `read`, if it is the same for every card; else nothing."""
    first, *others = [read(card) for card in cards] or [None]
    return first if first is not None and all(other == first for other in others) else {}


def _writes_text(folder: Path) -> bool:
    try:
        architectures = read_json_object(folder / "config.json", missing={}).get("architectures")
    except InputError:
        return False
    listed = architectures if isinstance(architectures, list) else []
    return any(isinstance(name, str) and name.endswith("ForCausalLM") for name in listed)


def front_matter(
    name: str, hub_ids: Sequence[str], folders: Sequence[Path], scores: Mapping[str, float] = MappingProxyType({})
) -> str:
    """The front matter of a merge of the models in these folders, in the hub's form. hub_ids: those of the models that
    are on the hub, which links no others; scores: held-out scores of the merge, by `task/metric`. License and languages
    are those that all of the models' cards agree on."""
    cards = [read_front_matter(folder) for folder in folders]
    header: dict[str, Any] = {}
    if hub_ids:
        header |= {"base_model": list(hub_ids), "base_model_relation": "merge"}
    header |= _agreed(cards, _license) | _agreed(cards, _languages) | {"library_name": "transformers"}
    if folders and all(map(_writes_text, folders)):
        header["pipeline_tag"] = "text-generation"
    header["tags"] = ["mergekit", "merge", "evojax-merge"]
    results = _model_index(name, header.get("pipeline_tag"), scores)
    if results is not None:
        header["model-index"] = results
    return _dumped(header)


def _model_index(name: str, task_type: Any, scores: Mapping[str, float]) -> list[dict[str, Any]] | None:
    """Held-out scores by `task/metric` as the hub's results of the model `name`; None where none is finite. task_type:
    the pipeline tag; None: it has none."""
    # The hub groups results by the type of their data set, which is therefore the task's name.
    named = ((*score.rpartition("/")[::2], value) for score, value in scores.items() if math.isfinite(value))
    results = [
        EvalResult(
            task_type=str(task_type or "other"), dataset_type=task, dataset_name=task,
            dataset_split="heldout", metric_type=metric, metric_value=value, metric_name=f"{metric}, held out",
            verified=False,
        )
        for task, metric, value in named
    ]  # fmt: skip
    return eval_results_to_model_index(name, results) if results else None


def with_scores(card: str, name: str, scores: Mapping[str, float]) -> str:
    """A card with other held-out scores in its front matter, by `task/metric`, of the model `name`."""
    tag = _split(card)[0].get("pipeline_tag")
    return changed_front_matter(card, {"model-index": _model_index(name, tag, scores)})


def changed_front_matter(card: str, changes: Mapping[str, Any]) -> str:
    """A card with other values of some keys of its front matter, without keys whose value is None; unchanged where none
    can be read."""
    header, text = _split(card)
    changed = {key: value for key, value in {**header, **changes}.items() if value is not None}
    return _dumped(changed) + text if header else card


def _dumped(header: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=True)
    if escaped_lines(text) != text:
        text = yaml.safe_dump(dict(header), sort_keys=False, allow_unicode=False)
    return f"---\n{text}---\n"
