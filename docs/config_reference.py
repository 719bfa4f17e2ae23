"""Writes docs/reference/config.md from the keys that `evojax-merge keys` lists.

python docs/config_reference.py
"""

import html
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from evojax_merge.config.documents import Key, keys_of
from evojax_merge.config.search_config import Config

PAGE = Path(__file__).resolve().parent / "reference" / "config.md"
INTRODUCTION = """\
# Config reference

```sh
evojax-merge keys           # the sections
evojax-merge keys all       # this list
evojax-merge keys search    # the keys of a section
```

This page is written by `python docs/config_reference.py` from the program's own schema. `[]` stands for each item of a
list, `NAME` for any name in a mapping. [Searching](../guides/searching.md) shows a whole config.
"""


def page() -> str:
    lines = [INTRODUCTION]
    top = [key for key in keys_of(Config) if "." not in key.name and key.takes != "a mapping"]
    lines += section("Top level", top)
    rest = [key for key in keys_of(Config) if key not in top]
    for name, keys in groupby(rest, lambda key: key.name.partition(".")[0].removesuffix("[]")):
        lines += section(f"`{name}`", list(keys))
    return "\n".join(lines)


def section(heading: str, keys: Sequence[Key]) -> Iterator[str]:
    """A heading, and a table of keys for each group of kinds of tasks that has them."""
    yield f"## {heading}\n"
    for kinds, group in groupby(keys, lambda key: key.of):
        if kinds:
            yield f"### Tasks of kind {', '.join(kinds)}\n"
        yield "| key | takes | default | meaning |\n| --- | --- | --- | --- |"
        for key in group:
            yield f"| `{key.name}` | {cell(key.takes)} | {code(key.default)} | {cell(key.meaning)} |"
        yield ""


def cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")


def code(text: str) -> str:
    if text in ("", "required"):
        return text
    return f"`{text}`".replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
