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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from helpers import (
    Family,
    finetune,
    random_model,
    sample,
    save,
    thorough,
    tiny_config,
    words,
    write_lines,
)
from merge_kernels import METHODS

from evojax_merge.cli import cli, run
from evojax_merge.first_config import searched_parameters
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
        return run(lambda: cli.main(["init", *arguments], standalone_mode=False))

    return call


MODELS = ("--base", "base", "--parents", "one", "two")


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
    assert init("mine.yaml", *MODELS, "--data", "tasks.jsonl", "--budget-generations", "7", "--out", "runs/mine") == 0
    shown = capsys.readouterr().out
    assert "evojax-merge plan mine.yaml" in shown and "evojax-merge search mine.yaml" in shown
    path = Path("mine.yaml").absolute()
    config = read_config(path, [], None)
    assert (config.base, config.parents, config.out) == ("base", ["one", "two"], "runs/mine")
    assert config.space is not None and config.space.method == "ties" and config.tokenizer_source is None
    assert config.search.generations == 7 and set(config.space.parameters) == {"weight", "density"}
    problem = build_problem(path, config)
    assert f"{problem.space.dims} parameters of 2 parents" in shown
    # Every key has its comment.
    for line in path.read_text().splitlines():
        assert "# " in line or line.startswith(("#", "  - ")) or line in ("", "#", "search:"), line


@thorough
def test_the_demo_family_is_planned_by_the_command_that_init_names(
    init: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ("--base", "zoo:base", "--parents", "zoo:maths", "zoo:japanese")
    assert init("zoo.yaml", *models, "--data", "zoo:search.jsonl") == 0
    (command,) = (line.split() for line in capsys.readouterr().out.splitlines() if "plan zoo.yaml" in line)
    assert run(lambda: cli.main(command[1:], standalone_mode=False)) == 0
    assert document("zoo.yaml")["tasks"][0]["file"] == "zoo:search.jsonl"


@pytest.mark.parametrize(
    ("record", "kind", "keys"),
    [
        ({"question": "w5 w6", "answer": "w7 w8 #### 12"}, "gsm", {"match": "strict", "num_fewshot": 2}),
        ({"question": "w5 w6", "answer": "12"}, "gsm", {"match": "flexible"}),
        ({"question": "w5", "answer": "w6"}, "likelihood", {"prompt": "Question: {question}\nAnswer:"}),
        ({"prompt": "w5", "completion": "w6"}, "likelihood", {"prompt": "{prompt}", "target": "{completion}"}),
        ({"prompt": "w5", "completion": "12"}, "exact_match", {"target": "{completion}", "max_new_tokens": 32}),
        ({"instruction": "w5", "input": "w9", "output": "w6"}, "likelihood", {"prompt": "{instruction}\n{input}"}),
        ({"question": "w5", "choices": ["w6", "w7"], "answer": 1}, "multiple_choice", {"metric": "margin"}),
        ({"question": "w5", "choices": ["w6", "w7"], "answerKey": "B"}, "multiple_choice", {"answer": "answerKey"}),
        ({"text": "w5 w6 w7"}, "likelihood", {"prompt": "", "target": "{text}"}),
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
    assert init(*MODELS, "--data", records(*others)) == 0
    (task,) = document()["tasks"]
    assert task["kind"] == kind and task.items() >= keys.items()


@pytest.mark.parametrize("method", sample([name for name, method in METHODS.items() if searched_parameters(method)], 5))
def test_every_method_that_can_be_searched(init: Init, method: str) -> None:
    parents = ("one", "two")[: METHODS[method].max_parents or 2]
    base = () if METHODS[method].base == "parent" else ("--base", "base")
    assert init(*base, "--parents", *parents, "--data", "tasks.jsonl", "--method", method) == 0
    space = document()["space"]
    assert space["method"] == method and space["parameters"].keys() >= {searched_parameters(METHODS[method])[0].name}


def test_other_tokens_are_aligned(init: Init, tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True))
    tokens = words()
    tokens[8:10] = tokens[9], tokens[8]
    save(finetune(model, 1), tmp_path / "swapped", tokens)
    assert init("--base", "base", "--parents", "one", "swapped", "--data", "tasks.jsonl") == 0
    assert document()["tokenizer_source"] == "base"
    assert init("b.yaml", "--parents", "one", "swapped", "--data", "tasks.jsonl") == 0
    assert document("b.yaml")["tokenizer_source"] == "one" and document("b.yaml")["space"]["method"] == "linear"


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
    data = records(*({"messages": turns} for turns in talks))
    assert init(*with_templates(base=TEMPLATE, one=TEMPLATE, two=TEMPLATE), "--data", data) == 0
    assert "chat template that the models share" in Path("search.yaml").read_text()
    (task,) = document()["tasks"]
    assert (task["messages"], task["apply_chat_template"]) == ("messages", True) and "prompt" not in task
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
        Path(name).write_text(json.dumps(rows))
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
    problem = build_problem(path, read_config(path, [], None))
    assert problem.backend.models.base == (tmp_path / "base").resolve()


def test_names_that_yaml_would_read_as_something_else(init: Init, tmp_path: Path) -> None:
    for name in ("1e3", "a  # b", "null", "ä: {x}", "emoji 😀"):
        (tmp_path / name).symlink_to((tmp_path / "one").resolve())
        assert init("--base", "base", "--parents", name, "two", "--data", "tasks.jsonl", "--overwrite") == 0
        assert document()["parents"] == [name, "two"]


def test_a_task_of_the_harness_is_searched_on_its_training_examples() -> None:
    from evojax_merge.first_config import ModelTemplates, task_of_harness

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
def test_completion_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: cli.main(["completion", shell], standalone_mode=False)) == 0
    assert f"_EVOJAX_MERGE_COMPLETE={shell}_complete" in capsys.readouterr().out


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
