"""A search strategy of one's own: evosax's SNES, first under a name that configs can give, then in a loop by hand.

    evojax-merge search configs/own_strategy.yaml --out runs/own_strategy      # as a plugin of the config
    python configs/own_strategy.py configs/quickstart.yaml runs/own_strategy search.generations=30

The arguments of the second: a config, a run folder, and what to change of the config.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms import SNES

import evojax_merge as em


def snes(settings: em.StrategySettings) -> em.EvosaxStrategy:
    """Separable natural evolution strategy (Schaul et al., 2011)."""
    algorithm = SNES(settings.population or 16, jnp.zeros(settings.dims))
    return em.EvosaxStrategy("snes", algorithm, algorithm.default_params.replace(std_init=settings.sigma))


em.register_strategy("snes", snes)


def by_hand(config: str, overrides: list[str], generations: int = 2) -> np.ndarray:
    """A loop without the program's: the genome that it ends at."""
    evaluator = em.Evaluator(config, overrides=overrides)
    algorithm, key = SNES(16, jnp.zeros(evaluator.dims)), jax.random.key(0)
    params = algorithm.default_params
    state = algorithm.init(key, jnp.asarray(evaluator.start), params)
    for generation in range(generations):
        key = jax.random.fold_in(key, generation)
        genomes, state = algorithm.ask(key, state, params)
        fitness = evaluator.scores(genomes).fitness
        state, _ = algorithm.tell(key, genomes, -jnp.asarray(fitness), state, params)  # evosax minimises
        print(f"by hand, generation {generation + 1}: best {np.nanmax(fitness):.4f}")
    return np.asarray(state.mean)


if __name__ == "__main__":
    config, out, *overrides = sys.argv[1:]
    run = em.evolve(config, out=out, overrides=[*overrides, "search.strategy=snes"], overwrite=True)
    for row in run.table or []:
        print(f"{row['name']}: {row['heldout_fitness']:.4f}")
    by_hand(config, overrides)
