"""A merge in reports: its parameters by group."""

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
