"""Gradients with respect to the scales of a layer path: against torch's in float64, from a path's scales to a genome,
and steps that follow them (test_gradients.py: whole searches)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.models import load_torch
from helpers.sampling import sample
from reference.layer_paths import torch_likelihood_gradient
from test_data_flow import BOUNDS, Setting, random_path, write_path

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.evaluation.scores import fitness
from evojax_merge.models.paths import LayerPath
from evojax_merge.problem import build_strategy
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.successive_halving import empty_matrix, shard_parts
from evojax_merge.spaces.layer_path import IndicatorSpace, LayerEdit, MoveSpace, PathSpace


@pytest.fixture(scope="module", params=sample([0, 40], 1))
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Two parents and a likelihood, behind a header of so many words that all rows share."""
    setting = Setting(tmp_path_factory.mktemp("setting"), request.param)
    setting.tasks = setting.tasks[:1]
    return setting


# ---------------------------------------------------------------------------------------------------------------
# Through the layers


def in_torch(setting: Setting, path: LayerPath, out: Path) -> tuple[float, np.ndarray]:
    """The fitness of a path and its derivative with respect to the scales, by torch."""
    plain = LayerPath(path.layers, (1.0,) * len(path.layers), path.embedding_parent)
    model = load_torch(write_path(plain, setting.spec, setting.folders, out)).double()
    (batched_task,) = setting.evaluator().batched_tasks
    texts = [(row.tokens[: row.start], row.tokens[row.start :]) for row in batched_task.requests.scored]
    return torch_likelihood_gradient(model, path.scales, texts)


def test_gradients_are_those_of_torch_in_float64(setting: Setting, tmp_path: Path) -> None:
    """Of paths through the same layers, which share a pass, and through others."""
    rng = np.random.default_rng(0)
    # Of both parents, and a layer twice; of one kind of attention after the other, all of them.
    scales = [random_path(rng, 7, 3).scales for _ in range(3)]
    paths = [LayerPath((3, 5, 5), scales[0]), LayerPath((0, 2, 6), scales[1], 1), None, LayerPath((3, 5, 5), scales[2])]
    evaluator, done = setting.paths(), []
    scores, gradients = evaluator.value_and_gradient(paths, done.append)
    values = fitness(evaluator.tasks, scores)
    assert sum(done) == evaluator.passes(len(paths))
    assert np.isnan(values[2]) and gradients[2] is None
    for number, (path, value, gradient) in enumerate(zip(paths, values, gradients, strict=True)):
        if path is not None:
            expected_value, expected = in_torch(setting, path, tmp_path / f"path{number}")
            assert value == pytest.approx(expected_value, abs=1e-5)
            np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_a_path_that_fails_has_no_gradient_and_harms_no_other(setting: Setting) -> None:
    paths = [LayerPath((0, 1, 2), (1.0, scale, 1.0)) for scale in (1.1, 1e-38, 0.9)]
    evaluator = setting.paths()
    scores, gradients = evaluator.value_and_gradient(paths)
    values = fitness(evaluator.tasks, scores)
    assert np.isfinite(values).tolist() == [True, False, True]
    _, expected = evaluator.value_and_gradient(paths[::2])
    np.testing.assert_allclose([gradients[0], gradients[2]], expected, rtol=1e-5)


def test_steps_along_the_gradient_climb_and_keep_the_layers(setting: Setting) -> None:
    """From the first parent, each of whose layers has a scale of its own."""
    space = MoveSpace((3, 4), 3, 1, BOUNDS, True, 12, 0)
    scorer = SpaceEvaluator(space, setting.paths())
    strategy = build_strategy("search", SearchConfig(strategy="gradient", generations=8), space)
    key = jax.random.key(0)
    state, values = strategy.init(key, space.start[None]), []
    for _ in range(8):
        genomes, state = strategy.ask(key, state)
        scores, gradients = scorer.value_and_gradient(np.asarray(genomes))
        values.append(float(fitness(scorer.tasks, scores)[0]))
        matrix = empty_matrix(shard_parts([scorer]), 1)
        told = replace(matrix, predicted=np.array(values[-1:]), gradients=gradients)
        state = strategy.tell(key, state, genomes, told)
    (path,) = space.decode(strategy.finalists(state))
    assert path is not None and path.layers == (0, 1, 2) and min(np.abs(path.residual_scales() - 1)) > 1e-3
    assert max(values) > values[0] + 0.01


# ---------------------------------------------------------------------------------------------------------------
# From the scales to the genome


def weighted(paths: Sequence[LayerPath | None], weights: np.ndarray) -> np.ndarray:
    """A function of paths' scales: float64[P]."""
    found = []
    for path in paths:
        assert path is not None
        found.append(float(np.log(path.scales) @ weights))
    return np.array(found)


def indicator(scales: str) -> tuple[PathSpace, np.ndarray]:
    space = IndicatorSpace((2, 2), 2, scales, BOUNDS, 8, 0)
    genome = space.genome(np.array([1, 0, 1, 1, 1, 0, 1, 1], bool))
    genome[space.num_indicators :] = np.random.default_rng(1).uniform(0.2, 0.8, space.scale_dims)
    return space, genome


def moves() -> tuple[PathSpace, np.ndarray]:
    """A block that is scaled twice, another one that is repeated, and a move that has no effect."""
    space = MoveSpace((4, 4), 5, 3, BOUNDS, True, 12, 0)
    edits = [
        LayerEdit("scale", 0, 3, 0.8), LayerEdit("scale", 1, 1, 1.3), LayerEdit("repeat", 1, 2, 0.9),
        LayerEdit("splice", 3, 1, 1.2, 1), LayerEdit("skip", 0, 1, 0.7),
    ]  # fmt: skip
    return space, space.genome(edits)


@pytest.mark.parametrize(
    "made", [indicator("matrix"), indicator("network"), moves()], ids=["matrix", "network", "moves"]
)
def test_genes_of_scales_have_the_derivatives_of_differences_and_others_none(
    made: tuple[PathSpace, np.ndarray],
) -> None:
    space, genome = made
    (path,) = space.decode(genome[None])
    assert path is not None
    weights = np.random.default_rng(2).normal(size=len(path.scales))
    (found,) = space.pull_back(genome[None], [weights / path.scales])
    assert found.dtype == np.float32 and found.shape == genome.shape
    step = np.float32(2**-7)
    moved = np.concatenate([genome + step * np.eye(space.dims), genome - step * np.eye(space.dims)])
    up, down = np.split(weighted(space.decode(moved.astype(np.float32)), weights), 2)
    differences = (up - down) / (2 * step)
    assert np.count_nonzero(np.abs(differences) > 1e-3) > 2
    np.testing.assert_allclose(found, differences, rtol=2e-3, atol=2e-3)
    # A genome without a path has none.
    nothing = np.concatenate([space.pull_back(genome[None], [None]), space.pull_back(genome[None] * 0 + 0.1, [None])])
    assert not nothing.any()
