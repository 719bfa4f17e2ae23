"""The protocol of a backend: what a model is, how it answers, and what is exported. The search knows this protocol and
no backend.

Letters: P candidates, D genes of a genome. B stands for a task as a backend evaluates it: tokenised batches, or arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

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
    and differentiate their fitness where the tasks have derivatives; export: (exported winner, vector float32[D], out,
    check) -> None, writes a change of the winner as the adapter `out` (see `Backend.export`), None where
    `BackendFacts.not_polishable` says why not."""

    layout: LowRankLayout
    spread: Mapping[str, float]
    evaluators: Sequence[Any]
    export: Callable[[Path, np.ndarray, Path, Callable[[], None]], None] | None = None


class Planner(Protocol):
    """Plans the passes of a search over abstract arrays."""

    @property
    def sizes(self) -> DeviceSizes:
        """Bytes of the loaded bank, where as many devices share it as the settings say."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what candidates compute, and where models lie, beside the usual."""

    @property
    def jobs(self) -> int:
        """The number of passes that run side by side on a device."""

    def passes(
        self, tasks: Sequence[Any], candidates: int, use: PlanUse, compiler: TargetCompiler | None = None,
        smallest: bool = False,
    ) -> list[SizedPass]:  # fmt: skip
        """The passes that evaluate the first chunk of `candidates` candidates, of all groups of devices together, on
        tasks in the form B. compiler: reports the memory of every pass; None: estimates alone. smallest: those that
        are taken where larger ones do not fit."""


BaselineRole = Literal["uniform", "plain"]


@dataclass(frozen=True, kw_only=True)
class BackendFacts:
    """The facts about one search's models and candidates that are known once the models are open.

    The candidates. name: the merge method, or the kind of the candidates, in tables; space: decodes genomes into
    candidates; genome: the content of a genome, in words; is_random: whether merges draw random masks; has_derivatives:
    whether every gene has an effect that a gradient shows (scores decide for themselves whether they have derivatives,
    see `tasks.task`); gradient_passes: the number of passes that a candidate's gradient is planned as, 0 where it has
    none; export_dtype: the dtype that candidates are rounded to and written in, None where they keep their parents';
    baseline_role: the role of the space's baseline in the held-out table: `uniform` of the uniform merge, `plain` of
    another, whose name the space has (`Space.baselines`); None where the models' rows show it already.

    The models. base, parents: their files or folders; base is None where the held-out table has none; references: each
    model's name in recipes; loaded: the number of models in the bank; stored_bytes: the bytes that `load` reads from
    files; streamed_bytes: the bytes of the host's memory that the models take where they come to the devices part by
    part, None where they do so already, or cannot; not_adaptable, not_polishable: why no low-rank change of a model can
    be trained, and why no winner can be written with one; empty where it can; beyond_recipe: what a candidate has that
    a merge of its recipe has not, in words; empty where the recipe gives its bytes.

    The run. settings, target: how candidates are evaluated, and on which devices; compute_dtype: the dtype that
    generations are scored in; final_compute_dtype: the dtype for splits that no generation is scored on, where the
    winner is chosen and reported; smaller_passes: changes of the settings that make passes smaller where they do not
    become so by themselves, the least first; extensions: the objects that plugins may have added: methods, the
    architecture, the backend's factory; resolved: the keys of the run folder's config whose values the backend has
    resolved; notes, warnings: lines on the models that a user should see before the search.
    """

    name: str
    space: Any
    genome: str
    base: Path | None
    parents: tuple[Path, ...]
    references: Mapping[Path, str]
    loaded: int
    stored_bytes: int
    settings: EvaluationConfig
    target: Target
    is_random: bool = False
    has_derivatives: bool = True
    gradient_passes: int = 1
    export_dtype: str | None = None
    baseline_role: BaselineRole | None = None
    streamed_bytes: int | None = None
    not_adaptable: str = ""
    not_polishable: str = ""
    beyond_recipe: str = ""
    compute_dtype: str = "float32"
    final_compute_dtype: str = "float32"
    smaller_passes: Sequence[Mapping[str, Any]] = ()
    extensions: Sequence[object] = ()
    resolved: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()

    @property
    def compared(self) -> list[tuple[str, Path]]:
        """The role and the file or folder of each model in the held-out table."""
        base = [] if self.base is None else [("base", self.base)]
        return base + [("parent", parent) for parent in self.parents]


