"""What of a run is the same where it is computed in other pieces: every candidate, the winner and its weights to the
byte, the scores as far as float32 allows."""

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command
from helpers.families import Family
from helpers.files import read_lines, write_yaml
from helpers.sampling import sample
from helpers.searches import search_config

POPULATION = 6


def search(family: Family, out: Path, *overrides: str) -> Path:
    """A short search in this process, which keeps what is compiled from one to the next."""
    space = {"method": "ties", "layers_per_group": 2, "parameters": {"weight": {}, "density": {}}}
    config = write_yaml(out.with_suffix(".yaml"), search_config(family, 3, POPULATION, space=space, seed=5))
    options = [part for override in overrides for part in ("--set", override)]
    assert command("search", config, "--out", out, *options) == 0
    return out


def history(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "history.jsonl")


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
