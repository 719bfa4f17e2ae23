"""Drawings of a run's page that are no charts: a layer path, and the family tree of a pool's winner, as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evojax_merge.report.described import html_of
from evojax_merge.report.run_data import Result
from evojax_merge.search.run_schema import Bred

# Pixels.
LONGEST_STEP, SHORTEST_STEP, ROW, MARGIN, WIDE = 64, 26, 22, 40, 980
BOX_WIDTH, BOX_HEIGHT, GAP, LEVEL = 124, 30, 14, 66
# Of a recipe's thumbnail in a box: the space beside it, and the height of a parent's row.
INSET, STRIP = 10, 7


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
        title = html_of(f"step {step}: layer {layer.index} of {parents[layer.parent]}{share}")
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
    thumbnails = {name: _thumbnail(member, result.layers) for name, member in bred.items() if result.layers}
    most = max((abs(cell.value) for thumbnail in thumbnails.values() for cell in thumbnail), default=0.0) or 1.0
    # Room for the parents' rows in each child's box.
    high = BOX_HEIGHT + (2 * STRIP + INSET if thumbnails else 0)
    pitch_down = LEVEL + high - BOX_HEIGHT
    places: dict[str, tuple[float, float]] = {}
    for level, names in sorted(levels.items()):
        # Children stand below the middle of their parents, where there is room.
        if level:
            names.sort(key=lambda name: sum(places[parent][0] for parent in bred[name].parents))
        pitch = width / len(names)
        for k, name in enumerate(names):
            places[name] = ((k + 0.5) * pitch, GAP + pitch_down * level - (high - BOX_HEIGHT) * (level > 0))
    edges, boxes = [], []
    winner = result.lineage[-1].name
    for name, (x, y) in places.items():
        for parent in bred[name].parents if name in bred else ():
            u, v = places[parent]
            start = v + (high if parent in bred else BOX_HEIGHT)
            middle = (start + y) / 2
            edges.append(
                f'<path class="edge" d="M{u:.1f} {start:.1f}C{u:.1f} {middle:.1f} {x:.1f} {middle:.1f} '
                f'{x:.1f} {y:.1f}"/>'
            )
        kind = "winner" if name == winner else "child" if name in bred else "founder"
        shown = name if len(name) <= 17 else f"{name[:16]}…"
        words = f"{name}: a founder"
        if name in bred:
            member = bred[name]
            settings = ", ".join(f"{key} {parameter_text(value)}" for key, value in member.parameters.items())
            words = f"{name}: {member.method}" + (f" of {settings}" if settings else "")
        left, wide = x - BOX_WIDTH / 2, (BOX_WIDTH - 2 * INSET) / max(result.layers, 1)
        cells = "".join(
            f'<rect class="{"negative" if cell.value < 0 else "positive"}" '
            f'x="{left + INSET + wide * cell.first:.2f}" y="{y + BOX_HEIGHT + STRIP * cell.row:.1f}" '
            f'width="{wide * (cell.end - cell.first):.2f}" height="{STRIP}" '
            f'fill-opacity="{abs(cell.value) / most:.3f}"><title>{html_of(cell.words)}</title></rect>'
            for cell in thumbnails.get(name, [])
        )
        boxes.append(
            f'<g class="{kind}"><title>{html_of(words)}</title>'
            f'<rect class="box" x="{left:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" '
            f'height="{high if name in bred else BOX_HEIGHT}" rx="6"/>'
            f'<text x="{x:.1f}" y="{y + 19:.1f}" text-anchor="middle">{html_of(shown)}</text>'
            f"{cells}</g>"
        )
    height = 2 * GAP + pitch_down * max(levels) + BOX_HEIGHT
    return _svg(width, height, "The family tree of the winner", [*edges, *boxes])


def parameter_text(value: float | list[float]) -> str:
    return " ".join(f"{x:.3g}" for x in value) if isinstance(value, list) else f"{value:.3g}"


@dataclass(frozen=True)
class _Cell:
    """Layers of one parent with the same value: row: the parent's place; from the layer `first` to `end`, excluded."""

    row: int
    first: int
    end: int
    value: float
    words: str


def _thumbnail(member: Bred, layers: int) -> list[_Cell]:
    """A recipe as layers x parents: the first parameter that has a value for each parent, or else the first. The value
    of `t` is that of the parent that comes second, and the other has the rest."""
    if not member.parameters:
        return []
    each = [name for name, value in member.parameters.items() if isinstance(value, list)]
    name = each[0] if each else next(iter(member.parameters))
    value = member.parameters[name]
    pair = value if isinstance(value, list) else [1 - value, value] if name == "t" else [value, value]
    split = min(member.split, layers)
    cells = []
    for row, parent in enumerate(member.parents):
        for first, end, place in ((0, split, row), (split, layers, 1 - row)):
            if first < end:
                span = f"layer {first}" if end - first == 1 else f"layers {first} to {end - 1}"
                share = "share" if name == "t" else name
                cells.append(_Cell(row, first, end, pair[place], f"{share} of {parent}, {span}: {pair[place]:.3g}"))
    return cells


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="drawing" role="img" aria-label="{html_of(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )
