"""Drawings of a run's page that are no charts: a layer path, and the family tree of a pool's winner, as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from evojax_merge.errors import escaped
from evojax_merge.report.run_data import Result

# Pixels.
LONGEST_STEP, SHORTEST_STEP, ROW, MARGIN, WIDE = 64, 26, 22, 40, 980
BOX_WIDTH, BOX_HEIGHT, GAP, LEVEL = 124, 30, 14, 66


@dataclass(frozen=True)
class Layer:
    """A step of a layer path: the parent's number and the layer's in it, and the share that it adds to the residual
    stream."""

    parent: int
    index: int
    scale: float


def path_drawing(layers: Sequence[Layer], parents: Sequence[str]) -> str:
    """Layer of the parent against step, from left to right, coloured by parent."""
    deepest = max(layer.index for layer in layers)
    across = min(LONGEST_STEP, max(SHORTEST_STEP, WIDE // len(layers)))
    width, height = 2 * MARGIN + across * (len(layers) - 1), 2 * MARGIN + ROW * deepest
    places = [(MARGIN + across * step, MARGIN + ROW * (deepest - layer.index)) for step, layer in enumerate(layers)]
    lines = [f'<path class="edge" d="M{x} {y}L{u} {v}"/>' for (x, y), (u, v) in pairwise(places)]
    dots = []
    for step, (layer, (x, y)) in enumerate(zip(layers, places, strict=True)):
        share = "" if abs(layer.scale - 1) < 5e-4 else f", its output times {layer.scale:.4f}"
        title = _html(f"step {step}: layer {layer.index} of {parents[layer.parent]}{share}")
        dots.append(
            f'<circle class="series-{layer.parent % 8 + 1}" cx="{x}" cy="{y}" r="6"><title>{title}</title></circle>'
        )
        if share:
            dots.append(f'<text x="{x}" y="{y - 10}" text-anchor="middle">{layer.scale:.2f}</text>')
    axis = [
        f'<text x="{MARGIN - 20}" y="{MARGIN + ROW * (deepest - index) + 4}" text-anchor="end">{index}</text>'
        for index in sorted({0, deepest, deepest // 2})
    ]
    label = f"The layers of the path, {len(layers)} steps from left to right"
    return _svg(width, height, label, [*lines, *axis, *dots])


def family_tree(result: Result) -> str:
    """The winner's ancestors: founders at the top, each child below its parents."""
    bred = {member.name: member for member in result.lineage}
    # A member's parents stand before it.
    depth: dict[str, int] = {}
    for member in result.lineage:
        for parent in member.parents:
            depth.setdefault(parent, 0)
        depth[member.name] = 1 + max(depth[parent] for parent in member.parents)
    levels: dict[int, list[str]] = {}
    for name, level in depth.items():
        levels.setdefault(level, []).append(name)
    widest = max(map(len, levels.values()))
    width = widest * (BOX_WIDTH + GAP) + GAP
    places: dict[str, tuple[float, float]] = {}
    for level, names in sorted(levels.items()):
        # Children stand below the middle of their parents, where there is room.
        if level:
            names.sort(key=lambda name: sum(places[parent][0] for parent in bred[name].parents))
        pitch = width / len(names)
        for k, name in enumerate(names):
            places[name] = ((k + 0.5) * pitch, GAP + BOX_HEIGHT / 2 + LEVEL * level)
    edges, boxes = [], []
    winner = result.lineage[-1].name
    for name, (x, y) in places.items():
        for parent in bred[name].parents if name in bred else ():
            u, v = places[parent]
            start, end = v + BOX_HEIGHT / 2, y - BOX_HEIGHT / 2
            middle = (start + end) / 2
            edges.append(
                f'<path class="edge" d="M{u:.1f} {start:.1f}C{u:.1f} {middle:.1f} {x:.1f} {middle:.1f} '
                f'{x:.1f} {end:.1f}"/>'
            )
        kind = "winner" if name == winner else "child" if name in bred else "founder"
        shown = name if len(name) <= 17 else f"{name[:16]}…"
        boxes.append(
            f'<g class="{kind}"><title>{_html(name)}{_html(_recipe(result, name))}</title>'
            f'<rect x="{x - BOX_WIDTH / 2:.1f}" y="{y - BOX_HEIGHT / 2:.1f}" width="{BOX_WIDTH}" '
            f'height="{BOX_HEIGHT}" rx="6"/>'
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{_html(shown)}</text></g>'
        )
    height = 2 * GAP + BOX_HEIGHT + LEVEL * max(levels)
    return _svg(width, height, "The family tree of the winner", [*edges, *boxes])


def _recipe(result: Result, name: str) -> str:
    return next((f": {member.method}" for member in result.lineage if member.name == name), ": a founder")


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="drawing" role="img" aria-label="{_html(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )


def _html(text: str) -> str:
    return escape(escaped(text))
