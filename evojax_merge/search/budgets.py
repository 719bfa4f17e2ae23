"""Budgets of searches: the passes that a search takes, and the generations that a budget pays for.

A pass is one candidate on all examples that a generation is scored on; on a part of them it is a part of a pass.
"""

from collections.abc import Callable

from evojax_merge.config.search_config import MAX_GENERATIONS, SearchConfig
from evojax_merge.errors import InputError
from evojax_merge.search.protocols import Strategy, gradient_generations
from evojax_merge.search.successive_halving import rung_passes

# The passes that a candidate takes with its gradient: see bench/results/strategies.md.
GRADIENT_PASSES = 4.5
# The steps on minibatches between two looks at all examples, where the end of a search depends on these.
STEPS_PER_LOOK = 8
# A sum of parts of passes is no more than a budget that it differs from by rounding.
ROUNDING = 1e-6


def search_passes(search: SearchConfig, strategy: Strategy, examples: int) -> float:
    """The passes of all generations of a search. examples: the number of examples of its smallest task."""
    rounds, starts = gradient_generations(strategy, search.generations)
    # A generation follows gradients on a minibatch, or scores its candidates, in rungs where the search has some.
    followed = GRADIENT_PASSES * starts / search.gradient.minibatches
    if looks_at_all(search):
        followed += starts / STEPS_PER_LOOK
    shards = 2 ** (min(search.rungs, examples.bit_length()) - 1)
    scored = rung_passes(shards, strategy.population) / shards
    return rounds * followed + (search.generations - rounds) * scored


def looks_at_all(search: SearchConfig) -> bool:
    """Whether candidates of steps on minibatches are now and then scored on all examples, because the search may end by
    the best of them."""
    is_awaited = search.stop.target is not None or search.stop.stagnation is not None
    return is_awaited and search.gradient.minibatches > 1


def within_budget(
    where: str, search: SearchConfig, examples: int, make: Callable[[SearchConfig], Strategy]
) -> SearchConfig:
    """The search with as many generations as its budget of passes pays for, or, where the clock ends it, with more than
    it will have. make: the strategy of a search. Raises InputError for a budget that pays for no generation, and for a
    strategy that has to know how many there are where the clock decides."""
    budget = search.parsed_budget
    if budget.seconds is not None:
        options, missing = search.gradient, None
        if search.strategy == "gradient" and options.schedule == "cosine":
            missing = "whose cosine schedule ends at the last one; give generations, or gradient.schedule: constant"
        elif search.strategy == "hybrid" and options.generations is None:
            missing = "of which it follows gradients in a quarter; give generations, or gradient.generations"
        elif search.strategy == "pool":
            missing = "whose children it numbers from the start; give generations, or a budget of passes"
        if missing is not None:
            what = f"{search.strategy} has to know the number of its generations, {missing}"
            raise InputError(where, f"budget: {search.budget}; {what}")
        return search.model_copy(update={"generations": MAX_GENERATIONS})
    if budget.passes is None:
        return search
    affordable = budget.passes + ROUNDING

    def passes(generations: int) -> float:
        changed = search.model_copy(update={"generations": generations})
        return search_passes(changed, make(changed), examples)

    def feasible(generations: int) -> float:
        """The passes of so many generations; 0 where the strategy needs more of them."""
        try:
            return passes(generations)
        except InputError:
            return 0.0

    # The most generations that the budget pays for, found by doubling, then by halving what is left.
    low, high = 0, 1
    while high < MAX_GENERATIONS and feasible(high) <= affordable:
        low, high = high, min(2 * high, MAX_GENERATIONS)
    if feasible(high) <= affordable:
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if feasible(middle) <= affordable else (low, middle)
    if low < 1 or not feasible(low):
        least = passes(low + 1)
        raise InputError(where, f"budget: {search.budget}; {search.strategy} takes {least:,.4g} passes at least")
    return search.model_copy(update={"generations": low})


def describe_length(search: SearchConfig) -> str:
    """The length of a search in words: its generations, and the budget that they come from."""
    generations = "1 generation" if search.generations == 1 else f"{search.generations:,} generations"
    if search.budget is None:
        return generations
    return f"{search.budget} of evaluating" if search.parsed_budget.seconds else f"{generations} ({search.budget})"
