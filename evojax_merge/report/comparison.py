"""The final table: the winner beside the base, the parents and the uniform merge, on held-out examples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.checkpoints.derived import parts_of
from evojax_merge.checkpoints.references import hub_id
from evojax_merge.evaluation.scores import Scale
from evojax_merge.report.intervals import NOISE, SAME, TOO_FEW, Lead
from evojax_merge.report.meetings import Meetings
from evojax_merge.report.winner import WinnerReport
from evojax_merge.system.file_system import atomic_write
from evojax_merge.tasks.python_functions import PREFIX, is_reference

UNIFORM = "uniform merge"
# The roles of controls, and of those whose names stand for themselves.
ADAPTERS = ("lora_base", "lora_parent")
NAMED_CONTROLS = ("random", *ADAPTERS)
CONTROLS = ("greedy", *NAMED_CONTROLS)
# The start of a sentence about a difference within noise.
NOT_TOLD = "{} {} cannot be told from"
# The winner, trained further: its role and its name.
POLISHED, POLISHED_NAME = "polished", "polished winner"


@dataclass(frozen=True)
class Row:
    """One line of the final table: held-out scores of a model. lead: the winner's lead over the model; None where there
    is no winner, or no finite score. task_leads: `task/metric` -> the lead in this task alone, over the base and the
    parents; units: that of each score that has one, and of `fitness`; meetings: `task/metric` -> the
    winner's meetings with the model, of each task that people judge."""

    role: str
    name: str
    fitness: float
    scores: dict[str, float]
    lead: Lead | None = None
    task_leads: Mapping[str, Lead] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    meetings: Mapping[str, Meetings] = field(default_factory=dict)

    @property
    def is_same(self) -> bool:
        """Return whether the winner has the same score on every example."""
        return self.lead is not None and self.lead.remark == SAME

    @property
    def has_too_few_votes(self) -> bool:
        return any(meetings.too_few for meetings in self.meetings.values())


def label_of(role: str, name: str) -> str:
    """A model of the table in words, the same on every page: its name behind its role, or one of both."""
    if role in ("winner", "uniform"):
        return UNIFORM if role == "uniform" else role
    return (
        name if role in ("model", name, POLISHED, *NAMED_CONTROLS) or name.startswith(f"{role} ") else f"{role} {name}"
    )


def titled(score: str, units: Mapping[str, str]) -> str:
    """The heading of a score, with its unit."""
    return f"{score} ({units[score]})" if score in units else score


@dataclass(frozen=True)
class FrontMember:
    """A member of the front, by its number from 1 on; genome: float32[D]. fitness, and `scores`, `task/metric` -> mean
    for the tasks that count: on the examples that the winner was chosen on; `heldout_fitness` and `heldout_scores`: on
    the held-out ones."""

    member: int
    fitness: float
    scores: dict[str, float]
    heldout_fitness: float
    heldout_scores: dict[str, float]
    genome: np.ndarray


@dataclass(frozen=True)
class GuardResult:
    """A guarded score `task/metric`: the means of the winner and of the base on the examples that the winner was chosen
    on, and `kept`: whether the winner's is at most `tolerance` below. heldout: both on the held-out examples, None
    without any."""

    score: str
    tolerance: float
    winner: float
    base: float
    kept: bool
    heldout: tuple[float, float] | None = None

    def describe(self, unit: str) -> str:
        state = "keeps" if self.kept else "BREAKS"
        allowed = f", of which {self.tolerance:g} less was allowed" if self.tolerance else ""
        heldout = "" if self.heldout is None else "; held out {:.4f} and {:.4f}".format(*self.heldout)
        return (
            f"The winner {state} the guard of {_task_of(self.score)} ({_metric_of(self.score)}): it has "
            f"{self.winner:.4f}{_bracketed(unit)}, the base {self.base:.4f}{allowed}{heldout}."
        )


