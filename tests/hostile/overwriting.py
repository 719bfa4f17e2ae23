"""Names that a user gives a command for its files, under which something else lies: what this program did not write
stays, is named before any work, and no option changes that."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hostile import Case, World, changing, config, link
from hostile.links import bind, pipe
from hostile.runs import put_run

SCORES = {"model": "one", "fitness": 0.5, "scores": {"text/log_probability": -1.0}}
SAMPLE = {"model": "one", "task": "text", "example": "tasks.jsonl:1", "outputs": [], "score": 1.0, "scores": {}}
PLAN = {"target": "cpu", "fits": True, "passes": []}
BENCHMARK = dict.fromkeys(
    ("environment", "shape", "parameters", "dtype", "copy_bandwidth", "matrix_peak", "rows", "left_out"), 1
)
INSPECTION: dict[str, Any] = {"models": [], "pairs": [], "findings": []}
PAIR = {"pair": "a", "question": "Which?", "prompt": "w1", "left": "w2", "right": "w3", "pictures": False}
PAGE = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta name="generator" content="evojax-merge report">\n</head>\n'
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55")
MARKED_PNG = PNG + bytes.fromhex("00000015") + b"tEXtSoftware\0evojax-merge"
FIRST = "# A search for the best merge of 2 parents; all keys: evojax-merge keys all\nparents: [one, two]\n"

# Contents by the words for them: a user's files, and files of this program's kinds.
CONTENTS: Mapping[str, str | bytes] = {
    "a thesis": "\\documentclass{article}\n",
    "a config": yaml.safe_dump(config()),
    "tasks": '{"prompt": "w1 w2", "target": " w3"}\n',
    "an empty list": "[]\n",
    "an empty mapping": "{}\n",
    "JSON that never ends": "[" * 100_000,
    "bytes": bytes(range(256)),
    "scores": json.dumps([SCORES]),
    "scores with a note of the user's": json.dumps([SCORES | {"note": "of May"}]),
    "samples": f"{json.dumps(SAMPLE)}\n",
    "plans": json.dumps([PLAN]),
    "a benchmark": json.dumps(BENCHMARK),
    "an inspection": json.dumps(INSPECTION),
    "pairs": f"{json.dumps(PAIR)}\n",
    "votes on pairs": '{"pair": "a", "choice": "left", "judge": "ann"}\n',
    "the votes of a run": '{"round": "a", "task": "text", "genomes": [[0.5]], "answers": []}\n',
    "a page of runs": PAGE,
    "a page of pairs": "<!doctype html>\n<html>\n<head>\n<title>evojax-merge: pairs</title>\n",
    "the judges' page": "<!doctype html>\n<html>\n<head>\n<title>evojax-merge: judge</title>\n",
    "a page of the user's": "<!DOCTYPE html>\n<title>My evojax-merge report</title>\n",
    "a photo": PNG + b"IDAT",
    "a drawing": '<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>',
    "a picture of an inspection": MARKED_PNG,
    "a first config": FIRST,
    "a first config below the user's title": f"# Mine\n{FIRST}",
}  # fmt: skip


def judged(world: World) -> None:
    task = {"name": "taste", "kind": "human", "file": "tasks.jsonl", "max_new_tokens": 2, "votes": 4}
    world.write("judged.yaml", config(tasks=[task | {"heldout_votes": 1}], search={"generations": 1, "population": 4}))


def tasks_file(world: World) -> None:
    world.write("tasks.yaml", {"tasks": [{"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}]})


def two_runs(world: World) -> None:
    shutil.copytree(put_run(world), world / "other")


Prepare = Callable[[World], Any]


class Output:
    """A file that a command writes. `command`: all but its name; `name`: a usual one; `path`: the file that is written
    under that name; `says`: how messages begin, behind the file."""

    def __init__(
        self, label: str, command: Sequence[str], name: str, says: str, prepare: Prepare = lambda world: None,
        path: str = "", more: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.label, self.command, self.name, self.says, self.prepare = label, tuple(command), name, says, prepare
        self.path, self.more = path or name, tuple(more)

    def case(self, what: str, make: Callable[[Path], Any], *says: str, name: str = "", **more: Any) -> Case:
        """The command with something in the place of its file, or with another `name`."""

        def change(world: World) -> tuple[str, ...]:
            self.prepare(world)
            make(world / (name or self.path))
            return (*self.command, name or self.name, *self.more)

        return Case(f"{self.label}: {what}", change, (*says, *([self.says] if says else [])), **more)


INSPECT = ("inspect", "base", "one", "two")
JUDGE = ("judge", "judged.yaml", "--out", "run", "--export")
INIT = ("--base", "base", "--parents", "one", "two", "--data", "tasks.jsonl", "--overwrite")
EVALUATE = ("evaluate", "one", "--tasks", "tasks.yaml")

SCORES_OUT = Output("evaluate --json", (*EVALUATE, "--json"), "a.json", "--json: ", tasks_file)
SAMPLES_OUT = Output("evaluate --samples", (*EVALUATE, "--samples"), "a.jsonl", "--samples: ", tasks_file)
PLAN_OUT = Output("plan --json", ("plan", "config.yaml", "--json"), "a.json", "--json: ")
BENCH_OUT = Output("bench --json", ("bench", "--shape", "10M", "--seconds", "1", "--json"), "a.json", "--json: ")
REPORT_OUT = Output("inspect --json", (*INSPECT, "--json"), "a.json", "--json: ")
PNG_OUT = Output("inspect --picture .png", (*INSPECT, "--picture"), "a.png", "--picture: ")
SVG_OUT = Output("inspect --picture .svg", (*INSPECT, "--picture"), "a.svg", "--picture: ")
COMPARE_OUT = Output("compare --out", ("compare", "run", "other", "--out"), "a.html", "--out: ", two_runs)
PAIRS_OUT = Output("judge --export", JUDGE, "a.jsonl", "--export: ", judged)
PAGE_OUT = Output("judge --export, its page", JUDGE, "a.jsonl", "the page of --export: ", judged, "a.html")
INIT_OUT = Output("init", ("init",), "a.yaml", "", more=INIT)

# The contents that lie in the place of each file, and stay.
STAY: Sequence[tuple[Output, Sequence[str]]] = (
    (SCORES_OUT, ("a thesis", "a config", "an empty list", "samples", "plans", "JSON that never ends",
                  "scores with a note of the user's", "an inspection")),
    (SAMPLES_OUT, ("a thesis", "tasks", "an empty mapping", "pairs", "votes on pairs", "the votes of a run", "scores")),
    (PLAN_OUT, ("a thesis", "a config", "an empty list", "scores", "a benchmark", "bytes")),
    (BENCH_OUT, ("a thesis", "an empty mapping", "plans", "an inspection", "JSON that never ends", "a photo")),
    (REPORT_OUT, ("a thesis", "an empty mapping", "a benchmark", "scores", "pairs")),
    (PNG_OUT, ("a thesis", "a photo", "a drawing", "scores", "bytes")),
    (SVG_OUT, ("a thesis", "a drawing", "a photo", "a picture of an inspection", "a page of runs")),
    (COMPARE_OUT, ("a thesis", "a page of the user's", "a page of pairs", "the judges' page", "a drawing", "a config")),
    (PAIRS_OUT, ("a thesis", "a config", "tasks", "an empty mapping", "samples", "votes on pairs",
                 "the votes of a run", "a page of pairs", "bytes", "JSON that never ends")),
    (PAGE_OUT, ("a thesis", "a page of the user's", "a page of runs", "the judges' page", "pairs", "a drawing")),
    (INIT_OUT, ("a thesis", "a config", "a first config below the user's title", "plans", "an empty mapping")),
)  # fmt: skip


def holds(output: Output, content: str) -> Case:
    """The command where a file of this content has its file's name."""
    data = CONTENTS[content]
    make = (lambda path: path.write_bytes(data)) if isinstance(data, bytes) else lambda path: path.write_text(data)
    return output.case(f"in the place of {content}", make, "exists, and ", "of evojax-merge; move it or choose another")


