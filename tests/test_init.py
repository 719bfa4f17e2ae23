"""`evojax-merge init`: the config that it writes is one that plan and search take, for every kind of data; what it asks
for; and the scripts of `evojax-merge completion`."""

import builtins
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import yaml
from helpers.commands import command, run_here
from helpers.families import Family
from helpers.files import read_json, write_json, write_lines
from helpers.models import even_records, finetune, random_model, save, state, tiny_config, word_tokenizer, words
from helpers.sampling import ALL, sample, thorough
from helpers.searches import open_problem
from merge_kernels import METHODS
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_state
from tiny_generators import make_ddpm
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from evojax_merge.inspection.first_config import searched_parameters
from evojax_merge.problem import build_problem, read_config

Init = Callable[..., int]


@pytest.fixture
def init(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    """Run `init` in a folder with links to a base and two parents, without a terminal; its exit status."""
    for name, folder in zip(("base", "one", "two"), (family.base, *family.parents), strict=True):
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "tasks.jsonl").write_bytes(family.tasks.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)

    def call(*arguments: str) -> int:
        return command("init", *arguments)

    return call


MODELS = ("--base", "base", "--parents", "one", "two")
GENERATIONS = ("--budget-generations", "2")


def search(file: str = "search.yaml", *overrides: str, whole: bool = ALL) -> dict[str, Any]:
    """Search by a config as it is, but for overrides; the result. Where it is not `whole`, only open the search and its
    examples."""
    if not whole:
        open_problem(Path(file).absolute(), *overrides).prepare()
        return {}
    sets = [part for override in ("search.population=4", *overrides) for part in ("--set", override)]
    run_here("search", file, "--out", "run", "--overwrite", *sets)
    result: dict[str, Any] = read_json(Path("run/result.json"))
    assert Path("run/best/model").exists() and len(Path("run/history.jsonl").read_text().splitlines()) == 2
    return result


def document(file: str = "search.yaml") -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return content


def records(*examples: dict[str, Any]) -> str:
    """A data file in which the examples are repeated to ten, so that some can be held out."""
    numbered = [examples[number % len(examples)] for number in range(10)]
    return str(write_lines(Path("data.jsonl"), numbered))


# ---------------------------------------------------------------------------------------------------------------
# The config


def test_the_config_is_one_that_a_search_takes(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_lines(Path("many.jsonl"), even_records(120)))
    assert init("mine.yaml", *MODELS, "--data", data, "--budget-generations", "7", "--out", "runs/mine") == 0
    shown = capsys.readouterr().out
    assert "evojax-merge plan mine.yaml" in shown and "evojax-merge search mine.yaml" in shown
    path = Path("mine.yaml").absolute()
    config = read_config(path, [], None)
    assert (config.base, config.parents, config.out) == ("base", ["one", "two"], "runs/mine")
    assert config.space is not None and config.space.method == "task_arithmetic" and config.tokenizer_source is None
    assert config.search.generations == 7 and set(config.space.parameters) == {"weight"}
    problem = build_problem(path, config)
    assert f"{problem.space.dims} parameters of 2 parents" in shown
    # Every key has its comment.
    for line in path.read_text().splitlines():
        assert "# " in line or line.startswith(("#", "  - ")) or line in ("", "#", "search:"), line
    assert f"{problem.space.dims} parameters: at most one for every 10 of the 72 examples" in shown
    assert f"{problem.space.dims} parameters: at most one for every 10 of the 72 examples" in path.read_text()
    search("mine.yaml", "search.generations=2", whole=True)


