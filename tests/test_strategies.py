"""All strategies by name: known functions, ties, failures, continued runs, seeds, bad input."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling import sample
from helpers.trees import search_trees
from pydantic import ValidationError

import evojax_merge as em
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.protocols import capabilities_of
from evojax_merge.search.seeding import seeded
from evojax_merge.search.strategies import pso
from evojax_merge.search.strategies.registry import StrategySettings, find_strategy, make_strategy
from evojax_merge.search.strategies.restarts import MAX_MULTIPLE
from evojax_merge.spaces.bounds import from_unit, to_unit
from evojax_merge.spaces.layer_path import IndicatorSpace, MoveSpace, ScaleBounds

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.searches.strategy_functions import FUNCTIONS, evaluations, pycma, scores_of

BUILT_IN = [
    "cma_es",
    "sep_cma_es",
    "lm_ma_es",
    "xnes",
    "ipop_cma_es",
    "bipop_cma_es",
    "de",
    "pso",
    "ga",
    "random",
    "grid",
]
LEARNING = [name for name in BUILT_IN if name not in ("random", "grid")]


def make(name: str, dims: int = 10, population: int | None = None, seeds: int = 0) -> Any:
    settings = StrategySettings(dims, population, 1 / 6, 100, from_unit, seeds)
    return make_strategy("search", name, settings)


def init(strategy: Any, dims: int, start: float = 0.5, seed: int = 0) -> Any:
    return strategy.init(generation_key(seed, INIT_KEY), np.full((1, dims), start, np.float32))


def drive(strategy: Any, state: Any, fitness: Any, generations: int, first: int = 0) -> Any:
    for number in range(first, first + generations):
        genomes, state = strategy.ask(generation_key(0, number), state)
        state = strategy.tell(generation_key(0, number), state, genomes, scores_of(fitness(np.asarray(genomes))))
    return state


def asked(strategy: Any, state: Any, number: int = 10_000) -> np.ndarray:
    return np.asarray(strategy.ask(generation_key(0, number), state)[0])


# ---------------------------------------------------------------------------------------------------------------
# Functions whose optimum is known


@pytest.mark.parametrize("function", sample(FUNCTIONS, 1))
def test_cma_es_needs_at_most_a_fifth_more_than_pycma_to_1e_8(function: str) -> None:
    value, start = FUNCTIONS[function]
    ours, theirs = (
        np.median([run(value, start, 10, seed, 20_000) for seed in range(5)])
        for run in (lambda *rest: evaluations("cma_es", *rest), pycma)
    )
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize(
    ("name", "most"),
    # Evaluations to 1e-8 on the sphere of 10 dimensions: half as many again as measured.
    sample(
        [("sep_cma_es", 2_100), ("lm_ma_es", 3_000), ("xnes", 6_000), ("ipop_cma_es", 2_100), ("bipop_cma_es", 2_100),
         ("de", 6_000), ("pso", 8_000), ("ga", 12_000)],
        2,
    ),
)  # fmt: skip
def test_strategies_converge(name: str, most: int) -> None:
    value, start = FUNCTIONS["sphere"]
    assert evaluations(name, value, start, 10, 0, most) <= most


@pytest.mark.parametrize("name", ["cma_es", "sep_cma_es"])
def test_a_search_that_has_converged_goes_on(name: str) -> None:
    """Long after float32 tells no genome from the optimum, they are still finite."""
    strategy = make(name, 2)
    state = drive(strategy, init(strategy, 2), lambda genomes: -np.square(genomes - 0.3).sum(axis=1), 450)
    np.testing.assert_allclose(asked(strategy, state), 0.3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Ties and failures


@pytest.mark.parametrize("name", sample(BUILT_IN, 2))
def test_ties_collapse_nothing(name: str) -> None:
    """300 generations without any signal: what is asked for is still spread over more than a thousandth of the range
    (runs of small steps after a restart excepted), and finite."""
    dims = 2 if name == "grid" else 10
    strategy = make(name, dims)
    state = drive(strategy, init(strategy, dims), lambda genomes: np.zeros(len(genomes)), 300)
    genomes = asked(strategy, state)
    assert np.isfinite(genomes).all()
    if name == "bipop_cma_es":
        assert strategy.metrics(state)["restarts"] > 1 and float(state.run.std) > 0.1 * float(state.sigma)
    else:
        assert 1e-3 < np.std(genomes, axis=0).mean() < 1e3


@pytest.mark.parametrize("name", sample(BUILT_IN, 3))
def test_a_failed_candidate_is_the_worst(name: str) -> None:
    dims = 2 if name == "grid" else 10
    strategy = make(name, dims)

    def told(failed: float) -> Any:
        def fitness(genomes: np.ndarray) -> np.ndarray:
            values = -np.square(genomes - 0.3).sum(axis=1)
            values[3] = failed
            return values

        return drive(strategy, init(strategy, dims), fitness, 3)

    states = [told(failed) for failed in (np.nan, -np.inf, np.inf)]
    for other in states[1:]:
        for one, another in zip(*map(jax.tree.leaves, (states[0], other)), strict=True):
            np.testing.assert_array_equal(one, another)
    # Far worse than all others, and failed: what is asked for next is the same.
    np.testing.assert_array_equal(asked(strategy, states[0]), asked(strategy, told(-1e6)))
    assert np.isfinite(asked(strategy, states[0])).all()


@pytest.mark.parametrize("name", sample(BUILT_IN, 2))
def test_states_keep_their_structure(name: str) -> None:
    """Shapes and types of the state are the first ones after any number of generations, restarts among them: whatever
    the first compiles serves all others."""
    dims = 2 if name == "grid" else 3
    strategy = make(name, dims)
    first = init(strategy, dims)
    state = drive(strategy, first, lambda genomes: -np.square(genomes - 0.3).sum(axis=1).round(2), 80)
    assert jax.tree.structure(first) == jax.tree.structure(state)
    shapes = [[jax.typeof(leaf) for leaf in jax.tree.leaves(one)] for one in (first, state)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["de", "pso", "ga", "random"])
def test_the_first_generation_is_the_initial_population(name: str) -> None:
    strategy = make(name)
    state = init(strategy, 10, start=0.4)
    genomes = asked(strategy, state, 0)
    np.testing.assert_array_equal(genomes[0], np.full(10, 0.4, np.float32))
    assert len(np.unique(genomes, axis=0)) == strategy.population
    assert 0.3 / 6 < np.std(genomes) < 2


# ---------------------------------------------------------------------------------------------------------------
# Restarts


def test_ipop_doubles_its_population_over_several_generations() -> None:
    strategy = make("ipop_cma_es", 3, 6)
    state, multiples, distributions = init(strategy, 3), [], []
    for number in range(160):
        genomes, state = strategy.ask(generation_key(0, number), state)
        assert genomes.shape == (6, 3)
        state = strategy.tell(generation_key(0, number), state, genomes, scores_of(np.zeros(6)))
        multiples.append(int(state.multiple))
        distributions.append(np.asarray(state.run.mean).tobytes())
    assert sorted(set(multiples)) == [1, 2, 4, 8] and multiples == sorted(multiples)
    # Within a population of 2 P the mean stays; from one population to the next it moves.
    first = multiples.index(2)
    assert distributions[first] == distributions[first + 1] != distributions[first + 2] == distributions[first + 3]
    assert strategy.finalists(state).shape == (2, 3)


def test_restarts_find_what_one_run_misses() -> None:
    """Rastrigin's function, whose local optima are on a grid of ten in each dimension."""

    def rastrigin(genomes: np.ndarray) -> np.ndarray:
        x = 10 * (np.asarray(to_unit(jnp.asarray(genomes)), np.float64) - 0.37)
        return -(10 * x.shape[1] + (x**2 - 10 * np.cos(2 * np.pi * x)).sum(axis=1))

    found, restarting = {}, sample(("ipop_cma_es", "bipop_cma_es"), 1)
    for name in ("cma_es", *restarting):
        best = []
        for seed in range(2):
            strategy, highest = make(name, 3), -np.inf
            state = init(strategy, 3, seed=seed)
            for number in range(400):
                key = generation_key(seed, number)
                genomes, state = strategy.ask(key, state)
                values = rastrigin(np.asarray(genomes))
                highest = max(highest, values.max())
                state = strategy.tell(key, state, genomes, scores_of(values))
            best.append(highest)
        found[name] = best
    # Optima are about 1 apart; which one a run ends in depends on how the processor rounds.
    for name in restarting:
        assert np.mean(found[name]) > np.mean(found["cma_es"]) + 0.3


