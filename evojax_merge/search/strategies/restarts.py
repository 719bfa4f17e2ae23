"""CMA-ES with restarts: IPOP and BIPOP.

A restart takes a larger population, but a search evaluates the same number of candidates, P, in every generation. A
population of m P therefore takes m generations: their candidates are drawn from one distribution, and collected until
the population is complete. m is 1 first, and `MAX_MULTIPLE` at most: the state has room for so many candidates from the
start, and keeps one structure throughout.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.errors import InputError
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.protocols import Capabilities
from evojax_merge.search.strategies.cma_es import check_full_covariance, cma_algorithm, cma_params, default_population
from evojax_merge.search.strategies.evosax import inject_steps, losses, strongly_typed
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings

# The largest population, in units of the first one: five doublings.
MAX_MULTIPLE = 32
# The most numbers in such a population: 256 MB, saved with every generation.
MAX_ROOM = 2**26
# The limits at which a run ends: the range of the best losses of its last populations; the least length of its longest
# axis as a part of the search's first sigma (float32 genomes have steps of 6e-8), and the greatest as a multiple of the
# run's first sigma; and the largest ratio of its axes, beyond which a float32 covariance loses them.
LOSS_RANGE, STEP_SHRUNK, STEP_GROWN, AXES_RATIO = 1e-12, 1e-5, 1e4, 5e3


@struct.dataclass
class RestartState:
    """A run of CMA-ES, and the results of the runs before it.

    run: evosax's state; multiple: int32[], m, its population in units of P; sigma: float32[], its first step; genomes,
    float32[32 P, D], and losses, float32[32 P]: the candidates of the population that is being collected; collected:
    int32[], the number of its generations so far; best_losses: float32[W], the best loss of each of the run's last
    populations, newest last, NaN before the first; iterations: int32[], the number of the run's populations so far;
    loss, mean: the best loss of the best earlier run and its last mean, float32[D]; restarts: int32[], their number;
    large: int32[], the population of the last run of the doubling regime, in units of P; spent: int32[2], generations
    spent in the doubling regime and in the regime of small populations; limit: int32[], generations that the run may
    take, 0: no limit.
    """

    run: Any
    multiple: jax.Array
    sigma: jax.Array
    genomes: jax.Array
    losses: jax.Array
    collected: jax.Array
    best_losses: jax.Array
    iterations: jax.Array
    loss: jax.Array
    mean: jax.Array
    restarts: jax.Array
    large: jax.Array
    spent: jax.Array
    limit: jax.Array


@dataclass(frozen=True)
class RestartedCMAES(DrawingStrategy):
    """Restarts begin between the bounds. small_runs: whether runs of small populations take turns with those of doubled
    ones (BIPOP)."""

    name: str
    small_runs: bool

    capabilities = Capabilities(takes_injected=True)

    def init(self, key: jax.Array, genomes: np.ndarray) -> RestartState:
        start = jnp.asarray(genomes[0])
        room, zero = MAX_MULTIPLE * self.population, jnp.int32(0)
        return RestartState(
            run=self._begin(key, start, self.settings.sigma),
            multiple=jnp.int32(1),
            sigma=jnp.float32(self.settings.sigma),
            genomes=jnp.zeros((room, self.settings.dims)),
            losses=jnp.full(room, jnp.nan, jnp.float32),
            collected=zero,
            best_losses=jnp.full(self._window(1), jnp.nan, jnp.float32),
            iterations=zero,
            loss=jnp.float32(jnp.inf),
            mean=start,
            restarts=zero,
            large=jnp.int32(1),
            spent=jnp.zeros(2, jnp.int32),
            limit=zero,
        )

    def ask(self, key: jax.Array, state: RestartState) -> tuple[jax.Array, RestartState]:
        algorithm, params = self._algorithm(1)
        genomes, asked = algorithm.ask(key, state.run, params)
        # All generations of a population are drawn from the same distribution.
        return genomes, state if int(state.collected) else state.replace(run=asked)  # type: ignore[attr-defined]

    def tell(self, key: jax.Array, state: RestartState, genomes: jax.Array, scores: Scores) -> RestartState:
        begin = int(state.collected) * self.population
        regime = int(self.small_runs and int(state.limit) > 0)
        collected = state.replace(  # type: ignore[attr-defined]
            genomes=jax.lax.dynamic_update_slice(state.genomes, jnp.asarray(genomes), (begin, 0)),
            losses=jax.lax.dynamic_update_slice(state.losses, losses(scores), (begin,)),
            collected=state.collected + 1,
            spent=state.spent.at[regime].add(1),
        )
        if int(collected.collected) < int(state.multiple):
            return collected
        updated = self._tell_population(key, collected)
        return self._restart(key, updated) if self._ended(updated) else updated

    def inject(self, state: RestartState, genomes: jax.Array, count: int) -> tuple[jax.Array, RestartState]:
        genomes, run = inject_steps(state.run, genomes, count)
        return genomes, state.replace(run=run)  # type: ignore[attr-defined]

    def finalists(self, state: RestartState) -> np.ndarray:
        """The mean of the run, and the mean of the best earlier run."""
        return np.stack([np.asarray(state.run.mean, np.float32), np.asarray(state.mean, np.float32)])

    def metrics(self, state: RestartState) -> dict[str, float]:
        """sigma: the standard deviation of a step; restarts: their number; multiple: the population in units of P."""
        return {
            "sigma": float(state.run.std),
            "restarts": int(state.restarts),
            "multiple": int(state.multiple),
        }

    def _window(self, multiple: int) -> int:
        """The number of populations whose best losses must be alike for a run to end (pycma's)."""
        return int(10 + np.ceil(30 * self.settings.dims / (multiple * self.population)))

    def _algorithm(self, multiple: int) -> tuple[Any, Any]:
        """evosax's algorithm for a population of so many times P, and its parameters."""
        size = self.settings.dims, multiple * self.population
        return cma_algorithm("CMA_ES", *size), cma_params("CMA_ES", *size)

    def _begin(self, key: jax.Array, mean: jax.Array, sigma: float) -> Any:
        algorithm, params = self._algorithm(1)
        return strongly_typed(algorithm.init(key, mean, params.replace(std_init=jnp.float32(sigma))))

    def _tell_population(self, key: jax.Array, state: RestartState) -> RestartState:
        algorithm, params = self._algorithm(int(state.multiple))
        size = int(state.multiple) * self.population
        population_losses = state.losses[:size]
        run, _ = algorithm.tell(key, state.genomes[:size], population_losses, state.run, params)
        best = jnp.min(jnp.where(jnp.isnan(population_losses), jnp.inf, population_losses))
        return state.replace(  # type: ignore[attr-defined]
            run=run,
            collected=jnp.int32(0),
            best_losses=jnp.append(state.best_losses[1:], best),
            iterations=state.iterations + 1,
        )

    def _ended(self, state: RestartState) -> bool:
        run, window = state.run, self._window(int(state.multiple))
        if 0 < int(state.limit) <= int(state.iterations) * int(state.multiple):
            return True
        axes = np.asarray(run.D, np.float64)
        step = float(run.std) * axes.max()
        # NaN compares false: a run with NaN in its state ends as well.
        if not STEP_SHRUNK * self.settings.sigma < step < STEP_GROWN * float(state.sigma):
            return True
        if not axes.max() <= AXES_RATIO * axes.min():
            return True
        recent = np.asarray(state.best_losses[-window:])
        return int(state.iterations) >= window and bool(np.ptp(recent) <= LOSS_RANGE)

    def _restart(self, key: jax.Array, state: RestartState) -> RestartState:
        """A run from a place drawn between the bounds. IPOP (Auger and Hansen, 2005): twice the population. BIPOP
        (Hansen, 2009): the same, or, where small runs have taken fewer generations, a small run with random sigma and
        population, for at most half of the generations of the large runs."""
        place, size, step = jax.random.split(jax.random.fold_in(key, 1), 3)
        large, sigma, limit = int(state.large), self.settings.sigma, 0
        spent_large, spent_small = (int(spent) for spent in state.spent)
        if self.small_runs and spent_small < spent_large and int(state.restarts) > 0:
            exponent = float(jax.random.uniform(size)) ** 2
            multiple = max(1, int((large / 2) ** exponent))
            sigma *= 10 ** (-2 * float(jax.random.uniform(step)))
            limit = max(1, spent_large // 2)
        else:
            multiple = large = min(2 * large, MAX_MULTIPLE)
        best = jnp.asarray(state.run.best_fitness)
        low, high = self.settings.range
        mean = jax.random.uniform(place, (self.settings.dims,), minval=low, maxval=high)
        return state.replace(  # type: ignore[attr-defined]
            run=self._begin(key, mean, sigma),
            multiple=jnp.int32(multiple),
            sigma=jnp.float32(sigma),
            best_losses=jnp.full_like(state.best_losses, jnp.nan),
            iterations=jnp.int32(0),
            loss=jnp.minimum(state.loss, best),
            mean=jnp.where(best < state.loss, state.run.mean, state.mean),
            restarts=state.restarts + 1,
            large=jnp.int32(large),
            limit=jnp.int32(limit),
        )


def _restarted(name: str, settings: StrategySettings, small_runs: bool) -> RestartedCMAES:
    check_full_covariance(name, settings)
    population = settings.population or default_population(settings.dims)
    most = MAX_ROOM // (MAX_MULTIPLE * settings.dims)
    if population > most:
        raise InputError(
            settings.where, f"population: {population:,}; {name}, which makes it up to {MAX_MULTIPLE} times as large, "
            f"takes {most:,} at most in {settings.dims:,} dimensions",
        )  # fmt: skip
    return RestartedCMAES(settings, population, name, small_runs)


def ipop_cma_es(settings: StrategySettings) -> RestartedCMAES:
    """CMA-ES that starts again with twice the population when it has converged (IPOP; Auger and Hansen, 2005); up to
    512 dimensions."""
    return _restarted("ipop_cma_es", settings, small_runs=False)


def bipop_cma_es(settings: StrategySettings) -> RestartedCMAES:
    """CMA-ES whose restarts take turns between doubled populations and small ones of small steps (BIPOP; Hansen, 2009);
    up to 512 dimensions."""
    return _restarted("bipop_cma_es", settings, small_runs=True)
