"""More than one goal: fronts against pymoo, the strategies that search for them, and members from the table to the
model."""

import json
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import yaml
from helpers.commands import refusal, run_here
from helpers.families import build_family
from helpers.files import write_lines, write_yaml
from helpers.models import random_records, state
from helpers.sampling import sample, thorough
from helpers.searches import open_problem, search_config, search_in
from helpers.trees import search_trees
from hostile import start_command
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.optimize import minimize
from pymoo.problems import get_problem
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from test_racing import text_task

import evojax_merge as em
from evojax_merge.checkpoints.bank import load_bank, stored_tensors
from evojax_merge.config.search_config import Config, SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation import evaluator as evaluator_module
from evojax_merge.evaluation import generation
from evojax_merge.evaluation.scores import Scores, TaskScores
from evojax_merge.models.bank import take_candidate
from evojax_merge.models.sources import LazyMerge
from evojax_merge.problem import build_problem
from evojax_merge.search.fronts import crowded_order, crowding_distances, front_of, hypervolume, nondominated_ranks
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.protocols import capabilities_of
from evojax_merge.search.recording import Reporter
from evojax_merge.search.run_folder import open_run
from evojax_merge.search.seeding import seeded
from evojax_merge.search.strategies.registry import StrategySettings, make_strategy
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.tasks.gsm import GsmConfig
from evojax_merge.tasks.task import Responses

FRONT_STRATEGIES = ["pareto", "niches"]


# ---------------------------------------------------------------------------------------------------------------
# Fronts


def random_objectives(tasks: int, seed: int, ties: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 5, (60, tasks)).astype(float) if ties else rng.normal(size=(60, tasks))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_ranks_crowding_and_hypervolume_are_pymoos(tasks: int, ties: bool) -> None:
    for seed in range(5):
        objectives = random_objectives(tasks, seed, ties)
        _, theirs = NonDominatedSorting().do(-objectives, return_rank=True)
        ranks = nondominated_ranks(objectives)
        np.testing.assert_array_equal(ranks, theirs)
        for rank in np.unique(ranks):
            front = objectives[ranks == rank]
            expected = tasks * get_crowding_function("cd").do(front)
            np.testing.assert_allclose(crowding_distances(front), expected, rtol=1e-12, atol=1e-12)
        reference = np.quantile(objectives, 0.2, axis=0)
        assert hypervolume(objectives, reference) == pytest.approx(HV(ref_point=-reference)(-objectives), rel=1e-12)


def test_what_failed_is_dominated_by_all() -> None:
    objectives = random_objectives(2, 0, ties=True)
    failed = np.zeros(60, bool)
    failed[[3, 7, 8]] = True
    broken = objectives.copy()
    broken[3, 0], broken[7, 1], broken[8] = np.nan, np.nan, np.nan
    ranks = nondominated_ranks(broken)
    np.testing.assert_array_equal(ranks[~failed], nondominated_ranks(objectives[~failed]))
    assert (ranks[failed] == ranks[~failed].max() + 1).all()
    assert set(crowded_order(broken)[-3:]) == {3, 7, 8}
    assert not np.isin(front_of(broken), [3, 7, 8]).any()
    # Of the crowding of those that did not fail, nothing is told by those that did.
    np.testing.assert_array_equal(
        np.flatnonzero(~failed)[crowded_order(objectives[~failed])], crowded_order(broken)[:-3]
    )
    assert front_of(np.full((3, 2), np.nan)).size == 0 and hypervolume(broken[:0], np.zeros(2)) == 0


def test_a_front_has_each_point_once_and_its_ends_where_it_is_cut() -> None:
    objectives = np.array([[0, 4], [1, 3], [1, 3], [2, 2], [1, 1], [2.1, 1.9], [4, 0]], float)
    assert front_of(objectives).tolist() == [0, 1, 3, 5, 6]
    assert front_of(objectives, 4).tolist() == [0, 1, 5, 6]
    assert front_of(objectives, 2).tolist() == [0, 6]


# ---------------------------------------------------------------------------------------------------------------
# The strategies alone


def scores_of(means: np.ndarray) -> Scores:
    """float64[P, T] as scores on one example of each task."""
    count = means.shape[1]
    names = tuple(f"task{t}" for t in range(count))
    values = np.asarray(means, np.float32)
    return Scores(values, np.ones(means.shape, bool), np.arange(count), names, np.full(count, 1 / count))


