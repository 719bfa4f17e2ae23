"""The protocol for showing a winner, whatever kind of candidate it is."""

from typing import Any, Protocol


class WinnerReport(Protocol):
    """The winner for result.json, the terminal and the model card."""

    def document(self) -> dict[str, Any]:
        """Its part of result.json."""
        ...

    def terminal(self) -> str | None:
        """The text that the terminal shows above the table of scores, if any."""
        ...

    def card_section(self) -> str:
        """A section of the model card in Markdown; empty where the recipe says it all."""
        ...
