"""A search's run folder, for reading: its models and parameters, and the fitness of its winner."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from evojax_merge.backends.decoder.opening import parameter_space
from evojax_merge.config.search_config import Config, SpaceConfig
from evojax_merge.errors import InputError
from evojax_merge.problem import config_from, stage_config
from evojax_merge.report.comparison import model_names
from evojax_merge.report.frame import NamedValues, gene_values
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import GROUPS, StoredResult, read_result, read_run_config
from evojax_merge.spaces.parameter import GroupSpace
from evojax_merge.spaces.search_parameters import find_method, search_parameters_of


def last_stage(folder: RunFolder) -> Config:
    """The config of a run's search, or of its last stage, without its tasks: their kinds and functions need not be
    known to this process, but for a pool's. To read a run imports no plugin that it names: it may be a stranger's."""
    document = {key: value for key, value in read_run_config(folder.config).items() if key != "plugins"}
    if not document.get("pool"):
        document |= {"tasks": [{"name": "task", "kind": "likelihood", "file": "tasks.jsonl"}]}
    config = config_from(folder.config, document, [], None)
    if config.stages is None:
        return config
    winner = folder.stages / f"stage-{len(config.stages) - 1}" / folder.model.relative_to(folder.path)
    return stage_config(config, config.stages[-1], str(winner) if len(config.stages) > 1 else None)


def stored_values(folder: RunFolder) -> NamedValues:
    """The function from a run's genomes to the searched parameters by their names. A run of language models needs the
    first parent's headers. The run folder of other models holds all names, and no model is opened."""
    document = read_run_config(folder.config)
    if "tasks" not in document:  # a run of pytrees by version 0.1
        return gene_values
    opened: tuple[Any, list[str]] | None = None
    if "backend" not in document:
        opened = parameter_space(folder.config, last_stage(folder))
    elif groups := document.get(GROUPS) or (read_result(folder.result) or StoredResult()).groups:
        opened = (
            _group_space(folder.config, document, groups),
            model_names(list(map(Path, document.get("parents", ())))),
        )
    if opened is None:
        return gene_values
    space, parents = opened

    def values(genomes: np.ndarray) -> Mapping[str, np.ndarray]:
        # The files may be of another search than the genomes.
        named: Mapping[str, np.ndarray] = (
            space.named_values(genomes, parents) if space.dims == genomes.shape[1] else gene_values(genomes)
        )
        return named

    return values


def _group_space(file: Path, document: Mapping[str, Any], groups: Sequence[str]) -> GroupSpace:
    """The space of a run's config whose models are no language models. Raises InputError for a method that is not
    loaded, and for parameters that it has not."""
    where, parents = f"{file}: space", len(document.get("parents", ()))
    try:
        space = SpaceConfig.model_validate(document.get("space"))
    except ValidationError:
        raise InputError(where, "expected a space as a search writes it") from None
    method = find_method(f"{where}.method", space.method)
    searched, constants = search_parameters_of(where, method, parents, space.parameters, space.fixed)
    return GroupSpace(method, parents, tuple(groups), searched, constants)


def winner_fitness(
    history: Sequence[Mapping[str, Any]], result: StoredResult
) -> tuple[float | None, Literal["search", "validation"]]:
    """The fitness of the winner of a `result.json`, and the split that it was measured on: in its generation, or, where
    it was in none, among the finalists."""
    genome = np.array(result.genome, np.float32)
    for row in history:
        for number, candidate in enumerate(row["genomes"]):
            if np.array_equal(np.array(candidate, np.float32), genome):
                return row["fitness"][number], "search"
    # A run of pytrees by version 0.1 has the fitness of the split alone that the winner was chosen on.
    if result.search_fitness:
        return result.search_fitness.get("winner"), "search"
    return result.validation_fitness.get("winner"), "validation"


def best_facts(history: Sequence[Mapping[str, Any]], result: StoredResult | None) -> dict[str, Any]:
    """The best fitness in a prompt: the best so far, and once the winner is chosen the winner's, with its split."""
    if result is None or result.generations != len(history):
        return {"best_fitness": history[-1]["best_so_far"] if history else None}
    fitness, split = winner_fitness(history, result)
    return {"best_fitness": fitness, "best_fitness_on": split}


def method_in(config: Mapping[str, Any]) -> str:
    """The name of a config's merge method, or of the kind of its space."""
    space = config.get("space") or {}
    kinds = (key for key in [*Config.kinds, "stages"] if config.get(key))
    return space.get("method") or next(kinds, "unknown")
