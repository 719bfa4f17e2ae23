"""The searched parameters of a run, for its page: by name where the first parent's headers are there, else by
number."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evojax_merge.errors import InputError
from evojax_merge.report.comparison import model_names
from evojax_merge.report.described import split_name
from evojax_merge.report.frame import gene_values
from evojax_merge.report.run_data import Generation, RunData, spread
from evojax_merge.report.stored_run import stored_values
from evojax_merge.search.run_parts import RunFolder

# The most frames of the heat maps' slider, and the most numbers in all frames.
MOST_FRAMES, MOST_CELLS = 100, 16_000
# The candidates that importances are computed from, and those that are drawn as lines.
FEWEST_RANKED, MOST_RANKED, MOST_DRAWN = 10, 2_000, 150
# Genes without names stand in rows of so many.
GENES_IN_A_ROW = 8


@dataclass(frozen=True)
class Map:
    """A heat map of one parameter: float[frames, rows, columns]."""

    parameter: str
    rows: list[str]
    columns: list[str]
    values: np.ndarray


@dataclass(frozen=True)
class Frames:
    """The best candidate of a few generations, and the winner as the last. labels: a line each."""

    labels: list[str]
    maps: list[Map]


@dataclass(frozen=True)
class Sampled:
    """Candidates: their fitness and their parameters by name, `[candidates]` each."""

    fitness: np.ndarray
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Parameters:
    """named: whether the parameters have names, not numbers. importance: parameter -> the rank correlation with the
    fitness; ranked: how many candidates it is computed from."""

    named: bool
    frames: Frames
    importance: dict[str, float]
    ranked: int
    drawn: Sampled | None


def read_parameters(run: RunData) -> Parameters | None:
    """The parameters of a run; None where there are none to show, as in a pool, whose genomes are births."""
    genes = max((len(generation.genome) for generation in run.generations), default=0)
    if run.config.get("pool") or not genes:
        return None
    try:
        named_values = stored_values(RunFolder(run.path))
    except InputError:
        named_values = gene_values
        if run.config.get("plugins"):
            run.notes.append("Parameters have numbers: report imports no plugin of a run but what --plugin FILE names.")
    half = [generation for generation in run.fitness_rows if 2 * generation.number > run.count]
    late, drawn = _candidates(half, MOST_RANKED), _candidates(run.fitness_rows, MOST_DRAWN)
    # The frames of the slider: a label and a genome each.
    best = [generation for generation in run.generations if generation.genome]
    best = [best[place] for place in spread(len(best), max(1, min(MOST_FRAMES, MOST_CELLS // genes)))]
    labels = [f"generation {g.number} of {run.count}, its best: fitness {g.genome_fitness:.4f}" for g in best]
    framed = [generation.genome for generation in best]
    if len(run.outcome.genome) == genes:
        labels, framed = [*labels, "the winner"], [*framed, run.outcome.genome]
    genomes = np.array([genome for _, genome in (*late, *drawn)] + framed, np.float32)
    values = {name: np.asarray(column, float) for name, column in named_values(genomes).items()}
    is_named = "gene[0]" not in values
    importance = _importance(_sampled(late, values, 0)) if len(late) >= FEWEST_RANKED else {}
    frames = Frames(labels, _maps({name: column[len(late) + len(drawn) :] for name, column in values.items()}))
    if not is_named and run.outcome.groups:
        # The winner's parameters from result.json, where those of other candidates have no names any more.
        names, maps = model_names(list(map(Path, run.config.get("parents", ())))), []
        for name, table in run.outcome.parameters.items():
            cells = np.asarray(table, float)
            columns = names if len(names) == cells.shape[1] else [str(k + 1) for k in range(cells.shape[1])]
            maps.append(Map(name, run.outcome.groups, columns, cells[None]))
        frames = Frames(["the winner"], maps)
    return Parameters(
        named=is_named,
        frames=frames,
        importance=importance,
        ranked=len(late),
        drawn=_sampled(drawn, values, len(late)) if len(drawn) > 1 else None,
    )


def _candidates(generations: list[Generation], most: int) -> list[tuple[float, list[float]]]:
    """The fitness and genome of at most so many of the candidates that have a fitness, evenly spaced."""
    rows = [
        (fitness, genome)
        for generation in generations
        for fitness, genome in zip(generation.row.fitness, generation.row.genomes, strict=True)
        if fitness is not None
    ]
    return [rows[place] for place in spread(len(rows), most)]


def _sampled(candidates: list[tuple[float, list[float]]], values: Mapping[str, np.ndarray], first: int) -> Sampled:
    """The candidates with their parameters, which are the columns' values from `first` on."""
    parameters = {name.partition("[")[0] for name in values}
    return Sampled(
        fitness=np.array([fitness for fitness, _ in candidates], float),
        values={_short(name, len(parameters)): x[first : first + len(candidates)] for name, x in values.items()},
    )


def _short(name: str, parameters: int) -> str:
    """`weight[layer 0 mlp][maths]` as `maths, layer 0 mlp`, where only one parameter is searched."""
    parameter, group, parent = split_name(name)
    if parameter == "gene":
        return name
    return ", ".join([parameter] * (parameters > 1) + ([] if parent is None else [parent]) + [group])


def _importance(sampled: Sampled) -> dict[str, float]:
    """Spearman's rank correlation of each parameter with the fitness, the strongest first; without parameters that
    never change."""
    if np.ptp(sampled.fitness) == 0:
        return {}
    ranks = _standardised(_ranks(sampled.fitness))
    correlations = {
        name: float(_standardised(_ranks(column)) @ ranks)
        for name, column in sampled.values.items()
        if np.ptp(column) > 0
    }
    return dict(sorted(correlations.items(), key=lambda item: -abs(item[1])))


def _ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value among all; equal ones share the mean of theirs."""
    # That of SciPy takes a second to import.
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return means


def _standardised(values: np.ndarray) -> np.ndarray:
    centred: np.ndarray = values - values.mean()
    return centred / np.linalg.norm(centred)


def _maps(values: Mapping[str, np.ndarray]) -> list[Map]:
    """parameter[group][parent] -> float[frames] as a map for each parameter."""
    cells: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for name, column in values.items():
        parameter, group, parent = split_name(name)
        cells.setdefault(parameter, {})[group, parameter if parent is None else parent] = column
    maps = []
    for parameter, columns in cells.items():
        rows = list(dict.fromkeys(group for group, _ in columns))
        parents = list(dict.fromkeys(parent for _, parent in columns))
        if parameter == "gene":
            numbers = range(len(columns))
            places = [(f"genes from {n - n % GENES_IN_A_ROW}", f"+{n % GENES_IN_A_ROW}") for n in numbers]
            columns = dict(zip(places, columns.values(), strict=True))
            rows, parents = (list(dict.fromkeys(place[axis] for place in places)) for axis in (0, 1))
        nothing = np.full(len(next(iter(values.values()))), np.nan)
        table = [[columns.get((row, parent), nothing) for parent in parents] for row in rows]
        maps.append(Map(parameter, rows, parents, np.moveaxis(np.array(table, float), 2, 0)))
    return maps
