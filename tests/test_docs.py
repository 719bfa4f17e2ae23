"""The documentation: the tutorial's commands run on a tiny pair, the config reference is the program's, links lead to
files."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from helpers import finetune, random_model, save, tiny_config
from hostile import run_command, run_script

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md"),
                *(ROOT / folder / "README.md" for folder in ("configs", "evojax_merge", "kernels", "tests"))])  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)\s]*)\)")
MODELS = {"Qwen/Qwen2.5-1.5B": "base", "Qwen/Qwen2.5-1.5B-Instruct": "general",
          "Qwen/Qwen2.5-Coder-1.5B-Instruct": "coder"}  # fmt: skip
# The tutorial's sizes, and those of the test.
SMALLER = {
    "generations: 30": "generations: 2\n  population: 4",
    "search.generations=40": "search.generations=3",
    "search.strategy=gradient": "search.strategy=gradient --set search.generations=2",
    "max_new_tokens: 256": "max_new_tokens: 4",
    "max_new_tokens=200": "max_new_tokens=4",
    "range(240)": "range(20)",
    "layers_per_group: 7": "layers_per_group: 2",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def write_pair(folder: Path, words: list[str]) -> None:
    """A tiny base and two fine-tunes that know these words, under the tutorial's names."""
    tokens = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *words]))
    base = random_model(tiny_config("qwen2", vocab_size=len(tokens), tie_word_embeddings=True))
    for seed, name in enumerate(MODELS):
        save(base if seed == 0 else finetune(base, seed), folder / name, tokens)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)


def test_the_tutorial_runs_on_a_tiny_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    for size, smaller in SMALLER.items():
        assert size in text
        text = text.replace(size, smaller)
    commands: list[list[str]] = []
    for language, block in BLOCK.findall(text):
        if language == "sh":
            commands += [shlex.split(line) for line in block.splitlines() if line]
        else:
            name = block.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(block)
    assert [command[0] for command in commands].count("evojax-merge") >= 6
    words = [*" ".join(map(str, range(200))).split(), "<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"]
    monkeypatch.chdir(tmp_path)
    runpy.run_path("problems.py", run_name="__main__")
    for line in Path("problems.jsonl").read_text().splitlines():
        words += " ".join(json.loads(line).values()).split()
    write_pair(tmp_path, words)
    for command in commands:
        run = run_script if command[0] == "python" else run_command
        done = run(*command[1:], folder=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    again, best = tmp_path / "out" / "again", tmp_path / "runs" / "tutorial" / "best" / "model"
    assert (again / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    samples = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert {sample["task"] for sample in samples} == {"worked_answers", "right_answers"}


def test_the_config_reference_is_what_the_program_lists() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "config_reference.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run: python docs/config_reference.py"
