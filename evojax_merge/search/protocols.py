"""The parts of a search: a strategy, a space, an evaluator. The loop (search.loop) uses these interfaces alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax
import numpy as np

from evojax_merge.evaluation.scores import PLAIN, Goal, ScoredTask, Scores, TaskScores

# Receives the number of candidate passes that are done.
Progress = Callable[[int], None]
# A strategy's state: any pytree of arrays, of the same structure in every generation. The search saves it after each
# generation. An axis of length 0 before the first generation may grow.
State = Any


class Strategy(Protocol):
    """A search algorithm that maximises fitness. D dimensions, P candidates a generation.

    A strategy holds its settings alone; everything that changes is in the state, so that a saved run continues bit by
    bit. All randomness comes from the keys, one a generation, the same for `ask` and `tell`.
    """

    @property
    def name(self) -> str: ...
    @property
    def population(self) -> int:
        """P."""

    def init(self, key: jax.Array, genomes: np.ndarray) -> State:
        """The state before the first generation. genomes: float32[A, D], good candidates; row 0 is the start."""

    def ask(self, key: jax.Array, state: State) -> tuple[jax.Array, State]:
        """The generation's genomes, float32[P, D], and the state to `tell`."""

    def tell(self, key: jax.Array, state: State, genomes: jax.Array, scores: Scores) -> State:
        """The state after a generation. `scores.fitness`: float64[P], higher is better, NaN: the candidate failed."""

    def finalists(self, state: State) -> np.ndarray:
        """float32[F, D]: further genomes that may be the winner, such as a distribution's mean."""

    def metrics(self, state: State) -> dict[str, float]:
        """The figures of the state for the history, by name; among them `sigma`, the standard deviation of a step,
        where the strategy has one."""


# The function that a strategy differentiates: the fitness, or a smooth companion of it.
Differentiates = Literal["fitness", "companion"]


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a strategy beyond `Strategy`, as data: its attribute `capabilities`. A strategy without the
    attribute has none.

    differentiates: the function whose gradients `tell` gets. keeps_front: the strategy compares the
    candidates' means on the tasks that count (`Scores.task_means`), and its finalists are a Pareto front, whose members
    are scored on all examples, shown, and can be exported. takes_injected: its `tell` assumes that `ask` drew the
    genomes, so it needs to know which ones were not drawn. lends_context: its genomes refer to its
    state. generations: the number of generations after which a search ends, whatever more it was
    given; None: the strategy always finds more to do.
    """

    differentiates: Differentiates | None = None
    keeps_front: bool = False
    takes_injected: bool = False
    lends_context: bool = False
    generations: int | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the methods that a strategy with these capabilities has beside the methods of `Strategy`."""
        gradients = ("wants_gradients", "gradient_generations") if self.differentiates is not None else ()
        injected = ("inject",) if self.takes_injected else ()
        return (*gradients, *injected, *(("context",) if self.lends_context else ()))


def capabilities_of(strategy: Strategy) -> Capabilities:
    """The strategy's `capabilities`; none where it has no such attribute."""
    capabilities: Capabilities = getattr(strategy, "capabilities", Capabilities())
    return capabilities


class CapableStrategy(Strategy, Protocol):
    """The methods of strategies with further capabilities, each strategy those of its own (see `Capabilities`)."""

    def inject(self, state: State, genomes: jax.Array, count: int) -> tuple[jax.Array, State]:
        """takes_injected: the genomes and the state to `tell` in the first generation, where the first `count` of the
        genomes, float32[P, D], replace genomes that `ask` drew."""

    def wants_gradients(self, state: State) -> bool:
        """differentiates: return whether the next generation's scores have gradients, `scores.gradients`, of some
        examples or of the companion. Such a strategy may ask for fewer genomes than its population."""

    def gradient_generations(self, generations: int) -> tuple[int, int]:
        """differentiates: return the number of generations, out of `generations`, whose scores have gradients, and the
        number of genomes in each. The plan of a search counts them."""

    def context(self, state: State) -> Any:
        """lends_context: the part of a state that the space needs to decode genomes, beside the genomes (see
        `ContextSpace`), such as the members that the strategy has bred."""


def differentiates(strategy: Strategy) -> Differentiates | None:
    """Return the function that the strategy differentiates; None: it uses no gradients."""
    return capabilities_of(strategy).differentiates


def wants_gradients(strategy: Strategy, state: State) -> bool:
    """Return whether the next generation's scores have gradients. state: the strategy's state."""
    return differentiates(strategy) is not None and cast(CapableStrategy, strategy).wants_gradients(state)


def gradient_generations(strategy: Strategy, generations: int) -> tuple[int, int]:
    """Return how many of `generations` have scores with gradients, and the number of genomes in each."""
    if differentiates(strategy) is None:
        return 0, 0
    return cast(CapableStrategy, strategy).gradient_generations(generations)


