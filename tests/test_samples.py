"""Which cases and examples a run draws: the same in every run of one commit."""

import hypothesis
import pytest
from helpers.sampling import ALL, sample


@pytest.mark.skipif(ALL, reason="EVOJAX_TEST_ALL runs every case")
def test_a_sample_is_spread_over_the_list_and_depends_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("EVOJAX_TEST_SEED", seed)
        assert sample(range(12), 3) == [2, 6, 10]
        assert sample("abcde", 2) == ["b", "d"]
        assert sample([0, 40], 1) == [40]
    assert sample(iter("abc"), 3) == sample("abc", 7) == ["a", "b", "c"]


def test_property_tests_are_random_in_the_wide_sweep_alone() -> None:
    assert hypothesis.settings.default.derandomize is not ALL
