"""The protocol for showing a winner, whatever kind of candidate it is."""

from collections.abc import Sequence
from typing import Any, Protocol


class WinnerReport(Protocol):
    """The winner for result.json, the terminal, the model card and the picture."""

    def document(self) -> dict[str, Any]:
        """Its part of result.json."""
        ...

    def terminal(self) -> str | None:
        """The text that the terminal shows above the table of scores, if any."""
        ...

    def card_section(self) -> str:
        """A section of the model card in Markdown; empty where the recipe says it all."""
        ...

    def panels(self) -> tuple[Sequence[float], float, float]:
        """The relative widths of the winner's panels in the picture, and the width and height of the whole in
        inches."""
        ...

    def draw(self, figure: Any, axes: Sequence[Any], history: Sequence[dict[str, Any]]) -> None:
        """Draw the panels. history: the run's."""
        ...