@dataclass(frozen=True)
class Result:
    """The winner and its comparison with other models.

    `baseline`: the candidate that needs no search (the uniform merge, the first parent as it is, or the best of a
    pool's founders, by the split that the winner was chosen on) and its fitness on the search split; `baseline_name`:
    the parent's or founder's name. `rows`: the held-out table, empty without held-out examples. `scores`: the winner's
    on the examples that it was chosen on, float32[N], task by task. `report`: shows the winner. `validation`: the
    winner's fitness and the baseline's on the validation split, where the winner was chosen on one; None: it was chosen
    on the search split. `stopped_by`: the criterion that ended the search before its last generation. `members`: the
    front, where the strategy keeps one. `compute_dtype`: the dtype of these scores' computation;
    `search_compute_dtype`: of the generations'. `shares`: `task/metric` of each task of the table -> its share of the
    fitness; `scales`: the scale of each that has one; `guards`: of each guarded task; `answers`: the winner's and the
    best parent's to each held-out example, a row of plain values each; `parent`: the parent that the winner is, in
    words, empty where it is a merge. `controls`: sentences on how controls were made; `change`: of the winner by
    polish, None where it is not polished or was better before; `examples`: the number of those that the search had, in
    words; `fitted`: the fitness on the search split of controls that were trained there, by role; `held_out`: whether
    the table's examples are kept from the search; otherwise no task that counts has examples; `kept_from`: the
    generations of the run's earlier end that had this winner, where the later ones have none as good.
    """

    genome: np.ndarray
    search_fitness: float
    baseline: tuple[str, float]
    rows: list[Row]
    report: WinnerReport
    validation: tuple[float, float] | None = None
    stopped_by: str | None = None
    members: tuple[FrontMember, ...] = ()
    compute_dtype: str = "float32"
    search_compute_dtype: str = "float32"
    baseline_name: str = ""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    shares: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)
    guards: tuple[GuardResult, ...] = ()
    answers: Sequence[dict[str, Any]] = field(default=(), repr=False)
    parent: str = ""
    controls: tuple[str, ...] = ()
    change: Any = field(default=None, repr=False)
    examples: str = ""
    fitted: Mapping[str, float] = field(default_factory=dict)
    held_out: bool = True
    kept_from: int | None = None

    @property
    def winner(self) -> Row:
        return next(row for row in self.rows if row.role == "winner")

    @property
    def rivals(self) -> list[Row]:
        """The models that a search has to beat on held-out data: the base, the best parent, the uniform merge or the
        plain mixture, and the controls, where these exist."""
        parents = [row for row in self.rows if row.role == "parent"]
        best = max(parents, key=lambda row: row.fitness if np.isfinite(row.fitness) else -np.inf, default=None)
        return [row for row in self.rows if row is best or row.role in ("base", "uniform", "plain", *CONTROLS)]

    def chosen_on(self) -> str:
        """A sentence: the split that the winner was chosen on, its score there, and the dtype where that is not the
        generations'; then one more where no candidate was better than the baseline."""
        (kind, searched), search_fitness = self.baseline, self.search_fitness
        label = f"{kind} {self.baseline_name}".rstrip()
        unit = _bracketed(self.winner.units.get("fitness", "")) if self.rows else ""
        winner, baseline = (search_fitness, searched) if self.validation is None else self.validation
        unbeaten = f" {nothing_beat(label)}" if winner <= baseline else ""
        if self.kept_from is not None:
            unbeaten += f" {kept_from(self.kept_from)}"
        dtypes = ""
        if self.compute_dtype != self.search_compute_dtype:
            dtypes = f" (computed in {self.compute_dtype}, the generations in {self.search_compute_dtype})"
        searched_on = f"; on the search split {search_fitness:.4f}, the {label} {searched:.4f}"
        return (
            f"{chosen_on(self.split)}: there it scored {winner:.4f}{unit}, the {label} {baseline:.4f}"
            f"{'' if self.validation is None else searched_on}{dtypes}.{unbeaten}"
        )

    @property
    def split(self) -> str:
        """The split that the winner was chosen on."""
        return "search" if self.validation is None else "validation"

    def front(self) -> list[Row]:
        """The members as rows of a table, with their scores on each task, on the examples that the winner was chosen on
        and on the held-out ones."""
        split, units, rows = self.split, self.winner.units, []
        for member in self.members:
            is_winner = np.array_equal(member.genome, self.genome)
            label = f"member {member.member}" + (" (the winner)" if is_winner else "")
            columns = {f"{titled(name, units)}, {split}": value for name, value in member.scores.items()}
            columns |= {
                f"{titled(name, units)}, {final(self.held_out)}": value for name, value in member.heldout_scores.items()
            }
            rows.append(Row("model", label, member.fitness, columns, units=units))
        return rows

    def verdicts(self) -> list[str]:
        """Sentences about the winner: that it is a parent, if it is, the headline, that no candidate keeps all guards,
        and one for each guard. Then one for each rival: by how much the winner is better on held-out data; where it is
        not better, or by no more than noise or the printed digits, both figures. No sentence for a rival that the
        winner beats by an unknown margin. Then a sentence for each task on which the winner is worse than the base or a
        parent beyond noise, and for each that does not tell the models of the table apart."""
        parent = f"The winner is {self.parent}, unchanged: nothing that was searched beat it on the {self.split} split."
        hopeless = "None of the candidates that the winner was chosen from keeps every guard: it breaks them least."
        guards = [*([] if all(guard.kept for guard in self.guards) else [hopeless]), *map(self._guard, self.guards)]
        by_rival = [sentence for row in self.rivals for sentence in self._sentences(row)]
        first = [*([parent] if self.parent else []), *self.headline()]
        columns = {score: {row.scores[score] for row in self.rows} for score in self.shares}
        ties = [
            f"{self._on(score)} ({_weighed(score, self.shares[score])}) every model of the table "
            f"scores {value:.4f}: they tell no model from another."
            for score, values in columns.items()
            if len(values) == 1 and np.isfinite(value := next(iter(values)))
        ]
        return [
            *first,
            *self._unmeasured(),
            *guards,
            *by_rival,
            *self._inherited(),
            *ties,
            *self.controls,
            *self._matched(),
            *self._polished(),
        ]

    def _unmeasured(self) -> list[str]:
        """A sentence for each task on which the winner has no finite score on held-out data."""
        columns = {score: np.array([row.scores[score] for row in self.rows]) for score in self.shares}
        return [
            f"{self._on(score)} ({_metric_of(score)}) {(~np.isfinite(values)).sum()} of "
            f"{len(values)} models have no finite score, the winner among them: look at these examples, and at what "
            "the task makes of them."
            for score, values in columns.items()
            if not np.isfinite(self.winner.scores[score])
        ]

    def _polished(self) -> list[str]:
        """A sentence on what polishing brought on held-out data."""
        row = next((row for row in self.rows if row.role == POLISHED), None)
        if row is None or row.lead is None:
            return []
        gain, unit, lead = -row.lead.difference, self.winner.units.get("fitness", ""), row.lead
        if lead.remark == SAME:
            return ["Polishing changes no answer to a held-out example."]
        if lead.remark == TOO_FEW:
            side = "ahead of" if gain > 0 else "behind"
            return [f"{self._data} {POLISHED_NAME} is {side} the winner by {abs(gain):.4f}: {TOO_FEW} more."]
        interval = _interval(Lead(gain, -lead.high, -lead.low), unit)
        if lead.remark == NOISE:
            sentence = NOT_TOLD.format(self._data, POLISHED_NAME)
            return [f"{sentence} the winner: a difference of {gain:.4f}, which is {NOISE} ({interval})."]
        side = "better" if gain > 0 else "worse"
        return [f"{self._data} {POLISHED_NAME} is {side} than the winner by {abs(gain):.4f} ({interval})."]

    def _matched(self) -> list[str]:
        """Sentences about the controls: those that the winner is not ahead of, and adapters that fitted the search's
        examples better than the winner, which is ahead of them on others."""
        rows, sentences = [row for row in self.rows if row.role in CONTROLS], []
        matched = [_named(row) for row in rows if row.lead is not None and not row.lead.low > 0]
        if matched:
            sentences.append(f"Nothing shows that the search was worth more than {' or '.join(matched)}.")
        beaten = [row for row in rows if row.lead is not None and row.lead.low > 0]
        for row in (row for row in beaten if self.fitted.get(row.role, -np.inf) > self.search_fitness):
            sentences.append(
                f"On the search split the {row.name} has {self.fitted[row.role]:.4f}, the winner "
                f"{self.search_fitness:.4f}: it learned these {self.examples} better and others worse, so that with "
                "more of them it may be ahead."
            )
        return sentences

    def headline(self) -> list[str]:
        """A sentence on several tasks, each beside the parent that is best at it; none where there is one task."""
        outcomes: dict[str, list[str]] = {"": []}
        for score in self.shares:
            parent = self._best_parent(score)
            lead = None if parent is None else parent.task_leads.get(score)
            if parent is not None and lead is not None:
                rounded = "" if round(lead.difference, 4) else f"{SAME} when rounded"
                outcome = lead.remark or rounded or ("" if lead.difference > 0 else "worse")
                unit = f" {self.winner.units[score]}" if score in self.winner.units else ""
                gap = f" ({lead.difference:+.4f}{unit} against {parent.name})" if outcome != SAME else ""
                outcomes.setdefault(outcome, []).append(_task_of(score) + gap)
        count = sum(map(len, outcomes.values()))
        better = f"better than the best parent on {len(outcomes[''])} of {count} tasks"
        listed = f"{': ' if outcomes[''] else ''}{', '.join(outcomes.pop(''))}"
        others = "".join(f"; {outcome} on {', '.join(tasks)}" for outcome, tasks in outcomes.items())
        return [] if count < 2 else [f"{self._data} winner is {better}{listed}{others}."]

    def _best_parent(self, score: str) -> Row | None:
        """The parent of the highest finite score, by `task/metric`."""
        parents = [row for row in self.rows if row.role == "parent" and np.isfinite(row.scores.get(score, np.nan))]
        return max(parents, key=lambda row: row.scores[score], default=None)

    def warnings(self) -> list[str]:
        """The verdicts on tasks without a finite score, on rivals of a higher fitness, and on all else in which the
        winner is worse."""
        better = [row for row in self.rivals if self.winner.fitness < row.fitness and not row.is_same]
        rivals = [row for row in better if not row.has_too_few_votes]
        worse = [sentence for row in rivals for sentence in self._sentences(row)]
        broken = [self._guard(guard) for guard in self.guards if not guard.kept]
        return [*self._unmeasured(), *broken, *worse, *self._inherited(), *self._matched()[:1]]

    @property
    def _data(self) -> str:
        """The start of a sentence about a model."""
        return "On held-out data the" if self.held_out else "The"

    def _on(self, score: str) -> str:
        """The start of a sentence about a task, by its score `task/metric`."""
        return f"On {'the held-out examples of ' if self.held_out else ''}{_task_of(score)}"

    def _sentences(self, row: Row) -> list[str]:
        """The verdict on the winner and a rival. Judges' votes speak in its place where they are the whole fitness, or
        too few."""
        judged = [meetings.sentence(_named(row)) for meetings in row.meetings.values()]
        is_judged = bool(row.meetings) and row.meetings.keys() >= row.scores.keys()
        fitness = None if is_judged or row.has_too_few_votes else verdict(self.winner, row, self._data)
        return judged if fitness is None else [fitness, *judged]

    def _guard(self, guard: GuardResult) -> str:
        return guard.describe(self.winner.units.get(guard.score, "") if self.rows else "")

    def measured(self) -> str | None:
        """A sentence on the unit of the fitness; None: it is that of the metrics."""
        if not self.scales:
            return None
        scored = ", ".join(
            f"{_task_of(score)} 0 for {scale.zero:.4f} and 1 for {scale.zero + scale.unit:.4f}"
            for score, scale in self.scales.items()
        )
        return f"Fitness measures tasks by the parents' scores on the search split (scale: parents): {scored}."

    def losses(self) -> list[tuple[str, list[Row]]]:
        """For each score `task/metric` that is not the fitness itself, and in which the winner is worse beyond noise:
        the base and the parent that is best at it, as far as they are better."""
        bases, losses = [row for row in self.rows if row.role == "base"], []
        for score in (score for score, share in self.shares.items() if share != 1):
            others = [row for row in (*bases, self._best_parent(score)) if row is not None and score in row.task_leads]
            better = [row for row in others if row.task_leads[score].high < 0]
            losses += [(score, better)] if better else []
        return losses

    def _inherited(self) -> list[str]:
        """A sentence for each of the losses: what the merge inherited that nobody asked for."""
        return [
            f"{self._on(score)} ({_weighed(score, self.shares[score])}) the winner is worse "
            "than " + " and than ".join(
                f"{_named(row, 'parent')} by {-row.task_leads[score].difference:.4f} "
                f"({_interval(row.task_leads[score], self.winner.units.get(score, ''))})"
                for row in rows
            ) + "."
            for score, rows in self.losses()
        ]  # fmt: skip


