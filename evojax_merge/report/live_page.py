"""`report.html` while its search runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from evojax_merge.report.page import write_page
from evojax_merge.report.progress import OnGeneration
from evojax_merge.search.loop import Generation
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.system.console import working

# Seconds between two pages, and at least as many times the seconds that the last one took.
INTERVAL, TIMES = 10.0, 50.0


@contextmanager
def kept_page(folder: RunFolder, on_generation: OnGeneration, warn: Callable[[str], None]) -> Iterator[OnGeneration]:
    """Keep a run's page as its history grows, and write it once more when the block ends, however it ends. Yields what
    is to be called after each generation; it calls `on_generation` as well. A page that cannot be written is a warning,
    and never ends the search."""
    if jax.process_index() > 0:
        yield on_generation
        return
    page = _Page(folder, warn)

    def after(generation: Generation) -> None:
        page.update()
        on_generation(generation)

    before = page.content()
    try:
        yield after
    except BaseException:
        # The error is what the user has to read.
        page.warned = True
        raise
    finally:
        # A run that was refused, or was complete before, stays as it is.
        if folder.history.exists() and (page.content() != before or not folder.page.exists()):
            with working("drawing the page"):
                page.write(is_working=False)


class _Page:
    def __init__(self, folder: RunFolder, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        self._due, self.warned = time.monotonic() + INTERVAL, False

    def content(self) -> list[tuple[int, int]]:
        """The sizes and times of the files that the page depends on."""
        stats = [file.stat() for file in (self._folder.history, self._folder.result) if file.exists()]
        return [(stat.st_size, stat.st_mtime_ns) for stat in stats]

    def update(self) -> None:
        started = time.monotonic()
        if started >= self._due:
            self.write(is_working=True)
            ended = time.monotonic()
            self._due = ended + max(INTERVAL, TIMES * (ended - started))

    def write(self, *, is_working: bool) -> None:
        try:
            write_page(self._folder, working=is_working)
        except Exception as error:
            if not self.warned:
                self._warn(f"{self._folder.page.name} could not be written: {error}")
            self.warned = True
