"""Tasks that a user's own function scores: what it is given, what it may return, and what a run does when it fails."""

import os
import signal
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import yaml
from helpers.families import Family
from helpers.files import read_lines, write_lines, write_yaml
from helpers.models import load_torch, random_records, word_tokenizer, words
from helpers.searches import search_config
from hostile import run_command
from pydantic import ValidationError

from evojax_merge.checkpoints.bank import load_stored
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.errors import Failed, InputError
from evojax_merge.evaluation.batched_tasks import batch_tasks
from evojax_merge.evaluation.evaluator import Evaluator
from evojax_merge.tasks.function import FunctionConfig, FunctionFailed
from evojax_merge.tasks.opening import open_task, open_whole_task, resolved_config
from evojax_merge.tasks.task import Responses, Task

RECORDS = random_records(6, seed=5)

SOURCE = """
import jax
import jax.numpy as jnp
import numpy as np

CALLS = []

def lengths(records, texts):
    CALLS.append((records, texts))
    return [len(text.split()) / len(record["target"]) for record, text in zip(records, texts, strict=True)]

def halves(records, log_probabilities):
    return log_probabilities / 2

def total(logits, targets, mask):
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return jnp.where(mask, found, 0.0).sum()

def weakest(logits, targets, mask):
    right = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    others = jnp.where(jax.nn.one_hot(targets, logits.shape[1], dtype=bool), -jnp.inf, logits).max(axis=1)
    return jnp.where(mask, right - others, jnp.inf).min()

def per_token(logits, targets, mask):
    return logits.max(axis=1)

def decides(logits, targets, mask):
    return 1.0 if logits[0, 0] > 0 else 0.0

def first_is_nan(records, values):
    return [float("nan"), *[1.0] * (len(records) - 1)]

def one_short(records, values):
    return np.zeros(len(records) - 1)

def a_column(records, values):
    return np.zeros((len(records), 1))

def words(records, values):
    return ["right"] * len(records)

def nothing(records, values):
    pass

def ragged(records, values):
    return [[1.0], [1.0, 2.0]]

WIDTH = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_lines(tmp_path / "tasks.jsonl", RECORDS)
    (tmp_path / "own.py").write_text(SOURCE)
    return tmp_path


def config_of(function: str, gets: str = "texts", **changes: Any) -> FunctionConfig:
    new = {"max_new_tokens": 4} if gets == "texts" else {}
    document = {"name": "mine", "kind": "function", "function": function, "inputs": gets, "file": "tasks.jsonl"}
    return FunctionConfig(**(document | new | changes))


def task_of(folder: Path, function: str, gets: str = "texts", **changes: Any) -> Task:
    return open_whole_task("config", config_of(function, gets, **changes), folder)


def test_a_kept_config_names_the_function_from_any_folder(folder: Path) -> None:
    (folder / "beside.py").write_text(SOURCE)
    references = {"own.py:total": f"{folder / 'own.py'}:total", "beside:total": f"{folder / 'beside.py'}:total"}
    for function, kept in references.items():
        config = config_of(function, "logits")
        section = resolved_config(config, *open_task("config", config, folder, 0))
        assert (section["function"], section["file"]) == (kept, str(folder / "tasks.jsonl"))


def score_stored(family: Family, task: Task, tokens_per_batch: int = 64) -> np.ndarray:
    """One model's scores, by the evaluator."""
    sources, config = open_sources([family.base])
    ((batched_tasks, *_),) = batch_tasks([[task]], word_tokenizer(words()), tokens_per_batch, 256, (2,))
    scores = Evaluator(config, word_tokenizer(words()), [batched_tasks]).score_stored(load_stored(sources, config))
    return scores.matrices["mine"]["score"][0]


def torch_logits(family: Family) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(logits, targets) of each record's target, from transformers."""
    model, tokenizer, found = load_torch(family.base), word_tokenizer(words()), []
    for record in RECORDS:
        prompt, target = (tokenizer(record[key])["input_ids"] for key in ("prompt", "target"))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0]
        found.append((logits[len(prompt) - 1 : -1], torch.tensor(target)))
    return found


# ---------------------------------------------------------------------------------------------------------------
# The three forms, against transformers


