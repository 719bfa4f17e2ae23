"""The protocol of a backend: what a model is, how it answers, and what is exported. The search knows this protocol and
no backend.

Letters: P candidates, D genes of a genome. B stands for a task as a backend evaluates it: tokenised batches, or arrays.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evojax_merge.config.search_config import Config, EvaluationConfig
from evojax_merge.evaluation.compilers import TargetCompiler
from evojax_merge.evaluation.devices import Devices
from evojax_merge.evaluation.planned_passes import DeviceSizes, PlanUse, SizedPass
from evojax_merge.evaluation.scores import TaskScores
from evojax_merge.evaluation.targets import Target
from evojax_merge.models.adapted import LowRankLayout
from evojax_merge.report.winner import WinnerReport
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.tasks.splits import Splits

Progress = Callable[[int], None]
# (where, reference, folder) -> the path that a reference to a model means, looked for from `folder` on.
Resolve = Callable[[object, str, Path], Path]


@dataclass(frozen=True)
class Adaptable:
    """A stored model that low-rank changes are trained on. layout: of the vectors that changes are; spread: the root
    mean square of each changed matrix, by its name; evaluators: score changes float32[P, D] on splits of the examples,
    and differentiate their fitness where the tasks have derivatives; has_derivatives: whether the model has."""

    layout: LowRankLayout
    spread: Mapping[str, float]
    evaluators: Sequence[Any]
    has_derivatives: bool = True


class Planner(Protocol):
    """Plans the passes of a search over abstract arrays."""

    # The number of passes that a candidate's gradient is planned as.
    gradient_passes: int

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what candidates compute, and where models lie, beside the usual."""
        ...

    @property
    def jobs(self) -> int:
        """The number of passes that run side by side on a device."""
        ...

    def passes(
        self, tasks: Sequence[Any], candidates: int, use: PlanUse, compiler: TargetCompiler | None = None,
        smallest: bool = False,
    ) -> list[SizedPass]:  # fmt: skip
        """The passes that evaluate the first chunk of `candidates` candidates, of all groups of devices together, on
        tasks in the form B. compiler: reports the memory of every pass; None: estimates alone. smallest: those that
        are taken where larger ones do not fit."""
        ...


