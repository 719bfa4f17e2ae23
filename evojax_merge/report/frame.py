"""A run's history as one flat table. Imports pandas, which is no dependency of the package."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evojax_merge.errors import InputError

# float32[P, D] -> the searched parameters by their names, float[P] each.
NamedValues = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def gene_values(genomes: np.ndarray) -> dict[str, np.ndarray]:
    """The genes of genomes float32[P, D] by their numbers, for a space whose parameters have no names."""
    return {f"gene[{number}]": column for number, column in enumerate(genomes.T)}


def history_frame(history: Sequence[Mapping[str, Any]], named_values: NamedValues) -> Any:
    """A pandas table of a history's rows with a row for each candidate: its generation, its number in the generation,
    its fitness, the number of examples that it was evaluated on, its mean on each task, and the values that
    `named_values` returns for its genome. NaN where a candidate failed. Raises InputError where pandas is not
    installed."""
    try:
        import pandas
    except ImportError:
        raise InputError("to_frame", "needs the package pandas; install it (pip install pandas)") from None
    tasks = list(dict.fromkeys(name for row in history for name in row["task_scores"]))
    columns: dict[str, Any] = {
        "generation": np.repeat([row["generation"] for row in history], [len(row["fitness"]) for row in history]),
        "candidate": [number for row in history for number in range(len(row["fitness"]))],
        "fitness": _numbers([value for row in history for value in row["fitness"]]),
        "examples": [count for row in history for count in row["examples"]],
    }
    for name in tasks:
        values = [row["task_scores"].get(name, [None] * len(row["fitness"])) for row in history]
        columns[name] = _numbers([value for row in values for value in row])
    genomes = np.array([genome for row in history for genome in row["genomes"]], np.float32)
    if len(genomes):
        columns |= named_values(genomes)
    return pandas.DataFrame(columns)


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
