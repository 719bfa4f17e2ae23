"""The interval of a difference on held-out examples, against a naive bootstrap; where it is shown."""

import json
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.resampling import naive_bootstrap
from rich.console import Console

from evojax_merge.report import intervals
from evojax_merge.report.comparison import Result, Row, write_result
from evojax_merge.report.intervals import Lead, bootstrap, leads_over
from evojax_merge.report.merges import MergeReport
from evojax_merge.report.run_data import Result as StoredResult
from evojax_merge.report.run_tables import heldout_table
from evojax_merge.report.tables import lead_cell, markdown_table, terminal_table
from evojax_merge.trials import score_table


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    pairs=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    resamples=st.integers(2, 40),
    confidence=st.sampled_from([0.5, 0.9, 0.95]),
    block=st.integers(1, 100),
)
def test_the_interval_is_the_naive_bootstraps(sizes, pairs, seed, resamples, confidence, block):
    """Whatever the size of a block."""
    rng = np.random.default_rng(seed)
    differences = [rng.normal(size=(pairs, size)) for size in sizes]
    weights = rng.dirichlet(np.ones(len(sizes))).tolist()
    with patch.object(intervals, "BLOCK", block):
        low, high = bootstrap(differences, weights, np.random.default_rng(seed), resamples, confidence)
    expected = naive_bootstrap(differences, weights, seed, resamples, confidence)
    np.testing.assert_allclose(np.stack([low, high], axis=1), expected, rtol=1e-9, atol=1e-12)


def test_on_many_examples_it_is_the_normal_interval():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.1, 1, (2, 500)).astype(np.float32)
    (lead,) = leads_over([ours], [[theirs]], [1.0], seed=3)
    difference = (ours - theirs).astype(float)
    error = difference.std() / np.sqrt(len(difference))
    assert lead.difference == pytest.approx(difference.mean())
    assert [lead.low, lead.high] == pytest.approx(difference.mean() + error * np.array([-1.96, 1.96]), abs=0.1 * error)
    assert leads_over([ours], [[theirs]], [1.0], seed=3) == [lead]
    assert leads_over([ours], [[theirs]], [1.0], seed=4) != [lead]
    # What each is compared with changes nothing in the others' comparison.
    assert leads_over([ours], [[ours], [theirs]], [1.0], seed=3)[1] == lead


def test_examples_are_compared_pair_by_pair_and_tasks_apart():
    """Scores that differ much between examples and tasks, and hardly between models."""
    rng = np.random.default_rng(1)
    theirs = [rng.normal(size=40).astype(np.float32), rng.normal(100, 9, size=10).astype(np.float32)]
    ours = [theirs[0] + np.float32(0.25), theirs[1] - np.float32(8.0)]
    (lead,) = leads_over(ours, [theirs], [0.75, 0.25], seed=0)
    assert [lead.difference, lead.low, lead.high] == pytest.approx([0.75 * 0.25 - 0.25 * 8] * 3, abs=1e-5)
    assert not lead.within_noise


def test_equals_are_within_noise_and_what_failed_or_is_one_example_has_no_interval():
    scores, failed = np.array([0.0, 1.0, 1.0], np.float32), np.array([0.0, np.nan, 1.0], np.float32)
    assert leads_over([scores], [[scores], [failed]], [1.0], seed=0) == [Lead(0.0, 0.0, 0.0), None]
    assert Lead(0.0, 0.0, 0.0).within_noise
    assert leads_over([failed], [[scores]], [1.0], seed=0) == [None]
    assert leads_over([scores, scores[:1]], [[scores, scores[:1]]], [0.5, 0.5], seed=0) == [None]