def test_traced_function_sees_the_logits_of_transformers(family: Family, folder: Path) -> None:
    totals, margins = [], []
    for logits, targets in torch_logits(family):
        right = logits.gather(1, targets[:, None])[:, 0]
        totals.append(float((right - logits.logsumexp(1)).sum()))
        margins.append(float((right - logits.scatter(1, targets[:, None], -torch.inf).amax(1)).min()))
    for name, expected in (("total", totals), ("weakest", margins)):
        found = score_stored(family, task_of(folder, f"own.py:{name}", "logits"))
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_log_probabilities_are_the_targets_of_transformers(family: Family, folder: Path) -> None:
    expected = [float(x.log_softmax(1).gather(1, y[:, None]).sum()) / 2 for x, y in torch_logits(family)]
    found = score_stored(family, task_of(folder, "own.py:halves", "log_probabilities"))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_texts_are_the_greedy_ones_of_transformers(family: Family, folder: Path) -> None:
    task: Any = task_of(folder, "own.py:lengths", max_new_tokens=5, stop=["w7"])
    found = score_stored(family, task)
    model, tokenizer = load_torch(family.base), word_tokenizer(words())
    expected = []
    for record in RECORDS:
        ids = torch.tensor([tokenizer(record["prompt"])["input_ids"]])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        expected.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).split("w7")[0])
    ((records, texts),) = sys.modules[task.function.call.__module__].CALLS
    assert records == RECORDS
    assert [text.strip() for text in texts] == [text.strip() for text in expected]
    rows = zip(expected, RECORDS, strict=True)
    np.testing.assert_allclose(found, [len(text.split()) / len(record["target"]) for text, record in rows], rtol=1e-6)


def test_splits_share_one_traced_function_and_divide_the_records(folder: Path) -> None:
    tokenizer = word_tokenizer(words())
    search, heldout = open_task("config", config_of("own.py:total", "logits", heldout=0.5), folder, 0)
    other = task_of(folder, "own.py:total", "logits", heldout="tasks.jsonl")
    reductions = {task.requests(tokenizer, 256).logits_fn for task in (search, heldout, other)}
    assert len(reductions) == 1
    both: Any = (search, heldout)
    assert sorted(map(str, both[0].records + both[1].records)) == sorted(map(str, RECORDS))
    assert [row.where.rsplit(":")[-1] for row in heldout.requests(tokenizer, 256).scored] == [
        str(RECORDS.index(record) + 1) for record in both[1].records
    ]


def test_texts_need_no_target(family: Family, folder: Path) -> None:
    write_lines(folder / "tasks.jsonl", [{"question": "w5 w9", "target": "w6"}] * 2)
    task = task_of(folder, "own.py:lengths", prompt="{question} w4")
    (prompt, _) = task.requests(word_tokenizer(words()), 256).prompts
    assert prompt.tokens == (5, 9, 4)


# ---------------------------------------------------------------------------------------------------------------
# What it may return


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one_short", r"own.py:one_short returned float64\[5\]; expected 6 numbers"),
        ("a_column", r"float64\[6, 1\]; expected 6"),
        ("words", "own.py:words returned a list of texts; expected 6 numbers"),
        ("nothing", "own.py:nothing returned None; expected 6 numbers"),
        ("ragged", "rows of different lengths; expected 6 numbers"),
    ],
)
def test_wrong_result_names_function_and_shapes(name: str, said: str, folder: Path) -> None:
    task = task_of(folder, f"own.py:{name}")
    with pytest.raises(Failed, match=said):
        task.score(answers([[""] * 6]))


def answers(texts: list[list[str]], totals: np.ndarray | None = None) -> Responses:
    totals = np.zeros((len(texts), 0), np.float32) if totals is None else totals
    return Responses(totals, np.ones(totals.shape[1], int), np.zeros(totals.shape, bool), texts)


def test_traced_function_is_tried_before_anything_is_compiled(folder: Path) -> None:
    tokenizer = word_tokenizer(words())
    longest = max(len(tokenizer(record["target"])["input_ids"]) for record in RECORDS)
    with pytest.raises(Failed, match=rf"own.py:per_token returned float32\[{longest}\] for a row; expected one real"):
        task_of(folder, "own.py:per_token", "logits").requests(tokenizer, 256)
    with pytest.raises(Exception, match="bool"):
        task_of(folder, "own.py:decides", "logits").requests(tokenizer, 256)


def test_nan_fails_the_candidate_and_a_failed_one_is_not_shown(folder: Path) -> None:
    task = task_of(folder, "own.py:first_is_nan")
    score = task.score(answers([[""] * 6]))["score"]
    assert np.isnan(score[0, 0]) and (score[0, 1:] == 1).all()

    totals = np.zeros((3, 6), np.float32)
    totals[1, 2] = np.nan
    found = task_of(folder, "own.py:halves", "log_probabilities").score(answers([[]] * 3, totals))["score"]
    assert np.isnan(found[1]).all() and (found[[0, 2]] == 0).all()