def thesis_behind(path: Path) -> None:
    path.with_name("thesis").write_text("mine")
    path.symlink_to("thesis")


def folder_with_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


SPECIAL: Sequence[tuple[str, Callable[[Path], Any], str]] = (
    ("a folder", folder_with_notes, "is a folder; expected the name of a file"),
    ("a pipe", pipe, "is no regular file; expected the name of a file"),
    ("a socket", bind, "is no regular file; expected the name of a file"),
    ("a link to a thesis", thesis_behind, "exists, and "),
    ("a link that leads nowhere", link("gone"), "is a link that leads nowhere"),
    ("a link to a device", link("/dev/null"), "is no regular file"),
    ("a link to standard output", link("/dev/stdout"), "is no regular file"),
)
OUTPUTS = [output for output, _ in STAY]


def no(path: Path) -> None:
    """Nothing else is changed."""


def own(output: Output, what: str, content: str, *rewrites: str, **more: Any) -> Case:
    """A file of the program's own kind, which is replaced."""
    data = CONTENTS[content] if content else ""
    make = (lambda path: path.write_bytes(data)) if isinstance(data, bytes) else lambda path: path.write_text(data)
    more = {"status": 0, "seconds": 60.0, "rewrites": (output.path, *rewrites)} | more
    return output.case(what, make, **more)


