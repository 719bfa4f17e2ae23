"""Breeding from a pool of six experts: is the best child better than the best founder?

    python bench/pool.py

Searches of configs/automerge.yaml over eleven seeds. A seed draws who breeds with whom and how; experts and problems
stay the same. Compared are the winner and the founder that is best on the held-out problems, which is more than a user
could know. The experts are trained when they are first asked for.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import describe

import evojax_merge as em

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "automerge.yaml"
SHOWN = "whole_answers/accuracy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=11)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    print(describe(), "\n")
    print("| seed | best founder | its fitness | best child | its sums right | ancestors bred | minutes |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            run = em.evolve(CONFIG, out=Path(folder) / "run", seed=seed, overrides=options.overrides)
            minutes = (time.perf_counter() - begun) / 60
            founders = [row for row in run.table if row["role"] == "parent"]
            (winner,) = [row for row in run.table if row["role"] == "winner"]
            lineage = len(json.loads((run.path / "result.json").read_text())["lineage"])
        best = max(founders, key=lambda row: row["heldout_fitness"])
        found.append((best["heldout_fitness"], winner["heldout_fitness"]))
        print(
            f"| {seed} | {best['name']} | {found[-1][0]:.4f} | {found[-1][1]:.4f} "
            f"| {winner['heldout_scores'][SHOWN]:.0%} | {lineage} | {minutes:.1f} |",
            flush=True,
        )
    founder, child = np.array(found).T
    print(
        f"\nThe best child is better than the best founder in {int((child > founder).sum())} of {len(found)} searches; "
        f"by {np.median(child - founder):.4f} in the median, {(child - founder).min():.4f} at least."
    )


if __name__ == "__main__":
    main()
