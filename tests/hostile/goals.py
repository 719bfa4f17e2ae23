"""Hostile goals of a search: scales with nothing to measure, guards without a base, tolerances that are no numbers."""

from typing import Any

from hostile import Case
from hostile.configs import asking, changed, searching

TASK = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}
GUARDED = [TASK, {**TASK, "name": "kept", "weight": 0, "guard": True}]
LINEAR = {"method": "linear", "parameters": {"weight": {}}}


def guarded(**changes: Any) -> Any:
    return changed(**{"tasks": GUARDED} | changes)


CASES = [
    Case("a tolerance in words", asking(guard=True, tolerance="a little"), ("tasks[0].tolerance", "a number")),
    Case("a tolerance below zero", asking(guard=True, tolerance=-0.1), ("tasks[0].tolerance", "from 0 to")),
    Case("a tolerance of NaN", asking(guard=True, tolerance=float("nan")), ("tasks[0].tolerance", "number")),
    Case("a tolerance without a guard", asking(tolerance=0.1), ("tasks[0]", "guard: true")),
    Case("a guard in words", asking(guard="always"), ("tasks[0].guard", "true or false")),
    Case("only a guard", changed(tasks=GUARDED[1:]), ("all weights are 0",)),
    Case("a guard without a base", guarded(base=None, space=LINEAR), ("tasks[1].guard", "name one")),
    Case("a guard in a race", guarded(search={"generations": 1, "population": 4, "rungs": 2}),
         ("tasks[1].guard", "leave rungs out")),
    Case("a guard and a gradient", guarded(search={"generations": 1, "strategy": "gradient"}),
         ("tasks[1].guard", "gradient", "cma_es")),
    Case("a guard in a front", guarded(tasks=[*GUARDED, {**TASK, "name": "more"}],
                                       search={"generations": 1, "population": 4, "strategy": "pareto"}),
         ("tasks[1].guard", "cma_es")),
    Case("a scale of that name alone", changed(scale="parent"), ("scale", "none or parents")),
    Case("a scale of a list", changed(scale=["parents"]), ("scale", "none or parents")),
    Case("a scale in the search", searching(scale="parents"), ("search.scale", "unknown key")),
    Case("one parent and no base to measure from", changed(scale="parents", base=None, parents=["one"], space=LINEAR),
         ("scale", "another parent")),
]  # fmt: skip
