"""`strategy: auto` and budgets: what is chosen for which search, the passes that a budget pays for, the search that the
clock ends, and runs that go on and are reproduced."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.commands import command, run_here
from helpers.families import Family
from helpers.files import write_yaml
from helpers.sampling import thorough
from helpers.searches import search_config, search_in
from helpers.trees import search_trees
from pydantic import ValidationError
from test_racing import Hill, Plain, one_token, text_task

import evojax_merge as em
from evojax_merge import host_callback
from evojax_merge.api.trials import open_run
from evojax_merge.commands.search import _resolved_stage
from evojax_merge.config.documents import explain
from evojax_merge.config.search_config import MAX_GENERATIONS, Config, SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.problem import build_problem, read_config, stage_configs
from evojax_merge.search import loop
from evojax_merge.search.auto import STEPS, Traits, choose, gradient_note
from evojax_merge.search.budgets import describe_length, search_passes, within_budget
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import read_result
from evojax_merge.search.strategies.registry import StrategySettings, make_strategy
from evojax_merge.search.successive_halving import stratified_shards

# ---------------------------------------------------------------------------------------------------------------
# The choice

FITNESS, COMPANION, NEITHER = Traits("fitness", 256), Traits("companion", 256), Traits(None, 256)


@pytest.mark.parametrize(
    ("traits", "named", "expected"),
    [
        (FITNESS, {}, {"strategy": "gradient", "generations": STEPS, "minibatches": 4, "population": None}),
        (FITNESS, {"generations": 50}, {"strategy": "gradient", "generations": 50}),
        (FITNESS, {"population": 16}, {"strategy": "gradient", "population": None}),
        (Traits("fitness", 40), {}, {"minibatches": 2}),
        (Traits("fitness", 8), {}, {"strategy": "gradient", "minibatches": 1}),
        (FITNESS, {"gradient": {"minibatches": 8}}, {"minibatches": 8}),
        (FITNESS, {"gradient": {"learning_rate": 0.01}}, {"minibatches": 4, "learning_rate": 0.01}),
        (FITNESS, {"stop": {"stagnation": 20}}, {"strategy": "gradient", "minibatches": 4}),
        (FITNESS, {"budget": "500 passes"}, {"generations": STEPS, "budget": None}),
        (FITNESS, {"budget": "90 passes"}, {"strategy": "gradient", "budget": "90 passes"}),
        (FITNESS, {"budget": "2h"}, {"generations": STEPS, "budget": None, "seconds": 7200.0}),
        (FITNESS, {"budget": "2h", "stop": {"seconds": 60}}, {"generations": STEPS, "seconds": 60.0}),
        # A race is one of candidates that are drawn.
        (FITNESS, {"rungs": 3}, {"strategy": "hybrid", "rungs": 3, "minibatches": 4}),
        (COMPANION, {}, {"strategy": "hybrid", "minibatches": 4, "steps": None, "rungs": 1}),
        (COMPANION, {"budget": "900 passes"}, {"strategy": "hybrid", "steps": 80, "budget": "900 passes"}),
        (COMPANION, {"budget": "54 passes"}, {"strategy": "hybrid", "steps": 16}),
        (COMPANION, {"budget": "2h"}, {"strategy": "hybrid", "steps": 80, "budget": "2h"}),
        (COMPANION, {"gradient": {"generations": 7}}, {"strategy": "hybrid", "steps": 7}),
        (NEITHER, {}, {"strategy": "cma_es", "rungs": 4, "generations": 50, "seeds": None}),
        (Traits(None, 64), {"population": 16}, {"strategy": "cma_es", "rungs": 3, "population": 16}),
        (Traits(None, 31), {}, {"strategy": "cma_es", "rungs": 1}),
        (NEITHER, {"rungs": 1}, {"strategy": "cma_es", "rungs": 1}),
        (Traits("fitness", 256, is_guarded=True), {}, {"strategy": "cma_es", "rungs": 1}),
        (Traits(None, 256, has_moves=True), {}, {"strategy": "path_ga", "rungs": 1}),
    ],
)  # fmt: skip
def test_what_is_chosen(traits: Traits, named: dict[str, Any], expected: dict[str, Any]) -> None:
    search, reason = choose(SearchConfig.model_validate({"strategy": "auto", **named}), traits)
    options = search.gradient
    shown = vars(search) | {
        "minibatches": options.minibatches, "learning_rate": options.learning_rate, "steps": options.generations,
        "seconds": search.stop.seconds,
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected
    assert reason.startswith(f"search.strategy: auto chose {search.strategy}: ") and "\n" not in reason
    # The document of the choice is a config of its own.
    again = SearchConfig.model_validate(search.model_dump(mode="json"))
    assert again.model_dump(mode="json") == search.model_dump(mode="json")


def test_the_reason_says_what_a_search_lacks() -> None:
    assert "without search.validation the winner is" in choose(SearchConfig(strategy="auto"), FITNESS)[1]
    assert "validation" not in choose(SearchConfig(strategy="auto", validation=0.2), FITNESS)[1]
    assert "all of 8 examples" in choose(SearchConfig(strategy="auto"), Traits("fitness", 8))[1]
    assert "a smooth companion of the fitness" in choose(SearchConfig(strategy="auto"), COMPANION)[1]
    assert "every candidate meets all of 12 examples" in choose(SearchConfig(), Traits(None, 12))[1]


# ---------------------------------------------------------------------------------------------------------------
# Budgets


def make(search: SearchConfig, dims: int = 22) -> Any:
    settings = StrategySettings(
        dims, search.population, 1 / 6, search.generations, np.asarray, 0, search.gradient, "search"
    )
    return make_strategy("search", search.strategy, settings)


@pytest.mark.parametrize(
    ("named", "generations"),
    [
        ({"budget": "500 passes", "population": 16}, 31),
        ({"budget": "1 pass", "strategy": "gradient", "gradient": {"minibatches": 9}}, 2),
        # 16 candidates on an eighth of the examples, 8 on a quarter, 4 on a half, 2 on all: 5 passes.
        ({"budget": "500 passes", "population": 16, "rungs": 4}, 100),
        ({"budget": "180 passes", "strategy": "gradient", "gradient": {"minibatches": 4}}, 160),
        ({"budget": "180 passes", "strategy": "gradient", "population": 2}, 20),
        # Eight steps at 4.5 / 4 passes leave 91 passes.
        (
            {"budget": "100 passes", "strategy": "hybrid", "population": 13,
             "gradient": {"minibatches": 4, "generations": 8}}, 8 + 7,
        ),
        # A quarter of 10 generations, 2, at 4.5, and 8 of 13.
        ({"budget": "120 passes", "strategy": "hybrid", "population": 13}, 10),
    ],
)  # fmt: skip
def test_a_budget_of_passes_pays_for_generations(named: dict[str, Any], generations: int) -> None:
    search = within_budget("search", SearchConfig.model_validate(named), 256, make)
    assert search.generations == generations
    budget = float(named["budget"].split()[0])
    assert search_passes(search, make(search), 256) <= budget + 1e-6
    longer = search.model_copy(update={"generations": generations + 1})
    assert search_passes(longer, make(longer), 256) > budget
    document = search.model_dump(mode="json")
    assert document["budget"] == named["budget"] and "generations" not in document
    assert describe_length(search) == f"{generations} generations ({named['budget']})"


def test_a_search_without_a_budget_stays_as_it_is() -> None:
    search = SearchConfig(generations=7)
    assert within_budget("search", search, 1, make) is search and "budget" not in search.model_dump(mode="json")


def test_fewer_examples_make_fewer_rungs() -> None:
    search = SearchConfig(population=16, rungs=4, generations=1)
    assert search_passes(search, make(search), 256) == 5
    assert search_passes(search, make(search), 3) == 16 / 2 + 8 / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which every evaluation takes a second."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_the_clock_ends_a_search_after_the_generation_in_which_its_time_is_over(clock: None, tmp_path: Path) -> None:
    tops = np.random.default_rng(0).normal(0, 0.5, (64, 2))
    shards = [Hill(shard, tops) for shard in stratified_shards("rungs", [text_task("hills", 64)], one_token, 1, 0)]

    def searched(name: str, **length: Any) -> tuple[Any, bytes]:
        config = within_budget(
            "search", SearchConfig(population=8, sigma=0.5, **length), 64, lambda search: make(search, 2)
        )
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        return search_in(folder.path, config, 1, Plain(), shards), folder.history.read_bytes()

    archive, history = searched("timed", budget="5s")
    assert archive.generations == 5 and archive.stopped.criterion == "budget"
    assert archive.stopped.describe() == "search.budget: evaluations have taken 5.0 s, of 5s"
    _, whole = searched("whole", generations=9)
    assert whole.startswith(history) and len(whole) > len(history)


# ---------------------------------------------------------------------------------------------------------------
# Whole searches

PARENTS = [{"a": {"w": np.full(4, k, np.float32)}, "b": {"w": np.arange(4, dtype=np.float32) * k}} for k in (0.0, 1.0)]


def closeness(merged: Any) -> Any:
    return -(jnp.square(merged["a"]["w"] - 0.3).sum() + jnp.square(merged["b"]["w"] - 0.6).sum())


def test_auto_follows_a_traced_fitness_and_races_others(tmp_path: Path) -> None:
    traced = search_trees(PARENTS, closeness, strategy="auto", generations=3, out=tmp_path / "run")
    assert len(traced.history[0]["genomes"]) == 1 and "gradient_norm" in traced.history[0]
    document = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["search"]
    assert document["strategy"] == "gradient" and document["gradient"]["minibatches"] == 1

    def each(merged: Any, rows: Any) -> Any:
        return np.array([float(closeness(merged)) + 0.01 * row for row in rows])

    called = search_trees(PARENTS, host_callback(each), examples=np.arange(32.0), strategy="auto", generations=2)
    # Half of the candidates meet half of the examples alone.
    assert sorted(set(called.history[0]["examples"])) == [16, 32] and "sigma" in called.history[0]


def test_cma_es_says_what_gradients_would_save() -> None:
    long, short = (SearchConfig(generations=generations, population=16) for generations in (100, 2))
    assert gradient_note(long, make(long), FITNESS) == (
        "search.strategy: cma_es spends 1,600 passes, and the fitness has derivatives: auto would follow them in 160 "
        "steps, about 180 passes"
    )
    assert gradient_note(short, make(short), FITNESS) is None
    assert gradient_note(long, make(long), NEITHER) is None
    other = SearchConfig(strategy="de", generations=100, population=16)
    assert gradient_note(other, make(other), FITNESS) is None
    timed = within_budget("search", SearchConfig(budget="2h", population=16), 256, make)
    assert "cma_es spends 2h, and" in str(gradient_note(timed, make(timed), FITNESS))


@pytest.fixture(scope="module")
def config_file(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    space = {"method": "task_arithmetic", "layers_per_group": "all", "components": ["attention+mlp+norm"]}
    document = search_config(family, space=space, search={"strategy": "auto"}, seed=3)
    return write_yaml(tmp_path_factory.mktemp("auto") / "search.yaml", document)


BY_CMA_ES = ("--set", "search.strategy=cma_es", "--set", "search.generations=null")


def test_a_run_names_the_strategy_that_was_chosen_goes_on_and_is_reproduced(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines = [line for line in run_here("search", config_file, "--out", out).stdout.splitlines() if "auto chose" in line]
    assert len(lines) == 1 and lines[0].startswith("search.strategy: auto chose gradient: the fitness has derivatives")
    recorded = open_run(out).config["search"]
    assert (recorded["strategy"], recorded["population"], recorded["generations"]) == ("gradient", 1, 2)
    history = RunFolder(out).history.read_bytes()
    assert command("search", config_file, "--out", out, "--resume", "--set", "search.generations=3") == 0
    assert RunFolder(out).history.read_bytes().startswith(history[: history.index(b"\n")])
    assert command("search", RunFolder(out).config, "--out", tmp_path / "again") == 0
    assert open_run(tmp_path / "again").config["search"] == open_run(out).config["search"]


def test_a_timed_run_is_reproduced_to_the_generation_that_the_clock_ended(
    config_file: Path, tmp_path: Path, clock: None
) -> None:
    out = tmp_path / "run"
    assert command("search", config_file, "--out", out, *BY_CMA_ES, "--set", "search.budget=3s") == 0
    result = read_result(RunFolder(out).result)
    assert result is not None and result.stopped_by == "budget"
    recorded = open_run(out).config["search"]
    assert recorded["budget"] == "3s" and "generations" not in recorded and len(open_run(out).history) == 3
    assert "3 generations" in run_here("show", out).stdout
    assert "bit-identical" in run_here("reproduce", out).stdout


def test_plan_says_what_a_budget_means(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", config_file, *BY_CMA_ES, "--set", "search.budget=50 passes") == 0
    assert "the run of 12 generations (search.budget: 50 passes), and choosing" in capsys.readouterr().out
    assert command("plan", config_file, *BY_CMA_ES, "--set", "search.budget=1m") == 0
    assert " generations (search.budget: 1m), and choosing" in capsys.readouterr().out


@thorough
def test_stages_name_what_was_chosen_in_each(config_file: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(config_file.read_text())
    space, search = document.pop("space"), document.pop("search")
    document["stages"] = [{"space": space, "search": search}, {"data_flow": {"max_layers": 4}, "search": search}]
    path = write_yaml(tmp_path / "stages.yaml", document)
    config = read_config(path, [], None)
    assert config.stages is not None
    problems = [
        build_problem(path, of_stage, chained=stage > 0) for stage, of_stage in enumerate(stage_configs(config))
    ]
    resolved = [_resolved_stage(config.stages, number, problem)["search"] for number, problem in enumerate(problems)]
    assert [(stage["strategy"], stage["population"]) for stage in resolved] == [("gradient", 1), ("path_ga", 4)]


def test_a_study_runs_as_long_as_its_budget_says(family: Family, tmp_path: Path) -> None:
    models = em.load_models(family.base, family.parents)
    space = em.MergeSpace(models, "task_arithmetic", layers_per_group="all", components=["attention+mlp+norm"])
    tasks = [em.tasks.Likelihood(name="text", file=str(family.tasks))]
    # Two steps of one start on all examples.
    study = em.Study(models, space, tasks, strategy="auto", budget="10 passes", out=tmp_path / "run")
    with pytest.raises(
        InputError, match=r"Study.run: generations: 3; the study has a budget, 10 passes: leave them out"
    ):
        study.run(3)
    assert len(study.run().history) == 2
    with pytest.raises(InputError, match=r"Study.run: generations: missing; expected a number, or a budget of the"):
        em.Study(models, space, tasks, out=tmp_path / "other").run()


# ---------------------------------------------------------------------------------------------------------------
# Bad input

BUDGET = "passes or a time, such as 500 passes, 90m or 2h"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"budget": "2h", "generations": 50}, "search: budget: 2h, and generations: 50; expected one of them"),
        *(
            ({"budget": budget}, f"search.budget: expected {BUDGET}, found {shown}")
            for budget, shown in (
                ("soon", "'soon'"), ("0 passes", "'0 passes'"), ("-5 passes", "'-5 passes'"), ("2 weeks", "'2 weeks'"),
                ("1e3 passes", "'1e3 passes'"), (500, "500"), ([1], "a list of 1"), (True, "true"),
            )
        ),
    ],
)  # fmt: skip
def test_a_budget_that_means_nothing_is_refused(named: dict[str, Any], message: str) -> None:
    document = {
        "parents": ["a", "b"], "space": {"method": "linear"}, "search": named,
        "tasks": [{"name": "t", "kind": "likelihood", "file": "t.jsonl"}],
    }  # fmt: skip
    with pytest.raises(ValidationError) as raised:
        Config.model_validate(document)
    assert explain(Config, raised.value, document) == message


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"budget": "3 passes", "population": 16}, "search: budget: 3 passes; cma_es takes 16 passes at least"),
        (
            {"budget": "2 passes", "strategy": "gradient"},
            "search: budget: 2 passes; gradient takes 4.5 passes at least",
        ),
        (
            {"budget": "20 passes", "strategy": "hybrid", "population": 13, "gradient": {"generations": 80}},
            "search: budget: 20 passes; hybrid takes 373 passes at least",
        ),
        (
            {"budget": "2h", "strategy": "gradient"},
            "search: budget: 2h; gradient has to know the number of its generations, whose cosine schedule ends at the "
            "last one; give generations, or gradient.schedule: constant",
        ),
        (
            {"budget": "2h", "strategy": "hybrid"},
            "search: budget: 2h; hybrid has to know the number of its generations, of which it follows gradients in a "
            "quarter; give generations, or gradient.generations",
        ),
    ],
)  # fmt: skip
def test_a_budget_that_a_search_cannot_keep_is_refused(named: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        within_budget("search", SearchConfig.model_validate(named), 256, make)
    assert str(raised.value) == message


def test_the_name_stands_for_a_strategy_and_is_none() -> None:
    with pytest.raises(InputError, match="auto stands for another strategy"):
        make(SearchConfig(strategy="auto"))
    assert within_budget("search", SearchConfig(budget="2h"), 1, make).generations == MAX_GENERATIONS
