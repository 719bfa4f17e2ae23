"""The interval of a difference on held-out examples: its coverage, its words, and where it is shown."""

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.files import read_json
from rich.console import Console
from scipy import stats

from evojax_merge.api.trials import score_table
from evojax_merge.report.comparison import Result, Row, verdict, write_result
from evojax_merge.report.intervals import FEW, NOISE, SAME, TOO_FEW, Lead, paired_lead, unpaired_lead
from evojax_merge.report.run_data import Result as StoredResult
from evojax_merge.report.run_tables import heldout_table
from evojax_merge.report.tables import lead_cell, markdown_table, scores_table
from evojax_merge.report.winner import MergeReport


def test_small_and_large_samples_have_students_interval():
    """Paired where both models were scored on the same examples, unpaired on others."""
    rng = np.random.default_rng(0)
    for size in (7, 500):
        ours, theirs = rng.normal(0.1, 1, (2, size))
        expected = stats.ttest_1samp(ours - theirs, 0).confidence_interval()
        lead = paired_lead([ours], [theirs], [1.0])
        assert lead.difference == pytest.approx((ours - theirs).mean())
        assert [lead.low, lead.high] == pytest.approx(list(expected))
        expected = stats.ttest_ind(ours, theirs[:-1], equal_var=False).confidence_interval()
        lead = unpaired_lead(ours, theirs[:-1])
        assert [lead.low, lead.high] == pytest.approx(list(expected))


def test_examples_are_compared_pair_by_pair_and_tasks_apart():
    """Scores that differ much between examples and tasks, and hardly between models."""
    rng = np.random.default_rng(1)
    theirs = [rng.normal(size=40).astype(np.float32), rng.normal(100, 9, size=10).astype(np.float32)]
    ours = [theirs[0] + np.float32(0.25), theirs[1] - np.float32(8.0)]
    lead = paired_lead(ours, theirs, [0.75, 0.25])
    assert [lead.difference, lead.low, lead.high] == pytest.approx([0.75 * 0.25 - 0.25 * 8] * 3, abs=1e-5)
    assert lead.remark == ""


def test_scores_that_differ_by_rounding_are_the_same():
    """A winner that is a parent, unchanged, is scored by another program than the parent."""
    theirs = np.random.default_rng(2).normal(-7, 1, size=40).astype(np.float32)
    ours = np.nextafter(theirs, np.float32(0))
    assert paired_lead([ours], [theirs], [1.0]).remark == SAME
    assert paired_lead([ours + np.float32(1e-4)], [theirs], [1.0]).remark == ""
    lead = paired_lead([ours], [theirs], [1.0])
    rows = [Row("parent", "one", -6.9999, {}, lead), Row("winner", "two", -7.0, {})]
    assert verdict(rows[1], rows[0]).startswith("On held-out data the winner is the same as the best parent one")
    assert rows[0].is_same and not rows[1].is_same


@pytest.mark.parametrize("size", [3, 5, 8, 20])
def test_the_interval_of_right_and_wrong_answers_covers_the_truth_at_any_size(size):
    """The exact coverage, over all outcomes of pairs of answers, at shares from one end to the other."""
    outcomes = [(won, lost, size - won - lost) for won in range(size + 1) for lost in range(size + 1 - won)]
    leads = []
    for won, lost, equal in outcomes:
        ours, theirs = (np.repeat([a, b, 0.0], [won, lost, equal]) for a, b in ((1.0, 0.0), (0.0, 1.0)))
        leads.append(paired_lead([ours], [theirs], [1.0]))
    for win, loss in [(0.05, 0.0), (0.2, 0.1), (0.5, 0.5), (0.6, 0.05), (0.9, 0.0), (0.98, 0.01), (1.0, 0.0)]:
        chances = stats.multinomial.pmf(outcomes, size, [win, loss, 1 - win - loss])
        covers = [lead.low <= win - loss + 1e-9 and win - loss - 1e-9 <= lead.high for lead in leads]
        # Answers that are the same on all examples are called that, without an interval.
        same = np.array([lead.remark == SAME for lead in leads])
        assert chances[covers | same].sum() >= 0.94
    for (won, lost, _), lead in zip(outcomes, leads, strict=True):
        assert lead.low <= lead.difference <= lead.high and (math.isinf(lead.low) or -1 <= lead.low <= lead.high <= 1)
        # Beyond noise is what a sign test finds, or nearly.
        if lead.remark == "":
            assert stats.binomtest(won, won + lost).pvalue < 0.065
        if size < FEW:
            assert lead.remark in (SAME, TOO_FEW)


