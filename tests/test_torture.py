"""A sample of what `make torture` does, another one each day."""

import os
from pathlib import Path

import torture


def test_nothing_is_lost_whenever_a_process_is_killed(tmp_path: Path) -> None:
    seed = int(os.environ["EVOJAX_TEST_SEED"])
    done = torture.torture(tmp_path / "world", kills=2, seed=seed, log=lambda line: None)
    assert not done.faults, "\n".join([f"EVOJAX_TEST_SEED={seed} repeats it", *done.faults])