@thorough
def test_the_demo_family_is_planned_by_the_command_that_init_names(
    init: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ("--base", "zoo:base", "--parents", "zoo:maths", "zoo:japanese")
    assert init("zoo.yaml", *models, "--data", "zoo:search.jsonl") == 0
    (planned,) = (line.split() for line in capsys.readouterr().out.splitlines() if "plan zoo.yaml" in line)
    assert command(*planned[1:]) == 0
    assert document("zoo.yaml")["tasks"][0]["file"] == "zoo:search.jsonl"


@pytest.mark.parametrize(
    ("record", "kind", "keys"),
    [
        ({"question": "w5 w6", "answer": "w7 w8 #### 12"}, "gsm", {"match": "strict", "num_fewshot": 2}),
        ({"question": "w5 w6", "answer": "12"}, "gsm", {"match": "flexible", "max_new_tokens": 128}),
        ({"question": "w5", "answer": "w6"}, "likelihood", {"prompt": "Question: {question}\nAnswer:"}),
        ({"prompt": "w5", "completion": "w6"}, "likelihood", {"prompt": "{prompt}", "target": "{completion}"}),
        ({"prompt": "w5", "completion": "12"}, "exact_match", {"target": "{completion}", "max_new_tokens": 32}),
        ({"instruction": "w5", "input": "w9", "output": "w6"}, "likelihood", {"prompt": "{instruction}\n{input}"}),
        ({"question": "w5", "choices": ["w6", "w7"], "answer": 1}, "multiple_choice", {"metric": "margin"}),
        ({"question": "w5", "choices": ["w6", "w7"], "answerKey": "B"}, "multiple_choice", {"answer": "answerKey"}),
        (
            {"passage": "w4", "question": "w5", "answer": True},
            "multiple_choice", {"choices": {"false": "no", "true": "yes"}, "answer": "answer"},
        ),
        ({"text": "w5 w6 w7"}, "likelihood", {"prompt": "", "target": "{text}"}),
        ({"problem": "w5", "solution": "w6 #### 12"}, "likelihood", {"target": "{solution}"}),
        ({"query": "w5", "response": "w6"}, "likelihood", {"prompt": "{query}", "target": "{response}"}),
        ({"text": "w5", "label": "w6"}, "likelihood", {"prompt": "{text}", "target": "{label}"}),
        ({"text": "w5", "label": 0, "label_text": "w6"}, "likelihood", {"target": "{label_text}"}),
        ({"document": "w5", "summary": "w6"}, "likelihood", {"prompt": "{document}", "target": "{summary}"}),
        (
            {"context": "w8", "question": "w5", "answers": {"text": ["w6"], "answer_start": [0]}},
            "likelihood",
            {"prompt": "{context}\nQuestion: {question}\nAnswer:", "target": "{answers[text][0]}"},
        ),
        (
            {"question": "w5", "answer": None, "options": {"A": "w6", "B": "w7"}, "answer_idx": "B"},
            "multiple_choice", {"choices": "options", "answer": "answer_idx"},
        ),
        (
            {"ctx": "w5", "endings": ["w6", "w7", "w8"], "label": "2"},
            "multiple_choice", {"prompt": "{ctx}", "choices": "endings", "answer": "label"},
        ),
        (
            {"question": "w5", "mc1_targets": {"choices": ["w6", "w7", "w8"], "labels": [0, 1, 0]}},
            "multiple_choice", {"choices": "mc1_targets[choices]", "answer": "mc1_targets[labels]"},
        ),
        (
            {"text": "w4", "verlauf": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
            "likelihood", {"prompt": "{verlauf[0][content]}\n", "target": "{verlauf[1][content]}"},
        ),
        (
            {"prompt": "w5", "response": "w6", "history": [{"role": "user", "content": "w5"},
                                                           {"role": "assistant", "content": "w6"}]},
            "likelihood", {"prompt": "{prompt}", "target": "{response}"},
        ),
        (
            {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
            "likelihood", {"prompt": "{messages[0][content]}\n", "target": "{messages[1][content]}"},
        ),
        (
            {"conversations": [{"from": "system", "value": "w4"}, {"from": "human", "value": "w5"},
                               {"from": "gpt", "value": "w6"}]},
            "likelihood", {"prompt": "{conversations[0][value]}\n{conversations[1][value]}\n"},
        ),
    ],
)  # fmt: skip
def test_the_kind_of_task_goes_by_the_fields(
    init: Init, record: dict[str, Any], kind: str, keys: dict[str, Any]
) -> None:
    others = [record | {"question": f"w{number} w6"} if "question" in record else record for number in range(5, 9)]
    assert init(*MODELS, "--data", records(*others), *GENERATIONS) == 0
    (task,) = document()["tasks"]
    assert task["kind"] == kind and task.items() >= keys.items()
    written = ("tasks.0.max_new_tokens=2",) if "max_new_tokens" in task else ()
    search("search.yaml", *written)


BAD = {"role": "assistant", "content": "w9"}
ASKED, GOOD = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w7"}


@pytest.mark.parametrize(
    ("examples", "kind", "keys"),
    [
        ([{"question": "w5", "answer": 12}, {"question": "w6", "answer": "12"}], "gsm", {"match": "flexible"}),
        ([{"question": "w5", "answer": "12"}, {"question": "w6", "answer": "w7"}], "likelihood", {}),
        ([{"prompt": "w5", "answer": "12"}, {"prompt": "w5", "answer": "w7 12"}], "likelihood", {}),
        ([{"prompt": "w5", "rejected": "w9", "chosen": "w6"}], "likelihood", {"target": "{chosen}"}),
        (
            [{"prompt": "w5", "rejected": [ASKED, BAD], "chosen": [ASKED, GOOD]}],
            "likelihood", {"target": "{chosen[1][content]}"},
        ),
        (
            [{"prompt": [GOOD, ASKED], "rejected": [BAD], "chosen": [GOOD]}],
            "likelihood", {"prompt": "{prompt[0][content]}\n{prompt[1][content]}\n", "target": "{chosen[0][content]}"},
        ),
        ([{"instruction": "w5", "output": "w6"}, {"instruction": "w5", "input": "w7", "output": "w6"}],
         "likelihood", {"prompt": "{instruction}\n{input}"}),
        ([{"instruction": "w5", "input": "", "output": "w6"}], "likelihood", {"prompt": "{instruction}"}),
        ([{"instruction": "w5", "context": "w8", "response": "w6"}],
         "likelihood", {"prompt": "{instruction}\n{context}"}),
        ([{"passage": "w8", "question": "w5", "answer": "w6"}],
         "likelihood", {"prompt": "{passage}\nQuestion: {question}\nAnswer:"}),
        ([{"article": "w8", "question": "w5", "options": ["w6", "w7"], "answer": "B"}],
         "multiple_choice", {"prompt": "{article}\nQuestion: {question}\nAnswer:"}),
        ([{"conversations": [{"from": "human", "value": "w5"}, {"from": "chatgpt", "value": "w6"}]}],
         "likelihood", {"target": "{conversations[1][value]}"}),
    ],
)  # fmt: skip
def test_the_kind_of_task_goes_by_several_records(
    init: Init, examples: list[dict[str, Any]], kind: str, keys: dict[str, Any]
) -> None:
    assert init(*MODELS, "--data", records(*examples)) == 0
    (task,) = document()["tasks"]
    assert task["kind"] == kind and task.items() >= keys.items()


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (
            [{"prompt": "w5", "completion": "w6", "label": True}, {"prompt": "w5", "completion": "w9", "label": False}],
            "data.jsonl:2: label: false says that the answer is a bad one, as in 5 of 10 records; write the others",
        ),
        (
            [{"prompt": "w5", "completion": "w6", "label": 1}, {"prompt": "w5", "completion": "w9", "label": 0}],
            "data.jsonl:2: label: 0 says that the answer is a bad one",
        ),
        (
            [{"text": "w5", "label": 0}, {"text": "w5", "label": 1}],
            "data.jsonl:1: label: 0 is the number of a class; expected its name, which models can write, in a field",
        ),
        (
            [{"question": "w5", "answer": ["w6"]}],
            "is list; expected a text or a number; name one that it holds: answer[0]",
        ),
        (
            [{"question": "w5", "answer": {"value": "w6"}}],
            "is dict; expected a text or a number; name one that it holds: answer[value]",
        ),
        (
            [{"question": "w5", "answer": "12"}] * 2 + [{"question": "w5", "answer": "w6"}],
            "'w6' is not a number; expected a worked answer that ends in '#### number' (read as kind: gsm); name",
        ),
        (
            [{"conversations": [{"from": "gpt", "value": "w5"}, {"from": "human", "value": "w6"}]}],
            "data.jsonl:1: conversations: no assistant's turn follows another (assistant, user)",
        ),
        (
            [{"messages": [ASKED, GOOD | {"content": None, "tool_calls": []}]}],
            "messages[1]: its content is null (the turn has role, tool_calls); expected a text",
        ),
        ([{"prompt": "w5 " * 300, "completion": "w6"}], "data.jsonl:1: 301 tokens do not fit the models' context"),
    ],
)
def test_records_of_no_task_are_one_line(
    init: Init, capsys: pytest.CaptureFixture[str], examples: list[dict[str, Any]], message: str
) -> None:
    assert init(*MODELS, "--data", records(*examples)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not Path("search.yaml").exists()


def test_an_error_about_the_file_advises_no_fields(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(*MODELS, "--data", str(write_lines(Path("one.jsonl"), [{"question": "w5", "answer": "w6"}]))) == 2
    assert capsys.readouterr().err.endswith("one.jsonl: holds one example; a held-out share needs at least two\n")


@pytest.mark.parametrize(
    ("record", "fields", "unread"),
    [
        ({"system_prompt": "w8", "question": "w5", "response": "w6"}, (), "system_prompt"),
        ({"system": "w8", "history": [["w7", "w8"]], "instruction": "w5", "output": "w6"}, (), "system, history"),
        ({"system": "", "history": [], "instruction": "w5", "output": "w6"}, (), None),
        ({"context": "w8", "question": "w5", "answer": "6"}, (), "context"),
        ({"system": "w8", "prompt": "w5", "target": "w6"}, ("--prompt", "prompt", "--target", "target"), None),
    ],
)
def test_context_that_no_task_reads_is_named(
    init: Init, capsys: pytest.CaptureFixture[str], record: dict[str, Any], fields: tuple[str, ...], unread: str | None
) -> None:
    assert init(*MODELS, *fields, "--data", records(record)) == 0
    err = capsys.readouterr().err
    assert err.count("does not read") == (0 if unread is None else 1)
    assert unread is None or f"data.jsonl: the task does not read {unread}; if models should see it" in err


@pytest.mark.parametrize(
    ("fields", "answers", "choices"),
    [
        # As in AGIEval's tables, PIQA, COPA, MedMCQA, WinoGrande, SocialIQA, SWAG and SciQ.
        ({"question": "w5", "A": "w6", "B": "w7", "C": "w8", "answer": ...}, "AB",
         {"A": "{A}", "B": "{B}", "C": "{C}"}),
        ({"question": "w5", "option_b": "w7", "option_a": "w6", "answer": ...}, "ab",
         {"a": "{option_a}", "b": "{option_b}"}),
        ({"goal": "w5", "sol1": "w6", "sol2": "w7", "label": ...}, "10", ["{sol1}", "{sol2}"]),
        ({"premise": "w4", "choice1": "w6", "choice2": "w7", "question": "w5", "label": ...}, "00",
         ["{choice1}", "{choice2}"]),
        ({"question": "w5", "opa": "w6", "opb": "w7", "opc": "w8", "opd": "w9", "cop": ...}, "03",
         ["{opa}", "{opb}", "{opc}", "{opd}"]),
        ({"sentence": "w5 _ w4", "option1": "w6", "option2": "w7", "answer": ...}, "12",
         {"1": "{option1}", "2": "{option2}"}),
        ({"context": "w4", "question": "w5", "answerA": "w6", "answerB": "w7", "answerC": "w8", "label": ...}, "13",
         {"1": "{answerA}", "2": "{answerB}", "3": "{answerC}"}),
        ({"startphrase": "w5", "ending0": "w6", "ending1": "w7", "label": ...}, "01", ["{ending0}", "{ending1}"]),
        ({"question": "w5", "distractor1": "w6", "distractor2": "w7", "correct_answer": ..., "support": "w4"},
         ["w8", "w9"], ["{distractor1}", "{distractor2}", "{correct_answer}"]),
        ({"question": "w5", "A": "w6", "B": "w7", "answer": ...}, ["w7", "w6"], ["{A}", "{B}"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["exam.jsonl", "exam.csv"])
def test_choices_in_columns_are_read(
    init: Init, capsys: pytest.CaptureFixture[str], name: str, fields: dict[str, Any], answers: Sequence[str],
    choices: Any,
) -> None:  # fmt: skip
    rows = [fields | {key: answer for key in fields if fields[key] is ...} for answer in [*answers] * 5]
    if name.endswith(".csv"):
        Path(name).write_text("\n".join(",".join(row) for row in ([*rows[0]], *(row.values() for row in rows))))
    else:
        write_lines(Path(name), rows)
    assert init(*MODELS, "--data", name) == 0
    assert "does not read" not in capsys.readouterr().err
    (task,) = document()["tasks"]
    (answer,) = (key for key in fields if fields[key] is ...)
    assert (task["kind"], task["choices"], task["answer"]) == ("multiple_choice", choices, answer)


@pytest.mark.parametrize(
    "record",
    [
        {"question": "w5", "A": "w6", "B": "w7", "answer": "w9"},
        {"question": "w5", "A": "w6", "B": "w7", "answer": "C"},
    ],
)  # fmt: skip
def test_choices_in_columns_that_no_task_reads_are_named(
    init: Init, capsys: pytest.CaptureFixture[str], record: dict[str, Any]
) -> None:
    assert init(*MODELS, "--data", records(record)) == 0
    err = capsys.readouterr().err
    assert err.count("does not read") == 1
    assert "data.jsonl: the task does not read A, B; if these are choices" in err and "choices: ['{A}', '{B}']" in err


@pytest.mark.parametrize(
    "method",
    sample([name for name, method in METHODS.items() if searched_parameters(method)], 5),
)
def test_every_method_that_can_be_searched(init: Init, method: str) -> None:
    parents = ("one", "two")[: METHODS[method].max_parents or 2]
    base = () if METHODS[method].base == "parent" else ("--base", "base")
    assert init(*base, "--parents", *parents, "--data", "tasks.jsonl", "--method", method) == 0
    space = document()["space"]
    assert space["method"] == method and space["parameters"].keys() >= {searched_parameters(METHODS[method])[0].name}


def test_methods_that_are_prepared_get_their_constants_and_prompts(init: Init) -> None:
    """A method from spectra starts at the authors' setting, one that looks at activations has the task's prompts, and
    `auto` follows the gradients of both."""
    for name, constants, parameters in (
        ("swudi_filter", {"rank_share": 0.85, "steps": 300.0}, {"weight", "filter"}),
        ("regmean", {"alpha": 0.9}, {"weight", "filter"}),
    ):
        assert init(*MODELS, "--data", "tasks.jsonl", "--method", name, "--overwrite") == 0
        written, space = document(), document()["space"]
        assert space["fixed"] == constants and space["parameters"].keys() <= parameters
        assert "starts at 1, the authors' setting" in Path("search.yaml").read_text()
        (task,) = written["tasks"]
        prompt = " ".join([task["prompt"], *([task["target"]] if "target" in task else [])])
        prompts = {"file": "tasks.jsonl", "prompt": prompt} if name == "regmean" else None
        assert written.get("calibration") == prompts
        assert open_problem(Path("search.yaml")).search.strategy == "gradient"


def test_other_tokens_are_aligned(init: Init, tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True))
    tokens = words()
    tokens[8:10] = tokens[9], tokens[8]
    save(finetune(model, 1), tmp_path / "swapped", tokens)
    assert init("--base", "base", "--parents", "one", "swapped", "--data", "tasks.jsonl") == 0
    assert document()["tokenizer_source"] == "base"
    assert init("b.yaml", "--parents", "one", "swapped", "--data", "tasks.jsonl") == 0
    assert document("b.yaml")["tokenizer_source"] == "one" and document("b.yaml")["space"]["method"] == "linear"


def test_models_of_other_widths_and_tokens_are_refused_with_the_shapes_of_their_files(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = random_model(tiny_config(hidden_size=96, vocab_size=60, tie_word_embeddings=True))
    save(wide, tmp_path / "wide", words()[:60][::-1])
    assert init("--parents", "one", "wide", "--data", "tasks.jsonl") == 2
    err = capsys.readouterr().err
    assert "has shape [60, 96], but [64, 48] in" in err
    assert err.endswith("; models of different widths cannot be merged; `evojax-merge inspect` compares them\n")


# ---------------------------------------------------------------------------------------------------------------
# Chats

TEMPLATE = "{% for m in messages %}w{{ 10 + m.role | length }} {{ m.content }} {% endfor %}"
USER, REPLY = {"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}
SYSTEM = {"role": "system", "content": "w8"}


def with_templates(**templates: str) -> tuple[str, ...]:
    """The arguments for the three models, of which copies have these chat templates."""
    names = []
    for name in ("base", "one", "two"):
        names.append(f"{name}-chat")
        shutil.copytree(Path(name).resolve(), names[-1])
        if name in templates:
            (Path(names[-1]) / "chat_template.jinja").write_text(templates[name])
    return ("--base", names[0], "--parents", *names[1:])


def test_conversations_are_scored_by_their_last_reply_wherever_a_model_has_a_chat_template(init: Init) -> None:
    """Whatever turns a record has, what is scored is a reply, and never the user's words."""
    talks = [[USER, REPLY], [SYSTEM, USER, REPLY], [USER, REPLY, USER | {"content": "w9"}, REPLY | {"content": "w4"}]]
    data = records(*({"number": 3, "verlauf": turns} for turns in talks))
    assert init(*with_templates(base=TEMPLATE, one=TEMPLATE, two=TEMPLATE), "--data", data) == 0
    assert "chat template that the models share" in Path("search.yaml").read_text()
    (task,) = document()["tasks"]
    assert (task["messages"], task["apply_chat_template"]) == ("verlauf", True) and "prompt" not in task
    path = Path("search.yaml").absolute()
    config = read_config(path, [], None)
    splits = build_problem(path, config).splits
    scored: list[Any] = [splits.search[0], splits.heldout[0]]
    assert {example.answer for task in scored for example in task.examples} == {"w7", "w4"}


def test_sharegpts_conversations_are_read_by_messages(init: Init) -> None:
    talk = [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]
    models = with_templates(base=TEMPLATE, one=TEMPLATE, two=TEMPLATE)
    assert init(*models, "--data", records({"conversations": talk})) == 0
    assert document()["tasks"][0]["messages"] == "conversations"


def test_a_prompt_and_its_answer_may_each_be_turns(init: Init) -> None:
    """TRL has preferences, and prompts with completions, in this form."""
    models = with_templates(base=TEMPLATE, one=TEMPLATE, two=TEMPLATE)
    data = records({"prompt": [SYSTEM, USER], "chosen": [REPLY], "rejected": [BAD]})
    assert init(*models, "--data", data) == 0
    (task,) = document()["tasks"]
    assert task["messages"] == ["prompt", "chosen"]
    path = Path("search.yaml").absolute()
    (opened,) = build_problem(path, read_config(path, [], None)).splits.search
    whole = write_lines(Path("whole.jsonl"), [{"talk": [SYSTEM, USER, REPLY]}] * 10)
    (other,) = build_problem(
        path, read_config(path, ["tasks.0.messages=talk", f"tasks.0.file={whole}"], None)
    ).splits.search
    assert [(example.turns, example.answer) for example in opened.examples] == [  # type: ignore[attr-defined]
        (example.turns, example.answer)
        for example in other.examples  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("field", ["question", "prompt"])
def test_prompts_are_a_users_turns_where_all_models_share_a_chat_template(init: Init, field: str) -> None:
    data = records({field: "w5", "answer": "w6"})
    assert init(*with_templates(base=TEMPLATE, one=TEMPLATE, two=TEMPLATE), "--data", data) == 0
    (task,) = document()["tasks"]
    assert (task["prompt"], task["apply_chat_template"]) == (f"{{{field}}}", True)
    assert "tokenizer_source" not in document()


def test_a_base_without_a_chat_template_takes_that_of_its_fine_tunes(init: Init) -> None:
    problems = ({"question": f"w{number}", "answer": f"#### {number}"} for number in range(10))
    assert init(*with_templates(one=TEMPLATE, two=TEMPLATE), "--data", records(*problems)) == 0
    assert document()["tasks"][0]["apply_chat_template"] is True and document()["tokenizer_source"] == "one-chat"
    assert "base has no chat template" in Path("search.yaml").read_text()


def test_different_chat_templates_leave_prompts_as_text_and_a_comment_says_so(init: Init) -> None:
    models = with_templates(base=TEMPLATE, one=TEMPLATE, two=f"{TEMPLATE}w4")
    problems = [{"question": f"w{number}", "answer": f"#### {number}"} for number in range(10)]
    choices = [{"question": "w5", "choices": ["w6", "w7"], "answer": 1}]
    for examples in (problems, choices, [{"question": "w5", "answer": "w6"}]):
        assert init(*models, "--data", records(*examples), "--overwrite") == 0
        text = Path("search.yaml").read_text()
        assert "plain text, since not all models have the same chat template" in text
        assert document()["tasks"][0]["apply_chat_template"] is False
    assert init(*models, "--data", records({"messages": [USER, REPLY]}), "--overwrite") == 0
    assert "chat template of base; not all models have the same" in Path("search.yaml").read_text()
    assert document()["tasks"][0]["messages"] == "messages"


def test_without_a_chat_template_all_records_need_the_same_turns(
    init: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = [{"messages": [USER, REPLY]}, {"messages": [SYSTEM, USER, REPLY]}]
    for first, second in (talks, talks[::-1]):
        assert init(*MODELS, "--data", records(first, second)) == 2
        line = capsys.readouterr().err
        assert "data.jsonl:2: messages: its turns (" in line and "`messages: messages` reads any turns" in line
    assert init(*MODELS, "--data", records({"messages": [USER, REPLY, USER, REPLY]})) == 0
    assert "the model's first turn; later turns are left out" in Path("search.yaml").read_text()


# ---------------------------------------------------------------------------------------------------------------
# Fields of any names


def test_fields_of_any_names_are_joined_in_their_order(init: Init) -> None:
    """A CSV as a spreadsheet writes it: with a mark of UTF-8, and German names with a space."""
    rows = [{"Die Frage": f"w{n}", "Kontext": "w9", "Antwort": f"w{n + 1}"} for n in range(5, 15)]
    pandas.DataFrame(rows).to_csv("data.csv", index=False, encoding="utf-8-sig")
    fields = ("--prompt", "Kontext", "Die Frage", "--target", "Antwort")
    assert init(*MODELS, *fields, "mine.yaml", "--data", "data.csv", *GENERATIONS) == 0
    (task,) = document("mine.yaml")["tasks"]
    assert (task["kind"], task["prompt"], task["target"]) == ("likelihood", "{Kontext}\n{Die Frage}", "{Antwort}")
    search("mine.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("--prompt", "question", "--target", "b"), "data.jsonl:1: the record has no field 'question', which --prompt"),
        (("--prompt", "a"), "data.jsonl:1 has the fields a, b, c.d, turns: name one"),
        (("--target", "turns"), "data.jsonl:1: the field 'turns', which --target names, is list; expected a text"),
        (("--target", "c.d"), "--target c.d: {c.d} is not the name of a field"),
        ((), "its fields (a, b, c.d, turns) say no kind of task"),
        ((), "turns {role, content} under any name (in a config: messages: FIELD)"),
    ],
)
def test_a_field_that_is_not_there_is_one_line_before_weights_are_read(
    init: Init, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fields: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("evojax_merge.commands.init.compare_weights", None)
    data = records({"a": "w5", "b": "w6", "c.d": "w7", "turns": [[USER, REPLY]]})
    assert init(*MODELS, *fields, "--data", data) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and not Path("search.yaml").exists()


@pytest.mark.parametrize(
    ("records_before", "fields", "message"),
    [
        ({"verlauf": [USER, REPLY]}, (), "'verlauf', which the proposed config: tasks[0].messages names (it has"),
        ({"prompt": "w5", "completion": "w6"}, (), "'prompt', which the proposed config: tasks[0].prompt names"),
        ({"a": "w5", "b": "w6"}, ("--prompt", "a", "--target", "b"), "'a', which the proposed config: tasks[0].prompt"),
    ],
)
def test_all_records_are_checked_before_weights_are_read(
    init: Init, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, records_before: dict[str, Any],
    fields: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    """The message names the file that exists, the record and its field, and never a config that was not written."""
    models = with_templates(base=TEMPLATE, one=TEMPLATE, two=TEMPLATE)
    monkeypatch.setattr("evojax_merge.commands.init.compare_weights", None)
    data = str(write_lines(Path("mixed.jsonl"), [records_before] * 20 + [{"frage": "w5", "loesung": "w6"}] * 20))
    assert init("mine.yaml", *models, *fields, "--data", data) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mixed.jsonl:21: the record has no field" in line and message in line
    assert "frage, loesung" in line and "by --prompt and --target, or mend the record" in line
    assert "mine.yaml" not in line and not Path("mine.yaml").exists()


def test_a_warning_about_the_data_is_given_once(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    data = records({"question": "w5", "choices": ["w6", "w7", "w7"], "answer": 0})
    assert init(*MODELS, "--data", data) == 0
    assert capsys.readouterr().err.count("list a wrong choice twice") == 1


# ---------------------------------------------------------------------------------------------------------------
# What inspect says is taken


def lora(folder: Path, named: str | None, seed: int, ranks: dict[str, int], dtype: Any = np.float32) -> Path:
    """An adapter of the test's base as PEFT writes it, of one rank for each end of modules' names."""
    rng, tensors, base = np.random.default_rng(seed), {}, state(Path("base"))
    for name, weight in base.items():
        rank = next((rank for end, rank in ranks.items() if name.endswith(f"{end}.weight")), 0)
        for part, shape in (("A", (rank, weight.shape[-1])), ("B", (weight.shape[0], rank))) if rank else ():
            values = 0.2 * rng.standard_normal(shape).astype(dtype)
            tensors[f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    first, *others = ranks.items()
    config = {
        "peft_type": "LORA", "base_model_name_or_path": named, "r": first[1], "lora_alpha": first[1],
        "target_modules": [*ranks], "rank_pattern": dict(others), "alpha_pattern": dict(others),
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    return folder


def test_the_base_of_adapters_is_the_one_that_their_files_name(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = (tmp_path / "base").resolve()
    for seed, name in enumerate(("x", "y")):
        lora(tmp_path / name, str(base), seed, {"q_proj": 2, "down_proj": 4})
    data = str(write_lines(Path("many.jsonl"), even_records(400)))
    assert init("--parents", "x", "y", "--data", data, *GENERATIONS) == 0
    assert f"base: {base}, which the adapters' files name" in capsys.readouterr().out
    config = document()
    assert config["base"] == str(base) and config["parents"] == ["x", "y"]
    # No parent changes a norm: its parameters would change nothing.
    assert config["space"]["components"] == ["attention+norm", "mlp"]
    assert re.search("no parent changes .*norm", Path("search.yaml").read_text())
    search("search.yaml", "tasks.0.limit=8")


def test_an_adapter_whose_base_is_out_of_reach_goes_with_the_named_base(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lora(tmp_path / "x", "/gone/with/the/disk", 0, {"q_proj": 2})
    lora(tmp_path / "y", "nobody/never-cached", 1, {"q_proj": 2})
    lora(tmp_path / "z", None, 2, {"q_proj": 2})
    for name, said in (("x", "/gone/with/the/disk: no such folder"), ("y", "nobody/never-cached: no such folder"),
                       ("z", "base_model_name_or_path: missing")):  # fmt: skip
        assert init("--parents", name, "one", "--data", "tasks.jsonl") == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert said in line and "name the base yourself, as" in line
    assert init("--base", "base", "--parents", "x", "y", "z", "--data", "tasks.jsonl", *GENERATIONS) == 0
    assert document()["parents"] == ["base+x", "base+y", "base+z"]
    search()


def test_the_advice_of_inspect_is_in_the_config(init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base among the parents; signs that disagree; a task vector of four times the norm; other dtypes."""
    model = random_model(tiny_config(tie_word_embeddings=True))
    start, step = state(tmp_path / "base"), state(tmp_path / "one")
    for name, factor in (("against", -0.25), ("along", 0.3)):
        shutil.copytree((tmp_path / "one").resolve(), tmp_path / name)
        tensors = {key: start[key] + np.float32(factor) * (step[key] - start[key]) for key in start}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    save(finetune(model, 7).to(torch.bfloat16), tmp_path / "half")
    data = str(write_lines(Path("many.jsonl"), even_records(120)))
    assert init("--parents", "one", "against", "base", "half", "--data", data, *GENERATIONS) == 0
    out, config, text = capsys.readouterr().out, document(), Path("search.yaml").read_text()
    assert "base: base, to which all other parents are nearest" in out
    assert config["base"] == "base" and config["parents"] == ["one", "against", "half"]
    assert config["space"]["parameters"]["weight"]["high"] == 4 and "above 1: so the smaller" in text
    assert config["export_dtype"] == "float32"
    search("search.yaml", "tasks.0.limit=8")
    assert init("b.yaml", "--base", "base", "--parents", "one", "along", "half", "--data", data) == 0
    assert document("b.yaml")["space"]["parent_groups"] == {"alike": ["one", "along"]}
    assert init("c.yaml", "--base", "base", "--parents", "one", "against", "--data", data) == 0
    assert document("c.yaml")["space"]["method"] == "ties" and "as inspect advises" in Path("c.yaml").read_text()
    assert init("d.yaml", "--base", "base", "--parents", "one", "along", "--data", data) == 0
    assert document("d.yaml")["space"]["method"] == "task_arithmetic"


def test_the_answer_behind_a_worked_target_is_no_reason_to_generate(init: Init) -> None:
    data = records({"aufgabe": "w5", "loesung": "w6 w7 #### 13"})
    assert init(*MODELS, "--data", data, "--prompt", "aufgabe", "--target", "loesung") == 0
    assert document()["tasks"][0]["kind"] == "likelihood"
    assert init(*MODELS, "--data", records({"aufgabe": "w5", "loesung": "13"}), "--prompt", "aufgabe", "--target",
                "loesung", "--overwrite") == 0  # fmt: skip
    assert document()["tasks"][0]["kind"] == "exact_match"


@pytest.mark.parametrize(("count", "dims", "passes"), [(12, 2, 180), (60, 2, 180), (300, 14, 600), (2000, 20, 600)])
def test_there_are_as_many_parameters_as_the_examples_carry_and_passes_for_them(
    init: Init, capsys: pytest.CaptureFixture[str], count: int, dims: int, passes: int
) -> None:
    rows = [{"prompt": f"w{n % 9 + 5} w{n % 50 + 5}", "completion": "w6"} for n in range(count)]
    assert init(*MODELS, "--data", str(write_lines(Path("data.jsonl"), rows)), "--method", "task_arithmetic") == 0
    shown = capsys.readouterr().out
    searched = int(re.search(r"searched on ([\d,]+) examples", shown)[1].replace(",", ""))  # type: ignore[index]
    problem = build_problem(Path("search.yaml").absolute(), read_config(Path("search.yaml").absolute(), [], None))
    assert problem.space.dims == dims and document()["search"]["budget"] == f"{passes} passes"
    few = "at most" if dims <= searched // 10 else "the fewest there are, although it should be"
    rule = f"{dims} parameters: {few} one for every 10 of the {searched:,} examples that are searched on"
    assert rule in " ".join(shown.split()) and rule in Path("search.yaml").read_text()


# ---------------------------------------------------------------------------------------------------------------
# Networks, arrays and pytrees

MODULES = """
import jax.numpy as jnp
import torch


def make():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))


def score(model, rows):
    return -jnp.mean((rows["input"] @ model["0"]["weight"].T) ** 2, axis=-1)


def brightness(records, images):
    return [float(image.mean()) for image in images]
"""


def save_networks(make: Callable[[], Any], *names: str) -> None:
    """Networks of one kind, each a little further from the first."""
    torch.manual_seed(0)
    module = make()
    for name in names:
        module.save_pretrained(name)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))


def text_classifier() -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=64, max_position_embeddings=16, num_labels=3))


def image_classifier() -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    names = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, **names))


def draw_pictures(folder: Path) -> list[dict[str, Any]]:
    """Pictures of two classes, in a folder for each."""
    rows = []
    for number in range(20):
        label = ("dark", "light")[number % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(100 * (number % 2), 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / label / f"{number}.png")
        rows.append({"file_name": f"{label}/{number}.png", "what it is": label})
    return rows


def test_pictures_by_class_in_a_table_and_as_records(init: Init) -> None:
    save_networks(image_classifier, "vit", "vit1", "vit2")
    size = {"height": 8, "width": 8}
    for name in ("vit", "vit1", "vit2"):
        settings = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size}
        write_json(Path(name, "preprocessor_config.json"), settings)
    rows = draw_pictures(Path("pictures"))
    models = ("--base", "vit", "--parents", "vit1", "vit2")
    assert init(*models, "--data", "pictures", *GENERATIONS) == 0
    (task,) = document()["tasks"]
    assert document()["backend"] == "torch" and (task["kind"], task["file"]) == ("classification", "pictures")
    assert [row["role"] for row in search(whole=True)["table"]] == ["base", "parent", "parent", "uniform", "winner"]

    draw_pictures(Path("listed"))
    pandas.DataFrame(rows).to_csv("listed/metadata.csv", index=False, encoding="utf-8-sig")
    assert init("b.yaml", *models, "--data", "listed", "--target", "what it is", *GENERATIONS) == 0
    (task,) = document("b.yaml")["tasks"]
    assert (task["file"], task["image"], task["target"]) == ("listed/metadata.csv", "file_name", "what it is")
    search("b.yaml")

    examples = [{"image": f"pictures/{row['file_name']}", "label": row["what it is"]} for row in rows]
    assert init("c.yaml", *models, "--data", records(*examples), *GENERATIONS) == 0
    (task,) = document("c.yaml")["tasks"]
    assert (task["kind"], task["image"], task["target"]) == ("classification", "image", "label")


def test_texts_are_classified_and_a_missing_field_is_named(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    save_networks(text_classifier, "bert1", "bert2")
    for name in ("bert1", "bert2"):
        word_tokenizer(words()).save_pretrained(name)
    data = records(*({"review": f"w{n} w6", "stars": n % 3} for n in range(5, 10)))
    assert init("--parents", "bert1", "bert2", "--data", data) == 2
    assert "data.jsonl:1 has the fields review, stars: name one" in capsys.readouterr().err
    assert init("--parents", "bert1", "bert2", "--data", data, "--target", "stars", *GENERATIONS) == 0
    (task,) = document()["tasks"]
    assert (task["kind"], task["text"], task["target"]) == ("classification", "review", "stars")
    search()
    assert init("b.yaml", "--parents", "bert1", "bert2", "--lm-eval", "gsm8k") == 2
    assert (
        "--lm-eval: is for language models; the parents are a BertForSequenceClassification" in capsys.readouterr().err
    )


def test_arrays_of_own_modules_and_of_pytrees(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(MODULES)
    space: dict[str, Any] = {}
    exec(MODULES, space)
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        save_state(space["make"]().state_dict(), f"{name}.safetensors")
    rows = {"input": np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32), "label": np.arange(30) % 3}
    np.savez("rows.npz", **rows)
    np.savez("numbers.npz", **rows | {"label": rows["input"][:, :3]})
    parents = ("--parents", "a.safetensors", "b.safetensors")
    assert init(*parents, "--data", "rows.npz") == 2
    assert "--backend: missing; the models are files of tensors" in capsys.readouterr().err
    assert init("--parents", "one", "a.safetensors", "--data", "rows.npz") == 2
    assert "one with backend: decoder, a.safetensors with backend: files" in capsys.readouterr().err
    assert init(*parents, "--data", "rows.npz", "--backend", "mine.py:make", *GENERATIONS) == 0
    config = document()
    assert (config["backend"], config["evaluation"]) == ("mine.py:make", {"recalibrate": True})
    assert (config["tasks"][0]["kind"], config["tasks"][0]["target"]) == ("classification", "label")
    search()
    Path("elsewhere").mkdir()
    assert init("elsewhere/b.yaml", *parents, "--data", "numbers.npz", "--backend", "mine.py:make", *GENERATIONS) == 0
    assert document("elsewhere/b.yaml")["tasks"][0]["kind"] == "regression"
    search("elsewhere/b.yaml")
    assert init("c.yaml", *parents, "--data", "rows.npz", "--function", "mine.py:score", *GENERATIONS) == 0
    config = document("c.yaml")
    assert (config["backend"], config["tasks"][0]["kind"]) == ("function", "arrays")
    search("c.yaml")
    for name in ("a", "b"):
        np.savez(f"{name}.npz", **{"0.weight": np.random.default_rng(ord(name)).normal(size=(5, 4)).astype(np.float32)})
    assert init("d.yaml", "--parents", "a.npz", "b.npz", "--data", "rows.npz", "--function", "mine.py:score",
                *GENERATIONS) == 0  # fmt: skip
    search("d.yaml")


def test_pictures_that_generators_draw(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(MODULES)
    for seed in (0, 1):
        make_ddpm(Path(f"ddpm{seed}"), seed, steps=2)
    parents = ("--parents", "ddpm0", "ddpm1")
    assert init(*parents, "--data", records({"prompt": "w5"})) == 2
    assert "--function: missing; a task of kind image_generation is scored by" in capsys.readouterr().err
    assert init(*parents, "--function", "mine.py:brightness", *GENERATIONS) == 0
    assert document()["tasks"][0]["kind"] == "image_generation"
    search("search.yaml", "tasks.0.images=4", "tasks.0.steps=2", "search.validation=0")


# ---------------------------------------------------------------------------------------------------------------
# Names and files


@pytest.mark.parametrize(
    ("name", "comment"),
    [
        ("data.csv", "a line of names and rows"), ("data.json", "a list of objects, or one object a line"),
        ("data.jsonl", "one JSON object a line"), ("data.parquet", "rows"),
    ],
)  # fmt: skip
def test_the_comment_of_the_data_says_the_form_of_the_file(init: Init, name: str, comment: str) -> None:
    rows = [{"prompt": f"w{number}", "completion": "w6"} for number in range(5, 15)]
    if name == "data.jsonl":
        write_lines(Path(name), rows)
    elif name == "data.json":
        write_json(Path(name), rows)
    else:
        frame = pandas.DataFrame(rows)
        frame.to_csv(name, index=False) if name == "data.csv" else frame.to_parquet(name)
    assert init(*MODELS, "--data", name) == 0
    (line,) = (line for line in Path("search.yaml").read_text().splitlines() if "file:" in line)
    assert line.endswith(f"{name:<{41 - len('    file: ')}} # {comment}".lstrip())


def test_the_summary_counts_every_split(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(Path("data.jsonl"), [{"prompt": f"w{n}", "completion": f"w{n}"} for n in range(60)])
    assert init(*MODELS, "--data", str(data)) == 0
    counts = "searched on 36 examples, with 12 kept back to choose the winner on and 12 held out"
    assert counts in capsys.readouterr().out


def test_one_parent_without_a_base_is_refused(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--parents", "one", "--data", "tasks.jsonl") == 2
    assert "--parents: one parent, and there is no base: every candidate" in capsys.readouterr().err
    assert init("--base", "base", "--parents", "one", "--data", "tasks.jsonl", "--method", "linear") == 2
    assert "linear does not use the base" in capsys.readouterr().err and not Path("search.yaml").exists()
    assert init("--base", "base", "--parents", "one", "--data", "tasks.jsonl") == 0
    assert "of 1 parent, searched" in capsys.readouterr().out


def test_the_configs_name_may_follow_the_parents(init: Init) -> None:
    assert init("--base", "base", "--parents", "one", "two", "mine.yaml", "--data", "tasks.jsonl") == 0
    assert document("mine.yaml")["parents"] == ["one", "two"]


def test_a_config_in_another_folder_names_models_and_data_by_full_paths(
    init: Init, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    assert init("configs/mine.yaml", *MODELS, "--data", "tasks.jsonl") == 0
    monkeypatch.chdir("/")
    path = tmp_path / "configs/mine.yaml"
    problem = open_problem(path)
    assert problem.backend.models.base == (tmp_path / "base").resolve()


def test_names_that_yaml_would_read_as_something_else(init: Init, tmp_path: Path) -> None:
    for name in ("1e3", "a  # b", "null", "ä: {x}", "emoji 😀"):
        (tmp_path / name).symlink_to((tmp_path / "one").resolve())
        assert init("--base", "base", "--parents", name, "two", "--data", "tasks.jsonl", "--overwrite") == 0
        assert document()["parents"] == [name, "two"]


def test_a_task_of_the_harness_is_searched_on_its_training_examples() -> None:
    from evojax_merge.inspection.first_task import ModelTemplates, task_of_harness

    sections = {
        name: {key: value for key, value, _ in task_of_harness(name, ModelTemplates()).lines}
        for name in ("gsm8k", "mine")
    }
    assert sections["gsm8k"]["split"] == "train" and "split" not in sections["mine"]


# ---------------------------------------------------------------------------------------------------------------
# Files and questions


def test_an_existing_file_is_kept_unless_asked_for(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    Path("search.yaml").write_text("mine: true\n")
    assert init(*MODELS, "--data", "tasks.jsonl") == 2
    assert "exists already" in capsys.readouterr().err and document() == {"mine": True}
    assert init(*MODELS, "--data", "tasks.jsonl", "--force") == 2
    assert "is no first config of evojax-merge" in capsys.readouterr().err and document() == {"mine": True}
    Path("search.yaml").unlink()
    for options in ((), ("--force",)):
        assert init(*MODELS, "--data", "tasks.jsonl", *options) == 0
        assert document()["base"] == "base"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("--data", "tasks.jsonl"), "--parents: missing"),
        (MODELS, "--data or --lm-eval: missing"),
        (("--parents", "one", "two", "--data", "tasks.jsonl", "--method", "ties"), "--base: missing"),
    ],
)
def test_without_a_terminal_one_line_says_which_flag_is_missing(
    init: Init, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], flag: str
) -> None:
    assert init(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag in line and not Path("search.yaml").exists()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, init: Init) -> Callable[..., list[str]]:
    """Answer questions on a terminal, in order; the questions that were asked."""

    def answer(*texts: str) -> list[str]:
        asked: list[str] = []
        left: Iterator[str] = iter(texts)

        def read(question: str = "") -> str:
            asked.append(question.partition(",")[0])
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(builtins, "input", read)
        return asked

    return answer


def test_a_terminal_is_asked_for_what_is_missing(init: Init, answers: Callable[..., list[str]]) -> None:
    asked = answers("one two", "base", "tasks.jsonl")
    assert init() == 0 and asked == ["parents", "base", "data"]
    assert document()["parents"] == ["one", "two"] and document()["base"] == "base"
    asked = answers("", "tasks.jsonl")
    assert init("b.yaml", "--parents", "one", "two") == 0 and asked == ["base", "data"]
    assert "base" not in document("b.yaml") and document("b.yaml")["space"]["method"] == "linear"


def test_a_terminal_is_asked_for_fields_of_other_names(init: Init, answers: Callable[..., list[str]]) -> None:
    data = str(write_lines(Path("fragen.jsonl"), [{"frage": f"w{n % 9 + 5}", "antwort": "w6"} for n in range(20)]))
    asked = answers("frage", "antwort")
    assert init(*MODELS, "--data", data) == 0
    assert "its fields (frage" in asked[0] and asked[1] == "fields of the answer: "
    (task,) = document()["tasks"]
    assert (task["prompt"], task["target"]) == ("{frage}", "{antwort}")


def test_an_end_of_the_input_names_the_flag(
    init: Init, answers: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers("one two")
    assert init() == 2
    assert "--data or --lm-eval: missing" in capsys.readouterr().err


def test_a_real_terminal(family: Family, tmp_path: Path) -> None:
    """In a process of its own, whose standard input is a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "evojax_merge", "init", "--data", str(family.tasks)],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    os.write(ours, f"{family.parents[0]} {family.parents[1]}\n{family.base}\n".encode())
    out, errors = process.communicate(timeout=300)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, errors
    assert "parents, the models that are merged" in out and (tmp_path / "search.yaml").is_file()


# ---------------------------------------------------------------------------------------------------------------
# Completion, and the help


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    assert f"_EVOJAX_MERGE_COMPLETE={shell}_complete" in run_here("completion", shell).stdout


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    def complete(*typed: str) -> list[str]:
        environment = {
            **os.environ, "COMP_WORDS": " ".join(("evojax-merge", *typed)), "COMP_CWORD": str(len(typed)),
            "_EVOJAX_MERGE_COMPLETE": "bash_complete",
        }  # fmt: skip
        code = "import sys; sys.argv[0] = 'evojax-merge'; from evojax_merge.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        return done.stdout.splitlines()

    assert "plain,inspect" in complete("ins") and "plain,init" in complete("in")
    assert "plain,--picture" in complete("inspect", "--pic")
    assert complete("inspect", "mod") == ["file,mod"] and complete("init", "--base", "mod") == ["file,mod"]


@pytest.mark.parametrize("command", ["inspect", "init", "completion"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import json, sys\nfrom evojax_merge.cli import cli, run\n"
        f"assert run(lambda: cli.main([{command!r}, '--help'], standalone_mode=False)) == 0\n"
        "print(json.dumps([name for name in ('jax', 'numpy', 'transformers', 'yaml') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_guides_config_is_the_one_that_init_writes(init: Init) -> None:
    guide = (Path(__file__).parent.parent / "docs/guides/before-a-search.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^evojax-merge init (.*)$", guide, re.MULTILINE)
    assert init(*command.split()) == 0
    assert f"```yaml\n{Path('search.yaml').read_text(encoding='utf-8')}```" in guide
