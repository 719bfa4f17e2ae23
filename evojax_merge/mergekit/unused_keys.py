"""What mergekit passes over in a recipe: keys that it does not know, and parameters that the method does not have.

Public recipes are full of them (a `weight` for SLERP, `int8_mask`, notes). They are taken out before a recipe is read,
which refuses them, and told.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_kernels import METHODS, Method

from evojax_merge.errors import nearest, printable
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

# So many unused keys are told.
MAX_LINES = 20
# What a key that is passed over may have been meant to say.
ADVICE = {
    "revision": "a revision is said as NAME@REVISION",
    "lora": "an adapter is said as MODEL+ADAPTER",
    "adapter": "an adapter is said as MODEL+ADAPTER",
}


@dataclass
class _Sieve:
    """Takes out of one document what a recipe of this method has no meaning for. Whatever is not of the form that is
    expected stays, for the reading to refuse. `method`: None where it is not known; `told`: each unused key, and what
    is said of it once for all its places."""

    method: Method | None
    told: dict[str, str] = field(default_factory=dict)

    def document(self, value: Any) -> Any:
        top = self._known("", value, TOP_KEYS | {"name"}, "a recipe has no such key")
        return self._each(
            top,
            base_model=self.reference, ends=self.reference, tokenizer_source=self.reference, parameters=self.settings,
            on_mismatch=self.filters, tokenizer=self.tokenizer, modules=self.modules,
            models=self.rows(MODEL_KEYS), slices=self.slices,
        )  # fmt: skip

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
            row = self._known(place, value, known, "a model has no such key here")
            return self._each(row, place, model=self.reference, parameters=self.own_settings)

        return lambda place, value: _listed(place, value, one)

    def reference(self, place: str, value: Any) -> Any:
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
        return {name: self.filters(f"{place}.{name}", one) for name, one in kept.items()}

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
            return {name: self.token(f"{place}.{name}", row) for name, row in value.items()}

        return self._each(section, place, source=self.reference, tokens=tokens)

    def token(self, place: str, value: Any) -> Any:
        row = self._known(place, value, TOKEN_KEYS, "a token has no such key")

        def source(place: str, value: Any) -> Any:
            if not isinstance(value, dict) or "kind" not in value:
                return self.reference(place, value)
            return self._each(
                self._known(place, value, TOKEN_SOURCE_KEYS, "it has no such key"), place, model=self.reference
            )

        return self._each(row, place, source=source)

    def _known(self, place: str, value: Any, known: Collection[str], why: str) -> Any:
        """A mapping without the keys that are not known."""
        if not isinstance(value, dict):
            return value
        for key in value:
            if key not in known and str(key) not in self.told:
                self.told[str(key)] = f"{f'{place}.' if place else ''}{key}: ignored; {why}{_meant(str(key), known)}"
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


def _meant(key: str, known: Collection[str]) -> str:
    """What a key was likely meant to be; nothing where it is a parameter of another method."""
    if key in ADVICE:
        return f" ({ADVICE[key]})"
    if any(key in parameter_names(method) for method in METHODS.values()):
        return ""
    near = nearest(key, known)
    return "" if near is None else f" (did you mean '{near}'?)"


def without_unused_keys(path: Path, documents: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """A recipe's documents without what mergekit would pass over, and a line for each key that was taken out.

    documents: as YAML gives them; one that says no merge method is no recipe, and stays as it is. `path` names the
    recipe in the lines.
    """
    kept, lines = [], []
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, Mapping) or "merge_method" not in document:
            kept.append(document)
            continue
        name = document["merge_method"]
        sieve = _Sieve(METHODS.get(name) if isinstance(name, str) else None)
        kept.append(sieve.document(document))
        where = f"{path}: document {number}" if len(documents) > 1 else path
        lines += [printable(f"{where}: {line}") for line in sieve.told.values()]
    if len(lines) > MAX_LINES:
        lines = [
            *lines[:MAX_LINES],
            f"{path}: {len(lines) - MAX_LINES} more keys are ignored (--strict names the next)",
        ]
    return kept, lines
