"""People as judges: the strengths that votes show, the votes file, searches that judges decide, and their page."""

import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from helpers.commands import refusal, run_here
from helpers.families import Family, build_family
from helpers.files import read_json, read_lines, write_yaml
from helpers.sampling import thorough
from helpers.searches import open_problem, search_config
from hostile import Running, start_command
from scipy.optimize import minimize
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from bench.searches import judge as judge_bench
from bench.shared.browser import BROWSER, Browser
from evojax_merge import core
from evojax_merge.errors import Failed, InputError
from evojax_merge.judge import activity, opening, server
from evojax_merge.judge import ballot as ballots
from evojax_merge.judge.agreement import agreements
from evojax_merge.judge.ballot import Ballot, Question
from evojax_merge.judge.batch import VotesAwaited, read_choices, write_pairs
from evojax_merge.judge.batch import votes_of as choices_of
from evojax_merge.judge.evaluation import AskingEvaluator, RememberingEvaluator
from evojax_merge.judge.opening import _token as judge_token
from evojax_merge.judge.pairs import information
from evojax_merge.judge.posterior import (
    BAR,
    LAPSE,
    Kernel,
    Posterior,
    Preferences,
    distances_between,
    fit_kernel,
    fit_preferences,
    outcomes_of,
)
from evojax_merge.judge.proposals import propose
from evojax_merge.judge.server import served
from evojax_merge.judge.votes import Round, Vote, VoteFile
from evojax_merge.report.comparison import Result, Row
from evojax_merge.report.intervals import Lead
from evojax_merge.report.meetings import Meetings
from evojax_merge.report.run_data import read_run
from evojax_merge.report.run_tables import heldout_table
from evojax_merge.report.tables import markdown_table
from evojax_merge.search.genomes import SpaceEvaluator
from evojax_merge.spaces.bounds import EDGE
from evojax_merge.steps.selection import open_evaluators
from evojax_merge.tasks import language_judge
from evojax_merge.tasks.generated_images import HumanImageTask
from evojax_merge.tasks.human import HumanTask
from evojax_merge.tasks.language_judge import LanguageModelJudge
from evojax_merge.tasks.rubric import RubricConfig, open_rubric
from evojax_merge.tasks.task import Opening, Responses
from evojax_merge.tasks.text import Example
from evojax_merge.tasks.voting import SWAPPED, VotesConfig, Voting

JUDGE = '''
def shorter(record, left, right):
    """Prefer the answer with fewer letters."""
    return "left" if len(left) < len(right) else "right" if len(right) < len(left) else "tie"


def confused(record, left, right):
    return "the first one"
'''


HOSTILE = ["<script>document.title = 'owned'</script><b>bold</b>", "\x07\x1b[31m\u202e" + "long " * 20_000]


# ---------------------------------------------------------------------------------------------------------------
# From votes to strengths


def test_strengths_are_the_mode_and_the_curvature_of_the_posterior() -> None:
    rng = np.random.default_rng(0)
    genomes, kernel = rng.uniform(size=(6, 3)), Kernel(0.7, 2.0)
    votes = [
        (0, 1, "left", 1.0),
        (1, 2, "right", 0.5),
        (3, 4, "tie", 1.0),
        (5, 0, "both_bad", 2.0),
        (2, 5, "left", 1.0),
    ]
    outcomes = outcomes_of(votes)  # type: ignore[arg-type]
    covariance = kernel(distances_between(genomes))
    inverse = np.linalg.inv(covariance)

    def strength(f: np.ndarray, number: int) -> float:
        return 0.0 if number == BAR else float(f[number])

    def winning(difference: float) -> float:
        return LAPSE + (1 - 2 * LAPSE) / (1 + float(np.exp(-difference)))

    def loss(f: np.ndarray) -> float:
        total = 0.5 * f @ inverse @ f
        for winner, loser, weight in zip(outcomes.winners, outcomes.losers, outcomes.weights, strict=True):
            total -= weight * np.log(winning(strength(f, winner) - strength(f, loser)))
        return float(total)

    mode = minimize(loss, np.zeros(6), tol=1e-12).x
    curvature = inverse.copy()
    for winner, loser, weight in zip(outcomes.winners, outcomes.losers, outcomes.weights, strict=True):
        p = winning(strength(mode, winner) - strength(mode, loser))
        step = np.zeros(6)
        if winner != BAR:
            step[winner] += 1
        if loser != BAR:
            step[loser] -= 1
        # Fisher's information of a vote that is won with probability p.
        slope = (p - LAPSE) * (1 - LAPSE - p) / (1 - 2 * LAPSE)
        curvature += weight * slope**2 / (p * (1 - p)) * np.outer(step, step)
    fitted = fit_preferences(genomes, outcomes, kernel)
    np.testing.assert_allclose(fitted.mean, mode, atol=1e-4)
    np.testing.assert_allclose(fitted.covariance, np.linalg.inv(curvature), atol=1e-4)


def test_a_tie_and_both_bad_are_symmetric_and_both_bad_lowers_both() -> None:
    genomes, kernel = np.array([[0.0], [1.0]]), Kernel(0.5, 1.0)
    tie = fit_preferences(genomes, outcomes_of([(0, 1, "tie", 1.0)]), kernel).mean
    bad = fit_preferences(genomes, outcomes_of([(0, 1, "both_bad", 1.0)]), kernel).mean
    np.testing.assert_allclose(tie, 0, atol=1e-9)
    assert bad[0] == pytest.approx(bad[1]) and bad[0] < -0.1


def test_votes_on_one_generation_say_something_about_the_next() -> None:
    near, far = [0.05], [9.0]
    genomes, votes = np.array([[0.0], [1.0], near, far]), [(0, 1, "left", 1.0)] * 5
    mean = fit_preferences(genomes, outcomes_of(votes), Kernel(0.5, 2.0)).mean  # type: ignore[arg-type]
    assert mean[2] > 0.8 * mean[0] > 0 and abs(mean[3]) < 0.01


def test_strengths_agree_with_those_that_voters_have() -> None:
    rng = np.random.default_rng(1)
    genomes = rng.uniform(size=(16, 4))
    true = 6 * genomes @ np.array([1.0, -1.0, 0.5, 0.0])
    pairs = [rng.choice(16, 2, replace=False) for _ in range(150)]
    votes = [
        (int(a), int(b), "left" if rng.random() < 1 / (1 + np.exp(true[b] - true[a])) else "right", 1.0)
        for a, b in pairs
    ]
    mean = fit_preferences(genomes, outcomes_of(votes), Kernel(1.0, 4.0)).mean  # type: ignore[arg-type]
    assert np.corrcoef(mean, true)[0, 1] > 0.9


def test_a_lapse_changes_little_where_many_votes_agree() -> None:
    genomes, kernel, right = np.array([[0.0], [1.0]]), Kernel(0.5, 2.0), [(0, 1, "left", 1.0)] * 8
    without = fit_preferences(genomes, outcomes_of(right), kernel).mean  # type: ignore[arg-type]
    lapsed = fit_preferences(genomes, outcomes_of([*right, (0, 1, "right", 1.0)]), kernel).mean  # type: ignore[list-item]
    assert lapsed[0] - lapsed[1] > 0.6 * (without[0] - without[1]) > 0


def test_information_is_that_of_simulated_votes() -> None:
    rng = np.random.default_rng(2)
    factor = rng.normal(size=(3, 3))
    posterior = Posterior(np.array([0.5, 0.0, -2.0]), factor @ factor.T, 0.0)
    drawn = posterior.sample(400_000, rng)

    def entropy(p: Any) -> Any:
        return -(p * np.log(p) + (1 - p) * np.log(1 - p))

    for left, right in ((0, 1), (0, 2), (1, 2)):
        p = LAPSE + (1 - 2 * LAPSE) / (1 + np.exp(drawn[:, right] - drawn[:, left]))
        expected = entropy(p.mean()) - entropy(p).mean()
        assert information(posterior)[left, right] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("rule", judge_bench.RULES)
