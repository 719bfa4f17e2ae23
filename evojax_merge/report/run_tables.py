"""A run in words and tables, for its page and for the terminal."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evojax_merge.errors import escaped, escaped_lines
from evojax_merge.report.answers import winner_scores
from evojax_merge.report.comparison import POLISHED, chosen_on, final, kept_from, label_of, nothing_beat, titled
from evojax_merge.report.drawings import parameter_text
from evojax_merge.report.intervals import paired_lead, unpaired_lead
from evojax_merge.report.run_data import SEARCH_SPLIT, Result, RunData, lead_over
from evojax_merge.report.tables import LEAD, Table, lead_cell, repeated_fitness
from evojax_merge.schema.budget import Budget, parse_budget
from evojax_merge.search.run_folder import INPUTS
from evojax_merge.search.run_schema import GROUPS
from evojax_merge.system.console import drawn, format_seconds

# The heading of a column with the unit of each run's fitness.
UNIT = "unit of fitness"
# The rows of a table of keys, and the keys that a sentence lists.
MOST_ROWS, MOST_UNLIKE = 400, 6


class PrintedTable(list[dict[str, Any]]):
    """Rows that `print` shows as a table, with a column for each key, and for each key of a mapping in them."""

    def __str__(self) -> str:
        nested = [[value if isinstance(value, dict) else {key: value} for key, value in row.items()] for row in self]
        rows = [{key: value for part in parts for key, value in part.items()} for parts in nested]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(key) for key in columns] for row in rows]
        words = {number for row in cells for number, value in enumerate(row) if isinstance(value, str)}
        return drawn(Table(columns, cells, frozenset(range(len(columns))) - words).terminal())


def facts(run: RunData) -> str:
    wanted, last = run.search.get("generations"), run.last
    strategy = str(run.search.get("strategy") or "")
    parts = [run.method, strategy if strategy != run.method else ""]
    parts.append(f"{run.count} generations" if wanted in (None, run.count) else f"{run.count} of {wanted} generations")
    if last is not None:
        parts += [f"population {len(last.fitness)}", f"{last.evaluations} evaluations"]
    if "seed" in run.config:
        parts.append(f"seed {run.config['seed']}")
    return escaped(" · ".join(part for part in parts if part))


@dataclass(frozen=True)
class Figure:
    """A figure at the top of a page. scores: below it one for each task, by its heading."""

    label: str
    value: float | None
    unit: str = ""
    is_winner: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)


def headline(run: RunData) -> list[Figure]:
    """The figures at the top of a run's page: of each model one for each task, where the fitness is not it."""
    result, best = run.result, run.best
    if result is None:
        return [] if best is None else [Figure(f"{best.name}, {best.where}", best.value, is_winner=True)]
    unit = escaped(result.units.get("fitness", ""))
    if not result.table or result.winner is None:
        scores = result.validation_fitness or result.search_fitness
        label = f"winner, {result.chosen_on} split"
        return [Figure(label, value, unit, True) for name, value in scores.items() if name == "winner"]
    winner = result.winner
    names = [
        name
        for name in result.shares or winner.heldout_scores
        if any(row.heldout_scores.get(name) != row.heldout_fitness for row in result.table)
    ]

    def scores_of(scores: Mapping[str, float]) -> dict[str, float]:
        return {escaped(titled(name, result.units)): scores[name] for name in names if name in scores}

    figures = [
        Figure(
            f"winner, {final(result.held_out)}", winner.heldout_fitness, unit, True, scores_of(winner.heldout_scores)
        )
    ]
    # The winner, trained further, is no rival of the winner.
    polished = [row for row in result.table if row.role == POLISHED]
    for row in polished + sorted(result.rivals, key=lambda row: -row.heldout_fitness):
        role = {"parent": f"best parent {row.name}", "base": "base"}.get(row.role, label_of(row.role, row.name))
        scores = scores_of(row.heldout_scores)
        figures.append(Figure(f"{escaped(role)}, {final(result.held_out)}", row.heldout_fitness, unit, scores=scores))
    return figures


def sentences(result: Result) -> list[str]:
    """The results of the run: a sentence for each rival of the winner, and how the winner was chosen."""
    lines = list(map(escaped, result.verdicts))
    scores = result.validation_fitness if result.chosen_on == "validation" else result.search_fitness
    texts = [f"the {escaped(name)} {value:.4f}" for name, value in scores.items() if name != "winner"]
    if "winner" not in scores:
        return lines
    more = f", {texts[0]}" if texts else ""
    unit = f" ({escaped(result.units['fitness'])})" if "fitness" in result.units else ""
    lines += [f"{chosen_on(result.chosen_on)}: there it scored {scores['winner']:.4f}{unit}{more}."]
    lines += [
        nothing_beat(escaped(name)) for name, value in scores.items() if name != "winner" and scores["winner"] <= value
    ]
    if result.kept_from is not None:
        lines.append(kept_from(result.kept_from))
    if result.stopped_by is not None:
        lines.append(f"The search was ended by its criterion {escaped(result.stopped_by)}.")
    return lines


