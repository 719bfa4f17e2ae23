"""Broken and hostile inputs: each ends with its status, one line that names what is wrong, within ten seconds, and
leaves the user's files as they were. The cases are in tests/hostile/, a module for each kind of input. Every twentieth
case runs, and all of them with EVOJAX_TEST_ALL."""

from importlib import import_module
from pathlib import Path

import hostile
import pytest
from helpers.families import Family
from helpers.sampling import sample
from hostile import MERGE, SEARCH, Case, Server, build_world, check, shared_server

FOLDER = Path(hostile.__file__).parent
MODULES = [import_module(f"hostile.{file.stem}") for file in sorted(FOLDER.glob("*.py")) if file.stem[0] != "_"]
CASES = [
    pytest.param(case, id=f"{module.__name__.partition('.')[2]}: {case.name}")
    for module in MODULES
    for case in sample(module.CASES, -(-len(module.CASES) // 20))
]


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.mark.parametrize("case", CASES)
def test_hostile_input(case: Case, family: Family, server: Server, tmp_path: Path) -> None:
    check(case, build_world(tmp_path / "world", family), server)


def test_the_world_is_good_where_nothing_is_changed(family: Family, server: Server, tmp_path: Path) -> None:
    """Else every refusal above could have another reason."""
    world = build_world(tmp_path / "world", family)
    for arguments in (MERGE, SEARCH):
        done = server.run(arguments, world.root, seconds=120)
        assert done.status == 0, done.stderr
