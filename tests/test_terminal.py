"""The terminal of a search, its log, and the loggers: text, JSON or nothing on stdout, all of it in run.log."""

import io
import json
import logging
import os
import pty
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.commands import run_here
from helpers.files import read_lines, write_yaml
from helpers.sampling import thorough
from helpers.trees import search_trees
from hostile import run_command, run_python
from rich.console import Console
from safetensors.numpy import save_file

import evojax_merge as em
from evojax_merge.cli import run
from evojax_merge.errors import LOG
from evojax_merge.report.progress import (
    COLUMNS,
    GenerationsColumn,
    PlainColumn,
    SearchProgress,
    format_seconds,
    generation_line,
    generation_record,
)
from evojax_merge.schema.genealogy import Genealogy, founder_genomes
from evojax_merge.search.recording import Generation
from evojax_merge.search.run_folder import open_run
from evojax_merge.search.run_log import begin_logs, early_lines, run_log
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.spaces.breeding import BreedingSpace
from evojax_merge.spaces.layer_path import IndicatorSpace, MoveSpace, ScaleBounds

GENERATIONS = 3
SCORES = '''"""Scores of a linear model."""

def errors(model, rows):
    print("a user's own line")
    return -((rows["x"] @ model["layer"]["w"] - rows["y"]) ** 2).sum(-1)

def none(model, rows):
    return float("nan") * rows["x"][:, 0]
'''
WEIGHED = '''
def firsts(model, rows):
    """The likeness to the first parent."""
    return -((rows["x"] @ model["layer"]["w"] - rows["first"]) ** 2).sum(-1)
'''
LINE = re.compile(r"generation \d+/3  best -?\d+\.\d{4}  best parent -?\d+\.\d{4}(  left \d+:\d\d)?")
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ "


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A search over linear models, which compiles next to nothing."""
    rng = np.random.default_rng(1)
    one, two, x = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2), (3, 2), (40, 3)))
    save_file({"layer/w": one}, tmp_path / "one.safetensors")
    np.savez(tmp_path / "two.npz", **{"layer/w": two})
    np.savez(tmp_path / "data.npz", x=x, y=x @ ((one + 2 * two) / 3), first=x @ one)
    (tmp_path / "scores.py").write_text(SCORES)
    path = tmp_path / "linear.yaml"
    task = {"name": "fit", "kind": "arrays", "file": "data.npz", "function": "scores.py:errors"}
    document = {
        "backend": "function", "parents": ["one.safetensors", "two.npz"], "tasks": [task],
        "space": {"method": "linear", "parameters": {"weight": {"low": 0.0, "high": 1.0}}},
        "search": {"generations": GENERATIONS, "population": 6},
    }  # fmt: skip
    return write_yaml(path, document)


def search(
    config: Path, *options: object, status: int = 0, run: Callable[..., subprocess.CompletedProcess[str]] = run_here
) -> subprocess.CompletedProcess[str]:
    return run("search", config, "--out", config.parent / "run", *options, status=status)


def logged_lines(run: Path) -> list[str]:
    lines = (run / "run.log").read_text().splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    return [re.sub(f"^{STAMP}", "", line) for line in lines]


def test_a_line_a_generation_and_a_log_of_all_lines(config: Path) -> None:
    run = config.parent / "run"
    first = search(config, "--set", "search.generations=2", "--set", "log=[csv]")
    lines = [line for line in first.stdout.splitlines() if line.startswith("generation ")]
    assert len(lines) == 2 and all(LINE.fullmatch(line.replace("/2", "/3")) for line in lines)
    # A file has no characters of bars.
    assert "━━━━ " not in first.stdout and re.search(r"^loading .* took \d:\d\d$", first.stdout, re.MULTILINE)
    assert set(lines) <= set(logged_lines(run)) and any(line.startswith("parent: ") for line in logged_lines(run))
    # The best parent is the better of the two candidates that are a parent alone.
    best_parent = float(lines[0].split("best parent ")[1].split()[0])
    assert best_parent == pytest.approx(max(em.open_run(run).history[0]["fitness"][1:3]), abs=1e-4)
    # Another set of loggers is no other run.
    search(config, "--resume", "--set", "log=[csv, csv]")
    assert sum(line.startswith("generation ") for line in logged_lines(run)) == GENERATIONS
    header, *rows = [line.split(",") for line in (run / "history.csv").read_text().splitlines()]
    assert header[:2] == ["generation", "fitness/best_so_far"] and "strategy/sigma" in header
    for row, expected in zip(rows, em.open_run(run).history, strict=True):
        figures = dict(zip(header, row, strict=True))
        assert int(figures["generation"]) == expected["generation"]
        assert float(figures["fitness/best_so_far"]) == expected["best_so_far"]
        assert float(figures["tasks/fit/score"]) == expected["scores_of_best"]["fit/score"]


def test_a_lost_task_and_a_winner_that_is_a_parent_are_sentences_on_every_page(config: Path) -> None:
    """On the terminal, in the model card and on the page."""
    document = yaml.safe_load(config.read_text())
    # What the first parent does, which the target of the search takes a part of away.
    (config.parent / "scores.py").write_text(SCORES.replace("def none", WEIGHED + "\ndef none"))
    document["tasks"].append(document["tasks"][0] | {"name": "first", "function": "scores.py:firsts", "weight": 0})
    write_yaml(config, document)

    def pages() -> list[str]:
        run, done = config.parent / "run", search(config, "--overwrite")
        card, page = (run / "best/model/README.md").read_text(), (run / "report.html").read_text()
        return [" ".join(text.split()) for text in (done.stdout, card, page)]

    for text in pages():
        assert re.search(
            r"On held-out data the winner is better than the best parent on 1 of 2 tasks: fit \(\+\d+\.\d{4} against "
            r"two\.npz\); worse on first \(-\d+\.\d{4} against one\.safetensors\)\.", text,
        )  # fmt: skip
        assert "On the held-out examples of first (score, weight 0) the winner is worse than the parent one" in text
        assert "The winner is the parent" not in text
    document["tasks"] = document["tasks"][1:]
    document["tasks"][0]["weight"] = 1
    write_yaml(config, document)
    for text in pages():
        assert "The winner is the parent one.safetensors, unchanged: nothing that was searched beat it on the" in text
        assert "the winner is the same as the best parent one.safetensors, example by example: both have" in text


def test_gradients_on_minibatches_show_the_fitness_of_each_step(config: Path) -> None:
    steps = ("search.strategy=gradient", "search.population=1", "search.gradient={minibatches: 2}")
    looks = ("search.validation=0.25", "search.validate_every=2")
    done = search(config, *(part for value in (*steps, *looks) for part in ("--set", value)))
    history = em.open_run(config.parent / "run").history
    assert [row["best_so_far"] for row in history] == [None] * GENERATIONS and "none" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("generation ")]
    for line, row in zip(lines, history, strict=True):
        assert line.startswith(f"generation {row['generation']}/3  on its minibatch {row['fitness'][0]:.4f}")
    assert lines[1].endswith(f"  validation {history[1]['validation']['finalists'][0]:.4f}")
    assert "fitness on the search split, each gradient step on one of its 2 minibatches" in done.stdout


def test_json_is_a_line_for_each_generation_and_nothing_else(config: Path) -> None:
    untraced = ("--json", "--set", "tasks.0.traced=false")
    done = search(config, *untraced, run=run_command)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    history = em.open_run(config.parent / "run").history
    assert [record["generation"] for record in records] == [1, 2, 3]
    for record, row in zip(records, history, strict=True):
        for name in ("best", "best_so_far", "mean", "failed", "scores_of_best"):
            assert record[name] == row[name]
        assert record["generations"] == 3 and record["population"] == 6 and record["best_parent"] is not None
    assert "a user's own line" in done.stderr
    assert any(LINE.fullmatch(line) for line in logged_lines(config.parent / "run"))
    # The generations of this process alone.
    more = search(config, *untraced, "--resume", "--set", "search.generations=4", run=run_command)
    assert [json.loads(line)["generation"] for line in more.stdout.splitlines()] == [4]


@pytest.mark.parametrize(("disowned", "status"), [(True, 0), (False, 130)])
def test_a_search_survives_its_terminal(disowned: bool, status: int, config: Path) -> None:
    """Its window closes in a search: the search goes on where its shell has disowned it, and stops with its generations
    saved where it has not."""
    # More than there is time for, where it is to stop.
    generations = "300" if disowned else "30000"
    options = ["--out", str(config.parent / "run"), "--set", f"search.generations={generations}"]
    child, terminal = pty.fork()
    if not child:
        # The tests may themselves run under nohup.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if disowned else signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", "evojax_merge", "search", str(config), *options])
    shown = b""
    while b"/300" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    is_interrupted = logged_lines(config.parent / "run")[-1] == "interrupted"
    assert is_interrupted != disowned and (config.parent / "run" / "result.json").exists() == disowned


def test_quiet_prints_nothing_and_errors_are_lines(config: Path) -> None:
    done = search(config, "--quiet", "--set", "search.generations=1", run=run_command)
    assert set(done.stdout.splitlines()) == {"a user's own line"}
    assert any(line.startswith("winner: ") for line in logged_lines(config.parent / "run"))
    refused = search(config, "--quiet", status=2)
    assert refused.stdout == "" and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert search(config, "--quiet", "--json", status=2).stderr == "error: --json: cannot go with --quiet\n"


def test_a_run_that_failed_before_its_first_generation_gives_way(config: Path) -> None:
    run = config.parent / "run"
    failed = search(config, "--set", "tasks.0.function=scores.py:none", status=1)
    assert "nothing is saved" in failed.stderr and (run / "config.yaml").exists()
    assert logged_lines(run)[-1] == failed.stderr.splitlines()[-1]
    (run / "notes.txt").write_text("mine")
    search(config, "--set", "search.generations=1")
    assert len(em.open_run(run).history) == 1 and (run / "notes.txt").read_text() == "mine"
    assert not any("nothing is saved" in line for line in logged_lines(run))
    assert "holds a run already" in search(config, status=2).stderr


@thorough
def test_a_users_log_and_table_stay_and_stop_nothing(config: Path) -> None:
    run = config.parent / "run"
    search(config, "--set", "search.generations=1")
    contents = {"run.log": "mine\n", "history.csv": ",generation,candidate\n0,1,0\n"}
    for name, content in contents.items():
        (run / name).write_text(content)
    done = search(config, "--resume", "--set", "log=[csv]", "--set", "search.generations=2")
    assert "run.log: is no log of evojax-merge" in done.stderr
    assert "history.csv: is no table of evojax-merge" in done.stderr
    open_run(run, {"inputs": {}}, resume=False, overwrite=True)
    assert {name: (run / name).read_text() for name in contents} == contents and not (run / "history.jsonl").exists()


def test_a_log_that_cannot_be_written_ends_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handler: logging.FileHandler) -> None:
        raise OSError(28, "No space left on device")

    folder = RunFolder(tmp_path)
    with early_lines():
        LOG.info("before")
        with run_log(folder):
            begin_logs()
            LOG.info("first")
            monkeypatch.setattr(logging.FileHandler, "flush", full)
            LOG.info("second")
            LOG.info("third")
    assert capsys.readouterr().err.count("run.log: could not be written") == 1
    assert logged_lines(tmp_path)[:2] == ["before", "first"]


def test_python_prints_nothing_and_logs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = config.parent / "trees"
    trees = [{"w": np.full(2, value, np.float32)} for value in (0.0, 1.0)]
    search_trees(trees, lambda tree: -((tree["w"] - 0.3) ** 2).sum(), generations=2, population=4, out=out)
    assert capsys.readouterr().out == ""
    lines = [line.split("  ")[0] for line in logged_lines(out)]
    assert [line for line in lines if line.startswith("generation ")] == ["generation 1/2", "generation 2/2"]


def test_every_kind_of_space_knows_its_parents() -> None:
    bounds = ScaleBounds(0.5, 2.0)
    moves, other_head = (MoveSpace((4, 4), 2, 2, bounds, True, 8, parent) for parent in (0, 1))
    assert moves.parents_among(np.stack([moves.start, moves.start + 1])).tolist() == [True, False]
    assert not other_head.parents_among(other_head.start[None]).any()
    series = IndicatorSpace((2, 3), 2, "none", bounds, 9, 1)
    seeds = series.seed_genomes("seeds", "parents")
    assert series.parents_among(seeds).tolist() == [False, True]
    assert series.decode(seeds)[1].layers == (2, 3, 4)
    founders = founder_genomes(2, 1)
    child = founders[:1].copy()
    child[0, 1:4] = [0, 1, 0]
    pool = BreedingSpace((), 2, False, Genealogy(founders, np.zeros((0, founders.shape[1]), np.float32)))
    assert pool.parents_among(np.concatenate([founders, child])).tolist() == [True, True, False]


# ---------------------------------------------------------------------------------------------------------------
# The line


def generation(**changes: Any) -> Generation:
    values: dict[str, Any] = {
        "number": 123456, "generations": 1_000_000, "fitness": np.zeros(100_000), "best": -1.0, "mean": float("nan"),
        "best_so_far": -1.23456789e12, "best_parent": -123456.789, "failed": 100_000, "metrics": {"sigma": np.inf},
        "seconds": 1.0, "validation": -1e30, "seconds_left": 1e9,
    }  # fmt: skip
    return Generation(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"failed": 0}, {"best_so_far": None, "best_parent": None}, {"number": 1, "generations": 50, "best": 0.5}],
)
def test_a_line_has_at_most_80_columns(changes: dict[str, Any]) -> None:
    assert len(generation_line(generation(**changes))) <= COLUMNS
    record = json.loads(generation_record(generation(**changes)), parse_constant=pytest.fail)
    assert record["mean"] is None and record["metrics"] == {"sigma": None}


def test_a_line_names_generation_best_parent_and_time() -> None:
    usual = generation(
        number=12, generations=50, best_so_far=0.8, best_parent=0.75, seconds_left=192.4, failed=3, validation=0.7
    )
    assert generation_line(usual) == "generation 12/50  best 0.8000  best parent 0.7500  left 3:13  failed 3"
    # Before a candidate is known on all examples, the line names the examples or the score that it was scored by.
    partly = {"best_so_far": None, "best_parent": None, "fitness": np.array([-0.5, np.nan, -0.25]), "validation": None}
    lines = {
        "minibatch": "on its minibatch -0.2500  left",
        "companion": "companion -0.2500  left",
        "all examples": "left",
    }
    for scored_on, words in lines.items():
        line = generation_line(generation(number=1, generations=2, scored_on=scored_on, **partly))
        assert line.startswith(f"generation 1/2  {words} ")
    assert [format_seconds(seconds) for seconds in (0, 59.5, 3600, 90061)] == ["0:00", "1:00", "1:00:00", "25:01:01"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_bar_fits_a_terminal(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    progress = SearchProgress(GenerationsColumn(), PlainColumn("{task.fields[info]}"), console=console, expand=True)
    progress.add_task("search", total=50, completed=12.4, info="best 0.8000  best parent 0.7500  left 3:13")
    console.print(progress.get_renderable())
    lines = file.getvalue().splitlines()
    assert len(lines) == 1 and len(lines[0]) <= min(width, COLUMNS) and lines[0].split()[0] == "12/50"


# ---------------------------------------------------------------------------------------------------------------
# Loggers


def test_tensorboard_gets_the_figures(config: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    run = config.parent / "run"
    search(config, "--set", "log=[tensorboard]", "--set", "search.generations=2")
    (file,) = (run / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    values = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
    for row in em.open_run(run).history:
        assert values[row["generation"], "fitness/best_so_far"] == pytest.approx(row["best_so_far"], rel=1e-6)


WANDB = """
import json, os
class Run:
    def __init__(self, **options):
        self._file = open(os.path.join(options["dir"], "stub.jsonl"), "a")
        self._write(options)
    def _write(self, document):
        print(json.dumps(document), file=self._file, flush=True)
    def log(self, data, step=None):
        if step == int(os.environ.get("FAILS_AT", 0)):
            raise OSError("no route\\nto the host")
        self._write({"step": step} | data)
    def finish(self, exit_code=None):
        self._write({"finished": True})