def notes(run: RunData) -> list[str]:
    notes = list(map(escaped, run.notes))
    if run.state == "finished":
        return notes
    if not run.count:
        begun = "is still in its first generation" if run.state == "running" else "was stopped in its first generation"
        return [*notes, f"The run {begun}: there is nothing to show yet."]
    if run.state == "running":
        return [*notes, f"The run is not finished: this is its state after generation {run.count}, without a winner."]
    return [*notes, f"The run was stopped after generation {run.count}, and has chosen no winner since."]


def heldout_table(result: Result) -> Table:
    scores = list(dict.fromkeys(name for scored in result.table for name in scored.heldout_scores))
    rows = [
        [
            label_of(scored.role, scored.name),
            scored.heldout_fitness,
            lead_cell(lead_over(result, scored), has_too_few_votes=result.is_judged and scored.role != "winner"),
            *(scored.heldout_scores.get(name) for name in scores),
        ]
        for scored in result.table
    ]
    winner = next((number for number, scored in enumerate(result.table) if scored.role == "winner"), None)
    columns = ["model", titled("fitness", result.units), LEAD, *(titled(name, result.units) for name in scores)]
    numbers = range(1, len(columns))
    return Table(columns, rows, numbers, winner, folded=numbers, repeated=repeated_fitness(rows))


def front_table(result: Result) -> Table:
    names = list(result.members[0].scores)
    heldout = list(result.members[0].heldout_scores)
    rows = [
        [member.member, member.fitness, *(member.scores.get(name) for name in names), member.heldout_fitness,
         *(member.heldout_scores.get(name) for name in heldout)]
        for member in result.members
    ]  # fmt: skip
    columns = [
        "member", *(f"{titled(name, result.units)}, {result.chosen_on}" for name in ("fitness", *names)),
        *(f"{titled(name, result.units)}, {final(result.held_out)}" for name in ("fitness", *heldout)),
    ]  # fmt: skip
    winner = next((k for k, member in enumerate(result.members) if member.genome == result.genome), None)
    return Table(columns, rows, frozenset(range(len(columns))), winner)


def lineage_table(result: Result) -> Table:
    rows = [
        [member.name, member.method, " and ".join(member.parents),
         "; ".join(f"{name} {parameter_text(value)}" for name, value in member.parameters.items()), member.split]
        for member in result.lineage
    ]  # fmt: skip
    columns = ["member", "method", "parents", "parameters", "parents change places at layer"]
    return Table(columns, rows, frozenset({4}), len(rows) - 1)


def mapping_table(label: str, mapping: Mapping[str, Any]) -> Table:
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in mapping.items()]
    more = [[f"… and {len(rows) - MOST_ROWS} more", ""]] if len(rows) > MOST_ROWS else []
    return Table(["", label], [*rows[:MOST_ROWS], *more], wrap=True)


def best_cell(run: RunData) -> float | str | None:
    """The best fitness in a column of those on the search split, which is named where it is another."""
    best = run.best
    return best if best is None else best.value if best.where == SEARCH_SPLIT else f"{best.value:.4f} {best.where}"


def progress_cell(run: RunData) -> str:
    """The generations so far, of those that are planned; with a budget, also the part of it that they took."""
    budget, wanted = parse_budget(str(run.search.get("budget"))) or Budget(), run.search.get("generations")
    if budget.seconds is not None:
        return f"{run.count}; {format_seconds(run.seconds)} of {format_seconds(budget.seconds)}"
    if budget.passes is None:
        return str(run.count) if wanted is None else f"{run.count}/{wanted}"
    counts = [generation.row.examples for generation in run.generations]
    # Of a long run not every generation is read. Steps that follow gradients take more than their examples say.
    passes = run.count * sum(map(sum, counts)) / max(1, len(counts) * max(map(max, filter(None, counts)), default=1))
    return f"{run.count}; {'' if run.search.get('gradient') else f'{passes:,.0f} of '}{budget.passes:,.0f} passes"


def fitness_units(runs: Mapping[str, RunData]) -> dict[str, str]:
    """The unit of each run's fitness, by the run's name, where the runs with a result have several; else empty."""
    units = {name: run.result.units.get("fitness", "") for name, run in runs.items() if run.result is not None}
    return units if len({*units.values()}) > 1 else {}