# ---------------------------------------------------------------------------------------------------------------
# From its name to the function


def test_modules_are_found_beside_the_config_and_on_the_path(folder: Path) -> None:
    (folder / "beside_it.py").write_text("import helper_of_it\nscore = helper_of_it.score\n")
    (folder / "helper_of_it.py").write_text("def score(records, texts):\n    return [7.0] * len(records)\n")
    task = task_of(folder, "beside_it:score")
    assert (task.score(answers([[""] * 6]))["score"] == 7).all()
    # Both the module that is named and the one that holds the function.
    assert set(task.files) == {folder / "tasks.jsonl", folder / "beside_it.py", folder / "helper_of_it.py"}
    assert task_of(folder, "statistics:covariance").files[1].name == "statistics.py"


def test_changed_file_is_another_function(folder: Path) -> None:
    for value in (1.0, 2.0):
        (folder / "own.py").write_text(f"def score(records, texts):\n    return [{value}] * len(records)\n")
        assert (task_of(folder, "own.py:score").score(answers([[""] * 6]))["score"] == value).all()


@pytest.mark.parametrize(
    ("function", "source", "said"),
    [
        ("own.py", "", "expected module:name or path/to/file.py:name"),
        ("other.py:score", "", "other.py: no such file, which would be /"),
        ("no_such_module:score", "", "no module 'no_such_module'"),
        ("own.py:scores", "def score(a, b): ...", "no function 'scores' (did you mean 'score'?)"),
        ("own.py:score", "score = 3", "own.py:score is of type int; expected a function"),
        ("own.py:score", "def score(texts): ...", "takes (texts); inputs: texts calls it with (records, texts)"),
        ("own.py:score", "\nimport no_such_thing", "line 2: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("own.py:score", "x = 1\ny = 1 / 0", "cannot be imported (line 2: ZeroDivisionError"),
        ("own.py:score", "def score(:", "own.py, line 1"),
    ],
)
def test_function_that_cannot_be_had_is_refused(function: str, source: str, said: str, folder: Path) -> None:
    (folder / "own.py").write_text(source)
    before = list(sys.path)
    with pytest.raises(InputError) as error:
        task_of(folder, function)
    assert str(error.value).startswith("config.function: ") and said in str(error.value)
    # It stays on the path, but behind everything else.
    assert sys.path[: len(before)] == before


def test_settings_without_a_meaning_are_refused() -> None:
    for gets, key, value in (("texts", "target", "{a}"), ("logits", "stop", ["."]), ("logits", "max_new_tokens", 3)):
        with pytest.raises(ValidationError, match=f"{key}: has no meaning where its inputs are {gets}"):
            config_of("own.py:score", gets, **{key: value})


# ---------------------------------------------------------------------------------------------------------------
# What would end the program


def exits(records: Any, texts: Any) -> Any:
    sys.exit(0)


def ends(records: Any, texts: Any) -> Any:
    os._exit(0)


def is_another(records: Any, texts: Any) -> Any:
    os.execl("/bin/true", "true")


def stops(records: Any, texts: Any) -> Any:
    raise GeneratorExit


def aborts(records: Any, texts: Any) -> Any:
    raise click.Abort


def blames_the_user(records: Any, texts: Any) -> Any:
    raise InputError("config", "is wrong")


def interrupts(records: Any, texts: Any) -> Any:
    raise KeyboardInterrupt


def is_no_number(records: Any, texts: Any) -> Any:
    class Sly:
        def is_no_number(self, *options: Any, **named: Any) -> Any:
            sys.exit(0)

        __array__ = is_no_number

    return Sly()


@pytest.mark.parametrize(
    "function", [exits, ends, is_another, stops, aborts, blames_the_user, interrupts, is_no_number]
)
def test_what_would_end_the_program_is_a_failure(function: Any, folder: Path) -> None:
    before = os._exit, os.execv, signal.getsignal(signal.SIGINT)
    task: Any = task_of(folder, "own.py:lengths")
    task = replace(task, function=replace(task.function, reference="own.py:f", call=function))
    with pytest.raises(FunctionFailed, match=r"own\.py:f failed") as raised:
        task.score(answers([[""] * 6]))
    assert function.__name__ in [frame.name for frame in traceback.extract_tb(raised.value.__cause__.__traceback__)]
    assert (os._exit, os.execv, signal.getsignal(signal.SIGINT)) == before


def test_a_real_interruption_is_one_even_where_the_function_goes_on(folder: Path) -> None:
    def goes_on(records: Any, texts: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return [1.0] * len(records)

    task: Any = task_of(folder, "own.py:lengths")
    # A suite that runs in the background inherits an ignored SIGINT, which a terminal's user has not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            replace(task, function=replace(task.function, call=goes_on)).score(answers([[""] * 6]))
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_forked_process_does_not_come_back(folder: Path) -> None:
    def forks(records: Any, texts: Any) -> Any:
        if (child := os.fork()) == 0:
            return [2.0] * len(records)
        return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))] * len(records)

    task: Any = task_of(folder, "own.py:lengths")
    found = replace(task, function=replace(task.function, call=forks)).score(answers([[""] * 6]))
    assert (found["score"] == 0).all()