def chosen_on(split: str) -> str:
    """The start of a sentence: the split that the winner was chosen on, and why its score is not the generations' best
    fitness."""
    how = {
        "search": "where the finalists (the best candidates and any last proposal of the strategy) were scored again",
        "validation": "on which no generation was scored",
    }
    return f"The winner was chosen on the {split} split, {how[split]}"


def nothing_beat(label: str) -> str:
    """The sentence about a baseline, by its label, that is as good as the winner."""
    return f"Nothing that was searched beat the {label}."


def kept_from(generations: int) -> str:
    """The sentence about a winner that is that of an earlier end of the run."""
    return f"It is the winner of the run's first {generations} generations: no later finalist scored better there."


def verdict(winner: Row, row: Row, data: str = "On held-out data the") -> str | None:
    """The sentence about the winner and a rival; see `Result.verdicts`. data: its start."""
    lead, name, ours, unit = row.lead, _named(row), winner.fitness, winner.units.get("fitness", "")
    if not np.isfinite(ours):
        failed = f"{data} winner has no finite score; {name} has {row.fitness:.4f}."
        return failed if np.isfinite(row.fitness) else None
    start, remark = f"{data} winner is", "" if lead is None else lead.remark
    if remark == SAME:
        return f"{start} the same as {name}, example by example: both have {ours:.4f}{_bracketed(unit)}."
    if remark == TOO_FEW:
        both = [f"{value:.4f}" for value in (ours, row.fitness)]
        side = "level with" if both[0] == both[1] else "ahead of" if ours > row.fitness else "behind"
        return f"{start} {side} {name}, {' to '.join(both)}{_bracketed(unit)}: {TOO_FEW} which is better."
    if ours > row.fitness or not np.isfinite(row.fitness):
        if lead is None:
            return None
        if round(lead.difference, 4) == 0:
            return f"{start} no better than {name}: both have {ours:.4f}, rounded ({_interval(lead, unit)})."
        if remark != NOISE:
            return f"{start} better than {name} by {lead.difference:.4f} ({_interval(lead, unit)})."
    elif ours == row.fitness:
        spread = "" if lead is None else f" (of the difference, {_interval(lead, unit)})"
        return f"{start} only as good as {name}: both have {ours:.4f}{spread}."
    shown = [f"{value:.4f}" for value in (ours, row.fitness)]
    if shown[0] == shown[1]:
        shown = [repr(float(value)) for value in (ours, row.fitness)]
    start, noise = (f"{start} worse than", "") if remark != NOISE else (NOT_TOLD.format(data, "winner"), f", {NOISE}")
    spread = "" if lead is None else f" (a difference of {lead.difference:.4f}{noise}; {_interval(lead, unit)})"
    return f"{start} {name}: it has {shown[0]}, that has {shown[1]}{spread}."


