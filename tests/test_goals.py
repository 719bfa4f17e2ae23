"""The goal of a search: tasks measured by the parents' scores, guards, and the answers that were won and lost."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import toy_backend
import yaml
from click.testing import CliRunner
from helpers.commands import output_of, run_here
from helpers.files import read_lines
from helpers.sampling import sample
from helpers.searches import problem_of
from helpers.trees import search_trees
from test_backend_seam import config_file, register_toy, write_networks
from test_defaults import BASE, PARENTS, likeness

import evojax_merge as em
from evojax_merge.cli import cli
from evojax_merge.evaluation.scores import Goal, Guard, Scale, TaskScores, fitness, ranked_fitness
from evojax_merge.problem import SearchProblem, build_problem, config_from, resolved_document
from evojax_merge.report.answers import MOST_EXAMPLES, marked, read_answers
from evojax_merge.report.comparison import Result
from evojax_merge.report.page import write_page
from evojax_merge.report.run_data import read_run
from evojax_merge.search.loop import evolve
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.steps.planning import make_plan
from evojax_merge.steps.selection import open_evaluators, select_best
from evojax_merge.tasks.task import Opening, TaskKind


class StretchedConfig(toy_backend.BlobsConfig):
    """The blobs, in another unit."""

    kind: Literal["stretched"]  # type: ignore[assignment]
    factor: float


def open_stretched(config: StretchedConfig, opening: Opening) -> em.ArrayTask:
    blobs = toy_backend.open_blobs(config, opening)
    function = blobs.function
    return replace(blobs, metric="stretched", function=lambda model, rows: config.factor * function(model, rows) - 7.0)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    register_toy(monkeypatch, TaskKind(StretchedConfig, open_stretched))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Any]:
    return write_networks(tmp_path)


def right(**changes: Any) -> dict[str, Any]:
    return {"name": "right", "kind": "blobs", "angle": 0.3, "heldout": 0.25} | changes


def stretched(factor: float = 100.0, **changes: Any) -> dict[str, Any]:
    return {"name": "up", "kind": "stretched", "angle": 2.8, "heldout": 0.25, "factor": factor, "weight": 0.5} | changes


SEARCH = {"generations": 3, "population": 6}
METHOD = {"method": "task_arithmetic", "parameters": {"weight": {"low": 0.0, "high": 1.5}}}


def searched(folder: Path, name: str, tasks: list[dict[str, Any]], **changes: Any) -> tuple[em.Run, str]:
    """A run of the toy, and its output."""
    config = config_file(folder, **{"tasks": tasks, "space": METHOD, "search": SEARCH, **changes})
    output = output_of("search", config, "--out", folder / name)
    return em.open_run(folder / name), " ".join(output.split())


def opened(folder: Path, tasks: list[dict[str, Any]], **changes: Any) -> tuple[SearchProblem, dict[str, Any]]:
    """A search of the toy, and its config as a run folder has it."""
    config = config_file(folder, **{"tasks": tasks, "space": METHOD, "search": SEARCH, **changes})
    parsed = config_from(config, yaml.safe_load(config.read_text()), [], None)
    problem = build_problem(config, parsed)
    return problem, resolved_document(parsed, problem)


def evolved(folder: Path, tasks: list[dict[str, Any]], **changes: Any) -> tuple[list[dict[str, Any]], Result]:
    """The history and the result of a search in memory."""
    problem, _ = opened(folder, tasks, **changes)
    storage, on = Storage(), open_evaluators(problem, problem.prepare())
    archive = evolve(problem, on, storage, Reporter())
    return storage.read_history(), select_best(problem, on, archive)


# ---------------------------------------------------------------------------------------------------------------
# The sum


@dataclass(frozen=True)
class Named:
    name: str
    weight: float = 1.0
    metric: str = "score"
    size: int = 2


def scores_of(**means: list[float]) -> TaskScores:
    return TaskScores({name: {"score": np.repeat(np.float32(values)[:, None], 2, 1)} for name, values in means.items()})


def test_a_task_counts_in_units_of_its_scale() -> None:
    tasks, scores = [Named("a", 3.0), Named("b")], scores_of(a=[0.5, 0.75], b=[-20.0, -10.0])
    goal = Goal({"a/score": Scale(0.5, 0.25), "b/score": Scale(-30.0, 20.0)})
    assert fitness(tasks, scores, goal).tolist() == [0.75 * 0 + 0.25 * 0.5, 0.75 * 1 + 0.25 * 1]
    assert fitness(tasks, scores).tolist() == [0.75 * 0.5 - 0.25 * 20, 0.75 * 0.75 - 0.25 * 10]
    # A scale is that of a metric, not of the companion that has the task's name.
    assert fitness([tasks[0]], scores, Goal({"a/other": Scale(0.5, 0.25)})).tolist() == [0.5, 0.75]


def test_who_keeps_the_guards_is_better_than_who_does_not() -> None:
    tasks = [Named("goal"), Named("kept")]
    scores = scores_of(goal=[-5e8, 0.0, 9.0, 7.0, 8.0, np.nan], kept=[1.0, 1.0, 0.5, 0.4999, 0.9999999, 1.0])
    goal = Goal(guards={"kept": Guard(1.0, 0.0)})
    ranked = ranked_fitness(tasks, scores, goal)
    # The two last of these differ in float32 as well, which strategies compute in.
    assert np.argsort(-ranked.astype(np.float32), kind="stable").tolist()[:5] == [4, 1, 0, 2, 3]
    assert len(set(ranked.astype(np.float32)[:5].tolist())) == 5 and np.isnan(ranked[5])
    assert ranked[4] == fitness(tasks, scores)[4], "what differs in rounding alone keeps the guard"
    wide = ranked_fitness(tasks, scores, Goal(guards={"kept": Guard(1.0, 0.6)}))
    assert np.array_equal(wide, fitness(tasks, scores), equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------
# scale: parents


def test_unlike_metrics_are_measured_by_the_parents(models: dict[str, Any], tmp_path: Path) -> None:
    run, output = searched(tmp_path, "run", [right(), stretched()])
    assert run.config["scale"] == "parents"
    problem = problem_of(tmp_path / "config.yaml", run.config)
    scales = (run.result or {})["scales"]
    for task in problem.splits.search:
        base, one, two = (float(np.mean(task.function(models[name], *task.rows))) for name in ("base", "one", "two"))
        assert scales[f"{task.name}/{task.metric}"] == pytest.approx(
            {"zero": base, "unit": abs(max(one, two) - base)}, rel=1e-4, abs=1e-5
        )
        assert f"scale of task {task.name} ({task.metric}): 0 is" in output
    assert "Fitness measures tasks by the parents' scores" in output
    for row in run.history:
        means = row["task_scores"]
        parts = [
            share * (np.array(means[name]) - scales[score]["zero"]) / scales[score]["unit"]
            for share, name, score in ((2 / 3, "right", "right/score"), (1 / 3, "up", "up/stretched"))
        ]
        assert row["fitness"] == pytest.approx(np.sum(parts, axis=0).tolist(), abs=1e-5)
    (table_base,) = (row for row in run.table if row["role"] == "base")
    assert abs(table_base["heldout_fitness"]) < 1.0 and abs(table_base["heldout_scores"]["up/stretched"]) > 5

    # Resumed, it is the same to the byte.
    config = tmp_path / "config.yaml"
    run_here("search", config, "--out", tmp_path / "parts", "--set", "search.generations=2")
    run_here("search", config, "--out", tmp_path / "parts", "--resume")
    for name in ("history.jsonl", "result.json", "heldout_answers.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


@pytest.mark.parametrize(
    "search", sample([SEARCH, {**SEARCH, "rungs": 2}, {"generations": 3, "population": 2, "strategy": "gradient"}], 1)
)
def test_the_unit_of_a_metric_makes_no_difference(search: Any, models: dict[str, Any], tmp_path: Path) -> None:
    rows, others = (evolved(tmp_path, [right(), stretched(factor)], search=search)[0] for factor in (1.0, 1024.0))
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(row["genomes"], other["genomes"], atol=2e-3)
        np.testing.assert_allclose(row["fitness"], other["fitness"], atol=2e-3)


def test_scores_of_one_metric_are_added_up_as_they_are(models: dict[str, Any], tmp_path: Path) -> None:
    alike = [right(), right(name="up", angle=2.8)]
    problem, document = opened(tmp_path, alike)
    assert problem.scale == "none" and "scale" not in document
    problem, document = opened(tmp_path, alike, scale="parents")
    assert problem.scale == document["scale"] == "parents"
    problem, document = opened(tmp_path, [right(), stretched()], scale="none")
    assert problem.scale == document["scale"] == "none"
    # A task that is only shown has no say.
    assert opened(tmp_path, [right(), stretched(weight=0.0)])[0].scale == "none"


def test_a_task_that_tells_no_parent_from_the_base_counts_as_it_is(models: dict[str, Any], tmp_path: Path) -> None:
    run, output = searched(tmp_path, "run", [right(), stretched(0.0)])
    assert "scale of task up (stretched): none, because the base and the best parent both score -7" in output
    assert set((run.result or {})["scales"]) == {"right/score"}
    said_so = "On the held-out examples of up (stretched) every model of the table scores -7.0000"
    assert said_so in output and said_so in (run.path / "report.html").read_text(encoding="utf-8")


def test_without_a_base_the_worst_parent_is_at_zero(models: dict[str, Any], tmp_path: Path) -> None:
    linear = {"method": "linear"}
    problem, _ = opened(tmp_path, [right(), stretched()], space=linear, base=None)
    lines: list[str] = []
    goal = open_evaluators(problem, problem.prepare(), log=lines.append).search.goal
    assert len(lines) == 2 and all("(the worst parent" in line and ", 1 is" in line for line in lines)
    for task in problem.splits.search:
        one, two = (float(np.mean(task.function(models[name], *task.rows))) for name in ("one", "two"))
        scale = goal.scales[f"{task.name}/{task.metric}"]
        assert (scale.zero, scale.unit) == pytest.approx((min(one, two), abs(one - two)), rel=1e-4)


def test_every_split_has_one_scale_and_the_plan_counts_its_measure(models: dict[str, Any], tmp_path: Path) -> None:
    problem, _ = opened(tmp_path, [right(), stretched()], search={**SEARCH, "validation": 0.25})
    prepared = problem.prepare()
    on = open_evaluators(problem, prepared)
    assert on.validation is not None and on.validation.goal.scales == on.search.goal.scales == on.heldout.goal.scales
    assert len(on.search.goal.scales) == 2
    assert make_plan(problem, prepared).run.flops > make_plan(replace(problem, scale="none"), prepared).run.flops


# ---------------------------------------------------------------------------------------------------------------
# Guards

GUARDED = right(name="kept", angle=2.8, weight=0.0, guard=True)


def test_a_guard_keeps_the_winner_as_good_as_the_base(models: dict[str, Any], tmp_path: Path) -> None:
    free, result = evolved(tmp_path, [right(), right(name="kept", angle=2.8, weight=0.0)])
    base, *_, lost = (row.scores["kept/score"] for row in result.rows)
    assert lost < base - 0.05, "without a guard the winner loses what nobody asked for"
    run, output = searched(tmp_path, "run", [right(), GUARDED])
    (guard,) = (run.result or {})["guards"]
    assert guard["kept"] and guard["score"] == "kept/score" and guard["winner"] >= guard["base"] - 1e-4
    sentence = "The winner keeps the guard of kept (score): it has"
    assert sentence in output and sentence in (run.path / "report.html").read_text(encoding="utf-8")
    assert "weight 0, guarded" in (run.path / "best/model/README.md").read_text()
    broken = 0
    for row in run.history:
        for value, mean in zip(row["fitness"], row["task_scores"]["kept"], strict=True):
            assert (value is None) == (mean < guard["base"] - 1e-4)
        assert row["guards_broken"] == row["fitness"].count(None) and row["failed"] == 0
        assert row["best_so_far"] is None or row["best_so_far"] > -100
        broken += row["guards_broken"]
    assert broken, "the unguarded optimum lies beyond the guard"
    # The fitness is that of the other task alone.
    assert all(
        value in (None, pytest.approx(mean, abs=1e-6))
        for row in run.history
        for value, mean in zip(row["fitness"], row["task_scores"]["right"], strict=True)
    )
    tolerant, result = evolved(tmp_path, [right(), {**GUARDED, "tolerance": 1000.0}])
    assert [row["guards_broken"] for row in tolerant] == [0, 0, 0] and result.guards[0].kept
    assert [row["genomes"] for row in tolerant] == [row["genomes"] for row in free]


def test_where_none_keeps_the_guards_the_winner_breaks_them_least(models: dict[str, Any], tmp_path: Path) -> None:
    far = {"method": "task_arithmetic", "parameters": {"weight": {"low": 1.2, "high": 1.5}}, "fixed": {"lambda": 2.0}}
    run, output = searched(tmp_path, "run", [right(), GUARDED], space=far)
    assert "None of the candidates that the winner was chosen from keeps every guard: it breaks them least." in output
    assert "The winner BREAKS the guard of kept (score)" in output
    (guard,) = (run.result or {})["guards"]
    assert not guard["kept"] and run.history[-1]["best_so_far"] is None
    assert any("BREAKS the guard" in line for line in run.warnings)
    means = [mean for row in run.history for mean in row["task_scores"]["kept"]]
    assert guard["winner"] >= max(means) - 1e-4
    # The page of a run without a fitness to draw is a page.
    assert "BREAKS" in (run.path / "report.html").read_text(encoding="utf-8")


def test_guards_are_kept_on_the_split_that_decides(models: dict[str, Any], tmp_path: Path) -> None:
    tasks = [right(limit=10), {**GUARDED, "limit": 12}]
    problem, _ = opened(tmp_path, tasks, search={**SEARCH, "validation": 0.3})
    on = open_evaluators(problem, problem.prepare())
    assert on.validation is not None
    for evaluator in (on.shards[0], on.search, on.validation):
        (task,) = (task for task in evaluator.tasks if task.name == "kept")
        mean = float(np.mean(task.function(models["base"], *task.rows)))
        assert evaluator.goal.guards == {"kept": Guard(pytest.approx(mean, abs=1e-5), 0.0)}
    assert len({evaluator.goal.guards["kept"].base for evaluator in (on.shards[0], on.search, on.validation)}) == 3
    guarded, free = (make_plan(one, problem.prepare()).run.flops for one in (problem, replace(problem, guards={})))
    assert guarded > free
    _, result = evolved(tmp_path, tasks, search={**SEARCH, "validation": 0.3})
    assert result.validation is not None and result.guards[0].kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [right(), {**GUARDED, "tolerance": -1}]}, "tasks[1].tolerance"),
        ({"tasks": [right(), right(name="kept", tolerance=0.1)]}, "tolerance: is that of a guard"),
        ({"tasks": [right(), GUARDED], "base": None, "space": {"method": "linear"}}, "tasks[1].guard: true: compares"),
        ({"tasks": [right(), GUARDED], "search": {**SEARCH, "rungs": 2}}, "tasks[1].guard: true: a race (search.rungs"),
        ({"tasks": [right(), GUARDED], "search": {**SEARCH, "strategy": "gradient"}}, "the strategy gradient does not"),
        ({"tasks": [GUARDED]}, "all weights are 0"),
        ({"scale": "parent"}, "scale: expected none or parents"),
        ({"scale": "parents", "base": None, "parents": ["one"], "space": {"method": "linear"}}, "there is one parent"),
    ],
    ids=str,
)  # fmt: skip
def test_goals_without_a_meaning_are_refused(
    changes: Any, message: str, models: dict[str, Any], tmp_path: Path
) -> None:
    config = config_file(tmp_path, **{"tasks": [right()], "space": METHOD, "search": SEARCH, **changes})
    result = CliRunner().invoke(cli, ["search", str(config), "--out", str(tmp_path / "run")])
    assert message in str(result.exception) + result.output, (result.output, result.exception)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------
# Wins and losses


def test_a_run_keeps_every_held_out_answer(models: dict[str, Any], tmp_path: Path) -> None:
    run, _ = searched(tmp_path, "run", [right(), stretched(), right(name="shown", weight=0.0)])
    rows = read_lines(run.path / "heldout_answers.jsonl")
    parent = (run.result or {})["better_than"]["parent"]["name"]
    parents = [row for row in run.table if row["role"] == "parent"]
    opened = read_answers(read_run(run.path))
    assert opened is not None
    for pairs, score in zip(opened, run.table[0]["heldout_scores"], strict=True):
        # The winner stands beside the parent that is best in the task.
        best = max(parents, key=lambda row: row["heldout_scores"][score])
        assert (pairs.task, pairs.parent) == (score.partition("/")[0], best["name"])
        for table_row in (best, run.table[-1]):
            mean = table_row["heldout_scores"][score]
            values = [row["score"] for row in rows if (row["model"], row["task"]) == (table_row["name"], pairs.task)]
            assert len(values) == 15 and np.mean(values) == pytest.approx(mean, abs=1e-4)
        assert pairs.won + pairs.lost + pairs.equal == 15 and len(pairs.shown) == pairs.won + pairs.lost
        gaps = [abs(pair.scores[0] - pair.scores[1]) for pair in pairs.shown]
        assert gaps == sorted(gaps, reverse=True) and all(pair.texts is None for pair in pairs.shown)
    assert "Wins and losses" in (run.path / "report.html").read_text(encoding="utf-8")
    _texts_on_the_page(run.path, parent)


def _texts_on_the_page(folder: Path, parent: str) -> None:
    """Answers in words, hostile ones, stand side by side; a damaged file is a note."""
    file, hostile = folder / "heldout_answers.jsonl", "<script>alert(1)</script>"

    def row(model: str, number: int, score: float | None, text: str) -> str:
        answer = {"model": model, "task": "right", "example": f"d.jsonl:{number}", "score": score, "outputs": [text]}
        return json.dumps(answer | {"target": hostile, "prompt": f"Sum {number}? {hostile}"}) + "\n"

    file.write_text(
        "".join(row("evolved task_arithmetic", n, n % 3 / 2, f"the sum is {n} {hostile} \x1b[2J") for n in range(900))
        + "".join(row(parent, n, None if n == 4 else 0.5, f"the sum is {n + 1} " + "x" * 5000) for n in range(900))
    )
    data = write_page(RunFolder(folder))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"right, beside {parent}: 301 won, 300 lost, 299 equal" in page
    assert page.count('<details class="pair">') == MOST_EXAMPLES and f"{MOST_EXAMPLES} of 601 examples" in page
    assert "Sum 4? &lt;script&gt;" in page
    assert hostile not in page and "&lt;" in page and "\x1b" not in page and len(page) < 2_000_000
    opened = read_answers(data)
    assert opened is not None and opened[0].shown[0].example == "d.jsonl:4"

    active = row(parent, 1, 1.0, "").replace('"outputs"', '"thumbnail": "javascript:alert(1)", "outputs"')
    for damage in ("{", "[]\n", row("someone", 1, 1.0, ""), row(parent, 1, 1.0, ""), active):
        file.write_text(damage)
        noted = write_page(RunFolder(folder)).notes
        assert any("heldout_answers.jsonl cannot be read" in note for note in noted), damage
    file.unlink()
    assert not write_page(RunFolder(folder)).notes


def test_words_that_the_other_has_not_are_marked() -> None:
    assert marked("the sum is 41 .", "the sum is 42 .") == (
        "the sum is <mark>41 </mark>.", "the sum is <mark>42 </mark>.",
    )  # fmt: skip
    assert marked("a <b>", "a") == ("a <mark> &lt;b&gt;</mark>", "a") or "&lt;" in marked("a <b>", "a")[0]
    assert marked("答えは四", "答えは五") == ("答えは<mark>四</mark>", "答えは<mark>五</mark>")
    assert marked("same", "same") == ("same", "same") and marked("", "x") == ("", "<mark>x</mark>")


def test_texts_that_would_take_minutes_are_marked_behind_their_common_beginning() -> None:
    first, second = ("".join(rng.choice(["!", "?"], 1000)) for rng in map(np.random.default_rng, (0, 1)))
    assert marked(f"so {first}", f"so {second}") == tuple(f"so <mark>{text}</mark>" for text in (first, second))
    assert marked("!" * 1000, "!" * 1000) == ("!" * 1000, "!" * 1000)
    assert marked("!" * 999, "!" * 1000) == ("!" * 999, "!" * 999 + "<mark>!</mark>")


# ---------------------------------------------------------------------------------------------------------------
# The case that began with a winner worse than its own parent


@pytest.mark.parametrize("seed", sample(range(10), 2))
def test_five_generations_of_six_lose_no_parent_at_its_best(seed: int) -> None:
    result = search_trees(
        PARENTS, likeness, base=BASE, method="task_arithmetic", parameters={"weight": {"low": 0.0, "high": 1.5}},
        generations=5, population=6, seed=seed,
    )  # fmt: skip
    assert result.best.fitness >= float(likeness(PARENTS[1])) - 1e-6
