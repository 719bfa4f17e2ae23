"""What of a run is the same where it is computed in other pieces: every candidate, the winner and its weights to the
byte, the scores as far as float32 allows."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Family, sample

from evojax_merge.cli import cli, run

POPULATION = 6


def search(family: Family, out: Path, *overrides: str) -> Path:
    """A short search in this process, which keeps what is compiled from one to the next."""
    document: dict[str, Any] = {
        "base": str(family.base), "parents": [str(parent) for parent in family.parents],
        "tasks": [{"name": "text", "kind": "likelihood", "file": str(family.tasks)}],
        "space": {"method": "ties", "layers_per_group": 2, "parameters": {"weight": {}, "density": {}}},
        "search": {"generations": 3, "population": POPULATION}, "seed": 5,
    }  # fmt: skip
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(document))
    options = [part for override in overrides for part in ("--set", override)]
    arguments = ["search", str(config), "--out", str(out), *options]
    assert run(lambda: cli.main(arguments, standalone_mode=False)) == 0
    return out


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return search(family, tmp_path_factory.mktemp("runs") / "plain")


def test_the_same_again_is_the_same_to_the_byte(family: Family, plain: Path, tmp_path: Path) -> None:
    again = search(family, tmp_path / "run")
    for name in ("history.jsonl", "result.json", "best/recipe.yaml", "best/model/model.safetensors"):
        assert (again / name).read_bytes() == (plain / name).read_bytes(), name


@pytest.mark.parametrize(
    "pieces", sample(["chunk=4", "tokens_per_batch=24", f"chunk={POPULATION}", "tokens_per_batch=100"], 1)
)
def test_other_pieces_change_scores_by_rounding_and_nothing_else(
    family: Family, plain: Path, tmp_path: Path, pieces: str
) -> None:
    """How many candidates, or tokens, share a pass. The strategy goes by ranks: where rounding swaps none, it asks for
    the same candidates, and the winner is the same model."""
    other = search(family, tmp_path / "run", f"evaluation.{pieces}")
    for name in ("best/recipe.yaml", "best/model/model.safetensors"):
        assert (other / name).read_bytes() == (plain / name).read_bytes(), name
    for ours, theirs in zip(history(plain), history(other), strict=True):
        for key in ("generation", "sigma", "evaluations", "failed", "examples"):
            assert theirs[key] == ours[key], key
        for key in ("fitness", "best", "mean", "worst", "best_so_far", "scores_of_best"):
            assert theirs[key] == pytest.approx(ours[key], abs=1e-5), key
