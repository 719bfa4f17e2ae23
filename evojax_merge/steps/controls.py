"""Controls: models that nobody searched, beside which the winner is held out, made with as much work as the search."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from evojax_merge.backends.backend import Adaptable, Adapts, Backend
from evojax_merge.config.search_config import GradientConfig, StopConfig
from evojax_merge.evaluation.peers import exchange
from evojax_merge.evaluation.scores import Goal, TaskScores, fitness, score_matrix
from evojax_merge.problem import SearchProblem, build_strategy
from evojax_merge.report.comparison import POLISHED, POLISHED_NAME, label_of, model_name
from evojax_merge.search.budgets import search_passes
from evojax_merge.search.checkpoints import digest_of
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.search.loop import Archive, evolve
from evojax_merge.search.protocols import differentiates
from evojax_merge.search.recording import Reporter, Storage
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import A_FILE, MAX_FILE, StoredControl, parse
from evojax_merge.search.strategies.greedy import greedy_soup
from evojax_merge.steps.loading import Phase
from evojax_merge.steps.low_rank import Tuning, TuningData, train
from evojax_merge.system.console import working
from evojax_merge.system.file_system import atomic_write_bytes
from evojax_merge.system.regular_file import read_regular
from evojax_merge.tasks.splits import Splits

LORA_ROLES = {"base": "lora_base", "parent": "lora_parent"}


@dataclass(frozen=True, eq=False)
class Control:
    """A control: its role and name in the table. genome: float32[D] of one that the space contains; scores: of any
    other, held out. search: its fitness on the search split, where it was trained there; note: how it was made."""

    role: str
    name: str
    genome: np.ndarray | None = None
    scores: TaskScores | None = None
    search: float | None = None
    note: str = ""


@dataclass(frozen=True)
class KeptControls:
    """The controls that are made so far, in a file of the run folder: a killed run makes none of it twice. folder:
    None: nothing is kept; made: array by the control's role; facts: of each, and the settings that it was made by, as
    `StoredControl` has them. The file holds a digest of all."""

    folder: RunFolder | None
    made: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: RunFolder | None) -> "KeptControls":
        """The controls of a run; none where the file is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        kept = cls(folder)
        if folder is None or not folder.controls.is_file():
            return kept
        content = read_regular(folder.controls, A_FILE, MAX_FILE)
        try:
            made = load(content)
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            facts = json.loads(metadata["facts"])
            for each in facts.values():
                parse(StoredControl, json.dumps(each).encode())
            if metadata["digest"] == _digest(made, facts):
                kept.made.update(made)
                kept.facts.update(facts)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return kept

    def get(self, role: str, settings: Mapping[str, Any], dims: int) -> tuple[np.ndarray, dict[str, Any]] | None:
        """A control of so many numbers that was made by the same settings, and its facts."""
        array, facts = self.made.get(role), self.facts.get(role, {})
        if array is None or facts.get("settings") != settings:
            return None
        fits = (array.shape, array.dtype) == ((dims,), np.float32) and np.isfinite(array).all()
        return (array, facts) if fits else None

    def keep(self, role: str, settings: Mapping[str, Any], array: np.ndarray, facts: Mapping[str, Any]) -> None:
        from safetensors.numpy import save

        self.made[role], self.facts[role] = np.ascontiguousarray(array), {**facts, "settings": dict(settings)}
        if self.folder is not None:
            metadata = {"facts": json.dumps(self.facts), "digest": _digest(self.made, self.facts)}
            atomic_write_bytes(self.folder.controls, save(self.made, metadata))


def _digest(made: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> str:
    return digest_of({**made, "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}).tobytes().hex()


def make_controls(
    problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]], archive: Archive, phase: Phase,
    folder: RunFolder | None,
) -> list[Control]:  # fmt: skip
    """The controls of a search, in the order of the table. The uniform merge has a row without being one of them."""
    controls, kept = [], KeptControls.read(folder if on.heldout.devices.is_main_process else None)
    if "greedy" in problem.search.controls:
        controls.append(_greedy(problem, on))
    if "random" in problem.search.controls:
        controls.append(_random(problem, on, archive, kept))
    if "lora" in problem.search.controls:
        controls += _adapters(problem, on, archive, phase, kept)
    return controls


def equal_searches(problem: SearchProblem[Backend]) -> int:
    """How many times the work of its generations a search does for its controls and its polish."""
    counts = {"random": 1, "lora": 1 if problem.facts.base is None else 2}
    return sum(counts.get(name, 0) for name in problem.search.controls) + (problem.search.then == "polish")


def why_no_gradient(problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]]) -> str:
    """Why evolution strategies train the search's adapters; empty: gradients train them, or there are none."""
    if not problem.tunes_by_gradient:
        return "the fitness has no derivative"
    if any(task.derivative is None for part in on.tuning for task in part.tasks):
        return "JAX does not trace the model"
    return ""


