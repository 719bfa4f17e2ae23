"""A winner in reports, whatever kind of candidate it is: a merge, a layer path, or a member of a pool."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.schema.genealogy import Member, member_name
from evojax_merge.spaces.layer_path import describe_path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class WinnerReport(Protocol):
    """The winner for result.json, the terminal and the model card."""

    def document(self) -> dict[str, Any]:
        """Its part of result.json."""

    def terminal(self) -> str | None:
        """The text that the terminal shows above the table of scores, if any."""
        return None

    def card_section(self) -> str:
        """A section of the model card in Markdown; empty where the recipe says it all."""
        return ""


@dataclass(frozen=True)
class MergeReport(WinnerReport):
    """A merge by its parameters. values: parameter -> float[groups, columns]; groups: their labels; parents: short
    names, one per column."""

    groups: tuple[str, ...]
    values: dict[str, np.ndarray]
    parents: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        rounded = {name: np.round(values.astype(float), 7).tolist() for name, values in self.values.items()}
        return {"groups": list(self.groups), "parameters": rounded}


@dataclass(frozen=True)
class PathReport:
    """A layer path in words and in text. parents: short names."""

    path: LayerPath
    spec: PathSpec
    parents: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        return {"path": {"layers": list(self.path.layers), "scales": list(self.path.scales)}}

    def terminal(self) -> str | None:
        """A row per step: the layer that it visits, marked with its parent's letter, and the share that it adds, if not
        all of it."""
        origins, deepest = self.spec.origins, max(config.layers for config in self.spec.configs)
        letters = [LETTERS[k % len(LETTERS)] for k in range(len(self.parents))]
        legend = ", ".join(f"{letter} = {name}" for letter, name in zip(letters, self.parents, strict=True))
        rows = [f"layers 0 to {deepest - 1} from left to right; {legend}"]
        for number, (layer, scale) in enumerate(zip(self.path.layers, self.path.residual_scales(), strict=True)):
            parent, index = origins[layer]
            line = "·" * index + letters[parent] + "·" * (deepest - index - 1)
            rows.append(f"{number:3d} {line}" + ("" if abs(scale - 1) < 5e-4 else f"  x {scale:.3f}"))
        return "\n".join(rows)

    def card_section(self) -> str:
        """The origin of the layers, a line per run of layers, and the same step by step."""
        lines = describe_path(self.path, self.spec.origins, dict(enumerate(self.parents)))
        listed = "\n".join(f"- {line}" for line in lines)
        return f"\n## Layers\n\n{listed}\n\n```\n{self.terminal()}\n```\n"


@dataclass(frozen=True)
class PoolReport:
    """A member of a pool by its family tree. member: the winner; layers: L; founders: short names."""

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
