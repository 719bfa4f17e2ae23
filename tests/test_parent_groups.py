"""Spaces in which parents share parameters, or in which only some of them count."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers.commands import command, run_here
from helpers.families import Family, build_family
from helpers.files import read_json, write_yaml
from helpers.sampling import thorough
from hostile import config as search_config
from merge_kernels import sums
from test_spaces import make_space

from evojax_merge.cli_parts import WRONG_INPUT
from evojax_merge.config.search_config import SpaceConfig
from evojax_merge.models.architecture import LAYERS
from evojax_merge.spaces.parameter import SearchParameter


def many_space(**changes: Any) -> Any:
    searched = (SearchParameter("weight", -1.0, 1.0, (0.1,)), SearchParameter("density", 0.0, 1.0, (0.5,)))
    return replace(make_space(parents=5, search_parameters=searched), **changes)


def test_parents_of_a_group_share_their_parameters() -> None:
    groups = (1, 0, 1, 2, 0)
    space = many_space(parent_groups=groups)
    alone = many_space()
    assert space.dims * 5 == alone.dims * 3
    genome = np.random.default_rng(0).random(space.dims).astype(np.float32)
    for name, values in space.values(genome).items():
        assert values.shape == (len(space.groups), 5)
        for k, group in enumerate(groups):
            np.testing.assert_array_equal(values[:, k], values[:, groups.index(group)], err_msg=name)
        assert len(np.unique(np.asarray(values))) == 3 * len(space.groups)
    recipe = space.recipe(jnp.asarray(genome)).stacks[LAYERS]
    assert recipe["weight"].shape == alone.recipe(jnp.asarray(alone.start)).stacks[LAYERS]["weight"].shape


def test_gradients_of_a_group_are_the_sums_of_its_parents() -> None:
    groups = (0, 1, 0, 0, 1)
    space, alone = many_space(parent_groups=groups), many_space()
    genome = np.random.default_rng(1).random((1, space.dims)).astype(np.float32)
    both = len(space.groups) * 2
    spread = np.concatenate(
        [part.reshape(len(space.groups), 2)[:, groups].ravel() for part in np.split(genome[0], [both])]
    )[None]
    recipes = alone.decode(spread)
    cotangents = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), recipes)
    shared = space.pull_back(genome, cotangents)[0]
    own = alone.pull_back(spread, cotangents)[0].reshape(2, len(space.groups), 5)
    expected = np.stack([own[..., np.array(groups) == group].sum(-1) for group in (0, 1)], axis=-1)
    np.testing.assert_allclose(shared, expected.ravel(), rtol=1e-5, atol=1e-6)


def test_only_the_active_weights_count() -> None:
    space, every = many_space(active=2), many_space()
    genome = np.random.default_rng(2).random(space.dims).astype(np.float32)
    weights, others = np.asarray(space.values(genome)["weight"]), np.asarray(every.values(genome)["weight"])
    assert ((weights != 0).sum(axis=1) == 2).all()
    np.testing.assert_array_equal(weights[weights != 0], others[weights != 0])
    largest = np.sort(np.abs(others), axis=1)[:, -2:]
    np.testing.assert_array_equal(np.sort(np.abs(weights), axis=1)[:, -2:], largest)
    np.testing.assert_array_equal(space.values(genome)["density"], every.values(genome)["density"])
    # Equal weights stand together: the uniform merge is one of the space.
    assert (np.asarray(space.values(space.baselines()[1][0])["weight"]) > 0).all()
    # Weights that do not count have a derivative all the same.
    cotangents = jax.tree.map(jnp.ones_like, space.decode(genome[None]))
    np.testing.assert_array_equal(space.pull_back(genome[None], cotangents), every.pull_back(genome[None], cotangents))


# ---------------------------------------------------------------------------------------------------------------
# A search


CROWD = 10


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and ten fine-tunes of it."""
    return build_family(tmp_path_factory.mktemp("crowd"), parents=CROWD)


def crowded(**space: Any) -> dict[str, Any]:
    searched = {"weight": {"low": -0.5, "high": 1.0}, "density": {}}
    return search_config(
        parents=[f"parent{k}" for k in range(CROWD)],
        space={"method": "ties", "layers_per_group": "all", "components": ["attention+mlp+norm+embed+final_norm"],
               "parameters": searched} | space,
        tasks=[{"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": 0.25}],
    )  # fmt: skip


GROUPS = {"first": ["parent0", "parent3"], "last": ["parent[5-9]"]}


