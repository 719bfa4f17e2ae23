"""Budgets of a search, as a config has them: `500 passes`, `2h`."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The work of a search: its passes (one candidate on all examples that a generation is scored on), or its seconds
    of evaluating; neither where its generations are given."""

    passes: float | None = None
    seconds: float | None = None


_BUDGET = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?(pass|passes|s|m|min|h|d)", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_budget(text: str) -> Budget | None:
    """The budget that a text such as `500 passes` or `2h` means; None: it means none."""
    match = _BUDGET.fullmatch(text.strip())
    if match is None or not float(match[1]):
        return None
    amount = float(match[1])
    return Budget(seconds=amount * _SECONDS[match[2]]) if match[2] in _SECONDS else Budget(passes=amount)