def zdt1(genomes: np.ndarray) -> np.ndarray:
    """Minus the function ZDT1 (Zitzler et al., 2000) of float[P, D] in the unit cube."""
    first, rest = genomes[:, 0], 1 + 9 * genomes[:, 1:].mean(axis=1)
    return -np.stack([first, rest * (1 - np.sqrt(first / rest))], axis=1)


def make(name: str, dims: int = 6, population: int | None = 20, objectives: int = 2, sigma: float = 1 / 3) -> Any:
    return make_strategy("search", name, StrategySettings(dims, population, sigma, 60, objectives=objectives))


def drive(strategy: Any, function: Any, dims: int, generations: int, seed: int = 0) -> Any:
    current = strategy.init(generation_key(seed, INIT_KEY), np.full((1, dims), 0.5, np.float32))
    for number in range(generations):
        genomes, current = strategy.ask(generation_key(seed, number), current)
        assert genomes.shape == (strategy.population, dims) and ((genomes >= 0) & (genomes <= 1)).all()
        scores = scores_of(function(np.asarray(genomes, np.float64)))
        current = strategy.tell(generation_key(seed, number), current, genomes, scores)
    return current


def test_pareto_comes_as_near_to_the_front_as_pymoos_nsga2() -> None:
    reference = np.array([-1.1, -1.1])
    ours, theirs = [], []
    for seed in range(3):
        found = make("pareto").finalists(drive(make("pareto"), zdt1, 6, 60, seed))
        ours.append(hypervolume(zdt1(found.astype(float)), reference))
        peer = minimize(get_problem("zdt1", n_var=6), NSGA2(pop_size=20), ("n_gen", 60), seed=seed)
        theirs.append(hypervolume(-peer.F, reference))
    # 0.877 is the whole front's.
    assert np.median(ours) > 0.98 * np.median(theirs) and np.median(ours) > 0.8


def test_niches_keep_the_best_of_each_cell() -> None:
    strategy = make("niches")
    state = drive(strategy, zdt1, 6, 60)
    genomes, objectives = strategy.members(state)
    np.testing.assert_allclose(zdt1(genomes.astype(float)), objectives, atol=1e-6)
    found = strategy.finalists(state)
    assert hypervolume(zdt1(found.astype(float)), np.array([-1.1, -1.1])) > 0.7
    # The best in each task is among the finalists.
    np.testing.assert_allclose(zdt1(found.astype(float)).max(axis=0), objectives.max(axis=0), atol=1e-6)
    # In the archive of a task, whoever is better in the other has another cell.
    for task in range(2):
        there = np.isfinite(state.objectives[task]).all(axis=1)
        others = state.objectives[task][there][:, 1 - task]
        assert there.sum() > 3 and (np.diff(others) > 0).all()


@pytest.mark.parametrize("name", FRONT_STRATEGIES)
@pytest.mark.parametrize("objectives", sample([2, 3], 1))
def test_failures_ties_and_states(name: str, objectives: int) -> None:
    """What fails is never proposed; where all score alike the search goes on; states keep their structure."""

    def function(genomes: np.ndarray) -> np.ndarray:
        means = -np.square(genomes[:, :objectives] - 0.8)
        means[genomes[:, 0] < 0.5, objectives - 1] = np.nan
        return means

    strategy = make(name, objectives=objectives)
    first = strategy.init(generation_key(0, INIT_KEY), np.full((1, 6), 0.5, np.float32))
    state = drive(strategy, function, 6, 20)
    found = strategy.finalists(state)
    assert 0 < len(found) <= strategy.population and (found[:, 0] >= 0.5).all()
    assert strategy.metrics(state)["front"] >= len(found) and strategy.metrics(state)["hypervolume"] > 0
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
        assert np.shape(one) == np.shape(other) and np.asarray(one).dtype == np.asarray(other).dtype
    tied = drive(strategy, lambda genomes: np.zeros((len(genomes), objectives)), 6, 50)
    asked, _ = strategy.ask(generation_key(0, 50), tied)
    assert len(strategy.finalists(tied)) == 1 and np.std(asked, axis=0).mean() > 1e-3


@pytest.mark.parametrize("name", FRONT_STRATEGIES)
def test_seeds_are_members_where_they_are_good(name: str) -> None:
    ends = np.array([[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]], np.float32)
    strategy = seeded(make(name), ends)
    assert capabilities_of(strategy).keeps_front
    state = drive(strategy, zdt1, 6, 5)
    found = strategy.finalists(state)
    for end in ends:
        assert (found == end).all(axis=1).any()


