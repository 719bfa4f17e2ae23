"""Model cards: what was merged, how, with which scores."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from evojax_merge.report.paths import path_lines, path_picture
from evojax_merge.report.tables import markdown_table
from evojax_merge.search.setup import SearchProblem
from evojax_merge.search.winner import Result
from evojax_merge.spaces.parameter import ParameterSpace


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


def search_card(name: str, problem: SearchProblem, result: Result, recipe: str, generations: int) -> str:
    """The card of a search's winner. generations: how many have been searched."""
    tasks = "\n".join(
        f"- `{task.name}`: metric {task.metric}, weight {task.weight:g}, "
        f"{task.size} search and {heldout.size} held-out examples"
        for task, heldout in zip(problem.full, problem.heldout, strict=True)
    )
    models = [str(path) for _, path in problem.models]
    label, baseline = result.baseline
    return (
        merge_card(name, problem.spec.method_name, models, recipe)
        + _path_section(problem, result)
        + f"\n## How it was found\n\nCMA-ES over {_dimensions(problem)}, "
        f"{generations} generations, seed {problem.config.seed}. Fitness is the weighted mean of\n\n{tasks}\n\n"
        f"On the search split the winner scored {result.search_fitness:.4f}, the {label} "
        f"{baseline:.4f}.\n\n## Held-out scores\n\nOn examples that the search never saw:\n\n"
        f"{markdown_table(result.rows)}\n" + "".join(f"\n**{sentence}**\n" for sentence in result.verdicts())
    )


def _dimensions(problem: SearchProblem) -> str:
    space = problem.space
    if isinstance(space, ParameterSpace):
        names = ", ".join(parameter.name for parameter in space.search_parameters)
        return f"{space.dims} parameters ({names}; {len(space.groups)} groups)"
    return f"{space.dims} numbers that say which layers follow each other"


def _path_section(problem: SearchProblem, result: Result) -> str:
    """Which layers come from where, in words and as a picture."""
    if result.path is None:
        return ""
    listed = "\n".join(f"- {line}" for line in path_lines(problem, result.path))
    return f"\n## Layers\n\n{listed}\n\n```\n{path_picture(problem, result.path)}\n```\n"
