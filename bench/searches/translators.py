"""Two translators of different languages, merged and searched, over five seeds (7 minutes of one core).

    python -m bench translators

Each seed trains a family of its own (evojax_merge/zoo/t5.py), draws other numbers for the search and searches with
another seed. The evolved merge is that of `configs/t5.yaml`. Beside it stand merges that nobody searched.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from bench.shared.network_families import print_tables, run_seed

STARTS = {
    "TIES, density 0.5": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Two translators, over several seeds.")
    with tempfile.TemporaryDirectory() as work:
        run = partial(
            run_seed, config="t5.yaml", family="t5", score="translations/exact_match", searches={"evolved merge": []},
            starts=STARTS, folder=Path(work),
        )  # fmt: skip
        print_tables(parser, "held-out numbers translated right", run)


if __name__ == "__main__":
    main()
