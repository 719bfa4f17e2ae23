"""The search as a user runs it: commands on real folders; killed as a process, resumed, exported."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cma
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from helpers.commands import refusal, run_here
from helpers.decoders import hidden_states
from helpers.families import build_family
from helpers.files import read_json, read_lines, write_lines, write_yaml
from helpers.models import even_records, load_torch
from helpers.sampling import sample, thorough
from helpers.searches import open_problem, search_config, search_in, task_section
from hostile import Running, run_python, start_command
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from evojax_merge.checkpoints.bank import load_bank
from evojax_merge.checkpoints.folder import read_header
from evojax_merge.commands.export import export
from evojax_merge.commands.search import ResumeHint
from evojax_merge.config.search_config import SearchConfig
from evojax_merge.errors import Failed, InputError
from evojax_merge.evaluation.scores import Scores, TaskScores
from evojax_merge.models.bank import take_candidate
from evojax_merge.models.decoder import logits
from evojax_merge.models.sources import LazyMerge
from evojax_merge.report.comparison import Result, Row
from evojax_merge.report.winner import MergeReport
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.run_folder import open_run
from evojax_merge.search.strategies.cma_es import default_population
from evojax_merge.search.strategies.registry import StrategySettings, find_strategy
from evojax_merge.tasks.text import Example, TextTask

GENERATIONS = 6


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("family")
    build_family(root, dtype=torch.bfloat16)
    write_lines(root / "heldout.jsonl", even_records(8, seed=2))
    space = {
        "method": "dare_ties", "layers_per_group": 2,
        "parameters": {"weight": {"low": -0.2, "high": 1.5}, "density": {"start": 0.6}},
    }  # fmt: skip
    # With the mean and the start as many are scored at the end as in a generation, by the same programs.
    document = search_config(
        None, GENERATIONS, 6, space=space, search={"finalists": 4}, seed=3,
        tasks=[
            task_section(heldout=0.25),
            {"name": "choice", "kind": "multiple_choice", "file": "tasks.jsonl", "heldout": "heldout.jsonl",
             "metric": "margin", "weight": 0.5, "limit": 6},
            {"name": "words", "kind": "exact_match", "file": "tasks.jsonl", "max_new_tokens": 3,
             "pattern": r"w\d+ w\d+"},
        ],
    )  # fmt: skip
    return write_yaml(root / "config.yaml", document)


@pytest.fixture(scope="module")
def likelihood_file(config_file) -> Path:
    """The same search by its first task alone, where nothing depends on what is scored."""
    document = yaml.safe_load(config_file.read_text())
    path = config_file.with_name("likelihood.yaml")
    return write_yaml(path, document | {"tasks": document["tasks"][:1]})


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    (out.parent / "stdout").write_text(run_here("search", config_file, "--out", out).stdout)
    return out


@pytest.fixture(scope="module")
def finished_likelihood(likelihood_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "likelihood"
    run_here("search", likelihood_file, "--out", out)
    return out


def contents(out: Path) -> dict[str, bytes]:
    """What must not depend on when and how often a run was interrupted."""
    files = ["history.jsonl", "result.json", "config.yaml", "best/recipe.yaml", "best/model/model.safetensors"]
    return {name: (out / name).read_bytes() for name in files}


def test_run_folder_is_complete(finished):
    history = read_lines(finished / "history.jsonl")
    assert [row["generation"] for row in history] == list(range(1, GENERATIONS + 1))
    assert all(len(row["fitness"]) == 6 and row["failed"] == 0 for row in history)
    best = [row["best_so_far"] for row in history]
    assert best == sorted(best) and best[-1] == max(row["best"] for row in history)
    assert len((finished / "timing.jsonl").read_text().splitlines()) == GENERATIONS
    table = read_json(finished / "result.json")["table"]
    assert [row["role"] for row in table] == ["base", "parent", "parent", "uniform", "winner"]
    assert all(set(row["heldout_scores"]) >= {"text/log_probability", "words/accuracy"} for row in table)
    answers = read_lines(finished / "heldout_answers.jsonl")
    # The winner's, and one parent's for each task.
    beside = {(answer["model"], answer["task"]) for answer in answers}
    assert len(beside) == 2 * len({task for _, task in beside})
    assert all(("outputs" in answer) == (answer["task"] == "words") for answer in answers)
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Wins and losses" in page and "words, beside parent" in page
    card = (finished / "best/model/README.md").read_text()
    assert "dare_ties" in card and "model: parent0" in card and "Held-out" in card and str(finished.parent) not in card
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml", "history.jsonl", "history.backup.jsonl", "timing.jsonl", "checkpoints", "best", "result.json",
        "report.html", "environment.json", "heldout_answers.jsonl", "run.log",
    }  # fmt: skip


def test_the_greedy_soup_is_a_row_of_the_table_and_a_search(likelihood_file, tmp_path):
    soup = ["space.method=task_arithmetic", "space.parameters={}", "search.controls=[greedy]"]
    settings = [part for key in [*soup, "search.population=3", "search.strategy=greedy"] for part in ("--set", key)]
    output = " ".join(run_here("search", likelihood_file, "--out", tmp_path / "run", *settings).stdout.split())
    result = read_json(tmp_path / "run/result.json")
    assert [row["role"] for row in result["table"]] == ["base", "parent", "parent", "uniform", "greedy", "winner"]
    history = read_lines(tmp_path / "run/history.jsonl")
    assert len(history) == 2 and len(history[0]["fitness"]) == 3
    greedy, winner, fitness = *result["table"][-2:], dict(zip("01", history[0]["fitness"], strict=False))
    alone, both = max(fitness, key=fitness.get), history[1]["fitness"][0] >= max(fitness.values())
    assert greedy["name"] == f"soup of {'parent0, parent1' if both else f'parent{alone}'}"
    assert (
        f"greedy {greedy['name']}" in output and "than the greedy soup of " in output
    ) or "as the greedy soup" in output
    assert winner["heldout_fitness"] == pytest.approx(greedy["heldout_fitness"], abs=1e-6)
    assert result["better_than"]["greedy"]["name"] == greedy["name"]
    assert f"greedy {greedy['name']}, held out" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    config = likelihood_file.with_name("paths.yaml")
    document = yaml.safe_load(likelihood_file.read_text()) | {"data_flow": {}}
    write_yaml(config, {key: value for key, value in document.items() if key != "space"})
    refused = run_here("search", config, "--out", tmp_path / "no", "--set", "search.controls=[greedy]", status=2)
    says = "search.controls=[greedy]: greedy averages the weights of parents; expected the merge of 2 parents or more"
    assert says in " ".join(refused.stderr.split())


def test_winner_is_what_was_scored(finished, config_file):
    """The exported folder, in transformers, gives the logits of the candidate that the search scored."""
    problem = open_problem(config_file)
    spec = problem.backend.candidates.spec
    bank = load_bank(problem.backend.models.sources, problem.backend.models.decoder, spec)
    genome = read_json(finished / "result.json")["genome"]
    recipes = jax.vmap(problem.space.recipe)(jnp.asarray([genome], jnp.float32))
    source = LazyMerge.of(bank, take_candidate(recipes, 0), spec)
    decoder = problem.backend.models.decoder
    tokens = np.random.default_rng(0).integers(4, decoder.vocab, (3, 11)).astype(np.int32)
    ours = np.asarray(logits(decoder, source, hidden_states(decoder, source, tokens)))
    with torch.no_grad():
        theirs = load_torch(finished / "best/model")(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert read_json(finished / "best/model/config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize("drawn", [None, "otherwise"])
def test_a_run_whose_masks_were_drawn_otherwise_is_neither_continued_nor_exported(finished, tmp_path, drawn):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    document = yaml.safe_load((folder / "config.yaml").read_text())
    found = document.pop("random_numbers")
    write_yaml(folder / "config.yaml", document | ({} if drawn is None else {"random_numbers": drawn}))
    with pytest.raises(InputError, match="drew other random masks, and cannot be continued by this one"):
        open_run(folder, document | {"random_numbers": found}, resume=True, overwrite=False)
    with pytest.raises(InputError, match=r"drew other random masks; what it has exported itself \(in best/model"):
        export(folder, tmp_path / "model", None, False, False)
    assert not (tmp_path / "model").exists()


def test_recipe_and_export_give_the_winner_bit_for_bit(finished, tmp_path):
    run_here("merge", finished / "best/recipe.yaml", tmp_path / "again")
    run_here("export", finished, tmp_path / "exported")
    winner = (finished / "best/model/model.safetensors").read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == winner
    assert (tmp_path / "exported/model.safetensors").read_bytes() == winner
    recipe = (finished / "best/recipe.yaml").read_text()
    for folder in (finished / "best/model", tmp_path / "again", tmp_path / "exported"):
        assert (folder / "mergekit_config.yml").read_text() == recipe
    run_here("export", finished, tmp_path / "wide", "--dtype", "float32")
    assert read_header(tmp_path / "wide/model.safetensors")["model.norm.weight"].dtype == np.float32
    # The recipe and the card of a model in another dtype are that model's.
    run_here("merge", tmp_path / "wide/mergekit_config.yml", tmp_path / "wide again")
    wide = (tmp_path / "wide/model.safetensors").read_bytes()
    assert (tmp_path / "wide again/model.safetensors").read_bytes() == wide
    card = (tmp_path / "wide/README.md").read_text()
    assert "**Written in float32. It was searched, and scored, in bfloat16" in card
    assert "out_dtype: float32" in card and "out_dtype: bfloat16" not in card


def test_a_run_is_not_written_into_a_model_that_it_reads(config_file):
    base = config_file.parent / "base"
    before = sorted(base.iterdir())
    said = run_here("search", config_file, "--out", base / "run", status=2).stderr
    assert f"{base / 'run'}: lies inside of {base}, which this command reads" in said
    assert sorted(base.iterdir()) == before


def test_evaluate_gives_the_winners_heldout_scores(finished, config_file, tmp_path):
    """`evaluate` on the held-out split reaches the figures that the search put in its table."""
    models = [finished / "best/model", config_file.parent / "base"]
    done = run_here("evaluate", *models, "--tasks", config_file, "--split", "heldout", "--json", tmp_path / "s.json")
    assert " model " in done.stdout and " base " in done.stdout
    assert "the 3 held-out examples of text" in " ".join(done.stdout.split())
    scores = read_json(tmp_path / "s.json")
    table = read_json(finished / "result.json")["table"]
    for row, role in zip(scores, ("winner", "base"), strict=True):
        expected = next(line for line in table if line["role"] == role)["heldout_scores"]
        assert row["scores"] == pytest.approx(expected, abs=1e-4)


def test_evaluate_says_where_tokenizers_begin_texts_differently(config_file, tmp_path):
    base = config_file.parent / "base"
    other = shutil.copytree(base, tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(other / "tokenizer.json"))
    errors = run_here("evaluate", base, other, "--tasks", config_file).stderr
    assert "warning: the tokenizer of other begins texts with a token, and that of base does not" in errors
    assert "begins texts" not in run_here("evaluate", base, base, "--tasks", config_file).stderr


def _start_and_wait(config_file: Path, out: Path, lines: int, *options: str) -> Running:
    """A search that has come so far (test_torture.py kills processes from their start on)."""
    process = start_command("search", config_file, "--out", out, *options)
    history = out / "history.jsonl"
    while process.poll() is None:
        if history.exists() and history.read_bytes().count(b"\n") >= lines:
            return process
        time.sleep(0.005)
    raise AssertionError(f"ended before it could be stopped: {process.read('stderr')}")


def test_killed_and_resumed_is_as_never_stopped(likelihood_file, finished_likelihood, tmp_path):
    out = tmp_path / "killed"
    for lines in sample((2, 4), 1):
        options = ["--resume"] if out.exists() else []
        process = _start_and_wait(likelihood_file, out, lines, *options)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "result.json").exists()
    _check_export_of_what_there_is(likelihood_file, out, finished_likelihood, tmp_path)
    # The line that a kill cut short.
    with (out / "history.jsonl").open("a") as handle:
        handle.write('{"generation": 99, "be')
    run_here("search", likelihood_file, "--out", out, "--resume")
    assert contents(out) == contents(finished_likelihood)


def _check_export_of_what_there_is(config_file: Path, out: Path, finished: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    refused = run_here("export", out, model, status=2)
    assert "--best-so-far" in refused.stderr and not model.exists()
    done = run_here("export", out, model, "--best-so-far")
    # The checkpoint's generation, which the history may be a line short of or ahead of.
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())
    best = json.loads((finished / "history.jsonl").read_text().splitlines()[saved - 1])["best_so_far"]
    assert f"best candidate of {saved} generations, fitness {best:.4f}" in done.stdout
    # The card's recipe makes the same model, where the models are: it names them, and not their places.
    recipe = config_file.parent / "recipe.yaml"
    recipe.write_text((model / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0])
    run_here("merge", recipe, tmp_path / "again")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (model, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_interrupt_saves_and_says_how_to_go_on(likelihood_file, finished_likelihood, tmp_path):
    out = tmp_path / "interrupted"
    longer = ["--set", f"search.generations={GENERATIONS + 1}"]
    process = _start_and_wait(likelihood_file, out, 3, *longer)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    stderr = process.read("stderr")
    assert "Traceback" not in stderr and stderr.endswith("--resume\ninterrupted\n")
    # Typed as it is printed, the command goes on with what the first one was given.
    again = shlex.split(stderr.split("Continue with: ")[1].splitlines()[0])
    assert again[0] == "evojax-merge"
    run_here(*again[1:])
    history = (out / "history.jsonl").read_bytes().splitlines()
    assert history[:GENERATIONS] == (finished_likelihood / "history.jsonl").read_bytes().splitlines()
    assert len(history) == GENERATIONS + 1
    # With more generations a finished run goes on to the same end.
    going = shutil.copytree(finished_likelihood, tmp_path / "going")
    run_here("search", likelihood_file, "--out", going, "--resume", *longer)
    assert contents(going) == contents(out)


@pytest.mark.parametrize(
    ("resume", "says"),
    [(False, "nothing was saved. Start again with: "), (True, "nothing was searched yet. Continue ")],
)
def test_an_interrupt_before_there_is_a_run_says_to_start_again(resume, says, monkeypatch, capsys):
    monkeypatch.setattr("evojax_merge.system.interrupts.received", lambda: True)
    with pytest.raises(KeyboardInterrupt), ResumeHint("evojax-merge search config.yaml", resume).on_exit():
        raise KeyboardInterrupt
    assert f"stopped; {says}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_until_a_generation_is_saved(number, tmp_path):
    """One that comes in the middle of a save lets it finish, and is then what it would have been; a second one does
    not wait."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from evojax_merge import cli\nfrom evojax_merge.system import interrupts\n"
        "from evojax_merge.system.interrupts import defer_signals\n"
        "from evojax_merge.search.checkpoints import Checkpoints\n"
        "from evojax_merge.search.run_parts import RunFolder\n"
        "number, times, folder = int(sys.argv[1]), int(sys.argv[2]), RunFolder(Path(sys.argv[3]))\n"
        "def save():\n"
        "    with defer_signals():\n"
        "        for _ in range(times):\n"
        "            os.kill(os.getpid(), number)\n"
        "        Checkpoints(folder).save(1, {'mean': 1.0}, 0, bytes(32))\n"
        "    print('went on')\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "interrupts.install()\n"
        "status = cli.run(save)\n"
        "print(max(folder.steps(), default=None))\n"
        "sys.exit(status)\n"
    )
    for times, saved in ((1, "1\n"), (2, "None\n"), (0, "went on\n1\n")):
        done = run_python(script, int(number), times, tmp_path / f"run{times}", status=130 if times else 0)
        assert done.stdout == saved
        # What is cut short complains.
        assert times == 2 or done.stderr == "interrupted\n" * times


