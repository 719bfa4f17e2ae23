"""The parts of a recipe that mergekit ignores (unknown keys, parameters that the method does not have), and values that
it reads as others (true as 1, a density above 1 as 1).

Public recipes are full of both (a `weight` for SLERP, `int8_mask`, notes). `without_unused_keys` removes such keys and
converts such values before a recipe is parsed, because the parser refuses them, and returns a line about each.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_kernels import METHODS, Method, Parameter

from evojax_merge.errors import InputError, nearest, printable, shown
from evojax_merge.mergekit.other_formats import other_format
from evojax_merge.mergekit.plan import read_number, read_switch
from evojax_merge.mergekit.schema import KEYS, parameter_names
from evojax_merge.mergekit.templates import CHAT_TEMPLATES

# The maximum of reported unused keys.
MAX_LINES = 20
# Keys of other tools and of older recipes, which are no typos.
KNOWN_UNUSED_KEYS = {"int8_mask", "int_space", "out_path"}
# Advice about ignored keys: the notation that replaces each.
ADVICE = {
    "revision": "a revision is said as NAME@REVISION",
    "lora": "an adapter is said as MODEL+ADAPTER",
    "adapter": "an adapter is said as MODEL+ADAPTER",
}


# The sections of a recipe: the reason why a key that is none of theirs is ignored, and the kinds of their parts, which
# are sections, lists `[…]` and mappings `{…}` of sections, and methods of `_RecipeNormaliser`.
_SLICED = {"models": "[model]", "slices": "[slice]", "parameters": "settings"}
_MODEL = ("a model has no such key here", {"model": "reference", "parameters": "own_settings"})
SECTIONS: dict[str, tuple[str, Mapping[str, str]]] = {
    "document": (
        "a recipe has no such key",
        {**_SLICED, "base_model": "reference", "ends": "reference", "tokenizer_source": "tokens_of",
         "on_mismatch": "filters", "tokenizer": "tokenizer", "modules": "{module}", "chat_template": "chat_template"},
    ),
    "module": ("a module has no such key", _SLICED),
    "slice": (
        "a slice has no such key", {"sources": "[source]", "parameters": "settings", "base_model": "reference"}
    ),
    "model": _MODEL,
    "source": _MODEL,
    "pair": ("a model has no such key", {"model": "path", "lora": "path"}),
    "path": ("a path has no such key", {}),
    "filter": ("a filter has no such key", {}),
    "tokenizer": (
        "a tokenizer has no such key", {"source": "reference", "tokens": "tokens", "pad_to_multiple_of": "whole"}
    ),
    "token": ("a token has no such key", {"source": "token_source", "force": "switch"}),
    "row": ("it has no such key", {"model": "reference", "token_id": "whole"}),
}  # fmt: skip
# The sections of a model with parameters of its own.
MODELS = ("model", "source")


@dataclass(frozen=True)
class Typo:
    """An unused key at a place of a recipe, and the `name` that was likely meant. model: the reference of the model
    that has the key, where a model has it. is_misplaced: the key has the meant name, but all models share its value.
    section: the one, beside the key, that the meant key belongs in."""

    name: str
    place: str
    model: Any
    is_misplaced: bool = False
    section: str = ""

    @property
    def advice(self) -> str:
        return (
            f"ignored, all models share one {self.name}"
            if self.is_misplaced
            else f"did you mean '{self.section}{self.name}'?"
        )

    def explains(self, error: str) -> bool:
        """Return whether an error names the meant key, and not as a part of a tensor's name, which may hold any
        word; a misplaced key explains only that it is missing."""
        if self.is_misplaced:
            return error.startswith(f"{self.name}: missing")
        return re.search(rf"(?<![\w.]){re.escape(self.name)}\b", error) is not None

    def rank(self, error: str) -> tuple[bool, bool, bool]:
        """The sort key, least for the typo that most likely caused an error: the error is about that key, and that
        model."""
        names_model = isinstance(self.model, str) and re.search(rf"(?<!\S){re.escape(self.model)}(?!\S)", error)
        return not error.startswith(f"{self.name}: "), not names_model, self.model is not None


@dataclass
class _RecipeNormaliser:
    """Normalises one document: removes the keys that have no meaning in a recipe of this method, and converts values as
    mergekit reads them. A value of an unexpected form stays, for the parser to refuse. `method`: None where it is
    unknown; `notes`: each unused key or changed value -> a line about it, once for all its places; `typos`: the unused
    keys that were likely meant to be others; `model`: the reference of the model whose keys are being read."""

    method: Method | None
    notes: dict[str, str] = field(default_factory=dict)
    typos: list[Typo] = field(default_factory=list)
    model: Any = None

    def chat_template(self, place: str, value: Any) -> Any:
        """None for a name that no template has: mergekit writes no tokenizer then; here the tokenizer keeps its
        template."""
        if not isinstance(value, str) or "{" in value or value in ("", "auto", *CHAT_TEMPLATES):
            return value
        near = nearest(value, CHAT_TEMPLATES)
        meant = "" if near is None else f" (did you mean '{near}'?)"
        self.notes[place] = f"{place}: ignored; no template is called {shown(value)}{meant}"
        return None

    def normalised(self, kind: str, place: str, value: Any) -> Any:
        """A part of a recipe, whose kind is a section, a list or a mapping of them (see `SECTIONS`), or a method."""
        inner = kind.strip("[]{}")
        if kind.startswith("["):
            listed = enumerate(value) if isinstance(value, list) else None
            return value if listed is None else [self.normalised(inner, f"{place}[{i}]", item) for i, item in listed]
        if kind.startswith("{"):
            named = value.items() if isinstance(value, dict) else None
            return value if named is None else {k: self.normalised(inner, f"{place}.{k}", item) for k, item in named}
        if kind not in SECTIONS:
            return getattr(self, kind)(place, value)
        why, parts = SECTIONS[kind]
        keys = KEYS[kind] | ({"name"} if kind == "document" else frozenset())
        if kind in MODELS:
            self.model = value.get("model") if isinstance(value, dict) else None
        section = self._known(place, value, keys, why)
        if isinstance(section, dict):
            begin = f"{place}." if place else ""
            section = {
                key: self.normalised(parts[key], f"{begin}{key}", item) if key in parts else item
                for key, item in section.items()
            }
        if kind in MODELS:
            self.model = None
        return section

    def reference(self, place: str, value: Any) -> Any:
        is_path = isinstance(value, dict) and "path" in value and "model" not in value
        return self.normalised("path" if is_path else "pair", place, value)

    def tokens_of(self, place: str, value: Any) -> Any:
        """A model, or a mapping of ours, which names a model and how rows are approximated."""
        return value if isinstance(value, dict) and "of" in value else self.reference(place, value)

    def settings(self, place: str, value: Any) -> Any:
        if self.method is None:
            return value
        kept = self._known(place, value, parameter_names(self.method), f"{self.method.name} does not use it")
        if not isinstance(kept, dict):
            return kept
        numbers = {parameter.name: parameter for parameter in self.method.parameters}
        filtered = {name: self.filters(f"{place}.{name}", setting) for name, setting in kept.items()}
        return {
            name: self.numbers(f"{place}.{name}", numbers[name], setting) if name in numbers else setting
            for name, setting in filtered.items()
        }

    def numbers(self, place: str, parameter: Parameter, value: Any) -> Any:
        """A parameter's setting: filters, a gradient, or one number."""
        if isinstance(value, dict):
            return {
                key: self.numbers(f"{place}.value", parameter, entry) if key == "value" else entry
                for key, entry in value.items()
            }
        if not isinstance(value, list):
            number = _as_number(value)
            share = read_number(number)
            # mergekit reads a share of 1 or more as all of the entries, and one of 0 or less as none.
            if parameter.quantised and isinstance(share, int | float):
                number = 1 if share > 1 else 0 if share < 0 and parameter.clipped_below else number
            return self._read(place, value, number)
        if any(isinstance(entry, dict) for entry in value):
            return [self.numbers(f"{place}[{i}]", parameter, entry) for i, entry in enumerate(value)]
        # A gradient's value in a layer is limited, but not its entries.
        return [self._read(f"{place}[{i}]", entry, _as_number(entry)) for i, entry in enumerate(value)]

    def own_settings(self, place: str, value: Any) -> Any:
        """The settings of one model."""
        if self.method is not None and isinstance(value, dict):
            shared = {p.name for p in self.method.parameters if not p.per_parent} | {*self.method.yaml_options}
            self.typos += [Typo(key, f"{place}.{key}", self.model, is_misplaced=True) for key in value if key in shared]
            value = self._known(place, value, set(value) - shared, f"{self.method.name} has one for all models")
        return self.settings(place, value)

    def filters(self, place: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self.filters(f"{place}[{i}]", entry) for i, entry in enumerate(value)]
        return self.normalised("filter", place, value)

    def tokens(self, place: str, value: Any) -> Any:
        entries = self.normalised("{token}", place, value)
        for name, entry in list(entries.items()) if isinstance(entries, dict) else ():
            if isinstance(entry, dict) and entry.get("source") is None and entry.get("force", False) is False:
                self.notes[f"{place}.{name}"] = f"{place}.{name}: ignored; it names no source"
                del entries[name]
        return entries

    def whole(self, place: str, value: Any) -> Any:
        """A whole number, which may be written as a text or with a point."""
        number = _as_number(value)
        number = read_number(number) if isinstance(number, str) else number
        return self._read(place, value, int(number) if isinstance(number, float) and number.is_integer() else number)

    def token_source(self, place: str, value: Any) -> Any:
        is_kind = isinstance(value, dict) and "kind" in value
        return self.normalised("row", place, value) if is_kind else self.reference(place, value)

    def switch(self, place: str, value: Any) -> Any:
        return self._read(place, value, read_switch(value))

    def _read(self, place: str, value: Any, read: Any) -> Any:
        """The value `read`, with a note where it differs from `value`."""
        if read is not value and (type(read), read) != (type(value), value):
            # Once for a key and a value, wherever they stand.
            key = re.sub(r"\[\d+\]|\.value\b", "", place).rpartition(".")[2]
            self.notes.setdefault(f"{key}: {value!r}", f"{place}: {shown(value)} is read as {shown(read)}")
        return read

    def _known(self, place: str, value: Any, known: Collection[str], why: str) -> Any:
        """A mapping without the unknown keys, with a note about each."""
        if not isinstance(value, dict):
            return value
        for key in value:
            if key in known:
                continue
            key_place = f"{place}.{key}" if place else str(key)
            # Nobody meant another key by one of another tool, or by a parameter of another method.
            is_other = key in ADVICE or key in KNOWN_UNUSED_KEYS
            is_other = is_other or any(str(key) in parameter_names(method) for method in METHODS.values())
            near, section = None if is_other else nearest(str(key), known), ""
            if "parameters" in known and self.method is not None and str(key) in parameter_names(self.method):
                near, section = str(key), "parameters."
            typo = None if near is None else Typo(near, key_place, self.model, section=section)
            advice = ADVICE.get(str(key)) or (None if typo is None else f"{typo.advice} --strict refuses it")
            self.notes.setdefault(str(key), f"{key_place}: ignored; {why}" + ("" if advice is None else f" ({advice})"))
            if typo is not None:
                self.typos.append(typo)
        return {key: item for key, item in value.items() if key in known}