def control_roles(problem: SearchProblem[Backend]) -> set[str]:
    """The roles of a search's controls and of its polished winner in the table."""
    roles: set[str] = {name for name in problem.search.controls if name in ("greedy", "random")}
    if "lora" in problem.search.controls:
        roles |= {LORA_ROLES[role] for role, _ in problem.facts.compared}
    return roles | ({POLISHED} if problem.search.then == "polish" else set())


def _greedy(problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]]) -> Control:
    """The greedy soup by the examples that the winner is chosen on."""
    members, soup = greedy_soup(problem.space, on.deciding, lambda done: None)
    names = [model_name(parent) for parent, is_in in zip(problem.parents, members, strict=True) if is_in]
    few = ", ".join(names) if len(names) <= 3 else f"{len(names)} of {len(members)} parents"
    return Control("greedy", f"soup of {few}", soup)


def passes_of(problem: SearchProblem[Backend], generations: int) -> float:
    """The passes that a search of so many generations took."""
    sizes = [
        sum(task.size for shard in problem.splits.shards for task in shard if task.name == name)
        for name in {task.name for task in problem.splits.search if task.weight > 0}
    ]
    search = problem.search.model_copy(update={"generations": generations})
    return search_passes(search, problem.strategy, max(1, min(sizes)))


def _random(
    problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]], archive: Archive, kept: KeptControls
) -> Control:
    """The best of as many random candidates as the search scored, chosen like the winner."""
    search, strategy = problem.search, problem.strategy
    population, generations = strategy.population, archive.generations
    if differentiates(strategy) is not None:
        # As much work: a gradient takes several passes.
        population = 8
        generations = max(1, round(passes_of(problem, archive.generations) / population))
    settings = {"population": population, "generations": generations, "seed": problem.seed}
    made = kept.get("random", settings, problem.space.dims)
    # The main process alone reads the file: all draw together, or none does.
    genome = exchange({"genome": None if made is None else made[0].tolist()}, "the random control")[0]["genome"]
    if genome is None:
        search = search.model_copy(
            update={
                "strategy": "random", "population": population, "generations": generations, "seeds": [],
                "stop": StopConfig(), "budget": None, "validate_every": None, "gradient": GradientConfig(),
            }
        )  # fmt: skip
        drawing = build_strategy("search.controls", search, problem.space)
        with working("scoring random candidates"):
            drawn = evolve(
                # Other random numbers than those of a search by the same strategy.
                replace(problem, search=search, seed=problem.seed + 1, strategy=drawing),
                replace(on, minibatches=[]), Storage(), Reporter(),
            )  # fmt: skip
        genomes = drawn.genomes[np.isfinite(drawn.fitness) & (drawn.genomes != problem.space.start).any(axis=1)]
        if not len(genomes):
            return Control("random", "", note="No random candidate has finite scores: this control has no row.")
        values = score_matrix(on.deciding.tasks, on.deciding.score(genomes), on.deciding.goal).fitness
        genome = genomes[int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))]
        kept.keep("random", settings, genome, {})
    return Control("random", f"best of {population * generations:,} random candidates", np.array(genome, np.float32))


def _adapters(
    problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]], archive: Archive, phase: Phase,
    kept: KeptControls,
) -> Iterator[Control]:  # fmt: skip
    """Adapters of the base and of the best parent, trained on the examples that the search had, for as many passes."""
    passes = passes_of(problem, archive.generations)
    for role, model in _adapted_models(problem, on):
        name = f"LoRA on {label_of(role, model_name(model))}"
        change = _trained(problem, on, model, LORA_ROLES[role], name, passes, phase, kept)
        note = change.describe(problem, name, passes)
        yield Control(LORA_ROLES[role], name, None, change.heldout(), change.facts["search"], note)


