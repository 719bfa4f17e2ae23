"""Draws docs/images/overview.svg, the picture of docs/index.md.

python docs/figures.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).resolve().parent / "images" / "overview.svg"
PARENT_COLOURS = ("#4c72b0", "#dd8452", "#55a868")
BOX, INK, PALE = "#f5f5f5", "#333333", "#999999"
CANDIDATES, LAYERS = 4, 6
# Shares of the second and third parent in each candidate's layers: a picture, not a measurement.
MIXES = ((0.5, 0.5, 0.2, 0.2, 0.8, 0.8), (0.1, 0.4, 0.7, 0.9, 0.9, 0.3), (0.8, 0.8, 0.5, 0.3, 0.1, 0.1),
         (0.3, 0.6, 0.9, 0.6, 0.3, 0.6))  # fmt: skip
WINNER = 1


def main() -> None:
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "overview", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(11, 3.5))
    axes.set_xlim(0, 110)
    axes.set_ylim(0, 35)
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, title: str, below: str = "") -> None:
        axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.3", fc=BOX, ec=PALE))
        axes.text(x + width / 2, y + height - 1.2, title, ha="center", va="top", fontsize=11, weight="bold", color=INK)
        axes.text(x + width / 2, y + 0.6, below, ha="center", va="bottom", fontsize=8, color=INK)

    def arrow(start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK))
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.9, label, ha="center", fontsize=9, color=INK)

    def stack(x: float, y: float, colours: list[str | tuple[float, ...]], width: float = 4.0) -> None:
        for layer, colour in enumerate(colours):
            axes.add_patch(pyplot.Rectangle((x, y + 1.7 * layer), width, 1.4, fc=colour, ec="white", lw=0.5))

    box(1, 12, 20, 22, "Models", "read once, kept in memory")
    for parent, (colour, name) in enumerate(zip(PARENT_COLOURS, ("base", "parent", "parent"), strict=True)):
        stack(3.2 + 6 * parent, 18, [colour] * LAYERS)
        axes.text(5.2 + 6 * parent, 15.6, name, ha="center", fontsize=9, color=INK)

    box(33, 12, 40, 22, "One compiled pass", "each layer is merged where the forward pass needs it")
    base, first, second = (matplotlib.colors.to_rgb(colour) for colour in PARENT_COLOURS)
    for candidate, mix in enumerate(MIXES):
        colours = [tuple(0.2 * b + 0.8 * ((1 - t) * f + t * s) for b, f, s in zip(base, first, second, strict=True))
                   for t in mix]  # fmt: skip
        stack(37 + 9 * candidate, 18, list(colours), 5.0)
        axes.text(39.5 + 9 * candidate, 15.6, f"merge {candidate + 1}", ha="center", fontsize=9, color=INK)

    box(85, 22, 24, 12, "Scores", "of all candidates on all examples")
    for candidate, height in enumerate((2.2, 3.6, 1.4, 2.8)):
        colour = PARENT_COLOURS[2] if candidate == WINNER else PALE
        axes.add_patch(pyplot.Rectangle((91 + 3.2 * candidate, 25.2), 2.2, height, fc=colour, ec="white"))
    box(41, 1, 24, 6.6, "CMA-ES", "proposes the next population")
    box(85, 4, 24, 11, "Winner", "an ordinary Hugging Face folder,\nbit for bit what was scored")

    arrow((21.6, 23), (32.4, 23), "layers")
    arrow((73.6, 28), (84.4, 28), "answers")
    arrow((87, 21.4), (65.8, 4.6))
    arrow((53, 8.2), (53, 11.4))
    arrow((97, 21.4), (97, 15.8))
    axes.text(53.8, 9.2, "recipes", fontsize=9, color=INK)
    axes.text(78, 11, "fitness", ha="left", fontsize=9, color=INK)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
