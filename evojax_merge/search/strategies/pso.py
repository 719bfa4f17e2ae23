"""Particle swarm optimisation that adapts its coefficients to the swarm's phase (Zhan, Zhang, Li and Chung, Adaptive
Particle Swarm Optimization, IEEE Transactions on Systems, Man, and Cybernetics B 39(6), 2009).

Three things are pymoo's: the swarm's phase goes by the particles' best places, and by how far they are from the leader
that has drawn them, who may not lead any more; and the leader tries its best place with a mutation in every generation,
a finer one than the paper's of the phase of convergence.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.evosax import losses
from evojax_merge.search.strategies.registry import DrawingStrategy, StrategySettings

# The phases of a swarm, in the order in which they follow each other.
EXPLORATION, EXPLOITATION, CONVERGENCE, JUMPING_OUT = range(4)
# By phase, the changes of the cognitive and of the social coefficient, in units of a rate drawn from RATES.
CHANGES = np.array([[1.0, -1.0], [0.5, -0.5], [0.5, 0.5], [-1.0, 1.0]], np.float32)
RATES = (0.05, 0.1)
# The bounds of both coefficients, and the most that they add up to.
LEAST_COEFFICIENT, MOST_COEFFICIENT, MOST_TOGETHER = 1.5, 2.5, 4.0
# The coefficients of the first generation, and the most velocity, in units of the bounds' range.
FIRST_INERTIA, FIRST_COEFFICIENT, MOST_VELOCITY = 0.9, 2.0, 0.2
# The range of the index of the leader's mutation: the higher, the finer.
MUTATION_INDEX = (5.0, 30.0)


@struct.dataclass
class SwarmState:
    """places, velocities: float32[P, D], of the particles; best, losses: float32[P, D] and float32[P], each particle's
    best place and its loss there; inertia: float32[]; coefficients: float32[2], the cognitive and the social one;
    phase: int32[]; generation: int32[], the number of generations."""

    places: jax.Array
    velocities: jax.Array
    best: jax.Array
    losses: jax.Array
    inertia: jax.Array
    coefficients: jax.Array
    phase: jax.Array
    generation: jax.Array


def evolutionary_factor(places: jax.Array, leader: jax.Array) -> jax.Array:
    """float32[] in [0, 1]: where the leader's distance to the particles lies between the least and the greatest
    distance of any of them to the others, by their sums. places: float32[P, D]; leader: float32[D], its place."""

    def distance(place: jax.Array) -> jax.Array:
        return jnp.linalg.norm(places - place, axis=1).sum()

    distances = jax.lax.map(distance, places)
    least, most = distances.min(), distances.max()
    share = (distance(leader) - least) / jnp.maximum(most - least, 1e-30)
    return jnp.where(most > least, jnp.clip(share, 0.0, 1.0), 0.0)


def memberships(factor: jax.Array) -> jax.Array:
    """float32[4]: the degree to which a swarm with this evolutionary factor is in each of the phases."""
    exploration = jnp.interp(factor, jnp.array([0.4, 0.6, 0.7, 0.8]), jnp.array([0.0, 1.0, 1.0, 0.0]))
    exploitation = jnp.interp(factor, jnp.array([0.2, 0.3, 0.4, 0.6]), jnp.array([0.0, 1.0, 1.0, 0.0]))
    convergence = jnp.interp(factor, jnp.array([0.1, 0.3]), jnp.array([1.0, 0.0]))
    jumping_out = jnp.interp(factor, jnp.array([0.7, 0.9]), jnp.array([0.0, 1.0]))
    return jnp.stack([exploration, exploitation, convergence, jumping_out])


def next_phase(factor: jax.Array, phase: jax.Array) -> jax.Array:
    """int32[]: the swarm's phase. Where the factor is between two phases, the swarm stays in its phase if that is one
    of them, or goes on to the next in their order if that is; else it is in the phase of the higher degree."""
    degrees = memberships(factor)
    following = (phase + 1) % 4
    likeliest = jnp.argmax(degrees)
    return jnp.where(degrees[phase] > 0, phase, jnp.where(degrees[following] > 0, following, likeliest)).astype(
        jnp.int32
    )


def adapted_inertia(factor: jax.Array) -> jax.Array:
    """float32[]: from 0.4 for a swarm that converges to 0.9 for one that jumps out."""
    return 1 / (1 + 1.5 * jnp.exp(-2.6 * factor))


def adapted_coefficients(rate: jax.Array, phase: jax.Array, coefficients: jax.Array) -> jax.Array:
    """float32[2]: the coefficients after a generation in a phase, within their bounds."""
    changed = coefficients + rate * jnp.asarray(CHANGES)[phase]
    changed = jnp.clip(changed, LEAST_COEFFICIENT, MOST_COEFFICIENT)
    return changed * jnp.minimum(1.0, MOST_TOGETHER / changed.sum())


@dataclass(frozen=True)
class Swarm(DrawingStrategy):
    """Particles that move between the bounds."""

    name = "pso"

    def init(self, key: jax.Array, genomes: np.ndarray) -> SwarmState:
        """The start, and a Latin hypercube between the bounds, with random velocities."""
        strata, within, speeds = jax.random.split(key, 3)
        low, high = self.settings.range
        shape = (self.population, self.settings.dims)
        cells = jax.random.permutation(
            strata, jnp.broadcast_to(jnp.arange(self.population)[:, None], shape), axis=0, independent=True
        )
        places = low + (high - low) * (cells + jax.random.uniform(within, shape)) / self.population
        places = places.at[0].set(jnp.asarray(genomes[0]))
        return SwarmState(
            places=places,
            velocities=MOST_VELOCITY * (high - low) * jax.random.uniform(speeds, shape, minval=-1.0),
            best=places,
            losses=jnp.full(self.population, jnp.inf, jnp.float32),
            inertia=jnp.float32(FIRST_INERTIA),
            coefficients=jnp.full(2, FIRST_COEFFICIENT, jnp.float32),
            phase=jnp.int32(EXPLORATION),
            generation=jnp.int32(0),
        )

    def ask(self, key: jax.Array, state: SwarmState) -> tuple[jax.Array, SwarmState]:
        if not int(state.generation):
            return state.places, state
        moved = _move(self.settings.range, key, state)
        return moved.places, moved

    def tell(self, key: jax.Array, state: SwarmState, genomes: jax.Array, scores: Scores) -> SwarmState:
        return _learn(key, state, jnp.asarray(genomes), losses(scores))

    def finalists(self, state: SwarmState) -> np.ndarray:
        """The mean of the particles' best places."""
        return np.asarray(state.best, np.float32).mean(axis=0)[None]

    def metrics(self, state: SwarmState) -> dict[str, float]:
        """spread: the standard deviation of the particles' genes; inertia: the share of velocity that is kept."""
        return {"spread": float(np.std(state.places, axis=0).mean()), "inertia": float(state.inertia)}