class Backend(Protocol):
    """The models of one search, opened by their headers.

    space: decodes genomes into candidates; settings, target: how candidates are evaluated, and on which devices;
    compared: (role, file or folder) of the models of the held-out table, the base first, then the parents; references:
    the name of each model in recipes; loaded: the number of models in the bank; export_dtype: the dtype that candidates
    are rounded to and written in; baseline_role: the role of the space's baseline in the table (None: the models show
    it already); is_random: whether merges draw random masks.
    """

    @property
    def name(self) -> str:
        """The name of the candidates in tables: a merge method, or a kind of candidates."""
        ...

    @property
    def space(self) -> Any: ...
    @property
    def settings(self) -> EvaluationConfig: ...
    @property
    def target(self) -> Target: ...
    @property
    def compared(self) -> Sequence[tuple[str, Path]]: ...
    @property
    def references(self) -> Mapping[Path, str]: ...
    @property
    def loaded(self) -> int: ...
    @property
    def compute_dtype(self) -> str: ...
    @property
    def final_compute_dtype(self) -> str:
        """The dtype of the splits that no generation is scored on: the winner is chosen, and reported, on them."""
        ...

    @property
    def export_dtype(self) -> str | None: ...
    @property
    def baseline_role(self) -> str | None: ...
    @property
    def is_random(self) -> bool: ...
    @property
    def has_derivatives(self) -> bool:
        """Return whether every gene has an effect that a gradient shows; scores decide for themselves whether they have
        derivatives (see `tasks.task`)."""
        ...

    @property
    def not_adaptable(self) -> str:
        """Why no low-rank change of a model can be trained, in words; empty where it can."""
        ...

    @property
    def not_polishable(self) -> str:
        """Why no winner can be written with a low-rank change, in words; empty where it can."""
        ...

    # ---- Before the search

    def check_task(self, where: str, task: Any) -> None:
        """Raises InputError for a task that asks for another kind of model."""
        ...

    def example_lengths(self, task: Any) -> np.ndarray:
        """float64[N]: the relative cost of each of a task's examples."""
        ...

    def prepare(self, splits: Splits[list[Any]]) -> Splits[list[Any]]:
        """The tasks of every split in the form B, on the host. Tasks of weight 0 are in the held-out split alone.
        Raises InputError for an example that the models cannot be asked."""
        ...

    def describe(self) -> str:
        """The content of a genome, in words."""
        ...

    def describe_inputs(self, prepared: Splits[list[Any]]) -> list[str]:
        """Lines on the models and the batches of a search."""
        ...

    def warnings(self, prepared: Splits[list[Any]]) -> list[str]:
        """Lines on the models and the examples that a user should see before the search."""
        ...

    def resolved(self) -> dict[str, Any]:
        """The keys of the run folder's config whose values the backend has resolved."""
        ...

    def files(self) -> set[Path]:
        """The models' files that scores depend on."""
        ...

    def extensions(self) -> Iterable[object]:
        """The objects that plugins may have added: methods, the architecture, the backend itself."""
        ...

    # ---- The cost

    def stored_bytes(self) -> int:
        """Bytes of the models' files that `load` reads."""
        ...

    def held_bytes(self) -> int:
        """Bytes of the loaded bank."""
        ...

    def device_sizes(self, shards: int) -> DeviceSizes:
        """The bank's sizes where `shards` devices share it."""
        ...

    def streamed(self) -> "Backend | None":
        """The backend with its models on the host, or on the disk where the host has no room for them; None where they
        are there already, or cannot be."""
        ...

    def planner(self, bank_bytes: int) -> Planner:
        """A planner for the target, with `bank_bytes` loaded on each device."""
        ...

    def smaller_passes(self) -> Sequence[Mapping[str, Any]]:
        """Changes of a config's `evaluation` that make passes smaller where they do not become so by themselves, the
        least first."""
        ...

    # ---- The search

    def load(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        """Load the bank on the devices. `progress` receives the bytes that were loaded; folder: the place of files that
        a search keeps candidates in, None: a temporary one."""
        ...

    def evaluators(
        self, bank: Any, prepared: Splits[list[Any]], population: int, devices: Devices, log: Callable[[str], None]
    ) -> Splits[SpaceEvaluator[Any]]:
        """Evaluators of genomes on each of the splits, in the final compute dtype where no generation is scored.
        population: of a generation; `log` receives the evaluators' notes."""
        ...

    def evaluator(self, bank: Any, tasks: list[Any], population: int, devices: Devices) -> SpaceEvaluator[Any]:
        """An evaluator of genomes on the tasks of one split, as generations are scored."""
        ...

    def describe_work(self, evaluators: Sequence[SpaceEvaluator[Any]]) -> str:
        """One line on how the candidates of a search were evaluated."""
        ...

    def within(self, context: Any) -> "Backend":
        """The backend once the strategy's state lends `context` to the space; None: genomes are complete by
        themselves."""
        ...

    # ---- The winner

    def score_stored(self, model: Path, heldout: SpaceEvaluator[Any], progress: Progress) -> TaskScores:
        """The scores of one of the compared models on the held-out split."""
        ...

    def adaptable(
        self, candidate: Path | np.ndarray, like: Sequence[SpaceEvaluator[Any]], rank: int, scale: float
    ) -> Adaptable:
        """One of the compared models, or the candidate of a genome, to be changed by low rank, on the examples of some
        evaluators of genomes. rank, scale: see `LowRankLayout`."""
        ...

    def export_change(
        self, model: Path, layout: LowRankLayout, vector: np.ndarray, out: Path, check: Callable[[], None]
    ) -> None:
        """Write a low-rank change of the exported winner `model` as the adapter `out`. check: see `export`."""
        ...

    def answers(
        self, model: str, candidate: Path | np.ndarray, heldout: SpaceEvaluator[Any], scores: TaskScores, number: int
    ) -> Sequence[dict[str, Any]]:
        """The answers of the scored model `number`, a row for each task and example: what `score_rows` has, and where
        there are any `prompt`, `target` and `outputs`, the question, the right answer and the model's, in words. model:
        its name; candidate: one of the compared models, or a genome."""
        ...

    def report(self, genome: np.ndarray, parents: Sequence[str]) -> WinnerReport:
        """The report of a genome's candidate. parents: their short names."""
        ...

    def merged_from(self, genome: np.ndarray) -> list[Path]:
        """The models that a genome's candidate is made of, the base first."""
        ...

    def recipe(self, genome: np.ndarray) -> str:
        """A genome's recipe as YAML, in mergekit's format."""
        ...

    def export(
        self, recipe: str, genome: np.ndarray, out: Path, card: str, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Write the candidate of a genome, whose recipe is the YAML `recipe`, as the model `out`. `check` raises an
        exception where `out` must not be replaced. Returns the account of the models' tensors for result.json (see
        `mergekit.account`); empty where all are merged by name."""
        ...


class BackendFactory(Protocol):
    """Opens the models of a config of one kind: `backend: NAME`."""

    @property
    def merges_recipes(self) -> bool:
        """Whether `merge` makes a candidate of its recipe; otherwise the backend makes it of its genome."""
        ...

    def check(self, where: str, config: Config) -> None:
        """Raises InputError for a config that cannot be searched, before any file is opened."""
        ...

    def open(
        self, where: str, config: Config, folder: Path, target: Target, resolve: Resolve, chained: bool
    ) -> Backend:
        """Open the models of a config by their headers. Relative paths start in `folder`; `chained`: the first parent
        is the winner of the stage before, or stands for it."""
        ...