def test_a_pair_is_one_that_may_be_asked(rule: str) -> None:
    allowed = np.zeros((4, 4), bool)
    allowed[1, 3] = allowed[3, 1] = True
    posterior = Posterior(np.array([9.0, 0.0, 5.0, 1.0]), np.eye(4), 0.0)
    for seed in range(20):
        assert sorted(judge_bench.RULES[rule](posterior, allowed, np.random.default_rng(seed))) == [1, 3]


def test_proposals_lie_where_the_votes_say_that_strengths_are_high() -> None:
    rng = np.random.default_rng(4)
    genomes, best = rng.normal(size=(20, 2)).astype(np.float32) / 4, np.array([0.4, -0.2])
    distances = np.linalg.norm(genomes - best, axis=1)
    votes = [(a, b, "left" if distances[a] < distances[b] else "right", 1.0) for a in range(20) for b in range(a)]
    outcomes = outcomes_of(votes)  # type: ignore[arg-type]
    preferences = Preferences(genomes, outcomes, fit_kernel(genomes, outcomes))
    proposed = propose(preferences, 6, 0.1, np.random.default_rng(0))
    assert proposed.dtype == np.float32 and len(np.unique(proposed, axis=0)) == 6
    assert np.median(np.linalg.norm(proposed - best, axis=1)) < 0.5 * np.median(distances)
    np.testing.assert_array_equal(proposed, propose(preferences, 6, 0.1, np.random.default_rng(0)))


def test_proposals_stay_inside_the_bounds() -> None:
    # The more of the gene, the better: the best is at the upper bound.
    genomes = np.linspace(0.4, 1.0, 10)[:, None].astype(np.float32)
    votes = [(a, b, "left", 1.0) for a in range(10) for b in range(a)]
    outcomes = outcomes_of(votes)  # type: ignore[arg-type]
    preferences = Preferences(genomes, outcomes, fit_kernel(genomes, outcomes))
    proposed = propose(preferences, 6, 0.5, np.random.default_rng(0))
    assert (np.abs(proposed - 0.5) <= 0.5 + EDGE + 1e-6).all()


# ---------------------------------------------------------------------------------------------------------------
# The votes file


def written(path: Path) -> VoteFile:
    file = VoteFile(path)
    one = file.open("ab", "taste", np.array([[0.5, 1.0], [0.25, 0.0]]))
    file.add(one, Vote(0, 0, 1, "left", ("x", "y"), "ann"))
    return file


def test_a_vote_whose_line_is_cut_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    file = written(path)
    file.add(file.rounds[0], Vote(1, 1, 0, "tie", ("x", "y"), "bob"))
    path.write_bytes(path.read_bytes()[:-7])
    again = VoteFile(path)
    assert [vote.judge for vote in again.rounds[0].votes] == ["ann"]
    again.add(again.rounds[0], Vote(1, 1, 0, "right", ("x", "y"), "bob"))
    assert [vote.choice for vote in VoteFile(path).rounds[0].votes] == ["left", "right"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "is no line of a votes file"),
        ("[1]", "is no line of a votes file"),
        ('{"closed": "zz"}', "belongs to round 'zz', which no earlier line begins"),
        ('{"round": "ab", "task": "taste", "genomes": [[1, 2]]}', "begins round 'ab' once more"),
        ('{"round": "cd", "task": "taste", "genomes": [[1, NaN]]}', "expected rows of finite numbers"),
        ('{"round": "cd", "task": "taste", "genomes": [[1], [2]], "answers": ["ef"]}',
         "answers: expected one digest for each of the 2 genomes"),
        ('{"vote": {"example": 0, "left": 0, "right": 7, "choice": "tie", "answers": ["", ""]}, "round": "ab"}',
         "is a vote on candidates 0 and 7 of 2"),
        ('{"vote": {"example": 0, "left": 0, "right": 1, "choice": "x", "answers": ["", ""]}, "round": "ab"}',
         "choice: 'x'; expected one of left, right, tie, both_bad"),
    ],
)  # fmt: skip
def test_lines_that_no_search_wrote_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "votes.jsonl"
    written(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        VoteFile(path)
    assert str(caught.value).startswith(f"{path}:3")


def test_equal_votes_count_each_and_a_lost_one_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    file = written(path)
    for _ in range(2):
        file.add(file.rounds[0], Vote(0, 0, 1, "left", ("x", "y"), "ann"))
    assert len(VoteFile(path).rounds[0].votes) == 3
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[3:]]))
    with pytest.raises(InputError, match=r"votes\.jsonl:3: is vote 2 of its round after 1 others"):
        VoteFile(path)


def test_a_vote_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    written(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(InputError, match="is the same vote once more"):
        VoteFile(path)


def test_agreement_is_that_of_scikit_learn_whichever_side_an_answer_was_on() -> None:
    rng = np.random.default_rng(3)
    choices = ["left", "right", "tie", "both_bad"]
    chosen = {name: [choices[n] for n in rng.integers(4, size=40)] for name in ("ann", "bob")}
    chosen["bob"][:20] = chosen["ann"][:20]
    one = Round("ab", "taste", np.zeros((2, 1)))
    for n in range(40):
        one.votes.append(Vote(n, 0, 1, chosen["ann"][n], ("", ""), "ann"))  # type: ignore[arg-type]
        # The other judge sees the answers on the other sides.
        one.votes.append(Vote(n, 1, 0, SWAPPED[chosen["bob"][n]], ("", ""), "bob"))  # type: ignore[index]
    one.votes.append(Vote(40, 0, 1, "tie", ("", ""), "ann"))
    (agreement,) = agreements([one])
    assert (agreement.first, agreement.second, agreement.shared) == ("ann", "bob", 40)
    assert agreement.agreed == sum(a == b for a, b in zip(chosen["ann"], chosen["bob"], strict=True)) >= 20
    assert agreement.kappa == pytest.approx(cohen_kappa_score(chosen["ann"], chosen["bob"]))
    # Judges who always choose the same agree, and no more than by chance.
    same = Round("ab", "taste", np.zeros((2, 1)), [Vote(0, 0, 1, "left", ("", ""), name) for name in ("ann", "bob")])
    assert agreements([same])[0].describe() == "ann and bob: 1 of 1 shared pairs alike"


# ---------------------------------------------------------------------------------------------------------------
# Searches


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("judged"))


def config(folder: Path, family: Family, judge: str | None = "judge.py:shorter", **changes: Any) -> Path:
    (folder / "judge.py").write_text(JUDGE)
    task = {"name": "taste", "kind": "human", "file": str(family.tasks), "max_new_tokens": 4, "votes": 12,
            "heldout_votes": 2} | ({} if judge is None else {"judge": judge}) | changes  # fmt: skip
    space = {"method": "task_arithmetic", "parameters": {"weight": {"low": -2.0, "high": 3.0}}}
    return write_yaml(folder / "config.yaml", search_config(family, 3, 4, space=space, tasks=[task]))


def votes_of(run: Path) -> list[dict[str, Any]]:
    lines = read_lines(run / "votes.jsonl")
    return [{key: value for key, value in line["vote"].items() if key != "time"} for line in lines if "vote" in line]


def test_votes_propose_where_they_are_the_whole_fitness(tmp_path: Path, family: Family) -> None:
    path = config(tmp_path, family)

    def opened(*overrides: str) -> Any:
        return open_problem(path, *overrides)

    assert opened().search.strategy == opened().strategy.name == "votes"
    assert opened("search.strategy=sep_cma_es").strategy.name == "sep_cma_es"
    text = f"{{name: text, kind: likelihood, file: {family.tasks}}}"
    document = yaml.safe_load(path.read_text())
    write_yaml(path, document | {"tasks": [*document["tasks"], yaml.safe_load(text)]})
    assert opened().search.strategy == "cma_es"
    with pytest.raises(InputError, match=r"search.strategy: votes: needs one task in the fitness, which people judge"):
        opened("search.strategy=votes")