# ---------------------------------------------------------------------------------------------------------------
# A search of two hills


@dataclass(frozen=True)
class Square:
    """A space of two numbers that are what they are."""

    dims: int = 2
    start: np.ndarray = field(default_factory=lambda: np.array([0.5, 0.5], np.float32))


@dataclass(frozen=True)
class TwoHills:
    """Two tasks, whose tops are at (0.2, 0.2) and (0.8, 0.8)."""

    tasks: tuple[Any, ...] = (text_task("low", 4), text_task("high", 6))

    def passes(self, population: int) -> int:
        return population

    def score(self, genomes: np.ndarray, progress: Any = lambda done: None) -> TaskScores:
        def scores(task: Any, top: float) -> np.ndarray:
            distance = np.square(genomes - top).sum(axis=1)[:, None]
            return -np.repeat(distance, task.size, axis=1).astype(np.float32)

        low, high = self.tasks
        return TaskScores({low.name: {low.metric: scores(low, 0.2)}, high.name: {high.metric: scores(high, 0.8)}})


class Stop(Exception):
    pass


class StopsAfter(Reporter):
    def __init__(self, generation: int) -> None:
        self.generation = generation

    def finished(self, generation: Any) -> None:
        if generation.number == self.generation:
            raise Stop


@pytest.mark.parametrize("name", FRONT_STRATEGIES)
def test_a_broken_off_search_goes_on_to_the_byte(name: str, tmp_path: Path) -> None:
    config = SearchConfig(strategy=name, population=8, generations=12)
    document = {"inputs": {}, "search": config.model_dump(mode="json")}

    def search(folder: Path, resume: bool = False, stop: int = 0) -> Any:
        run = open_run(folder, document, resume=resume, overwrite=False)
        return search_in(run.path, config, 1, Square(), [TwoHills()], None, StopsAfter(stop))

    whole = search(tmp_path / "whole")
    with pytest.raises(Stop):
        search(tmp_path / "parts", stop=5)
    parts = search(tmp_path / "parts", resume=True)
    np.testing.assert_array_equal(whole.proposed, parts.proposed)
    history = (tmp_path / "whole/history.jsonl").read_bytes()
    assert history == (tmp_path / "parts/history.jsonl").read_bytes()
    # The front lies between the two tops, and its volume has grown.
    assert len(whole.proposed) > 3 and np.abs(np.diff(whole.proposed, axis=1)).mean() < 0.15
    volumes = [json.loads(line)["hypervolume"] for line in history.splitlines()]
    assert volumes[-1] > volumes[0]


# ---------------------------------------------------------------------------------------------------------------
# From the search to a member's model


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    build_family(root, dtype=torch.bfloat16)
    # Which of two words is likelier, once as wanted, and once, after other prompts, the other way round.
    for answer, name in enumerate(("one", "other")):
        choice = {"choices": ["w7", "w9"], "answer": answer}
        write_lines(root / f"{name}.jsonl", [record | choice for record in random_records(8, seed=answer)])
    document = search_config(
        None, 3, 6, space={"method": "task_arithmetic", "parameters": {"weight": {"low": -1.0, "high": 2.0}}},
        tasks=[
            {"name": "one", "kind": "multiple_choice", "metric": "margin", "file": "one.jsonl"},
            {"name": "other", "kind": "multiple_choice", "metric": "margin", "file": "other.jsonl", "weight": 0.5},
        ],
        search={"strategy": "pareto", "finalists": 2}, seed=3,
    )  # fmt: skip
    return write_yaml(root / "config.yaml", document)


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "front"
    done = run_here("search", config_file, "--out", out)
    (out.parent / "stdout").write_text(done.stdout)
    return out


