"""Broken and hostile inputs: each ends with its status, one line that names what is wrong, within ten seconds, and
leaves the user's files as they were. The cases are in tests/hostile/, a module for each kind of input. Every twentieth
case runs, and all of them with EVOJAX_TEST_ALL."""

from pathlib import Path

import pytest
from helpers import Family, sample
from hostile import (
    MERGE,
    SEARCH,
    Case,
    Server,
    addresses,
    build_world,
    caches,
    chat,
    check,
    checkpoints,
    configs,
    folders,
    gguf,
    goals,
    images,
    inspecting,
    links,
    messages,
    networks,
    outputs,
    overwriting,
    own_modules,
    pictures,
    proof,
    quantised,
    recipes,
    runs,
    safetensors_files,
    shared_server,
    strangers_runs,
    tasks,
    tasks_of_strangers,
    versions,
    votes,
)
from hostile import tokenizers as tokenizer_files

MODULES = (
    checkpoints,
    safetensors_files,
    tokenizer_files,
    recipes,
    outputs,
    overwriting,
    tasks,
    configs,
    runs,
    links,
    gguf,
    goals,
    quantised,
    tasks_of_strangers,
    messages,
    inspecting,
    chat,
    proof,
    versions,
    images,
    caches,
    votes,
    addresses,
    pictures,
    own_modules,
    folders,
    strangers_runs,
    networks,
)
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
