"""People as judges: the strengths that votes show, the votes file, searches that judges decide, and their page."""

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from browser import BROWSER, Browser
from helpers import Family, build_family
from hostile import Running, run_command, start_command
from scipy.optimize import minimize

from evojax_merge.errors import Failed, InputError
from evojax_merge.judge import ballot as ballots
from evojax_merge.judge.ballot import Ballot
from evojax_merge.judge.batch import Batch, Pair, VotesAwaited, read_choices
from evojax_merge.judge.pairs import RULES, information
from evojax_merge.judge.posterior import BAR, Kernel, Posterior, distances_between, fit_preferences, outcomes_of
from evojax_merge.judge.server import served
from evojax_merge.judge.votes import Vote, VoteFile
from evojax_merge.tasks.human import HumanTask
from evojax_merge.tasks.language_judge import LanguageModelJudge
from evojax_merge.tasks.text import Example, TextTask

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

    def loss(f: np.ndarray) -> float:
        total = 0.5 * f @ inverse @ f
        for winner, loser, weight in zip(outcomes.winners, outcomes.losers, outcomes.weights, strict=True):
            total += weight * np.log1p(np.exp(strength(f, loser) - strength(f, winner)))
        return float(total)

    mode = minimize(loss, np.zeros(6), tol=1e-12).x
    curvature = inverse.copy()
    for winner, loser, weight in zip(outcomes.winners, outcomes.losers, outcomes.weights, strict=True):
        p = 1 / (1 + np.exp(strength(mode, loser) - strength(mode, winner)))
        step = np.zeros(6)
        if winner != BAR:
            step[winner] += 1
        if loser != BAR:
            step[loser] -= 1
        curvature += weight * p * (1 - p) * np.outer(step, step)
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


def test_information_is_that_of_simulated_votes() -> None:
    rng = np.random.default_rng(2)
    factor = rng.normal(size=(3, 3))
    posterior = Posterior(np.array([0.5, 0.0, -2.0]), factor @ factor.T, 0.0)
    drawn = posterior.sample(400_000, rng)

    def entropy(p: Any) -> Any:
        return -(p * np.log(p) + (1 - p) * np.log(1 - p))

    for left, right in ((0, 1), (0, 2), (1, 2)):
        p = 1 / (1 + np.exp(drawn[:, right] - drawn[:, left]))
        expected = entropy(p.mean()) - entropy(p).mean()
        assert information(posterior)[left, right] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_a_pair_is_one_that_may_be_asked(rule: str) -> None:
    allowed = np.zeros((4, 4), bool)
    allowed[1, 3] = allowed[3, 1] = True
    posterior = Posterior(np.array([9.0, 0.0, 5.0, 1.0]), np.eye(4), 0.0)
    for seed in range(20):
        assert sorted(RULES[rule](posterior, allowed, np.random.default_rng(seed))) == [1, 3]


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


def test_a_vote_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    written(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(InputError, match="is the same vote once more"):
        VoteFile(path)


# ---------------------------------------------------------------------------------------------------------------
# Searches


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("judged"))


def config(folder: Path, family: Family, judge: str | None = "judge.py:shorter", **changes: Any) -> Path:
    (folder / "judge.py").write_text(JUDGE)
    task = {"name": "taste", "kind": "human", "file": str(family.tasks), "max_new_tokens": 4, "votes": 12,
            "heldout_votes": 2} | ({} if judge is None else {"judge": judge}) | changes  # fmt: skip
    document = {
        "base": str(family.base), "parents": [str(parent) for parent in family.parents],
        "space": {"method": "task_arithmetic", "parameters": {"weight": {"low": -2.0, "high": 3.0}}},
        "tasks": [task], "search": {"generations": 3, "population": 4},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return folder / "config.yaml"


def votes_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "votes.jsonl").read_text().splitlines())
    return [{key: value for key, value in line["vote"].items() if key != "time"} for line in lines if "vote" in line]


def test_a_search_that_a_function_judges_and_its_replay(tmp_path: Path, family: Family) -> None:
    path, run, replay = config(tmp_path, family), tmp_path / "run", tmp_path / "replay"
    done = run_command("search", str(path), "--out", str(run))
    assert done.returncode == 0, done.stderr
    votes = votes_of(run)
    assert votes and all(vote["judge"] == "judge.py:shorter" for vote in votes)
    rows = {row["role"]: row for row in json.loads((run / "result.json").read_text())["table"]}
    assert rows["winner"]["heldout_scores"]["taste/preference"] == 0
    # The judge is not asked again: the votes of the file are taken.
    (tmp_path / "judge.py").write_text(JUDGE.replace("<", ">"))
    done = run_command("judge", str(path), "--out", str(replay), "--replay", str(run / "votes.jsonl"))
    assert done.returncode == 0, done.stderr
    assert votes_of(replay) == votes
    for name in ("history.jsonl", "best/recipe.yaml"):
        assert (replay / name).read_bytes() == (run / name).read_bytes()