@partial(jax.jit, static_argnums=0)
def _move(bounds: tuple[float, float], key: jax.Array, state: SwarmState) -> SwarmState:
    """Move every particle, its velocity drawn to its own best place and to the leader's. A gene that would leave the
    bounds stops at random between its place and the bound. The leader, which nothing draws any further, tries a
    mutation of its best place instead."""
    low, high = bounds
    attraction, stopping, elite = jax.random.split(key, 3)
    shape, leader = state.places.shape, jnp.argmin(state.losses)
    cognitive, social = state.coefficients[:, None, None] * jax.random.uniform(attraction, (2, *shape))
    velocities = state.inertia * state.velocities
    velocities += cognitive * (state.best - state.places) + social * (state.best[leader] - state.places)
    velocities = jnp.clip(velocities, -MOST_VELOCITY * (high - low), MOST_VELOCITY * (high - low))
    places, part = state.places + velocities, jax.random.uniform(stopping, shape)
    places = jnp.where(places < low, low + part * jnp.maximum(state.places - low, 0.0), places)
    places = jnp.where(places > high, high - part * jnp.maximum(high - state.places, 0.0), places)
    places = places.at[leader].set(mutated(bounds, elite, state.best[leader]))
    return state.replace(places=places, velocities=velocities)  # type: ignore[attr-defined]


def mutated(bounds: tuple[float, float], key: jax.Array, place: jax.Array) -> jax.Array:
    """float32[D]: a place in which a gene or a few are changed, by polynomial mutation (Deb and Agrawal, 1999): about
    as often up as down, and never beyond the bounds."""
    (low, high), dims = bounds, len(place)
    which, one, how_fine, size = jax.random.split(key, 4)
    changed = jax.random.uniform(which, (dims,)) < 1 / dims
    changed = changed | (~changed.any() & (jnp.arange(dims) == jax.random.randint(one, (), 0, dims)))
    power = jax.random.uniform(how_fine, minval=MUTATION_INDEX[0], maxval=MUTATION_INDEX[1]) + 1
    drawn, below = jax.random.uniform(size, (dims,)), jnp.clip((place - low) / (high - low), 0.0, 1.0)
    down = jnp.power(2 * drawn + (1 - 2 * drawn) * jnp.power(1 - below, power), 1 / power) - 1
    up = 1 - jnp.power(2 * (1 - drawn) + (2 * drawn - 1) * jnp.power(below, power), 1 / power)
    step = (high - low) * jnp.where(drawn < 0.5, down, up)
    return jnp.where(changed, jnp.clip(place + step, low, high), place)


@jax.jit
def _learn(key: jax.Array, state: SwarmState, places: jax.Array, loss: jax.Array) -> SwarmState:
    """Remember better places, and adapt the inertia and the coefficients. Ties change no best place: all particles
    would be drawn to the first one where everything scores the same."""
    better = loss < state.losses
    # The first generation sets the places, also of particles that failed.
    taken = better | (state.generation == 0)
    best = jnp.where(taken[:, None], places, state.best)
    remembered = jnp.where(better, loss, state.losses)
    # Nothing has drawn the first generation.
    led = jnp.where(state.generation == 0, best[jnp.argmin(remembered)], state.best[jnp.argmin(state.losses)])
    factor = evolutionary_factor(best, led)
    phase = next_phase(factor, state.phase)
    rate = jax.random.uniform(key, minval=RATES[0], maxval=RATES[1])
    return SwarmState(
        places=places,
        velocities=state.velocities,
        best=best,
        losses=remembered,
        inertia=adapted_inertia(factor),
        coefficients=adapted_coefficients(rate, phase, state.coefficients),
        phase=phase,
        generation=state.generation + 1,
    )


def pso(settings: StrategySettings) -> Swarm:
    """Particle swarm optimisation between the bounds, whose coefficients follow the swarm's phase (Zhan et al., 2009);
    begins with a Latin hypercube, whatever sigma is."""
    return Swarm(settings, settings.population or 2 * default_population(settings.dims))