def linked_own(output: Output, content: str) -> Case:
    """A link to a file of the program's own kind: the link stays."""

    def make(path: Path) -> None:
        (path.parent / "disk").mkdir()
        path.with_name("disk").joinpath("real").write_text(str(CONTENTS[content]))
        path.symlink_to("disk/real")

    return output.case(f"a link to {content} of its own", make, status=0, seconds=60.0, rewrites=("disk/real",))


def both(first: Output, option: str, name: str, *says: str, make: Callable[[Path], Any] = no) -> Case:
    """Two files of a command under one name."""

    def change(world: World) -> tuple[str, ...]:
        first.prepare(world)
        make(world / name)
        return (*first.command, first.name, option, name)

    return Case(f"{first.label}: {option} {name} as well", change, says)


def compared_with_itself(world: World) -> tuple[str, ...]:
    world.write("a.json", json.dumps(BENCHMARK))
    return (*BENCH_OUT.command, "a.json", "--compare", "./a.json")


@changing
def votes_as_pairs(world: World, option: str, content: str) -> tuple[str, ...]:
    """The file that votes are read from is that of the pairs as well."""
    judged(world)
    world.write("a.jsonl", CONTENTS[content])
    return (*JUDGE, "a.jsonl", option, "a.jsonl")


def in_part(world: World) -> tuple[str, ...]:
    judged(world)
    (world / "disk").mkdir()
    (world / "run/best").mkdir(parents=True)
    return (*JUDGE, "run/best/a.jsonl")


PUBLISH = ("publish", "run", "--repo", "me/mine")
WINNER = "best/model"


@changing
def linked(world: World, name: str) -> None:
    """A file of a finished run lies elsewhere, behind a link."""
    file = put_run(world) / name
    file.rename(world / "elsewhere")
    file.symlink_to(world / "elsewhere")


def holding(name: str, content: str) -> Callable[[World], None]:
    return lambda world: (put_run(world) / name).write_text(content) and None


