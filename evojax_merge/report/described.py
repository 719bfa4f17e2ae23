"""Display of the public API's objects in a prompt and in a notebook."""

from collections.abc import Mapping
from html import escape
from typing import Any

from evojax_merge.errors import escaped, shown


class Described:
    """An object with a `repr` in one line and a small table for notebooks, both of its facts."""

    def facts(self) -> Mapping[str, Any]:
        """The object's identity and progress: a name -> a text, a number, a list of texts or None."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={_in_line(value)}" for name, value in self.facts().items())
        return escaped(f"{type(self).__name__}({facts})")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{_html(name.replace('_', ' '))}</th><td>{_html(_in_table(value))}</td></tr>"
            for name, value in self.facts().items()
        )
        return f"<table><caption>{_html(type(self).__name__)}</caption>{rows}</table>"


def _in_line(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, list) else shown(value)


def _in_table(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _html(text: str) -> str:
    return escape(escaped(text))
