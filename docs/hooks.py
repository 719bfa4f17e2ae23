"""Hook of mkdocs: files outside docs/ that pages link to become part of the site, below repository/.

The pages then link to the same files on disk, in a browser of the repository and in the site.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = "repository"
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def targets(markdown: str, path: str) -> Iterator[tuple[str, str]]:
    """Each relative link of a page, and the file of the repository that it leads to; `path`: the page's."""
    for link in dict.fromkeys(LINK.findall(markdown)):
        yield link, posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def source_path(path: str) -> str:
    """A file of the repository, by its place among the site's sources."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def on_files(files: Files, config: Any) -> Files:
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    included = set(waiting)
    while waiting:
        path = waiting.pop()
        for _, target in targets((ROOT / path).read_text(encoding="utf-8"), path):
            if target in included or target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            included.add(target)
            files.append(File.generated(config, source_path(target), abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    uri = page.file.src_uri
    path = uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else f"docs/{uri}"
    # A folder has no page in the site: its link is left to the strict build to name.
    replaced = {
        link: posixpath.relpath(source_path(target), posixpath.dirname(uri) or ".")
        for link, target in targets(markdown, path)
    }
    return LINK.sub(lambda match: replaced[match[1]], markdown)
