"""Searches whose defaults cannot hurt: the first generation, the finalists, and what the verdict names."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.families import build_family
from helpers.files import read_json, write_yaml
from helpers.sampling import sample, thorough
from helpers.searches import search_config, search_in
from helpers.trees import search_trees
from merge_kernels import METHODS
from test_search import OwnScorer

import evojax_merge as em
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.report.comparison import Result, Row, write_result
from evojax_merge.report.intervals import Lead
from evojax_merge.report.winner import MergeReport
from evojax_merge.search.recording import Reporter
from evojax_merge.spaces.parameter import GroupSpace, SearchParameter

BASE = {"w": np.zeros(12, np.float32), "b": np.zeros(3, np.float32)}
# The second parent is at 100%: no merge of it is any better.
TARGET = {"w": np.sin(np.arange(12, dtype=np.float32)), "b": np.ones(3, np.float32)}
PARENTS = [{"w": np.cos(np.arange(12, dtype=np.float32)), "b": -np.ones(3, np.float32)}, TARGET]
em.register_backend("one_group", em.FunctionFactory(groups=lambda path: "all"))


def likeness(merged: Any) -> Any:
    """1 for the second parent, less for every other model."""
    return jnp.exp(-sum(jnp.square(merged[name] - TARGET[name]).sum() for name in TARGET))


def space(
    method: str = "task_arithmetic", parents: int = 2, weight: tuple[float, float] = (0.0, 1.5),
    constants: dict[str, float] | None = None, **more: Any,
) -> GroupSpace:  # fmt: skip
    searched = (SearchParameter("weight", *weight, (0.5,)),)
    fixed = {"lambda": 1.0} if constants is None else constants
    return GroupSpace(
        METHODS[method],
        parents,
        ("one", "two"),
        searched,
        tuple((key, (value,)) for key, value in fixed.items()),
        **more,
    )


def weights(of: GroupSpace) -> list[list[float]]:
    """The weights of the first group of each merge that needs no search."""
    return [np.round(of.values(jnp.asarray(genome))["weight"][0], 5).tolist() for genome in of.plain_merges()[0]]


@pytest.mark.parametrize("seed", sample(range(6), 2))
@pytest.mark.parametrize("strategy", ["cma_es", "de", "random", "ipop_cma_es", "ga"])
def test_no_winner_is_worse_than_a_parent_that_is_at_its_best(strategy: str, seed: int) -> None:
    result = search_trees(
        PARENTS, likeness, base=BASE, method="task_arithmetic", parameters={"weight": {"low": 0.0, "high": 1.5}},
        strategy=strategy, generations=5, population=6, seed=seed,
    )  # fmt: skip
    assert result.best.fitness >= float(likeness(PARENTS[1])) - 1e-6


@pytest.mark.parametrize(
    "more",
    [{"seeds": []}, {"strategy": "grid", "backend": "one_group", "population": 9},
     {"strategy": "gradient"}, {"rungs": 2, "seeds": []}, {"validation": 0.5, "seeds": []}],
    ids=["no seeds", "grid", "gradient", "rungs", "validation"],
)  # fmt: skip
def test_parents_are_finalists_of_searches_that_do_not_begin_with_them(more: dict[str, Any]) -> None:
    examples = {"examples": np.arange(8)} if "rungs" in more or "validation" in more else {}
    settings = {"population": 6, "generations": 1, **more}

    def scored(merged: Any, rows: Any = None) -> Any:
        return likeness(merged) if rows is None else likeness(merged) + 0.0 * rows

    def alone(merged: Any) -> Any:
        return scored(merged)

    result = search_trees(
        PARENTS, scored if examples else alone, base=BASE, method="task_arithmetic",
        parameters={"weight": {"low": 0.0, "high": 1.5}}, **examples, **settings,
    )  # fmt: skip
    assert result.best.fitness == pytest.approx(1.0, abs=1e-6)


def test_the_first_generation_begins_with_the_uniform_merge_and_the_parents() -> None:
    def first(population: int, **more: Any) -> list[list[float]]:
        result = search_trees(
            PARENTS, likeness, base=BASE, method="task_arithmetic", population=population, generations=1,
            parameters={"weight": {"low": 0.0, "high": 1.5}}, **more,
        )  # fmt: skip
        of = space()
        genomes = np.array(result.history[0]["genomes"], np.float32)
        return [np.round(of.values(jnp.asarray(genome))["weight"][0], 4).tolist() for genome in genomes]

    assert first(6)[:3] == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    # No more than fit.
    assert first(2) == [[0.5, 0.5], [1.0, 0.0]]
    assert first(6, seeds=["parents"])[:2] == [[1.0, 0.0], [0.0, 1.0]]
    assert [1.0, 0.0] not in first(6, seeds=[])


def test_a_space_knows_which_merges_need_no_search() -> None:
    assert weights(space()) == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    # The uniform merge of one model is that model.
    assert weights(space(parents=1)) == [[1.0]]
    # Two of three parents share a weight.
    grouped = space(parents=3, parent_groups=(0, 0, 1))
    assert np.allclose(weights(grouped), [[1 / 3] * 3, [0, 0, 1]], atol=1e-4)
    assert grouped.plain_merges()[1] == ("parents[0] and parents[1] (they share their parameters)",)


@pytest.mark.parametrize(
    ("settings", "count", "missing"),
    [
        ({"weight": (0.0, 0.8)}, 1, ("every parent (weight: high 0.8 is below 1)",)),
        ({"weight": (0.6, 1.5)}, 0, ("the uniform merge (weight: low 0.6 is above 0.5)",
                                    "every parent (weight: low 0.6 is above 0)")),
        ({"constants": {"lambda": 0.7}}, 1, ("every parent (lambda is fixed, not at 1)",)),
        ({"method": "ties", "constants": {"lambda": 1.0, "density": 0.5}}, 1,
         ("every parent (density is fixed, not at 1)",)),
        ({"method": "linear", "constants": {}}, 3, ()),
    ],
    ids=str,
)  # fmt: skip
def test_what_bounds_and_fixed_parameters_leave_out(settings: Any, count: int, missing: tuple[str, ...]) -> None:
    genomes, left_out = space(**settings).plain_merges()
    assert (len(genomes), left_out) == (count, missing)


def test_an_interpolation_has_its_ends() -> None:
    def between(low: float, high: float) -> GroupSpace:
        return GroupSpace(METHODS["slerp"], 2, ("one",), (SearchParameter("t", low, high, (0.4,)),), ())

    genomes, missing = between(0.0, 1.0).plain_merges()
    shares = [float(between(0.0, 1.0).values(jnp.asarray(genome))["t"][0, 0]) for genome in genomes]
    assert shares == pytest.approx([0.5, 0.0, 1.0], abs=1e-6) and missing == ()
    genomes, missing = between(0.0, 0.9).plain_merges()
    assert len(genomes) == 2 and missing == ("parents[1] (t: high 0.9 is below 1)",)


def test_searched_densities_of_a_parent_are_whole() -> None:
    searched = (SearchParameter("weight", 0.0, 1.0, (0.5,)), SearchParameter("density", 0.1, 1.0, (0.4,)))
    ties = GroupSpace(METHODS["ties"], 2, ("one",), searched, (("lambda", (1.0,)),))
    densities = [ties.values(jnp.asarray(genome))["density"][0].tolist() for genome in ties.plain_merges()[0]]
    assert np.allclose(densities, [[0.4, 0.4], [1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("high", "line"), [(0.8, ["not in the space: every parent (weight: high 0.8 is below 1)"]), (1.0, [])]
)
def test_one_line_of_the_log_says_which_bound_keeps_parents_out(high: float, line: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    reporter = Reporter()
    reporter.log = lines.append  # type: ignore[method-assign]
    scorer = OwnScorer(lambda genomes: -np.square(genomes).sum(axis=1))
    search_in(tmp_path, SearchConfig(generations=1), 0, space(weight=(0.0, high)), [scorer], reporter=reporter)
    assert [text for text in lines if "not in the space" in text] == line


# ---------------------------------------------------------------------------------------------------------------
# The verdict


def table(*rows: Row, shares: dict[str, float]) -> Result:
    return Result(np.zeros(2), 0.9, ("uniform merge", 0.8), list(rows), MergeReport((), {}, ()), shares=shares)


LOST = table(
    Row("base", "base", 0.2, {"sums/acc": 0.2, "kana/acc": 0.9}, Lead(0.4, 0.3, 0.5), {
        "sums/acc": Lead(0.4, 0.3, 0.5), "kana/acc": Lead(-0.3, -0.4, -0.2)}),
    Row("parent", "maths", 0.5, {"sums/acc": 0.5, "kana/acc": 0.7}, Lead(0.1, 0.05, 0.2), {
        "sums/acc": Lead(0.1, 0.05, 0.2), "kana/acc": Lead(-0.1, -0.2, 0.01)}),
    Row("winner", "evolved", 0.6, {"sums/acc": 0.6, "kana/acc": 0.6}),
    shares={"sums/acc": 1.0, "kana/acc": 0.0},
)  # fmt: skip


def test_a_verdict_names_the_tasks_on_which_the_winner_is_worse_beyond_noise(tmp_path: Path) -> None:
    lost = (
        "On the held-out examples of kana (acc, weight 0) the winner is worse than the base by 0.3000 (95% "
        "interval -0.4000 to -0.2000)."
    )
    headline = (
        "On held-out data the winner is better than the best parent on 1 of 2 tasks: sums (+0.1000 against maths); "
        "within noise on kana (-0.1000 against maths)."
    )
    assert LOST.verdicts()[0] == headline and LOST.verdicts()[3:] == [lost] and LOST.warnings() == [lost]
    write_result(LOST, 3, tmp_path / "result.json")
    document = read_json(tmp_path / "result.json")
    assert document["warnings"] == [lost]
    assert document["worse_on"] == [{
        "score": "kana/acc", "role": "base", "name": "base", "winner_heldout_score": 0.6, "heldout_score": 0.9,
        "interval": [-0.4, -0.2],
    }]  # fmt: skip


def test_a_winner_that_is_worse_than_a_rival_is_a_warning() -> None:
    worse = table(
        Row("parent", "maths", 0.7, {"sums/acc": 0.7}, Lead(-0.1, -0.2, -0.05)),
        Row("winner", "evolved", 0.6, {"sums/acc": 0.6}), shares={"sums/acc": 1.0},
    )  # fmt: skip
    assert worse.warnings() == worse.verdicts() and "worse than the best parent maths" in worse.warnings()[0]


def test_a_task_that_tells_no_model_from_another_says_so() -> None:
    rows = [
        Row(role, role, value, {"sums/acc": value, "flat/acc": 0.25})
        for role, value in {"base": 0.1, "parent": 0.2, "winner": 0.3}.items()
    ]
    tied = table(*rows, shares={"sums/acc": 1.0, "flat/acc": 0.0})
    assert tied.verdicts() == [
        "On the held-out examples of flat (acc, weight 0) every model of the table scores 0.2500: they tell no model "
        "from another."
    ]
    assert tied.warnings() == []


@thorough
def test_a_search_from_python_warns_where_its_winner_is_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = build_family(tmp_path)
    (tmp_path / "other.jsonl").write_bytes(family.tasks.read_bytes())
    tasks = [
        {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": 0.5},
        {"name": "other", "kind": "likelihood", "file": "other.jsonl", "heldout": 0.5, "weight": 0},
    ]
    write_yaml(tmp_path / "config.yaml", search_config(None, 1, tasks=tasks))
    results = []
    monkeypatch.setattr(Result, "warnings", lambda result: results.append(result) or ["It is worse."])
    with pytest.warns(UserWarning, match=r"^It is worse\.$") as caught:
        run = em.evolve(tmp_path / "config.yaml", out=tmp_path / "run")
    assert run.warnings == ["It is worse."]
    assert [warning.filename for warning in caught if str(warning.message) == "It is worse."] == [__file__]
    winner, compared = results[0].winner, [row for row in results[0].rivals if row.role != "uniform"]
    assert len(compared) == 2 and len(winner.scores) == 2
    for row in compared:
        differences = {score: mean - row.scores[score] for score, mean in winner.scores.items()}
        assert {score: lead.difference for score, lead in row.task_leads.items()} == pytest.approx(
            differences, abs=1e-5
        )
