"""The choice of the examples that the rungs of a generation ask first: those on which candidates are predicted to
differ most.

Each generation draws an order of the examples by sequential Poisson sampling (Ohlsson, 1998): by u / s, with u uniform
in [0, 1] and s the spread of an example's scores between candidates. An item response model (search.item_response),
fitted to the latest candidates that were evaluated on all examples, predicts the spread. However many examples are
asked, each of them then has a probability to be among them that is proportional to its spread, or 1; so examples that
all candidates get right, or all wrong, are asked last. A score that was asked stands for as many as one over this
probability (Horvitz and Thompson, 1952), so that the sum of the weighted scores estimates that of all scores without
bias, whatever the model predicts. The probabilities are exact in the limit of many examples, and approximate for few.

Examples are drawn by strata of similar length, of which every rung has its share: whatever is chosen, a rung's examples
fill batches of about the same shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evojax_merge.search.item_response import fit_item_model, predicted_spread
from evojax_merge.search.protocols import SubsetEvaluator
from evojax_merge.search.successive_halving import ExampleOrder, Part, rung_shards
from evojax_merge.search.surrogate import SurrogateData

# Examples of a stratum in each part.
STRATUM_SHARE = 4
# The share of an example's probability to be asked that does not depend on its spread. It lets an example that the
# model takes for decided be asked sometimes, and bounds weights by one over this share of the average.
UNIFORM_SHARE = 0.2
# The stream of a seed's random numbers that examples are drawn with.
CHOICE_STREAM = 2


@dataclass(frozen=True)
class ExampleChoice:
    """The examples that a search chooses from. evaluator: scores genomes on any of them, of tasks that all count;
    strata: for each task the strata of its examples, int[n] each; parts: of the examples in a generation."""

    evaluator: SubsetEvaluator
    strata: Sequence[Sequence[np.ndarray]]
    parts: int


def length_strata(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """The examples of a task, of so many tokens each int[N], in strata of similar length: STRATUM_SHARE for each part
    in every one of them, in the last more. Examples of one length are not divided."""
    order, share = np.argsort(lengths, kind="stable"), STRATUM_SHARE * parts
    ordered = lengths[order]
    cuts = [cut for cut in range(share, len(order) - share + 1, share) if ordered[cut - 1] < ordered[cut]]
    return np.split(order, cuts)


def choose_examples(choice: ExampleChoice, surrogate: SurrogateData, seed: int, generation: int) -> ExampleOrder:
    """The order in which a generation takes the examples. It depends on the latest candidates that were evaluated on
    all of them, the seed and the generation alone. Where there are none, all examples are as likely."""
    tasks = choice.evaluator.tasks
    begins = np.cumsum([0, *(task.size for task in tasks)])
    spread = example_spread(surrogate, np.repeat(np.arange(len(tasks)), np.diff(begins)))
    rng, ends = np.random.default_rng([seed, generation, CHOICE_STREAM]), rung_shards(choice.parts)
    counts = np.zeros((len(ends), begins[-1]))
    chosen = []
    for begin, strata in zip(begins, choice.strata, strict=False):
        drawn = []
        for stratum in strata:
            order, weights = draw_order(spread[begin + stratum], choice.parts, rng)
            drawn.append([stratum[part] for part in order])
            counts[:, begin + stratum] = weights[[end - 1 for end in ends]]
        chosen.append([np.sort(np.concatenate(part)) for part in zip(*drawn, strict=True)])
    parts = []
    for examples in zip(*chosen, strict=True):
        numbers = {task.name: begin + indices for task, begin, indices in zip(tasks, begins, examples, strict=False)}
        parts.append(Part(choice.evaluator.subset(examples), numbers))
    return ExampleOrder(tuple(parts), counts)


def example_spread(surrogate: SurrogateData, task_of: np.ndarray) -> np.ndarray:
    """The predicted spread of the scores on each example between candidates, float64[N]; 1 without two candidates that
    were evaluated on all examples. task_of: int[N], the task of each example."""
    complete = surrogate.contributions[np.isfinite(surrogate.contributions).all(axis=1)].astype(np.float64)
    if len(complete) < 2:
        return np.ones(len(task_of))
    return predicted_spread(fit_item_model(complete, task_of))


def draw_order(spread: np.ndarray, parts: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """The n examples of a stratum in parts, int[m] each, those of a larger spread float64[n] sooner; and the number of
    examples of the stratum that each stands for once the first part, two parts, and so forth were asked, float64[parts,
    n]. Parts are of equal size; where the examples cannot be divided, the first parts have one example more."""
    count, mean = len(spread), spread.mean()
    size = (1 - UNIFORM_SHARE) * spread / mean + UNIFORM_SHARE if mean > 0 else np.ones(count)
    order = np.argsort(rng.random(count) / size, kind="stable")
    sizes = [count // parts + (part < count % parts) for part in range(parts)]
    divided = np.split(order, np.cumsum(sizes)[:-1])
    weights = np.empty((parts, count))
    for part, asked in enumerate(np.cumsum(sizes)):
        weights[part] = 1 / inclusion_probabilities(size, int(asked))
    return divided, weights


def inclusion_probabilities(size: np.ndarray, asked: int) -> np.ndarray:
    """float64[n]: the probability of each example to be asked, proportional to the size float64[n], 1 at most."""
    if asked >= len(size):
        return np.ones(len(size))
    # The larger ones are certain, as many as would have a probability above 1.
    descending = np.sort(size)[::-1]
    remaining = np.cumsum(descending[::-1])[::-1]
    certain = next(c for c in range(asked) if descending[c] * (asked - c) <= remaining[c] * (1 + 1e-9))
    return np.minimum(1.0, size * (asked - certain) / remaining[certain])