def test_a_search_that_a_function_judges_and_its_replay(tmp_path: Path, family: Family) -> None:
    path, run, replay = config(tmp_path, family), tmp_path / "run", tmp_path / "replay"
    run_here("search", str(path), "--out", str(run))
    votes = votes_of(run)
    assert votes and all(vote["judge"] == "judge.py:shorter" for vote in votes)
    rows = {row["role"]: row for row in read_json(run / "result.json")["table"]}
    assert rows["winner"]["heldout_scores"]["taste/preference"] == 0
    # The page of the run says it as well: two votes are too few.
    table = heldout_table(read_run(run).result)
    assert [cells[2] for cells in table.rows] == ["too few votes to say"] * (len(table.rows) - 1) + [""]
    # The judge is not asked again: the votes of the file are taken.
    (tmp_path / "judge.py").write_text(JUDGE.replace("<", ">"))
    run_here("judge", str(path), "--out", str(replay), "--replay", str(run / "votes.jsonl"))
    assert votes_of(replay) == votes
    for name in ("history.jsonl", "best/recipe.yaml"):
        assert (replay / name).read_bytes() == (run / name).read_bytes()


def test_a_function_that_chooses_nothing_is_named(tmp_path: Path, family: Family) -> None:
    done = run_here("search", config(tmp_path, family, "judge.py:confused"), "--out", tmp_path / "run", status=1)
    assert "returned 'the first one'; expected one of left, right, tie, both_bad" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": True}, "guard: people give the base no score to compare with"),
        ({"votes": 0}, "votes: expected a whole number from 1"),
        ({"judge": "judge.py:nobody"}, "judge.py has no function 'nobody'"),
        ({"votes": -1}, "votes: expected a whole number from 1"),
        ({"heldout_votes": 0}, "heldout_votes: expected a whole number from 1"),
        ({"file": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"file": "empty.jsonl"}, "empty.jsonl"),
        ({"file": "nameless.jsonl"}, "nameless.jsonl:1"),
        ({"limit": None, "judge": "judge.py:JUDGED"}, "judge.py has no function"),
    ],
)
def test_tasks_that_nobody_can_judge_are_refused(
    tmp_path: Path, family: Family, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "nameless.jsonl").write_text('{"question": "w1"}\n')
    assert message in refusal("search", config(tmp_path, family, **changes), "--out", tmp_path / "run")


def test_each_stage_of_a_search_is_judged(tmp_path: Path, family: Family) -> None:
    path = config(tmp_path, family, votes=4)
    document = yaml.safe_load(path.read_text())
    stage = {"space": document.pop("space"), "search": document.pop("search") | {"generations": 2}}
    write_yaml(path, document | {"stages": [stage, stage]})
    run = tmp_path / "run"
    done = run_here("judge", path, "--out", run)
    for folder in (run / "stages" / "stage-1", run):
        written = yaml.safe_load((folder / "config.yaml").read_text())
        searches = [written["search"]] if "search" in written else [one["search"] for one in written["stages"]]
        assert all(search["strategy"] == "votes" for search in searches)
        assert votes_of(folder)
    done = run_here("judge", path, "--out", tmp_path / "other", "--export", tmp_path / "pairs.jsonl", status=2)
    assert "stages: people judge a search in stages on its page" in done.stderr


def test_a_config_without_judges_is_named(tmp_path: Path, family: Family) -> None:
    task = {"name": "sums", "kind": "likelihood", "file": str(family.tasks), "prompt": "{prompt}", "target": "{target}"}
    document = yaml.safe_load(config(tmp_path, family).read_text()) | {"tasks": [task]}
    path = write_yaml(tmp_path / "sums.yaml", document)
    assert f"{path}: tasks: has none of kind: human or human_images" in refusal(
        "judge", path, "--out", tmp_path / "run"
    )


def test_a_port_in_use_is_named(tmp_path: Path, family: Family) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        path = config(tmp_path, family, None)
        assert f"error: --port: {port} cannot be listened on" in refusal(
            "judge", path, "--out", tmp_path / "run", "--port", port
        )


def test_an_address_that_stops_answering_ends_the_search_and_keeps_the_votes(
    tmp_path: Path, family: Family, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_judge, "TIMEOUT", 5)
    monkeypatch.setattr(LanguageModelJudge, "__init__", partialmethod(LanguageModelJudge.__init__, pauses=(0.0,)))
    monkeypatch.setattr(Model, "answers", 14)
    path, run = config(tmp_path, family, None, judge_address=model, judge_model="small"), tmp_path / "run"
    done = run_here("search", path, "--out", run, status=1)
    assert "does not answer (status 503); all votes are kept, and --resume" in done.stderr
    assert "Traceback" not in done.stderr and len(votes_of(run)) == 7
    monkeypatch.setattr(Model, "answers", None)
    # The model may have another address by now.
    moved = ("--set", f"tasks.0.judge_address={model.replace('127.0.0.1', 'localhost')}")
    done = run_here("search", path, "--out", run, "--resume", *moved)
    assert len(votes_of(run)) > 7, done.stderr
    # Votes propose the candidates, and the search goes on as if nothing had been between.
    run_here("search", path, "--out", tmp_path / "whole")
    assert votes_of(run) == votes_of(tmp_path / "whole")
    assert (run / "history.jsonl").read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()


def test_votes_of_another_run_are_named(tmp_path: Path, family: Family) -> None:
    path = config(tmp_path, family)
    run_here("search", path, "--out", tmp_path / "run")
    votes = tmp_path / "run" / "votes.jsonl"
    assert "are of other candidates than this search's" in refusal(
        "judge", path, "--out", tmp_path / "other", "--set", "seed=7", "--replay", votes
    )
    lines = votes.read_text().splitlines(keepends=True)
    for name, kept in (("cut", lines[1:]), ("doubled", [*lines[:2], *lines[1:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(kept))
        assert f"{name}.jsonl:" in refusal(
            "judge", path, "--out", tmp_path / name, "--replay", tmp_path / f"{name}.jsonl"
        )


def test_votes_come_by_file(tmp_path: Path, family: Family) -> None:
    path, run, pairs = config(tmp_path, family, None), tmp_path / "run", tmp_path / "pairs.jsonl"
    votes = tmp_path / "choices.jsonl"

    def judge(*options: Any) -> Any:
        return run_here("judge", path, "--out", run, *options, "--export", pairs)

    def choose(rows: list[dict[str, str]]) -> None:
        """Two judges prefer the shorter answer."""
        lines = [
            {"pair": row["pair"], "choice": "left" if len(row["left"]) < len(row["right"]) else "right", "judge": name}
            for row in rows for name in ("ann", "bob")
        ]  # fmt: skip
        votes.write_text("".join(json.dumps(line) + "\n" for line in lines))

    done, voted_on = judge(), set[str]()
    first: list[dict[str, str]] = []
    while pairs.exists():
        assert f"then go on with --resume --import votes.jsonl --export {pairs}" in done.stdout
        rows = list(read_lines(pairs))
        pairs.unlink()
        voted_on |= {row["pair"] for row in rows}
        if not first:
            # A part of the votes comes first; the others count as well, though other pairs are wanted by then.
            first = rows
            choose(rows[:1])
            assert f"{votes}: took 2 votes\n" in judge("--resume", "--import", votes).stdout
            voted_on |= {row["pair"] for row in read_lines(pairs)} - voted_on
            rows = [*rows, *read_lines(pairs)]
            pairs.unlink()
            choose(rows)
            done = judge("--resume", "--import", votes)
            assert f"{votes}: took {2 * len(voted_on) - 2} votes; 2 had been taken before\n" in done.stdout
        else:
            choose(rows)
            done = judge("--resume", "--import", votes)
    assert (run / "result.json").exists()
    assert sorted((vote["pair"], vote["judge"]) for vote in votes_of(run)) == sorted(
        (name, judge) for name in voted_on for judge in ("ann", "bob")
    )


def test_file_votes_that_cannot_count_are_named(tmp_path: Path, family: Family) -> None:
    """One on a pair of another run ends the search before it begins; one that came late is told."""
    path, run, pairs = config(tmp_path, family, None), tmp_path / "run", tmp_path / "pairs.jsonl"
    run_here("judge", path, "--out", run, "--export", pairs)
    votes = tmp_path / "choices.jsonl"
    votes.write_text('{"pair": "zzz", "choice": "left"}\n')
    assert f"{votes}: has a vote on pair 'zzz', which this search has not written" in refusal(
        "judge", path, "--out", run, "--resume", "--import", votes
    )
    file = VoteFile(run / "votes.jsonl")
    (one,) = file.rounds
    file.close(one)
    votes.write_text(json.dumps({"pair": next(iter(file.pairs)), "choice": "tie"}) + "\n")
    _, line = choices_of(votes, read_choices(votes), VoteFile(file.path), {one.task: {}})
    assert line == "took 0 votes; 1 came after their generation had ended, and do not count"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "is no JSON"),
        ('{"choice": "left"}', """its keys are choice; expected {"pair": NAME, "choice": …}"""),
        ('{"pair": "a", "choice": "none"}', "choice: 'none'; expected one of left, right, tie, both_bad"),
        ('{"pair": "b", "choice": "tie", "judge": "ann"}', "is a second vote of judge 'ann' on one pair"),
    ],
)
def test_files_of_choices_that_cannot_count_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text('{"pair": "b", "choice": "left", "judge": "ann"}\n' + line + "\n")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_choices(path)
    assert str(caught.value).startswith(f"{path}:2")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_page_of_pairs_works_from_a_file(tmp_path: Path) -> None:
    pairs = [
        {"pair": f"p{n}", "question": "Which?", "prompt": HOSTILE[0], "left": HOSTILE[n % 2],
         "right": "</script><i>x</i>", "pictures": False} for n in range(3)
    ]  # fmt: skip
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    with Browser(tmp_path) as browser:
        browser.open((tmp_path / "pairs.html").as_uri())
        assert browser.evaluate("left.lastElementChild.textContent") == HOSTILE[0]
        for key in ("ArrowLeft", "ArrowUp", "Backspace", "ArrowDown", "ArrowRight"):
            browser.press(key)
        saved = tmp_path / "votes.jsonl"
        saved.write_text(browser.evaluate("lines()"))
        assert not browser.errors and browser.evaluate("document.title") == "evojax-merge: pairs"
    assert read_choices(saved) == {"p0": [("left", "")], "p1": [("both_bad", "")], "p2": [("right", "")]}


