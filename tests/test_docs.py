"""The documentation: the tutorial's commands run on a tiny pair, the config reference is the program's, links lead to
files."""

import inspect
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.families import Family, stand_in_for_the_zoo
from helpers.files import read_lines
from helpers.models import finetune, random_model, save, tiny_config
from helpers.sampling import thorough
from hostile import run_command, run_script

import evojax_merge
from evojax_merge.cli import cli
from evojax_merge.config.documents import keys_of
from evojax_merge.config.search_config import Config
from evojax_merge.tasks.kinds import kinds as all_kinds

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")]
    + [ROOT / folder / "README.md" for folder in ("configs", "evojax_merge", "kernels", "tests")]
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
MODELS = {"Qwen/Qwen2.5-1.5B": "base", "Qwen/Qwen2.5-1.5B-Instruct": "general",
          "Qwen/Qwen2.5-Coder-1.5B-Instruct": "coder"}  # fmt: skip
# The tutorial's sizes, and those of the test.
SMALLER = {
    "generations: 30": "generations: 2\n  population: 4",
    "search.generations=40": "search.generations=3",
    "search.strategy=gradient": "search.strategy=gradient --set search.generations=2",
    "max_new_tokens: 256": "max_new_tokens: 4",
    "max_new_tokens=200": "max_new_tokens=4",
    "random.sample(numbers, 240)": "random.sample(numbers, 20)",
    "layers_per_group: 7": "layers_per_group: 2",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shell_lines(text: str) -> list[list[str]]:
    """Words of each command in a page's shell blocks, and behind a prompt in those that show what it prints; comments
    left out."""
    blocks = [block.replace("\\\n", " ") for language, block in BLOCK.findall(text) if language == "sh"]
    blocks += ["\n".join(typed(block)) for language, block in BLOCK.findall(text) if language == "console"]
    return [words for block in blocks for line in joined(block) if (words := shlex.split(line, comments=True))]


def typed(block: str) -> list[str]:
    """Commands of a block that shows what they print."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def joined(block: str) -> list[str]:
    """Lines of a shell block; a quote that is open at the end of a line goes on in the next one."""
    lines: list[str] = []
    for line in block.splitlines():
        if lines and (lines[-1].partition("#")[0].count("'") % 2 or lines[-1].count('"') % 2):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return lines


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as browsers of repositories and mkdocs make them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {slug.strip().replace(" ", "-") for slug in slugs}


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def write_pair(folder: Path, words: list[str]) -> None:
    """A tiny base and two fine-tunes that know these words, under the tutorial's names."""
    tokens = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *words]))
    base = random_model(tiny_config("qwen2", vocab_size=len(tokens), tie_word_embeddings=True))
    for seed, name in enumerate(MODELS):
        save(base if seed == 0 else finetune(base, seed), folder / name, tokens)
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)


@thorough
def test_the_tutorial_runs_on_a_tiny_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TUTORIAL.read_text(encoding="utf-8")
    for size, smaller in SMALLER.items():
        assert size in text
        text = text.replace(size, smaller)
    commands: list[list[str]] = []
    for language, block in BLOCK.findall(text):
        if language == "sh":
            commands += [shlex.split(line, comments=True) for line in block.splitlines() if line]
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
    samples = read_lines(Path("answers.jsonl"))
    assert {sample["task"] for sample in samples} == {"worked_answers", "right_answers"}


