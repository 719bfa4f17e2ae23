"""Training a low-rank change of one model on a search's examples: a control of the search, or the polish of its winner.

The change is LoRA's (Hu et al. 2022, arXiv:2106.09685), trained by Adam through the forward pass that scores
candidates. Where the fitness has no derivative, rank-1 evolution strategies estimate one (EGGROLL, arXiv:2511.16652):
a pair of candidates is `w + e` and `w - e`, with `e` an outer product of two random vectors.

Letters: V changes that are trained side by side, each with a learning rate of its own; D numbers of a change; n pairs
of candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.backends.backend import Adaptable, Progress
from evojax_merge.evaluation.scores import Goal, fitness, ranked_fitness
from evojax_merge.models.adapted import LowRankLayout
from evojax_merge.search.budgets import GRADIENT_PASSES


@dataclass(frozen=True)
class Tuning:
    """The settings of a training. rank: of the change; scale: see `LowRankLayout`; rates: the learning rates that
    compete; rounds: each trains the best learning rates anew, so many of them, for a share of the steps, over which the
    rate falls to 0 as a cosine: few examples want few rounds of them; checks: how many times in a round the changes are
    scored on the examples that the best is chosen on; pairs: of candidates in a step of evolution strategies; spread:
    their distance from the mean, as a share of each matrix."""

    rank: int = 8
    scale: float = 2.0
    rates: tuple[float, ...] = (2e-4, 1e-3, 5e-3, 2e-2)
    rounds: tuple[tuple[float, int], ...] = ((1 / 16, 4), (1 / 4, 2), (1.0, 1))
    checks: int = 6
    pairs: int = 8
    spread: float = 0.02

    def schedule(self, passes: float, parts: int, by_gradient: bool) -> list[tuple[int, int]]:
        """The steps of each round, at least one, and the number of its learning rates, for a number of passes. A step
        is, for each rate, a derivative on one part of the examples, or the scores of its pairs there."""
        cost = (GRADIENT_PASSES if by_gradient else 2 * self.pairs) / parts
        steps = passes / (cost * sum(share * min(count, len(self.rates)) for share, count in self.rounds))
        return [(max(1, int(share * steps)), min(count, len(self.rates))) for share, count in self.rounds]


@dataclass(frozen=True)
class Tuned:
    """The best change of a training. vector: float32[D]; fitness: on the examples that it was chosen on, and `search`:
    on the search split; rate, step, steps: its learning rate, the steps behind it, 0 where none made the model better,
    and those of its round; diverged: the learning rates whose change ceased to be finite; curves: of each round
    float[steps, V], the fitness of each step's part of the examples, before the step, NaN once it had diverged."""

    vector: np.ndarray
    fitness: float
    search: float
    rate: float
    step: int
    steps: int
    diverged: tuple[float, ...]
    curves: tuple[np.ndarray, ...] = field(repr=False)


@dataclass(frozen=True)
class TuningData:
    """The evaluators of a training, as `Adaptable` has them. parts: minibatches that are learned from; deciding: the
    examples that the best change is chosen on; search: the search split. goal, deciding_goal: what fitness is made of
    scores there; by_gradient: whether the parts are differentiable."""

    parts: Sequence[Any]
    deciding: Any
    search: Any
    goal: Goal
    deciding_goal: Goal
    by_gradient: bool


def train(
    model: Adaptable, data: TuningData, tuning: Tuning, passes: float, seed: int, progress: Progress = lambda done: None
) -> Tuned:
    """Train a change of a model with as much work as `passes` candidates on all examples take, and choose the best of
    all checks, the unchanged model among them. A change that ceases to be finite ends, and the next round may begin
    with others."""
    start, rates, curves = model.layout.start(seed), np.array(tuning.rates), []
    unchanged = _ranked(data.deciding, start[None], data.deciding_goal)[0]
    best, ranked = (unchanged, start, float(rates[0]), 0, 0), np.full(len(rates), -np.inf)
    diverged = np.zeros(len(rates), bool)
    for steps, count in tuning.schedule(passes, len(data.parts), data.by_gradient):
        running = np.sort(np.argsort(-ranked, kind="stable")[:count])
        fresh = _Round(model, data, tuning, seed, rates[running], steps)
        for step in range(steps):
            fresh.advance(step, progress)
            if (step + 1) * tuning.checks // steps > step * tuning.checks // steps:
                values = np.where(fresh.fine, _ranked(data.deciding, fresh.vectors, data.deciding_goal), -np.inf)
                ranked[running] = np.maximum(ranked[running], values)
                number = int(np.argmax(values))
                if values[number] > best[0]:
                    vector = fresh.vectors[number].copy()
                    best = (values[number], vector, float(rates[running[number]]), step + 1, steps)
            if not fresh.fine.any():
                break
        curves.append(fresh.curve)
        diverged[running] |= ~fresh.fine
        ranked[diverged] = -np.inf
    _, vector, rate, taken, of_steps = best

    def scored(evaluator: Any, goal: Goal) -> float:
        return float(fitness(evaluator.tasks, evaluator.evaluate(vector[None]), goal)[0])

    deciding, lost = scored(data.deciding, data.deciding_goal), tuple(map(float, rates[diverged]))
    return Tuned(vector, deciding, scored(data.search, data.goal), rate, taken, of_steps, lost, tuple(curves))


