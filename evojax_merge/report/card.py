"""Model cards: what was merged, how, with which scores."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from evojax_merge.problem import SearchProblem
from evojax_merge.report.comparison import Result
from evojax_merge.report.tables import markdown_table


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
        merge_card(name, problem.candidates.name, models, recipe)
        + result.report.card_section()
        + f"\n## How it was found\n\n{problem.strategy.name} over {problem.candidates.describe()}, "
        f"{generations} generations, seed {problem.config.seed}. Fitness is the weighted mean of\n\n{tasks}\n\n"
        f"On the search split the winner scored {result.search_fitness:.4f}, the {label} "
        f"{baseline:.4f}.\n\n## Held-out scores\n\nOn examples that the search never saw:\n\n"
        f"{markdown_table(result.rows)}\n" + "".join(f"\n**{sentence}**\n" for sentence in result.verdicts())
    )