@dataclass(frozen=True)
class Change:
    """A trained low-rank change of a model. vector: float32[D], in the layout of `model`; facts: see `_trained`;
    heldout: () -> the held-out scores of the changed model; why_no_gradient: see `why_no_gradient`."""

    vector: np.ndarray
    model: Adaptable
    facts: Mapping[str, Any]
    heldout: Callable[[], TaskScores]
    why_no_gradient: str

    def describe(self, problem: SearchProblem[Backend], name: str, passes: float) -> str:
        """A sentence on how the change was trained."""
        split, facts = "validation" if problem.splits.validation is not None else "search", self.facts
        how = f" by rank-1 evolution strategies, for {self.why_no_gradient}," if self.why_no_gradient else ""
        chosen = (
            f"the best, after {facts['step']} of {facts['steps']} steps at learning rate {facts['rate']:g}, was chosen"
        )
        if not facts["step"]:
            chosen = "no step of it was better than the model as it is,"
        lost = ", ".join(f"{rate:g}" for rate in facts["diverged"])
        diverged = f" It diverged at learning rate {lost}." if lost else ""
        return (
            f"The {name} was trained{how} on the {examples_of(problem)} that the search had, for {passes:,.0f} passes, "
            f"as many as the search took; {chosen} on the {split} split.{diverged}"
        )


def _trained(
    problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]], candidate: Path | np.ndarray, role: str,
    name: str, passes: float, phase: Phase, kept: KeptControls,
) -> Change:  # fmt: skip
    """A low-rank change of a model of the search, or of the candidate of a genome, trained or as it was kept."""
    tuning = Tuning()
    model = cast(Adapts, problem.backend).adaptable(
        candidate, [on.deciding, on.search, on.heldout, *on.tuning], tuning.rank, tuning.scale
    )
    deciding, search, heldout, *parts = model.evaluators
    why = why_no_gradient(problem, on)
    by_gradient = not why
    data = TuningData(parts, deciding, search, Goal(on.search.goal.scales), on.deciding.goal, by_gradient)
    named = str(candidate) if isinstance(candidate, Path) else [float(gene) for gene in candidate]
    settings = {"model": named, "passes": passes, "seed": problem.seed, "by_gradient": by_gradient}
    made = kept.get(role, settings, model.layout.dims)
    if made is None:
        steps = sum(steps * count for steps, count in tuning.schedule(passes, len(parts), by_gradient))
        each = max(part.passes(1 if by_gradient else 2 * tuning.pairs) for part in parts)
        with phase(f"training the {name}", steps * each) as progress:
            tuned = train(model, data, tuning, passes, problem.seed, progress)
        facts = {
            "fitness": tuned.fitness, "search": tuned.search, "rate": tuned.rate, "step": tuned.step,
            "steps": tuned.steps, "diverged": list(tuned.diverged),
        }  # fmt: skip
        made = tuned.vector, facts
        kept.keep(role, settings, *made)
    vector, facts = made
    return Change(vector, model, facts, lambda: heldout.evaluate(vector[None]), why)


def polish(
    problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]], archive: Archive, genome: np.ndarray,
    phase: Phase, folder: RunFolder | None,
) -> tuple[Control, Change]:  # fmt: skip
    """The winner of a genome, trained further with as much work as the search took."""
    kept = KeptControls.read(folder if on.heldout.devices.is_main_process else None)
    passes = passes_of(problem, archive.generations)
    change = _trained(problem, on, genome, POLISHED, POLISHED_NAME, passes, phase, kept)
    scores = change.heldout() if problem.splits.heldout else None
    note = change.describe(problem, POLISHED_NAME, passes)
    return Control(POLISHED, POLISHED_NAME, None, scores, None, note), change


def _adapted_models(problem: SearchProblem[Backend], on: Splits[SpaceEvaluator[Any]]) -> list[tuple[str, Path]]:
    """The models that adapters are trained on, by their roles: the base, and the parent that is best on the examples
    that the winner is chosen on."""
    bases = [] if problem.facts.base is None else [("base", problem.facts.base)]
    if len(problem.parents) == 1:
        return [*bases, ("parent", problem.parents[0])]
    scored = []
    for parent in problem.parents:
        scores = problem.backend.score_stored(parent, on.deciding, lambda done: None)
        scored.append(float(fitness(on.deciding.tasks, scores, on.deciding.goal)[0]))
    best = int(np.argmax(np.where(np.isfinite(scored), scored, -np.inf)))
    return [*bases, ("parent", problem.parents[best])]


def examples_of(problem: SearchProblem[Backend]) -> str:
    """The number of examples that generations were scored on, in words; where tasks share records, after the number of
    the records."""
    tasks = [task for shard in problem.splits.shards for task in shard if task.weight > 0]
    count, names = sum(task.size for task in tasks), {task.name for task in tasks}
    places = [place for task in tasks for _, place in task.contents()]
    # Some kinds of tasks name a line of a file, others the file and the line as one text.
    records = count - len(places) + len({f"{file}:{line}" if line else file for file, line in places})
    if len(names) == 1 or records == count:
        return f"{count:,} examples"
    return f"{records:,} records ({count:,} examples over {len(names)} tasks)"