def _as_number(value: Any) -> Any:
    """True as 1 and false as 0; all else as it is."""
    return int(value) if isinstance(value, bool) else value


def without_unused_keys(path: Path, documents: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """A recipe's documents, without the keys that mergekit ignores and with the values that mergekit reads, and a line
    for each removed key and each changed value.

    documents: as parsed from YAML; a document without a merge method, or of another program, is no recipe and stays as
    it is. `path` names the recipe in the lines.
    """
    normalised = _normalised(documents)
    lines = [f"{path}: {place}{line}" for _, place, normaliser in normalised for line in normaliser.notes.values()]
    return [document for document, _, _ in normalised], few_lines(path, lines, "more keys are ignored")


def _normalised(documents: Sequence[Any]) -> list[tuple[Any, str, _RecipeNormaliser]]:
    """For each document: the normalised document, its label before a key in messages, and its normaliser."""
    results = []
    for number, document in enumerate(documents, start=1):
        normaliser = _RecipeNormaliser(None)
        if isinstance(document, Mapping) and "merge_method" in document and other_format(document) is None:
            name = document["merge_method"]
            normaliser = _RecipeNormaliser(METHODS.get(name) if isinstance(name, str) else None)
            document = normaliser.normalised("document", "", document)
        results.append((document, f"document {number}: " if len(documents) > 1 else "", normaliser))
    return results


@contextmanager
def blaming_slips(documents: Sequence[Any]) -> Iterator[None]:
    """Add to an InputError of the block the unused key of the documents that was likely meant to be a key in the
    error's message, or that stands in the wrong place. documents: as parsed from YAML."""
    try:
        yield
    except InputError as error:
        what = error.what
        matches = [(document, typo) for _, document, normaliser in _normalised(documents) for typo in normaliser.typos]
        matches = [match for match in matches if match[1].explains(what)]
        if not matches:
            raise
        document, typo = min(matches, key=lambda match: match[1].rank(what))
        raise InputError(error.where, f"{what} ({document}{typo.place}: {typo.advice})") from None


def few_lines(path: Path, lines: Sequence[str], more: str) -> list[str]:
    """The first lines about a recipe, printable, and a line with the number of the others; more: the text of that
    line."""
    remaining = len(lines) - MAX_LINES
    first_lines = [printable(line) for line in lines[:MAX_LINES]]
    return first_lines if remaining <= 0 else [*first_lines, f"{path}: {remaining} {more} (--strict names the next)"]
