"""A member of a pool in reports: its family tree, and the pool's over the generations as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evojax_merge.genealogy import FIRST, METHOD, NONE, NUMBER, SECOND, Member, member_name


@dataclass(frozen=True)
class PoolReport:
    """member: the winner; layers: L; founders: short names."""

    member: Member
    layers: int
    founders: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The members that were bred for the winner, in order of birth, itself the last."""
        return {
            "lineage": [
                {
                    "name": member_name(member, self.founders),
                    "method": member.method,
                    "parents": [member_name(parent, self.founders) for parent in member.parents],
                    "parameters": {name: values.tolist() for name, values in member.parameters.items()},
                    "split": member.split,
                }
                for member in self.member.lineage()
            ]
        }

    def terminal(self) -> str:
        """The family tree, indented. A member's ancestors are shown where it first appears."""
        lines: list[str] = []
        shown: set[Member] = set()
        waiting = [(self.member, 0)]
        while waiting:
            member, depth = waiting.pop()
            again = member in shown
            shown.add(member)
            lines.append("  " * depth + member_name(member, self.founders) + self._birth(member, again))
            if not again:
                waiting += [(parent, depth + 1) for parent in reversed(member.parents)]
        return "\n".join(lines)

    def _birth(self, member: Member, again: bool) -> str:
        if member.is_founder:
            return ""
        if again:
            return " (as above)"
        numbers = {
            name: " ".join(f"{x:.3g}" for x in np.atleast_1d(values)) for name, values in member.parameters.items()
        }
        settings = ", ".join(f"{name} {text}" for name, text in numbers.items())
        place = f", parents change places at layer {member.split}" if member.split < self.layers else ""
        return f": {member.method}{' of ' * bool(settings)}{settings}{place}"

    def card_section(self) -> str:
        return f"\n## Family tree\n\nA member's parents are indented below it.\n\n```\n{self.terminal()}\n```\n"

    def panels(self) -> tuple[Sequence[float], float, float]:
        return [1.6], 13, 5

    def draw(self, figure: Any, axes: Sequence[Any], history: Sequence[dict[str, Any]]) -> None:
        """Draw every member's fitness at the generation of its birth, coloured by it, with lines to its parents; those
        of the winner's ancestors stand out. Children that are worse than any founder lie below the picture."""
        from matplotlib.ticker import MaxNLocator

        (axis,) = axes
        places: dict[int, tuple[int, float]] = {}
        births: dict[int, tuple[int, int]] = {}
        for row in history:
            for genome, fitness in zip(row["genomes"], row["fitness"], strict=True):
                if fitness is not None:
                    places[int(genome[NUMBER])] = (row["generation"], fitness)
                    if genome[METHOD] != NONE:
                        births[int(genome[NUMBER])] = (int(genome[FIRST]), int(genome[SECOND]))
        ancestors = {member.number for member in self.member.lineage()}
        for child, parents in births.items():
            for parent in parents:
                if parent in places:
                    ends = [places[parent], places[child]]
                    style = {"color": "crimson", "linewidth": 1.2, "zorder": 2} if child in ancestors else {
                        "color": "lightgrey", "linewidth": 0.5, "zorder": 1
                    }  # fmt: skip
                    axis.plot([x for x, _ in ends], [y for _, y in ends], **style)
        values = [fitness for _, fitness in places.values()]
        low = min((fitness for number, (_, fitness) in places.items() if number not in births), default=min(values))
        high = max(values)
        points = axis.scatter(
            [x for x, _ in places.values()], values, c=values, s=22, cmap="viridis", vmin=low, vmax=high, zorder=3
        )
        figure.colorbar(points, ax=axis, shrink=0.8, label="fitness")
        margin = 0.05 * (high - low) or 0.5
        axis.set_ylim(low - margin, high + margin)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel="generation of birth", ylabel="fitness (search split)", title="Family tree of the winner")
