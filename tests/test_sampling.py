"""Sampled answers: drawn from the softmax, by seeds alone, and counted by pass@k and majority; and answers' lengths."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers.commands import run_here
from helpers.decoders import greedy_tokens, load_decoder
from helpers.families import Family, build_family
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import load_torch, random_model, save, tiny_config, word_tokenizer, words
from helpers.sampling import thorough
from helpers.searches import open_problem, search_config, task_section
from hostile import run_python
from scipy.stats import chisquare

from evojax_merge.config.documents import parse
from evojax_merge.config.search_config import TaskFile
from evojax_merge.errors import InputError
from evojax_merge.evaluation import generation
from evojax_merge.models.sampling import Draws, Sampler
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.tasks.opening import open_whole_task
from evojax_merge.tasks.patterns import answer_end
from evojax_merge.tasks.sampling import Sampling, pass_at_k
from evojax_merge.tasks.task import Responses, Row

SAMPLERS = (Sampler(1.0), Sampler(0.5), Sampler(1.3, top_k=5), Sampler(0.8, top_p=0.7), Sampler(1.0, 0.6, 9))
PROMPT = (5, 17, 40, 8)
# The least p-value of a test of frequencies; seeds are fixed, and so is the outcome.
SURPRISING = 1e-3


def probabilities(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """float64[..., V]: the distribution of tokens, by transformers' processors."""
    scores = torch.from_numpy(logits.astype(np.float64)).reshape(-1, logits.shape[-1]) / sampler.temperature
    if sampler.top_k is not None:
        scores = transformers.TopKLogitsWarper(sampler.top_k)(None, scores)  # type: ignore[arg-type]
    if sampler.top_p < 1:
        scores = transformers.TopPLogitsWarper(sampler.top_p)(None, scores)  # type: ignore[arg-type]
    return torch.softmax(scores, -1).numpy().reshape(logits.shape)


def seeds(count: int, start: int = 0) -> np.ndarray:
    return np.random.default_rng(start).integers(0, 2**32, (count, 2), dtype=np.uint32)


def assert_frequencies(tokens: np.ndarray, expected: np.ndarray) -> None:
    """A chi-squared test of tokens against probabilities float64[V]; unlikely tokens count together."""
    counts = np.bincount(tokens, minlength=len(expected)).astype(float)
    assert counts[expected == 0].sum() == 0
    wanted = expected * len(tokens)
    often = wanted >= 5
    groups = [(counts[often], wanted[often]), (counts[~often].sum(keepdims=True), wanted[~often].sum(keepdims=True))]
    observed, wanted = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    assert len(wanted) > 4
    kept = wanted > 0
    assert chisquare(observed[kept], wanted[kept]).pvalue > SURPRISING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(tiny_config(), std=0.15), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("sampler", [*SAMPLERS, Sampler(1.0, top_p=1e-9), Sampler(2.0, top_k=1000)])
