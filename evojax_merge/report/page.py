"""The page of a run, `report.html`, and of several: one HTML file without a request to anywhere.

The page holds the libraries Vega, Vega-Lite and Vega-Embed once, for all its charts. Its content security policy lets a
browser fetch nothing.
"""

import base64
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jinja2
from markupsafe import Markup, escape

from evojax_merge.checkpoints.pipelines import SHEET
from evojax_merge.errors import InputError, escaped
from evojax_merge.mergekit.streams import read_stream
from evojax_merge.report import run_tables
from evojax_merge.report.answers import read_answers
from evojax_merge.report.comparison import model_names
from evojax_merge.report.drawings import Layer, family_tree, path_drawing
from evojax_merge.report.parameters import read_parameters
from evojax_merge.report.progress import OnGeneration
from evojax_merge.report.publication import Publication
from evojax_merge.report.run_data import RunData, read_run
from evojax_merge.report.tables import Table
from evojax_merge.search.recording import Generation
from evojax_merge.search.run_parts import RunFolder, is_page
from evojax_merge.system.console import format_seconds, working
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import OutputFile
from evojax_merge.system.kept_files import keep, read_kept

# Seconds between two pages, and at least as many times the seconds that the last one took.
INTERVAL, TIMES = 10.0, 50.0
# Seconds between two looks of a browser at a page that is still written.
REFRESH = 10
TEMPLATES = Path(__file__).parent / "templates"
# The largest contact sheet that a page holds, and its first bytes.
MOST_PICTURE_BYTES, PNG = 8 * 2**20, b"\x89PNG"
# The largest script of the charts' libraries.
MOST_SCRIPT_BYTES = 2**26
# The axes of the drawn candidates.
MOST_AXES = 12


def write_page(folder: RunFolder, out: Path | None = None, *, working: bool | None = None) -> RunData:
    """Write a run's page; returns the run as it is there. out: the file; None: the run's `report.html`. working: see
    `read_run`. Raises InputError where another file has that name."""
    run = read_run(folder.path, working=working)
    page_file(folder, out).write(run_page(run, refresh=run.state == "running"))
    return run


def page_file(folder: RunFolder, out: Path | None) -> OutputFile:
    """The file of a run's page (see `write_page`)."""
    return OutputFile(out or folder.page, "--out" if out else "", "is no page", is_page)


def run_page(run: RunData, *, refresh: bool = False, publication: Publication | None = None) -> str:
    """The page of a run. `refresh`: make browsers load it again and again; `publication`: of a page for the public."""
    from altair.utils.schemapi import debug_mode

    from evojax_merge.report import charts as made

    # Altair checks each part of a chart against its schema, which takes most of the time.
    with debug_mode(False):
        page = _run_page(run, refresh, made, publication)
    return page if publication is None else publication.known(page)


def _run_page(run: RunData, refresh: bool, made: Any, publication: Publication | None) -> str:
    charts, parameters = dict[str, Any](), read_parameters(run)
    with_answers = publication is None or publication.with_answers
    run = run if publication is None else publication.run(run)
    result = run.outcome
    if any(generation.median is not None for generation in run.fitness_rows):
        charts["fitness"] = made.fitness_chart(run)
    tasks, metrics = (
        {f"{name}-{number}": chart for number, chart in enumerate(drawn)}
        for name, drawn in (("task", made.task_charts(run)), ("metric", made.metric_charts(run)))
    )
    charts |= tasks | metrics
    if run.timing:
        numbers = [line.generation for line in run.timing]
        seconds = {"seconds": [line.seconds for line in run.timing]}
        charts["seconds"] = made.curve_chart(numbers, seconds, "seconds per generation")
    # Numbers of examples, and how many candidates were evaluated on so many; there is nothing to draw where all met
    # the same.
    rungs = Counter(examples for generation in run.fitness_rows for examples in generation.row.examples)
    if 1 < len(rungs) <= 30:
        charts["rungs"] = made.rung_chart(dict(sorted(rungs.items())))
    if run.config.get("pool") and any(generation.genome for generation in run.fitness_rows):
        charts["pool"] = made.pool_chart(run)
    if result.table:
        charts["heldout"] = made.heldout_chart(result)
    if result.members and len(result.members[0].scores) > 1:
        charts["front"] = made.front_chart(result)
    frames = None
    if parameters is not None:
        frames = made.frame_values(parameters.frames)
        charts |= {f"map-{k}": made.heat_map(map_, k) for k, map_ in enumerate(parameters.frames.maps)}
        if parameters.importance:
            charts["importance"] = made.importance_chart(parameters.importance)
        if parameters.drawn is not None and parameters.importance:
            charts["parallel"] = made.parallel_chart(parameters.drawn, list(parameters.importance)[:MOST_AXES])
    thinned = ""
    if len(run.generations) < run.count:
        thinned = f" {len(run.generations)} of {run.count} generations are drawn, evenly spaced."
    inputs, answers = run.config.get("inputs"), read_answers(run) if with_answers else None
    sheet, pictures = RunFolder(run.path).model / SHEET, None
    # A file that a link leads to is not the run's to show.
    is_own = sheet.is_file() and not sheet.is_symlink() and sheet.stat().st_size <= MOST_PICTURE_BYTES
    if with_answers and run.result is not None and is_own and (content := sheet.read_bytes()).startswith(PNG):
        # The contact sheet in the winner's folder, as the address of a picture, and the models of its rows.
        address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        pictures = address, [escaped(row.name) for row in result.table]
    return _render(
        "run_page.html", charts, frames, refresh,
        title=f"{run.name}: evojax-merge", run=run, parameters=parameters, facts=run_tables.facts(run),
        headline=run_tables.headline(run),
        sentences=run_tables.sentences(result), notes=run_tables.notes(run),
        thinned=thinned, takes_minibatches=_takes_minibatches(run), rules=bool(made.shown_rules(run)),
        spread=any(len(generation.row.fitness) > 1 for generation in run.fitness_rows),
        validated=any(generation.row.validation_fitness is not None for generation in run.fitness_rows),
        heldout=run_tables.heldout_table(result), front=run_tables.front_table(result) if result.members else None,
        answers=answers, pictures=pictures, path=_path(run),
        tree=Markup(family_tree(result)) if result.lineage else None,
        lineage=run_tables.lineage_table(result), tasks=list(tasks), metrics=list(metrics),
        rungs_of=f", in the {len(run.generations)} generations that are drawn" if thinned else "",
        environment=run_tables.mapping_table("", run.environment) if run.environment else None,
        inputs=run_tables.mapping_table("sha256", inputs) if inputs is not None else None,
    )  # fmt: skip