def runs_table(runs: Mapping[str, RunData]) -> Table:
    """A line for each run: its state, its progress, its best fitness and its winner's held-out scores."""
    rows, units = [], fitness_units(runs)
    for name, run in runs.items():
        winner, worse = run.outcome.winner, None
        best = [row.heldout_fitness for row in run.outcome.rivals if row.role == "parent"]
        if run.outcome.shares:
            # The tasks on which the winner is worse than the base or a parent, beyond noise.
            worse = ", ".join(dict.fromkeys(loss.score.rpartition("/")[0] for loss in run.outcome.worse_on)) or "none"
        whole = run.whole_seconds
        time = f"{format_seconds(run.seconds)} in generations" if whole is None else format_seconds(whole)
        rows.append(
            [name, run.method, run.state, progress_cell(run), *([units.get(name, "")] if units else []), best_cell(run),
             None if winner is None else winner.heldout_fitness,
             best[0] if best else None, worse, time]
        )  # fmt: skip
    columns = [
        "run", "method", "state", "generations", *([UNIT] if units else []), "best fitness", "winner, held out",
        "best parent, held out", "worse on", "time",
    ]  # fmt: skip
    words = ("run", "method", "state", UNIT, "worse on")
    return Table(columns, rows, frozenset(number for number, name in enumerate(columns) if name not in words))


def winners_table(runs: Mapping[str, RunData]) -> Table:
    winners = {name: winner for name, run in runs.items() if (winner := run.outcome.winner) is not None}
    units = {score: unit for name in winners for score, unit in runs[name].outcome.units.items()}
    scores = list(dict.fromkeys(score for winner in winners.values() for score in winner.heldout_scores))
    by_run = fitness_units({name: runs[name] for name in winners})
    rows = [
        [name, *([by_run[name]] if by_run else []), winner.heldout_fitness,
         *(winner.heldout_scores.get(score) for score in scores)]
        for name, winner in winners.items()
    ]  # fmt: skip
    columns = ["run", *([UNIT, "fitness"] if by_run else [titled("fitness", units)])]
    columns += [titled(score, units) for score in scores]
    return Table(columns, rows, frozenset(range(1 + bool(by_run), len(columns))))


def gaps_table(runs: Mapping[str, RunData]) -> Table | None:
    """The lead of each later run's winner over the first run's on every task that both scored by the same metric; None
    where no two winners have such a task."""
    (first, theirs), *others = ((name, winner_scores(run)) for name, run in runs.items())
    units = {score: unit for run in runs.values() for score, unit in run.outcome.units.items()}
    rows = []
    for name, ours in others:
        for score in (score for score in ours if score in theirs):
            (examples, scores), (their_examples, their_scores) = ours[score], theirs[score]
            if examples == their_examples:
                lead, how = paired_lead([scores], [their_scores], [1.0]), f"the same {len(scores)}, paired"
            else:
                lead = unpaired_lead(scores, their_scores)
                how = f"{len(scores)} and {len(their_scores)} others, unpaired"
            rows.append([name, titled(score, units), lead_cell(lead), how])
    return Table(["run", "task", f"ahead of {first} by (95% interval)", "examples"], rows) if rows else None


def task_note(runs: Mapping[str, RunData]) -> str | None:
    """A sentence on the tasks, or keys of a task, in which the runs differ; None where there are none. A key that a run
    of an earlier version lacks does not count."""
    sections = []
    for run in runs.values():
        sections.append({str(task.get("name")): dict(_flat(task)) for task in run.config.get("tasks", ())})
    names = dict.fromkeys(name for section in sections for name in section)
    unlike = [name for name in names if not all(name in section for section in sections)]
    shared = [name for name in names if name not in unlike]
    for name in shared:
        texts = [section[name] for section in sections]
        keys = dict.fromkeys(key for text in texts for key in text)
        unlike += [f"{name}.{key}" for key in keys if len({text[key] for text in texts if key in text}) > 1]
    if len({str(run.config.get("scale")) for run in runs.values()}) > 1:
        unlike.append("scale")
    if not unlike:
        return None
    more = f" and {len(unlike) - MOST_UNLIKE} more" if len(unlike) > MOST_UNLIKE else ""
    listed_keys = escaped(", ".join(unlike[:MOST_UNLIKE]))
    return f"The tasks of the runs differ ({listed_keys}{more}): their fitnesses do not compare."


def differences(runs: Mapping[str, RunData]) -> Table:
    """The keys of the configs in which the runs differ, without input hashes and groups of tensors."""
    settings = [{key: part for key, part in run.config.items() if key not in (INPUTS, GROUPS)} for run in runs.values()]
    flat = [dict(_flat(document)) for document in settings]
    keys = dict.fromkeys(key for document in flat for key in document)
    rows = [
        [key, *(_short(document.get(key, "–")) for document in flat)]
        for key in keys
        if len({document.get(key, "–") for document in flat}) > 1
    ]
    return Table(["key", *runs], rows[:MOST_ROWS], wrap=True)


def _flat(document: Any, key: str = "") -> list[tuple[str, str]]:
    """A document's leaves by their paths, as texts. Sections of a list go by their names, or their numbers."""
    if isinstance(document, list) and document and all(isinstance(part, dict) for part in document):
        document = {str(part.get("name", number)): part for number, part in enumerate(document)}
    if isinstance(document, dict) and document:
        return [leaf for name, part in document.items() for leaf in _flat(part, f"{key}.{name}" if key else str(name))]
    return [(key, escaped_lines(document if isinstance(document, str) else json.dumps(document, default=str)))]


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:80]} … {text[-30:]}"
