"""A family in which the path matters, over several seeds: held-out exact match of every model, merge and path, as a
Markdown table.

    python bench/loops.py

Each seed trains a family of its own (evojax_merge/zoo/loops.py), draws other sums and searches with another seed. All
searches begin at the same parents and score as many candidates, `configs/loops.yaml`'s; the merge has a weight for each
expert in every layer's attention, MLP and norms.
"""

import tempfile
from pathlib import Path

from zoo_table import SHOWN, evolve, print_table, problem_on

from evojax_merge.problem import SearchProblem

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "loops.yaml"
EXPERTS = ("plus", "times")
MERGE = ["data_flow=null", "space={method: task_arithmetic, parameters: {weight: {low: -0.5, high: 2.0}}}"]
SEARCHES = {
    "evolved merge, cma_es": [*MERGE, "search.strategy=cma_es"],
    "evolved path, random": ["search.strategy=random"],
    "evolved path, cma_es": ["search.strategy=cma_es"],
    "evolved path, path_ga": [],
}


def problem_for(seed: int, overrides: list[str]) -> SearchProblem:
    return problem_on(CONFIG, f"zoo:loops/{seed}", EXPERTS, seed, ["search.seeds=[parents]", *overrides])


def run_seed(seed: int) -> dict[str, float]:
    """Held-out exact match by model, for one seed."""
    scores: dict[str, float] = {}
    for name, overrides in SEARCHES.items():
        with tempfile.TemporaryDirectory() as work:
            result = evolve(problem_for(seed, overrides), Path(work) / "run")
        # The models and, of the merge, what nobody searched for: the same for all searches.
        scores = {row.name: row.scores[SHOWN] for row in result.rows if row is not result.winner} | scores
        scores[name] = result.winner.scores[SHOWN]
    return scores


if __name__ == "__main__":
    print_table("Layer paths where they matter.", "held-out sums of three to five numbers right", run_seed)
