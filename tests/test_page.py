"""The page of a run: it holds the run's own numbers, asks for nothing, and shows what a run has, in a real browser."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import refusal, run_here
from helpers.families import Family, build_family
from helpers.files import read_json, read_lines, write_json, write_yaml
from helpers.searches import search_config
from hostile import run_command, start_command

from evojax_merge.errors import Failed
from evojax_merge.report import page as page_module
from evojax_merge.report.charts import FITNESS_HEIGHT, LABEL_HEIGHT, label_places
from evojax_merge.report.comparison import POLISHED, POLISHED_NAME
from evojax_merge.report.intervals import paired_lead
from evojax_merge.report.page import kept_page, write_page
from evojax_merge.report.parameters import read_parameters
from evojax_merge.report.run_data import MOST_GENERATIONS, read_run
from evojax_merge.report.run_tables import headline
from evojax_merge.report.tables import lead_cell
from evojax_merge.search.run_parts import RunFolder, clear

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
MEGABYTE = 2**20
HOSTILE = "<img src=http://127.0.0.1:9/x onerror=alert(1)><b>bold</b></script>&amp;"
# A window is never as narrow as a telephone, but a frame in it can be.
FRAME = """
<body style="margin: 0"><iframe src="probed.html" style="border: 0; width: {width}px; height: 1200px"></iframe>
<script>
addEventListener("message", (event) => {{
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = event.data;
  document.body.append(probe);
}});
</script>
"""
# Collects what goes wrong on a page, and at the end what stands on it.
PROBE = """
<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message ?? "a resource"), true);
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => problems.push("asks for " + event.blockedURI));
function texts() {
  return [...document.querySelectorAll("[data-chart^=map] text")].map((text) => text.textContent);
}
const wait = setInterval(() => {
  if (document.documentElement.dataset.drawn !== "true") return;
  clearInterval(wait);
  const slider = document.querySelector(".slider input");
  const last = { label: slider?.nextElementSibling.textContent, texts: texts() };
  if (slider) { slider.value = 0; slider.dispatchEvent(new Event("input")); }
  setTimeout(() => {
    const seen = {
      problems, last, first: { label: slider?.nextElementSibling.textContent, texts: texts() },
      width: innerWidth, scrolled: document.documentElement.scrollWidth,
      requests: performance.getEntriesByType("resource").map((entry) => entry.name),
      charts: Object.fromEntries([...document.querySelectorAll("[data-chart]")].map((place) => {
        const box = place.querySelector("svg")?.getBoundingClientRect();
        const marks = place.querySelectorAll("svg path, svg text").length;
        const cut = [...place.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect())
          .filter((text) => text.left < box.left - 1 || text.right > box.right + 1).length;
        return [place.dataset.chart, box && marks ? [box.right, box.height, cut] : null];
      })),
      axes: Object.fromEntries([...document.querySelectorAll("[data-chart]")].map((place) => [place.dataset.chart,
        [...place.querySelectorAll("svg .role-axis-label, svg .role-legend-label")]
          .map((labels) => [...labels.querySelectorAll("text")].filter((text) => text.getAttribute("opacity") !== "0")
            .map((text) => text.textContent)).filter((labels) => labels.length)])),
      wide: [...document.querySelectorAll("#heldout .scroll, .headline > div")]
        .filter((place) => place.scrollWidth > place.clientWidth).length,
      images: document.querySelectorAll("img").length, bold: document.querySelectorAll("b").length,
      text: document.querySelector("main").innerText,
      background: getComputedStyle(document.body).backgroundColor,
    };
    parent.postMessage(JSON.stringify(seen), "*");
  }, 300);
}, 50);
</script>
"""


def make_run(
    folder: Path, generations: int = 6, population: int = 8, *, finished: bool = True, genes: int = 4, **config: Any
) -> Path:
    """A run folder as a search leaves it, whose parents are gone."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    document = {
        "base": "/gone/base", "parents": ["/gone/maths", "/gone/japanese"], "space": {"method": "ties"}, "seed": 3,
        "search": {"strategy": "cma_es", "population": population, "generations": generations},
        "inputs": {"/gone/base/model.safetensors": "f81837859fa38fd5"},
    } | config  # fmt: skip
    write_yaml(folder / "config.yaml", document)
    best = -math.inf
    with (folder / "history.jsonl").open("w") as history, (folder / "timing.jsonl").open("w") as timing:
        for number in range(1, generations + 1):
            genomes = rng.uniform(size=(population, genes)).round(6)
            fitness = (-np.sum((genomes - 0.3) ** 2, axis=1) / number).tolist()
            best = max(best, *fitness)
            row = {
                "generation": number, "best": max(fitness), "mean": sum(fitness) / population, "worst": min(fitness),
                "best_so_far": best, "sigma": 0.2 / number, "evaluations": number * population, "failed": 0,
                "scores_of_best": {"sums/accuracy": max(fitness)}, "fitness": fitness,
                "examples": [16 if k % 2 else 32 for k in range(population)],
                "task_scores": {"sums": fitness}, "genomes": genomes.tolist(),
            }  # fmt: skip
            if number % 3 == 0:
                row["validation"] = {"best_so_far": best - 0.01}
            history.write(json.dumps(row) + "\n")
            timing.write(json.dumps({"generation": number, "seconds": 0.5}) + "\n")
    if finished:
        write_json(folder / "result.json", make_result(generations, genes))
    return folder


def make_result(generations: int, genes: int) -> dict[str, Any]:
    scores = {"base": -0.9, "maths": -0.7, "japanese": -0.65, "uniform ties": -0.5, "evolved ties": -0.123456}
    roles = ["base", "parent", "parent", "uniform", "winner"]
    table = [
        {"role": role, "name": name, "heldout_fitness": value, "heldout_scores": {"sums/accuracy": value + 1}}
        for role, (name, value) in zip(roles, scores.items(), strict=True)
    ]
    rivals = {"base": "base", "parent": "japanese", "uniform": "uniform ties"}
    return {
        "generations": generations,
        "table": table,
        "better_than": {
            role: {"name": name, "interval": [-0.123456 - scores[name] - 0.1, -0.123456 - scores[name] + 0.1]}
            for role, name in rivals.items()
        },
        "chosen_on": "search",
        "search_fitness": {"winner": -0.11, "uniform merge": -0.45},
        "groups": ["layers 0-1", "layers 2-3"],
        "parameters": {"weight": [[0.5, -0.25], [1.0, 0.125]]},
        "genome": [0.5] * genes,
    }


