"""A sample of what `make torture` does."""

from pathlib import Path

import torture


def test_nothing_is_lost_whenever_a_process_is_killed(tmp_path: Path) -> None:
    done = torture.torture(tmp_path / "world", kills=6, seed=2, log=lambda line: None)
    assert not done.faults, "\n".join(done.faults)
