"""Sections of tasks, and configs of searches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.config.search_config import SearchConfig
from evojax_merge.problem import SearchProblem, build_problem, build_strategy, config_from, read_config
from evojax_merge.search.checkpoints import Checkpoints, FolderStorage
from evojax_merge.search.loop import Archive, evolve
from evojax_merge.search.protocols import Strategy
from evojax_merge.search.recording import Reporter
from evojax_merge.search.run_folder import RunFolder
from evojax_merge.tasks.splits import Splits
from helpers.families import Family


def task_section(file: object = "tasks.jsonl", **changes: Any) -> dict[str, Any]:
    """A task's section: of likelihoods, and named text, unless it is changed."""
    return {"name": "text", "kind": "likelihood", "file": str(file)} | changes


def search_config(
    family: Family | None = None, generations: int = 2, population: int = 4, heldout: Any = None, **changes: Any
) -> dict[str, Any]:
    """A search by task arithmetic over a family, or over `base`, `parent0` and `parent1` beside the config, on a task
    of likelihoods. `search` adds to that section; all other changes take their key's place, and None removes it."""
    base, parents, file = ("base", ("parent0", "parent1"), Path("tasks.jsonl"))
    if family is not None:
        base, parents, file = str(family.base), tuple(map(str, family.parents)), family.tasks
    search = {"generations": generations, "population": population} | changes.pop("search", {})
    document = {
        "base": base, "parents": list(parents), "space": {"method": "task_arithmetic"}, "search": search,
        "tasks": [task_section(file, **({} if heldout is None else {"heldout": heldout}))],
    } | changes  # fmt: skip
    return {key: value for key, value in document.items() if value is not None}


def seeing_search(root: Path, kind: str, space: dict[str, Any]) -> dict[str, Any]:
    """A search of one generation over `base`, `two` and `one`, models that see. Gradients and layer paths read the
    tasks whose examples share their images."""
    file = "shared.jsonl" if kind in ("gradient", "paths") else "tasks.jsonl"
    return search_config(
        None, 1, base=str(root / "base"), parents=[str(root / "two"), str(root / "one")],
        tasks=[task_section(root / file, heldout=str(root / "tasks.jsonl"))],
        search={"strategy": "gradient"} if kind == "gradient" else {}, **({"space": None} | space),
    )  # fmt: skip


def open_problem(path: Path, *overrides: str) -> SearchProblem:
    """The problem of a config file, with overrides like those of --set."""
    return build_problem(path, read_config(path, overrides, None))


def problem_of(path: Path, document: dict[str, Any]) -> SearchProblem:
    """The problem of a document that lies, or might lie, at `path`."""
    return build_problem(path, config_from(path, document, [], None))


@dataclass(frozen=True)
class Problem:
    """The parts of a problem that the loop needs."""

    search: SearchConfig
    seed: int
    strategy: Strategy
    space: Any
    strata: Sequence[Sequence[np.ndarray]]


def search_in(
    folder: Path,
    config: SearchConfig,
    seed: int,
    space: Any,
    shards: Sequence[Any],
    validation: Any = None,
    reporter: Reporter | None = None,
    choice: Any = None,
    strata: Sequence[Sequence[np.ndarray]] = (),
) -> Archive:
    """A search of a config's strategy with evaluators of a test's own, kept in a run folder."""
    run, reporter = RunFolder(folder), reporter or Reporter()
    objectives, storage = sum(task.weight > 0 for task in shards[0].tasks), FolderStorage(run, Checkpoints(run))
    problem = Problem(config, seed, build_strategy("search", config, space, objectives), space, strata)
    on = Splits(list(shards), shards[0], validation, shards[0], choice=choice)
    return evolve(problem, on, storage, reporter)
