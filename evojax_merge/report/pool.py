"""A member of a pool in reports: its family tree."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from evojax_merge.schema.genealogy import Member, member_name


@dataclass(frozen=True)
class PoolReport:
    """member: the winner; layers: L; founders: short names."""

    member: Member
    layers: int
    founders: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The number of layers, and the members that were bred for the winner, in order of birth, itself the last."""
        return {
            "layers": self.layers,
            "lineage": [
                {
                    "name": member_name(member, self.founders),
                    "method": member.method,
                    "parents": [member_name(parent, self.founders) for parent in member.parents],
                    "parameters": {name: values.tolist() for name, values in member.parameters.items()},
                    "split": member.split,
                }
                for member in self.member.lineage()
            ],
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
