"""Hostile places for what the program keeps for its user: a cache folder that is something else."""

import os
from collections.abc import Callable
from typing import Any

from hostile import Case, World, changing, instead, recipe

CACHE = "cache"
HERE = (("XDG_CACHE_HOME", CACHE),)


@changing
def blocked(world: World, make: Callable[[World], Any], *arguments: str) -> tuple[str, ...]:
    make(world)
    return arguments


def file(world: World) -> None:
    world.write(CACHE, "mine")


def file_inside(world: World) -> None:
    world.write(f"{CACHE}/evojax-merge", "mine")


@changing
def with_zoo(world: World, make: Callable[[World], Any]) -> None:
    make(world)
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("zoo:maths", "zoo:japanese")]
    world.write("recipe.yaml", recipe(merge_method="linear", base_model=None, models=models))


def case(name: str, change: Callable[[World], Any], *says: str, **more: Any) -> Case:
    return Case(name, change, (CACHE, *says), environment=HERE, **more)


PLACES = {
    "a file": file, "a file inside of it": file_inside, "a pipe": instead(CACHE, os.mkfifo),
    "a link to a file": lambda world: (world / CACHE).symlink_to("tasks.jsonl"),
}  # fmt: skip
CASES = [
    *(case(f"{name}, inspected", blocked(make, "inspect", "zoo:base")) for name, make in PLACES.items()),
    *(case(f"{name}, merged", blocked(with_zoo(make), "merge", "recipe.yaml", "out")) for name, make in PLACES.items()),
    *(
        case(f"{name}, searched", blocked(make, "search", "config.yaml", "--out", "run", "--set", "base=zoo:base"))
        for name, make in PLACES.items()
    ),
]