def context_of(strategy: Strategy, state: State) -> Any:
    """Return the part of the state that the space needs to decode genomes; None: the space needs the genomes alone."""
    return cast(CapableStrategy, strategy).context(state) if capabilities_of(strategy).lends_context else None


class Space(Protocol):
    """Decodes genomes into candidates."""

    @property
    def dims(self) -> int:
        """D, the number of genes of a genome."""

    @property
    def start(self) -> np.ndarray:
        """float32[D], the genome with which a search begins."""

    def baselines(self) -> tuple[str, np.ndarray]:
        """The candidates that need no search, which the winner is compared with on the search split: in words, and
        their genomes, float32[S, D]."""

    def decode(self, genomes: np.ndarray) -> Any:
        """The candidates of genomes float32[P, D], in the form that the space's evaluator takes."""

    def seed_genomes(self, where: str, name: str) -> np.ndarray:
        """float32[S, D]: the genomes of the merges with the name `name`, one of `config.Seed`, with which a search may
        begin. Raises InputError where the space has none."""


@runtime_checkable
class ContextSpace(Space, Protocol):
    """A space whose genomes refer to the state of the strategy (see `CapableStrategy.context`)."""

    def within(self, context: Any) -> "ContextSpace":
        """The space of a search whose strategy lends `context`."""


@runtime_checkable
class HasMoves(Protocol):
    """A space whose genomes are lists of moves, which edit one object one after the other: rows of equal length, whose
    first gene says whether the move is on. A genome whose moves are all off means the same candidate as the space's
    start.
    """

    @property
    def move_genes(self) -> tuple[int, ...]:
        """The number of values of each gene of a move, from bound to bound in equal parts: 2 for the first gene, off
        and on; 0 for a continuous gene. In the start's genome, a continuous gene has the value that changes nothing."""


@runtime_checkable
class HasPlainMerges(Protocol):
    """A space whose candidates may be the uniform merge, or a parent as it is."""

    def plain_merges(self) -> tuple[np.ndarray, Sequence[str]]:
        """The merges that need no search and that the space contains, to the rounding of float32: float32[S, D], the
        uniform merge first, then each parent alone; and, in words, which of them it leaves out, and why."""


def plain_merges_of(space: Space) -> tuple[np.ndarray, Sequence[str]]:
    """Return the space's merges that need no search (see `HasPlainMerges`); none for a space that names none."""
    return space.plain_merges() if isinstance(space, HasPlainMerges) else (np.zeros((0, space.dims), np.float32), ())


@runtime_checkable
class HasParents(Protocol):
    """A space whose candidates may be a parent as it is."""

    def parents_among(self, genomes: np.ndarray) -> np.ndarray:
        """bool[P]: true for the genomes, float32[P, D], that stand for a parent as it is."""


@runtime_checkable
class HasAverages(Protocol):
    """A space whose candidates may be the average of some of the K parents."""

    @property
    def parents(self) -> int:
        """K."""

    def averages(self, where: str, members: np.ndarray) -> np.ndarray:
        """float32[S, D]: uniform averages of parents' weights. members: bool[S, K], the parents in each. Raises
        InputError where the space leaves them out."""


class ScoresCandidates(Protocol):
    """Scores candidates, as a space decodes them, on one split of the examples."""

    @property
    def tasks(self) -> Sequence[ScoredTask]: ...

    def passes(self, population: int) -> int:
        """The number of steps of progress that the evaluation of `population` candidates reports."""

    def evaluate(self, candidates: Any, progress: Progress = ...) -> TaskScores: ...


class GenomeEvaluator(Protocol):
    """Scores genomes on one split of the examples: a space and an evaluator together."""

    @property
    def tasks(self) -> Sequence[ScoredTask]: ...
    def passes(self, population: int) -> int: ...
    def score(self, genomes: np.ndarray, progress: Progress = ...) -> TaskScores: ...


def within(evaluator: GenomeEvaluator, context: Any) -> GenomeEvaluator:
    """The evaluator of genomes that refer to `context` (see `context_of`); None: `evaluator` itself."""
    return evaluator if context is None else cast(Any, evaluator).within(context)


def goal_of(evaluator: GenomeEvaluator) -> Goal:
    """The evaluator's `goal`; for one without the attribute, the tasks' weights alone."""
    goal: Goal = getattr(evaluator, "goal", PLAIN)
    return goal


class SubsetEvaluator(GenomeEvaluator, Protocol):
    """Scores genomes on any subset of the examples."""

    def subset(self, examples: Sequence[np.ndarray]) -> GenomeEvaluator:
        """The evaluator of a subset of the examples: for each task int[M], ascending."""
