"""Gradients first, then CMA-ES from where they have led.

A fitness that counts right answers has no gradient, but a smooth companion of it has (the likelihood of the worked
answers): it leads to the region, and CMA-ES searches there on the fitness itself.
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
from evojax_merge.search.strategies.cma_es import cma_es
from evojax_merge.search.strategies.evosax import EvosaxStrategy, inject_steps
from evojax_merge.search.strategies.gradient import GradientState, GradientStrategy, make_optimizer
from evojax_merge.search.strategies.registry import StrategySettings, begin_with

# The number of last points of the gradient phase from which its spread is computed.
WINDOW = 8
# The least first sigma, as a share of the gradient phase's sigma.
LEAST_SIGMA = 1 / 8


@struct.dataclass
class HybridState:
    """gradient, run: the states of both parts; told: int32[], the number of generations; points: float32[W, S, D], the
    last W points of the S starts, newest last."""

    gradient: GradientState
    run: Any
    told: jax.Array
    points: jax.Array


@dataclass(frozen=True)
class HybridStrategy:
    """`steps` generations of gradients, then CMA-ES from the best start's last point, with the spread of its last
    points as the first sigma, clipped to LEAST_SIGMA to 1 times the sigma of `ascent`. The starts fit into the
    population of `evolution`.
    """

    name: str
    ascent: GradientStrategy
    evolution: EvosaxStrategy
    steps: int

    capabilities = Capabilities(differentiates="companion")

    @property
    def population(self) -> int:
        return self.evolution.population

    def wants_gradients(self, state: HybridState) -> bool:
        return int(state.told) < self.steps

    def gradient_generations(self, generations: int) -> tuple[int, int]:
        return min(self.steps, generations), self.ascent.population

    def init(self, key: jax.Array, genomes: np.ndarray) -> HybridState:
        ascent = self.ascent.init(key, genomes)
        points = jnp.broadcast_to(ascent.genomes, (WINDOW, *ascent.genomes.shape))
        return HybridState(ascent, self.evolution.init(key, genomes), jnp.int32(0), points)

    def ask(self, key: jax.Array, state: HybridState) -> tuple[jax.Array, HybridState]:
        if self.wants_gradients(state):
            genomes, asked = self.ascent.ask(key, state.gradient)
            return genomes, state.replace(gradient=asked)  # type: ignore[attr-defined]
        genomes, run = self.evolution.ask(key, state.run)
        if int(state.told) > self.steps:
            return genomes, state.replace(run=run)  # type: ignore[attr-defined]
        # The points at which the gradient phase ended are candidates themselves.
        ends = state.gradient.genomes
        genomes = jnp.asarray(genomes).at[: len(ends)].set(ends)
        return genomes, state.replace(run=run)  # type: ignore[attr-defined]

    def tell(self, key: jax.Array, state: HybridState, genomes: jax.Array, scores: Scores) -> HybridState:
        generation = state.told + 1
        if not self.wants_gradients(state):
            run = state.run
            if int(state.told) == self.steps:
                genomes, run = inject_steps(run, genomes, self.ascent.population)
            run = self.evolution.tell(key, run, genomes, scores)
            return state.replace(run=run, told=generation)  # type: ignore[attr-defined]
        ascent = self.ascent.tell(key, state.gradient, genomes, scores)
        points = jnp.concatenate([state.points[1:], ascent.genomes[None]])
        run = state.run
        if int(generation) == self.steps:
            # The start that was best before its last step.
            best = int(np.nanargmax(scores.fitness))
            spread = jnp.sqrt(jnp.mean(jnp.square(points[:, best] - points[:, best].mean(axis=0))))
            run = self.evolution.init(key, np.asarray(ascent.genomes)[best][None])
            run = run.replace(std=jnp.clip(spread, LEAST_SIGMA * self.ascent.sigma, self.ascent.sigma))
        return HybridState(ascent, run, generation, points)

    def finalists(self, state: HybridState) -> np.ndarray:
        """The mean of the distribution, and the last points of the gradient phase."""
        ends = self.ascent.finalists(state.gradient)
        return ends if self.wants_gradients(state) else np.concatenate([self.evolution.finalists(state.run), ends])

    def metrics(self, state: HybridState) -> dict[str, float]:
        """gradient_norm and learning_rate in the gradient phase, then sigma."""
        in_ascent = int(state.told) <= self.steps
        return self.ascent.metrics(state.gradient) if in_ascent else self.evolution.metrics(state.run)


# Each seed would be one more start to follow.
@begin_with()
def hybrid(settings: StrategySettings) -> HybridStrategy:
    """Gradient ascent on the fitness or its smooth companion (the likelihood of worked answers), then CMA-ES from there
    on the fitness itself."""
    config = settings.gradient
    steps = max(1, settings.generations // 4) if config.generations is None else config.generations
    if steps >= settings.generations:
        raise InputError(
            settings.where,
            f"{settings.generations} generations, of which {steps} follow gradients (gradient.generations), leave none "
            "to CMA-ES; raise generations",
        )
    optimizer, schedule = make_optimizer(settings.where, config, steps)
    starts = max(config.starts, settings.seeds)
    ascent = GradientStrategy("hybrid", starts, optimizer, schedule, settings.sigma)
    evolution = cma_es(settings)
    if starts > evolution.population:
        raise InputError(
            f"{settings.where}.gradient.starts", f"{starts} do not fit into a population of {evolution.population}"
        )
    return HybridStrategy("hybrid", ascent, evolution, steps)
