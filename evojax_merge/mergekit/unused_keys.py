"""What mergekit passes over in a recipe (keys that it does not know, parameters that the method does not have), and
values that it reads as others (true as 1, a density above 1 as 1).

Public recipes are full of them (a `weight` for SLERP, `int8_mask`, notes). They are taken out, or put as mergekit reads
them, before a recipe is read, which refuses them, and told.
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
from evojax_merge.mergekit.schema import (
    FILTER_KEYS,
    MODEL_KEYS,
    MODULE_KEYS,
    PATH_KEYS,
    REFERENCE_KEYS,
    SLICE_KEYS,
    SOURCE_KEYS,
    TOKEN_KEYS,
    TOKEN_SOURCE_KEYS,
    TOKENIZER_KEYS,
    TOP_KEYS,
    parameter_names,
)
from evojax_merge.mergekit.templates import CHAT_TEMPLATES

# So many unused keys are told.
MAX_LINES = 20
# Keys of other tools and of older recipes, which are no slips.
KNOWN_STRAYS = {"int8_mask", "int_space", "out_path"}
# What a key that is passed over may have been meant to say.
ADVICE = {
    "revision": "a revision is said as NAME@REVISION",
    "lora": "an adapter is said as MODEL+ADAPTER",
    "adapter": "an adapter is said as MODEL+ADAPTER",
}


@dataclass(frozen=True)
class Slip:
    """An unused key at a place of a recipe, and the `name` that was likely meant. model: the reference of the model
    whose key it is, where it is a model's."""

    name: str
    place: str
    model: Any

    def explains(self, error: str) -> bool:
        """Whether an error names what was meant: not as a part of a tensor's name, which may hold any word."""
        return re.search(rf"(?<![\w.]){re.escape(self.name)}\b", error) is not None

    def rank(self, error: str) -> tuple[bool, bool, bool]:
        """Least for the slip that an error most likely comes from: the error is about that key, and that model."""
        names_model = isinstance(self.model, str) and re.search(rf"(?<!\S){re.escape(self.model)}(?!\S)", error)
        return not error.startswith(f"{self.name}: "), not names_model, self.model is not None


