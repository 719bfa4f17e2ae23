"""A layer path, drawn in text: for model cards and terminals."""

from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.search.setup import SearchProblem
from evojax_merge.search.winner import model_name
from evojax_merge.spaces.layer_path import describe

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parent_names(problem: SearchProblem) -> list[str]:
    return [model_name(parent) for parent in problem.parents]


def path_lines(problem: SearchProblem, path: LayerPath) -> list[str]:
    """Which layers come from where, a line per run of layers."""
    assert isinstance(problem.spec, PathSpec)
    return describe(path, problem.spec.origins, dict(enumerate(parent_names(problem))))


def path_picture(problem: SearchProblem, path: LayerPath) -> str:
    """A row per step: the layer that it visits, marked with its parent's letter, and what it adds, if not all of it."""
    assert isinstance(problem.spec, PathSpec)
    origins, deepest = problem.spec.origins, max(config.layers for config in problem.spec.configs)
    letters = [LETTERS[k % len(LETTERS)] for k in range(len(problem.parents))]
    legend = ", ".join(f"{letter} = {name}" for letter, name in zip(letters, parent_names(problem), strict=True))
    rows = [f"layers 0 to {deepest - 1} from left to right; {legend}"]
    for number, (layer, fold) in enumerate(zip(path.layers, path.residual_scales(), strict=True)):
        parent, index = origins[layer]
        line = "·" * index + letters[parent] + "·" * (deepest - index - 1)
        rows.append(f"{number:3d} {line}" + ("" if abs(fold - 1) < 5e-4 else f"  x {fold:.3f}"))
    return "\n".join(rows)