def test_bipop_spends_on_small_runs_what_it_spends_on_large_ones() -> None:
    strategy = make("bipop_cma_es", 3, 6)
    state = drive(strategy, init(strategy, 3), lambda genomes: np.zeros(len(genomes)), 600)
    large, small = (int(spent) for spent in state.spent)
    assert large + small == 600 and 0.25 < small / large < 2
    assert int(state.large) <= MAX_MULTIPLE


# ---------------------------------------------------------------------------------------------------------------
# The swarm


def zhan_factor(places: np.ndarray, leader: int) -> float:
    means = [
        sum(np.sqrt(np.square(one - other).sum()) for other in places) / (len(places) - 1)
        for one in places.astype(float)
    ]
    return (means[leader] - min(means)) / (max(means) - min(means))


def zhan_degrees(f: float) -> list[float]:
    """The memberships of exploration, exploitation, convergence and jumping out, piece by piece."""
    exploration = 5 * f - 2 if 0.4 < f <= 0.6 else 1.0 if 0.6 < f <= 0.7 else -10 * f + 8 if 0.7 < f <= 0.8 else 0.0
    exploitation = 10 * f - 2 if 0.2 < f <= 0.3 else 1.0 if 0.3 < f <= 0.4 else -5 * f + 3 if 0.4 < f <= 0.6 else 0.0
    convergence = 1.0 if f <= 0.1 else -5 * f + 1.5 if f <= 0.3 else 0.0
    jumping_out = 0.0 if f <= 0.7 else 5 * f - 3.5 if f <= 0.9 else 1.0
    return [exploration, exploitation, convergence, jumping_out]