@dataclass
class _Sieve:
    """Takes out of one document what a recipe of this method has no meaning for, and puts values as mergekit reads
    them. Whatever is not of the form that is expected stays, for the reading to refuse. `method`: None where it is not
    known; `told`: each unused key or changed value, and what is said of it once for all its places;
    `slips`: the unused keys that were likely meant to be others; `model`: the reference of the model whose keys are
    being looked at."""

    method: Method | None
    told: dict[str, str] = field(default_factory=dict)
    slips: list[Slip] = field(default_factory=list)
    model: Any = None

    def document(self, value: Any) -> Any:
        top = self._known("", value, TOP_KEYS | {"name"}, "a recipe has no such key")
        return self._each(
            top,
            base_model=self.reference, ends=self.reference, tokenizer_source=self.reference, parameters=self.settings,
            on_mismatch=self.filters, tokenizer=self.tokenizer, modules=self.modules,
            models=self.rows(MODEL_KEYS), slices=self.slices, chat_template=self.chat_template,
        )  # fmt: skip

    def chat_template(self, place: str, value: Any) -> Any:
        """None for a name that no template has: mergekit writes no tokenizer then, and here it keeps its template."""
        if not isinstance(value, str) or "{" in value or value in ("", "auto", *CHAT_TEMPLATES):
            return value
        near = nearest(value, CHAT_TEMPLATES)
        meant = "" if near is None else f" (did you mean '{near}'?)"
        self.told[place] = f"{place}: ignored; no template is called {shown(value)}{meant}"
        return None

    def modules(self, place: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: self.module(f"{place}.{name}", row) for name, row in value.items()}

    def module(self, place: str, value: Any) -> Any:
        row = self._known(place, value, MODULE_KEYS, "a module has no such key")
        return self._each(row, place, models=self.rows(MODEL_KEYS), slices=self.slices, parameters=self.settings)

    def slices(self, place: str, value: Any) -> Any:
        def one(place: str, value: Any) -> Any:
            row = self._known(place, value, SLICE_KEYS, "a slice has no such key")
            return self._each(
                row, place, sources=self.rows(SOURCE_KEYS), parameters=self.settings, base_model=self.reference
            )

        return _listed(place, value, one)

    def rows(self, known: Collection[str]) -> Any:
        """Of models, or of a slice's sources."""

        def one(place: str, value: Any) -> Any:
            self.model = value.get("model") if isinstance(value, dict) else None
            row = self._known(place, value, known, "a model has no such key here")
            sieved = self._each(row, place, model=self.reference, parameters=self.own_settings)
            self.model = None
            return sieved

        return lambda place, value: _listed(place, value, one)

    def reference(self, place: str, value: Any) -> Any:
        if isinstance(value, dict) and "path" in value and "model" not in value:
            return self.path(place, value)
        row = self._known(place, value, REFERENCE_KEYS, "a model has no such key")
        return self._each(row, place, model=self.path, lora=self.path)

    def path(self, place: str, value: Any) -> Any:
        return self._known(place, value, PATH_KEYS, "a path has no such key")

    def settings(self, place: str, value: Any) -> Any:
        if self.method is None:
            return value
        kept = self._known(place, value, parameter_names(self.method), f"{self.method.name} does not use it")
        if not isinstance(kept, dict):
            return kept
        numbers = {parameter.name: parameter for parameter in self.method.parameters}
        filtered = {name: self.filters(f"{place}.{name}", one) for name, one in kept.items()}
        return {
            name: self.numbers(f"{place}.{name}", numbers[name], one) if name in numbers else one
            for name, one in filtered.items()
        }

    def numbers(self, place: str, parameter: Parameter, value: Any) -> Any:
        """A parameter's setting: filters, a gradient, or one number."""
        if isinstance(value, dict):
            return self._each(value, place, value=lambda place, one: self.numbers(place, parameter, one))
        if not isinstance(value, list):
            return self._read(place, value, self._share(parameter, _as_number(value)))
        if any(isinstance(row, dict) for row in value):
            return [self.numbers(f"{place}[{i}]", parameter, row) for i, row in enumerate(value)]
        # Only what a gradient comes to in a layer is limited, so that its entries are not.
        return [self._read(f"{place}[{i}]", row, _as_number(row)) for i, row in enumerate(value)]

    def _share(self, parameter: Parameter, value: Any) -> Any:
        """A share of the entries as mergekit reads it: 1 or more are all of them, 0 or less none."""
        share = read_number(value)
        if not parameter.quantised or not isinstance(share, int | float):
            return value
        if share > 1 or (share < 0 and parameter.clipped_below):
            return 1 if share > 1 else 0
        return value

    def own_settings(self, place: str, value: Any) -> Any:
        """Those of one model."""
        if self.method is not None and isinstance(value, dict):
            shared = {p.name for p in self.method.parameters if not p.per_parent} | {*self.method.yaml_options}
            value = self._known(place, value, set(value) - shared, f"{self.method.name} has one for all models")
        return self.settings(place, value)

    def filters(self, place: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self.filters(f"{place}[{i}]", row) for i, row in enumerate(value)]
        return self._known(place, value, FILTER_KEYS, "a filter has no such key")

    def tokenizer(self, place: str, value: Any) -> Any:
        section = self._known(place, value, TOKENIZER_KEYS, "a tokenizer has no such key")

        def tokens(place: str, value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            rows = {name: self.token(f"{place}.{name}", row) for name, row in value.items()}
            for name in [name for name, row in rows.items() if _says_nothing(row)]:
                self.told[f"{place}.{name}"] = f"{place}.{name}: ignored; it names no source"
                del rows[name]
            return rows

        return self._each(section, place, source=self.reference, tokens=tokens, pad_to_multiple_of=self.whole)

    def whole(self, place: str, value: Any) -> Any:
        """A whole number, which may be written as a text or with a point."""
        number = _as_number(value)
        number = read_number(number) if isinstance(number, str) else number
        return self._read(place, value, int(number) if isinstance(number, float) and number.is_integer() else number)

    def token(self, place: str, value: Any) -> Any:
        row = self._known(place, value, TOKEN_KEYS, "a token has no such key")

        def source(place: str, value: Any) -> Any:
            if not isinstance(value, dict) or "kind" not in value:
                return self.reference(place, value)
            return self._each(
                self._known(place, value, TOKEN_SOURCE_KEYS, "it has no such key"), place,
                model=self.reference, token_id=self.whole,
            )  # fmt: skip

        return self._each(
            row, place, source=source, force=lambda place, value: self._read(place, value, read_switch(value))
        )

    def _read(self, place: str, value: Any, read: Any) -> Any:
        """What a value is read as; it is told where that is another."""
        if read is not value and (type(read), read) != (type(value), value):
            # Once for a key and a value, wherever they stand.
            key = re.sub(r"\[\d+\]|\.value\b", "", place).rpartition(".")[2]
            self.told.setdefault(f"{key}: {value!r}", f"{place}: {shown(value)} is read as {shown(read)}")
        return read

    def _known(self, place: str, value: Any, known: Collection[str], why: str) -> Any:
        """A mapping without the keys that are not known."""
        if not isinstance(value, dict):
            return value
        for key in value:
            if key in known:
                continue
            here = f"{place}.{key}" if place else str(key)
            near = _meant(str(key), known)
            advice = ADVICE.get(str(key)) or (None if near is None else f"did you mean '{near}'?")
            self.told.setdefault(str(key), f"{here}: ignored; {why}" + ("" if advice is None else f" ({advice})"))
            if near is not None:
                self.slips.append(Slip(near, here, self.model))
        return {key: one for key, one in value.items() if key in known}

    @staticmethod
    def _each(value: Any, place: str = "", /, **parts: Any) -> Any:
        """A mapping whose parts have gone through the functions of their names."""
        if not isinstance(value, dict):
            return value
        begin = f"{place}." if place else ""
        return {key: parts[key](f"{begin}{key}", one) if key in parts else one for key, one in value.items()}


def _listed(place: str, value: Any, one: Any) -> Any:
    return [one(f"{place}[{i}]", row) for i, row in enumerate(value)] if isinstance(value, list) else value


def _as_number(value: Any) -> Any:
    """True as 1 and false as 0; all else as it is."""
    return int(value) if isinstance(value, bool) else value


def _says_nothing(row: Any) -> bool:
    return isinstance(row, dict) and row.get("source") is None and row.get("force", False) is False


def _meant(key: str, known: Collection[str]) -> str | None:
    """The known key that a key was likely meant to be; None for a parameter of another method."""
    if key in ADVICE or key in KNOWN_STRAYS or any(key in parameter_names(method) for method in METHODS.values()):
        return None
    return nearest(key, known)


def without_unused_keys(path: Path, documents: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """A recipe's documents without what mergekit would pass over and with values as it reads them, and a line for each
    key that was taken out and each value that was changed.

    documents: as YAML gives them; one that says no merge method, or is another program's, is no recipe, and stays as
    it is. `path` names the recipe in the lines.
    """
    sieved = _sieved(documents)
    lines = [f"{path}: {place}{line}" for _, place, sieve in sieved for line in sieve.told.values()]
    return [document for document, _, _ in sieved], few_lines(path, lines, "more keys are ignored")


def _sieved(documents: Sequence[Any]) -> list[tuple[Any, str, _Sieve]]:
    """Each document without what is passed over, what messages call it before a key, and what its sieve tells."""
    rows = []
    for number, document in enumerate(documents, start=1):
        sieve = _Sieve(None)
        if isinstance(document, Mapping) and "merge_method" in document and other_format(document) is None:
            name = document["merge_method"]
            sieve = _Sieve(METHODS.get(name) if isinstance(name, str) else None)
            document = sieve.document(document)
        rows.append((document, f"document {number}: " if len(documents) > 1 else "", sieve))
    return rows


@contextmanager
def blaming_slips(documents: Sequence[Any]) -> Iterator[None]:
    """Where the block finds fault with a recipe, the message says as well which unused key of its documents, as YAML
    gives them, was likely meant to be a key that it names."""
    try:
        yield
    except InputError as error:
        what = error.what
        rows = [(document, slip) for _, document, sieve in _sieved(documents) for slip in sieve.slips]
        rows = [row for row in rows if row[1].explains(what)]
        if not rows:
            raise
        document, slip = min(rows, key=lambda row: row[1].rank(what))
        meant = f"{document}{slip.place}: did you mean '{slip.name}'?"
        raise InputError(error.where, f"{what} ({meant})") from None


def few_lines(path: Path, lines: Sequence[str], more: str) -> list[str]:
    """The first of the lines about a recipe, printable, and how many `more` there are."""
    rest = len(lines) - MAX_LINES
    told = [printable(line) for line in lines[:MAX_LINES]]
    return told if rest <= 0 else [*told, f"{path}: {rest} {more} (--strict names the next)"]
