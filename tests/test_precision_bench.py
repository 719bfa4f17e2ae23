"""bench/evaluation/precision.py: how it compares two rankings of a population."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.evaluation.precision import agreement, ranks


def test_rankings_are_compared_by_ranks_and_by_the_best() -> None:
    exact = np.arange(8.0)
    swapped = exact.copy()
    swapped[[6, 7]] = 7.0, 6.0
    found = agreement(exact, swapped)
    # One swap of neighbours: 1 - 6 sum(d^2) / (n (n^2 - 1)).
    assert found.spearman == pytest.approx(1 - 6 * 2 / (8 * 63))
    assert (found.kept, found.quarter, found.lost) == (2, 2, 1.0)
    assert found.spread == exact.std() and found.noise == pytest.approx(0.5)
    reversed_ = agreement(exact, -exact)
    assert reversed_.spearman == pytest.approx(-1) and (reversed_.kept, reversed_.lost) == (0, 7.0)
    # A shift of all scores changes no ranking.
    shifted = agreement(exact, exact - 3)
    assert (shifted.spearman, shifted.noise, shifted.lost) == (pytest.approx(1), 0.0, 0.0)
    assert ranks(np.array([2.0, 1.0, 2.0, 5.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