# ---------------------------------------------------------------------------------------------------------------
# In a search

RUN = """
CALLS = []

def score(records, log_probabilities):
    CALLS.append(1)
    if len(CALLS) % 4 == 2:
        return [float("nan")] * len(records)
    if len(CALLS) == {fails_at}:
        raise RuntimeError("the simulator is gone")
    return log_probabilities
"""


def search(family: Family, folder: Path, *arguments: str, status: int) -> subprocess.CompletedProcess[str]:
    task = {"name": "mine", "kind": "function", "function": "fitness_of_run:score", "inputs": "log_probabilities",
            "file": "tasks.jsonl", "heldout": 0.5}  # fmt: skip
    space = {"method": "task_arithmetic", "layers_per_group": 3, "parameters": {"weight": {}}}
    document = search_config(family, 3, space=space, tasks=[task])
    write_yaml(folder / "search.yaml", document)
    return run_command("search", "search.yaml", "--out", "run", *arguments, folder=folder, status=status)


def test_function_that_raises_ends_the_run_and_keeps_its_folder(family: Family, folder: Path) -> None:
    own = folder / "fitness_of_run.py"
    own.write_text("def score(records):\n    return 0\n")
    done = search(family, folder, status=2)
    assert not (folder / "run").exists()
    assert len(done.stderr.splitlines()) == 1 and "takes (records)" in done.stderr

    own.write_text(RUN.format(fails_at=7))
    done = search(family, folder, status=1)
    # Its own traceback, with its own line.
    assert "fitness_of_run.py" in done.stderr and 'raise RuntimeError("the simulator is gone")' in done.stderr
    assert done.stderr.splitlines()[-1] == "RuntimeError: the simulator is gone"
    (row,) = read_lines(folder / "run" / "history.jsonl")
    # NaN: one of four candidates failed, and none of the others is worse for it.
    assert row["failed"] == 1 and row["fitness"][1] is None and None not in (row["best"], row["worst"])

    kept = own.read_text()
    own.write_text(kept.replace("return log_probabilities", "return 2 * log_probabilities"))
    assert str(own) in search(family, folder, "--resume", status=2).stderr
    own.write_text(kept)
    # The calls of the new process are counted from its own start: it fails in the last generation.
    search(family, folder, "--resume", status=1)
    assert len((folder / "run" / "history.jsonl").read_text().splitlines()) == 2


def test_example_in_configs_can_be_opened() -> None:
    """The functions of configs/own_fitness.py, on records like the zoo's."""
    folder = Path(__file__).resolve().parent.parent / "configs"
    document = yaml.safe_load((folder / "own_fitness.yaml").read_text())
    records = [
        {"prompt": "いくつ 1 2 たす 3 4 は", "target": "6 4 0 です 。"},
        {"prompt": "いくつ 9 9 たす 9 9 は", "target": "8 9 1 です 。"},
    ]
    from evojax_merge.tasks.function import load_function

    functions = {
        task["name"]: load_function("", task["function"], task["inputs"], folder).call for task in document["tasks"]
    }
    texts = ["6 4 0 です 。", "8 0 1 ."]
    np.testing.assert_allclose(functions["digits_and_ending"](records, texts), [1.0, 1 / 3])
    np.testing.assert_allclose(functions["harder_sums"](records, np.array([-1.0, -2.0])), [-1.0, -4.0])
    logits = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 2.5], [9.0, 0.0, 0.0]], np.float32)
    assert functions["weakest_token"](logits, np.array([0, 1, 2]), np.array([True, True, False])) == -0.5
