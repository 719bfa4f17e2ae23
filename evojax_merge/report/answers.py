"""Wins and losses: the winner's answers to held-out examples beside those of each task's best parent, from
heldout_answers.jsonl."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, get_args

import numpy as np
from markupsafe import Markup, escape

from evojax_merge.errors import escaped, escaped_lines
from evojax_merge.report.run_data import RunData
from evojax_merge.search.run_parts import RunFolder
from evojax_merge.search.run_schema import AnswerLine, parse, whole_lines

# The most that a page shows: examples of all tasks together, and characters of a text; and those of each outcome that
# are in sight at once.
MOST_EXAMPLES, MOST_CHARACTERS, IN_SIGHT = 200, 1_000, 3
# The most pairs of equal words in two texts that are compared word by word.
MOST_MATCHES = 50_000
# Words with the space behind them; signs, and those of scripts that put no space between words, one by one.
_WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+\s*|\s+|\W")

Outcome = Literal["won", "lost", "equal"]


@dataclass(frozen=True)
class Pair:
    """An example: its place in the data, or its image, that without its folders (an image's own may be its class), its
    question and its right answer where it has any, the scores of the winner and of the parent, their texts, with marks
    where they differ (None for a task that is only scored), and a data URI of its image."""

    example: str
    short_name: str
    question: str | None
    target: str | None
    scores: tuple[float | None, float | None]
    texts: tuple[Markup, Markup] | None
    thumbnail: str | None

    @property
    def outcome(self) -> Outcome:
        return outcome_of(*self.scores)


@dataclass(frozen=True)
class TaskPairs:
    """A task's examples: the parent that the winner stands beside, how many are won, lost and equal, and those that are
    shown, the largest differences first."""

    task: str
    parent: str
    won: int
    lost: int
    equal: int
    shown: Sequence[Pair]

    @property
    def first(self) -> list[Pair]:
        """The examples of the largest differences, of each outcome a few."""
        of_outcome = {outcome: [pair for pair in self.shown if pair.outcome == outcome] for outcome in ("won", "lost")}
        return [pair for pairs in of_outcome.values() for pair in pairs[:IN_SIGHT]]

    @property
    def others(self) -> list[Pair]:
        in_sight = list(map(id, self.first))
        return [pair for pair in self.shown if id(pair) not in in_sight]


def read_answers(run: RunData) -> list[TaskPairs] | None:
    """The examples of each task. None where the run has no winner yet, or no answers."""
    winner, by_model = run.outcome.winner, _by_model(run)
    if winner is None or by_model is None:
        return None
    ours = by_model.pop(winner.name, {})
    theirs = [(task, parent, rows) for parent, tasks in by_model.items() for task, rows in tasks.items()]
    counts = {task: len(rows) for task, rows in ours.items()}
    their_counts = {task: len(rows) for task, _, rows in theirs}
    if not counts or counts != their_counts or len(theirs) > len(counts):
        run.notes.append(f"{RunFolder(run.path).heldout_answers.name} cannot be read: the models' examples differ")
        return None
    most, beside = max(1, MOST_EXAMPLES // len(ours)), {task: (parent, rows) for task, parent, rows in theirs}
    tasks = []
    for task, rows in list(ours.items())[:MOST_EXAMPLES]:
        parent, parents_rows = beside[task]
        scores = [[answer.score for answer in answers] for answers in (rows, parents_rows)]
        outcomes = Counter(map(outcome_of, *scores))
        shown = [_pair(rows[k], parents_rows[k]) for k in largest_differences(*scores)[:most]]
        won, lost, equal = (outcomes[outcome] for outcome in get_args(Outcome))
        tasks.append(TaskPairs(escaped(task), escaped(parent), won, lost, equal, shown))
    return tasks


def outcome_of(ours: float | None, theirs: float | None) -> Outcome:
    """The winner's outcome against the parent, by their scores."""
    first, second = _value(ours), _value(theirs)
    return "equal" if first == second else "won" if first > second else "lost"


def largest_differences(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[int]:
    """The numbers of the examples on which two models' scores differ, the largest differences first."""
    first, second = (np.array(list(map(_value, scores))) for scores in (ours, theirs))
    differing = np.flatnonzero(first != second)
    gaps = np.abs(first[differing] - second[differing])
    return [int(k) for k in differing[np.argsort(-gaps, kind="stable")]]


def _by_model(run: RunData) -> dict[str, dict[str, list[AnswerLine]]] | None:
    """The answers by model and task; None where the run has no winner yet, or no answers, and, with a note of the run,
    where they cannot be read."""
    file, answers = RunFolder(run.path).heldout_answers, dict[str, dict[str, list[AnswerLine]]]()
    if run.outcome.winner is None or not file.is_file():
        return None
    try:
        for line in whole_lines(file):
            answer, _ = parse(AnswerLine, line)
            answers.setdefault(answer.model, {}).setdefault(answer.task, []).append(answer)
    except ValueError:
        run.notes.append(f"{file.name} cannot be read: it is not what the search wrote")
        return None
    return answers


def winner_scores(run: RunData) -> dict[str, tuple[list[Any], np.ndarray]]:
    """The winner's held-out examples by `task/metric` (hashes of the files, each one's place in them and right answer),
    and its scores on them, float[N]; empty where the run has no winner, or no answers."""
    result, by_model = run.outcome, _by_model(run)
    if result.winner is None or by_model is None:
        return {}
    tasks = {str(task.get("name")): tuple(map(str, task.values())) for task in run.config.get("tasks", ())}
    inputs, scores = run.config.get("inputs") or {}, dict[str, tuple[list[Any], np.ndarray]]()
    for score in result.shares:
        task = score.rpartition("/")[0]
        rows = by_model.get(result.winner.name, {}).get(task, [])
        places = [(str(row.example).rpartition("/")[2], row.target) for row in rows]
        examples = [*sorted({inputs[file] for file in tasks.get(task, ()) if file in inputs}), *places]
        values = np.array([np.nan if row.score is None else row.score for row in rows])
        scores |= {score: (examples, values)} if rows else {}
    return scores


def _pair(ours: AnswerLine, theirs: AnswerLine) -> Pair:
    texts = None
    if ours.outputs is not None and theirs.outputs is not None:
        texts = marked(_shown("\n".join(ours.outputs)), _shown("\n".join(theirs.outputs)))
    question, target = (None if text is None else _shown(text) for text in (ours.prompt, ours.target))
    example = escaped(str(ours.example if ours.image is None else ours.image))
    short_name = "/".join(example.split("/")[-1 if ours.image is None else -2 :])
    return Pair(example, short_name, question, target, (ours.score, theirs.score), texts, ours.thumbnail)


def _value(score: float | None) -> float:
    """A score that is not finite is below every other."""
    return -np.inf if score is None else score


def _shown(text: str) -> str:
    return escaped_lines(text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …")


def marked(first: str, second: str) -> tuple[Markup, Markup]:
    """Two texts as HTML, in which the words that the other one does not have in their place are marked."""
    words: list[list[str]] = [_WORD.findall(text) for text in (first, second)]
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    counts, (end, other_end) = [*map(Counter, words)], map(len, words)
    if sum(count * counts[1][word] for word, count in counts[0].items()) <= MOST_MATCHES:
        parts: list[Any] = SequenceMatcher(a=words[0], b=words[1], autojunk=False).get_opcodes()
    else:
        # Texts of few words, again and again, would take seconds: all behind their common beginning is marked.
        pairs = enumerate(zip(*words, strict=False))
        begin = next((number for number, (ours, theirs) in pairs if ours != theirs), min(end, other_end))
        parts = [("equal", 0, begin, 0, begin), ("replace", begin, end, begin, other_end)]
    for kind, *ends in parts:
        for side, all_words, (begin, end) in zip(sides, words, (ends[:2], ends[2:]), strict=True):
            text = escape("".join(all_words[begin:end]))
            side.append(text if kind == "equal" or not text else Markup("<mark>{}</mark>").format(text))
    return Markup("").join(sides[0]), Markup("").join(sides[1])
