"""A layer path in reports: in words and in text."""

from dataclasses import dataclass
from typing import Any

from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.spaces.layer_path import describe_path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class PathReport:
    """parents: short names."""

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