def zhan_phase(f: float, phase: int) -> int:
    degrees = zhan_degrees(f)
    for candidate in (phase, (phase + 1) % 4):
        if degrees[candidate] > 1e-6:
            return candidate
    return int(np.argmax(degrees))


def zhan_coefficients(phase: int, rate: float, c1: float, c2: float) -> tuple[float, float]:
    up, down = ((1, -1), (0.5, -0.5), (0.5, 0.5), (-1, 1))[phase]
    c1, c2 = (min(max(c + rate * sign, 1.5), 2.5) for c, sign in ((c1, up), (c2, down)))
    return (c1, c2) if c1 + c2 <= 4 else (4 * c1 / (c1 + c2), 4 * c2 / (c1 + c2))


def test_the_rules_of_a_swarm_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        places, leader = rng.normal(size=(7, 3)).astype(np.float32), int(rng.integers(7))
        factor = float(pso.evolutionary_factor(places, places[leader]))
        assert factor == pytest.approx(zhan_factor(places, leader), abs=1e-5)
        assert float(pso.evolutionary_factor(places, places[leader] + 99.0)) == 1.0
    # Between the bends, where rounding decides.
    for f in np.linspace(0.005, 0.995, 66):
        np.testing.assert_allclose(pso.memberships(f), zhan_degrees(f), atol=1e-5)
        assert float(pso.adapted_inertia(f)) == pytest.approx(1 / (1 + 1.5 * np.exp(-2.6 * f)), rel=1e-5)
        for phase in range(4):
            assert int(pso.next_phase(f, jnp.int32(phase))) == zhan_phase(f, phase)
    for phase in range(4):
        rate, first = rng.uniform(0.05, 0.1), rng.uniform(1.5, 2.5, 2)
        adapted = pso.adapted_coefficients(rate, phase, jnp.asarray(first, jnp.float32))
        np.testing.assert_allclose(adapted, zhan_coefficients(phase, rate, *first), rtol=1e-5)