@pytest.mark.parametrize("place", ["a callback of the garbage collector", "a finalizer"])
def test_an_interruption_where_exceptions_are_ignored_comes_a_moment_later(place, tmp_path):
    script = tmp_path / "collect.py"
    script.write_text(
        "import gc, os, signal, sys, time\n"
        "from evojax_merge.system import interrupts\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "interrupts.install()\n"
        # As libtpu does when it is loaded.
        "def take_over():\n"
        "    for number in (signal.SIGPROF, signal.SIGVTALRM, signal.SIGALRM):\n"
        "        signal.signal(number, signal.SIG_DFL)\n"
        "def interrupt(*_):\n"
        "    if not interrupts.received():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        take_over()\n"
        "class Finalized:\n"
        "    def __del__(self):\n"
        "        interrupt()\n"
        "        print('finalized')\n"
        "if 'collector' in sys.argv[1]:\n"
        "    gc.callbacks.append(interrupt)\n"
        # A function: Python 3.13 leaves a try without its handlers where a signal comes between two rounds of a loop.
        "def work():\n"
        "    end = time.process_time() + 20\n"
        "    while time.process_time() < end:\n"
        "        pass\n"
        "try:\n"
        "    gc.collect() if 'collector' in sys.argv[1] else Finalized()\n"
        "    work()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, script, place], capture_output=True, text=True, timeout=100)
    assert done.stdout == ("" if "collector" in place else "finalized\n") + "interrupted\n" and done.stderr == ""


def test_resuming_what_is_done_says_so(likelihood_file, finished_likelihood, tmp_path):
    out = tmp_path / "done"
    shutil.copytree(finished_likelihood, out)
    copied = {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*")}
    done = run_here("search", likelihood_file, "--out", out, "--resume", "--set", "search.generations=3")
    assert f"{GENERATIONS} generations are saved, and 3 wanted: nothing to search" in done.stdout
    # Nothing is scored or written again.
    assert f"the run is complete; its winner: {out / 'best/model'}" in done.stdout and "scoring" not in done.stdout
    for name in ("best/model/model.safetensors", "best/recipe.yaml", "result.json"):
        assert (out / name).stat().st_mtime_ns == copied[name]
    # What is written down is what was done, not what was asked for too late.
    assert f"{GENERATIONS} generations, seed" in (out / "best/model/README.md").read_text()
    assert contents(out) == contents(finished_likelihood)
    # What is missing is made again.
    (out / "best/recipe.yaml").unlink()
    run_here("search", likelihood_file, "--out", out, "--resume")
    assert contents(out) == contents(finished_likelihood)


@thorough
def test_the_winner_of_a_finished_run_is_kept_when_it_goes_on(likelihood_file, tmp_path):
    out = tmp_path / "longer"
    # From a bad start a longer search finds another winner.
    again = ["search", likelihood_file, "--out", out, "--set", "space.parameters.weight.start=-0.2"]
    run_here(*again, "--set", "search.generations=1")
    files = ["best/recipe.yaml", "best/model/model.safetensors", "best/model/config.json", "result.json"]
    before = {name: (out / name).read_bytes() for name in files}
    done = run_here(*again, "--resume")
    assert (out / "best/recipe.yaml").read_bytes() != before["best/recipe.yaml"]
    kept = {name: (out / "winners/001" / name.removeprefix("best/")).read_bytes() for name in files}
    assert kept == before
    # Both held-out figures are told, and which is better.
    table = [json.loads(text)["table"] for text in (before["result.json"], (out / "result.json").read_bytes())]
    old, new = (next(row["heldout_fitness"] for row in rows if row["role"] == "winner") for rows in table)
    verdict = "better than" if new > old else "WORSE than"
    line = next(line for line in done.stdout.splitlines() if line.startswith("held out, the winner"))
    assert f"of {GENERATIONS} generations ({new:.4f}) is {verdict} that of 1 ({old:.4f})" in line
    assert line.endswith(f"which is kept: {out / 'winners/001/model'} is a model folder like {out / 'best/model'}")
    # Going on with nothing new to find keeps what there is.
    after = contents(out)
    run_here(*again, "--resume")
    assert sorted(path.name for path in (out / "winners").iterdir()) == ["001"]
    assert contents(out) == after


def test_search_never_sees_the_heldout_split(config_file, finished, tmp_path):
    heldout = tmp_path / "other.jsonl"
    lines = (config_file.parent / "heldout.jsonl").read_text().splitlines()
    heldout.write_text("\n".join(reversed(lines[: len(lines) // 2])) + "\n")
    run_here("search", config_file, "--out", tmp_path / "run", "--set", f"tasks.1.heldout={heldout}")
    for name in ("history.jsonl", "best/recipe.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "{run}"], "--resume"),
        (["--out", "{run}", "--resume", "--set", "search.sigma=0.3"], "search.sigma"),
        (["--out", "{run}", "--resume", "--seed", "4"], "seed"),
        (["--out", "{parent}"], "not a run folder"),
        (["--out", "{run}/nothing", "--resume"], "no run to resume"),
    ],
)
def test_run_folder_of_another_run_is_refused(config_file, finished, arguments, expected):
    before = contents(finished)
    filled = [a.format(run=finished, parent=config_file.parent) for a in arguments]
    line = refusal("search", config_file, *filled)
    assert expected in line and contents(finished) == before


def test_a_run_folder_is_named_where_its_config_or_model_is_looked_for_elsewhere(config_file, finished, tmp_path):
    line = refusal("search", finished / "config.yaml", "--out", tmp_path / "none", "--resume")
    assert line.endswith(f"none: holds no run to resume; {finished} is a run: --out {finished} resumes it\n")
    model = f"{finished}: is a run of a search; its model is {finished / 'best/model'}\n"
    for arguments in (["inspect", finished], ["search", config_file, "--set", f"parents.0={finished}"]):
        assert refusal(*arguments, *([] if arguments[0] == "inspect" else ["--out", tmp_path / "run"])).endswith(model)


def test_overwrite_starts_again_and_keeps_what_is_not_its_own(likelihood_file, finished_likelihood, tmp_path):
    out = shutil.copytree(finished_likelihood, tmp_path / "run")
    for name in contents(finished_likelihood).keys() - {"config.yaml", "best/model/model.safetensors"}:
        (out / name).write_text("another run's")
    (out / "notes.txt").write_text("mine")
    run_here("search", likelihood_file, "--out", out, "--overwrite")
    assert contents(out) == contents(finished_likelihood)
    assert (out / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------
# The strategy


@dataclass(frozen=True)
class Driven:
    """A strategy with the keys of a seed, told fitness alone."""

    strategy: Any
    seed: int

    def init(self, start):
        return self.strategy.init(generation_key(self.seed, INIT_KEY), start[None])

    def ask(self, state, generation):
        return self.strategy.ask(generation_key(self.seed, generation), state)

    def tell(self, state, generation, genomes, fitness):
        return self.strategy.tell(generation_key(self.seed, generation), state, genomes, scores_of(fitness))


def scores_of(fitness: np.ndarray) -> Scores:
    """A matrix of one example."""
    values = np.asarray(fitness, np.float32)[:, None]
    weights = np.ones(1)
    return Scores(values, np.ones(values.shape, bool), np.zeros(1, int), ("text",), weights, np.asarray(fitness))


def make_strategy(dims: int, population: int, sigma: float, seed: int) -> Driven:
    settings = StrategySettings(dims, population, sigma, 100)
    return Driven(find_strategy("search.strategy", "cma_es")(settings), seed)


def _minimise(function, dims: int, target: float, limit: int) -> int:
    """Evaluations until `function` is below `target`."""
    population = default_population(dims)
    strategy = make_strategy(dims, population, 0.5, seed=1)
    state = strategy.init(np.full(dims, 1.0, np.float32))
    for generation in range(limit // population):
        genomes, state = strategy.ask(state, generation)
        values = np.array([function(np.asarray(genome, np.float64)) for genome in genomes])
        if values.min() < target:
            return (generation + 1) * population
        state = strategy.tell(state, generation, genomes, -values)
    return limit


@pytest.mark.parametrize("function", sample([cma.ff.sphere, cma.ff.elli], 1))
def test_strategy_needs_about_as_many_evaluations_as_pycma(function):
    """On convex quadratics, within 1.5 times of pycma from the same start to the same target."""
    dims, target, limit = 8, 1e-6, 20000
    options = {"ftarget": target, "seed": 1, "verbose": -9, "maxfevals": limit}
    theirs = cma.fmin2(function, np.full(dims, 1.0), 0.5, options)[1].result.evaluations
    assert _minimise(function, dims, target, limit) < 1.5 * theirs


def test_seeds_that_differ_in_their_upper_bits_alone_differ():
    drawn = []
    for seed in (1, 2**32 + 1, 2**33 + 1, 2**63 - 1):
        strategy = make_strategy(5, 8, 0.1, seed)
        drawn.append(np.asarray(strategy.ask(strategy.init(np.zeros(5, np.float32)), 0)[0]))
    assert len({genomes.tobytes() for genomes in drawn}) == len(drawn)


def test_flat_fitness_does_not_shrink_sigma():
    """Accuracy ties: 300 generations without any signal must leave a search that can still move."""
    strategy = make_strategy(10, 10, 1 / 6, seed=0)
    state = strategy.init(np.full(10, 0.5, np.float32))
    for generation in range(300):
        genomes, state = strategy.ask(state, generation)
        state = strategy.tell(state, generation, genomes, np.zeros(10))
    assert 1e-3 < float(state.std) < 1e3


def test_failed_candidates_rank_last():
    """A failed candidate moves the mean as the worst finite one would."""
    strategy = make_strategy(4, 8, 1 / 6, seed=0)
    genomes, requests = strategy.ask(strategy.init(np.full(4, 0.5, np.float32)), 0)
    fitness = np.arange(8.0)
    worst, failed = fitness.copy(), fitness.copy()
    worst[5], failed[5] = -100.0, np.nan
    one = strategy.tell(requests, 0, genomes, worst)
    other = strategy.tell(requests, 0, genomes, failed)
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.C, other.C)
    infinite = failed.copy()
    infinite[5] = np.inf
    np.testing.assert_array_equal(strategy.tell(requests, 0, genomes, infinite).mean, other.mean)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_without_space_is_found_out_before_the_search(config_file, finished, small_disk):
    for arguments in (
        ["search", config_file, "--out", small_disk / "run"],
        ["merge", finished / "best/recipe.yaml", small_disk / "model", "--dtype", "float32"],
    ):
        line = refusal(*arguments)
        assert "MB free" in line and list(small_disk.iterdir()) == []


@thorough
def test_a_task_without_signal_is_named(tmp_path):
    """After the first generation: a pattern that no output matches, and scores that are all the same."""
    build_family(tmp_path)
    task = {"name": "words", "kind": "exact_match", "file": "tasks.jsonl", "max_new_tokens": 2, "pattern": "never"}
    document = search_config(tasks=[task], space={"method": "linear", "parameters": {"weight": {}}})
    said = run_here("search", write_yaml(tmp_path / "config.yaml", document), "--out", tmp_path / "run").stdout
    assert said.count("0 of 40 outputs matched the pattern 'never'") == 1
    assert said.count("all 4 candidates score 0; it gives no signal") == 1


@dataclass
class OwnScorer:
    """One example whose score is a function of the genome."""

    function: Callable[[np.ndarray], np.ndarray]
    tasks: list[TextTask] = field(
        default_factory=lambda: [
            TextTask("text", "likelihood", "log_probability", 1.0, "text.jsonl", (Example("a", (" b",), "b", 1),))
        ]
    )

    def passes(self, population: int) -> int:
        return population

    def score(self, genomes, progress=lambda done: None) -> TaskScores:
        return TaskScores({"text": {"log_probability": self.function(genomes)[:, None].astype(np.float32)}})


def test_a_generation_that_fails_as_a_whole_ends_the_search(tmp_path):
    """In one line, with what was saved before it; the next start tries it again."""
    calls, fails = [], [2]

    def score(genomes):
        calls.append(len(genomes))
        values = -np.square(genomes).sum(axis=1)
        return np.where(len(calls) - 1 in fails, np.nan, values)

    space = SimpleNamespace(dims=3, start=np.zeros(3, np.float32))

    def search(name):
        (tmp_path / name).mkdir(exist_ok=True)
        config = SearchConfig(population=4, generations=5)
        return search_in(tmp_path / name, config, 0, space, [OwnScorer(score)])

    with pytest.raises(Failed) as caught:
        search("run")
    line = str(caught.value)
    assert line.startswith("generation 3: all 4 candidates failed, their scores for task text are not finite")
    assert f"the 2 before it are saved in {tmp_path / 'run'}" in line and "\n" not in line
    assert len((tmp_path / "run/history.jsonl").read_text().splitlines()) == 2
    fails.clear()
    resumed = search("run")
    whole = search("whole")
    assert (tmp_path / "run/history.jsonl").read_bytes() == (tmp_path / "whole/history.jsonl").read_bytes()
    assert np.array_equal(resumed.genomes, whole.genomes)


def test_one_finite_candidate_is_enough_to_go_on(tmp_path):
    def score(genomes):
        return np.where(np.arange(len(genomes)) == 1, 1.0, np.nan)

    space = SimpleNamespace(dims=3, start=np.zeros(3, np.float32))
    config = SearchConfig(population=4, generations=2)
    outcome = search_in(tmp_path, config, 0, space, [OwnScorer(score)])
    assert np.isfinite(outcome.fitness).all()


def result_of(**heldout: float) -> Result:
    """A result with these held-out fitnesses by role; parents are parent1, parent2, ..."""
    rows = [Row(role.rstrip("0123456789"), role, value, {}) for role, value in heldout.items()]
    return Result(np.zeros(2), 0.0, ("uniform merge", 0.0), rows, MergeReport((), {}, ()))


def test_a_winner_that_loses_is_told_with_both_figures():
    beaten = result_of(base=-3.0, parent1=-1.62, parent2=-1.7, uniform=-1.9, winner=-1.5)
    assert beaten.verdicts() == []
    worse = result_of(base=-3.0, parent1=-1.7, parent2=-1.62, uniform=-1.9, winner=-1.64)
    assert worse.verdicts() == [
        "On held-out data the winner is worse than the best parent parent2: it has -1.6400, that has -1.6200."
    ]
    tie = result_of(parent1=-1.7, uniform=-1.5, winner=-1.5)
    assert tie.verdicts() == ["On held-out data the winner is only as good as the uniform merge: both have -1.5000."]
    close = result_of(parent1=-1.50000001, winner=-1.50000002)
    assert "-1.5000000" in close.verdicts()[0] and "worse" in close.verdicts()[0]
    all_of_them = result_of(base=-1.0, parent1=-1.0, uniform=-1.0, winner=-2.0)
    assert [name in line for line, name in zip(all_of_them.verdicts(), ("base", "parent1", "uniform"), strict=True)]
    failed = result_of(parent1=-1.0, winner=np.nan)
    assert failed.verdicts()[0].startswith("On held-out data the winner has no finite score; ")
    assert result_of(parent1=np.nan, parent2=-3.0, winner=-2.0).verdicts() == []


def test_result_terminal_and_card_say_whether_the_winner_is_better(finished):
    document = read_json(finished / "result.json")
    by_role = {}
    for row in document["table"]:
        by_role.setdefault(row["role"], []).append(row["heldout_fitness"])
    better = document["better_than"]
    assert set(better) == {"base", "parent", "uniform"}
    winner, card = by_role["winner"][0], (finished / "best/model/README.md").read_text()
    for role, row in better.items():
        assert row["heldout_fitness"] == max(by_role[role]) and row["winner_heldout_fitness"] == winner
        assert row["better"] == (winner > max(by_role[role]))
    said = (finished.parent / "stdout").read_text()
    for text in (card, said):
        # By how much, with an interval, where it is better, and both figures where it is not.
        for is_better in (True, False):
            sentences = re.findall(
                r"On held-out data the winner is (better than |ahead of )?(?![^.]* of \d+ tasks)", text
            )
            expected = sum(row["better"] == is_better for row in better.values())
            assert sum(bool(sentence) == is_better for sentence in sentences) == expected


def test_a_base_that_gives_the_tokenizer_alone_is_named_in_the_recipe(likelihood_file, tmp_path):
    document = yaml.safe_load(likelihood_file.read_text())
    document |= {"tokenizer_source": "base", "space": {"method": "linear", "layers_per_group": "all"}}
    document["search"] = {"generations": 1, "population": 3}
    path = likelihood_file.with_name("tokenizer.yaml")
    write_yaml(path, document)
    run_here("search", path, "--out", tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run/best/recipe.yaml").read_text())
    assert recipe["tokenizer_source"] == recipe["base_model"] == str(likelihood_file.parent / "base")
    for space in ({"space": {"method": "slerp"}}, {"space": None, "data_flow": {"moves": 1}}):
        refused = run_here("search", write_yaml(path, document | space), "--out", tmp_path / "refused", status=2).stderr
        assert "tokenizer_source: the base takes no part in" in refused and refused.count("\n") == 1


@thorough
def test_a_runs_config_is_a_config_again(finished, tmp_path):
    """With the hashes that it holds: to score its winner, and to search with once more."""
    done = run_here("evaluate", finished, "--tasks", finished / "config.yaml")
    line = next(line for line in done.stdout.splitlines() if line.startswith("Scores on "))
    assert "all 12 examples of text, searched or not" in line and "the 8 held-out examples of choice" in line
    changes = ["--set", "search.generations=2"]
    run_here("search", finished / "config.yaml", "--out", tmp_path / "again", *changes)
    lines = (finished / "history.jsonl").read_bytes().splitlines()
    assert (tmp_path / "again/history.jsonl").read_bytes().splitlines() == lines[:2]
