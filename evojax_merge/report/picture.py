"""`report.png`: fitness over generations, and the winner's parameters per layer and component. Imports matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.search.setup import Problem
from evojax_merge.search.winner import Result


def draw(problem: Problem, result: Result, history: list[dict[str, Any]], path: Path) -> None:
    """Draw the run's picture to `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(result.values)
    figure, axes = plt.subplots(
        1, 1 + len(names), figsize=(5.5 + 3.4 * len(names), max(4.0, 0.24 * len(result.groups))), squeeze=False,
        constrained_layout=True, width_ratios=[1.6] + [1.0] * len(names),
    )  # fmt: skip
    _draw_history(axes[0, 0], history, result)
    parents = [parent.name for parent in problem.parents]
    for axis, name in zip(axes[0, 1:], names, strict=True):
        _draw_parameter(figure, axis, name, result.values[name], result.groups, parents)
    work = path.with_name(f".{path.name}")
    figure.savefig(work, dpi=120, format="png")
    plt.close(figure)
    work.replace(path)


def _draw_history(axis: Any, history: list[dict[str, Any]], result: Result) -> None:
    generations = [row["generation"] for row in history]
    for key, style in (("best_so_far", "-"), ("best", "."), ("mean", "--")):
        values = [np.nan if row[key] is None else row[key] for row in history]
        axis.plot(generations, values, style, label=key.replace("_", " "))
    axis.axhline(result.uniform_search_fitness, color="grey", linewidth=0.8, label="uniform merge")
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