def init(entity=None, project=None, dir=None, id=None, name=None, config=None, mode=None, resume=None, settings=None):
    return Run(project=project, dir=dir, id=id, name=name, config=config, mode=mode, resume=resume)
"""
RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from evojax_merge.cli import main; main()"


def test_wandb_is_offline_and_one_run_after_a_resume(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, packages = config.parent / "run", config.parent / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text(WANDB)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    arguments = ["search", config, "--out", run, "--set", "log=[wandb]"]
    done = run_python(RUN, packages, *arguments, "--set", "search.generations=1")
    first, row, end = read_lines(run / "stub.jsonl")
    assert first["mode"] == "offline" and first["project"] == "evojax-merge" and first["name"] == "run"
    assert first["config"]["parents"] == [str(config.parent / name) for name in ("one.safetensors", "two.npz")]
    assert row["step"] == 1 and row["fitness/best"] == em.open_run(run).history[0]["best"] and end["finished"]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("FAILS_AT", "3")
    done = run_python(RUN, packages, *arguments, "--resume")
    assert "warning: log: wandb failed (no route), and gets nothing more" in done.stderr
    again, row = [json.loads(line) for line in (run / "stub.jsonl").read_text().splitlines()[3:]]
    assert again["mode"] == "online" and again["resume"] == "allow" and again["id"] == first["id"] and row["step"] == 2


def test_a_logger_without_its_package_is_refused_before_anything_is_loaded(config: Path) -> None:
    hidden = "import sys; sys.modules['wandb'] = sys.modules['tensorboardX'] = None; "
    main = "from evojax_merge.cli import main; main()"
    document = yaml.safe_load(config.read_text())
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        write_yaml(config, document | {"log": [name]})
        error = run_python(hidden + main, "search", config, "--out", config.parent / "run", status=2).stderr
        needed = f"{name} needs the package {package}; pip install 'evojax-merge[{name}]'"
        assert error == f"error: {config}: log: {needed}\n"
    assert not (config.parent / "run").exists()


def test_a_process_without_memory_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fill() -> None:
        raise MemoryError("Unable to allocate 3 TiB")

    assert run(fill) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "3 TiB" in line and "--resume" in line
