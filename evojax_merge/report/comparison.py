"""The final table: the winner beside the base, the parents and the uniform merge, on held-out examples."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.folder import hub_id
from evojax_merge.checkpoints.writer import atomic_write
from evojax_merge.report.winner import WinnerReport


@dataclass(frozen=True)
class Row:
    """One line of the final table: held-out scores of a model."""

    role: str
    name: str
    fitness: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Result:
    """The winner and what it was compared with.

    `baseline`: the candidate that nobody searched for (the uniform merge, or the first parent as it is) and its fitness
    on the search split. `rows`: the held-out table. `report`: what is shown of the winner.
    """

    genome: np.ndarray
    search_fitness: float
    baseline: tuple[str, float]
    rows: list[Row]
    report: WinnerReport

    @property
    def winner(self) -> Row:
        return next(row for row in self.rows if row.role == "winner")

    @property
    def rivals(self) -> list[Row]:
        """What a search has to beat on held-out data: the base, the best parent, and the uniform merge, as far as there
        are such."""
        parents = [row for row in self.rows if row.role == "parent"]
        best = max(parents, key=lambda row: row.fitness if np.isfinite(row.fitness) else -np.inf)
        return [row for row in self.rows if row is best or row.role in ("base", "uniform")]

    def verdicts(self) -> list[str]:
        """A sentence, with both figures, for each rival that the winner is not better than on held-out data."""
        ours, sentences = self.winner.fitness, []
        for row in self.rivals:
            if ours > row.fitness or (np.isfinite(ours) and not np.isfinite(row.fitness)):
                continue
            named = "" if row.name == row.role else f" {row.name}"
            name = {"base": f"the base{named}", "uniform": "the uniform merge"}.get(row.role, f"the best parent{named}")
            if not np.isfinite(ours):
                sentences.append(
                    f"The evolved model has no finite score on held-out data; {name} has {row.fitness:.4f}."
                )
                continue
            if ours == row.fitness:
                sentences.append(f"On held-out data the evolved model is only as good as {name}: both have {ours:.4f}.")
                continue
            shown = [f"{value:.4f}" for value in (ours, row.fitness)]
            if shown[0] == shown[1]:
                shown = [repr(float(value)) for value in (ours, row.fitness)]
            sentences.append(
                f"On held-out data the evolved model is worse than {name}: it has {shown[0]}, that has {shown[1]}."
            )
        return sentences


def model_name(path: Path) -> str:
    """What a model is called in tables: its hub id, else its folder, or its run where a search made it."""
    known = hub_id(path)
    if known is not None:
        return known
    return path.parent.parent.name if path.parts[-2:] == ("best", "model") else path.name


def write_result(result: Result, generations: int, file: Path) -> None:
    """`result.json`: the table and the winner. Nothing in it depends on the clock."""

    def plain(row: Row) -> dict[str, Any]:
        return {
            "role": row.role,
            "name": row.name,
            "heldout_fitness": row.fitness,
            "heldout_scores": row.scores,
        }

    winner = result.winner
    document = {
        "generations": generations,
        "table": [plain(row) for row in result.rows],
        # By role: whether the winner is better on held-out data, and both figures.
        "better_than": {
            row.role: {
                "name": row.name,
                "better": winner.fitness > row.fitness,
                "winner_heldout_fitness": winner.fitness,
                "heldout_fitness": row.fitness,
            }
            for row in result.rivals
        },
        "search_fitness": {"winner": result.search_fitness, result.baseline[0]: result.baseline[1]},
        **result.report.document(),
        "genome": [float(gene) for gene in result.genome],
    }
    atomic_write(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