@pytest.mark.parametrize("size", [2, 4, 12])
def test_the_interval_of_other_scores_covers_the_truth_in_simulations(size):
    """Two tasks, one of right and wrong, and one task; paired, and with other examples."""
    rng, rounds, covered = np.random.default_rng(size), 1500, np.zeros(3)
    for _ in range(rounds):
        scores, answers = rng.normal(0.3, 1.0, size), (rng.random((2, size + 6)) < [[0.8], [0.5]]).astype(float)
        leads = [
            paired_lead([scores], [np.zeros(size)], [1.0]),
            paired_lead([scores, answers[0]], [np.zeros(size), answers[1]], [0.5, 0.5]),
            unpaired_lead(answers[0], answers[1, 1:]),
        ]
        covered += [lead.low <= truth <= lead.high for lead, truth in zip(leads, (0.3, 0.3, 0.3), strict=True)]
    assert (covered / rounds >= 0.935).all()


def test_what_is_the_same_has_failed_or_is_too_little_is_called_that():
    scores, failed = np.array([0.0, 1.0, 1.0], np.float32), np.array([0.0, np.nan, 1.0], np.float32)
    assert paired_lead([scores], [scores], [1.0]) == Lead(0.0, 0.0, 0.0)
    assert Lead(0.0, 0.0, 0.0).remark == SAME and Lead(0.0, -0.1, 0.1).remark == NOISE
    assert paired_lead([scores], [failed], [1.0]) is None and unpaired_lead(failed, scores) is None
    one = paired_lead([np.array([0.5])], [np.array([0.25])], [1.0])
    assert (one.difference, one.remark, one.interval) == (0.25, TOO_FEW, None)
    # All of three better by the same: nothing shows how much other examples differ.
    assert paired_lead([scores + 0.5], [scores], [1.0]).remark == TOO_FEW
    # Few are enough where they differ by much more than among each other.
    assert paired_lead([np.array([3.0, 3.1, 2.9])], [np.zeros(3)], [1.0]).remark == ""


ROWS = [
    Row("base", "base", 0.1, {"t/m": 0.1}, Lead(0.4, 0.31, 0.5)),
    Row("parent", "maths", 0.45, {"t/m": 0.45}, Lead(0.05, -0.01, 0.12)),
    Row("parent", "failed", np.nan, {"t/m": np.nan}),
    Row("uniform", "uniform ties", 0.6, {"t/m": 0.6}, Lead(-0.1, -0.2, -0.03)),
    Row("winner", "evolved ties", 0.5, {"t/m": 0.5}),
]
RESULT = Result(np.zeros(2), 0.9, ("uniform merge", 0.8), ROWS, MergeReport((), {}, ()))


def test_tables_show_the_interval_and_mark_what_is_within_noise():
    cells = [
        "+0.4000 (0.3100 to 0.5000)",
        "+0.0500 (-0.0100 to 0.1200), within noise",
        "",
        "-0.1000 (-0.2000 to -0.0300)",
        "",
    ]
    head, _, *lines = markdown_table(ROWS).splitlines()
    assert [column.strip() for column in head.split("|")][2:4] == ["fitness", "winner ahead by (95% interval)"]
    assert [line.split("|")[3].strip() for line in lines] == cells
    console = Console(width=140)
    with console.capture() as captured:
        console.print(scores_table(ROWS).terminal("Held-out scores"))
    shown = captured.get()
    assert all(cell in shown for cell in cells) and shown.count("noise") == 1
    # Nothing to be compared with: no such column.
    assert "ahead" not in markdown_table([Row("model", "mine", 0.5, {"t/m": 0.5})])


