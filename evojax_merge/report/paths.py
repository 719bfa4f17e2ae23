"""A layer path, drawn in text: for model cards and terminals. May import search and spaces."""

from evojax_merge.models.paths import Path, PathSpec
from evojax_merge.search.setup import Problem
from evojax_merge.search.winner import model_name
from evojax_merge.spaces.data_flow import describe

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parent_names(problem: Problem) -> list[str]:
    return [model_name(parent) for parent in problem.parents]


def path_lines(problem: Problem, path: Path) -> list[str]:
    """Which layers come from where, a line per run of layers."""
    assert isinstance(problem.spec, PathSpec)
    return describe(path, problem.spec.origins, dict(enumerate(parent_names(problem))))


def path_picture(problem: Problem, path: Path) -> str:
    """A row per step: the layer that it visits, marked with its parent's letter, and what it adds, if not all of it."""
    assert isinstance(problem.spec, PathSpec)
    origins, deepest = problem.spec.origins, max(config.layers for config in problem.spec.configs)
    letters = [LETTERS[k % len(LETTERS)] for k in range(len(problem.parents))]
    legend = ", ".join(f"{letter} = {name}" for letter, name in zip(letters, parent_names(problem), strict=True))
    rows = [f"layers 0 to {deepest - 1} from left to right; {legend}"]
    for number, (layer, fold) in enumerate(zip(path.layers, path.folds(), strict=True)):
        parent, index = origins[layer]
        line = "·" * index + letters[parent] + "·" * (deepest - index - 1)
        rows.append(f"{number:3d} {line}" + ("" if abs(fold - 1) < 5e-4 else f"  x {fold:.3f}"))
    return "\n".join(rows)