def test_the_front_is_shown_wherever_the_winner_is(finished: Path) -> None:
    run = em.open_run(finished)
    members = run.front
    assert [one["member"] for one in members] == list(range(1, len(members) + 1)) and len(members) > 1
    scores = np.array([list(one["scores"].values()) for one in members])
    assert list(members[0]["scores"]) == list(members[0]["heldout_scores"]) == ["one/margin", "other/margin"]
    # None is better than another in both; from the best in the first task to the best in the second.
    assert (nondominated_ranks(scores) == 0).all()
    assert (np.diff(scores[:, 0]) < 0).all() and (np.diff(scores[:, 1]) > 0).all()
    assert [one["fitness"] for one in members] == pytest.approx((scores @ [2 / 3, 1 / 3]).tolist())
    # The winner is the member whose weighted mean is best.
    winner = max(members, key=lambda one: one["fitness"])
    assert winner["genome"] == run.result["genome"] and winner["fitness"] == run.result["search_fitness"]["winner"]
    row = next(row for row in run.table if row["role"] == "winner")
    assert winner["heldout_fitness"] == pytest.approx(row["heldout_fitness"], abs=1e-5)
    recipes = finished / "best/front"
    assert {file.name for file in recipes.iterdir()} == {f"member-{one['member']}.yaml" for one in members}
    assert (recipes / f"member-{winner['member']}.yaml").read_bytes() == (finished / "best/recipe.yaml").read_bytes()
    stdout, card = (finished.parent / "stdout").read_text(), (finished / "best/model/README.md").read_text()
    for text in (stdout, card):
        # A narrow column folds what it names.
        assert f"member {winner['member']} (the" in text and "other/margin" in text
        assert all(f"{one['scores']['other/margin']:.4f}" in text for one in members)
    assert all(row["front"] >= 1 and row["hypervolume"] >= 0 for row in run.history)


def test_an_exported_member_is_what_was_scored_bit_for_bit(finished: Path, config_file: Path, tmp_path: Path) -> None:
    problem = open_problem(config_file)
    spec = problem.backend.candidates.spec
    bank = load_bank(problem.backend.models.sources, problem.backend.models.decoder, spec)
    members = em.open_run(finished).front
    genomes = np.array([one["genome"] for one in members], np.float32)
    recipes = problem.space.decode(genomes)
    materialise = jax.jit(lambda recipe: LazyMerge.of(bank, recipe, spec).materialise())
    for member in (members[0], members[-1]):
        number = member["member"]
        run_here("export", finished, tmp_path / f"model{number}", "--member", number)
        written = state(tmp_path / f"model{number}")
        scored = dict(stored_tensors(materialise(take_candidate(recipes, number - 1)), problem.backend.models.decoder))
        assert set(written) == set(scored)
        for name, values in written.items():
            np.testing.assert_array_equal(np.asarray(scored[name], np.float32), values, err_msg=name)
    first, last = (state(tmp_path / f"model{one['member']}") for one in (members[0], members[-1]))
    assert any((first[name] != last[name]).any() for name in first)
    # And it has the scores of the table.
    full = open_evaluator(problem, problem.prepare().search)
    means = full.score(genomes).matrices["one"]["margin"].mean(axis=1)
    np.testing.assert_allclose(means, [one["scores"]["one/margin"] for one in members], atol=1e-6)


@thorough
def test_a_run_that_goes_on_replaces_its_front(finished: Path, config_file: Path, tmp_path: Path) -> None:
    """In two parts, the first of which ends with a front of its own: in the end all is as in one."""
    for more in (["--set", "search.generations=2"], ["--resume"]):
        run_here("search", config_file, "--out", tmp_path / "parts", *more)
    for name in ("history.jsonl", "result.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (finished / name).read_bytes()
    fronts = [
        {file.name: file.read_bytes() for file in (run / "best/front").iterdir()}
        for run in (tmp_path / "parts", finished)
    ]
    assert fronts[0] == fronts[1]
    for kept in (tmp_path / "parts/winners").glob("*"):
        assert (kept / "front/member-1.yaml").is_file()


@thorough
def test_killed_and_resumed_is_as_never_stopped(finished: Path, config_file: Path, tmp_path: Path) -> None:
    # Of the same name, which stands in the card.
    out = tmp_path / finished.name
    process = start_command("search", config_file, "--out", out)
    while not (out / "history.jsonl").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    run_here("search", config_file, "--out", out, "--resume")
    left, whole = (
        {name: file.read_bytes() for name, file in files_of(run).items() if not name.startswith("checkpoints/")}
        for run in (out, finished)
    )
    assert set(left) == set(whole) and sum(name.startswith("best/front/") for name in left) > 1
    for name in set(whole) - {"timing.jsonl", "report.html", "environment.json", "run.log"}:
        assert left[name] == whole[name], name


def files_of(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--member", "99"], "--member: 99; expected a member of "),
        (["--member", "0"], "--member: 0; expected a member of "),
        (["--member", "first"], "--member"),
        (["--member", "1", "--best-so-far"], "--member: cannot go with --best-so-far"),
    ],
)
def test_a_member_that_is_not_there_is_told(arguments: list[str], said: str, finished: Path, tmp_path: Path) -> None:
    line = refusal("export", finished, tmp_path / "out", *arguments)
    assert said in line and not (tmp_path / "out").exists()