def compare_page(runs: Mapping[str, RunData], gaps: Table | None) -> str:
    """The page of several runs, by their names. gaps: their `gaps_table`."""
    from evojax_merge.report import charts as made

    charts, note = dict[str, Any](), run_tables.task_note(runs)
    # Fitnesses that do not compare share no axis.
    if note is None and any(run.fitness_rows for run in runs.values()):
        charts = {f"best-{number}": made.compared_fitness(runs, bool(number)) for number in range(2)}
    heldout = run_tables.winners_table(runs)
    if note is None and heldout.rows:
        charts["heldout"] = made.compared_heldout(runs)
    return _render(
        "compare_page.html", charts, None, False,
        title=f"{len(runs)} runs compared", runs=run_tables.runs_table(runs), heldout=heldout,
        gaps=gaps, differences=run_tables.differences(runs),
        minibatches=[name for name, run in runs.items() if _takes_minibatches(run)],
        notes=[
            *filter(None, [note]), *(f"{name}: {note}" for name, run in runs.items() for note in run_tables.notes(run)),
        ],
    )  # fmt: skip


def _takes_minibatches(run: RunData) -> bool:
    """Whether generations have a fitness on their minibatch alone."""
    return any(generation.row.best_of_part is not None for generation in run.fitness_rows)


def _render(template: str, charts: dict[str, Any], frames: Any, refresh: bool, **values: Any) -> str:
    # JSON inside a script element, which no text in it can end.
    specs, frames_json = (
        Markup(json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c"))
        for value in (charts, frames)
    )
    css, js = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    text = _templates().get_template(template).render(
        **values, charts=charts, frames_data=frames, specs=specs, frames=frames_json,
        refresh=REFRESH if refresh else None, css=css, js=js, vega=Markup(_vega()),
    )  # fmt: skip
    # Names from JSON may hold halves of a character.
    return text.encode("utf-8", "backslashreplace").decode()


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    filters: dict[str, Any] = {
        "number": _number, "cell": _cell, "duration": format_seconds,
        # A name such as `task/metric` may go on in another line after its slashes.
        "breakable": lambda name: Markup("/<wbr>").join(name.split("/")),
    }  # fmt: skip
    environment.filters |= filters
    return environment


@cache
def _vega() -> str:
    """The libraries as one script. Bundling takes seconds: the user's cache keeps the script."""
    file = cache_folder() / f"vega-{metadata.version('vl-convert-python')}.js"
    kept = read_kept(file, MOST_SCRIPT_BYTES)
    if kept is not None:
        return kept.decode()
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    keep(file, script.encode())
    return script


def _number(value: float | None, digits: int = 4) -> Markup:
    """A number as the page shows it; the element holds it whole."""
    if value is None:
        return Markup("–")
    shown = (str(value) if isinstance(value, int) else f"{value:.{digits}f}").replace("-", "−")
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)


def _cell(value: Any) -> Markup:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return _number(value)
    return escape(escaped(str(value)))


def _path(run: RunData) -> dict[str, Any] | None:
    """The drawing of the winner's layers, by the recipe, whose slices name each layer's model; and the models' names,
    `parents`."""
    file = RunFolder(run.path).recipe
    if run.result is None or run.result.path is None or run.recipe is None:
        return None
    scales, running = run.result.path.scales, 1.0
    try:
        recipe = read_stream(file).result
    except InputError as error:
        run.notes.append(f"{file.name} cannot be read: {error.what}")
        return None
    slices = [(part.sources[0], part.count or 0) for part in recipe.modules[0].slices]
    if not scales or len(scales) != sum(count for _, count in slices):
        return None
    layers = [(source.model, index) for source, count in slices for index in range(source.first, source.first + count)]
    models = list(dict.fromkeys(model for model, _ in layers))
    drawn = []
    for (model, index), scale in zip(layers, scales, strict=True):
        running *= scale
        drawn.append(Layer(models.index(model), index, 1 / running))
    names = model_names([Path(model) for model in models])
    return {"drawing": Markup(path_drawing(drawn, names)), "parents": list(map(escaped, names))}


# ---------------------------------------------------------------------------------------------------------------
# While its search runs


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
