"""The time of a search: no silence, the time that is left, estimates from measurements, and compiled programs that
later processes find again."""

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from helpers.commands import run_here
from helpers.families import Family
from helpers.files import read_json, write_yaml
from helpers.sampling import ALL, thorough
from helpers.searches import search_config
from hostile import run_python

from evojax_merge import cli_parts
from evojax_merge.backends.decoder.backend import DecoderBackend
from evojax_merge.checkpoints import kept_hashes
from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.config.search_config import Config, SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation import compilations, timings
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.timings import NOT_MEASURED, Timing, estimated_factor, read_timings, record_timings, timing
from evojax_merge.problem import build_problem, config_from
from evojax_merge.report import progress
from evojax_merge.report.plan import CHOOSING, GENERATIONS, HELDOUT, MEASURING, Plan, shown_seconds
from evojax_merge.report.progress import passes_bar, search_bar
from evojax_merge.search import kept_scores, recording
from evojax_merge.search.recording import Clock, Generation
from evojax_merge.search.stopping import course_of
from evojax_merge.steps import loading
from evojax_merge.steps.planning import make_plan
from evojax_merge.system import console
from evojax_merge.system.console import working
from evojax_merge.system.imports import importing


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evojax-merge"


def document(family: Family, **changes: Any) -> dict[str, Any]:
    return search_config(family, 3, heldout=0.25) | changes


def plan_of(document: dict[str, Any], timings: list[Timing] | None = None) -> Plan:
    problem = build_problem(Path("config.yaml"), config_from(Path("config.yaml"), document, [], None))
    return make_plan(problem, problem.prepare(), timings=timings or [])


def write_config(folder: Path, family: Family, **changes: Any) -> Path:
    return write_yaml(folder / "config.yaml", document(family, **changes))


# ---------------------------------------------------------------------------------------------------------------
# No silence


def test_work_without_a_line_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.1)
    with working("reading the models"):
        time.sleep(0.8)
        with passes_bar("choosing the winner", 4) as advance:
            advance(3)
            time.sleep(0.8)
    lines = capsys.readouterr().out.splitlines()
    outer, inner = ([line for line in lines if line.startswith(what)] for what in ("reading", "choosing"))
    assert len(outer) >= 2 and all(line == "reading the models: 0:01 so far" for line in outer)
    # The innermost work is named, and the last line says how long it took.
    assert len(inner) >= 3 and re.match(r"choosing the winner: 75%, 0:01 so far", inner[0])
    assert inner[-1] == "choosing the winner took 0:01"
    time.sleep(0.25)
    assert capsys.readouterr().out == ""


def test_a_command_is_named_from_its_imports_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(cli_parts, "_start_jax", lambda: time.sleep(0.8))
    assert "plan: 0:01 so far\n" in run_here("plan", "missing.yaml", status=2).stdout
    # Other programs read a list, and lines of JSON.
    assert "so far" not in run_here("methods").stdout
    assert all(
        "so far" not in run_here("search", "missing.yaml", option, status=2).stdout for option in ("--json", "--quiet")
    )


def test_a_generation_under_way_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "SILENCE_SECONDS", 0.1)
    with search_bar(3, lambda generation: None) as bar:
        bar.evaluating(0, 8)
        monkeypatch.setattr(progress, "is_compiling", lambda: True)
        time.sleep(0.7)
        monkeypatch.undo()
        monkeypatch.setattr(console, "SILENCE_SECONDS", 0.1)
        bar.finished(generation(1, 2.0, None))
        bar.evaluating(1, 8)
        bar.advanced(5)
        time.sleep(0.25)
    out = capsys.readouterr().out
    assert "generation 1/3: compiling, 0:01 so far" in out and "generation 2/3: 5 of 8 steps, 0:01 so far" in out


def test_each_part_of_a_search_says_that_it_ended(family: Family, tmp_path: Path) -> None:
    done = run_here("search", write_config(tmp_path, family, scale="parents"), "--out", tmp_path / "run")
    parts = ["loading ", f"{MEASURING} took ", "generation 1/3 ", "generation 3/3 ", f"{CHOOSING} took ",
             f"{HELDOUT} took ", "compiling took ", "exporting "]  # fmt: skip
    places = [done.stdout.index(f"\n{part}") for part in parts]
    assert places == sorted(places)


