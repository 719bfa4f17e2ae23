"""The two kinds of candidates that a config can ask for, merges and layer paths: what each is made of, how it is
evaluated, written and shown. Whatever depends on the kind is here; the search knows spaces and evaluators alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.bank import held_bytes, load_bank, load_path_bank
from evojax_merge.checkpoints.parents import Sources
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.evaluator import Evaluator, MergeEvaluator, Progress
from evojax_merge.evaluation.paths import PathEvaluator
from evojax_merge.mergekit.write import path_document, recipe_document
from evojax_merge.models.bank import MergeSpec, take_candidate
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import PathSpec
from evojax_merge.report.merges import MergeReport
from evojax_merge.report.paths import PathReport
from evojax_merge.report.winner import WinnerReport
from evojax_merge.spaces.layer_path import PathSpace
from evojax_merge.spaces.parameter import ParameterSpace

CandidateEvaluator = MergeEvaluator | PathEvaluator


class Candidates(Protocol):
    """A kind of candidates. `name`: what made them, in tables; `export_dtype`: what they are rounded to and written
    in; `baseline_role`: the role of the space's baseline in the table, None where a parent's row says it already."""

    @property
    def name(self) -> str: ...
    @property
    def export_dtype(self) -> str: ...
    @property
    def baseline_role(self) -> str | None: ...

    def held_bytes(self) -> int:
        """Bytes of the loaded bank."""
        ...

    def open_evaluators(
        self, decoders: Sequence[Evaluator], devices: Devices, progress: Progress
    ) -> Sequence[CandidateEvaluator]:
        """Load the bank, and evaluate candidates as each of `decoders` evaluates models. `progress` is told the bytes
        that were loaded."""
        ...

    def describe(self) -> str:
        """What a genome holds, in words."""
        ...

    def describe_work(self, evaluators: Sequence[Any]) -> str:
        """One line on how the candidates of a search were evaluated."""
        ...

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        """A genome as the documents of a recipe in mergekit's format, the result's last."""
        ...

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> WinnerReport:
        """What is shown of a genome. parents: their short names."""
        ...


@dataclass(frozen=True)
class MergeCandidates:
    """Merges of all sources by a method. base: written in recipes; parents: in their order."""

    space: ParameterSpace
    spec: MergeSpec
    sources: Sources
    decoder: DecoderConfig
    base: str | None
    parents: tuple[str, ...]

    baseline_role = "uniform"

    @property
    def name(self) -> str:
        return self.spec.method_name

    @property
    def export_dtype(self) -> str:
        return self.spec.export_dtype

    def held_bytes(self) -> int:
        return held_bytes(self.sources, self.decoder, self.spec)

    def open_evaluators(
        self, decoders: Sequence[Evaluator], devices: Devices, progress: Progress
    ) -> list[MergeEvaluator]:
        bank = load_bank(self.sources, self.decoder, self.spec, progress, devices.put)
        return [MergeEvaluator(decoder, bank, self.spec) for decoder in decoders]

    def describe(self) -> str:
        names = ", ".join(parameter.name for parameter in self.space.search_parameters)
        return f"{self.space.dims} parameters ({names}; {len(self.space.groups)} groups)"

    def describe_work(self, evaluators: Sequence[MergeEvaluator]) -> str:
        most = max((chunk for one in evaluators for chunk in one.evaluator.chunk_sizes.values()), default=0)
        few = {0: "no candidate", 1: "one candidate at a time"}.get(most, f"up to {most:,} candidates at a time")
        return f"each device scored {few}"

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        recipe = jax.tree.map(np.asarray, take_candidate(self.space.decode(genome[None]), 0))
        return [recipe_document(recipe, self.spec, self.decoder, self.base, self.parents)]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> MergeReport:
        values = {name: np.asarray(block) for name, block in self.space.values(jnp.asarray(genome)).items()}
        return MergeReport(tuple(self.space.groups), values, tuple(parents))


@dataclass(frozen=True)
class PathCandidates:
    """Paths through the layers of all parents."""

    space: PathSpace
    spec: PathSpec
    sources: Sources
    parents: tuple[str, ...]

    baseline_role = None

    @property
    def name(self) -> str:
        return self.spec.method_name

    @property
    def export_dtype(self) -> str:
        return self.spec.export_dtype

    def held_bytes(self) -> int:
        return held_bytes(self.sources, self.spec.configs[0], self.spec)

    def open_evaluators(
        self, decoders: Sequence[Evaluator], devices: Devices, progress: Progress
    ) -> list[PathEvaluator]:
        bank = load_path_bank(self.sources, self.spec, decoders[0].compute_dtype, progress)
        return [PathEvaluator(decoder, bank, self.space.max_length) for decoder in decoders]

    def describe(self) -> str:
        return f"{self.space.dims} numbers that say which layers follow each other"

    def describe_work(self, evaluators: Sequence[PathEvaluator]) -> str:
        done, asked = sum(one.steps_run for one in evaluators), sum(one.steps_requested for one in evaluators)
        saved = 0.0 if not asked else 1 - done / asked
        distinct = {known for one in evaluators for known in one.score_cache}
        return (
            f"layer steps: {done:,} computed of {asked:,} asked for ({saved:.0%} were shared); "
            f"{len(distinct):,} distinct paths"
        )

    def to_recipe(self, genome: np.ndarray) -> list[dict[str, Any]]:
        return [path_document(self._path(genome), self.spec, self.parents)]

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> PathReport:
        return PathReport(self._path(genome), self.spec, tuple(parents))

    def _path(self, genome: np.ndarray) -> Any:
        path = self.space.decode(genome[None])[0]
        assert path is not None, "a genome without a path has no finite fitness, and is never written"
        return path
