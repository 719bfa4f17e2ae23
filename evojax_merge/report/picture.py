"""`report.png`: fitness over generations, and the winner. Imports matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.errors import cannot_write
from evojax_merge.report.comparison import Result


def draw(result: Result, history: list[dict[str, Any]], path: Path) -> None:
    """Draw the run's picture to `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Names are not formulas, whatever dollars they hold.
    with plt.rc_context({"text.parse_math": False}):
        widths, width, height = result.report.panels()
        figure, axes = plt.subplots(
            1, 1 + len(widths), figsize=(width, height), squeeze=False, constrained_layout=True,
            width_ratios=[1.6, *widths],
        )  # fmt: skip
        _draw_history(axes[0, 0], history, result)
        result.report.draw(figure, axes[0, 1:], history)
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


def _draw_history(axis: Any, history: list[dict[str, Any]], result: Result) -> None:
    # What a companion of the fitness scores is on another scale.
    history = [row for row in history if "companion" not in row]
    generations = [row["generation"] for row in history]
    for key, style in (("best_so_far", "-"), ("best", "."), ("mean", "--")):
        values = [np.nan if row[key] is None else row[key] for row in history]
        axis.plot(generations, values, style, label=key.replace("_", " "))
    checks = [(row["generation"], row["validation"]["best_so_far"]) for row in history if "validation" in row]
    if checks:
        values = [np.nan if value is None else value for _, value in checks]
        axis.plot([generation for generation, _ in checks], values, "o-", markersize=3, label="validation of best")
    label, baseline = result.baseline
    axis.axhline(baseline, color="grey", linewidth=0.8, label=label)
    axis.set(xlabel="generation", ylabel="fitness (search split)", title="Fitness over generations")
    axis.legend(loc="lower right", fontsize="small")