def test_a_function_that_chooses_nothing_is_named(tmp_path: Path, family: Family) -> None:
    done = run_command("search", str(config(tmp_path, family, "judge.py:confused")), "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert "returned 'the first one'; expected one of left, right, tie, both_bad" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": True}, "guard: people give the base no score to compare with"),
        ({"votes": 0}, "votes: expected a whole number from 1"),
        ({"judge": "judge.py:nobody"}, "judge.py has no function 'nobody'"),
        ({"file": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"limit": None, "judge": "judge.py:JUDGED"}, "judge.py has no function"),
    ],
)
def test_tasks_that_nobody_can_judge_are_refused(
    tmp_path: Path, family: Family, changes: dict[str, Any], message: str
) -> None:
    done = run_command("search", str(config(tmp_path, family, **changes)), "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and message in done.stderr


def test_votes_come_by_file(tmp_path: Path, family: Family) -> None:
    path, run, pairs = config(tmp_path, family, None), tmp_path / "run", tmp_path / "pairs.jsonl"
    done = run_command("judge", str(path), "--out", str(run), "--export", str(pairs))
    asked = 0
    while pairs.exists():
        assert done.returncode == 0 and "wait for votes" in done.stdout, done.stderr
        rows = list(map(json.loads, pairs.read_text().splitlines()))
        asked += len(rows)
        votes = tmp_path / "choices.jsonl"
        lines = [{"pair": row["name"], "choice": "left" if len(row["left"]) < len(row["right"]) else "right",
                  "judge": "ann"} for row in rows]  # fmt: skip
        votes.write_text("".join(json.dumps(line) + "\n" for line in lines))
        pairs.unlink()
        done = run_command(
            "judge", str(path), "--out", str(run), "--resume", "--import", str(votes), "--export", str(pairs)
        )
    assert done.returncode == 0 and (run / "result.json").exists(), done.stderr
    assert len(votes_of(run)) == asked and {vote["judge"] for vote in votes_of(run)} == {"ann"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x", "is no JSON"),
        ('{"choice": "left"}', "expected pair and choice"),
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
    pairs = [Pair(f"p{n}", "Which?", HOSTILE[0], HOSTILE[n % 2], "</script><i>x</i>") for n in range(3)]
    with pytest.raises(VotesAwaited):
        Batch(tmp_path / "pairs.jsonl").write(pairs)
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

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first, second = re.split(r"# Answer [AB]\n", request["messages"][1]["content"])[1:]
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
            return
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
# The page


def ballot(folder: Path, texts: int = 2) -> Ballot:
    examples = tuple(Example(f"prompt <i>{n}</i>", (" x",), "x", n + 1) for n in range(3))
    text = TextTask("taste", "exact_match", "preference", 1.0, "prompts.jsonl", examples)
    task = HumanTask(text, ({},) * 3, "Which <u>one</u>?", 30, 2)
    return Ballot(task, VoteFile(folder / "votes.jsonl"), 1, 0)


def voted_on(one: Ballot, answers: list[str]) -> tuple[threading.Thread, list[np.ndarray]]:
    """A search that waits for the votes of a round in another thread; its strengths."""
    genomes, strengths = np.linspace(0, 1, len(answers))[:, None], list[np.ndarray]()
    texts = [[f"{answer} {n}" for n in range(3)] for answer in answers]
    thread = threading.Thread(target=lambda: strengths.append(one.strengths(one.task, genomes, texts)), daemon=True)
    thread.start()
    while one.standing().waiting:
        time.sleep(0.01)
    return thread, strengths


def test_a_page_without_the_token_is_refused(tmp_path: Path) -> None:
    one = ballot(tmp_path)
    voted_on(one, ["a", "b"])
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


def test_two_judges_have_different_questions_and_a_port_in_use_is_named(tmp_path: Path) -> None:
    one = ballot(tmp_path)
    voted_on(one, ["a", "b", "c", "d"])
    with served([one]) as address:
        asked = [httpx.get(f"{address}state?judge={judge}").json()["question"]["number"] for judge in "xyx"]
        assert asked[0] == asked[2] != asked[1]
        port = int(address.split(":")[2].split("/")[0])
        with pytest.raises(InputError, match=f"{port} cannot be listened on"), served([one], port):
            pass


def test_the_question_of_a_judge_who_left_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ballot(tmp_path)
    voted_on(one, ["a", "b"])
    left = one.question("ann")
    assert left is not None and one.question("bob") is None
    monkeypatch.setattr(ballots, "PATIENCE", -1.0)
    assert one.question("bob") == left
    assert not one.vote(left.number, "left", "ann") and one.vote(left.number, "left", "bob")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_person_votes_in_a_browser(tmp_path: Path, width: int) -> None:
    one = ballot(tmp_path)
    thread, strengths = voted_on(one, HOSTILE)
    with served([one]) as address, Browser(tmp_path, width) as browser:
        browser.open(address)
        latest = 0
        for _ in range(30):
            browser.wait(
                f"open === null ? document.getElementById('waiting').hidden === false : open.number > {latest}"
            )
            if browser.evaluate("open === null"):
                break
            latest = browser.evaluate("open.number")
            shown = browser.evaluate("[left.lastElementChild.textContent, right.lastElementChild.textContent]")
            assert sorted(text[:5] for text in shown) == sorted(text[:5] for text in HOSTILE)
            assert browser.evaluate("document.getElementById('question').textContent") == "Which <u>one</u>?"
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            browser.press("ArrowLeft" if shown[0].startswith("<script>") else "ArrowRight")
        thread.join(timeout=30)
        assert browser.evaluate("document.title") == "evojax-merge: judge"
        assert not browser.evaluate("document.querySelectorAll('main b, main i, main u').length")
        assert not browser.errors
        assert all(url.startswith((address, "data:", "about:")) for url in browser.requests)
    votes = one._file.rounds[0].votes
    assert votes and all((vote.left, vote.choice) in ((0, "left"), (1, "right")) for vote in votes)
    assert strengths[0][0] > strengths[0][1]


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


def page_of(started: Running) -> str:
    """The address that a search prints once it is loaded."""
    end = time.monotonic() + 300
    printed = started.streams / "stdout"
    while not printed.exists() or (match := re.search(r"http://\S+/", printed.read_text())) is None:
        assert started.poll() is None and time.monotonic() < end, started.read("stderr")
        time.sleep(0.05)
    return match[0]
