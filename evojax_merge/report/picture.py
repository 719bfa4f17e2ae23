"""`report.png`: fitness over generations, and the winner's parameters per layer and component. Imports matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.errors import cannot_write
from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.report.paths import parent_names
from evojax_merge.search.setup import SearchProblem
from evojax_merge.search.winner import Result


def draw(problem: SearchProblem, result: Result, history: list[dict[str, Any]], path: Path) -> None:
    """Draw the run's picture to `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Names are not formulas, whatever dollars they hold.
    with plt.rc_context({"text.parse_math": False}):
        _draw(plt, problem, result, history, path)


def _draw(plt: Any, problem: SearchProblem, result: Result, history: list[dict[str, Any]], path: Path) -> None:
    names = list(result.values)
    if result.path is not None:
        figure, search_parameters = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True, squeeze=False)
        _draw_history(search_parameters[0, 0], history, result)
        _draw_path(search_parameters[0, 1], problem, result.path)
        _save(figure, path)
        return
    figure, search_parameters = plt.subplots(
        1, 1 + len(names), figsize=(5.5 + 3.4 * len(names), max(4.0, 0.24 * len(result.groups))), squeeze=False,
        constrained_layout=True, width_ratios=[1.6] + [1.0] * len(names),
    )  # fmt: skip
    _draw_history(search_parameters[0, 0], history, result)
    parents = parent_names(problem)
    for axis, name in zip(search_parameters[0, 1:], names, strict=True):
        _draw_parameter(figure, axis, name, result.values[name], result.groups, parents)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    work = path.with_name(f".{path.name}")
    try:
        figure.savefig(work, dpi=120, format="png")
        work.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        plt.close(figure)
        work.unlink(missing_ok=True)


def _draw_path(axis: Any, problem: SearchProblem, path: LayerPath) -> None:
    """Layer index against step, coloured by parent; above each step what it adds, where that is not all of it."""
    assert isinstance(problem.spec, PathSpec)
    origins = [problem.spec.origins[layer] for layer in path.layers]
    for parent, name in enumerate(parent_names(problem)):
        steps = [step for step, (k, _) in enumerate(origins) if k == parent]
        axis.scatter(steps, [origins[step][1] for step in steps], s=28, label=name)
    axis.plot(range(len(origins)), [index for _, index in origins], color="grey", linewidth=0.6, zorder=0)
    for step, ((_, index), fold) in enumerate(zip(origins, path.residual_scales(), strict=True)):
        if abs(fold - 1) >= 5e-4:
            axis.annotate(f"{fold:.2f}", (step, index), xytext=(0, 6), textcoords="offset points", fontsize="x-small")
    axis.set(xlabel="step", ylabel="layer of its parent", title="Path of the winner")
    axis.legend(fontsize="small")


def _draw_history(axis: Any, history: list[dict[str, Any]], result: Result) -> None:
    generations = [row["generation"] for row in history]
    for key, style in (("best_so_far", "-"), ("best", "."), ("mean", "--")):
        values = [np.nan if row[key] is None else row[key] for row in history]
        axis.plot(generations, values, style, label=key.replace("_", " "))
    label, baseline = result.baseline
    axis.axhline(baseline, color="grey", linewidth=0.8, label=label)
    axis.set(xlabel="generation", ylabel="fitness (search split)", title="Fitness over generations")
    axis.legend(loc="lower right", fontsize="small")


def _draw_parameter(
    figure: Any, axis: Any, name: str, values: np.ndarray, groups: list[str], parents: list[str]
) -> None:
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    columns = parents if values.shape[1] == len(parents) else [name]
    axis.set_xticks(range(len(columns)), columns, rotation=20, ha="right", fontsize="small")
    axis.set_yticks(range(len(groups)), groups, fontsize="x-small")
    axis.set_title(f"{name} of the winner")
    if values.size <= 120:
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < middle else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=color)
    figure.colorbar(image, ax=axis, shrink=0.8)