def edit_result(run: Path, **changes: Any) -> None:
    result = read_json(run / "result.json")
    write_json(run / "result.json", result | changes)


class Page(HTMLParser):
    """The numbers of a page's `data` elements, its texts, and its charts' specifications."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.numbers: list[tuple[float, str]] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.specs: dict[str, Any] = {}
        self._open: tuple[str, dict[str, str | None]] = ("", {})
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open = tag, dict(attributes)
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open = "", {}

    def handle_data(self, text: str) -> None:
        tag, attributes = self._open
        if tag == "data":
            self.numbers.append((float(str(attributes["value"])), text))
        elif tag == "script" and attributes.get("id") == "specs":
            self.specs = json.loads(text)
        elif tag == "wbr":
            self.texts[-1] += text
        elif tag not in ("script", "style"):
            self.texts.append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def rows(self, chart: str) -> list[dict[str, str]]:
        """A chart's first data, which are CSV."""
        spec = self.specs[chart]
        layers = [spec, *spec.get("layer", ())]
        data = next(layer["data"] for layer in layers if "data" in layer)
        return list(
            csv.DictReader((data["values"] if "values" in data else spec["datasets"][data["name"]]).splitlines())
        )

    def column(self, chart: str, name: str) -> list[float | None]:
        return [float(row[name]) if row[name] else None for row in self.rows(chart)]

    @property
    def frames(self) -> Any:
        return json.loads(re.search(r'id="frames">(.*?)</script>', self.source, re.DOTALL)[1])  # type: ignore[index]


def numbers_in(document: Any) -> set[float]:
    if isinstance(document, dict):
        return set().union(*map(numbers_in, document.values()))
    if isinstance(document, list):
        return set().union(*map(numbers_in, document)) if document else set()
    return {float(document)} if isinstance(document, int | float) else set()