def _named(row: Row, parent: str = "best parent") -> str:
    """A rival in a sentence."""
    named = "" if row.name == row.role else f" {row.name}"
    by_role = {"base": f"the base{named}", "uniform": f"the {UNIFORM}", "greedy": f"the greedy{named}",
               "plain": f"the{named}"}  # fmt: skip
    by_role |= dict.fromkeys(NAMED_CONTROLS, f"the{named}")
    return by_role.get(row.role, f"the {parent}{named}")


def _weighed(score: str, share: float) -> str:
    """The metric of a score `task/metric`, and that it counts for nothing where it does."""
    return _metric_of(score) if share else f"{_metric_of(score)}, weight 0"


def _task_of(score: str) -> str:
    """The task in the name of a score, `task/metric`."""
    return score.rpartition("/")[0]


def _metric_of(score: str) -> str:
    """The metric in the name of a score, `task/metric`."""
    return score.rpartition("/")[2]


def _interval(lead: Lead, unit: str) -> str:
    interval = "exactly" if lead.low == lead.high else f"95% interval {lead.low:.4f} to {lead.high:.4f}"
    return f"{unit}{', ' if unit else ''}{interval}"


def scores_title(held_out: bool) -> str:
    """The title of the table; see `Result.held_out`."""
    return "Held-out scores" if held_out else "Final scores"


