"""Splits: one of something (tasks, batches, evaluators) for each use that a search makes of its examples."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Splits(Generic[T]):
    """One value of a type (tasks, batches, an evaluator) for each split of the examples.

    Splits that generations are scored on: shards, the parts of the searched examples that successive halving goes
    through (without rungs there is one); minibatches, the parts that a strategy differentiates the fitness on; choice,
    all searched examples, where rungs choose theirs (None: the shards take turns); tuning, the parts that a low-rank
    change of a model is trained on.

    Splits that no generation is scored on: search, the whole search split; validation, the examples that are kept back
    to choose the winner on (None: it is chosen on the search split); heldout, the examples that decide nothing.
    """

    shards: list[T]
    search: T
    validation: T | None
    heldout: T
    minibatches: list[T] = field(default_factory=list)
    choice: T | None = None
    tuning: list[T] = field(default_factory=list)

    def map(self, function: Callable[[T], U], final: Callable[[T], U] | None = None) -> "Splits[U]":
        """`function` of each; `final`, where given, of the splits that no generation is scored on."""
        final = final or function
        return Splits(
            shards=[function(part) for part in self.shards],
            search=final(self.search),
            validation=None if self.validation is None else final(self.validation),
            heldout=final(self.heldout),
            minibatches=[function(part) for part in self.minibatches],
            choice=None if self.choice is None else function(self.choice),
            tuning=[function(part) for part in self.tuning],
        )

    @property
    def deciding(self) -> T:
        """The split that the winner is chosen on."""
        return self.search if self.validation is None else self.validation
