"""Hostile places for what the program keeps for its user: a cache folder that is something else."""

import os
from collections.abc import Callable
from typing import Any

from hostile import Case, World, recipe

CACHE = "cache"
HERE = (("XDG_CACHE_HOME", CACHE),)


def blocked(make: Callable[[World], Any], *arguments: str) -> Callable[[World], tuple[str, ...]]:
    def change(world: World) -> tuple[str, ...]:
        make(world)
        return arguments

    return change


def file(world: World) -> None:
    world.write(CACHE, "mine")


def file_inside(world: World) -> None:
    world.write(f"{CACHE}/evojax-merge", "mine")


def pipe(world: World) -> None:
    os.mkfifo(world / CACHE)


def link_to_file(world: World) -> None:
    (world / CACHE).symlink_to("tasks.jsonl")


def with_zoo(make: Callable[[World], Any]) -> Callable[[World], Any]:
    def change(world: World) -> None:
        make(world)
        models = [{"model": name, "parameters": {"weight": 1}} for name in ("zoo:maths", "zoo:japanese")]
        world.write("recipe.yaml", recipe(merge_method="linear", base_model=None, models=models))

    return change


def case(name: str, change: Callable[[World], Any], *says: str, **more: Any) -> Case:
    return Case(name, change, (CACHE, *says), environment=HERE, **more)


PLACES = {
    "a file": file, "a file inside of it": file_inside, "a pipe": pipe, "a link to a file": link_to_file,
}  # fmt: skip
CASES = [
    *(case(f"{name}, inspected", blocked(make, "inspect", "zoo:base")) for name, make in PLACES.items()),
    *(case(f"{name}, merged", blocked(with_zoo(make), "merge", "recipe.yaml", "out")) for name, make in PLACES.items()),
    *(
        case(f"{name}, searched", blocked(make, "search", "config.yaml", "--out", "run", "--set", "base=zoo:base"))
        for name, make in PLACES.items()
    ),
]