def test_the_leader_tries_small_changes_of_its_best_place() -> None:
    place, bounds = jnp.array([0.1, 0.25, 0.5, 0.9], jnp.float32), (0.0, 1.0)
    tried = np.stack([np.asarray(pso.mutated(bounds, key, place)) for key in jax.random.split(jax.random.key(0), 200)])
    steps = tried - np.asarray(place)
    assert (np.abs(steps) > 0).any(axis=1).all() and tried.min() >= 0 and tried.max() <= 1
    # A gene on average, or one where none was drawn; between the bounds up as often as down, and by little.
    assert 1 <= (steps != 0).sum(axis=1).mean() < 1.7
    inside = steps[:, 1:3][steps[:, 1:3] != 0]
    assert 0.35 < np.mean(inside > 0) < 0.65 and np.median(np.abs(inside)) < 0.1


def test_a_swarm_moves_by_its_coefficients_and_stays_between_the_bounds() -> None:
    strategy = make("pso", 3, 12)
    (low, high), fitness = strategy.settings.range, lambda genomes: -np.square(genomes - 1.0).sum(axis=1)
    state = init(strategy, 3)
    # A gene of each of twelve equal parts of the range, but for the start.
    parts = np.floor(12 * (np.asarray(state.places) - low) / (high - low))
    assert all(len(np.unique(column[1:])) == 11 for column in parts.T)
    for number in range(30):
        before = state
        genomes, state = strategy.ask(generation_key(0, number), state)
        assert (np.asarray(genomes) >= low - 1e-6).all() and (np.asarray(genomes) <= high + 1e-6).all()
        if number:
            velocity, place, best = (np.asarray(part) for part in (before.velocities, before.places, before.best))
            # Drawn by no more than the coefficients say, and no faster than a fifth of the range.
            leader = best[np.argmin(before.losses)]
            reach = float(before.inertia) * velocity[..., None] + np.stack(
                [k * (best - place) + m * (leader - place) for k in (0, float(before.coefficients[0]))
                 for m in (0, float(before.coefficients[1]))], axis=-1,
            )  # fmt: skip
            most = 0.2 * (high - low)
            moved = np.asarray(state.velocities)
            assert (moved >= np.clip(reach.min(-1), -most, most) - 1e-5).all()
            assert (moved <= np.clip(reach.max(-1), -most, most) + 1e-5).all()
        state = strategy.tell(generation_key(0, number), state, genomes, scores_of(fitness(np.asarray(genomes))))
        expected = np.minimum(np.asarray(before.losses), -fitness(np.asarray(genomes)))
        np.testing.assert_allclose(state.losses, expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# The grid


@pytest.mark.parametrize(("dims", "population"), [(1, None), (1, 7), (2, None), (2, 25)])
def test_grid_covers_the_grid(dims: int, population: int | None) -> None:
    strategy = make("grid", dims, population)
    state = init(strategy, dims)
    genomes = asked(strategy, state)
    values = round(len(genomes) ** (1 / dims))
    assert len(genomes) == strategy.population == (population or 11**dims)
    units = np.asarray(to_unit(jnp.asarray(genomes)))
    expected = np.stack(np.meshgrid(*[np.linspace(0, 1, values)] * dims, indexing="ij"), -1).reshape(-1, dims)
    np.testing.assert_allclose(units, expected, atol=1e-6)
    # Next, the square between the neighbours of the best.
    target = np.full(dims, 0.68)
    state = drive(strategy, state, lambda genomes: -np.square(to_unit(jnp.asarray(genomes)) - target).sum(axis=1), 1)
    finer = np.asarray(to_unit(jnp.asarray(asked(strategy, state))))
    best = expected[np.argmin(np.square(expected - target).sum(axis=1))]
    step = 1 / (values - 1)
    np.testing.assert_allclose(finer.min(axis=0), np.maximum(best - step, 0), atol=1e-6)
    np.testing.assert_allclose(finer.max(axis=0), np.minimum(best + step, 1), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Whole searches

PARENTS = [{"a": {"w": np.full(4, k, np.float32)}, "b": {"w": np.arange(4, dtype=np.float32) * k}} for k in (0.0, 1.0)]
em.register_backend("of_one_group", em.FunctionFactory(groups=lambda path: "all"))


def closeness(merged: Any) -> jax.Array:
    return -sum(jnp.square(leaf - 0.3 * (i + 1)).sum() for i, leaf in enumerate(jax.tree.leaves(merged)))


def search(name: str, **settings: Any) -> Any:
    backend = "of_one_group" if name == "grid" else None
    return search_trees(PARENTS, closeness, strategy=name, backend=backend, **settings)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", sample(BUILT_IN, 2))
def test_an_interrupted_search_continues_to_the_byte(name: str, tmp_path: Path) -> None:
    def stop(generation: Any) -> None:
        if generation.number == 2:
            raise Stop

    seeds = [] if name == "grid" else ["uniform", "parents"]
    whole = search(name, seeds=seeds, out=tmp_path / "whole")
    with pytest.raises(Stop):
        search(name, seeds=seeds, out=tmp_path / "parts", on_generation=stop)
    parts = search(name, seeds=seeds, out=tmp_path / "parts", resume=True, generations=2)
    assert whole.best.fitness == parts.best.fitness
    for file in ("history.jsonl", "best/model/params.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_restarts_continue_to_the_byte(tmp_path: Path) -> None:
    """Interrupted while a doubled population is being collected."""
    settings: dict[str, Any] = {"population": 4, "backend": "of_one_group"}

    def flat(merged: Any) -> jax.Array:
        return 0.0 * jax.tree.leaves(merged)[0].sum()

    def stop(generation: Any) -> None:
        if generation.metrics["multiple"] == 2 and generation.number % 2 == 0:
            raise Stop

    def run(**rest: Any) -> Any:
        return search_trees(PARENTS, flat, strategy="ipop_cma_es", **settings, **rest)

    run(out=tmp_path / "whole", generations=30)
    with pytest.raises(Stop):
        run(out=tmp_path / "parts", generations=30, on_generation=stop)
    saved = len(em.open_run(tmp_path / "parts").history)
    run(out=tmp_path / "parts", resume=True, generations=30 - saved)
    assert (tmp_path / "whole/history.jsonl").read_bytes() == (tmp_path / "parts/history.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# Seeds


@pytest.mark.parametrize("name", sample([name for name in BUILT_IN if name != "grid"], 2))
def test_seeds_are_the_first_candidates(name: str) -> None:
    found = search(name, seeds=["task_vectors", "uniform"], generations=2)
    genomes = np.array(found.history[0]["genomes"], np.float32)
    # linear's bounds are 0 and 1; two groups of two weights each.
    units = np.asarray(to_unit(jnp.asarray(genomes)))
    np.testing.assert_allclose(units[:2], [[1.0] * 4, [0.5] * 4], atol=1e-6)
    assert len(np.unique(genomes, axis=0)) == len(genomes)
    # What was drawn otherwise is what is drawn without seeds.
    plain = search(name, generations=1, seeds=[])
    np.testing.assert_array_equal(genomes[2:], np.array(plain.history[0]["genomes"], np.float32)[2:])
    assert not np.isin(found.history[1]["fitness"], found.history[0]["fitness"]).all()


@pytest.mark.parametrize(
    ("name", "optimum"), sample([(name, optimum) for name in LEARNING for optimum in (0.95, 0.55)], 2)
)
def test_far_seeds_are_learned_from_and_do_not_blow_up_the_step(name: str, optimum: float) -> None:
    """Seeds a corner away from the start, one of them the best there is, or both worse than what is drawn around the
    start: the search goes to the optimum, and its step stays one."""
    dims, far = 10, np.stack([np.full(10, 1.0, np.float32), np.full(10, 0.0, np.float32)])
    strategy = seeded(make(name, dims, seeds=2), far)
    assert capabilities_of(strategy.strategy).takes_injected == (name not in ("de", "pso", "ga"))
    state = init(strategy, dims)

    def fitness(genomes: np.ndarray) -> np.ndarray:
        return -np.square(genomes - optimum).sum(axis=1)

    genomes = asked(strategy, state, 0)
    np.testing.assert_array_equal(genomes[:2], far)
    state = drive(strategy, state, fitness, 1)
    after = asked(strategy, state, 1)
    assert np.std(after, axis=0).mean() < 3 / 6
    if capabilities_of(strategy.strategy).takes_injected and optimum == 0.95:
        np.testing.assert_array_equal(strategy.finalists(state)[0], far[0])
    # It converges as it would without. (Strategies that restart may then be elsewhere.)
    best = -np.inf

    def followed(genomes: np.ndarray) -> np.ndarray:
        nonlocal best
        values = fitness(genomes)
        best = max(best, values.max())
        return values

    drive(strategy, state, followed, 150, first=1)
    assert best > -1e-2


def test_no_seeds_are_the_search_as_it_was() -> None:
    assert "seeds" not in SearchConfig().model_dump(mode="json")
    assert SearchConfig(seeds=["parents"]).model_dump(mode="json")["seeds"] == ["parents"]
    strategy = make("cma_es")
    assert seeded(strategy, np.zeros((0, 10), np.float32)) is strategy


def test_seeds_of_task_vectors() -> None:
    base = {"w": np.zeros(4, np.float32)}
    parents = [{"w": np.arange(4, dtype=np.float32)}, {"w": -np.ones(4, np.float32)}]
    found = search_trees(
        parents, lambda merged: -jnp.square(merged["w"]).sum(), base=base, method="ties", population=8, generations=1,
        parameters={"weight": {"low": 0.1, "high": 1.5}, "density": {"start": 0.6}},
        seeds=["uniform", "parents", "trimmed_parents", "task_vectors"],
    )  # fmt: skip
    units = np.asarray(to_unit(jnp.asarray(found.history[0]["genomes"], jnp.float32)))
    weights, densities = 0.1 + 1.4 * units[:6, :2], units[:6, 2:]
    # 0 is below the bounds.
    np.testing.assert_allclose(weights, [[0.5, 0.5], [1, 0.1], [0.1, 1], [1, 0.1], [0.1, 1], [1, 1]], atol=1e-5)
    np.testing.assert_allclose(densities, [[0.6] * 2] * 3 + [[0.2] * 2] * 2 + [[0.6] * 2], atol=1e-5)


def test_seeds_of_paths_are_the_parents() -> None:
    bounds, depths = ScaleBounds(0.5, 2.0), (4, 4, 3)
    series = [list(range(4)), list(range(4, 8)), list(range(8, 11))]
    for scales in ("matrix", "network", "none"):
        indicators = IndicatorSpace(depths, 2, scales, bounds, 8, 0)
        paths = indicators.decode(indicators.seed_genomes("seeds", "parents"))
        assert [list(path.layers) for path in paths if path is not None] == series
        assert all(path is not None and set(path.scales) == {1.0} for path in paths)
    for scaled in (True, False):
        for window, found in ((2, series[:2]), (1, series[:1])):
            moves = MoveSpace(depths, 3, window, bounds, scaled, 8, 0)
            paths = moves.decode(moves.seed_genomes("seeds", "parents"))
            assert [list(path.layers) for path in paths if path is not None] == found
    with pytest.raises(InputError, match=r"^seeds: uniform: a path has no weights; expected parents$"):
        moves.seed_genomes("seeds", "uniform")


# ---------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("name", "dims", "population", "seeds", "said"),
    [
        ("grid", 3, None, 0, "search: strategy: grid takes one or two dimensions, and the search has 3; let tensors "
         "share their parameters, or choose cma_es"),
        ("grid", 2, 20, 0, "search: population: 20; a grid of two dimensions takes a square number from 9 on, such "
         "as 16"),
        ("grid", 1, 2, 0, "search: population: 2; a grid takes 3 or more"),
        ("grid", 1, None, 1, "search: seeds: grid takes none, it covers the bounds; leave them out, or choose cma_es"),
        ("de", 3, 3, 0, "search: population: 3; de takes 4 to 4,096"),
        ("ipop_cma_es", 500, 5000, 0, "search: population: 5,000; ipop_cma_es, which makes it up to 32 times as large, "
         "takes 4,194 at most in 500 dimensions"),
        ("cma_es", 3, 4, 5, "search: seeds: 5 genomes do not fit into a population of 4; raise population, or name "
         "fewer"),
        *((name, 513, None, 0, f"search: strategy: {name} takes 512 dimensions at most, and the search has 513; choose "
           "sep_cma_es or lm_ma_es") for name in ("xnes", "ipop_cma_es", "bipop_cma_es")),
    ],
)  # fmt: skip
def test_what_a_strategy_cannot_take_is_told(
    name: str, dims: int, population: int | None, seeds: int, said: str
) -> None:
    with pytest.raises(InputError) as raised:
        make(name, dims, population, seeds)
    assert str(raised.value) == said


def test_seeds_that_a_space_has_not_are_told() -> None:
    with pytest.raises(InputError, match=r"seeds: trimmed_parents: linear searches no density here; "):
        search("cma_es", seeds=["trimmed_parents"])
    with pytest.raises(InputError, match=r"search.seeds"):
        search("cma_es", seeds=["best"])
    with pytest.raises(ValidationError):
        SearchConfig(seeds=["best"])


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_strategy_says_what_it_is(name: str) -> None:
    assert (find_strategy("search", name).__doc__ or "").strip()
    # As a config names it, so does the log.
    assert make(name, 2).name == name


@pytest.mark.parametrize("name", sample(LEARNING, 2))
def test_one_dimension_and_the_smallest_population(name: str) -> None:
    strategy = make(name, 1, 4 if name == "de" else 2)
    state = drive(strategy, init(strategy, 1), lambda genomes: -np.square(genomes - 0.3).sum(axis=1), 30)
    assert np.isfinite(asked(strategy, state)).all()


# ---------------------------------------------------------------------------------------------------------------
# The greedy soup


class Subsets:
    """A space whose genomes are the parents of a soup, each 0 or 1."""

    def __init__(self, parents: int) -> None:
        self.parents = self.dims = parents

    def averages(self, where: str, members: np.ndarray) -> np.ndarray:
        return np.asarray(members, np.float32)


@pytest.mark.parametrize("parents", [2, 3, 4, 5, 8])
def test_the_greedy_soup_is_that_of_its_paper(parents: int) -> None:
    """Model soups, recipe 1, one parent after the other, on random scores with ties and failures."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = rng.integers(0, 4, 2**parents).astype(float)
        table[rng.random(2**parents) < 0.1] = np.nan
        table[1] = 2.0

        def value(members: Any, table: np.ndarray = table) -> float:
            return float(table[sum(2 ** int(k) for k in members)])

        ranked = sorted(range(parents), key=lambda k: -np.nan_to_num(value([k]), nan=-np.inf))
        soup = ranked[:1]
        for parent in ranked[1:]:
            if value([*soup, parent]) >= value(soup):
                soup.append(parent)

        strategy = find_strategy("search", "greedy")(StrategySettings(parents, None, 0.1, 9, space=Subsets(parents)))
        count = capabilities_of(strategy).generations
        assert count is not None and count * strategy.population <= 3 * parents + 3

        def fitness(genomes: np.ndarray) -> np.ndarray:
            return np.array([value(np.flatnonzero(row)) for row in genomes])

        state = drive(strategy, init(strategy, parents), fitness, count)
        (proposed,) = strategy.finalists(state)
        assert np.flatnonzero(proposed).tolist() == sorted(soup) and strategy.metrics(state) == {"soup": len(soup)}
        # Whoever goes on asking learns nothing new.
        again = drive(strategy, state, fitness, 1, count)
        assert np.array_equal(strategy.finalists(again)[0], proposed)