# ---------------------------------------------------------------------------------------------------------------
# The time that is left


def generation(number: int, seconds: float, seconds_left: float | None) -> Generation:
    return Generation(number, np.zeros(4), 0.5, 0.5, 0.5, 0, {}, seconds, generations=3, seconds_left=seconds_left)


def test_the_time_left_counts_the_ending(capsys: pytest.CaptureFixture[str]) -> None:
    """The first generation compiles: the others tell how long the ending takes."""
    shown: list[Generation] = []
    with search_bar(3, shown.append, lambda seconds: 5 * seconds) as bar:
        bar.finished(generation(1, 100.0, None))
        bar.finished(generation(2, 4.0, 6.0))
        assert "left" in bar.describe()
        bar.finished(generation(3, 8.0, 0.0))
    assert [each.seconds_left for each in shown] == [None, 26.0, 30.0]
    assert "generation 3/3  best 0.5000  left 0:30" in capsys.readouterr().out


def twelve_generations() -> SearchConfig:
    return Config.model_validate(
        {"parents": ["a", "b"], "tasks": [{"name": "t", "kind": "likelihood", "file": "t.jsonl"}],
         "space": {"method": "ties"}, "search": {"generations": 12}}
    ).search  # fmt: skip


def test_what_a_process_compiles_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first generation of 200 s, compiling that takes 50 s later, and generations of 3 and 4 s."""
    now, compiling, course = 200.0, 190.0, course_of([], [])
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(recording, "compilations", lambda: compilations.Compilations(9, compiling, 0))
    search, clock = twelve_generations(), Clock()
    assert clock.seconds_left(search, 1, course, 4, 9.0) is None
    now, compiling = 253.0, 240.0
    assert clock.seconds_left(search, 2, course, 4, 9.0) == pytest.approx(10 * 3.0)
    now += 4.0
    assert clock.seconds_left(search, 3, course, 4, 1.0) == pytest.approx(9 * 3.5)
    limited = search.model_copy(update={"stop": search.stop.model_copy(update={"evaluations": 20})})
    now += 4.0
    assert clock.seconds_left(limited, 3, replace(course, evaluations=12), 4, 1.0) == pytest.approx(2 * 4.0)


def test_the_first_use_of_a_strategy_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, course, search, clock = 0.0, course_of([], []), twelve_generations(), Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(recording, "compilations", lambda: compilations.Compilations(9, 0.0, 0))
    assert clock.seconds_left(search, 1, course, 4, 9.0) is None
    now = 5.0
    assert clock.seconds_left(search, 2, course, 4, 3.0) == pytest.approx(10 * 3.0)


# ---------------------------------------------------------------------------------------------------------------
# Estimates


def test_a_plan_has_its_parts_and_an_estimate(family: Family, cache: Path) -> None:
    guess = plan_of(document(family, scale="parents"))
    assert list(guess.parts) == [MEASURING, GENERATIONS, CHOOSING, HELDOUT]
    assert sum(part.seconds for part in guess.parts.values()) == pytest.approx(guess.run.seconds)
    assert guess.factor == NOT_MEASURED and "a guess: `evojax-merge bench` measures it" in guess.summary()[1]
    ending = guess.parts[CHOOSING].seconds + guess.parts[HELDOUT].seconds
    assert guess.ending_seconds(2.0) == pytest.approx(2.0 * ending / guess.generation.seconds)
    measured = plan_of(document(family), [timing("scoring", 7.0, 10**6, "bench")])
    assert measured.run_seconds == pytest.approx(7 * measured.run.seconds)
    around = sum(work.seconds for work in measured.around.values())
    assert measured.estimated_seconds == pytest.approx(measured.run_seconds + around) and around > 0
    assert re.search(
        r"about .* \(7 times its bound by the roofline, as bench measured here on \d{4}-", measured.summary()[1]
    )
    assert measured.as_json()["factor"]["value"] == 7 and set(measured.as_json()["parts"]) == set(measured.parts)


def test_a_resumed_plan_prices_what_is_left(family: Family) -> None:
    plan = plan_of(document(family))
    generations, share = plan.parts[GENERATIONS].seconds, plan.expected_share * plan.factor.value
    assert plan.seconds_left(0) == plan.run_seconds == pytest.approx(plan.run.seconds * share)
    half = plan.seconds_left(plan.generations // 2)
    done = generations * (plan.generations // 2) / plan.generations
    assert half == pytest.approx((plan.run.seconds - done) * share) and half < plan.run_seconds
    # The choice of the winner is left, even where more generations are done than are wanted.
    ending = (plan.run.seconds - generations) * share
    assert ending > 0
    for saved in (plan.generations, plan.generations + 3):
        assert plan.seconds_left(saved) == pytest.approx(ending)
    assert "; the whole search takes about " in plan.summary()[1]
    assert f"; what is left of the search takes about {shown_seconds(ending)} " in plan.summary(plan.generations)[1]


def test_answers_are_expected_to_be_as_long_as_their_targets(family: Family) -> None:
    """The estimate counts the tokens of the longest target, and the bound all that a model may write."""

    def plan(new: int) -> Plan:
        task = {"name": "words", "kind": "exact_match", "file": str(family.tasks), "heldout": 0.25}
        return plan_of(document(family, tasks=[task | {"max_new_tokens": new}]))

    long, longer = plan(100), plan(200)
    assert longer.run.seconds > 1.6 * long.run.seconds and long.expected_share < 0.5
    assert longer.run_seconds == pytest.approx(long.run_seconds, rel=0.45)
    (line,) = (line for line in longer.lines() if line.startswith("the run takes "))
    assert f"of which answers as long as their targets take {longer.expected_share:.0%}" in line
    assert plan(2).expected_share == 1.0


def test_a_target_that_is_not_here_is_guessed(family: Family) -> None:
    from evojax_merge.evaluation.targets import find_target

    problem = build_problem(
        Path("config.yaml"), config_from(Path("config.yaml"), document(family), [], None),
        target=find_target("target", "h100"),
    )  # fmt: skip
    local = [timing("scoring", 7.0, 10**6, "bench")]
    assert make_plan(problem, problem.prepare(), timings=local).factor == NOT_MEASURED


def test_the_nearest_measurement_of_each_kind_counts() -> None:
    small, large = timing("scoring", 50.0, 10**5, "search"), timing("scoring", 2.0, 10**9, "bench")
    texts = timing("decoding", 8.0, 10**9, "search")
    assert estimated_factor({"scoring": 1.0}, 2 * 10**5, [small, large]).value == 50
    assert estimated_factor({"scoring": 1.0}, 10**8, [small, large]).value == 2
    both = estimated_factor({"scoring": 1.0, "decoding": 3.0}, 10**9, [large, texts])
    assert both.value == pytest.approx((2 + 3 * 8) / 4)
    # A kind that was not measured takes as long as scoring; nothing measured, nothing known.
    assert estimated_factor({"gradient": 1.0}, 10**9, [large]).value == 2
    assert estimated_factor({"scoring": 1.0}, 10**9, [texts]) == NOT_MEASURED
    again = large.model_copy(update={"factor": 3.0})
    assert estimated_factor({"scoring": 1.0}, 10**9, [large, again]).value == 3


def test_searches_record_how_long_they_took(family: Family, tmp_path: Path, cache: Path) -> None:
    run_here("search", write_config(tmp_path, family), "--out", tmp_path / "run")
    # A search that compiles most of its programs records that as well.
    (recorded,) = [each for each in read_timings() if each.kind != "compiling"]
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    bound = plan_of(document(family)).generation.seconds
    assert (recorded.kind, recorded.source) == ("scoring", "search")
    assert recorded.factor == pytest.approx(np.median(seconds[1:]) / bound, rel=1e-3)
    planned = run_here("plan", tmp_path / "config.yaml")
    assert "as a search measured here on " in planned.stdout


@pytest.mark.parametrize("content", ["", "[1]", '[{"device": "x"}]', "[" * 100_000, '[{"factor": -1}]'])
def test_a_damaged_file_of_timings_is_no_error(content: str, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "timings.json").write_text(content)
    assert read_timings() == []
    record_timings([timing("scoring", 2.0, 10**6, "bench")])
    assert [each.factor for each in read_timings()] == [2.0]


def test_the_file_of_timings_keeps_the_latest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "MAX_TIMINGS", 3)
    for factor in range(1, 6):
        record_timings([timing("scoring", float(factor), 10**6, "search")])
    assert [each.factor for each in read_timings()] == [3.0, 4.0, 5.0]
    elsewhere = read_timings()[0].model_copy(update={"device": "another machine"})
    record_timings([elsewhere])
    assert [each.factor for each in read_timings()] == [4.0, 5.0]


# ---------------------------------------------------------------------------------------------------------------
# The start


LOADED = """
import atexit, sys
from evojax_merge.__main__ import main
atexit.register(lambda: print("loaded", *sorted({"torch", "torchvision", "scipy.stats"} & sys.modules.keys())))
main()
"""


def test_a_plan_of_text_models_imports_no_torch(family: Family, tmp_path: Path) -> None:
    """It would take seconds at the start of a search. A user's function may need it, through transformers."""
    answers = {"name": "answers", "kind": "exact_match", "file": str(family.tasks), "heldout": 0.25}
    tasks = [*document(family)["tasks"], answers | {"max_new_tokens": 4}]

    def plan(tasks: list[dict[str, Any]]) -> str:
        """The output, whose last line names the libraries that are loaded at the end."""
        command = [sys.executable, "-c", LOADED, "plan", write_config(tmp_path, family, tasks=tasks)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    assert plan(tasks).endswith("\nloaded\n")
    (tmp_path / "lengths.py").write_text(
        "import transformers, torch\nassert transformers.utils.is_torch_available()\n"
        "def lengths(records, outputs):\n    return [len(text) for text in outputs]\n"
    )
    asked = {"name": "lengths", "kind": "function", "file": str(family.tasks), "heldout": 0.25, "max_new_tokens": 4,
             "function": "lengths.py:lengths"}  # fmt: skip
    assert "\nloaded torch" in plan([asked])


# ---------------------------------------------------------------------------------------------------------------
# Scores of base and parents


def test_a_later_search_reads_the_scores_of_base_and_parents(
    family: Family, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search with copies of the same models and tasks scores none of them again, and ends in the same bytes. Other
    examples, a damaged file, and a task that is scored by a user's function have them scored."""
    scored, score = list[Path](), DecoderBackend.score_stored

    def counted(backend: DecoderBackend, model: Path, *rest: Any) -> Any:
        scored.append(model)
        return score(backend, model, *rest)

    def search(out: str, **changes: Any) -> tuple[int, str]:
        """The number of models that were scored, and the search's words."""
        scored.clear()
        done = run_here("search", write_config(tmp_path, family, scale="parents", **changes), "--out", tmp_path / out)
        return len(scored), done.stdout

    monkeypatch.setattr(DecoderBackend, "score_stored", counted)
    answers = {"name": "answers", "kind": "exact_match", "file": str(family.tasks), "heldout": 0.25, "weight": 0}
    tasks = [*document(family)["tasks"], answers | {"max_new_tokens": 4}]
    models = 1 + len(family.parents)
    assert search("one", tasks=tasks)[0] == 2 * models
    count, words = search("two", tasks=tasks)
    assert count == 0 and "base: scored on the heldout split by an earlier search" in words
    names = ("result.json", "heldout_answers.jsonl", "history.jsonl")
    assert [(tmp_path / "one" / name).read_bytes() for name in names] == [
        (tmp_path / "two" / name).read_bytes() for name in names
    ]
    shutil.copytree(family.base, tmp_path / "copy")
    assert search("copied", tasks=tasks, base=str(tmp_path / "copy"))[0] == 0
    # The first example changes one of the splits, and its file's hash.
    lines = family.tasks.read_text().splitlines(keepends=True)
    (tmp_path / "edited.jsonl").write_text("".join([*lines[1:], lines[0]]))
    edited = [task | {"file": str(tmp_path / "edited.jsonl")} for task in tasks]
    assert search("edited", tasks=edited)[0] == 2 * models
    for file in (cache / "scores").iterdir():
        file.write_text(file.read_text()[:-9])
    assert search("damaged", tasks=tasks)[0] == 2 * models
    (tmp_path / "lengths.py").write_text("def lengths(records, outputs):\n    return [len(text) for text in outputs]\n")
    asked = {"name": "lengths", "kind": "function", "file": str(family.tasks), "heldout": 0.25, "max_new_tokens": 4,
             "function": "lengths.py:lengths"}  # fmt: skip
    assert [search(out, tasks=[asked])[0] for out in ("asked", "again")] == [2 * models] * 2


def test_a_large_file_is_hashed_again_only_once_it_has_changed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = list[Path]()

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_hash(path)

    def hashes() -> list[Path]:
        """The files that are read; the hashes are always the files'."""
        hashed.clear()
        assert kept_hashes.file_hashes(files) == {str(file): file_hash(file) for file in files}
        return sorted(hashed)

    monkeypatch.setattr(kept_hashes, "file_hash", counted)
    large, small = files = [tmp_path / "large", tmp_path / "small"]
    large.write_bytes(bytes(2**20))
    small.write_bytes(b"small")
    # A file that has just been written may change once more within the same tick of the clock.
    assert hashes() == hashes() == files
    monkeypatch.setattr(kept_hashes, "SETTLED", 0)
    assert hashes() == files and hashes() == [small]
    times = large.stat().st_atime_ns, large.stat().st_mtime_ns
    with large.open("r+b") as handle:
        handle.write(b"x")
    os.utime(large, ns=times)
    assert hashes() == files and hashes() == [small]
    large.rename(tmp_path / "moved")
    shutil.copy2(tmp_path / "moved", large)
    assert hashes() == files and hashes() == [small]
    (cache / "hashes.json").write_text("[")
    assert hashes() == files and hashes() == [small]


def test_scores_that_are_not_finite_and_the_oldest_are_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_scores, "MAX_FILES", 2)
    model, sizes = tmp_path / "model", {"text": 2}
    document = {"tasks": [{"kind": "likelihood"}], "search": {}, "inputs": {str(model / "weights"): "0123"}}
    kept = kept_scores.kept_scores(document, 1)
    assert kept is not None and kept_scores.kept_scores(document, 2) is None

    def scores(*values: float) -> TaskScores:
        return TaskScores({"text": {"log_likelihood": np.array([values], np.float32)}})

    kept.keep("heldout", model, sizes, scores(-0.1, np.nan))
    assert kept.read("heldout", model, sizes) is None
    for number, split in enumerate(("search", "heldout", "validation")):
        kept.keep(split, model, sizes, scores(-0.1, -1 / 3))
        file = max((cache / "scores").iterdir(), key=lambda each: each.stat().st_mtime_ns)
        os.utime(file, (number, number))
    read = kept.read("heldout", model, sizes)
    assert read is not None and (read.matrices["text"]["log_likelihood"] == np.float32([[-0.1, -1 / 3]])).all()
    assert kept.read("search", model, sizes) is None and kept.read("heldout", model, {"text": 3}) is None
    # A file that is whole JSON, with another digit.
    for file in (cache / "scores").iterdir():
        file.write_text(file.read_text().replace("-0.1", "-0.2"))
    assert kept.read("heldout", model, sizes) is None


# ---------------------------------------------------------------------------------------------------------------
# Compiled programs


def compiled(run: Path) -> list[dict[str, Any]]:
    """The sessions' counts of compiled programs."""
    return [session["compiled"] for session in read_json(run / "environment.json")["sessions"]]


SEARCH = "import sys; from evojax_merge.__main__ import main; main()"


def test_a_second_run_and_a_resumed_one_compile_nothing(family: Family, tmp_path: Path) -> None:
    """In processes of their own: what a run leaves in the folder of compiled programs serves the next one, on other
    random numbers and with answers in the held-out table as well."""
    answers = {"name": "answers", "kind": "exact_match", "file": str(family.tasks), "heldout": 0.25, "weight": 0}
    tasks = [*document(family)["tasks"], answers | {"max_new_tokens": 4}]
    config = write_config(tmp_path, family, tasks=tasks)
    other = ["--seed", "7"]
    runs = [("one", []), ("two", [])]
    if ALL:
        runs += [("three", other), ("three", [*other, "--resume", "--set", "search.generations=5"])]
    for out, options in runs:
        done = run_python(SEARCH, "search", config, "--out", tmp_path / out, *options)
        assert re.search(r"\ncompiling took [\d.]+ s, for [\d,]+ programs", done.stdout)
    (second,) = compiled(tmp_path / "two")
    assert second["programs"] == 0 and second["kept"] > 10, second
    if ALL:
        # Another number of distinct finalists is another shape for the least of the programs, which decodes genomes.
        assert all(session["programs"] <= 2 and session["kept"] > 10 for session in compiled(tmp_path / "three"))


def test_the_collector_is_as_it_was_after_imports() -> None:
    """Also where an import fails."""
    for was_enabled in (True, False):
        (gc.enable if was_enabled else gc.disable)()
        with contextlib.suppress(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == was_enabled
    gc.enable()


class Loads:
    """A backend that loads by tensors of a byte each, when it is allowed to."""

    def __init__(self, size: int, error: Exception | None = None) -> None:
        self.facts, self.may_load, self.began = SimpleNamespace(stored_bytes=size), Event(), Event()
        self.error, self.done = error, 0

    def load(self, devices: Any, progress: Any, folder: Any) -> str:
        self.began.set()
        assert self.may_load.wait(60)
        for _ in range(self.facts.stored_bytes):
            progress(1)
            self.done += 1
        if self.error is not None:
            raise self.error
        return "bank"


def shown_in(steps: list[int]) -> Any:
    """A phase whose steps are added to the list."""
    return lambda name, size: contextlib.nullcontext(steps.append)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_large_models_load_while_the_search_is_planned(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of a size above the limit has begun before it is asked for; either way all of it is shown."""
    monkeypatch.setattr(loading, "BESIDE_BYTES", limit)
    backend, steps, seconds = Loads(5), list[int](), list[float]()
    with loading.loading_beside(cast(Any, backend), ONE_DEVICE, None, seconds) as load:
        assert backend.began.wait(60) if limit == 0 else not backend.began.is_set()
        backend.may_load.set()
        assert load(shown_in(steps)) == "bank"
    assert sum(steps) == backend.done == 5 and len(seconds) == 1


def test_a_load_that_fails_beside_the_plan_is_reported_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BESIDE_BYTES", 0)
    backend = Loads(1, InputError(Path("model"), "NaN"))
    backend.may_load.set()
    with loading.loading_beside(cast(Any, backend), ONE_DEVICE, None, []) as load, pytest.raises(InputError):
        load(shown_in([]))


def test_a_search_that_is_refused_ends_its_load_at_the_next_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BESIDE_BYTES", 0)
    backend = Loads(10**9)

    def refused() -> None:
        with loading.loading_beside(cast(Any, backend), ONE_DEVICE, None, []):
            backend.may_load.set()
            raise ValueError("does not fit")

    with pytest.raises(ValueError, match="does not fit"):
        refused()
    assert backend.done < 10**9


AHEAD = """
import sys
from pathlib import Path
from threading import Event
from evojax_merge.evaluation.compilations import compilations, keep_compiled_programs
keep_compiled_programs()
from evojax_merge.steps.planning import compile_ahead
from evojax_merge.problem import build_problem, read_config
from evojax_merge.steps.selection import open_evaluators
import numpy as np
path = Path(sys.argv[1])
problem = build_problem(path, read_config(path, [], None))
prepared = problem.prepare()
compilations()
compile_ahead(problem, prepared, Event())
print(compilations().compiled)
on = open_evaluators(problem, prepared)
genomes = np.zeros((problem.strategy.population, problem.space.dims), np.float32) + problem.space.start
on.shards[0].score(genomes)
"""


@thorough
def test_what_is_compiled_ahead_is_what_a_generation_runs(family: Family, tmp_path: Path) -> None:
    """A pass that was compiled from headers alone is not compiled again for the evaluator."""
    config = write_config(tmp_path, family)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_LOG_COMPILES": "1"}
    done = subprocess.run([sys.executable, "-c", AHEAD, config], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1
    # JAX has the program in memory, or in its folder.
    asked, kept = done.stderr.count("Compiling jit(score)"), done.stderr.count("cache hit for 'jit_score'")
    assert asked - kept == 1


def test_programs_used_longest_ago_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilations, "MAX_COMPILED_BYTES", 250)
    for age, name in enumerate(("new", "middle", "old")):
        file = tmp_path / f"jit_{name}-cache"
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - 1000 * age,) * 2)
    (tmp_path / "mine").write_bytes(bytes(1000))
    compilations._remove_oldest(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["jit_middle-cache", "jit_new-cache", "mine"]
    compilations._remove_oldest(tmp_path / "none")
