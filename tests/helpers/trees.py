"""Searches of pytrees in one call, and what they found."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import evojax_merge as em

# The settings of a search that are keys of a config's `space`.
SPACE = ("parameters", "fixed", "normalize", "rescale")


def search_trees(
    parents: Sequence[Any] | Mapping[str, Any],
    fitness: Any,
    *,
    base: Any = None,
    backend: str | None = None,
    examples: Any = None,
    heldout: float | None = None,
    method: str = "linear",
    generations: int | None = 4,
    on_generation: Callable[[em.Generation], None] = lambda generation: None,
    **settings: Any,
) -> em.Run:
    """Search for the merge with the highest fitness, a function or a host_callback. settings: of the space and of the
    study; without `heldout` the examples are the held-out ones as well."""
    models = em.load_models(base, parents, backend=backend)
    space = em.MergeSpace(models, method, **{key: settings.pop(key) for key in SPACE if key in settings})
    task = fitness
    if examples is not None:
        function, traced = getattr(fitness, "function", fitness), not hasattr(fitness, "function")
        held = examples if heldout is None else heldout
        task = em.tasks.Arrays(function, name="fitness", examples=examples, heldout=held, traced=traced)
    return em.Study(models, space, task, **settings).run(generations, on_generation)


def by_group(run: em.Run) -> dict[str, dict[str, tuple[float, ...]]]:
    """The winner's searched parameters: by group and name one for each parent, or one."""
    result: Any = run.result
    return {
        group: {name: tuple(np.ravel(values[i]).tolist()) for name, values in result["parameters"].items()}
        for i, group in enumerate(result["groups"])
    }


def kept_back(run: em.Run) -> tuple[int, ...]:
    """The numbers of the examples on which the winner was chosen."""
    study: Any = run._study
    indices: tuple[int, ...] = study._problem.splits.validation[0].indices
    return indices
