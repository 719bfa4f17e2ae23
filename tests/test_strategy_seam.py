"""A search strategy of one's own: written here alone, found by its name in configs and by `search_pytrees`."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import struct
from helpers import write_lines

from evojax_merge import pipeline, search_pytrees
from evojax_merge.errors import Failed, InputError
from evojax_merge.problem import build_problem, read_config
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.search.strategies.registry import StrategySettings, register_strategy


@struct.dataclass
class Climbed:
    best: jax.Array
    fitness: jax.Array


@dataclass(frozen=True)
class HillClimber:
    """(1 + P): P steps around the best genome so far, the first of which is that genome itself."""

    dims: int
    population: int
    sigma: float
    name: str = "hill_climber"

    def init(self, key, genomes):
        return Climbed(jnp.asarray(genomes[0]), jnp.float32(-jnp.inf))

    def ask(self, key, state):
        steps = self.sigma * jax.random.normal(key, (self.population, self.dims))
        return state.best + steps.at[0].set(0.0), state

    def tell(self, key, state, genomes, scores):
        fitness = np.where(np.isfinite(scores.fitness), scores.fitness, -np.inf)
        first = int(np.argmax(fitness))
        if fitness[first] <= state.fitness:
            return state
        return Climbed(genomes[first], jnp.float32(fitness[first]))

    def finalists(self, state):
        return np.asarray(state.best)[None]

    def metrics(self, state):
        return {"highest": float(state.fitness)}


def hill_climber(settings: StrategySettings) -> HillClimber:
    """A hill climber of fixed steps."""
    return HillClimber(settings.dims, settings.population or 6, settings.sigma)


register_strategy("hill_climber", hill_climber)


@pytest.fixture
def config(family, tmp_path):
    words = iter(np.random.default_rng(0).integers(4, 64, 12 * 6).tolist())
    records = [{"prompt": f"w{next(words)} w{next(words)}", "target": f"w{next(words)}"} for _ in range(12)]
    write_lines(tmp_path / "tasks.jsonl", records)
    document: dict[str, Any] = {
        "base": str(family.base),
        "parents": [str(parent) for parent in family.parents],
        "space": {"method": "task_arithmetic", "layers_per_group": "all"},
        "tasks": [{"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": 0.25}],
        "search": {"generations": 3, "strategy": "hill_climber"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_config_names_it(config, tmp_path):
    pipeline.search(config, tmp_path / "run", resume=False, overwrite=False, seed=None, overrides=[])
    history = RunFolder(tmp_path / "run").read_history()
    best = [row["highest"] for row in history]
    assert len(history) == 3 and best == sorted(best)
    assert [row["best_so_far"] for row in history] == pytest.approx(best)
    # The state and the genomes that were told of are what a continuation starts from.
    pipeline.search(config, tmp_path / "parts", False, False, None, ["search.generations=1"])
    pipeline.search(config, tmp_path / "parts", resume=True, overwrite=False, seed=None, overrides=[])
    assert (tmp_path / "parts/history.jsonl").read_bytes() == (tmp_path / "run/history.jsonl").read_bytes()
    assert "hill_climber over" in (tmp_path / "run/best/model/README.md").read_text()


def test_history_carries_what_every_candidate_was_and_scored(config, tmp_path):
    pipeline.search(config, tmp_path / "run", resume=False, overwrite=False, seed=None, overrides=[])
    problem = build_problem(config, read_config(config, [], None))
    for row in RunFolder(tmp_path / "run").read_history():
        genomes = np.array(row["genomes"], np.float32)
        assert genomes.shape == (6, problem.space.dims)
        # As many digits as float32 needs to be the same again, and no more.
        assert row["genomes"] == [[float(str(gene)) for gene in genome] for genome in genomes]
        assert row["task_scores"]["text"] == pytest.approx(row["fitness"])


def test_search_pytrees_takes_it():
    def fitness(merged):
        return -jnp.square(merged["w"] - 0.25).sum()

    parents = [{"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}]
    found = search_pytrees(parents, fitness, strategy="hill_climber", generations=60, fixed={}, normalize=True)
    assert found.fitness > -1e-3
    assert [row["highest"] for row in found.history] == [row["best_so_far"] for row in found.history]


def test_what_a_strategy_cannot_be_is_told(config):
    with pytest.raises(ValueError, match="there is a strategy 'cma_es' already"):
        register_strategy("cma_es", hill_climber)
    with pytest.raises(InputError, match=r"search\.strategy: unknown strategy 'hill_climbr' \(did you mean 'hill_"):
        build_problem(config, read_config(config, ["search.strategy=hill_climbr"], None))

    def fixed(settings):
        return HillClimber(settings.dims, 5, settings.sigma)

    register_strategy("five", fixed)
    with pytest.raises(InputError, match="population: 8; the strategy five has populations of 5"):
        build_problem(config, read_config(config, ["search.strategy=five", "search.population=8"], None))

    class Narrow(HillClimber):
        def ask(self, key, state):
            genomes, state = super().ask(key, state)
            return genomes[:, :-1], state

    register_strategy("narrow", lambda settings: Narrow(settings.dims, 5, settings.sigma))
    parents = [{"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}]
    with pytest.raises(Failed, match=r"hill_climber asked for genomes of shape \[5, 1\]; expected \[5, 2\]"):
        search_pytrees(parents, lambda merged: merged["w"].sum(), strategy="narrow")
