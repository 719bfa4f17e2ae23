"""The search strategies, by their names in a config. `register_strategy` adds one."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, TypeVar

import jax
import numpy as np

from evojax_merge.config.search_config import AUTO, VOTES, GradientConfig, SearchConfig, Seed
from evojax_merge.errors import InputError, did_you_mean, shown
from evojax_merge.plugins import HINT
from evojax_merge.search.protocols import Capabilities, Space, State, Strategy, capabilities_of, differentiates


@dataclass(frozen=True)
class PoolSettings:
    """The members that the strategy `pool` breeds. founders: K; methods: the number of methods to breed by; size: the
    number of members that are kept; selection, replace: see `config.PoolConfig`."""

    founders: int
    methods: int
    size: int
    selection: Literal["complementary", "tournament", "random"]
    replace: Literal["worst", "competition"]


@dataclass(frozen=True)
class StrategySettings:
    """The settings that a strategy is made from. dims: D; population: P, None for the strategy's default; sigma: the
    first standard deviation of a step, in units of the bounds' range; generations: the number of generations of the
    search.

    from_unit: float64[...] in [0, 1], from bound to bound -> the genes that stand for it. Genes beyond the genes of 0
    and 1 are mirrored there. seeds: the number of candidates of the first generation that are given instead of drawn.
    gradient: the section `search.gradient`, for strategies that follow gradients. where: the part of the config that
    messages name; a factory raises InputError for settings that it cannot take. objectives: T, the number of tasks in
    the fitness. move_genes: the number of values of each gene of a move, in a space of moves (see `HasMoves`); empty in
    other spaces. pool: the settings of breeding, in a search over a pool's members. space: decodes the genomes;
    rungs: see `search.rungs`.
    """

    dims: int
    population: int | None
    sigma: float
    generations: int
    from_unit: Callable[[np.ndarray], np.ndarray] = np.asarray
    seeds: int = 0
    gradient: GradientConfig = field(default_factory=GradientConfig)
    where: str = "search"
    objectives: int = 1
    move_genes: tuple[int, ...] = ()
    pool: PoolSettings | None = None
    space: Space | None = None
    rungs: int = 1

    @property
    def range(self) -> tuple[float, float]:
        """The genes of the lower and of the upper bound."""
        low, high = self.from_unit(np.array([0.0, 1.0]))
        return float(low), float(high)


@dataclass(frozen=True)
class DrawingStrategy:
    """A strategy that is made of its settings. population: P. The default members say nothing: there are no finalists,
    where the best candidates so far are the strategy's own, and no figures."""

    settings: StrategySettings
    population: int

    def finalists(self, state: State) -> np.ndarray:
        return np.zeros((0, self.settings.dims), np.float32)

    def metrics(self, state: State) -> dict[str, float]:
        return {}


def generator(key: jax.Array) -> np.random.Generator:
    """NumPy's random numbers, from a key of JAX, for strategies that draw on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


StrategyFactory = Callable[[StrategySettings], Strategy]
MakesStrategy = TypeVar("MakesStrategy", bound=StrategyFactory)

# The modules of the built-in strategies: evosax is imported only where a strategy is made.
_MODULES = {
    "cma_es": ("cma_es", "sep_cma_es", "lm_ma_es"), "xnes": ("xnes",), "restarts": ("ipop_cma_es", "bipop_cma_es"),
    **{name: (name,) for name in (
        "de", "pso", "ga", "path_ga", "gradient", "hybrid", "pareto", "niches", "random", "grid", "greedy", "pool",
    )},
}  # fmt: skip
_BUILT_IN = {name: f"evojax_merge.search.strategies.{module}" for module, names in _MODULES.items() for name in names}
_BUILT_IN |= {VOTES: "evojax_merge.judge.proposals", AUTO: "evojax_merge.search.auto"}
# The members of the protocol `Strategy`.
_MEMBERS = ("name", "population", "init", "ask", "tell", "finalists", "metrics")
_registered: dict[str, StrategyFactory] = {}


def register_strategy(name: str, factory: StrategyFactory) -> None:
    """Make `search.strategy: NAME` mean the strategy that `factory` makes; a later factory of the same name replaces an
    earlier one. Raises ValueError for the name of a strategy that comes with the program, and for a value that is no
    name or no function."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,100}", name):
        raise ValueError(f"name: {shown(name)}; expected a word of letters, digits, _, . and -")
    if not callable(factory):
        raise ValueError(f"factory: {shown(factory)}; expected a function of StrategySettings that returns a strategy")
    if name in _BUILT_IN:
        raise ValueError(f"there is a strategy {name!r} already; choose another name")
    _registered[name] = factory