class _Round:
    """Changes that are trained side by side, each with a learning rate: vectors, float32[V, D], and whether each is
    finite so far, bool[V]; curve: see `Tuned`."""

    def __init__(
        self, model: Adaptable, data: TuningData, tuning: Tuning, seed: int, rates: np.ndarray, steps: int
    ) -> None:  # fmt: skip
        self._model, self._data, self._tuning, self._seed = model, data, tuning, seed
        self._rates, self._order = rates, np.arange(len(data.parts))
        self.vectors = np.repeat(model.layout.start(seed)[None], len(rates), axis=0)
        self._moments = np.zeros_like(self.vectors), np.zeros_like(self.vectors)
        self.fine, self.curve = np.ones(len(rates), bool), np.full((steps, len(rates)), np.nan)

    def advance(self, step: int, progress: Progress) -> None:
        """Take a step, on the next part of the examples, whose order is another in each turn."""
        data, steps = self._data, len(self.curve)
        if step % len(data.parts) == 0:
            self._order = np.random.default_rng([self._seed, step]).permutation(len(data.parts))
        part = data.parts[self._order[step % len(data.parts)]]
        if data.by_gradient:
            scores, gradient = part.value_and_gradient(self.vectors, progress, data.goal)
            values = fitness(part.tasks, scores, data.goal)
        else:
            key = (self._seed, step)
            values, gradient = _estimate(self._model, part, self.vectors, self._tuning, data.goal, key, progress)
        falling = np.float32((1 + np.cos(np.pi * step / steps)) / 2 * self._rates)
        after, *moments = map(np.asarray, _step(self.vectors, gradient, *self._moments, falling, step + 1))
        self._moments = moments[0], moments[1]
        self.fine &= np.isfinite(values) & np.isfinite(after).all(axis=1)
        self.curve[step] = np.where(self.fine, values, np.nan)
        self.vectors = np.where(self.fine[:, None], after, self.vectors)


def _ranked(evaluator: Any, vectors: np.ndarray, goal: Goal) -> np.ndarray:
    """float64[P]: the fitness that changes are compared by; -inf for one that is not finite."""
    values = ranked_fitness(evaluator.tasks, evaluator.evaluate(vectors), goal)
    return np.where(np.isfinite(values), values, -np.inf)


@jax.jit
def _step(
    vectors: Any, gradient: Any, first: Any, second: Any, rates: Any, number: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Step `number`, from 1, of Adam upwards: the vectors and both moments after it, float32[V, D]."""
    import optax

    updates, moments = optax.scale_by_adam().update(
        gradient, optax.ScaleByAdamState(jnp.asarray(number - 1, jnp.int32), first, second)
    )
    return vectors + rates[:, None] * updates, moments.mu, moments.nu


# ---------------------------------------------------------------------------------------------------------------
# Evolution strategies of rank 1


def _estimate(
    model: Adaptable, part: Any, vectors: np.ndarray, tuning: Tuning, goal: Goal, number: tuple[int, int],
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The mean fitness of the pairs around each change, float64[V], and an estimate of the derivative of its fitness,
    float32[V, D]."""
    layout, noise = model.layout, np.random.default_rng(number)
    directions = {
        name: tuple(noise.standard_normal((tuning.pairs, *lead, size)).astype(np.float32) for size in (outer, inner))
        for name, (*lead, outer, inner) in layout.matrices
    }
    sizes = {name: tuning.spread * spread / layout.scale for name, spread in model.spread.items()}
    candidates = np.asarray(_pairs(layout, jnp.asarray(vectors), directions, sizes))
    scores = part.evaluate(candidates.reshape(-1, candidates.shape[-1]), progress)
    values = fitness(part.tasks, scores, goal).reshape(len(vectors), 2, tuning.pairs)
    slopes = jnp.asarray((values[:, 0] - values[:, 1]) / 2, jnp.float32)
    gradient = _pulled_back(layout, jnp.asarray(vectors), directions, sizes, slopes)
    return values.mean(axis=(1, 2)), np.asarray(gradient)


@partial(jax.jit, static_argnums=0)
def _pairs(layout: LowRankLayout, vectors: jax.Array, directions: Any, sizes: Any) -> jax.Array:
    """The pairs around each change, float32[V, 2, n, E]: changes of a rank more than the layout's. directions: by
    matrix, the outputs' vectors float32[n, …, out] and the inputs' [n, …, in]; sizes: of the steps, by matrix."""
    lead = (len(vectors), 2, len(next(iter(directions.values()))[0]))
    pairs = {}
    for name, (a, b) in layout.split(vectors).items():
        outer, inner = directions[name]
        steps = sizes[name] * jnp.stack([outer, -outer])
        a, b = (jnp.broadcast_to(factor[:, None, None], (*lead, *factor.shape[1:])) for factor in (a, b))
        inner = jnp.broadcast_to(inner[..., None, :], (*a.shape[:-2], 1, a.shape[-1]))
        steps = jnp.broadcast_to(steps[..., None], (*b.shape[:-1], 1))
        pairs[name] = jnp.concatenate([a, inner], axis=-2), jnp.concatenate([b, steps], axis=-1)
    return layout.of_rank(layout.rank + 1).join(pairs, lead)


@partial(jax.jit, static_argnums=0)
def _pulled_back(
    layout: LowRankLayout, vectors: jax.Array, directions: Any, sizes: Any, slopes: jax.Array
) -> jax.Array:  # fmt: skip
    """The derivative with respect to the factors, float32[V, D], of the estimate `sum slope / size outer innerᵀ / n` of
    that with respect to the product of both. It has never the size of a matrix. slopes: float32[V, n]."""
    gradients = {}
    for name, (a, b) in layout.split(vectors).items():
        outer, inner = directions[name]
        weights = slopes / (sizes[name] * slopes.shape[1])
        of_b = jnp.einsum("vn,n...o,n...i,v...ri->v...or", weights, outer, inner, a)
        of_a = jnp.einsum("vn,n...o,n...i,v...or->v...ri", weights, outer, inner, b)
        gradients[name] = of_a, of_b
    return layout.join(gradients, (len(vectors),))