def test_a_run_without_a_front_has_no_members(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/best/front")
    done = run_here("export", tmp_path / "run", tmp_path / "out", "--member", 1, status=2)
    assert "has no front to take a member from" in done.stderr
    assert not capabilities_of(
        make_strategy("search", "random", StrategySettings(2, 4, 0.1, 1, objectives=2))
    ).keeps_front


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["tasks.1.weight=0"], "search.strategy: pareto: has one objective here; expected two tasks or more"),
        (["tasks.1.weight=0", "search.strategy=niches"], "niches: has one objective here"),
        (["search.rungs=2"], "rungs=2: a race stops candidates by their weighted fitness, and pareto compares"),
        (["search.population=5000"], "population=5000: 5,000; pareto takes 4,096 at most"),
    ],
)
def test_a_search_that_has_no_front_is_refused(
    options: list[str], said: str, config_file: Path, tmp_path: Path
) -> None:
    sets = [part for option in options for part in ("--set", option)]
    line = refusal("search", config_file, "--out", tmp_path / "run", *sets)
    assert said in line and not (tmp_path / "run").exists()


def test_what_the_strategies_cannot_take_is_told() -> None:
    with pytest.raises(InputError, match=r"^search\.strategy: niches: has 10 objectives here, .* expected 9 tasks"):
        make("niches", objectives=10)
    with pytest.raises(InputError, match=r"^search\.strategy: niches: its archives would hold "):
        make("niches", dims=2**22, population=2)
    parents = [{"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}]
    with pytest.raises(InputError, match=r"search.*strategy: pareto: has one objective here"):
        search_trees(parents, lambda merged: merged["w"].sum(), strategy="pareto")


# ---------------------------------------------------------------------------------------------------------------
# How long an answer is


def test_brevity_is_shown_where_it_is_asked_for(config_file: Path) -> None:
    sums = {"name": "sums", "kind": "exact_match", "file": "tasks.jsonl", "pattern": r"w\d+ w\d+", "max_new_tokens": 4}
    document = yaml.safe_load(config_file.read_text())
    document["tasks"] = [sums, sums | {"name": "short", "metric": "brevity"}]
    problem = build_problem(config_file, Config.model_validate(document))
    accuracy, short = problem.splits.search
    texts = [["w1 w2", "", "w1"], ["w3", "w4 w5 w6", " "]]
    task = short.subset([0, 1, 2])
    responses = Responses(np.zeros((2, 0)), np.zeros(0, int), np.zeros((2, 0), bool), texts)
    np.testing.assert_array_equal(task.score(responses)["brevity"], [[-5, 0, -2], [-2, -8, -1]])
    assert set(accuracy.subset([0, 1, 2]).score(responses)) == {"accuracy"}
    assert short.companion() is None and short.extraction_failure([""]) is None
    assert not np.signbit(task.score(responses)["brevity"][0, 1])
    # What both ask alike is written once.
    full = open_evaluator(problem, problem.prepare().search)
    asked: list[str] = []

    def counted(evaluator: Any, population: Any, batched_task: Any, progress: Any) -> Any:
        asked.append(batched_task.task.name)
        return (yield from generation.generate(evaluator, population, batched_task, progress))

    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator_module, "generate", counted)
        scores = full.score(problem.space.start[None], steps.append)
    assert asked == ["sums"] and sum(steps) == full.passes(1)
    assert scores.outputs["sums"] == scores.outputs["short"]
    np.testing.assert_array_equal(
        scores.matrices["short"]["brevity"][0], [-len(text) for text in scores.outputs["sums"][0]]
    )


def test_a_metric_that_nobody_asked_for_is_not_in_a_runs_config() -> None:
    section = {"name": "sums", "kind": "gsm", "source": "gsm.jsonl"}
    assert "metric" not in GsmConfig.model_validate(section).model_dump(mode="json")
    asked = GsmConfig.model_validate(section | {"metric": "brevity"})
    assert asked.model_dump(mode="json")["metric"] == "brevity"
    assert GsmConfig.model_validate(asked.model_dump(mode="json")) == asked
