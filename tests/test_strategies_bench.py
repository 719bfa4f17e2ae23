"""bench/searches/strategies.py: what it counts, what it keeps, and that what it kept is not run again."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.files import write_yaml
from helpers.sampling import thorough

from evojax_merge.zoo.references import resolve_reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.searches import strategies
from bench.searches.strategies import (
    BudgetSpent,
    Family,
    Trace,
    append_row,
    final_table,
    generation_after,
    key_of,
    read_rows,
)
from bench.shared.strategy_peers import PEERS, is_installed, run_peer, run_pso_merging


def row_of(best: list[float | None], variant: str = "cma_es", seed: int = 0, passes: float = 4.0) -> dict[str, Any]:
    found = {str(i + 1): [0.0] for i, value in enumerate(best) if value is not None and value not in best[:i]}
    return {
        "family": "zoo", "space": "config", "variant": variant, "settings": {}, "seed": seed, "population": 4,
        "budget": 12, "dims": 1, "machine": "here", "gradient_cost": None,
        "passes": [passes] * len(best), "seconds": [0.5] * len(best), "best": best, "genomes": found,
        "heldout": {number: {"fitness": -1.0, "task/accuracy": 0.5} for number in found},
    }  # fmt: skip


def test_a_search_ends_when_its_passes_are_spent() -> None:
    trace = Trace(20)
    trace.add(4, 0.1, -1.0, np.zeros(2))
    trace.add(10, 0.1, -1.0, np.ones(2))
    with pytest.raises(BudgetSpent):
        trace.add(6, 0.1, -0.5, np.full(2, 2.0))
    assert trace.figures["best"] == [-1.0, -1.0, -0.5]
    assert trace.figures["genomes"] == {"1": [0.0, 0.0], "3": [2.0, 2.0]}
    assert strategies.spent(trace.figures).tolist() == [4, 14, 20]


@pytest.mark.parametrize(
    ("settings", "generations"),
    [
        ({"strategy": "cma_es"}, 20),
        ({"strategy": "cma_es", "generations": 5}, 5),
        ({"strategy": "gradient"}, 80 // 4),
        ({"strategy": "gradient", "generations": 8}, 8),
        # A quarter of the examples in each, and every eighth time a look at all of them.
        ({"strategy": "gradient", "gradient": {"minibatches": 4}}, int(80 / 1.125)),
        ({"strategy": "hybrid", "gradient": {"generations": 3}}, 23),
    ],
)
def test_generations_are_those_that_the_budget_pays_for(settings: dict[str, Any], generations: int) -> None:
    population = 1 if settings["strategy"] == "gradient" else 4
    row = {"settings": settings, "budget": 80, "population": population, "gradient_cost": 4.0}
    assert strategies.search_config(row).generations == generations


def test_the_best_of_a_checkpoint_is_that_of_the_last_whole_generation() -> None:
    row = row_of([None, -2.0, -2.0, -1.0])
    assert [generation_after(row, passes) for passes in (3, 4, 15, 16, 99)] == [0, 1, 3, 4, 4]
    assert [strategies.found_in(row, generation) for generation in (0, 1, 3, 4)] == [None, None, "2", "4"]


def test_passes_are_compared_with_those_of_the_reference() -> None:
    rows = [row_of([-3.0, -2.0, -1.0], seed=seed) for seed in range(3)]
    rows += [row_of([-1.0, -1.0, -1.0], "de", seed) for seed in range(3)]
    rows += [row_of([-3.0, -3.0, -3.0], "ga", seed) for seed in range(3)]
    _, _, *lines = final_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(one[0], one[5], one[6]) for one in cells] == [
        ("cma_es", "12", "1.00"),
        ("de", "4", "0.33"),
        ("ga", "> 12", ""),
    ]
    assert cells[0][2:5] == ["-1.0000 (-1.0000 to -1.0000)"] * 2 + ["50.0% (50.0% to 50.0%)"]


def test_rows_are_read_back_whatever_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first, again, other = row_of([-2.0]), row_of([-1.0]), row_of([-3.0], seed=1)
    append_row(path, first)
    path.write_text(path.read_text() + json.dumps(other)[:20])
    append_row(path, again)
    append_row(path, other)
    assert read_rows(path) == {key_of(first): again, key_of(other): other}


def small_config(folder: Path) -> Path:
    """The quickstart on the first 32 problems of each split."""
    document = yaml.safe_load(strategies.FAMILIES["zoo"].config.read_text())
    for key, name in (("file", "search.jsonl"), ("heldout", "heldout.jsonl")):
        lines = resolve_reference("test", f"zoo:{name}", folder).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:32]))
        for task in document["tasks"]:
            task[key] = name
    return write_yaml(folder / "config.yaml", document)


@thorough
def test_a_search_that_the_file_holds_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setitem(strategies.FAMILIES, "zoo", Family(small_config(tmp_path), {"config": {}}))
    options = ["--seeds", "1", "--population", "4", "--generations", "2", "--checkpoints", "4", "--json", str(path)]

    def run(*names: str) -> str:
        monkeypatch.setattr(sys, "argv", ["strategies.py", *options, "--strategies", *names])
        strategies.main()
        return capsys.readouterr().out

    names = ["cma_es+rungs", "gradient+long", "pso_merging"]
    run(*names)
    raced, climbed, swarm = read_rows(path).values()
    # The base, two experts and a sparsified one; of models no genomes are known, and held-out scores are.
    assert swarm["passes"] == [4, 4] and swarm["best"][0] < 0 and list(swarm["genomes"]) == list(swarm["heldout"])
    # Four on an eighth of the examples, two on a quarter, one on a half and on all.
    assert raced["passes"] == [4 / 8 + 2 / 8 + 1 / 4 + 1 / 2] * 6
    # Eight passes are two gradients at four each.
    assert climbed["passes"] == [4, 4] and climbed["best"][1] > climbed["best"][0]
    assert all(
        "whole_answers/accuracy" in scores for row in (raced, climbed, swarm) for scores in row["heldout"].values()
    )
    monkeypatch.setattr(strategies, "measure", lambda *arguments: pytest.fail("was run again"))
    out = run(*names, "--plot", str(tmp_path / "plot.png"))
    assert "| cma_es+rungs | 9 |" in out and (tmp_path / "plot.png").stat().st_size > 10_000
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.skipif(not is_installed(), reason="pymoo is not installed")
@pytest.mark.parametrize("name", PEERS)
def test_peers_maximise_in_the_unit_cube(name: str) -> None:
    asked: list[np.ndarray] = []

    def evaluate(units: np.ndarray) -> np.ndarray:
        asked.append(units)
        return np.where(units[:, 0] < 0.05, np.nan, -np.square(units - 0.3).sum(axis=1))

    run_peer(name, evaluate, 4, 8, 240, 0)
    every = np.concatenate(asked)
    assert every.min() >= 0 and every.max() <= 1 and len(every) >= 240
    assert np.nanmax(-np.square(every - 0.3).sum(axis=1)) > -0.03


def test_pso_merging_begins_at_the_experts_and_moves_whole_models() -> None:
    base, first, second = np.zeros(400), np.r_[np.ones(200), np.zeros(200)], np.r_[np.zeros(200), np.ones(200)]
    rounds: list[np.ndarray] = []

    def evaluate(models: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        if len(rounds) == 12:
            raise BudgetSpent
        rounds.append(np.stack([model["w"] for model in models]))
        return -np.square(rounds[-1] - 0.9).mean(axis=1)

    with pytest.raises(BudgetSpent):
        run_pso_merging(evaluate, {"w": base}, [{"w": first}, {"w": second}], 8, 0)
    began = rounds[0]
    assert (began[:3] == [base, first, second]).all() and began.shape == (8, 400)
    # DARE's: some entries dropped, the others enlarged by as much, only where the task vector is.
    assert set(np.unique(began[3])) == {0.0, 1 / 0.8} and 140 < np.count_nonzero(began[3][:200]) < 180
    losses = [np.square(places - 0.9).mean(axis=1).min() for places in rounds]
    assert min(losses) < 0.3 * losses[0]