def browse(page: Path, width: int = 1400, *, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The finds of the probe on a page, and the lines of the browser's console."""
    head, mark, rest = page.read_text(encoding="utf-8").partition("<title>")
    page.with_name("probed.html").write_text(f"{head}{PROBE}{mark}{rest}", encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=20000",
         "--window-size=1500,1300", "--enable-logging=stderr", "--v=0", *scheme,
         f"--user-data-dir={page.parent / 'profile'}", frame.as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert probe is not None, done.stderr[-3000:]
    text = probe[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# ---------------------------------------------------------------------------------------------------------------
# The content of the page


def test_every_number_on_the_page_is_one_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    history = read_lines(run / "history.jsonl")
    result = read_json(run / "result.json")
    stored = numbers_in(result)
    assert len(page.numbers) >= 15
    for value, text in page.numbers:
        assert value in stored
        assert float(text.replace("−", "-")) == pytest.approx(value, abs=5e-5)
    for scored in result["table"]:
        assert scored["heldout_fitness"] in [value for value, _ in page.numbers]
    assert page.column("fitness", "so_far") == [row["best_so_far"] for row in history]
    assert page.column("fitness", "best") == [row["best"] for row in history]
    assert page.column("fitness", "median") == [float(np.median(row["fitness"])) for row in history]
    assert page.column("fitness", "validation") == [row.get("validation", {}).get("best_so_far") for row in history]
    assert page.column("metric-0", "value") == [row["sigma"] for row in history]
    assert page.column("rungs", "candidates") == [24, 24]
    assert page.column("heldout", "fitness") == [scored["heldout_fitness"] for scored in result["table"]]
    assert page.column("seconds", "value") == [0.5] * 6
    for sentence in (
        "On held-out data the winner is better than the best parent japanese by 0.5265 (95% interval 0.4265 to "
        "0.6265).",
        "The winner was chosen on the search split, where the finalists (the best candidates and any last proposal of "
        "the strategy) were scored again: there it scored -0.1100, the uniform merge -0.4500.",
        "docs/glossary.md",
    ):  # fmt: skip
        assert sentence in page.text


def test_the_figures_at_the_top_have_a_score_for_each_task_with_its_unit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = make_result(6, 4)["table"]
    for scored in table:
        scored["heldout_scores"] = {
            "sums/log_probability": scored["heldout_fitness"], "whole/accuracy": scored["heldout_fitness"] + 1,
            "whole/margin": 3.5,
        }  # fmt: skip
    unit = "log-probability per token"
    edit_result(
        run, table=table, shares={"sums/log_probability": 1.0, "whole/accuracy": 0.0},
        units={"fitness": unit, "sums/log_probability": unit, "whole/accuracy": "share right"},
    )  # fmt: skip
    figures = headline(read_run(run))
    assert {figure.unit for figure in figures} == {unit}
    assert [(figure.label, dict(figure.scores)) for figure in figures] == [
        ("winner, held out", {"whole/accuracy (share right)": pytest.approx(0.876544)}),
        ("uniform merge, held out", {"whole/accuracy (share right)": 0.5}),
        ("best parent japanese, held out", {"whole/accuracy (share right)": pytest.approx(0.35)}),
        ("base, held out", {"whole/accuracy (share right)": pytest.approx(0.1)}),
    ]
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    assert page.text.count("whole/accuracy (share right)") == len(figures) + 1
    assert (
        f"sums/log_probability ({unit})" in page.text and f"there it scored -0.1100 ({unit}), the uniform" in page.text
    )
    fitness = str(page.specs["fitness"])
    assert f"fitness ({unit}), search split" in fitness and f"fitness ({unit}), held out" in str(page.specs["heldout"])
    # One name for the merge with equal weights, beside the split of its score.
    assert "uniform merge, search split" in fitness and "uniform merge, held out" in fitness
    assert [row["model"] for row in page.rows("heldout")][-2:] == ["uniform merge", "winner"]


def test_a_polished_winner_has_a_figure_and_figures_stand_in_even_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = make_result(6, 4)["table"]
    better = table[-1]["heldout_fitness"] + 0.01
    controls = [
        {**table[0], "role": role, "name": name, "heldout_fitness": value}
        for role, name, value in (("lora_base", "LoRA on base", -0.36), ("lora_parent", "LoRA on parent x", -0.361),
                                  (POLISHED, POLISHED_NAME, better))
    ]  # fmt: skip
    rivals = make_result(6, 4)["better_than"] | {row["role"]: {"name": row["name"]} for row in controls[:2]}
    edit_result(run, table=[*table[:-1], *controls, table[-1]], better_than=rivals)
    write_page(RunFolder(run))
    figures = headline(read_run(run))
    assert len(figures) == 7 and (figures[1].label, figures[1].value) == (f"{POLISHED_NAME}, held out", better)
    # Four and three, not six and one.
    assert 'style="--columns: 4"' in (run / "report.html").read_text(encoding="utf-8")


def test_names_of_scores_that_lie_close_do_not_stand_on_each_other() -> None:
    line, domain = LABEL_HEIGHT / FITNESS_HEIGHT, (0.0, 1.0)
    close = [("a", 0.5, "search split"), ("b", 0.501, "held out"), ("c", 0.502, "held out"), ("d", 0.01, "held out"),
             ("e", 0.011, "held out")]  # fmt: skip
    places = label_places(close, domain)
    assert np.diff(sorted(places)).min() >= line * 0.999 and min(places) >= line / 2
    # Names without neighbours are beside their rules, above those of the search split.
    assert label_places([("a", 0.5, "search split"), ("b", 0.9, "held out")], domain) == [
        pytest.approx(0.5 + 0.6 * line), pytest.approx(0.9 - 0.6 * line),
    ]  # fmt: skip


def test_few_examples_and_equal_scores_are_called_that(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    table = make_result(6, 4)["table"]
    intervals: list[Any] = [None, [0.1, 0.9], [0.0, 0.0], [-0.5, 0.9]]
    for scored, interval in zip(table, intervals, strict=False):
        scored["interval"] = interval
    table[2]["heldout_fitness"] = table[-1]["heldout_fitness"]
    edit_result(run, table=table, better_than={"base": {"name": "base"}, "parent": {"name": "japanese"}})
    write_page(RunFolder(run))
    text = Page(run / "report.html").text
    for says in (
        "+0.7765, too few examples to say", "+0.5765 (0.1000 to 0.9000)", "same", "(-0.5000 to 0.9000), within noise",
        "the winner is ahead of the base, -0.1235 to -0.9000: too few examples to say which is better.",
        "the winner is the same as the best parent japanese, example by example: both have -0.1235.",
    ):  # fmt: skip
        assert says in text
    assert "0.7765, too few examples to say" in " ".join(run_here("show", run).stdout.split())


def test_the_other_sections_show_the_runs_numbers_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", generations=8, pool={"methods": ["slerp"]})
    rows = read_lines(run / "history.jsonl")
    for row in rows:
        # A member of a pool has its number before its genes.
        row["genomes"] = [[100 * row["generation"] + k, *genome[1:]] for k, genome in enumerate(row["genomes"])]
        row["failed"] = row["generation"] % 2
    (run / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    front = [
        {"member": k + 1, "fitness": -0.21 - k, "scores": {"a/x": -0.13 * k, "b/x": 0.14 * k},
         "heldout_fitness": -0.3 - k, "heldout_scores": {"a/x": -0.11 * k, "b/x": 0.12 * k}, "genome": [0.5 + k] * 4}
        for k in range(3)
    ]  # fmt: skip
    edit_result(run, groups=[], members=front)
    scores = {"evolved ties": [0.75, 0.5, 0.25], "japanese": [0.625, 0.5, 0.375]}
    answers = [
        {"model": model, "task": "sums", "example": k, "score": score}
        for model, values in scores.items() for k, score in enumerate(values)
    ]  # fmt: skip
    (run / "heldout_answers.jsonl").write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    shown = {value for value, _ in page.numbers}
    assert numbers_in([{k: v for k, v in member.items() if k != "genome"} for member in front]) <= shown
    assert {0.75, 0.25, 0.625, 0.375} <= shown and "sums, beside japanese: 1 won, 1 lost, 1 equal" in page.text
    best, mean = ([max(row["fitness"]) for row in rows], [float(np.mean(row["fitness"])) for row in rows])
    assert page.column("task-0", "value") == [*best, *mean]
    assert page.column("metric-1", "value") == [row["failed"] for row in rows]
    members = {(float(row["member"]), float(row["fitness"]), int(row["generation"])) for row in page.rows("pool")}
    assert members == {
        (genome[0], fitness, row["generation"])
        for row in rows for genome, fitness in zip(row["genomes"], row["fitness"], strict=True)
    }  # fmt: skip


def test_drawn_candidates_and_the_sliders_frames_are_those_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", generations=8)
    edit_result(run, groups=[])
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    rows = read_lines(run / "history.jsonl")
    searched = {
        (*genome, float(f"{fitness:.6g}"))
        for row in rows for genome, fitness in zip(row["genomes"], row["fitness"], strict=True)
    }  # fmt: skip
    drawn: dict[str, dict[str, float]] = {}
    for row in page.rows("parallel"):
        drawn.setdefault(row["candidate"], {})[row["axis"]] = float(row["value"])
    axes = [f"gene[{k}]" for k in range(4)] + ["fitness"]
    lines = {tuple(values[axis] for axis in axes) for values in drawn.values()}
    assert len(lines) == 64 and np.allclose(sorted(lines), sorted(searched), rtol=1e-5)
    frames = page.frames
    for row, label, values in zip(rows, frames["labels"], frames["maps"][0]["values"], strict=False):
        met = [(examples, fitness) for examples, fitness in zip(row["examples"], row["fitness"], strict=True)]
        place = met.index(max(met))
        assert label == f"generation {row['generation']} of 8, its best: fitness {row['fitness'][place]:.4f}"
        assert values == pytest.approx(row["genomes"][place], rel=1e-5)
    assert frames["maps"][0]["values"][-1] == read_json(run / "result.json")["genome"]


def test_groups_of_tensors_have_any_names_and_are_those_of_the_genomes(tmp_path: Path) -> None:
    """config.yaml has the groups of models of other backends; result.json has them in a run of an earlier version."""
    space = {"method": "linear", "parameters": {"weight": {"low": 0.0, "high": 1.0}}}
    task = {"name": "sums", "kind": "arrays", "file": "/gone/arrays.npz"}
    config: dict[str, Any] = {"backend": "/gone/code.py:NAME", "tasks": [task], "space": space}
    for number, (groups, rows) in enumerate((
        (["blocks[0]", "all"], ["blocks[0]", "all"]), (None, ["layers 0-1", "layers 2-3"]), (["one of three"], None)
    )):  # fmt: skip
        given = {} if groups is None else {"groups": groups}
        run = make_run(tmp_path / f"run-{number}", generations=8, **config, **given)
        parameters = read_parameters(read_run(run))
        assert parameters is not None and parameters.named == (rows is not None)
        if rows is not None:
            (map_,) = parameters.frames.maps
            assert (map_.rows, map_.columns) == (rows, ["maths", "japanese"])
            assert {f"{parent}, {row}" for row in rows for parent in map_.columns} == parameters.importance.keys()
        write_page(RunFolder(run))
        assert ("names the parameters: genes" in Page(run / "report.html").text) == (rows is None)


def test_the_page_says_that_nothing_beat_the_first_parent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit_result(run, search_fitness={"winner": -0.45, "first parent": -0.45})
    write_page(RunFolder(run))
    assert "Nothing that was searched beat the first parent." in Page(run / "report.html").text


def test_the_importance_is_the_rank_correlation_of_the_last_half(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    run = make_run(tmp_path / "run", generations=8)
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    rows = read_lines(run / "history.jsonl")[4:]
    genomes = np.concatenate([row["genomes"] for row in rows])
    expected = [spearmanr(genes, np.concatenate([row["fitness"] for row in rows])).statistic for genes in genomes.T]
    drawn = page.column("importance", "correlation")
    assert sorted(x for x in drawn if x is not None) == pytest.approx(sorted(expected), abs=1e-6)
    assert "over 32 candidates of the last half" in page.text


def test_a_search_writes_the_page_with_the_names_of_its_parameters(tmp_path: Path, family: Family) -> None:
    space = {"method": "task_arithmetic", "layers_per_group": 2, "parameters": {"weight": {}}}
    document = search_config(None, 3, space=space)
    root = family.base.parent
    write_yaml(root / "page.yaml", document)
    run_here("search", root / "page.yaml", "--out", tmp_path / "run")
    page = Page(tmp_path / "run" / "report.html")
    assert "finished" in page.text and "refresh" not in page.source.partition("<style>")[0]
    result = read_json(tmp_path / "run" / "result.json")
    frames = page.frames
    (weights,) = frames["maps"]
    assert weights["rows"] == result["groups"] and weights["columns"] == ["parent0", "parent1"]
    assert frames["labels"][-1] == "the winner" and len(frames["labels"]) == 4
    assert weights["values"][-1] == pytest.approx(np.ravel(result["parameters"]["weight"]).tolist(), rel=1e-5, abs=1e-6)
    # The command makes the same page again.
    before = (tmp_path / "run" / "report.html").read_bytes()
    run_here("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_bytes() == before
    # A search that is complete leaves it, one that starts again removes it.
    run_here("search", root / "page.yaml", "--out", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "report.html").read_bytes() == before
    shown = run_here("show", tmp_path / "run").stdout
    assert "run: finished" in shown and "Held-out scores" in shown and "best/model" in shown


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("family"))


def test_a_pool_a_path_and_a_front_are_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    bred = [
        {"name": "member-7", "method": "slerp", "parents": ["maths", "japanese"], "parameters": {"t": 0.5}, "split": 2},
        {"name": "member-9", "method": "ties", "parents": ["member-7", "maths"], "parameters": {"weight": [0.25, 0.75]},
         "split": 1},
    ]  # fmt: skip
    front = [
        {"member": k + 1, "fitness": -0.2 - k, "scores": {"a/x": -0.1 * k, "b/x": 0.1 * k}, "heldout_fitness": -0.3 - k,
         "heldout_scores": {"a/x": -0.11 * k, "b/x": 0.12 * k}, "genome": [0.5 + k] * 4}
        for k in range(3)
    ]  # fmt: skip
    edit_result(run, lineage=bred, layers=4, members=front, path={"layers": [0, 5], "scales": [1.0, 0.5]})
    slices = [
        {"sources": [{"model": f"/gone/{name}", "layer_range": [k, k + 1]}]}
        for k, name in enumerate(["maths", "japanese"])
    ]
    (run / "best").mkdir()
    write_yaml(run / "best" / "recipe.yaml", {"merge_method": "passthrough", "slices": slices})
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    assert "step 1: layer 1 of japanese, its output times 2.0000" in page.text
    for name in ("member-7", "member-9", "ties", "weight 0.25 0.75", "a/x, held out"):
        assert name in page.text
    assert page.source.count('<g class="founder">') == 2 and page.source.count('<g class="child">') == 1
    # The thumbnail of each recipe: layers x parents, in runs of layers with one value, against the largest.
    cells = re.findall(r'width="([\d.]+)" height="7" fill-opacity="([\d.]+)"><title>([^<]*)</title>', page.source)
    wide = {1: 26.0, 2: 52.0, 3: 78.0}
    assert [(float(width), float(shade), words) for width, shade, words in cells] == [
        (wide[2], 0.667, "share of maths, layers 0 to 1: 0.5"), (wide[2], 0.667, "share of maths, layers 2 to 3: 0.5"),
        (wide[2], 0.667, "share of japanese, layers 0 to 1: 0.5"),
        (wide[2], 0.667, "share of japanese, layers 2 to 3: 0.5"),
        (wide[1], 0.333, "weight of member-7, layer 0: 0.25"),
        (wide[3], 1.0, "weight of member-7, layers 1 to 3: 0.75"),
        (wide[1], 1.0, "weight of maths, layer 0: 0.75"), (wide[3], 0.333, "weight of maths, layers 1 to 3: 0.25"),
    ]  # fmt: skip
    assert "member-9: ties of weight 0.25 0.75" in page.source
    assert page.column("front", "x") == [value for k in range(3) for value in (-0.1 * k, -0.11 * k)]


def test_texts_of_users_are_texts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", parents=["/gone/one", f"/gone/{HOSTILE.replace('/', '∕')}"], note=HOSTILE)
    result = read_json(run / "result.json")
    for scored in result["table"]:
        scored["name"] = f"{HOSTILE}{scored['name']}"
        scored["heldout_scores"] = {f"{HOSTILE}/accuracy": 0.5, "\ud800/accuracy": 1.0}
    for rival in result["better_than"].values():
        rival["name"] = f"{HOSTILE}{rival['name']}"
    write_json(run / "result.json", result | {"stopped_by": HOSTILE})
    (run / "run.log").write_text(f"warning: {HOSTILE}\nnothing\n")
    write_json(run / "environment.json", {"host": HOSTILE, "packages": {"jax": HOSTILE}})
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    assert not {"img", "b", "iframe"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 10
    assert page.specs


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    generations, population, genes = 10_000, 64, 6
    run = make_run(tmp_path / "run", 1, population, genes=genes)
    (line,) = (run / "history.jsonl").read_text().splitlines()
    row = json.loads(line)
    with (run / "history.jsonl").open("w") as history, (run / "timing.jsonl").open("w") as timing:
        start, end = json.dumps(row).split('"generation": 1', 1)
        for number in range(1, generations + 1):
            history.write(f'{start}"generation": {number}{end}\n')
            timing.write(f'{{"generation": {number}, "seconds": 0.125}}\n')
    edit_result(run, generations=generations)
    started = time.process_time()
    write_page(RunFolder(run))
    assert time.process_time() - started < 30
    page = Page(run / "report.html")
    assert (run / "report.html").stat().st_size < 2 * MEGABYTE
    drawn = page.column("fitness", "generation")
    assert len(drawn) == MOST_GENERATIONS and drawn[0] == 1 and drawn[-1] == generations
    assert f"{MOST_GENERATIONS} of {generations} generations are drawn" in page.text
    assert "generations took 20:50; the first compiles" in page.text


def on_minibatches(run: Path, **changes: Any) -> list[dict[str, Any]]:
    """Turn a run's history into one of gradient steps on minibatches, whose candidates no generation knows on all
    examples; returns its rows."""
    rows = read_lines(run / "history.jsonl")
    for row in rows:
        row |= {"best": None, "best_so_far": None, "examples": [8] * len(row["fitness"])} | changes
        if "validation" in row:
            row["validation"] = {"best_so_far": None, "finalists": [row["generation"] / -10]}
    (run / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def legend(page: Page) -> list[str]:
    """The entries of the legend of the fitness over generations."""
    layers = page.specs["fitness"]["layer"]
    (names,) = {
        tuple(layer["encoding"]["color"]["scale"]["domain"]) for layer in layers if "color" in layer["encoding"]
    }
    return list(names)


def test_gradients_on_minibatches_have_a_curve_of_their_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", population=1, finished=False)
    rows = on_minibatches(run)
    write_page(RunFolder(run), working=True)
    page, last = Page(run / "report.html"), f"{rows[-1]['fitness'][0]:.4f}"
    assert legend(page) == ["best on its minibatch", "validation"]
    assert page.column("fitness", "part") == [row["fitness"][0] for row in rows]
    assert page.column("fitness", "validation") == [None, None, -0.3, None, None, -0.6]
    assert "scored on one minibatch" in page.text and "ashed lines" not in page.text and "median" not in page.text
    assert "best fitness of the last generation, on its minibatch" in page.text
    assert (rows[-1]["fitness"][0], last.replace("-", "−")) in page.numbers
    assert f"fitness of the last generation {last}, on its minibatch" in run_here("show", run).stdout
    for command in (("runs", run), ("compare", run, make_run(tmp_path / "other"), "--out", tmp_path / "both.html")):
        assert f"{last} on its minibatch" in " ".join(run_here(*command).stdout.split())
    both = Page(tmp_path / "both.html")
    # The best so far never falls, whatever the next minibatch shows.
    shown = [float(row["fitness"]) for row in both.rows("best-0") if row["run"] == "run"]
    assert shown == np.maximum.accumulate([row["fitness"][0] for row in rows]).tolist()
    assert "The generations of run have their best on a minibatch each." in both.text
    # A finished run has the winner's fitness, on all of the split.
    write_json(run / "result.json", make_result(6, 4))
    assert "fitness of the winner -0.1100, on the search split" in run_here("show", run).stdout
    assert "-0.1100" in run_here("runs", run).stdout


def test_a_finished_run_is_listed_with_its_winners_fitness(tmp_path: Path) -> None:
    # The winner is not the best so far: some candidates met a part of the examples, or validation chose another.
    run, other = make_run(tmp_path / "done"), make_run(tmp_path / "begun", finished=False)
    best = f"{json.loads((run / 'history.jsonl').read_text().splitlines()[-1])['best_so_far']:.4f}"
    for command in (("show", run), ("report", run)):
        shown = run_here(*command).stdout
        assert "fitness of the winner -0.1100, on the search split" in shown and best not in shown
    assert "-0.1100" in (shown := run_here("runs", run).stdout) and best not in shown
    # Before there is a winner, the best so far is listed.
    shown = run_here("compare", run, other, "--out", tmp_path / "both.html").stdout
    lines = {name: next(line for line in shown.splitlines() if f" {name} " in line) for name in ("done", "begun")}
    assert "-0.1100" in lines["done"] and best not in lines["done"] and best in lines["begun"]


def test_steps_on_a_companion_are_named_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", population=2, finished=False)
    rows = on_minibatches(run, companion=True)
    best = max(rows[-1]["fitness"])
    assert f"fitness of the last generation {best:.4f}, by the companion" in run_here("show", run).stdout


def test_every_entry_of_the_legend_has_a_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    assert legend(page) == ["best so far", "best of the generation", "median", "10th to 90th percentile", "validation"]
    # The rules of this run lie near its curves, and those of the next far from them.
    assert "Dashed lines" in page.text
    edit_result(run, search_fitness={"winner": -0.1, "uniform merge": -1e6}, better_than={})
    write_page(RunFolder(run))
    assert "Dashed lines" not in Page(run / "report.html").text


def test_shares_of_a_judged_search_are_not_drawn_among_its_strengths(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit_result(run, search_fitness={"winner": -0.11})
    write_page(RunFolder(run))
    assert "uniform merge, held out" in str(Page(run / "report.html").specs["fitness"])
    table = [row | {"heldout_scores": {"taste/preference": 0.5}} for row in make_result(6, 4)["table"]]
    edit_result(run, table=table)
    write_page(RunFolder(run))
    assert "held out" not in str(Page(run / "report.html").specs["fitness"])


# ---------------------------------------------------------------------------------------------------------------
# Runs that are not finished


def test_half_a_line_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    with (run / "history.jsonl").open("a") as history:
        history.write('{"generation": 7, "best": -0.')
    shown = read_run(run, working=True)
    assert (shown.state, shown.count, len(shown.generations)) == ("running", 6, 6)
    write_page(RunFolder(run), working=True)
    page = Page(run / "report.html")
    assert "its state after generation 6, without a winner" in page.text
    assert '<meta http-equiv="refresh"' in page.source
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    assert "was stopped after generation 6" in page.text and '<meta http-equiv="refresh"' not in page.source


def test_the_winner_of_a_run_that_has_gone_on_is_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit_result(run, generations=4)
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    assert "The winner of 4 generations is not shown: the run has gone on since." in page.text
    assert "was stopped after generation 6" in page.text and "heldout" not in page.specs


def test_a_run_without_a_generation_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", generations=0, finished=False)
    for file in ("history.jsonl", "timing.jsonl"):
        (run / file).unlink()
    run_here("report", run)
    assert "there is nothing to show yet" in Page(run / "report.html").text
    assert "nothing to show yet" in run_here("show", run).stdout


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "result.json").write_text('{"table": 3}')
    (run / "environment.json").write_text("[")
    lines = (run / "history.jsonl").read_text().splitlines()
    (run / "history.jsonl").write_text("\n".join([*lines[:2], '{"generation": "three"}', *lines[3:]]) + "\n")
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    for text in ("result.json cannot be read: table", "environment.json cannot be read", "history.jsonl cannot be"):
        assert text in page.text
    assert len(page.column("fitness", "generation")) == 5


@pytest.mark.parametrize("pool", [None, {"methods": ["slerp"]}])
def test_a_run_without_a_single_score_has_a_page(tmp_path: Path, pool: Any) -> None:
    run = make_run(tmp_path / "run", finished=False, pool=pool, search=["odd"], space="odd", parents=3)
    rows = read_lines(run / "history.jsonl")
    for row in rows:
        nothing = [None] * len(row["fitness"])
        row |= {"fitness": nothing, "task_scores": {"sums": nothing}, "best": None, "mean": None, "best_so_far": None}
        row["scores_of_best"] = {}
    (run / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_page(RunFolder(run))
    page = Page(run / "report.html")
    assert "after generation 6" in page.text and "fitness" not in page.specs
    run_here("show", run)


@pytest.mark.parametrize("command", ["report", "show"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "run") / "best" / "model").mkdir(parents=True)
    for name, says in (
        ("empty", "is not a run folder of a search\n"), ("missing", "no such folder"),
        ("run/best/model", f"is not a run folder of a search; did you mean {tmp_path / 'run'}?"),
    ):  # fmt: skip
        assert says in refusal(command, tmp_path / name)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_file_that_is_no_page_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("<p>mine")
    done = run_here("report", run, status=2)
    assert "is no page of evojax-merge" in done.stderr
    clear(RunFolder(run), 6)
    assert (run / "report.html").read_text() == "<p>mine"
    other = make_run(tmp_path / "other")
    write_page(RunFolder(other))
    clear(RunFolder(other), 6)
    assert not (other / "report.html").exists()


def test_a_page_is_written_elsewhere(tmp_path: Path) -> None:
    run, page = make_run(tmp_path / "run"), tmp_path / "page.html"
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    assert f"wrote {page}: finished" in " ".join(run_here("report", run, "--out", page).stdout.split())
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    assert "The winner was chosen" in page.read_text(encoding="utf-8")
    page.write_text("mine")
    done = run_here("report", run, "--out", page, status=2)
    assert "--out: exists, and is no page of evojax-merge" in done.stderr and page.read_text() == "mine"
    missing = run_here("report", run, "--out", tmp_path / "nowhere" / "page.html", status=2)
    assert "--out: " in missing.stderr


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    watching = start_command("report", run, "--watch")
    page = run / "report.html"
    _until(page.exists)
    lines = (run / "history.jsonl").read_text()
    row = json.loads(lines.splitlines()[-1]) | {"generation": 7}
    (run / "history.jsonl").write_text(f"{lines}{json.dumps(row)}\n")
    _until(lambda: "after generation 7" in page.read_text(encoding="utf-8"))
    write_json(run / "result.json", make_result(7, 4))
    _until(lambda: watching.poll() is not None)
    assert watching.poll() == 0 and "The winner was chosen" in page.read_text(encoding="utf-8")


def test_watching_ends_at_an_interrupt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    watching = start_command("report", run, "--watch")
    _until((run / "report.html").exists)
    os.kill(watching.pid, signal.SIGINT)
    _until(lambda: watching.poll() is not None)
    assert watching.poll() == 130


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened in two minutes")


# ---------------------------------------------------------------------------------------------------------------
# While a search runs


def test_a_page_is_kept_while_a_search_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", finished=False)
    seen: list[Any] = []
    warnings: list[str] = []
    monkeypatch.setattr(page_module, "INTERVAL", 0.0)
    monkeypatch.setattr(page_module, "TIMES", 1e9)
    with kept_page(RunFolder(run), seen.append, warnings.append) as after:
        after("first")  # type: ignore[arg-type]
        assert "running" in Page(run / "report.html").text
        (run / "report.html").unlink()
        # The next page is due once the search has taken many times the last one's seconds.
        after("second")  # type: ignore[arg-type]
        assert not (run / "report.html").exists()
    assert seen == ["first", "second"] and warnings == []
    assert "was stopped after generation 6" in Page(run / "report.html").text


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", finished=False)
    (run / "report.html").mkdir()
    warnings: list[str] = []
    monkeypatch.setattr(page_module, "INTERVAL", 0.0)
    monkeypatch.setattr(page_module, "TIMES", 0.0)
    with kept_page(RunFolder(run), lambda generation: None, warnings.append) as after:
        after("first")  # type: ignore[arg-type]
        after("second")  # type: ignore[arg-type]
        with (run / "history.jsonl").open("a") as history:
            history.write("\n")
    (warning,) = warnings
    assert warning.startswith("report.html could not be written: ") and "is a folder" in warning
    # A search that fails says why it does, and nothing of the page.
    keeping = kept_page(RunFolder(run), lambda generation: None, warnings.append)
    keeping.__enter__()
    (run / "history.jsonl").write_text("")
    assert not keeping.__exit__(Failed, Failed("the disk is full"), None)
    assert len(warnings) == 1


# ---------------------------------------------------------------------------------------------------------------
# Several runs


def test_runs_are_compared_on_one_page(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "run")
    two = make_run(tmp_path / "b" / "run", generations=4, finished=False, seed=5)
    out = tmp_path / "both.html"
    done = run_here("compare", one, two, "--out", out)
    assert "a/run" in done.stdout and "stopped" in done.stdout and "-0.1235" in done.stdout
    page = Page(out)
    assert set(page.specs) == {"best-0", "best-1", "heldout"}
    assert "search.generations" in page.text and "b/run: The run was stopped after generation 4" in page.text
    run_here("compare", one, two, "--out", out)
    (tmp_path / "notes.html").write_text("<p>mine")
    for arguments, says in (
        ((one, two, "--out", tmp_path / "notes.html"), "is no page"),
        ((one,), "two runs or more"),
        ((one, one), "names a run twice"),
        ((one, tmp_path / "a"), "is not a run folder"),
    ):
        done = run_command("compare", *arguments, folder=tmp_path, status=2)
        assert done.stderr.count("\n") == 1 and says in done.stderr
    assert (tmp_path / "notes.html").read_text() == "<p>mine"


def test_compared_runs_have_axes_of_passes_and_of_time_and_intervals_of_their_difference(tmp_path: Path) -> None:
    def run_of(name: str, right: list[float], file: str, seconds: float) -> Path:
        task = {"name": "sums", "kind": "exact_match", "file": "/gone/search.jsonl", "heldout": f"/gone/{file}"}
        run = make_run(tmp_path / name, 3, tasks=[task], inputs={"/gone/search.jsonl": "aa", f"/gone/{file}": file})
        answers = [
            {"model": "evolved ties", "task": "sums", "example": f"/gone/{file}:{k}", "score": score, "target": "4"}
            for k, score in enumerate(right)
        ]  # fmt: skip
        (run / "heldout_answers.jsonl").write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))
        timing = [{"generation": k + 1, "passes": 6.0, "seconds": seconds, "validation_seconds": 1.0} for k in range(3)]
        (run / "timing.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in timing))
        lost = [{"score": "words/accuracy", "role": "parent", "name": "maths"}]
        edit_result(run, shares={"sums/accuracy": 1.0}, units={"sums/accuracy": "share right"}, worse_on=lost)
        return run

    first = run_of("first", [0.0] * 10 + [1.0] * 2, "heldout.jsonl", 1807.0)
    paired = run_of("paired", [1.0] * 9 + [0.0] + [1.0] * 2, "heldout.jsonl", 59.0)
    same = run_of("same", [0.0] * 10 + [1.0] * 2, "heldout.jsonl", 59.0)
    apart = run_of("apart", [1.0] * 3, "others.jsonl", 59.0)
    done = run_here("compare", first, paired, same, apart, "--out", tmp_path / "page.html")
    page, shown = Page(tmp_path / "page.html"), " ".join(done.stdout.split())
    for says in ("ahead of first by (95% interval)", "1:30:24", "the same 12, paired", "3 and 12 others, unpaired"):
        assert says in page.text and says in shown
    lead = paired_lead([np.array([1.0] * 9 + [0.0] + [1.0] * 2)], [np.array([0.0] * 10 + [1.0] * 2)], [1.0])
    assert lead is not None and lead_cell(lead) in page.text and lead.low > 0
    assert "sums/accuracy (share right) same the same 12, paired" in page.text
    assert (
        "sums/accuracy (share right) +0.8333" in page.text and "worse on" in page.text and "words 1:30:24" in page.text
    )
    run_here("compare", first, paired, same, "--out", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert [float(row["x"]) for row in page.rows("best-0") if row["run"] == "first"] == [6.0, 12.0, 18.0]
    assert [float(row["x"]) for row in page.rows("best-1") if row["run"] == "first"] == [1808.0, 3616.0, 5424.0]
    titles = [page.specs[name]["encoding"]["x"]["title"] for name in ("best-0", "best-1")]
    assert titles == ["passes", "time of the generations"]


def test_runs_with_unlike_tasks_are_compared_with_a_note(tmp_path: Path) -> None:
    sums = {"name": "sums", "kind": "likelihood", "file": "/gone/sums.jsonl", "metric": None, "limit": None}
    # A run of an earlier version lacks a key.
    one = make_run(tmp_path / "one", tasks=[sums])
    same = make_run(tmp_path / "same", tasks=[{k: v for k, v in sums.items() if k != "limit"}], seed=5)
    other = make_run(
        tmp_path / "other", tasks=[sums | {"file": "/gone/more.jsonl"}, {"name": "[b]fit", "kind": "arrays"}]
    )
    out = tmp_path / "both.html"
    assert "note: " not in run_here("compare", one, same, "--out", out).stdout
    says = "The tasks of the runs differ ([b]fit, sums.file): their fitnesses do not compare."
    assert run_here("compare", one, same, other, "--out", out).stdout.count(f"note: {says}\n") == 1
    page = Page(out)
    assert says in page.text and page.specs == {} and "Held-out scores of the winners" in page.text
    # Each key that differs has a row, by its task.
    assert "tasks.sums.file" in page.texts and {"/gone/sums.jsonl", "/gone/more.jsonl"} <= set(page.texts)
    # A fitness in another unit stands beside its unit, and on no axis with the others.
    scaled = make_run(tmp_path / "scaled", tasks=[sums], scale="parents")
    edit_result(one, units={"fitness": "log-probability per token"})
    edit_result(scaled, units={"fitness": "weighted mean of scaled tasks"})
    shown = run_here("compare", one, scaled, "--out", out).stdout
    assert "The tasks of the runs differ (scale)" in shown
    page = Page(out)
    for unit in ("log-probability per token", "weighted mean of scaled tasks"):
        assert page.texts.count(unit) == 2 and f"fitness ({unit})" not in page.text
    edit_result(scaled, units={"fitness": "log-probability per token"})
    run_here("compare", one, scaled, "--out", out)
    assert "fitness (log-probability per token)" in Page(out).text and "unit of fitness" not in Page(out).text


def test_the_time_of_compared_runs_is_that_of_the_whole_run_or_named(tmp_path: Path) -> None:
    runs = {name: make_run(tmp_path / name) for name in ("whole", "resumed", "killed", "older")}
    for name, seconds in (("whole", [75.0]), ("resumed", [75.0, 3600.0]), ("killed", [None, 75.0])):
        write_json(runs[name] / "environment.json", {"sessions": [{"seconds": value} for value in seconds]})
    run_here("compare", *runs.values(), "--out", tmp_path / "page.html")
    times = [text for text in Page(tmp_path / "page.html").texts if re.fullmatch(r"[\d:]+( in generations)?", text)]
    assert times == ["1:15", "1:01:15", "0:03 in generations", "0:03 in generations"]


def test_runs_with_a_budget_are_listed_with_the_part_that_is_spent(tmp_path: Path) -> None:
    searches: dict[str, tuple[dict[str, Any], str]] = {
        "clock": ({"strategy": "cma_es", "budget": "90m"}, "2; 0:01 of 1:30:00"),
        "race": ({"strategy": "cma_es", "budget": "600 passes", "population": 8}, "2; 12 of 600 passes"),
        "steps": (
            {"strategy": "gradient", "budget": "600 passes", "gradient": {"minibatches": 4}}, "2; 600 passes"
        ),
        "plain": ({"strategy": "cma_es", "generations": 5}, "2/5"),
    }  # fmt: skip
    for name, (search, _) in searches.items():
        make_run(tmp_path / name, 2, search=search, finished=name != "plain")
    lines = run_command("runs", ".", folder=tmp_path).stdout.splitlines()
    for name, (_, says) in searches.items():
        assert next(line for line in lines if f"│ {name} " in line).split("│")[3].strip() == says
    out = tmp_path / "both.html"
    shown = run_here("compare", tmp_path / "clock", tmp_path / "race", "--out", out).stdout + Page(out).text
    assert "1:30:00" in shown and "600 passes" in shown


def test_runs_below_a_folder_are_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "deep" / "second", finished=False)
    broken = make_run(tmp_path / "runs" / "broken")
    (broken / "config.yaml").write_text("inputs: [")
    done = run_command("runs", folder=tmp_path)
    for text in ("first", "deep/second", "ties", "6/6", "finished", "stopped", "ago"):
        assert text in done.stdout
    assert "broken" not in done.stdout and done.stderr.startswith("warning: ") and done.stderr.count("\n") == 1
    assert "first" in run_here("runs", tmp_path / "runs" / "first").stdout
    (tmp_path / "none").mkdir()
    assert "no runs in none" in run_command("runs", "none", folder=tmp_path).stdout
    run_command("runs", "missing", folder=tmp_path, status=2)


# ---------------------------------------------------------------------------------------------------------------
# In a browser


@in_a_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_draws_every_figure_and_asks_for_nothing(tmp_path: Path, width: int) -> None:
    run = make_run(tmp_path / HOSTILE.replace("/", "∕"))
    result = read_json(run / "result.json")
    for scored in result["table"]:
        scored["name"] = f"{scored['name']} {HOSTILE}"
    for rival in result["better_than"].values():
        rival["name"] = f"{rival['name']} {HOSTILE}"
    write_json(run / "result.json", result)
    write_page(RunFolder(run))
    page = shutil.copy(run / "report.html", tmp_path / "page.html")
    specs = Page(page).specs
    seen, console = browse(page, width)
    assert seen["problems"] == [] and console == [] and seen["requests"] == []
    assert seen["charts"].keys() == specs.keys() >= {
        "fitness", "heldout", "map-0", "importance", "parallel", "task-0", "rungs", "metric-0", "seconds",
    }  # fmt: skip
    assert seen["width"] == width and seen["scrolled"] <= width
    for name, box in seen["charts"].items():
        assert box is not None, name
        assert box[0] <= width and box[1] > 40 and box[2] == 0, name
    assert seen["images"] == 0 and seen["bold"] == 0 and HOSTILE.replace("/", "∕") in seen["text"]


@in_a_browser
def test_the_axes_of_a_single_point_have_ticks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, 1)
    table = make_result(1, 4)["table"]
    for scored in table:
        scored |= {"heldout_fitness": 0.0, "heldout_scores": {"sums/accuracy": 0.0}, "interval": [0.0, 0.0]}
    edit_result(run, table=table, parameters={"weight": [[0.0, 0.0], [0.0, 0.0]]})
    write_page(RunFolder(run))
    run_here("compare", run, make_run(tmp_path / "other", 1, 1), "--out", tmp_path / "both.html")
    for page in (run / "report.html", tmp_path / "both.html"):
        seen, _ = browse(shutil.copy(page, tmp_path / "page.html"))
        assert seen["problems"] == []
        for chart, axes in seen["axes"].items():
            assert axes, chart
            for labels in axes:
                assert labels and len(set(labels)) == len(labels), (chart, labels)
                assert not any("NaN" in label or "undefined" in label for label in labels), (chart, labels)
        # One tick alone, rounded, would be another number than the point's.
        for chart in seen["axes"].keys() & {"task-0", "metric-0", "seconds", "best-0", "best-1"}:
            assert len(seen["axes"][chart][1]) >= 2, chart


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_scores_fit_a_telephone_and_a_laptop(tmp_path: Path, width: int) -> None:
    run = make_run(tmp_path / "run")
    table = make_result(6, 4)["table"]
    for scored in table:
        scored["name"] = scored["name"].replace("ties", "task_arithmetic")
        scored["heldout_fitness"] -= 12
        scored["heldout_scores"] = {"japanese_sums/log_probability": -12.0898, "whole_answers/accuracy": 0.8555}
        scored["interval"] = [11.8525, 12.1424]
    edit_result(run, table=table)
    write_page(RunFolder(run))
    seen, _ = browse(run / "report.html", width)
    assert seen["width"] == width and seen["wide"] == 0
    assert seen["text"].count("whole_answers/accuracy") >= 3


@in_a_browser
def test_the_slider_shows_an_earlier_generation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit_result(run, groups=[])
    write_page(RunFolder(run))
    seen, _ = browse(shutil.copy(run / "report.html", tmp_path / "page.html"), dark=True)
    history = read_lines(run / "history.jsonl")
    first = max(zip(history[0]["fitness"], history[0]["examples"], history[0]["genomes"], strict=True),
                key=lambda row: (row[1], row[0]))  # fmt: skip
    assert seen["last"]["label"] == "the winner"
    assert seen["first"]["label"] == f"generation 1 of 6, its best: fitness {first[0]:.4f}"
    assert seen["first"]["texts"] != seen["last"]["texts"]
    assert f"{first[2][0]:.2f}" in seen["first"]["texts"]
    assert seen["background"] != "rgb(255, 255, 255)"


@in_a_browser
def test_a_browser_draws_several_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, generations=3 + k) for k, name in enumerate(["one", "two"])]
    run_here("compare", *runs, "--out", tmp_path / "page.html")
    seen, console = browse(tmp_path / "page.html", 400)
    assert seen["problems"] == [] and console == [] and seen["requests"] == [] and seen["scrolled"] <= 400
    assert len(seen["charts"]) == 3 and all(seen["charts"].values())