@dataclass(frozen=True)
class CandidateFacts:
    """The facts about a genome's candidate. recipe: the candidate as YAML, in mergekit's format; sources: the models
    that it is made of, the base first; report: its parameters, its layers or its ancestors, for the run's page."""

    recipe: str
    sources: Sequence[Path]
    report: WinnerReport


@dataclass(frozen=True)
class Prepared(Splits[list[Any]]):
    """The tasks of every split in the form B; tasks of weight 0 are in the held-out split alone. notes, warnings: lines
    on the batches that a user should see before the search."""

    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


class Backend(Protocol):
    """The models of one search, opened by their headers."""

    @property
    def facts(self) -> BackendFacts: ...

    # ---- Before the search

    def check(self, where: str, task: Any) -> None:
        """Raises InputError for a task that asks for another kind of model."""

    def example_lengths(self, task: Any) -> np.ndarray:
        """float64[N]: the relative cost of each of a task's examples."""

    def prepare(self, splits: Splits[list[Any]]) -> Prepared:
        """Prepare the tasks of every split, on the host. Raises InputError for an example that the models cannot be
        asked."""

    def files(self) -> set[Path]:
        """The models' files that scores depend on."""

    # ---- The cost

    def planner(self) -> Planner:
        """A planner for the target."""

    # ---- The search

    def load(self, devices: Devices, progress: Progress, folder: Path | None) -> Any:
        """Load the bank on the devices. `progress` receives the bytes that were loaded; folder: the place of files that
        a search keeps candidates in, None: a temporary one."""

    def evaluators(
        self, bank: Any, prepared: Splits[list[Any]], population: int, devices: Devices, log: Callable[[str], None]
    ) -> Splits[SpaceEvaluator[Any]]:
        """Evaluators of genomes on each of the splits, in the final compute dtype where no generation is scored.
        population: of a generation; `log` receives the evaluators' notes."""

    def describe_work(self, evaluators: Sequence[SpaceEvaluator[Any]]) -> str:
        """One line on how the candidates of a search were evaluated."""

    def within(self, context: Any) -> "Backend":
        """The backend once the strategy's state lends `context` to the space; None: genomes are complete by
        themselves."""

    # ---- The winner

    def score_stored(self, model: Path, heldout: SpaceEvaluator[Any], progress: Progress) -> TaskScores:
        """The scores of one of the compared models on the held-out split."""

    def answers(
        self, model: str, candidate: Path | np.ndarray, heldout: SpaceEvaluator[Any], scores: TaskScores, number: int
    ) -> Sequence[dict[str, Any]]:
        """The answers of the scored model `number`, a row for each task and example: what `score_rows` has, and where
        there are any `prompt`, `target` and `outputs`, the question, the right answer and the model's, in words. model:
        its name; candidate: one of the compared models, or a genome."""

    def describe(self, genome: np.ndarray) -> CandidateFacts: ...

    def export(
        self, recipe: str, genome: np.ndarray, out: Path, card: str, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Write the candidate of a genome, whose recipe is the YAML `recipe`, as the model `out`. `check` raises an
        exception where `out` must not be replaced. Returns the account of the models' tensors for result.json (see
        `mergekit.account`); empty where all are merged by name."""


class Adapts(Protocol):
    """A backend whose models are changed by low rank: one whose `facts.not_adaptable` is empty."""

    def adaptable(
        self, candidate: Path | np.ndarray, like: Sequence[SpaceEvaluator[Any]], rank: int, scale: float
    ) -> Adaptable:
        """One of the compared models, or the candidate of a genome, to be changed by low rank, on the examples of some
        evaluators of genomes. rank, scale: see `LowRankLayout`."""


class BackendFactory(Protocol):
    """Opens the models of a config of one kind: `backend: NAME`."""

    def merges_recipes(self, config: Mapping[str, Any]) -> bool:
        """Whether `merge` or `moe` makes a candidate of its recipe; otherwise the backend makes it of its genome.
        config: by its keys, of a search or of a run."""

    def check(self, where: str, config: Config) -> None:
        """Raises InputError for a config that cannot be searched, before any file is opened."""

    def open(
        self, where: str, config: Config, folder: Path, target: Target, resolve: Resolve, chained: bool
    ) -> Backend:
        """Open the models of a config by their headers. Relative paths start in `folder`; `chained`: the first parent
        is the winner of the stage before, or stands for it."""
