"""A merge in reports: its parameters by group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MergeReport:
    """values: parameter -> float[groups, columns]; groups: their labels; parents: short names, one per column."""

    groups: tuple[str, ...]
    values: dict[str, np.ndarray]
    parents: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        rounded = {name: np.round(values.astype(float), 7).tolist() for name, values in self.values.items()}
        return {"groups": list(self.groups), "parameters": rounded}

    def terminal(self) -> str | None:
        return None

    def card_section(self) -> str:
        return ""

    def panels(self) -> tuple[Sequence[float], float, float]:
        count = len(self.values)
        return [1.0] * count, 5.5 + 3.4 * count, max(4.0, 0.24 * len(self.groups))

    def draw(self, figure: Any, axes: Sequence[Any], history: Sequence[dict[str, Any]]) -> None:
        for axis, (name, values) in zip(axes, self.values.items(), strict=True):
            self._draw_parameter(figure, axis, name, values)

    def _draw_parameter(self, figure: Any, axis: Any, name: str, values: np.ndarray) -> None:
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        columns = self.parents if values.shape[1] == len(self.parents) else [name]
        axis.set_xticks(range(len(columns)), columns, rotation=20, ha="right", fontsize="small")
        axis.set_yticks(range(len(self.groups)), self.groups, fontsize="x-small")
        axis.set_title(f"{name} of the winner")
        if values.size <= 120:
            middle = (values.min() + values.max()) / 2
            for (row, column), value in np.ndenumerate(values):
                color = "white" if value < middle else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=color)
        figure.colorbar(image, ax=axis, shrink=0.8)
