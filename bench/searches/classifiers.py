"""Two image classifiers of disjoint classes, merged and searched, over five seeds (7 minutes of one core).

    python -m bench classifiers

Each seed trains a family of its own (evojax_merge/zoo/vit.py), draws other images for the search and searches with
another seed. The evolved merge is that of `configs/vit.yaml`; the one by gradients has the same space and follows the
derivative of the right label's log-probability, as AdaMerging does that of an entropy. Beside them stand merges that
nobody searched.
"""

import argparse
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from bench.shared.network_families import Scored, print_tables, run_seed

FILES = "kind: classification, file: 'zoo:vit/search.jsonl', heldout: 'zoo:vit/heldout.jsonl'"
# Accuracy has no derivative: gradients follow the log-probability of the right label, and accuracy is shown.
LIKELIHOOD = f"tasks=[{{name: likelihood, metric: log_probability, {FILES}}}, {{name: digits, weight: 0, {FILES}}}]"
SEARCHES = {
    "evolved merge": [],
    "merge by gradients": [LIKELIHOOD, "search={strategy: gradient, generations: 30, population: 2}"],
}
STARTS = {"TIES, density 0.5": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"]}


def draw(results: Iterable[Scored], file: Path) -> None:
    """Draw the share of each digit that each model reads right, over all seeds."""
    from matplotlib.figure import Figure

    scored = list(results)
    names, digits = list(scored[0].examples), [str(digit) for digit in range(10)]
    targets = np.concatenate([one.targets for one in scored])
    right = {name: np.concatenate([one.examples[name] for one in scored]) for name in names}
    shares = np.array([[right[name][targets == digit].mean() for digit in digits] for name in names])
    figure = Figure(figsize=(7, 0.42 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(10), digits)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.set_xlabel("held-out images of the digit that are read right")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column, row, f"{100 * share:.0f}%", ha="center", va="center", color="white" if share > 0.6 else "black"
        )
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two image classifiers, over several seeds.")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what each model reads of each digit")
    with tempfile.TemporaryDirectory() as work:
        run = partial(
            run_seed, config="vit.yaml", family="vit", score="digits/accuracy", searches=SEARCHES, starts=STARTS,
            folder=Path(work),
        )  # fmt: skip
        arguments, results = print_tables(parser, "held-out digits read right", run)
    if arguments.plot is not None:
        draw(results.values(), arguments.plot)


if __name__ == "__main__":
    main()
