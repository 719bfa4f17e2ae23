"""`strategy: auto`: the strategy of a search, and its options, by the derivatives and examples that the search has.

The figures behind the choices are in bench/results/strategies.md.
"""

from dataclasses import dataclass
from typing import Any

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.search.budgets import GRADIENT_PASSES, search_passes
from evojax_merge.search.protocols import Differentiates, Strategy
from evojax_merge.search.strategies.registry import StrategySettings

# The most steps that follow gradients: further ones fit the examples more than the task.
STEPS = 160
# The most steps that follow a companion before the search on the fitness itself, and their most share of a search.
COMPANION_STEPS, COMPANION_SHARE = 80, 1 / 3
# The least examples of a minibatch and of a rung's first part, and the most of either.
LEAST_EXAMPLES, MOST_MINIBATCHES, MOST_RUNGS = 16, 4, 4
# The strategies whose searches a line compares with following gradients.
CMA_ES = ("cma_es", "sep_cma_es", "ipop_cma_es", "bipop_cma_es")


# A search whose strategy was chosen, and why, in a line.
Choice = tuple[SearchConfig, str]


@dataclass(frozen=True)
class Traits:
    """The properties of a search that its strategy depends on. differentiable: the function that has derivatives, for
    every task that counts: the fitness, or a smooth companion; None: neither. examples: the number of examples of the
    smallest task that counts, on which generations are scored. has_moves: whether candidates are lists of moves.
    is_guarded: whether a task is a constraint, which only the scores on all examples decide."""

    differentiable: Differentiates | None
    examples: int
    has_moves: bool = False
    is_guarded: bool = False


def auto(settings: StrategySettings) -> Strategy:
    """Chosen for the search: gradient where the fitness has derivatives, hybrid where a smooth companion has, path_ga
    for moves, else cma_es."""
    raise InputError(settings.where, "strategy: auto stands for another strategy, which a search chooses; name one")


def choose(search: SearchConfig, traits: Traits) -> Choice:
    """Choose the strategy of a search that names `auto`. Options that the search names stay as they are; a named
    population is for strategies that draw candidates."""
    if traits.has_moves:
        return _chosen(search, {"strategy": "path_ga"}, "layer paths are lists of moves")
    # A race of candidates is for strategies that draw them.
    if traits.differentiable == "fitness" and search.rungs == 1 and not traits.is_guarded:
        return _gradient(search, traits)
    if traits.differentiable is not None and not traits.is_guarded:
        return _hybrid(search, traits)
    return _cma_es(search, traits)


def _gradient(search: SearchConfig, traits: Traits) -> Choice:
    parts = _minibatches(search, traits)
    options = search.gradient.model_copy(update={"minibatches": parts})
    changes: dict[str, Any] = {"strategy": "gradient", "population": None, "gradient": options}
    budget, is_free = search.parsed_budget, search.budget is None and "generations" not in search.model_fields_set
    if budget.seconds is not None:
        # The schedule ends at the last step, whatever the clock says.
        seconds = min(budget.seconds, search.stop.seconds or budget.seconds)
        changes["stop"] = search.stop.model_copy(update={"seconds": seconds})
    pays = budget.passes is not None and budget.passes * parts >= STEPS * GRADIENT_PASSES and not search.seeds
    if is_free or pays or budget.seconds is not None:
        changes |= {"generations": STEPS, "budget": None}
    reason = f"the fitness has derivatives; steps follow them on {_describe_parts(parts, traits)}"
    if not search.validation:
        reason += "; without search.validation the winner is chosen on examples that were searched on"
    return _chosen(search, changes, reason)


def _hybrid(search: SearchConfig, traits: Traits) -> Choice:
    parts = _minibatches(search, traits)
    generations, passes = search.gradient.generations, search.parsed_budget.passes
    if search.budget is not None and generations is None:
        # Without a budget the strategy follows the companion in its share of the generations.
        affordable = COMPANION_STEPS if passes is None else int(passes * COMPANION_SHARE * parts / GRADIENT_PASSES)
        generations = max(1, min(COMPANION_STEPS, affordable))
    options = search.gradient.model_copy(update={"minibatches": parts, "generations": generations})
    is_companion = traits.differentiable == "companion"
    followed = "a smooth companion of the fitness" if is_companion else "the fitness"
    steps = "a quarter of the generations" if options.generations is None else f"{options.generations} generations"
    reason = (
        f"{followed} has derivatives; {steps} follow them on {_describe_parts(parts, traits)}, then cma_es searches on "
        "the fitness itself"
    )
    return _chosen(search, {"strategy": "hybrid", "gradient": options}, reason)


def _cma_es(search: SearchConfig, traits: Traits) -> Choice:
    rungs = search.rungs
    if "rungs" not in search.model_fields_set and not traits.is_guarded:
        rungs = max(1, min(MOST_RUNGS, (traits.examples // LEAST_EXAMPLES).bit_length()))
    race = f"candidates race in {rungs} rungs over" if rungs > 1 else "every candidate meets all of"
    why = "a guard wants one fitness of each candidate" if traits.is_guarded else "there are no derivatives to follow"
    reason = f"{why}; {race} {_count(traits.examples)}"
    return _chosen(search, {"strategy": "cma_es", "rungs": rungs}, reason)


def _chosen(search: SearchConfig, changes: dict[str, Any], reason: str) -> Choice:
    return search.model_copy(update=changes), f"search.strategy: auto chose {changes['strategy']}: {reason}"


def _minibatches(search: SearchConfig, traits: Traits) -> int:
    """The number of minibatches: as named, else as many as have examples enough."""
    if "minibatches" in search.gradient.model_fields_set:
        return search.gradient.minibatches
    return max(1, min(MOST_MINIBATCHES, traits.examples // LEAST_EXAMPLES))


def _describe_parts(parts: int, traits: Traits) -> str:
    return f"{parts} minibatches of {_count(traits.examples)}" if parts > 1 else f"all of {_count(traits.examples)}"


def _count(examples: int) -> str:
    return "1 example" if examples == 1 else f"{examples:,} examples"


def gradient_note(search: SearchConfig, strategy: Strategy, traits: Traits) -> str | None:
    """A line on the passes that gradients would save, for a search by CMA-ES with derivatives; None: they save none."""
    if traits.differentiable != "fitness" or strategy.name not in CMA_ES or traits.has_moves or traits.is_guarded:
        return None
    takes = search_passes(search, strategy, traits.examples)
    steps = STEPS * GRADIENT_PASSES / _minibatches(search, traits)
    if takes <= steps:
        return None
    spends = search.budget or f"{takes:,.0f} passes"
    return (
        f"search.strategy: {strategy.name} spends {spends}, and the fitness has derivatives: auto would follow them in "
        f"{STEPS} steps, about {steps:,.0f} passes"
    )