CASES: list[Case] = [
    *(holds(output, content) for output, contents in STAY for content in contents),
    *(output.case(what, make, says) for output in OUTPUTS for what, make, says in SPECIAL),
    # The command's own input
    SCORES_OUT.case("the tasks file", no, "is the file of --tasks as well", name="tasks.yaml"),
    SAMPLES_OUT.case("the tasks file by another path", no, "is the file of --tasks as well", name="one/../tasks.yaml"),
    SAMPLES_OUT.case("the data of the task", no, "exists, and holds no samples", name="tasks.jsonl"),
    PLAN_OUT.case("the config", no, "is the file of CONFIG as well", name="config.yaml"),
    PLAN_OUT.case("a link to the config", link("config.yaml"), "is the file of CONFIG as well"),
    Case("bench --json: the file of --compare", compared_with_itself, ("--json: is the file of --compare as well",)),
    PAIRS_OUT.case("the config", no, "is the file of CONFIG as well", name="judged.yaml"),
    PAIRS_OUT.case("the data of the task", no, "exists, and holds no pairs", name="tasks.jsonl"),
    Case("judge --export: the file of --import", votes_as_pairs("--import", "votes on pairs"),
         ("a.jsonl: --export: is the file of --import as well",)),
    Case("judge --export: the file of --import, which holds pairs", votes_as_pairs("--import", "pairs"),
         ("a.jsonl: --export: is the file of --import as well",)),
    Case("judge --export: the file of --replay", votes_as_pairs("--replay", "the votes of a run"),
         ("a.jsonl: --export: is the file of --replay as well",)),
    INIT_OUT.case("another config of the user's", no, "exists, and is no first config", name="config.yaml"),
    INIT_OUT.case("a recipe", no, "exists, and is no first config", name="recipe.yaml"),
    # Two files that are one
    both(SCORES_OUT, "--samples", "./a.json", "--samples: is the file of --json as well"),
    both(SCORES_OUT, "--samples", "b.json", "--samples: is the file of --json as well",
         make=link("a.json")),
    PAIRS_OUT.case("a name that its page has", no, "a.html: the page of --export: is the file of --export as well",
                   name="a.html"),
    # The files of a run
    *(PAIRS_OUT.case(f"the run's {name}", no, f"run/{name}: --export: is the file of the run's {name} as well",
                     name=f"run/{name}")
      for name in ("votes.jsonl", "history.jsonl", "judge-token", "result.json", "lock", "config.yaml", "run.log")),
    Case("judge --export, its page: the run's report.html", lambda world: (judged(world), (*JUDGE, "run/report.x"))[1],
         ("run/report.html: the page of --export: is the file of the run's report.html as well",)),
    Case("judge --export: a part of the run", in_part, ("run/best/a.jsonl", "lies inside of run/best")),
    COMPARE_OUT.case("the page of one of the runs", no, "is the file of the page of other as well",
                     name="other/report.html"),
    COMPARE_OUT.case("the config of one of the runs", no, "exists, and is no page", name="run/config.yaml"),
    COMPARE_OUT.case("the history of one of the runs", no, "exists, and is no page", name="run/history.jsonl"),
    # Names inside of a model
    *(output.case(f"a model's {name}", no, "exists, and ", name=f"one/{name}")
      for output, name in (
          (SCORES_OUT, "config.json"), (SCORES_OUT, "model.safetensors"), (SAMPLES_OUT, "tokenizer.json"),
          (PLAN_OUT, "tokenizer_config.json"), (BENCH_OUT, "generation_config.json"), (REPORT_OUT, "model.safetensors"),
          (COMPARE_OUT, "config.json"), (PAIRS_OUT, "tokenizer.json"), (PAIRS_OUT, "model.safetensors"))),
    # Folders that are not there
    *(output.case("in a folder that is not there", no, "cannot be written", name=f"nowhere/{output.name}")
      for output in OUTPUTS if output not in (PAGE_OUT, INIT_OUT)),
    *(output.case("below a file", no, "(Not a directory)", name=f"tasks.jsonl/{output.name}")
      for output in (SCORES_OUT, BENCH_OUT, COMPARE_OUT, PAIRS_OUT)),
    # Uploads: no link is followed, and nothing goes up that cannot be read
    *(Case(f"publish: a link for {name}", linked(name), (f"run/{name}: is a link, which is not followed",), PUBLISH)
      for name in ("result.json", "best/recipe.yaml", f"{WINNER}/README.md", f"{WINNER}/config.json",
                   f"{WINNER}/model.safetensors", f"{WINNER}/tokenizer.json", f"{WINNER}/mergekit_config.yml")),
    *(Case(f"publish: {name} is no JSON", holding(name, content), (f"run/{name}: is no JSON",), PUBLISH)
      for name, content in (("result.json", "{"), (f"{WINNER}/config.json", "[" * 100_000),
                            (f"{WINNER}/tokenizer_config.json", "mine"))),
    Case("publish: a thesis in the winner's folder", holding(f"{WINNER}/thesis.tex", "mine"),
         ("warning: run/best/model/thesis.tex: evojax-merge did not write it, and it is not uploaded",), PUBLISH,
         status=0, seconds=60.0),
    # What this program wrote, and what is empty, is replaced
    own(SCORES_OUT, "earlier scores", "scores"),
    own(SAMPLES_OUT, "an empty file", ""),
    own(PLAN_OUT, "earlier plans", "plans"),
    own(REPORT_OUT, "an earlier report", "an inspection"),
    own(PNG_OUT, "an earlier picture", "a picture of an inspection"),
    own(COMPARE_OUT, "an earlier page", "a page of runs"),
    own(PAIRS_OUT, "earlier pairs", "pairs", "a.html", "run"),
    own(PAGE_OUT, "an earlier page of pairs", "a page of pairs", "a.jsonl", "run"),
    own(INIT_OUT, "an earlier first config", "a first config"),
    linked_own(SCORES_OUT, "scores"),
    linked_own(COMPARE_OUT, "a page of runs"),
]  # fmt: skip
