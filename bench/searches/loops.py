"""Layer paths where they matter, over five families (10 minutes, and 10 more to train them once).

    python -m bench loops

Each seed trains a family of its own (evojax_merge/zoo/loops.py), draws other sums and searches with another seed. All
searches begin at the same parents and score as many candidates, `configs/loops.yaml`'s; the merge has a weight for each
expert in every layer's attention, MLP and norms. A chain of two spends half of them on the merge, and half on the path
through its layers and the experts'.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.searches.zoo import SHOWN, evolve_stages, print_table, problem_on
from evojax_merge.problem import SearchProblem

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "loops.yaml"
EXPERTS = ("plus", "times")
MERGE = ["data_flow=null", "space={method: task_arithmetic, parameters: {weight: {low: -0.5, high: 2.0}}}"]
HALF = "search.generations=30"
# The stages of each.
SEARCHES: dict[str, list[list[str]]] = {
    "evolved merge, cma_es": [[*MERGE, "search.strategy=cma_es"]],
    "evolved path, random": [["search.strategy=random"]],
    "evolved path, cma_es": [["search.strategy=cma_es"]],
    "evolved merge, then path": [[*MERGE, "search.strategy=cma_es", HALF], [HALF]],
    "evolved path, path_ga": [[]],
}


def parents_of(seed: int) -> list[str]:
    return [f"zoo:loops/{seed}/{expert}" for expert in EXPERTS]


def problem_for(seed: int, overrides: Sequence[str]) -> SearchProblem:
    return problem_on(CONFIG, f"zoo:loops/{seed}", EXPERTS, seed, ["search.seeds=[parents]", *overrides])


def run_seed(seed: int) -> dict[str, float]:
    """Held-out exact match by model, for one seed."""
    scores: dict[str, float] = {}
    for name, stages in SEARCHES.items():
        results = evolve_stages(partial(problem_for, seed), parents_of(seed), stages)
        first, last = results[0], results[-1]
        # The models and, of the merge, what nobody searched for: the same for all searches.
        scores = {row.name: row.scores[SHOWN] for row in first.rows if row is not first.winner} | scores
        scores[name] = last.winner.scores[SHOWN]
    return scores


if __name__ == "__main__":
    print_table("Layer paths where they matter.", "held-out sums of three to five numbers right", run_seed)
