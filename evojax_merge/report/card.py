"""Model cards: what was merged, how, with which scores. May import search and report.tables."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from evojax_merge.report.tables import markdown_table
from evojax_merge.search.setup import Problem
from evojax_merge.search.winner import Result


def _front_matter(models: Sequence[str]) -> str:
    # A hub id can be linked; a local folder cannot.
    linked = [model for model in models if not Path(model).is_absolute()]
    header: dict[str, object] = {"library_name": "transformers", "tags": ["merge", "evojax-merge"]}
    if linked:
        header["base_model"] = linked
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


def merge_card(name: str, method: str, models: Sequence[str], recipe: str) -> str:
    """The card of a single merge."""
    listed = "\n".join(f"- `{Path(model).name if Path(model).is_absolute() else model}`" for model in models)
    return (
        f"{_front_matter(models)}\n# {name}\n\nA merge of\n\n{listed}\n\nby `{method}`, made with evojax-merge.\n\n"
        f"## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n"
    )


def search_card(name: str, problem: Problem, result: Result, recipe: str) -> str:
    """The card of a search's winner."""
    search = problem.config.search
    tasks = "\n".join(
        f"- `{task.name}`: {task.kind}, metric {task.metric}, weight {task.weight:g}, "
        f"{len(task.examples)} search and {len(heldout.examples)} held-out examples"
        for task, heldout in zip(problem.full, problem.heldout, strict=True)
    )
    models = [str(path) for _, path in problem.models]
    return (
        merge_card(name, problem.spec.method_name, models, recipe)
        + f"\n## How it was found\n\nCMA-ES over {problem.space.dims} parameters "
        f"({', '.join(axis.name for axis in problem.space.axes)}; {len(problem.space.groups)} groups), "
        f"{search.generations} generations, seed {problem.config.seed}. Fitness is the weighted mean of\n\n{tasks}\n\n"
        f"On the search split the winner scored {result.search_fitness:.4f}, the uniform merge "
        f"{result.uniform_search_fitness:.4f}.\n\n## Held-out scores\n\nOn examples that the search never saw:\n\n"
        f"{markdown_table(result.rows)}\n"
    )