def test_verdicts_say_by_how_much_and_whether_it_is_noise():
    assert RESULT.verdicts() == [
        "On held-out data the winner is better than the base by 0.4000 (95% interval 0.3100 to 0.5000).",
        "On held-out data the winner cannot be told from the best parent maths: it has 0.5000, that has 0.4500 (a "
        "difference of 0.0500, within noise; 95% interval -0.0100 to 0.1200).",
        "On held-out data the winner is worse than the uniform merge: it has 0.5000, that has 0.6000 (a "
        "difference of -0.1000; 95% interval -0.2000 to -0.0300).",
    ]
    tie = Row("base", "base", 0.5, {"t/m": 0.5}, Lead(0.0, -0.1, 0.1))
    sentences = Result(np.zeros(2), 0.9, ("uniform merge", 0.8), [tie, *ROWS[1:]], RESULT.report).verdicts()
    assert sentences[0].endswith("both have 0.5000 (of the difference, 95% interval -0.1000 to 0.1000).")
    hair = Row("base", "base", 0.49998, {"t/m": 0.49998}, Lead(2e-5, -0.1, 0.1))
    sentences = Result(np.zeros(2), 0.9, ("uniform merge", 0.8), [hair, *ROWS[1:]], RESULT.report).verdicts()
    assert sentences[0] == (
        "On held-out data the winner is no better than the base: both have 0.5000, rounded (95% interval "
        "-0.1000 to 0.1000)."
    )
    few = Row("base", "base", 0.49998, {"t/m": 0.49998}, Lead(2e-5, -np.inf, np.inf))
    sentences = Result(np.zeros(2), 0.9, ("uniform merge", 0.8), [few, *ROWS[1:]], RESULT.report).verdicts()
    assert sentences[0].startswith("On held-out data the winner is level with the base, 0.5000 to 0.5000: too few")


@pytest.mark.parametrize("validated", [False, True])
def test_a_search_without_a_better_candidate_is_called_that(validated):
    """The winner is then the baseline, or as good; the split that the winner was chosen on is the one that counts."""

    def chosen_on(winner, baseline):
        searched, validation = ((0.9, 0.8), (winner, baseline)) if validated else ((winner, baseline), None)
        return Result(
            np.zeros(2), searched[0], ("first parent", searched[1]), ROWS, RESULT.report, validation,
            baseline_name="stage-1",
        ).chosen_on()  # fmt: skip

    sentence = "Nothing that was searched beat the first parent stage-1."
    assert chosen_on(0.5, 0.5).endswith(f". {sentence}")
    assert sentence not in chosen_on(0.6, 0.5)


def test_result_json_has_the_intervals(tmp_path):
    write_result(RESULT, 3, tmp_path / "result.json")
    document = read_json(tmp_path / "result.json")
    better = document["better_than"]
    assert {role: (row["interval"], row["within_noise"]) for role, row in better.items()} == {
        "base": ([0.31, 0.5], False), "parent": ([-0.01, 0.12], True), "uniform": ([-0.2, -0.03], False),
    }  # fmt: skip
    assert document["table"][0]["interval"] == [0.31, 0.5]
    assert document["chosen_on"] == "search" and not {"validation_fitness", "stopped_by"} & document.keys()


def test_a_finished_run_shows_the_interval_of_every_model(tmp_path):
    rows = [*ROWS[:2], Row("parent", "second", 0.3, {"t/m": 0.3}, Lead(0.2, 0.125, 0.25)), *ROWS[2:]]
    write_result(replace(RESULT, rows=rows), 3, tmp_path / "result.json")
    document = read_json(tmp_path / "result.json")
    table = heldout_table(StoredResult.model_validate(document))
    assert [cells[2] for cells in table.rows] == [lead_cell(row.lead) for row in rows]
    leads = {row["model"]: row["the winner's lead (95%)"] for row in score_table(StoredResult.model_validate(document))}
    assert leads["second"] == "+0.2 (0.125 to 0.25)" and leads["failed"] is None
