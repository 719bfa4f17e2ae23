"""A vision-language model and a text model that answers in Japanese, merged and searched, over five seeds (4 minutes).

    python -m bench evovlm

The models are those of `zoo:evovlm`; each seed draws other questions and pictures, for the search and for the held-out
table, and searches with another seed. The evolved merge is that of `configs/evovlm_tabletop.yaml`; the one by gradients
has the same space and fitness, and a fifth of the passes. Beside them stand merges that nobody searched.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from bench.shared.network_families import print_tables, run_seed

# A gradient counts as 4.5 passes: 25 generations of 16 candidates are 400 passes, 18 gradients are 81.
SEARCHES = {
    "evolved merge": [],
    "merge by gradients": [
        "search={strategy: gradient, generations: 18, population: 1, gradient: {learning_rate: 0.2}}"
    ],
}
STARTS = {
    "TIES, density 0.5": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
    "DARE-TIES, density 0.5": ["space.method=dare_ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
    "task vectors added": ["space.parameters={lambda: {}}", "space.fixed={weight: [1, 1]}"],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        run = partial(
            run_seed, config="evovlm_tabletop.yaml", family="evovlm", score="japanese/accuracy", searches=SEARCHES,
            starts=STARTS, folder=Path(work),
        )  # fmt: skip
        parser = argparse.ArgumentParser(description="A vision-language model and a text model, over several seeds.")
        print_tables(parser, "held-out questions answered in Japanese", run)


if __name__ == "__main__":
    main()
