"""A search without a config: of a space and an evaluator that a script has made itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.search.protocols import GenomeEvaluator, Space, Strategy
from evojax_merge.tasks.splits import Splits


@dataclass(frozen=True)
class PlainSearch:
    """The parts of a problem that `search.loop.evolve` needs."""

    search: SearchConfig
    seed: int
    strategy: Strategy
    space: Space
    strata: Sequence[Sequence[np.ndarray]] = ()


def one_split(evaluator: GenomeEvaluator) -> Splits[Any]:
    """The same examples for all uses."""
    return Splits([evaluator], evaluator, None, evaluator)
