"""A model that sees and a text model that answers in Japanese, merged and searched, over five seeds (30 minutes).

    python -m bench evovlm

Each seed trains a family of its own (evojax_merge/zoo/evovlm.py), draws other questions and searches with another seed.
The evolved merge is that of `configs/evovlm_tabletop.yaml`; the one by gradients has the same space, follows the
derivative of the same fitness, and has a fifth of its passes. Beside them stand merges that nobody searched, and
searches over TIES and DARE-TIES.
"""

import tempfile
from functools import partial
from pathlib import Path

from bench.shared.network_families import print_tables, run_seed

STARTS = {
    "uniform linear": ["space.method=linear", "space.parameters={weight: {}}"],
    "uniform TIES": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
    "uniform DARE-TIES": ["space.method=dare_ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
    "task vectors added": ["space.parameters={lambda: {}}", "space.fixed={weight: [1, 1]}"],
}
# A gradient counts as 4.5 passes: 60 generations of 16 candidates are 960 passes, 42 gradients are 189.
SEARCHES = {
    "evolved merge": [],
    "evolved TIES": ["space.method=ties", "space.fixed={density: 0.5}"],
    "evolved DARE-TIES": ["space.method=dare_ties", "space.fixed={density: 0.5}"],
    "merge by gradients": ["search={strategy: gradient, generations: 42, population: 1}"],
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        print_tables(
            "A model that sees and a text model, over several seeds.", "held-out questions answered in Japanese",
            partial(run_seed, config="evovlm_tabletop.yaml", family="evovlm", score="whole_answers/accuracy",
                    searches=SEARCHES, starts=STARTS, folder=Path(work)),
        )  # fmt: skip
