"""`report.png`: fitness over generations, the front where there is one, and the winner. Imports matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.file_system import atomic_file
from evojax_merge.report.comparison import Result

# Inches.
FRONT_WIDTH = 4.5


def draw(result: Result, history: list[dict[str, Any]], path: Path) -> None:
    """Draw the run's picture to `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Names are not formulas, even where they contain dollars.
    with plt.rc_context({"text.parse_math": False}):
        widths, width, height = result.report.panels()
        front = [1.6] if result.members else []
        figure, axes = plt.subplots(
            1, 1 + len(front) + len(widths), figsize=(width + FRONT_WIDTH * len(front), height), squeeze=False,
            constrained_layout=True, width_ratios=[1.6, *front, *widths],
        )  # fmt: skip
        _draw_history(axes[0, 0], history)
        axes[0, 0].axhline(result.baseline[1], color="grey", linewidth=0.8, label=result.baseline_label)
        axes[0, 0].legend(loc="lower right", fontsize="small")
        if front:
            _draw_front(axes[0, 1], result)
        result.report.draw(figure, axes[0, 1 + len(front) :], history)
        _save(figure, path)


def draw_history(history: list[dict[str, Any]]) -> Any:
    """A matplotlib Figure of the fitness over generations: best so far, best, mean, and of the best so far on the
    validation split where generations looked at it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    _draw_history(figure.subplots(), history)
    return figure


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        with atomic_file(path) as work:
            figure.savefig(work, dpi=120, format="png")
    finally:
        plt.close(figure)


def _draw_history(axis: Any, history: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    # A companion of the fitness has another scale.
    history = [row for row in history if "companion" not in row]
    generations = [row["generation"] for row in history]
    for key, style in (("best_so_far", "-"), ("best", "."), ("mean", "--")):
        values = [np.nan if row[key] is None else row[key] for row in history]
        axis.plot(generations, values, style, label=key.replace("_", " "))
    checks = [(row["generation"], row["validation"]["best_so_far"]) for row in history if "validation" in row]
    if checks:
        values = [np.nan if value is None else value for _, value in checks]
        axis.plot([generation for generation, _ in checks], values, "o-", markersize=3, label="validation of best")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="generation", ylabel="fitness (search split)", title="Fitness over generations")
    axis.legend(loc="lower right", fontsize="small")


def _draw_front(axis: Any, result: Result) -> None:
    """Draw the members by the first two tasks: on the split that the winner was chosen on, and held out."""
    first, second, *others = result.members[0].scores
    split = "search" if result.validation is None else "validation"
    for label, marker, scores in (
        (split, "o", [member.scores for member in result.members]),
        ("held out", "x", [member.heldout_scores for member in result.members]),
    ):
        axis.plot([means[first] for means in scores], [means[second] for means in scores], marker, label=label)
    for member in result.members:
        place = member.scores[first], member.scores[second]
        axis.annotate(str(member.number), place, textcoords="offset points", xytext=(4, 4), fontsize="small")
    tasks = f", by 2 of {2 + len(others)} tasks" if others else ""
    axis.set(xlabel=first, ylabel=second, title=f"The front{tasks}")
    axis.legend(loc="lower left", fontsize="small")