def test_the_config_reference_is_what_the_program_lists() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "config_reference.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run: python docs/config_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve() if target else page
        # A link to a folder works on disk, but not in the site, whose strict build refuses it.
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    """Subcommands and their options, targets of make, and benchmarks."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    benchmarks = runpy.run_path(str(ROOT / "bench" / "__main__.py"))["benchmarks"]()
    text = page.read_text(encoding="utf-8")
    spans = [span.split() for span in re.findall(r"`((?:evojax-merge|make|python -m bench) [^`]*)`", text)]
    for words in [*shell_lines(text), *spans]:
        match words:
            case ["evojax-merge", name, *arguments] if not name.startswith("-") and name != "COMMAND":
                options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
                assert options <= {*options_of(cli.commands[name]), "--help"}, words
            case ["make", target, *_]:
                assert target.removeprefix("bench-") in benchmarks or f"\n{target}:" in makefile, words
            case ["python", "-m", "bench", name, *_] if name != "NAME":
                assert name in benchmarks, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_in_pages_have_known_keys(page: Path) -> None:
    keys = {key.name.replace("[]", "") for key in keys_of(Config)}
    top = {key.partition(".")[0] for key in keys}

    kinds = {name for kind in all_kinds() for name in kind.names}

    def unknown(value: Any, at: str) -> Iterator[str]:
        if isinstance(value, list):
            for item in value:
                yield from unknown(item, at)
        elif at == "tasks" and isinstance(value, dict) and value.get("kind", "gsm") not in kinds:
            pass  # a kind of a plugin
        elif isinstance(value, dict) and any(key.startswith(f"{at}.") for key in keys):
            for name, inner in value.items():
                path = f"{at}.{name}"
                generic = f"{at}.NAME"
                if at == "stages":
                    yield from unknown(inner, name)
                elif any(key.startswith(generic) for key in keys):
                    yield from unknown(inner, generic)
                elif path in keys:
                    yield from unknown(inner, path)
                else:
                    yield path

    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            for document in yaml.safe_load_all(block):
                if isinstance(document, dict) and document.keys() <= top:
                    for name, value in document.items():
                        assert not list(unknown(value, name)), block


@pytest.mark.parametrize("guide", sorted(ROOT.glob("docs/guides/*.md")), ids=lambda guide: guide.stem)
def test_a_guide_begins_with_a_command_and_what_it_prints(guide: Path) -> None:
    title, _, text = guide.read_text(encoding="utf-8").partition("\n")
    assert title.startswith("# ") and text.lstrip("\n").startswith("```console\n$ ")
    _, block = BLOCK.findall(text)[0]
    assert len(typed(block)) < len(block.splitlines()), "the command's output is missing"


def test_the_install_page_lists_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = (ROOT / "docs" / "install.md").read_text().split("## Extras")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == set(extras)


def test_the_glossary_explains_the_words_of_the_terminal() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)[2:]
    assert 20 <= len(words) <= 30 and words == sorted(words, key=str.lower)
    for word in ("bank", "companion", "materialise", "minibatch", "pass", "recalibrate", "rung", "validation"):
        assert word in ", ".join(words), word
    assert "docs/glossary.md" in str(cli.commands["search"].help)


def test_the_api_page_has_the_parameters_of_each_function() -> None:
    """Each function `name(parameters)` in the first column of a table, in the order of the signature."""
    text = (ROOT / "docs" / "reference" / "python-api.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    rows = re.findall(r"`(\w+)\(([^`]*)\)`", "\n".join(cells))
    assert len(rows) >= 8
    for name, parameters in rows:
        shown = [one.partition("=")[0] for one in parameters.split(", ") if one not in ("*", "…")]
        signature = list(inspect.signature(getattr(evojax_merge, name)).parameters)
        assert [one for one in signature if one in shown] == shown, (name, signature)
        assert "…" in parameters or signature == shown, (name, signature)


@thorough
def test_the_api_pages_study_runs(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first three examples, one after the other, with fewer generations, on tiny models for the demo family."""
    stand_in_for_the_zoo(tmp_path / "cache", family)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "reference" / "python-api.md").read_text(encoding="utf-8")
    blocks = [block for language, block in BLOCK.findall(text) if language == "python"]
    script = "\n".join(blocks[:2])
    for size, smaller in {"run(20,": "run(1,", "run(10)": "run(1)", "population=16": "population=4"}.items():
        assert size in script
        script = script.replace(size, smaller)
    (tmp_path / "study.py").write_text(f"{script}print(study)\n{blocks[2]}")
    done = run_script(tmp_path / "study.py", folder=tmp_path)
    assert done.stdout.splitlines()[-1].startswith("Study(method='task_arithmetic', parents=['maths', 'japanese']")
    for written in (
        "fitness.png", "out/best/model.safetensors", "out/by-hand/model.safetensors", "out/arrays/params.safetensors",
    ):  # fmt: skip
        assert (tmp_path / written).is_file()


def test_the_kernels_examples_run(tmp_path: Path) -> None:
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    for number, block in enumerate(block for language, block in BLOCK.findall(text) if language == "python"):
        (tmp_path / f"{number}.py").write_text(block)
        run_script(tmp_path / f"{number}.py", folder=tmp_path)


def test_every_benchmark_says_what_it_measures() -> None:
    listed = runpy.run_path(str(ROOT / "bench" / "__main__.py"))
    pages = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for name, script in listed["benchmarks"]().items():
        assert listed["summary"](script).endswith("."), script
        assert f"`make bench-{name}`" in pages, name