def strategy_names() -> list[str]:
    return [*_BUILT_IN, *_registered]


def find_strategy(where: str, name: str) -> StrategyFactory:
    """The factory of a strategy. Raises InputError for an unknown name, with the nearest one that exists."""
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        raise InputError(where, f"unknown strategy {name!r}{did_you_mean(name, strategy_names())}{HINT}")
    factory: StrategyFactory = getattr(import_module(_BUILT_IN[name]), name)
    return factory


def begin_with(*seeds: Seed) -> Callable[[MakesStrategy], MakesStrategy]:
    """Decorate a strategy's factory: its searches begin with these merges, or with none, where `search.seeds` is not
    given. Others begin with the uniform merge and the parents, where the space contains these."""

    def decorate(factory: MakesStrategy) -> MakesStrategy:
        factory.seeds = seeds  # type: ignore[attr-defined]
        return factory

    return decorate


def seeds_of(where: str, search: SearchConfig) -> Sequence[Seed] | None:
    """The merges that a search begins with: `search.seeds`, or the seeds of its strategy; None: neither names any.
    Raises InputError for an unknown strategy."""
    return getattr(find_strategy(where, search.strategy), "seeds", None) if search.seeds is None else search.seeds


def make_strategy(where: str, name: str, settings: StrategySettings) -> Strategy:
    """Make a strategy. Raises InputError for an unknown name, where the strategy's population is not the one in
    `settings`, and where the population cannot hold the seeds."""
    strategy = find_strategy(where, name)(settings)
    capabilities = capabilities_of(strategy)
    if not isinstance(capabilities, Capabilities):
        what = f"capabilities {shown(capabilities)}; expected a Capabilities of evojax_merge.search.protocols"
        raise InputError(where, f"the strategy {name} has {what}")
    lacking = [member for member in (*_MEMBERS, *capabilities.members) if not hasattr(strategy, member)]
    population, fault = getattr(strategy, "population", None), None
    if lacking:
        fault = f"the strategy {name} lacks {', '.join(lacking)}; see evojax_merge.search.protocols"
    elif type(population) is not int:
        fault = f"the strategy {name} has population {shown(population)}; expected an int"
    elif settings.population not in (None, population):
        what = f"the strategy {name} has populations of {population} here; give that, or leave it out"
        fault = f"population: {settings.population}; {what}"
    elif population < 2 and capabilities.differentiates is None:
        fault = f"population: 1; the strategy {name} compares candidates; expected 2 or more"
    elif settings.seeds > population:
        what = f"{settings.seeds} genomes do not fit into a population of {population}"
        fault = f"seeds: {what}; raise population, or name fewer"
    if fault is not None:
        raise InputError(where, fault)
    return strategy


def check_options(where: str, search: SearchConfig, strategy: Strategy) -> None:
    """Raises InputError for options that the strategy cannot follow, and for a search that ends before it begins."""
    stop, options, defaults, what = search.stop, search.gradient, GradientConfig(), differentiates(strategy)
    fault = None
    if stop.evaluations is not None and stop.evaluations < strategy.population:
        fault = (
            f"stop.evaluations: {stop.evaluations:,} are fewer than the {strategy.population:,} candidates of one "
            f"generation; expected {strategy.population:,} or more, or a smaller population"
        )
    elif what is None and options != defaults:
        fault = f"gradient: {search.strategy} follows no gradient; leave the key out, or take gradient or hybrid"
    elif what == "fitness" and search.rungs > 1:
        fault = f"rungs: {search.rungs}; {strategy.name} does not race its candidates; it has gradient.minibatches"
    elif what == "fitness" and (options.generations is not None or options.starts != defaults.starts):
        fault = f"gradient.generations, gradient.starts: are hybrid's; {strategy.name} has generations and population"
    elif capabilities_of(strategy).keeps_front and search.rungs > 1:
        fault = (
            f"rungs: {search.rungs}; a race stops candidates by their weighted fitness, and {search.strategy} compares "
            "them in every task; leave the key out"
        )
    if fault is not None:
        raise InputError(where, fault)