ROWS = [
    Row("base", "base", 0.1, {"t/m": 0.1}, Lead(0.4, 0.31, 0.5)),
    Row("parent", "maths", 0.45, {"t/m": 0.45}, Lead(0.05, -0.01, 0.12)),
    Row("parent", "failed", np.nan, {"t/m": np.nan}),
    Row("uniform", "uniform ties", 0.6, {"t/m": 0.6}, Lead(-0.1, -0.2, -0.03)),
    Row("winner", "evolved ties", 0.5, {"t/m": 0.5}),
]
RESULT = Result(np.zeros(2), 0.9, ("uniform merge", 0.8), ROWS, MergeReport((), {}, ()))


def test_tables_show_the_interval_and_mark_what_is_within_noise():
    cells = ["+0.4000 (0.3100 to 0.5000)", "+0.0500 (-0.0100 to 0.1200), noise", "", "-0.1000 (-0.2000 to -0.0300)", ""]
    head, _, *lines = markdown_table(ROWS).splitlines()
    assert [column.strip() for column in head.split("|")][2:4] == ["fitness", "winner ahead by (95% interval)"]
    assert [line.split("|")[3].strip() for line in lines] == cells
    console = Console(width=140)
    with console.capture() as captured:
        console.print(terminal_table(ROWS, "Held-out scores"))
    shown = captured.get()
    assert all(cell in shown for cell in cells) and shown.count("noise") == 1
    # Nothing to be compared with: no such column.
    assert "ahead" not in markdown_table([Row("model", "mine", 0.5, {"t/m": 0.5})])


def test_verdicts_say_by_how_much_and_whether_it_is_noise():
    assert RESULT.verdicts() == [
        "On held-out data the evolved model is better than the base by 0.4000 (95% interval 0.3100 to 0.5000).",
        "On held-out data the evolved model is better than the best parent maths by 0.0500, which is within noise (95% "
        "interval -0.0100 to 0.1200).",
        "On held-out data the evolved model is worse than the uniform merge: it has 0.5000, that has 0.6000 (a "
        "difference of -0.1000; 95% interval -0.2000 to -0.0300).",
    ]
    tie = Row("base", "base", 0.5, {"t/m": 0.5}, Lead(0.0, -0.1, 0.1))
    sentences = Result(np.zeros(2), 0.9, ("uniform merge", 0.8), [tie, *ROWS[1:]], RESULT.report).verdicts()
    assert sentences[0].endswith("both have 0.5000 (of the difference, 95% interval -0.1000 to 0.1000).")
    hair = Row("base", "base", 0.49998, {"t/m": 0.49998}, Lead(2e-5, -0.1, 0.1))
    sentences = Result(np.zeros(2), 0.9, ("uniform merge", 0.8), [hair, *ROWS[1:]], RESULT.report).verdicts()
    assert sentences[0] == (
        "On held-out data the evolved model is no better than the base: both have 0.5000, rounded (95% interval "
        "-0.1000 to 0.1000)."
    )


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
    document = json.loads((tmp_path / "result.json").read_text())
    better = document["better_than"]
    assert {role: (row["interval"], row["within_noise"]) for role, row in better.items()} == {
        "base": ([0.31, 0.5], False), "parent": ([-0.01, 0.12], True), "uniform": ([-0.2, -0.03], False),
    }  # fmt: skip
    assert document["table"][0]["interval"] == [0.31, 0.5]
    assert document["chosen_on"] == "search" and not {"validation_fitness", "stopped_by"} & document.keys()


def test_a_finished_run_shows_the_interval_of_every_model(tmp_path):
    rows = [*ROWS[:2], Row("parent", "second", 0.3, {"t/m": 0.3}, Lead(0.2, 0.125, 0.25)), *ROWS[2:]]
    write_result(replace(RESULT, rows=rows), 3, tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text())
    table = heldout_table(StoredResult.model_validate(document))
    assert [cells[2] for cells in table.rows] == [lead_cell(row.lead) for row in rows]
    leads = {row["model"]: row["the winner's lead (95%)"] for row in score_table(StoredResult.model_validate(document))}
    assert leads["second"] == "+0.2 (0.125 to 0.25)" and leads["failed"] is None