def test_the_distribution_is_that_of_transformers(sampler: Sampler) -> None:
    logits = np.random.default_rng(1).normal(scale=2, size=(6, 64)).astype(np.float32)
    weights = np.asarray(sampler.log_weights(jnp.asarray(logits)), np.float64)
    expected = probabilities(sampler, logits)
    shares = np.exp(weights - weights.max(-1, keepdims=True))
    np.testing.assert_allclose(shares / shares.sum(-1, keepdims=True), expected, atol=1e-6)
    assert ((shares > 0) == (expected > 0)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tokens_come_as_often_as_the_softmax_says(sampler: Sampler, folder: Path) -> None:
    config, model = load_decoder(folder)
    rows, reference = 4000, load_torch(folder)
    prompts = np.tile(np.array(PROMPT, np.int32), (rows, 1))
    # Draft tokens, which are right in some rows and wrong in others, change no distribution.
    drafts = np.random.default_rng(3).integers(3, 64, (rows, 8))
    draws = Draws(jnp.asarray(seeds(rows)), sampler)
    tokens = greedy_tokens(config, model, prompts, np.zeros(rows, int), 3, (), 3, drafts, draws)
    likeliest = np.bincount(tokens[:, 0]).argmax()
    for position, begun in ((0, np.ones(rows, bool)), (1, tokens[:, 0] == likeliest)):
        text = torch.tensor([[*PROMPT, *([int(likeliest)] * position)]])
        with torch.no_grad():
            logits = reference(text).logits[0, -1].numpy()
        assert_frequencies(tokens[begun, position], probabilities(sampler, logits))
    # The noise of a position is its own: the second token does not repeat the first one's draw.
    assert len(set(map(tuple, tokens.tolist()))) > 60


def test_a_text_depends_on_its_seed_alone(folder: Path) -> None:
    config, model = load_decoder(folder)
    rng, sampler, new = np.random.default_rng(5), Sampler(0.9, 0.9), 12
    prompts = np.repeat(rng.integers(3, 64, (3, 7)), 2, axis=0).astype(np.int32)
    first, of_rows = np.repeat([0, 2, 4], 2), seeds(6, 7)

    def drawn(rows: Sequence[int], window: int, seen: np.ndarray | None = None) -> np.ndarray:
        at = list(rows)
        draws = Draws(jnp.asarray(of_rows[at]), sampler)
        return greedy_tokens(config, model, prompts[at], first[at], new, (), window, seen, draws)

    texts = drawn(range(6), 1)
    assert len(set(map(tuple, texts.tolist()))) == 6
    np.testing.assert_array_equal(drawn([4, 1, 0], 1), texts[[4, 1, 0]])
    for seen in (texts, np.roll(texts, 1, axis=0), np.zeros((6, 0), np.int32)):
        np.testing.assert_array_equal(drawn(range(6), 5, seen), texts)


# ---------------------------------------------------------------------------------------------------------------
# Scores of several answers


@pytest.mark.parametrize(("samples", "k"), [(5, 1), (5, 3), (5, 5), (200, 100)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(samples: int, k: int) -> None:
    estimates = pass_at_k(samples, k)
    if samples == 5:
        for right in range(samples + 1):
            answers = np.arange(samples) < right
            shares = [any(answers[list(chosen)]) for chosen in combinations(range(samples), k)]
            assert estimates[right] == pytest.approx(np.mean(shares))
        return
    # The numerically stable form of the paper.
    paper = [
        1 - np.prod(1 - k / np.arange(samples - c + 1, samples + 1)) if samples - c >= k else 1.0 for c in range(201)
    ]
    np.testing.assert_allclose(estimates, paper, atol=1e-6)


def open_task(folder: Path, targets: list[str], **keys: Any) -> Any:
    write_lines(folder / "data.jsonl", [{"prompt": f"w{i + 5}", "target": target} for i, target in enumerate(targets)])
    section = {"name": "drawn", "kind": "generation", "file": "data.jsonl", **keys}
    (config,) = parse(folder / "tasks.yaml", {"tasks": [section]}, TaskFile).tasks
    return open_whole_task("tasks.yaml: tasks[0]", config, folder, seed=4)


def responses(*texts: list[str], lengths: list[list[int]] | None = None) -> Responses:
    count = len(texts)
    return Responses(np.zeros((count, 0)), np.zeros(0, int), np.zeros((count, 0), bool), list(texts), lengths or [])


def test_answers_are_counted_by_mean_majority_and_pass_at_k(tmp_path: Path) -> None:
    drawn = {"temperature": 0.7, "samples": 4, "over_samples": "majority", "k": 2, "pattern": r"=(\w+)"}
    task = open_task(tmp_path, ["a", "b"], **drawn)
    assert task.metric == "majority"
    # Two right of four, and as many votes for x, of which the first came first; then one right, and none that votes.
    texts = ["so =x", "=a", "=x", "=a a", "=b", "b", "", "none"]
    scores = task.score(responses(texts, texts[::-1]))
    assert scores.keys() == {"exact_match", "majority", "pass_at_k"}
    np.testing.assert_allclose(scores["exact_match"], [[0.5, 0.25], [0, 0]])
    np.testing.assert_array_equal(scores["majority"], [[0, 1], [0, 0]])
    np.testing.assert_allclose(scores["pass_at_k"], [[1 - 1 / 6, 1 / 2], [0, 0]])
    assert [task.extracted(0, texts[:4]), task.extracted(1, texts[4:]), task.extracted(1, ["", "-"])] == [
        "x",
        "b",
        None,
    ]
    part = task.subset([1])
    np.testing.assert_array_equal(part.score(responses(texts[4:]))["majority"], [[1]])


def test_numbers_that_are_equal_vote_together(tmp_path: Path) -> None:
    drawn = {"kind": "exact_match", "temperature": 1.0, "samples": 4}
    task = open_task(tmp_path, ["#### 7"], **drawn, over_samples="pass_at_k")
    assert task.metric == "pass_at_k"
    scores = task.score(responses(["3", "7", "3", "7.0"], ["7", "3", "3", "no"]))
    np.testing.assert_array_equal(scores["majority"], [[0], [0]])
    np.testing.assert_array_equal(task.score(responses(["7", "3", "2", "7.0"]))["majority"], [[1]])
    np.testing.assert_array_equal(scores["accuracy"], [[0.5], [0.25]])
    np.testing.assert_array_equal(scores["pass_at_k"], [[1], [1]])


def test_a_sampled_problem_of_gsm(tmp_path: Path) -> None:
    write_lines(tmp_path / "gsm.jsonl", [{"question": f"q{n}", "answer": f"so #### {n}"} for n in range(2)])
    section = {"name": "sums", "kind": "gsm", "source": "gsm.jsonl", "temperature": 0.6, "samples": 3}
    (config,) = parse(tmp_path / "tasks.yaml", {"tasks": [section | {"over_samples": "majority"}]}, TaskFile).tasks
    task: Any = open_whole_task("tasks[0]", config, tmp_path)
    texts = ["#### 0", "#### 0.", "#### 5", "#### 0", "none", "#### 1"]
    scores = task.score(responses(texts))
    np.testing.assert_array_equal(scores["majority"], [[1, 0]])
    np.testing.assert_allclose(scores["accuracy"], [[2 / 3, 1 / 3]])
    np.testing.assert_array_equal(scores["pass_at_k"], [[1, 1]])
    assert task.extracted(0, texts[:3]) == "0"


def test_a_seed_belongs_to_an_example_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    drawn = {"temperature": 1.0, "samples": 3}
    tasks = [open_task(place, ["a", "b"], **drawn) for place in (tmp_path, tmp_path / "other")]
    tokenizer = word_tokenizer(words())
    rows = [task.requests(tokenizer, 100).prompts for task in tasks]
    assert [row.example for row in rows[0]] == [0, 0, 0, 1, 1, 1]
    assert len({row.seed for row in rows[0]}) == 6 and all(0 <= row.seed < 2**64 for row in rows[0])
    assert [row.seed for row in rows[1]] == [row.seed for row in rows[0]]
    second = tasks[0].subset([1]).requests(tokenizer, 100)
    assert [row.seed for row in second.prompts] == [row.seed for row in rows[0][3:]]
    # Another search draws anew; greedy prompts have no seed.
    row = Row((1, 2), 2, "data.jsonl:1", 0)
    sampler = Sampler(1.0)
    assert Sampling(sampler, seed=1).rows([row]) != Sampling(sampler, seed=2).rows([row])
    assert Sampling(seed=1).rows([row]) == (row,)


def test_a_greedy_task_is_as_without_the_keys(tmp_path: Path) -> None:
    section = {"name": "text", "kind": "generation", "file": "data.jsonl"}
    greedy, plain = (
        parse(tmp_path / "tasks.yaml", {"tasks": [section | keys]}, TaskFile).tasks[0]
        for keys in ({"temperature": 0, "samples": 1, "top_p": 1.0}, {})
    )
    assert greedy.model_dump(mode="json") == plain.model_dump(mode="json")
    assert not {"temperature", "samples", "k", "top_p"} & plain.model_dump(mode="json").keys()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": -1}, r"temperature: expected .*0.*found -1"),
        ({"temperature": 1e-9}, "temperature: 1e-09; expected 0, which is greedy, or 0.001 to 100"),
        ({"temperature": 1, "top_p": 0}, r"top_p: expected .*above 0.*found 0"),
        ({"temperature": 1, "top_k": 0}, r"top_k: expected .*found 0"),
        ({"temperature": 1, "samples": 5000}, r"samples: expected .*1,024, found 5000"),
        ({"samples": 4}, "samples: greedy answers are all alike; give temperature"),
        ({"top_p": 0.9}, "top_p: greedy answers"),
        ({"temperature": 1, "samples": 4, "k": 5}, "k: 5; expected at most samples, which is 4"),
        ({"temperature": 1, "over_samples": "majority"}, "over_samples: majority is of several answers"),
        (
            {"temperature": 1, "samples": 2, "over_samples": "pass_at_k", "metric": "length"},
            "over_samples: pass_at_k; length does not say which answers are right",
        ),
        ({"kind": "likelihood", "metric": "length"}, r"metric: 'length'; likelihood .*generates nothing"),
        ({"kind": "likelihood", "temperature": 1}, r"temperature: likelihood generates nothing"),
        (
            {"kind": "exact_match", "metric": "brevity", "temperature": 1, "samples": 2, "over_samples": "majority"},
            "over_samples: majority goes with metric: accuracy",
        ),
    ],
)
def test_what_cannot_be_drawn_or_counted_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_task(tmp_path, ["1", "2"], **keys)


# ---------------------------------------------------------------------------------------------------------------
# Searches

DRAWN = {
    "name": "drawn", "kind": "exact_match", "file": "tasks.jsonl", "pattern": r"w\d+", "max_new_tokens": 6,
    "temperature": 1.0, "top_p": 0.95, "samples": 3, "over_samples": "pass_at_k", "k": 2,
}  # fmt: skip
SHORT = DRAWN | {"name": "short", "metric": "length", "over_samples": "mean", "k": None, "stop": ["w1"]}

DEVICES_PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from pathlib import Path
from jax.sharding import AxisType, Mesh
from evojax_merge.evaluation.devices import Devices
from evojax_merge.steps.selection import open_evaluator
from evojax_merge.problem import build_problem, read_config

path, texts = Path(sys.argv[1]), {}
problem = build_problem(path, read_config(path, [], None))
batched = problem.prepare().shards[0]
genomes = np.random.default_rng(0).random((3, problem.space.dims)).astype(np.float32)
for population, model in ((1, 1), (2, 1), (1, 2)):
    grid = np.array(jax.devices()[: population * model]).reshape(population, model)
    mesh = Mesh(grid, ("population", "model"), axis_types=(AxisType.Auto,) * 2) if population * model > 1 else None
    scores = open_evaluator(problem, batched, Devices(mesh)).score(genomes)
    texts[f"{population}x{model}"] = scores.outputs["drawn"]
Path(sys.argv[2]).write_text(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = build_family(tmp_path_factory.mktemp("sampled"))
    # One-word targets, some of which are drawn.
    write_lines(family.tasks, [{"prompt": f"w{9 + n} w{30 + n}", "target": f"w{20 + n}"} for n in range(8)])
    return family


def config_of(family: Family, tmp_path: Path, *tasks: dict[str, Any], **changes: Any) -> Path:
    at_home = [task | {"file": str(family.tasks)} for task in tasks]
    return write_yaml(tmp_path / "config.yaml", search_config(family, tasks=at_home, seed=3, **changes))


def test_texts_are_the_same_wherever_and_in_whatever_pieces_they_are_drawn(family: Family, tmp_path: Path) -> None:
    path, out = config_of(family, tmp_path, DRAWN), tmp_path / "texts.json"
    run_python(DEVICES_PROGRAM, path, out, seconds=400)
    texts = read_json(out)
    expected = texts["1x1"]
    drawn = [expected[0][n : n + 3] for n in range(0, len(expected[0]), 3)]
    assert all(len(set(outputs)) > 1 for outputs in drawn)
    assert texts["2x1"] == expected and texts["1x2"] == expected
    for overrides in (
        ["evaluation.bank=disk"], ["evaluation.chunk=1"], ["evaluation.chunk=2"], ["evaluation.tokens_per_batch=16"],
    ):  # fmt: skip
        problem = open_problem(path, *overrides)
        evaluator = open_evaluator(problem, problem.prepare().shards[0])
        genomes = np.random.default_rng(0).random((3, problem.space.dims)).astype(np.float32)
        assert evaluator.score(genomes).outputs["drawn"] == expected, overrides
    alone = evaluator.subset([np.array([1, 4])]).score(genomes).outputs["drawn"]
    assert alone == [row[3:6] + row[12:15] for row in expected]


@thorough
def test_a_search_that_was_interrupted_draws_what_it_would_have(family: Family, tmp_path: Path) -> None:
    path = config_of(family, tmp_path, DRAWN, generations=3)
    run_here("search", path, "--out", tmp_path / "whole")
    run_here("search", path, "--out", tmp_path / "halved", "--set", "search.generations=1")
    run_here("search", path, "--out", tmp_path / "halved", "--resume", "--set", "search.generations=3")
    for file in ("history.jsonl", "best/recipe.yaml"):
        assert (tmp_path / "halved" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    result = read_json(tmp_path / "whole" / "result.json")
    assert {"drawn/accuracy", "drawn/majority", "drawn/pass_at_k"} <= result["table"][0]["heldout_scores"].keys()
    # Another seed draws other texts.
    assert read_lines(tmp_path / "whole/history.jsonl")[0] != read_lines(tmp_path / "halved/history.jsonl")[-1]


def test_a_front_of_right_and_short_answers_writes_each_answer_once(family: Family, tmp_path: Path) -> None:
    """Plan, search and samples of two goals, of which one is the number of tokens."""
    right = DRAWN | {"stop": SHORT["stop"]}
    path = config_of(family, tmp_path, right, SHORT | {"weight": 0.01}, search={"strategy": "pareto"})
    run_here("plan", path)
    run_here("search", path, "--out", tmp_path / "run")
    scores = read_json(tmp_path / "run/result.json")["table"][0]["heldout_scores"]
    assert -6 <= scores["short/length"] < 0
    run_here("evaluate", family.base, "--tasks", path, "--samples", tmp_path / "samples.jsonl")
    lines = read_lines(tmp_path / "samples.jsonl")
    by_task = {name: [line for line in lines if line["task"] == name] for name in ("drawn", "short")}
    assert [line["outputs"] for line in by_task["drawn"]] == [line["outputs"] for line in by_task["short"]]
    assert all(len(line["outputs"]) == 3 and -6 <= line["score"] <= 0 for line in by_task["short"])
    assert {line["extracted"] for line in by_task["drawn"]} != {None}
    records = {f"{family.tasks}:{number}": record for number, record in enumerate(read_lines(family.tasks), start=1)}
    assert all(line["prompt"] == records[line["example"]]["prompt"] for line in lines)


def test_a_length_is_that_of_the_tokens_to_the_end_of_the_stop_text(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = open_problem(config_of(family, tmp_path, SHORT))
    batched, genomes = problem.prepare().shards[0], problem.space.start[None]
    continued, written = batched[0].requests, list[np.ndarray]()
    tokenizer, of_texts = problem.backend.models.tokenizer, generation._texts  # type: ignore[attr-defined]

    def kept(evaluator: Any, tokens: np.ndarray) -> list[list[str]]:
        written.append(tokens)
        return of_texts(evaluator, tokens)

    monkeypatch.setattr(generation, "_texts", kept)
    scores = open_evaluator(problem, batched).score(genomes).matrices["short"]
    assert scores.keys() == {"length"}
    lengths = []
    for ids in written[-1][0]:
        tokens, count = ids[ids >= 0], 0
        while count < len(tokens) and "w1" not in tokenizer.decode(tokens[:count], skip_special_tokens=True):
            count += 1
        lengths.append(count)
    assert len(lengths) == len(continued.prompts) and {6} < set(lengths)
    np.testing.assert_allclose(scores["length"][0], -np.reshape(lengths, (-1, 3)).mean(axis=1), rtol=1e-6)
    # More tokens follow a stop text where the host looks for it less often.
    monkeypatch.setattr(generation, "STOP_CHECK_INTERVAL", 1)
    again = open_evaluator(problem, problem.prepare().shards[0]).score(genomes).matrices["short"]
    assert (written[-1] >= 0).sum() < (written[0] >= 0).sum()
    np.testing.assert_array_equal(again["length"], scores["length"])


def test_an_answer_ends_an_output(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts, and the number of tokens, are the same however often the host looks for answers."""
    to_the_end = SHORT | {"stop": [], "pattern": r"w[12]\d", "max_new_tokens": 40}
    path = config_of(family, tmp_path, to_the_end | {"name": "right", "metric": "accuracy"}, to_the_end)
    outputs, lengths = [], []
    for stop_at, interval in ((None, 32), ("answer", 32), ("answer", 1)):
        monkeypatch.setattr(generation, "STOP_CHECK_INTERVAL", interval)
        changes = ["tasks.0.stop_at=answer", "tasks.1.stop_at=answer"] if stop_at else []
        problem = open_problem(path, *changes)
        scores = open_evaluator(problem, problem.prepare().shards[0]).score(problem.space.start[None])
        outputs.append(scores.outputs["short"][0])
        lengths.append(scores.matrices["short"]["length"][0])
    ends = (answer_end("here", to_the_end["pattern"], text) for text in outputs[0])
    cuts = [text[:end] for text, end in zip(outputs[0], ends, strict=True)]
    assert outputs[1] == outputs[2] == cuts != outputs[0]
    np.testing.assert_array_equal(lengths[1], lengths[2])
    assert (lengths[1] >= lengths[0]).all() and (lengths[1] > lengths[0]).any()


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("the answer is 42", None), ("the answer is 42 or 43", "the answer is 42"), ("the answer is １\ufffd", None),
        ("the answer is １２ and", "the answer is １２"), ("none", None),
    ],
)  # fmt: skip
def test_an_answer_ends_where_no_further_token_changes_it(text: str, cut: str | None) -> None:
    end = answer_end("here", r"answer is (\d+)", text)
    assert (None if end is None else text[:end]) == cut


def test_an_answer_that_nothing_finds_ends_no_output(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stop_at: answer, which is what pattern finds; give pattern as well"):
        open_task(tmp_path, ["1", "2"], stop_at="answer")
    with pytest.raises(InputError, match="stop_at: likelihood generates nothing"):
        open_task(tmp_path, ["1", "2"], kind="likelihood", stop_at="answer")


def test_a_guard_on_length(family: Family, tmp_path: Path) -> None:
    text = task_section(family.tasks)
    short = SHORT | {"weight": 0, "guard": True, "tolerance": 0.5}
    run_here("search", config_of(family, tmp_path, text, short), "--out", tmp_path / "run")
    assert "short" in json.dumps(read_json(tmp_path / "run/result.json")["guards"])
