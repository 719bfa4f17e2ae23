"""Two image generators of disjoint classes, merged and searched, over five seeds (15 minutes of one core).

    python -m bench generators

Each seed trains a family of its own (evojax_merge/zoo/ddpm.py), draws other noise and searches with another seed. The
evolved merge is that of `configs/ddpm.yaml`: a weight of each generator for every block of the U-Net. A model's score
is the logarithm of the inception score of its pictures from fresh noise, by the classifier that the search follows; the
last table has that of another classifier. Beside the winner stand merges that nobody searched.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from bench.shared.network_families import print_tables, run_seed

STARTS = {"TIES, density 0.5": ["space.method=ties", "space.parameters={weight: {}}", "space.fixed={density: 0.5}"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Two image generators, over several seeds.")
    with tempfile.TemporaryDirectory() as work:
        run = partial(
            run_seed, config="ddpm.yaml", family="ddpm", score="digits/score", searches={"evolved merge": []},
            starts=STARTS, folder=Path(work), beside=["neighbours/score"],
        )  # fmt: skip
        print_tables(parser, "all ten digits in fresh pictures, log inception score", run, "{:.2f}".format)


if __name__ == "__main__":
    main()
