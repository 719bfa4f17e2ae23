"""Merge methods from spectra, at the authors' setting and searched, on small families.

    python -m bench spectra                # two vision transformers of disjoint digits (2 minutes of one core a seed)
    python -m bench spectra --family vit4  # four that see three digits each, and vit8: eight
    python -m bench spectra --family demo  # the two tiny language models of the quickstart, with RegMean and Fisher
                                           # merging, on prompts of the search split
    python -m bench spectra --family smollm2   # the fine-tunes of SmolLM2, the same for all seeds (three hours of one
                                               # core); --methods tsv_m swudi: by these alone (half an hour of two)

Each method stands at its authors' setting, and searched from there by as many candidates: a weight of each parent for
every group of tensors, or a strength for `iso_c`. Task arithmetic is the control, with all task vectors added (0.3 of
each where there are four or more) and searched from the uniform merge; TIES has density 0.2. Shown are held-out digits
read right, whole answers in Japanese (`demo`), each seed with a family of its own, or the log-probability of worked
answers (`smollm2`), a part of the methods.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench.shared.network_families import percent, print_tables, run_seed

METHODS = ("tsv_m", "iso_c", "iso_cts", "svc", "dc_merge", "wudi", "swudi", "actmat")
# Prepared in minutes for a model of 135M parameters.
PREPARED_SOON = ("tsv_m", "iso_c", "dc_merge", "swudi")
# For language models alone.
ACTIVATIONS = ("regmean", "regmean_plusplus", "fisher")
PROMPTS = 'calibration={file: "zoo:search.jsonl", prompt: "{prompt} {target}"}'
WEIGHT, STRENGTH = "{weight: {low: -0.5, high: 2.0}}", "{lambda: {low: 0.0, high: 3.0}}"
# The first digits of the experts of `zoo:vit8`.
FOUR, EIGHT = (0, 2, 5, 7), range(8)
# config, the zoo's name, score, other scores; candidates of a generation, and generations.
FAMILIES = {
    "vit": ("vit.yaml", "vit", "digits/accuracy", (), 16, 10),
    "vit4": ("vit.yaml", "vit8", "digits/accuracy", (), 16, 20),
    "vit8": ("vit.yaml", "vit8", "digits/accuracy", (), 16, 20),
    "smollm2": ("smollm2.yaml", None, "worked_answers/log_probability", (), 8, 8),
    "demo": ("quickstart.yaml", "", "whole_answers/accuracy", ("japanese_sums/log_probability",), 16, 20),
}


def experts(firsts: tuple[int, ...] | range) -> list[str]:
    """The overrides of a search over experts of `zoo:vit8`."""
    parents = ", ".join(f"zoo:vit8/from{first}" for first in firsts)
    files = [f"tasks.0.{key}=zoo:vit8/{name}.jsonl" for key, name in (("file", "search"), ("heldout", "heldout"))]
    return ["base=zoo:vit8/base", f"parents=[{parents}]", *files]


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods from spectra, over several seeds.")
    parser.add_argument("--family", choices=FAMILIES, default="vit")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="search by these alone, and task arithmetic")
    options = parser.parse_known_args(sys.argv[1:])[0]
    family = options.family
    config, name, score, beside, population, generations = FAMILIES[family]
    common = [f"search.population={population}", f"search.generations={generations}"]
    common += {"vit4": experts(FOUR), "vit8": experts(EIGHT)}.get(family, [])
    # The authors' share of eigenvalues for vision transformers; for language models it is the default.
    shares = {} if family in ("demo", "smollm2") else {"swudi": ["space.fixed={rank_share: 0.65}"]}

    def space(method: str, *others: str) -> list[str]:
        parameters = STRENGTH if method == "iso_c" else WEIGHT
        prompts = [PROMPTS] if method in ACTIVATIONS else []
        return [f"space.method={method}", f"space.parameters={parameters}", *common, *prompts, *others]

    chosen = options.methods or (PREPARED_SOON if family == "smollm2" else METHODS)
    methods = {each: space(each, *shares.get(each, ())) for each in chosen}
    methods |= {each: space(each) for each in ACTIVATIONS if family == "demo" and not options.methods}
    searches = {f"{each}, searched": overrides for each, overrides in methods.items()}
    added = [1.0, 1.0] if name != "vit8" else [0.3] * len(FOUR if family == "vit4" else EIGHT)
    starts = {
        "task_arithmetic, added": space(
            "task_arithmetic", "space.parameters={lambda: {}}", f"space.fixed={{weight: {added}}}"
        ),
        "ties, density 0.2": space("ties", "space.fixed={density: 0.2}", "space.parameters={weight: {}}"),
    }
    with tempfile.TemporaryDirectory() as work:
        run = partial(
            run_seed, config=config, family=name, score=score,
            searches={"task_arithmetic, searched": space("task_arithmetic"), **searches}, starts=starts | methods,
            folder=Path(work), beside=beside,
        )  # fmt: skip
        number = "{:.4f}".format
        print_tables(parser, score, run, percent if score.endswith("accuracy") else number, number)


if __name__ == "__main__":
    main()
