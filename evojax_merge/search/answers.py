"""Checks of the answers of a strategy, which may be a user's own: the message about a wrong one names the strategy."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from evojax_merge.errors import Failed, shown
from evojax_merge.evaluation.scores import Scores
from evojax_merge.search.protocols import State, Strategy, differentiates


def ask(strategy: Strategy, key: jax.Array, state: State, dims: int) -> tuple[Any, State]:
    """The generation's genomes and the state after the ask. Raises Failed unless there are as many finite genomes as
    the population, or fewer where the strategy follows gradients."""
    answer = strategy.ask(key, state)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise _wrong(strategy, "ask", answer, "a pair of genomes and a state")
    genomes, expected, shape = answer[0], (strategy.population, dims), np.shape(answer[0])
    fewer = differentiates(strategy) is not None and len(shape) == 2 and 0 < shape[0] <= expected[0]
    if shape != expected and not (fewer and shape[1] == expected[1]):
        raise Failed(
            f"the strategy {strategy.name} asked for genomes of shape {list(shape)}; expected {list(expected)}, its "
            "population and the search's dimensions"
        )
    values = np.asarray(genomes)
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise _wrong(strategy, "ask", genomes, "finite genomes")
    return answer


def tell(strategy: Strategy, key: jax.Array, state: State, genomes: Any, scores: Scores) -> State:
    """The state after a generation. Raises Failed where its structure differs from the state's before."""
    answer = strategy.tell(key, state, genomes, scores)
    structures: list[Any] = [jax.tree.structure(answer), jax.tree.structure(state)]
    if structures[0] != structures[1]:
        raise _wrong(strategy, "tell", answer, "a state of the structure that ask returned")
    return answer


def finalists(strategy: Strategy, state: State, dims: int) -> np.ndarray:
    """float32[F, D]: other genomes that may be the winner."""
    answer = strategy.finalists(state)
    if np.ndim(answer) != 2 or np.shape(answer)[1] != dims:
        raise _wrong(strategy, "finalists", answer, f"genomes of shape [F, {dims}]")
    return answer


def metrics(strategy: Strategy, state: State) -> dict[str, float]:
    """The figures of the state for the history, by name."""
    answer = strategy.metrics(state)
    if not isinstance(answer, Mapping) or not all(
        isinstance(name, str) and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "fiub"
        for name, value in answer.items()
    ):
        raise _wrong(strategy, "metrics", answer, "a mapping of names to numbers")
    return dict(answer)


def _wrong(strategy: Strategy, method: str, answer: Any, expected: str) -> Failed:
    return Failed(f"the strategy {strategy.name} returned {shown(answer)} from {method}; expected {expected}")
