"""`evojax-merge init`: the config that it writes is one that plan and search take, for every kind of data; what it asks
for; and the scripts of `evojax-merge completion`."""

import builtins
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import (
    VOCAB,
    Family,
    finetune,
    random_model,
    sample,
    save,
    thorough,
    tiny_config,
    word_tokenizer,
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
    assert f"{problem.space.dims} parameters" in shown
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


def test_problems_are_asked_in_the_chat_template_of_the_base(init: Init, tmp_path: Path) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True))
    chat = save(model, tmp_path / "chat")
    tokenizer = word_tokenizer(words(VOCAB))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(chat)
    data = records(*({"question": f"w{number}", "answer": f"#### {number}"} for number in range(10)))
    assert init("--base", "chat", "--parents", "one", "two", "--data", data) == 0
    assert document()["tasks"][0]["apply_chat_template"] is True


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
    from evojax_merge.first_config import task_of_harness

    sections = {
        name: {key: value for key, value, _ in task_of_harness(name, False).lines} for name in ("gsm8k", "mine")
    }
    assert sections["gsm8k"]["split"] == "train" and "split" not in sections["mine"]


# ---------------------------------------------------------------------------------------------------------------
# Files and questions


def test_an_existing_file_is_kept_unless_asked_for(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    Path("search.yaml").write_text("mine: true\n")
    assert init(*MODELS, "--data", "tasks.jsonl") == 2
    assert "exists already" in capsys.readouterr().err and document() == {"mine": True}
    assert init(*MODELS, "--data", "tasks.jsonl", "--force") == 0
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
