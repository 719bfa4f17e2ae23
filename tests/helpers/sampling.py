"""Which of many similar cases a run of the suite takes."""

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


# Run every case of every kind (`make test-all`).
ALL = "EVOJAX_TEST_ALL" in os.environ


def sample(cases: Iterable[T], count: int) -> list[T]:
    """Return at most `count` cases, evenly spaced over the list, or all of them with EVOJAX_TEST_ALL.

    Similar cases stand next to each other in most lists. The sample depends on the list and on `count` alone.
    """
    cases = list(cases)
    if ALL or count >= len(cases):
        return cases
    return [cases[(2 * i + 1) * len(cases) // (2 * count)] for i in range(count)]


# Runs with EVOJAX_TEST_ALL alone: a long way to what shorter tests meet as well.
thorough = pytest.mark.skipif(not ALL, reason="make test-all runs it (EVOJAX_TEST_ALL)")
