"""A run folder, for reading: a search's progress and results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evojax_merge.backends.decoder.opening import parameter_space
from evojax_merge.config.search_config import Config
from evojax_merge.mergekit.streams import plain_recipe
from evojax_merge.problem import config_from, stage_config
from evojax_merge.report.comparison import model_names
from evojax_merge.report.described import Described
from evojax_merge.report.frame import NamedValues, gene_values
from evojax_merge.schema.arguments import check_arguments
from evojax_merge.schema.yaml_reader import load_documents
from evojax_merge.search.run_folder import is_run
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import StoredResult, read_result, read_run_config


@dataclass(frozen=True, repr=False)
class StoredRun(Described):
    """A search's run folder, for reading. Every property reads the current files, so that a running search can be
    watched; a property whose file does not exist yet is None, or empty."""

    path: Path

    def __post_init__(self) -> None:
        check_arguments(type(self).__init__, vars(self))

    def facts(self) -> dict[str, Any]:
        if not is_run(self._folder):
            return {"folder": str(self.path)}
        config, history = self.config, self.history
        last = history[-1] if history else {}
        return {
            "folder": str(self.path),
            "method": self.method,
            "parents": model_names([Path(parent) for parent in config.get("parents", ())]),
            "dimensions": len(last["genomes"][0]) if last.get("genomes") else None,
            "generations": len(history),
            **best_facts(history, read_result(self._folder.result)),
            "finished": self.finished,
        }

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The config with all defaults and absolute paths; `inputs`: a hash of every file that scores depend on."""
        return read_run_config(self._folder.config)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One mapping a generation: the fitness of every candidate, the best so far, and the strategy's metrics."""
        return self._folder.read_history()

    @property
    def timing(self) -> list[dict[str, Any]]:
        """The seconds of each generation."""
        return self._folder.read_timing()

    @property
    def finished(self) -> bool:
        """Return whether the search has chosen its winner after the last saved generation."""
        return (self.model or self.params) is not None and self._folder.is_finished()

    @property
    def result(self) -> dict[str, Any] | None:
        """`result.json`: the held-out table, the winner's parameters by group, its genome."""
        return None if read_result(self._folder.result) is None else json.loads(self._folder.result.read_bytes())

    @property
    def table(self) -> list[dict[str, Any]]:
        """The held-out scores of winner, base, parents, uniform merge and controls, a mapping each; `print` shows them
        as a table. interval: where the difference between the winner's fitness and the model's lies on other examples
        like these, in 95 of 100 draws; where it holds 0, the difference is within noise."""
        # It imports this module.
        from evojax_merge.report.run_tables import PrintedTable

        return PrintedTable((self.result or {}).get("table", []))

    @property
    def warnings(self) -> list[str]:
        """The sentences of the report in which the winner is worse than a model that it is compared with: in fitness,
        or, beyond noise, in a task."""
        return list((self.result or {}).get("warnings", []))

    @property
    def front(self) -> list[dict[str, Any]]:
        """The members of the front, for a strategy that keeps one, a mapping each: the member's number (`member`), its
        scores on the examples that the winner was chosen on and on the held-out ones, and its genome."""
        return list((self.result or {}).get("members", []))

    @property
    def recipe(self) -> Any:
        """The winner as a mergekit recipe whose model paths are valid in any working directory: a mapping, or a list of
        them where the recipe has several documents."""
        return plain_recipe(load_documents(self._folder.recipe)) if self._folder.recipe.is_file() else None

    @property
    def model(self) -> Path | None:
        """The winner's folder."""
        return self._folder.model if self._folder.model.is_dir() else None

    @property
    def params(self) -> Path | None:
        """The winner of `search_pytrees`: a safetensors file, its leaves by their paths."""
        return self._folder.params if self._folder.params.is_file() else None

    @property
    def method(self) -> str:
        """The name of the search's merge method, or of the kind of its space."""
        return method_in(self.config)

    def last_stage(self) -> Config:
        """The config of the search, or of its last stage, without its tasks: their kinds and functions need not be
        known to this process, but for a pool's. To read a run imports no plugin that it names: it may be a
        stranger's."""
        folder, document = self._folder, {key: value for key, value in self.config.items() if key != "plugins"}
        if not document.get("pool"):
            document |= {"tasks": [{"name": "task", "kind": "likelihood", "file": "tasks.jsonl"}]}
        config = config_from(folder.config, document, [], None)
        if config.stages is None:
            return config
        winner = folder.stages / f"stage-{len(config.stages) - 1}" / folder.model.relative_to(folder.path)
        return stage_config(config, config.stages[-1], str(winner) if len(config.stages) > 1 else None)

    def named_values(self) -> NamedValues:
        """The function from genomes to the searched parameters by their names. Needs the first parent's headers."""
        document = self.config
        if "tasks" not in document or "backend" in document:  # a run of search_pytrees, or not of language models
            return gene_values
        opened = parameter_space(self._folder.config, self.last_stage())
        return gene_values if opened is None else partial(opened[0].named_values, parents=opened[1])

    @property
    def page(self) -> Path | None:
        """`report.html`: the run's figures and tables as one page for a browser."""
        return self._folder.page if self._folder.page.is_file() else None


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
    # A run of search_pytrees has the fitness of the split alone that the winner was chosen on.
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
    space = config.get("space") or config.get("search_pytrees") or {}
    return space.get("method") or next((key for key in ("data_flow", "pool", "stages") if config.get(key)), "unknown")