class Model(BaseHTTPRequestHandler):
    """An OpenAI-compatible model that prefers the shorter answer, or, of answers of one length, the first one."""

    failures = 0
    # How many requests are answered before none is; None: all.
    answers: int | None = None

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first, second = re.split(r"# Answer [AB]\n", request["messages"][1]["content"])[1:]
        if type(self).failures or type(self).answers == 0:
            type(self).failures = max(0, type(self).failures - 1)
            self.send_error(503)
            return
        if type(self).answers is not None:
            type(self).answers -= 1
        word = "B." if len(second.strip()) < len(first.strip()) else "A"
        body = json.dumps({"choices": [{"message": {"content": word}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None: ...


@pytest.fixture
def model() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_language_model_is_asked_in_both_orders(model: str) -> None:
    judge = LanguageModelJudge(model, "small", "Which?", pauses=(0.0,))
    assert judge.choose({}, "p", "long answer", "short") == "right"
    assert judge.choose({}, "p", "short", "long answer") == "left"
    # It takes the first of two equal answers, whichever that is.
    assert judge.choose({}, "p", "abc", "xyz") == "tie"
    assert judge.report() == "small: 3 votes; on 33% of the pairs the order decided, and these are ties"


def test_a_language_model_that_does_not_answer_is_asked_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "failures", 1)
    assert LanguageModelJudge(model, "small", "Which?", pauses=(0.0,)).choose({}, "p", "ab", "a") == "right"
    monkeypatch.setattr(Model, "failures", 9)
    with pytest.raises(Failed, match=r"chat/completions does not answer \(status 503\); all votes are kept"):
        LanguageModelJudge(model, "small", "Which?", pauses=(0.0,)).choose({}, "p", "ab", "a")


# ---------------------------------------------------------------------------------------------------------------
# A model in this process


def rubric_task(folder: Path, family: Family, **changes: Any) -> Any:
    document = {
        "name": "polite", "kind": "rubric", "file": str(family.tasks), "judge": str(family.parents[0]),
        "rubric": "w1 {prompt} w2 {response} w3", "good": " w5", "bad": " w6", "max_new_tokens": 4,
    } | changes  # fmt: skip
    return open_rubric(RubricConfig(**document), Opening("config.yaml: tasks[0]", folder))


def test_the_odds_of_yes_are_those_of_transformers(tmp_path: Path, family: Family) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = rubric_task(tmp_path, family).subset([0, 1, 2])
    texts = [["w7 w8", "w9", "w10 w11 w12"], ["w7 w8", "w4", ""]]
    empty = np.zeros((2, 0), np.float32)
    scores = task.score(Responses(empty, np.zeros(0, int), empty.astype(bool), texts))["log_odds"]
    tokenizer = AutoTokenizer.from_pretrained(family.parents[0])
    model = AutoModelForCausalLM.from_pretrained(family.parents[0]).eval()
    for p, row in enumerate(texts):
        for n, text in enumerate(row):
            asked = f"w1 {task.records[n]['prompt']} w2 {text} w3"
            with torch.no_grad():
                logits = model(**tokenizer(asked, return_tensors="pt")).logits[0, -1]
            yes, no = (tokenizer(word)["input_ids"][-1] for word in ("w5", "w6"))
            assert scores[p, n] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert scores[0, 0] == scores[1, 0] and task.paths()["judge"] == str(family.parents[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rubric": "{prompt}"}, "rubric: does not name {response}, the text that is judged"),
        ({"rubric": "{question} {response}"}, "the record has no field 'question', which rubric names"),
        ({"judge": "nowhere"}, "tasks[0].judge"),
        ({"bad": " w5"}, "good, bad: expected two different texts"),
    ],
)
def test_a_rubric_that_no_model_can_judge_by_is_refused(
    tmp_path: Path, family: Family, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, ValueError), match=re.escape(message)):
        rubric_task(tmp_path, family, **changes)


def test_a_search_by_a_rubric(tmp_path: Path, family: Family) -> None:
    path = config(tmp_path, family)
    document = yaml.safe_load(path.read_text())
    document["tasks"] = [{
        "name": "polite", "kind": "rubric", "file": str(family.tasks), "judge": str(family.parents[0]),
        "rubric": "{prompt} {response}", "good": " w5", "bad": " w6", "max_new_tokens": 2, "limit": 4,
    }]  # fmt: skip
    document["search"] = {"generations": 2, "population": 4}
    run_here("search", write_yaml(path, document), "--out", tmp_path / "run")
    result = read_json(tmp_path / "run" / "result.json")
    rows = {row["role"]: row["heldout_scores"]["polite/log_odds"] for row in result["table"]}
    assert {"base", "parent", "winner"} <= rows.keys() and all(map(np.isfinite, rows.values()))
    assert (
        str(family.parents[0] / "config.json")
        in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["inputs"]
    )


# ---------------------------------------------------------------------------------------------------------------
# The page


def ballot(folder: Path, rounds: int = 1, **voting: Any) -> Ballot:
    examples = tuple(Example(f"prompt <i>{n}</i>", (" x",), "x", n + 1) for n in range(3))
    config = VotesConfig(name="taste", question="Which <u>one</u>?", votes=30, heldout_votes=2, **voting)
    task = HumanTask(
        "taste", "exact_match", "preference", 1.0, "prompts.jsonl", examples, records=({},) * 3, voting=Voting(config)
    )
    return Ballot(task, VoteFile(folder / "votes.jsonl"), rounds, 0)


def voted_on(
    one: Ballot, answers: list[str], genomes: np.ndarray | None = None
) -> tuple[threading.Thread, list[np.ndarray]]:
    """A search that waits for the votes of a round in another thread; its strengths."""
    genomes = np.linspace(0, 1, len(answers))[:, None] if genomes is None else genomes
    strengths = list[np.ndarray]()
    texts = [[f"{answer} {n}" for n in range(3)] for answer in answers]
    thread = threading.Thread(target=lambda: strengths.append(one.strengths(one.task, genomes, texts)), daemon=True)
    thread.start()
    while one.standing()["waiting"]:
        assert thread.is_alive()
        time.sleep(0.01)
    return thread, strengths


def waiting_ballot(folder: Path, answers: str = "ab", **voting: Any) -> Ballot:
    """A ballot whose search waits for the votes of its first round."""
    one = ballot(folder, **voting)
    voted_on(one, [*answers])
    return one


def asked_in_turn(one: Ballot, judges: list[str], choice: str = "left") -> list[Question]:
    """The questions of some judges, each of which is answered before the next one is asked."""
    questions = []
    for judge in judges:
        question = one.question(judge)
        assert question is not None and one.vote(question.number, choice, judge)  # type: ignore[arg-type]
        questions.append(question)
    return questions


def test_the_weight_of_a_judge_is_that_of_the_config(tmp_path: Path) -> None:
    strengths = []
    for name, weights in (("plain", {}), ("weighted", {"ann": 3.0, "bob": 0.0})):
        (tmp_path / name).mkdir()
        one = waiting_ballot(tmp_path / name, judges=weights)
        asked_in_turn(one, ["ann"])
        strengths.append(abs(one.standing()["strengths"][0][1]))
        asked_in_turn(one, ["bob", "cid"])
        (answered,) = VoteFile(tmp_path / name / "votes.jsonl").rounds
        assert [vote.weight for vote in answered.votes] == [weights.get(judge, 1.0) for judge in ("ann", "bob", "cid")]
    assert strengths[1] > 1.2 * strengths[0]


def test_a_second_judge_answers_some_questions_of_the_first(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path, "abcd")
    asked_in_turn(one, ["ann"] * 3)
    questions = asked_in_turn(one, ["bob", "bob"])
    (agreement,) = one.agreements()
    assert agreement.shared == agreement.agreed == 1
    assert (questions[1].candidates, questions[1].example) in [
        ((vote.left, vote.right), vote.example) for vote in one._file.rounds[0].votes[:3]
    ]
    assert one.standing()["agreements"] == ["ann and bob: 1 of 1 shared pairs alike"]


def test_a_bout_is_some_prompts_in_a_row_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path, "abcd", bout=3)
    first = asked_in_turn(one, ["ann"])
    asked_in_turn(one, ["bob"])
    assert len(one.bout("ann")) == 1
    again = waiting_ballot(tmp_path, "abcd", bout=3)
    others = asked_in_turn(again, ["ann", "ann"], "right")
    assert {question.candidates for question in (*first, *others)} == {first[0].candidates}
    assert len({question.example for question in (*first, *others)}) == 3
    assert [vote.choice for vote in again.bout("ann")] == ["left", "right", "right"]
    asked_in_turn(again, ["ann"])
    assert len(again.bout("ann")) == 1


def test_a_page_that_was_open_before_a_restart_votes_on_no_other_question(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path, "abcd")
    stale = one.question("ann")
    asked_in_turn(one, ["bob"] * 3)
    again = waiting_ballot(tmp_path, "abcd")
    question = again.question("ann")
    assert stale is not None and question is not None and question.candidates != stale.candidates
    assert question.number != stale.number and not again.vote(stale.number, "left", "ann")


def test_the_best_of_earlier_generations_meet_those_of_the_next(tmp_path: Path) -> None:
    one, following = ballot(tmp_path, 2), np.array([[0.2], [0.3]], np.float32)
    first = np.array([[0.0], [1.0]], np.float32)
    assert one.incumbents(first).shape == (0, 1)
    thread, _ = voted_on(one, ["a", "b"], first)
    while (question := one.question("ann")) is not None:
        one.vote(question.number, "left" if question.left.startswith("b") else "right", "ann")
    thread.join(timeout=30)
    best = one.incumbents(following, 1)
    assert best.tolist() == [[1.0]] and one.best(2).tolist() == [[1.0], [0.0]]
    thread, _ = voted_on(one, ["c", "d", "b"], np.concatenate([following, best]))
    while (question := one.question("ann")) is not None:
        one.vote(question.number, "tie", "ann")
    thread.join(timeout=30)
    # A search that meets the file again has the same candidates beside each generation.
    replayed = ballot(tmp_path)
    assert replayed.incumbents(first).shape == (0, 1)
    assert replayed.incumbents(following, 1).tolist() == [[1.0]]


def test_candidates_with_the_same_answers_are_as_good_as_each_other(tmp_path: Path) -> None:
    # The third is farther from the first than the second is, and nobody votes on it.
    genomes = np.array([[0.0], [1.0], [2.0]], np.float32)
    strengths = {}
    for third in "ac":
        file = VoteFile(tmp_path / f"{third}.jsonl")
        one = file.open("ab", "taste", genomes, ["a", "b", third])
        for _ in range(6):
            file.add(one, Vote(0, 0, 1, "left", ("x", "y"), "ann"))
        again = Ballot(ballot(tmp_path).task, VoteFile(file.path), 1, 0)
        strengths[third] = again.preferences(1, 1).at(genomes).mean
    same, other = strengths["a"], strengths["c"]
    assert abs(same[0] - same[2]) < 0.25 * (same[0] - same[1])
    assert other[0] - other[2] > 0.5 * (other[0] - other[1])


def test_votes_of_another_run_are_refused(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path)
    asked_in_turn(one, ["ann"])
    with pytest.raises(InputError, match=r"votes\.jsonl: its votes on task taste are of other candidates"):
        ballot(tmp_path).strengths(one.task, np.array([[0.5], [0.6]]), [["x"] * 3, ["y"] * 3])


def test_a_page_without_the_token_is_refused(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path)
    with served([one]) as address:
        host = address.rsplit("/", 2)[0]
        number = httpx.get(f"{address}state?judge=ann").json()["question"]["number"]
        vote = {"task": 0, "number": number, "choice": "left", "judge": "ann"}
        for wrong in (f"{host}/", f"{host}/x/", f"{host}/x/state", f"{host}/x/judge.js"):
            assert httpx.get(wrong).status_code == 404
        assert httpx.post(f"{host}/x/vote", json=vote).status_code == 404
        assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
        assert httpx.post(f"{address}vote", content=json.dumps(vote)).status_code == 404
        assert httpx.post(f"{address}vote", json=vote | {"choice": "all"}).status_code == 400
        assert not one._file.rounds[0].votes
        assert httpx.post(f"{address}vote", json=vote).json()["counted"]
        # A vote that is sent again is not counted again.
        assert not httpx.post(f"{address}vote", json=vote).json()["counted"]


def test_requests_of_other_pages_are_refused(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path)
    with served([one]) as address:
        own = address.rsplit("/", 2)[0]
        number = httpx.get(f"{address}state?judge=ann", headers={"Origin": own}).json()["question"]["number"]
        vote = {"task": 0, "number": number, "choice": "left", "judge": "ann"}
        others = ["https://evil.example", "null", own.replace("http", "https"), "http://127.0.0.1", f"{own}0",
                  own.replace("127.0.0.1", "localhost"), "", "http://127.0.0.1:1"]  # fmt: skip
        for origin in others:
            headers = {"Origin": origin}
            assert httpx.get(f"{address}state?judge=eve", headers=headers).status_code == 404, origin
            assert httpx.post(f"{address}vote", json=vote, headers=headers).status_code == 404, origin
            assert httpx.post(f"{address}leave?judge=ann", headers=headers).status_code == 404, origin
        assert not one._file.rounds[0].votes
        # Through a tunnel the host has another name.
        through = {"Host": "localhost:8000", "Origin": "http://localhost:8000"}
        assert httpx.post(f"{address}vote", json=vote, headers=through).json()["counted"]


MALFORMED = [
    b"garbage\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /%ff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST /TOKEN/vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    b"POST /TOKEN/vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    b"\r\n\r\nzz\r\n",
    b"GET /TOKEN/picture/%00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
]  # fmt: skip


def test_requests_that_are_none_print_nothing_and_hinder_nobody(tmp_path: Path, capfd: Any, caplog: Any) -> None:
    one = waiting_ballot(tmp_path)
    with served([one]) as address:
        port, token = int(address.split(":")[2].split("/")[0]), address.split("/")[3]
        for request in MALFORMED:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(request.replace(b"TOKEN", token.encode()))
                connection.settimeout(0.1)
                with suppress(OSError):
                    connection.recv(100)
        assert httpx.get(f"{address}state?judge=ann").json()["question"] is not None
    assert not any(capfd.readouterr()) and not [record for record in caplog.records if record.levelname == "ERROR"]


def test_no_more_of_a_body_is_read_than_it_may_have(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path)
    with served([one]) as address:
        port, token = int(address.split(":")[2].split("/")[0]), address.split("/")[3]
        head = f"POST /{token}/vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            with suppress(ConnectionError):
                for _ in range(1000):
                    connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                pytest.fail("all was read")


def test_the_token_is_its_users_alone_from_its_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, modes = tmp_path / "judge-token", list[int]()
    write = Path.write_text

    def watched(self: Path, text: str) -> int:
        modes.append(self.stat().st_mode & 0o777)
        return write(self, text)

    usual = os.umask(0)
    try:
        monkeypatch.setattr(Path, "write_text", watched)
        token = judge_token(path)
    finally:
        os.umask(usual)
    assert modes == [0o600] == [path.stat().st_mode & 0o777] and re.fullmatch(r"[\w-]{22}", token)
    assert judge_token(path) == token and list(tmp_path.iterdir()) == [path]
    # Others may have read it.
    path.chmod(0o640)
    assert judge_token(path) != token and path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "secret").write_bytes(b"of another file")
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="judge-token: is a link"):
        judge_token(path)


