"""Two image classifiers of disjoint classes, merged and searched, over five seeds (5 minutes).

    python -m bench classifiers

Each seed trains a family of its own (evojax_merge/zoo/vit.py), draws other images for the search and searches with
another seed. The evolved merge is that of `configs/vit.yaml`; the one by gradients has the same space and follows the
derivative of the same fitness, as AdaMerging does that of an entropy. Beside them stand merges that nobody searched.
"""

import tempfile
from functools import partial
from pathlib import Path

from bench.shared.network_families import print_tables, run_seed

STARTS = {
    "uniform merge": ["space.method=linear", "space.parameters={weight: {}}", "base=null"],
    "TIES, density 0.5": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
    "task vectors added": ["space.parameters={lambda: {}}", "space.fixed={weight: [1, 1]}"],
}
SEARCHES = {
    "evolved merge": [],
    "merge by gradients": ["search={strategy: gradient, generations: 40, population: 2}"],
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        print_tables(
            "Two image classifiers, over several seeds.", "held-out digits read right",
            partial(run_seed, config="vit.yaml", family="vit", score="digits/accuracy", searches=SEARCHES,
                    starts=STARTS, folder=Path(work)),
        )  # fmt: skip