def final(held_out: bool) -> str:
    """The word for scores of a table; see `Result.held_out`."""
    return "held out" if held_out else "final"


def _bracketed(unit: str) -> str:
    return f" ({unit})" if unit else ""


def model_name(path: Path) -> str:
    """A model's name in tables: its hub id, else its folder, or its run where a search made it; for a model of several
    parts, the names of all."""
    return "+".join(map(_part_name, parts_of(path)))


def model_names(paths: Sequence[Path]) -> list[str]:
    """The names of several models in tables; their whole paths where two names would be equal."""
    names = list(map(model_name, paths))
    return names if len(set(names)) == len(names) else list(map(str, paths))


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that differ."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*ends[-length:])) for ends in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def _part_name(path: Path) -> str:
    if is_reference(str(path)):
        return str(path).removeprefix(PREFIX).rpartition("@")[0]
    name = hub_id(path)
    if name is not None:
        return name
    return path.parent.parent.name if path.parts[-2:] == ("best", "model") else path.name


def write_result(result: Result, generations: int, file: Path, tensors: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write `result.json`: the table and the winner. tensors: the account of its tensors. Nothing in it depends on the
    clock, except where the clock ended the search."""
    winner, compared = result.winner, ("winner", result.baseline[0])
    members = [vars(member) | {"genome": [float(gene) for gene in member.genome]} for member in result.members]
    document = {
        "generations": generations,
        "table": [
            {
                "role": row.role, "name": row.name, "heldout_fitness": row.fitness, "heldout_scores": row.scores,
                # The 95% interval of the winner's lead over the model; null: too few examples to say.
                **({} if row.lead is None else {"interval": row.lead.interval}),
            }
            for row in result.rows
        ],
        # For each rival's role: whether the winner is better on held-out data, both figures, and the 95% interval of
        # the difference.
        "better_than": {
            row.role: {
                "name": row.name, "better": winner.fitness > row.fitness and not row.is_same,
                "winner_heldout_fitness": winner.fitness, "heldout_fitness": row.fitness,
                "interval": None if row.lead is None else row.lead.interval,
                "within_noise": None if row.lead is None else row.lead.within_noise,
            }
            for row in result.rivals
        },
        # For each task on which the winner is worse beyond noise: the base and the task's best parent, where these are
        # better.
        "worse_on": [
            {
                "score": score, "role": row.role, "name": row.name,
                "winner_heldout_score": winner.scores[score], "heldout_score": row.scores[score],
                "interval": [row.task_leads[score].low, row.task_leads[score].high],
            }
            for score, rows in result.losses()
            for row in rows
        ],
        **({} if not tensors else {"tensors": list(tensors)}),
        # Each task's share of the fitness, by its score; the unit of each score that has one, and of the fitness.
        "shares": dict(result.shares),
        "units": dict(winner.units),
        # For each guarded task, on the examples of `chosen_on`.
        **({} if not result.guards else {"guards": list(map(asdict, result.guards))}),
        "verdicts": [*([] if (measured := result.measured()) is None else [measured]), *result.verdicts()],
        "warnings": result.warnings(),
        **({} if result.held_out else {"held_out": False}),
        "chosen_on": result.split,
        "search_fitness": dict(zip(compared, (result.search_fitness, result.baseline[1]), strict=True)),
        **({} if result.validation is None
           else {"validation_fitness": dict(zip(compared, result.validation, strict=True))}),
        # A mean counts as its distance from `zero`, in units of `unit`.
        **({} if not result.scales else {"scales": {name: asdict(scale) for name, scale in result.scales.items()}}),
        **({"best_founder": result.baseline_name} if result.baseline[0] == "best founder" else {}),
        # The dtype of every score in this file; `history.jsonl` has those of the generations, in the config's
        # evaluation.compute_dtype.
        "compute_dtype": result.compute_dtype,
        **({} if result.stopped_by is None else {"stopped_by": result.stopped_by}),
        # The generations of the earlier end whose winner this is.
        **({} if result.kept_from is None else {"kept_from": result.kept_from}),
        # The fitness on the search split of the controls that were trained there, by role.
        **({} if not result.fitted else {"controls_search_fitness": dict(result.fitted)}),
        # Candidates that no other beats in all tasks; scores and fitness are on the examples of `chosen_on`.
        **({"members": members} if members else {}),
        **result.report.document(),
        "genome": [float(gene) for gene in result.genome],
    }  # fmt: skip
    atomic_write(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