@thorough
def test_a_search_over_groups_of_which_some_count(
    crowd: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The winner is what its recipe gives, parents of a group have one weight, and those that do not count have 0."""
    monkeypatch.setattr(sums, "UNROLLED", 4)
    config = write_yaml(crowd.root / "config.yaml", crowded(parent_groups=GROUPS, active=2))
    out = tmp_path / "run"
    assert command("search", config, "--out", out) == 0
    # Two groups, and a gene for each of the other parents.
    groups = len(GROUPS) + 3
    result = read_json(out / "result.json")
    assert len(result["genome"]) == 2 * groups
    recipe = yaml.safe_load((out / "best/recipe.yaml").read_text())
    sources = recipe["slices"][0]["sources"]
    weights = {Path(s["model"]).name: s["parameters"]["weight"] for s in sources if "parameters" in s}
    assert len(weights) == CROWD
    assert weights["parent0"] == weights["parent3"]
    assert len({weights[f"parent{k}"] for k in range(5, 10)}) == 1
    by_group = [weights[name] for name in ("parent0", "parent5", "parent1", "parent2", "parent4")]
    assert sum(weight != 0 for weight in by_group) in (2, groups)
    assert command("merge", out / "best/recipe.yaml", tmp_path / "again") == 0
    winner = (out / "best/model/model.safetensors").read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == winner
    # What the run keeps names the parents as it has them, and can be searched with again.
    kept = yaml.safe_load((out / "config.yaml").read_text())
    groups_kept = kept["space"]["parent_groups"]
    assert {name: [Path(parent).name for parent in members] for name, members in groups_kept.items()} == {
        "first": ["parent0", "parent3"], "last": [f"parent{k}" for k in range(5, 10)]
    }  # fmt: skip
    assert {parent for members in groups_kept.values() for parent in members} <= set(kept["parents"])
    assert command("search", out / "config.yaml", "--out", out, "--resume") == 0


def test_spaces_without_groups_are_kept_as_before_there_were_any() -> None:
    """Runs of earlier versions can be resumed."""
    assert not {"parent_groups", "active"} & set(SpaceConfig(method="ties").model_dump(mode="json"))
    given = SpaceConfig(method="ties", parent_groups={"a": ["x"]}, active=2).model_dump(mode="json")
    assert (given["parent_groups"], given["active"]) == ({"a": ["x"]}, 2)


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown parent": ({"parent_groups": {"a": ["parnt1"]}}, ("parent_groups.a", "'parnt1'", "'parent1'")),
    "a pattern of none": ({"parent_groups": {"a": ["x*"]}}, ("parent_groups.a", "'x*'", "parents")),
    "a parent in two groups": (
        {"parent_groups": {"a": ["parent1"], "b": ["parent[12]"]}}, ("parent_groups.b", "'parent1'", "group a"),
    ),
    "an empty group": ({"parent_groups": {"a": []}}, ("parent_groups.a", "a list of 1 to")),
    "groups where nothing is a parent's": (
        {"method": "sce", "parameters": {}, "parent_groups": {"a": ["parent1"]}}, ("parent_groups", "select_topk"),
    ),
    "a start for each parent": (
        {"parent_groups": GROUPS, "parameters": {"weight": {"start": [0.1] * 10}}}, ("weight", "10 numbers", "1 or 5"),
    ),
    "more active than parents": ({"active": 11}, ("active", "11", "10 at most", "parents")),
    "more active than groups": ({"active": 6, "parent_groups": GROUPS}, ("active", "6", "5 at most", "groups")),
    "none active": ({"active": 0}, ("active", "1 to 1,000")),
    "no weight to choose by": ({"active": 2, "parameters": {"density": {}}}, ("active", "weight")),
    "active and smooth": ({"active": 2, "smooth": True}, ("active", "smooth")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_groups_are_refused_in_one_line(case: str, crowd: Family, tmp_path: Path) -> None:
    space, expected = REFUSED[case]
    config = write_yaml(crowd.root / "refused.yaml", crowded(**space))
    (line,) = run_here("search", config, "--out", tmp_path / "run", status=2).stderr.splitlines()
    assert str(config) in line
    for text in expected:
        assert text in line
    assert not (tmp_path / "run").exists()


def test_seeds_that_parents_of_a_group_cannot_have_are_refused(
    crowd: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_yaml(crowd.root / "seeds.yaml", crowded(parent_groups=GROUPS))
    assert command("search", config, "--out", tmp_path / "run", "--set", "search.seeds=[parents]") == WRONG_INPUT
    (line,) = capfd.readouterr().err.splitlines()
    assert "seeds" in line and "share" in line