def test_one_process_alone_tries_the_port(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tried = config(tmp_path, family, None), list[int]()
    monkeypatch.setattr(opening, "listen", tried.append)
    problem = open_problem(path)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InputError, match="people judge searches of one process; leave --distributed out"):
        opening.check_judges(path, tmp_path / "run", problem, opening.JudgeOptions(port=8000), resume=False)
    assert not tried


@pytest.mark.parametrize(
    "body",
    [
        "[" * 9000, "[]", '{"task": 0}', '{"task": -9, "number": 1, "choice": "left", "judge": "ann"}',
        '{"task": 0, "number": Infinity, "choice": "left", "judge": "ann"}', b"\xff", " " * 20_000,
    ],
)  # fmt: skip
def test_a_vote_that_is_none_is_refused(tmp_path: Path, body: str | bytes) -> None:
    one = waiting_ballot(tmp_path)
    with served([one]) as address:
        answer = httpx.post(f"{address}vote", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.text == "expected task, number, choice and judge"
    assert not one._file.rounds[0].votes


def test_a_name_that_no_file_can_hold_hinders_nobody(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path, "abcd")
    with served([one]) as address:
        for judge in ("\ud800\x1b[31m<b>\0", "bob"):
            for _ in range(3):
                # As a browser sends the name: in a query half of a surrogate pair is U+FFFD.
                question = one.question(judge)
                assert question is not None
                vote = {"task": 0, "number": question.number, "choice": "left", "judge": judge}
                content = json.dumps(vote)
                answer = httpx.post(f"{address}vote", content=content, headers={"Content-Type": "application/json"})
                assert answer.json()["counted"]
        (line,) = httpx.get(f"{address}state?judge=bob").json()["standing"]["agreements"]
    assert line.startswith("bob and \ud800\x1b[31m<b>\0: ")
    assert {vote.judge for vote in VoteFile(one._file.path).rounds[0].votes} == {"\ud800\x1b[31m<b>\0", "bob"}


def test_two_judges_have_different_questions_and_a_port_in_use_is_named(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path, "abcd")
    with served([one]) as address:
        asked = [httpx.get(f"{address}state?judge={judge}").json()["question"]["number"] for judge in "xyx"]
        assert asked[0] == asked[2] != asked[1]
        port = int(address.split(":")[2].split("/")[0])
        with pytest.raises(InputError, match=f"{port} cannot be listened on"), served([one], port):
            pass


def test_the_question_of_a_judge_who_left_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = waiting_ballot(tmp_path)
    left = one.question("ann")
    assert left is not None and one.question("bob") is None
    monkeypatch.setattr(ballots, "PATIENCE", -1.0)
    assert one.question("bob") == left
    assert not one.vote(left.number, "left", "ann") and one.vote(left.number, "left", "bob")


def test_the_question_of_a_closed_page_goes_to_the_next_at_once(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path)
    with served([one]) as address:

        def question(judge: str) -> Any:
            return httpx.get(f"{address}state?judge={judge}").json()["question"]

        left = question("ann")
        assert left is not None and question("bob") is None
        assert httpx.post(f"{address.rsplit('/', 2)[0]}/x/leave?judge=ann").status_code == 404
        assert httpx.post(f"{address}leave?judge=ann").status_code == 204
        assert {left["left"], left["right"]} == {question("bob")["left"], question("bob")["right"]}


def test_links_to_the_page_stay_good_and_it_says_when_the_search_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FAREWELL", 1.5)
    one = waiting_ballot(tmp_path)

    def wait_for_the_end(address: str) -> None:
        while not httpx.get(f"{address}state?judge=ann").json()["ended"]:
            time.sleep(0.1)

    with served([one], token="x" * 22) as address:
        assert address.endswith(f"/{'x' * 22}/")
        assert not httpx.get(f"{address}state?judge=ann").json()["ended"]
        waiting = threading.Thread(target=wait_for_the_end, args=(address,), daemon=True)
        waiting.start()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_an_answer_of_the_server_from_before_a_vote_is_not_shown_after_it(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path, "abcd")
    with served([one]) as address, Browser(tmp_path) as browser:
        browser.open(address)
        browser.wait("open !== null")
        browser.evaluate(
            "(() => { const send = window.fetch; window.fetch = async (...request) => {"
            " const answer = await send(...request);"
            " if (request[0].startsWith('state')) await new Promise((done) => setTimeout(done, 300));"
            " return answer; }; refresh().then(() => { window.late = true; }); })()"
        )
        first = browser.evaluate("open.number")
        browser.press("ArrowLeft")
        browser.wait(f"open !== null && open.number > {first}")
        browser.wait("window.late === true")
        assert browser.evaluate("open.number") > first and not browser.errors


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_page_says_where_its_vote_came_too_late(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path, "abcd")
    with served([one]) as address, Browser(tmp_path) as browser:
        browser.open(address)
        browser.wait("open !== null")
        # The same judge in another window.
        asked_in_turn(one, [browser.evaluate("judge.value")])
        browser.press("ArrowLeft")
        browser.wait("!document.getElementById('error').hidden")
        assert "was not counted: the question has been answered" in browser.evaluate("error.textContent")
        assert len(one._file.rounds[0].votes) == 1 and browser.evaluate("open !== null")


def drawing_ballot(folder: Path) -> Ballot:
    """A ballot on pictures, of which those of candidate k have the brightness k / 2."""
    task = HumanImageTask(
        "looks", 1.0, ({"seed": 1},) * 3, ("a <b>cat</b>", "a dog", "a tree"), (1, 2, 3), (("p.jsonl", 1),) * 3,
        (0, 1, 2), {}, 8, "tasks[0]", None, "images",
        Voting(VotesConfig(name="looks", question="Which picture?", votes=30, heldout_votes=2)),
    )  # fmt: skip
    return Ballot(task, VoteFile(folder / "votes.jsonl"), 1, 0)


def drawn_by(one: Ballot, candidate: int, prompts: int = 3) -> list[str]:
    assert isinstance(one.task, HumanImageTask)
    pixels = np.linspace(0, 0.1, 64).reshape(8, 8, 1)
    return [one.task.pictures.add(pixels + candidate / 2 + n / 100) for n in range(prompts)]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_pictures_are_compared_in_a_browser(tmp_path: Path) -> None:
    one = drawing_ballot(tmp_path)
    strengths: list[np.ndarray] = []
    drawn, genomes = [drawn_by(one, 0), drawn_by(one, 1)], np.array([[0.0], [1.0]])
    thread = threading.Thread(target=lambda: strengths.append(one.strengths(one.task, genomes, drawn)), daemon=True)
    thread.start()
    with served([one]) as address, Browser(tmp_path) as browser:
        assert httpx.get(f"{address}picture/{drawn[0][0]}").content.startswith(b"\x89PNG")
        assert httpx.get(f"{address}picture/..%2fjudge.js").status_code == 404
        assert httpx.get(f"{address}picture/{'0' * 32}").status_code == 404
        assert httpx.get(f"{address.rsplit('/', 2)[0]}/x/picture/{drawn[0][0]}").status_code == 404
        browser.open(address)
        latest = 0
        while True:
            browser.wait(f"open === null ? !document.getElementById('waiting').hidden : open.number > {latest}")
            if browser.evaluate("open === null"):
                break
            latest = browser.evaluate("open.number")
            browser.wait("[...document.images].every((picture) => picture.complete)")
            assert browser.evaluate("[...document.images].map((picture) => picture.naturalWidth)") == [8, 8]
            shown = browser.evaluate("[...document.images].map((picture) => picture.src.split('/').pop())")
            assert browser.evaluate("document.querySelectorAll('main b').length") == 0
            browser.press("ArrowLeft" if shown[0] in drawn[1] else "ArrowRight")
        thread.join(timeout=30)
        assert not browser.errors and all(url.startswith((address, "data:", "about:")) for url in browser.requests)
    assert strengths[0][1] > strengths[0][0]


def test_pictures_stand_in_a_file_of_pairs_and_before_functions(tmp_path: Path) -> None:
    one = drawing_ballot(tmp_path)
    drawn = [drawn_by(one, 0), drawn_by(one, 1)]
    assert one.task.content(drawn[1][0]).shape == (8, 8, 1)
    assert one.task.content(drawn[1][0]).mean() == pytest.approx(0.55, abs=0.01)
    pairs = tmp_path / "pairs.jsonl"
    by_file = Ballot(one.task, VoteFile(tmp_path / "file.jsonl"), 1, 0, pairs=pairs)
    with pytest.raises(VotesAwaited):
        by_file.strengths(one.task, np.array([[0.0], [1.0]]), drawn)
    rows = list(read_lines(pairs))
    assert rows and all(row["pictures"] and row["left"].startswith("data:image/png;base64,") for row in rows)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_person_votes_in_a_browser(tmp_path: Path, width: int) -> None:
    one = ballot(tmp_path)
    thread, strengths = voted_on(one, HOSTILE)
    with served([one]) as address, Browser(tmp_path, width) as browser:
        browser.open(address)
        browser.wait("open !== null")
        # The question stays the judge's under another name.
        browser.evaluate("judge.value = '<img src=x>'; judge.dispatchEvent(new Event('change'))")
        latest, moved = 0, set()
        for _ in range(30):
            browser.wait(
                f"open === null ? document.getElementById('waiting').hidden === false : open.number > {latest}"
            )
            if browser.evaluate("open === null"):
                break
            latest = browser.evaluate("open.number")
            shown = browser.evaluate("[left.lastElementChild.textContent, right.lastElementChild.textContent]")
            # To the last letter, and nothing of it as markup or as a command.
            assert sorted(text[:-2] for text in shown) == sorted(HOSTILE)
            assert browser.evaluate("document.getElementById('question').textContent") == "Which <u>one</u>?"
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            moved.add(browser.evaluate("document.getElementById('changed').textContent")[:19])
            browser.press("ArrowLeft" if shown[0].startswith("<script>") else "ArrowRight")
        thread.join(timeout=30)
        # Before the second vote nothing has moved yet.
        assert "the last vote moved" in moved and not browser.evaluate("document.images.length")
        assert browser.evaluate("document.title") == "evojax-merge: judge"
        assert not browser.evaluate("document.querySelectorAll('main b, main i, main u').length")
        assert not browser.errors
        assert all(url.startswith((address, "data:", "about:")) for url in browser.requests)
    votes = one._file.rounds[0].votes
    assert votes and all((vote.left, vote.choice) in ((0, "left"), (1, "right")) for vote in votes)
    assert {vote.judge for vote in votes} == {"<img src=x>"}
    assert strengths[0][0] > strengths[0][1]


class Gate:
    """Stops a search where it first calls `reach` with a moment, until that is over."""

    def __init__(self) -> None:
        self.changed, self.at, self.is_open, self.over = threading.Condition(), "", False, set[str]()

    def reach(self, moment: str) -> None:
        with self.changed:
            self.at = moment
            self.changed.notify_all()
            self.changed.wait_for(lambda: moment in self.over or self.is_open)

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        with self.changed:
            assert self.changed.wait_for(lambda: self.at == moment, timeout=120), f"{moment}: still at {self.at}"
        yield
        with self.changed:
            self.over.add(moment)
            self.changed.notify_all()


def gated(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop searches in the middle of each piece of work that judges wait for."""
    load, score, write = core.open_evaluators, SpaceEvaluator.score, core.write_winner
    generations = itertools.count(1)

    def open_half(problem: Any, prepared: Any, devices: Any, loading: Any, *others: Any) -> Any:
        with loading("loading", 2) as progress:
            progress(1)
            gate.reach("loading")
        return load(problem, prepared, devices, loading, *others)

    def score_slowly(self: Any, genomes: Any, progress: Any = lambda done: None) -> Any:
        if isinstance(self, AskingEvaluator | RememberingEvaluator):
            progress(1)
            gate.reach("choosing" if isinstance(self, RememberingEvaluator) else f"writing {next(generations)}")
        return score(self, genomes, progress)

    def write_slowly(*arguments: Any) -> None:
        gate.reach("writing the winner")
        write(*arguments)

    monkeypatch.setattr(core, "open_evaluators", open_half)
    monkeypatch.setattr(SpaceEvaluator, "score", score_slowly)
    monkeypatch.setattr(core, "write_winner", write_slowly)


WAITING = "document.getElementById('waiting').hidden ? '' : document.getElementById('waiting').textContent"
RESULT = "document.getElementById('result').hidden ? '' : document.getElementById('result').innerText"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_page_says_what_happens_at_each_of_its_moments(
    tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run, gate, texts = config(tmp_path, family, None, votes=4), tmp_path / "run", Gate(), dict[str, str]()
    gated(gate, monkeypatch)
    monkeypatch.setattr(server, "FAREWELL", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def seen(browser: Browser) -> str:
        """The page's words, without the seconds that pass and the share, which an open page asks for now and then."""
        left = r", about \d+:\d+ left( at the rate so far)?"
        return re.sub(rf"{left}|\d+:\d+( so far)?|\d+% done", "", browser.evaluate("document.body.innerText"))

    def shows(browser: Browser, moment: str, words: str) -> None:
        """The words of a moment are shown, and no figure of the posterior; the same where the page is loaded again."""
        browser.wait(f"new RegExp({json.dumps(f'^{words}$')}).test({WAITING})")
        before = seen(browser)
        assert browser.evaluate("document.getElementById('ranking').open") is False and "±" not in before
        browser.screenshot(tmp_path / f"{moment}.png")
        browser.evaluate("window.isOld = true")
        browser.evaluate("location.reload()")
        browser.wait(f"window.isOld === undefined && document.readyState === 'complete' && ({WAITING}) !== ''")
        assert seen(browser) == before

    def vote(browser: Browser) -> None:
        browser.wait("open !== null")
        while browser.evaluate("open !== null"):
            latest = browser.evaluate("open.number")
            browser.press("ArrowLeft")
            browser.wait(f"!sending && (open === null || open.number > {latest})")

    def judge() -> None:
        so_far, left = r"; 0:\d+ so far", r"(, about \d+:\d+ left at the rate so far)?\."
        with Browser(tmp_path, 1000, 600) as browser:
            with gate.during("loading"):
                browser.open(f"http://127.0.0.1:{port}/{(run / 'judge-token').read_text()}/")
                begun = "Before the first pair, step 1 of 2: the models are being loaded, 50% done"
                shows(browser, "loading", begun + so_far + left)
            with gate.during("writing 1"):
                written = r"the candidates of generation 1 of 2 are writing their answers, \d+% done"
                shows(browser, "writing", f"Before the first pair, step 2 of 2: {written}{so_far}{left}")
            vote(browser)
            with gate.during("writing 2"):
                written = r"Next, the candidates of generation 2 of 2 are writing their answers, \d+% done"
                last = r"(, about 0:\d+ left)? \(the last generation's took 0:\d+\)\."
                shows(browser, "between", written + so_far + last)
            vote(browser)
            with gate.during("choosing"):
                chosen = r"The last generation has its votes: the winner is being chosen, \d+% done"
                shows(browser, "choosing", chosen + so_far + left)
                assert not browser.evaluate(RESULT)
            vote(browser)
            with gate.during("writing the winner"):
                over = "The search is over: its winner is being written to best/model in the run's folder"
                shows(browser, "chosen", over + so_far + r"\.")
                texts["result"] = browser.evaluate(RESULT)
            thanks = "The search has ended, and all votes are kept. Thank you. The winner is best/model"
            shows(browser, "ended", thanks + r" in the run's folder\.")
            assert browser.evaluate(RESULT) == texts["result"]
            assert not browser.errors

    with ThreadPoolExecutor(1) as thread:
        judging = thread.submit(judge)

        def stop(done: Any) -> None:
            if done.exception() is not None:
                gate.is_open = True
                os.kill(os.getpid(), signal.SIGINT)

        judging.add_done_callback(stop)
        done = run_here("judge", path, "--out", run, "--port", port, "--set", "search.generations=2", status=None)
        judging.result()
    assert done.returncode == 0, done.stderr
    # Two held-out votes prove nothing, and neither the page, the terminal nor the card claims or measures anything.
    verdicts, card = (
        read_json(run / "result.json")["verdicts"],
        (run / "best/model/README.md").read_text(),
    )
    judged = [text for text in verdicts if "held-out meetings" in text]
    assert len(judged) == 3 and all(text.endswith("too few votes to say.") for text in judged)
    for text in judged:
        assert text in texts["result"] and text in done.stdout and text in card
    for place in (texts["result"], done.stdout, card):
        assert "too few votes to say" in place and not re.search(r"interval -?\d|better than|worse than", place)
    # Base, parents and uniform merge, each in a row of the table.
    assert re.search(r"base\t\d\t\d\t\d\t\d\ttoo few votes to say", texts["result"])
    assert texts["result"].count("\ttoo few votes to say") == 4


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_page_whose_search_is_gone_says_so_and_asks_no_more(tmp_path: Path) -> None:
    one = waiting_ballot(tmp_path)
    with Browser(tmp_path) as browser:
        with suppress(KeyboardInterrupt), served([one]) as address:
            browser.open(address)
            browser.wait("open !== null")
            raise KeyboardInterrupt
        browser.evaluate("failures = MOST_FAILURES - 2; refresh()")
        browser.wait("document.getElementById('error').textContent.includes('does not answer (try 4 of 5: ')")
        browser.wait("document.getElementById('error').textContent.startsWith('The search has ended or was stopped')")
        asked = len(browser.requests)
        assert browser.evaluate("document.getElementById('answers').hidden && open === null")
        assert browser.evaluate("new Promise((done) => setTimeout(() => done(true), 3500))")
        assert len(browser.requests) == asked


def test_the_time_left_is_that_of_the_last_generation_or_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(activity.time, "monotonic", lambda: now[0])
    one = activity.Activity(3)
    words = lambda: one.state()["activity"].partition("; ")[2]  # noqa: E731
    advance = one.writing(4, lambda done: None)
    now[0] += 30
    assert words() == "0:30 so far."
    advance(1)
    assert words() == "0:30 so far, about 1:30 left at the rate so far."
    # Between two steps the time goes on.
    now[0] += 20
    assert words() == "0:50 so far, about 1:10 left at the rate so far."
    now[0] += 80
    assert words() == "2:10 so far."
    now[0] -= 100
    one.asking()
    now[0] += 1000
    one.counting()
    one.writing(4, lambda done: None)
    now[0] += 10
    assert words() == "0:10 so far, about 0:20 left (the last generation's took 0:30)."
    now[0] += 25
    assert words() == "0:35 so far (the last generation's took 0:30)."


@pytest.mark.parametrize(("won", "lost", "neither"), [(12, 1, 1), (0, 11, 0), (10, 0, 0), (7, 5, 9), (0, 0, 12)])
def test_meetings_have_the_exact_interval_of_scipy(won: int, lost: int, neither: int) -> None:
    sentence = Meetings(won, lost, neither, 2).sentence("the base x")
    start, _, share = sentence.partition("; its share: ")
    assert start == (
        f"Judges preferred the winner to the base x in {won} of {won + lost + neither} held-out meetings, the "
        f"base x in {lost}, and neither in {neither} (to 2 more prompts both give the same answer)"
    )
    if not won + lost:
        assert share == "no vote for either."
        return
    interval = binomtest(won, won + lost).proportion_ci(0.95, "exact")
    noise = ", within noise" if interval.low <= 0.5 <= interval.high else ""
    assert share == f"{won / (won + lost):.0%}, 95% interval {interval.low:.0%} to {interval.high:.0%}{noise}."


def test_nine_votes_are_too_few_and_ten_say_something() -> None:
    few, enough = Meetings(9, 0, 0, 5), Meetings(9, 0, 1, 5)
    assert few.share() == "too few votes to say" != enough.share()
    lead = Lead(0.9, 0.7, 1.0)
    rows = [Row("base", "x", -0.9, {"taste/preference": -0.9}, lead, meetings={"taste/preference": enough}),
            Row("winner", "w", 0.0, {"taste/preference": 0.0})]  # fmt: skip
    assert "+0.9000 (0.7000 to 1.0000)" in markdown_table(rows)
    # Another task beside it: the fitness says nothing where one of its tasks has too few votes.
    scores, meetings = {"taste/preference": -0.9, "sums/accuracy": 0.1}, {"taste/preference": few}
    mixed = replace(rows[0], scores=scores, meetings=meetings, lead=None, name="y", fitness=-0.2)
    winner = replace(rows[1], scores={"taste/preference": 0.0, "sums/accuracy": 0.0})
    assert "| base `y` | -0.2000 | too few votes to say | -0.9000 | 0.1000 |" in markdown_table([mixed, winner])
    result = Result(np.zeros(1), 0.0, ("uniform", 0.0), [mixed, winner], None)  # type: ignore[arg-type]
    assert result.verdicts() == [few.sentence("the base y")] and not result.warnings()
    better = replace(mixed, meetings={"taste/preference": enough}, lead=lead)
    sentences = replace(result, rows=[better, winner]).verdicts()
    assert sentences[0].startswith("On held-out data the winner is better than the base y by 0.9000")
    assert sentences[1:] == [enough.sentence("the base y")]


@thorough
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("kind", judge_bench.KINDS)
def test_a_simulated_person_votes_through_a_whole_search_in_a_browser(kind: str) -> None:
    if kind == "pictures":
        pytest.importorskip("diffusers")
    problem = judge_bench.problem_of(kind, 0, 8, 8, 150)
    on = open_evaluators(problem, problem.prepare())
    shard = on.shards[0]
    truth = judge_bench.HiddenEvaluator(
        shard.space, shard.evaluator, shard.devices, shard.goal, judge_bench.KINDS[kind]
    )
    person = judge_bench.Person(judge_bench.KINDS[kind], np.random.default_rng([0, 7]))
    winner, complaints = judge_bench.by_page(problem, on, person)
    assert not complaints
    # A generation ends early where no vote would say much.
    assert 100 < len(person.waited) < 150
    assert judge_bench.gain_of(winner, problem, truth) > 0


def test_a_search_that_is_killed_between_votes_loses_none(tmp_path: Path, family: Family) -> None:
    path, run = config(tmp_path, family, None), tmp_path / "run"
    counted = 0
    for _ in range(2):
        started = start_command("judge", str(path), "--out", str(run), *(["--resume"] if run.exists() else []))
        address = page_of(started)
        for _ in range(2):
            question = None
            while question is None:
                question = httpx.get(f"{address}state?judge=ann").json()["question"]
            vote = {"task": 0, "number": question["number"], "choice": "left", "judge": "ann"}
            assert httpx.post(f"{address}vote", json=vote).json()["counted"]
            counted += 1
        started.send_signal(signal.SIGKILL)
        started.wait()
        assert len(votes_of(run)) == counted
        log, token = (run / "run.log").read_text(), address.split("/")[3]
        assert f"judge: open {address.replace(token, '[judge-token]')} on this machine" in log and token not in log


def page_of(started: Running) -> str:
    """The address of the page that a search prints."""
    end = time.monotonic() + 300
    printed = started.streams / "stdout"
    while not printed.exists() or (match := re.search(r"http://\S+/", printed.read_text())) is None:
        assert started.poll() is None and time.monotonic() < end, started.read("stderr")
        time.sleep(0.05)
    return match[0]
