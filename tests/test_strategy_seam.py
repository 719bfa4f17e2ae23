"""A search strategy of one's own: written here alone, found by its name in configs and in a study."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import struct
from helpers.files import write_lines, write_yaml
from helpers.searches import open_problem, search_config, task_section
from helpers.trees import search_trees
from hostile import run_script

import evojax_merge as em
from evojax_merge.commands import search as search_command
from evojax_merge.errors import Failed, InputError
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.protocols import Capabilities, capabilities_of, context_of
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.search.seeding import seeded
from evojax_merge.search.strategies.evosax import EvosaxStrategy
from evojax_merge.search.strategies.registry import StrategySettings, begin_with, register_strategy


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
    document = search_config(
        family, space={"method": "task_arithmetic", "layers_per_group": "all"}, tasks=[task_section(heldout=0.25)]
    ) | {"search": {"generations": 3, "strategy": "hill_climber"}}
    return write_yaml(tmp_path / "config.yaml", document)


def test_a_config_names_it(config, tmp_path):
    search_command.search(config, tmp_path / "run", resume=False, overwrite=False, seed=None, overrides=[])
    history = RunFolder(tmp_path / "run").read_history()
    best = [row["highest"] for row in history]
    assert len(history) == 3 and best == sorted(best)
    assert [row["best_so_far"] for row in history] == pytest.approx(best)
    # The state and the genomes that were told of are what a continuation starts from.
    search_command.search(config, tmp_path / "parts", False, False, None, ["search.generations=1"])
    search_command.search(config, tmp_path / "parts", resume=True, overwrite=False, seed=None, overrides=[])
    assert (tmp_path / "parts/history.jsonl").read_bytes() == (tmp_path / "run/history.jsonl").read_bytes()
    assert "hill_climber over" in (tmp_path / "run/best/model/README.md").read_text()


def test_history_carries_what_every_candidate_was_and_scored(config, tmp_path):
    search_command.search(config, tmp_path / "run", resume=False, overwrite=False, seed=None, overrides=[])
    problem = open_problem(config)
    for row in RunFolder(tmp_path / "run").read_history():
        genomes = np.array(row["genomes"], np.float32)
        assert genomes.shape == (6, problem.space.dims)
        # As many digits as float32 needs to be the same again, and no more.
        assert row["genomes"] == [[float(str(gene)) for gene in genome] for genome in genomes]
        assert row["task_scores"]["text"] == pytest.approx(row["fitness"])


def test_evolve_and_the_evaluator_of_the_public_api(config, tmp_path, capsys):
    seen: list[em.Generation] = []
    run = em.evolve(config, out=tmp_path / "run", seed=4, on_generation=seen.append)
    assert capsys.readouterr().out == ""
    assert [generation.number for generation in seen] == [row["generation"] for row in run.history] == [1, 2, 3]
    assert run.finished and run.config["seed"] == 4
    for generation, row in zip(seen, run.history, strict=True):
        assert generation.fitness.tolist() == row["fitness"] and generation.best_so_far == row["best_so_far"]
    # A mapping says what the file does; relative paths start in the working directory.
    document = yaml.safe_load(config.read_text())
    document["tasks"][0]["file"] = str(tmp_path / "tasks.jsonl")
    again = em.evolve(document, out=tmp_path / "mapping", seed=4)
    assert again.history == run.history
    with pytest.raises(em.InputError, match="holds a run already"):
        em.evolve(config, out=tmp_path / "run", seed=4)
    # An own loop scores what the search scored.
    evaluator = em.Evaluator(config, seed=4)
    genomes = np.array(run.history[1]["genomes"], np.float32)
    scores = evaluator.scores(genomes)
    assert scores.fitness == pytest.approx(run.history[1]["fitness"], abs=1e-5)
    assert scores.values.shape == (6, 9) and scores.tasks == ("text",)
    winner = np.array(run.result["genome"], np.float32)
    heldout = em.Evaluator(config, seed=4, split="heldout").scores(winner[None]).fitness[0]
    (row,) = (row for row in run.table if row["role"] == "winner")
    assert heldout == pytest.approx(row["heldout_fitness"], abs=1e-5)
    merged = em.merge(evaluator.recipe(winner), tmp_path / "merged")
    assert (merged / "model.safetensors").read_bytes() == (run.model / "model.safetensors").read_bytes()
    with pytest.raises(em.InputError, match=r"genomes: shape \[2\]; expected numbers of shape \[P, "):
        evaluator.scores(np.zeros(2))


def test_the_example_of_an_own_strategy_runs(config, tmp_path):
    """configs/own_strategy.py, as a user runs it, on tiny models."""
    script = Path(__file__).resolve().parent.parent / "configs" / "own_strategy.py"
    changes = ["search.generations=2", "search.population=5", "search.strategy=cma_es"]
    done = run_script(script, config, tmp_path / "run", *changes)
    assert "evolved task_arithmetic: " in done.stdout and "by hand, generation 2: best " in done.stdout
    history = RunFolder(tmp_path / "run").read_history()
    assert [len(row["fitness"]) for row in history] == [5, 5]
    assert load_yaml(tmp_path / "run/config.yaml")["search"]["strategy"] == "snes"


@pytest.mark.parametrize(("changes", "is_seeded"), [([], True), (["search.seeds=[]"], False)])
def test_it_begins_with_its_own_seeds(config, tmp_path, changes, is_seeded):
    register_strategy("seeded_climber", begin_with("task_vectors")(lambda settings: hill_climber(settings)))
    changes = ["search.strategy=seeded_climber", "search.generations=1", *changes]
    search_command.search(config, tmp_path / "run", False, False, None, changes)
    (row,) = RunFolder(tmp_path / "run").read_history()
    problem = open_problem(config, *changes)
    seeds = problem.space.seed_genomes("seeds", "task_vectors")
    assert (np.array(row["genomes"], np.float32)[: len(seeds)] == seeds).all() == is_seeded


def test_its_capabilities_are_data():
    """Methods of the same names without `capabilities` are not asked; with it they are, seeded or not."""
    calls = []

    class Able(HillClimber):
        def inject(self, state, genomes, count):
            calls.append(count)
            return genomes, state

        def context(self, state):
            return np.asarray(state.best)

    class Saying(Able):
        capabilities = Capabilities(keeps_front=True, takes_injected=True, lends_context=True)

    # The seed is the worst of its generation.
    key, scores = jax.random.key(0), SimpleNamespace(fitness=np.arange(4.0))
    for strategy, count, able in ((Able(2, 4, 0.1), 0, False), (Saying(2, 4, 0.1), 1, True)):
        with_seed = seeded(strategy, np.ones((1, 2), np.float32))
        state = with_seed.init(key, np.zeros((1, 2), np.float32))
        genomes, state = with_seed.ask(key, state)
        state = with_seed.tell(key, state, genomes, scores)
        assert calls == [1] * count
        assert capabilities_of(with_seed).keeps_front == capabilities_of(strategy).keeps_front == able
        lent = context_of(with_seed, state)
        assert (lent == np.asarray(genomes)[3]).all() if able else lent is None


def test_a_study_takes_it():
    def fitness(merged):
        return -jnp.square(merged["w"] - 0.25).sum()

    parents = [{"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}]
    found = search_trees(parents, fitness, strategy="hill_climber", generations=60, fixed={}, normalize=True)
    assert found.best.fitness > -1e-3
    assert [row["highest"] for row in found.history] == [row["best_so_far"] for row in found.history]


def test_what_a_strategy_cannot_be_is_told(config):
    with pytest.raises(ValueError, match="there is a strategy 'cma_es' already"):
        register_strategy("cma_es", hill_climber)
    with pytest.raises(InputError, match=r"search\.strategy: unknown strategy 'hill_climbr' \(did you mean 'hill_"):
        open_problem(config, "search.strategy=hill_climbr")

    def fixed(settings):
        return HillClimber(settings.dims, 5, settings.sigma)

    register_strategy("five", fixed)
    with pytest.raises(InputError, match="population: 8; the strategy five has populations of 5"):
        open_problem(config, "search.strategy=five", "search.population=8")

    register_strategy("empty", lambda settings: object())
    with pytest.raises(InputError, match="the strategy empty lacks name, population, init, ask"):
        open_problem(config, "search.strategy=empty")

    class Able(HillClimber):
        capabilities: Any = None

    register_strategy("half", lambda settings: Able(settings.dims, 6, settings.sigma))
    lacking = {
        "wants_gradients, gradient_generations": Capabilities(differentiates="companion"),
        "inject": Capabilities(takes_injected=True),
        "context": Capabilities(lends_context=True),
    }
    for members, Able.capabilities in lacking.items():
        with pytest.raises(InputError, match=f"the strategy half lacks {members};"):
            open_problem(config, "search.strategy=half")
    Able.capabilities = {"takes_injected": True}
    with pytest.raises(InputError, match=r"half has capabilities \{'takes_injected': True\}; expected a Capabilities"):
        open_problem(config, "search.strategy=half")

    from evosax.algorithms import PSO

    swarm = PSO(8, np.zeros(2))
    register_strategy("swarm", lambda settings: EvosaxStrategy("swarm", swarm, swarm.default_params))
    with pytest.raises(InputError, match="strategy swarm: evosax's PSO keeps a population; wrap it in Population"):
        open_problem(config, "search.strategy=swarm")

    class Narrow(HillClimber):
        def ask(self, key, state):
            genomes, state = super().ask(key, state)
            return genomes[:, :-1], state

    register_strategy("narrow", lambda settings: Narrow(settings.dims, 5, settings.sigma))
    parents = [{"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}]
    with pytest.raises(Failed, match=r"hill_climber asked for genomes of shape \[5, 1\]; expected \[5, 2\]"):
        search_trees(parents, lambda merged: merged["w"].sum(), strategy="narrow")
