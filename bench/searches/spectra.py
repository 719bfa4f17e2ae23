"""Merge methods from spectra, at the authors' setting and searched, on two small families.

    python -m bench spectra                # two vision transformers of disjoint digits (20 minutes of one core)
    python -m bench spectra --family demo  # the two tiny language models of the quickstart (10 minutes a seed), with
                                           # RegMean and Fisher merging, on prompts of the search split

Each method stands at its authors' setting, and searched from there by as many candidates: a weight of each parent for
every group of tensors, or a strength for `iso_c`. Task arithmetic is the control, with both task vectors added and
searched from the uniform merge; TIES has density 0.2. Shown are held-out digits read right (`vit`), or whole answers in
Japanese (`demo`), each seed with a family of its own.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench.shared.network_families import print_tables, run_seed

METHODS = ("tsv_m", "iso_c", "iso_cts", "svc", "dc_merge", "wudi", "swudi", "actmat")
# For language models alone.
ACTIVATIONS = ("regmean", "regmean_plusplus", "fisher")
PROMPTS = 'calibration={file: "zoo:search.jsonl", prompt: "{prompt} {target}"}'
WEIGHT, STRENGTH = "{weight: {low: -0.5, high: 2.0}}", "{lambda: {low: 0.0, high: 3.0}}"
# config, family, score, other scores; candidates: a generation, and generations.
FAMILIES = {
    "vit": ("vit.yaml", "vit", "digits/accuracy", (), 16, 10),
    "demo": ("quickstart.yaml", "", "whole_answers/accuracy", ("japanese_sums/log_probability",), 16, 20),
}


def space(method: str, *others: str) -> list[str]:
    """The overrides of a search by a method."""
    parameters = STRENGTH if method == "iso_c" else WEIGHT
    prompts = [PROMPTS] if method in ACTIVATIONS else []
    return [f"space.method={method}", f"space.parameters={parameters}", *prompts, *others]


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods from spectra, over several seeds.")
    parser.add_argument("--family", choices=FAMILIES, default="vit")
    family = parser.parse_known_args(sys.argv[1:])[0].family
    config, name, score, beside, population, generations = FAMILIES[family]
    size = [f"search.population={population}", f"search.generations={generations}"]
    # The authors' share of eigenvalues for vision transformers; for language models it is the default.
    shares = {"swudi": ["space.fixed={rank_share: 0.65}"]} if family == "vit" else {}
    methods = (*METHODS, *(ACTIVATIONS if family == "demo" else ()))
    searches = {
        f"{each}, searched": space(each, *shares.get(each, ()), *size) for each in ("task_arithmetic", *methods)
    }
    starts = {
        "task_arithmetic, added": ["space.parameters={lambda: {}}", "space.fixed={weight: [1, 1]}"],
        "ties, density 0.2": space("ties", "space.fixed={density: 0.2}", "space.parameters={weight: {}}"),
    } | {each: space(each, *shares.get(each, ())) for each in methods}
    with tempfile.TemporaryDirectory() as work:
        run = partial(
            run_seed, config=config, family=name, score=score, searches=searches, starts=starts, folder=Path(work),
            beside=beside,
        )  # fmt: skip
        print_tables(parser, score, run)


if __name__ == "__main__":
    main()
