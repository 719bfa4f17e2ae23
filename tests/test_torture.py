"""Two of the kills of `make torture`. EVOJAX_TEST_SEED chooses others."""

import os
from pathlib import Path

import torture
from helpers.sampling import thorough


@thorough
def test_nothing_is_lost_whenever_a_process_is_killed(tmp_path: Path) -> None:
    seed = int(os.environ.get("EVOJAX_TEST_SEED", "0"))
    done = torture.torture(tmp_path / "world", kills=2, seed=seed, log=lambda line: None)
    assert not done.faults, "\n".join([f"EVOJAX_TEST_SEED={seed} repeats it", *done.faults])
