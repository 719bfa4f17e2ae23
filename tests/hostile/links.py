"""Links, pipes, sockets and files of a user's own wherever a command writes: what this program did not write stays."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import SEARCH, Case, World, changing, link, run_command
from hostile.outputs import merged
from hostile.runs import EXPORT, OVERWRITE, RESUME, put_run

PARTS = ("best", "checkpoints", "winners", "stages")
# What a search may change in a run folder, and in the folder `disk` where parts of it are.
OWN = (
    "config.yaml", "history.jsonl", "history.backup.jsonl", "timing.jsonl", "result.json", "report.html",
    "environment.json", "heldout_answers.jsonl", "run.log",
    "best/recipe.yaml", "best/model", *(f"checkpoints/{step}" for step in range(1, 6)), "winners/003",
    "stages/stage-1",
)  # fmt: skip
SEARCHED = tuple(f"{place}/{name}" for place in ("run", "disk") for name in OWN)
LONGER = (*RESUME, "--set", "search.generations=4")
MERGE_OVER = ("merge", "recipe.yaml", "out", "--overwrite")
EVALUATE = ("evaluate", "one", "--tasks", "tasks.yaml")
PLAN = ("plan", "config.yaml", "--json", "plans.json")
NOT_OURS = "which evojax-merge did not write"


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def bind(path: Path) -> None:
    """A socket. Its name may have 100 bytes: it is made from within its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


def thesis(folder: Path) -> None:
    """A user's folder: files under names like those of a run's parts, of orbax, and of half-written files."""
    for name in (
        "thesis/chapter.tex", "2024/data.csv", "9.orbax-checkpoint-tmp/chapter.tex", "old.orbax-checkpoint-tmp-1/a",
        "checkpoints/1/state", "007/kept", "stage-x/config.yaml", ".config.yaml.4711", ".best/a", "1.txt", "kept/3/a",
    ):  # fmt: skip
        write(folder / name)


def on_disk(run: Path, *parts: str) -> None:
    """Parts of a run lie on another disk, beside a thesis."""
    for part in parts:
        place = run.parent / "disk" / part
        place.parent.mkdir(exist_ok=True)
        if (run / part).exists():
            (run / part).rename(place)
        place.mkdir(exist_ok=True)
        thesis(place)
        (run / part).symlink_to(f"../disk/{part}")


@changing
def a_run(world: World, *changes: Callable[[Path], Any]) -> None:
    """A finished run of three generations, changed."""
    run = put_run(world)
    for change in changes:
        change(run)


def linked(*parts: str) -> Callable[[Path], None]:
    return lambda run: on_disk(run, *parts)


def at(name: str, make: Callable[[Path], Any] = write) -> Callable[[Path], Any]:
    return lambda run: make(run / name)


@changing
def without(run: Path, name: str, then: Callable[[Path], Any]) -> None:
    """Something else in the place of a file or folder of the run."""
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    then(path)


@changing
def moved(run: Path, name: str) -> None:
    """A link in the place of a file or folder of the run, to where that is now."""
    (run / name).rename(run.parent / "elsewhere")
    (run / name).symlink_to(run.parent / "elsewhere")


def whole_run_linked(run: Path) -> None:
    run.rename(run.parent / "disk")
    thesis(run.parent / "disk/mine")
    run.symlink_to("disk")


def unfinished(run: Path) -> None:
    """Killed before it had chosen its winner."""
    (run / "result.json").unlink()


@changing
def into_another_run(world: World, part: str) -> None:
    run, _ = put_run(world), put_run(world, "other")
    without(part, link(f"../other/{part}"))(run)


@changing
def into_a_stage(world: World, name: str, to: str) -> None:
    """A run with a stage that no search of its config has, and a link in it."""
    run, other = put_run(world), put_run(world, "other")
    if "/checkpoints" in name:
        (run / "stages").mkdir(exist_ok=True)
        shutil.copytree(other, run / "stages/stage-1")
        shutil.rmtree(run / name)
    link(to)(run / name)


def to_thesis(path: Path) -> None:
    """A link to a file beside the run."""
    path.symlink_to(next(folder for folder in path.parents if folder.name == "run").with_name("thesis"))


CHAIN: dict[str, Any] = {
    "stages": [
        {
            "space": {"method": "linear", "parameters": {"weight": {}}},
            "search": {"generations": 1, "population": 4},
        },
        {
            "data_flow": {"moves": 1, "window": 1},
            "search": {"strategy": "path_ga", "generations": 1, "population": 4},
        },
    ]
}


@changing
def a_chain(world: World, *changes: Callable[[Path], Any]) -> None:
    """A finished run of two stages, changed."""
    world.edit("config.yaml", space=..., search=..., **CHAIN)
    run_command(*SEARCH, folder=world.root)
    for change in changes:
        change(world / "run")


def tasks(world: World) -> None:
    world.write("tasks.yaml", {"tasks": [{"name": "text", "kind": "likelihood", "file": "tasks.jsonl"}]})


@changing
def evaluated(
    world: World, *changes: Callable[[Path], Any], option: str = "--json", name: str = "scores.json"
) -> tuple[str, ...]:
    """Scores, or samples, that are written to a changed place."""
    tasks(world)
    for change in changes:
        change(world.root)
    return (*EVALUATE, option, name)


@changing
def planned(world: World, *changes: Callable[[Path], Any]) -> None:
    for change in changes:
        change(world.root)


@changing
def merged_with(world: World, *changes: Callable[[Path], Any]) -> None:
    """`out` is a model of ours; changed is the world."""
    merged(world)
    for change in changes:
        change(world.root)


def refused(name: str, change: Callable[[World], Any], command: tuple[str, ...], *says: str, **more: Any) -> Case:
    return Case(name, change, says, command, **more)


def done(name: str, change: Callable[[World], Any], command: tuple[str, ...], *says: str, **more: Any) -> Case:
    """A command that ends well and changes nothing but its own."""
    more = {"leaves": ("run/winners", "disk/winners"), "rewrites": SEARCHED, "seconds": 60.0} | more
    return Case(name, change, says, command, status=0, **more)


def overwrites(name: str, change: Callable[[World], Any], *says: str) -> Case:
    return refused(f"started again: {name}", change, OVERWRITE, *says)


def goes_on(name: str, change: Callable[[World], Any], *says: str) -> Case:
    return refused(f"with more generations: {name}", change, LONGER, *says)


def writes(name: str, change: Callable[[World], Any], *says: str, command: tuple[str, ...] = ()) -> Case:
    return refused(f"evaluate and plan: {name}", change, command, *says)


CASES: list[Case] = [
    # Parts of a run on another disk
    done("complete, checkpoints on another disk", a_run(linked("checkpoints")), RESUME, rewrites=()),
    done("complete, all parts on another disk", a_run(linked(*PARTS)), RESUME, rewrites=()),
    done("complete, the whole run on another disk", a_run(whole_run_linked), RESUME, rewrites=()),
    done("resumed, checkpoints on another disk", a_run(linked("checkpoints")), LONGER),
    done("resumed, all parts on another disk", a_run(linked(*PARTS)), LONGER),
    done("resumed without its winner, all parts on another disk", a_run(linked(*PARTS), unfinished), RESUME),
    done("resumed, the whole run on another disk", a_run(whole_run_linked), LONGER),
    done("started again, checkpoints on another disk", a_run(linked("checkpoints")), OVERWRITE),
    done("started again, all parts on another disk", a_run(linked(*PARTS)), OVERWRITE),
    done("started again, the whole run on another disk", a_run(whole_run_linked), OVERWRITE),
    done(
        "begun in empty folders on another disk",
        lambda w: [((w / f"disk/{part}").mkdir(parents=True), link(f"../disk/{part}")(w / f"run/{part}"))
                   for part in PARTS],
        SEARCH,
    ),
    done("a chain started again, its stages on another disk", a_chain(linked("stages")), OVERWRITE, rewrites=(
        *SEARCHED, "run/best", "run/checkpoints")),
    refused(
        "checkpoints on another disk, of which none is left", a_run(linked("checkpoints"), lambda run: [
            shutil.rmtree(run / f"checkpoints/{step}") for step in (1, 2, 3)]),
        RESUME, "has a history but no checkpoint",
    ),
    refused(
        "checkpoints on a disk that is not there", a_run(without("checkpoints", link("../nowhere"))), RESUME,
        "run: cannot be written", "checkpoints is a link that leads nowhere",
    ),
    overwrites("best on a disk that is not there", a_run(without("best", link("/nowhere"))), "best is a link that"),
    refused("begun in a folder on another disk that holds a thesis", lambda w: [
        thesis(w / "disk"), link("../disk")(w / "run/checkpoints")], OVERWRITE, "not a run folder"),
    refused("checkpoints of another run", into_another_run("checkpoints"), RESUME, "leads into another run"),
    overwrites("checkpoints of another run", into_another_run("checkpoints"), "leads into another run"),
    overwrites("best of another run", into_another_run("best"), "leads into another run"),
    overwrites(
        "one folder for two parts", a_run(linked("best"), without("checkpoints", link("../disk/best"))),
        "leads to the same folder",
    ),
    overwrites(
        "checkpoints in a parent", a_run(without("checkpoints", link("../one"))), "run/checkpoints", "one, which this",
    ),
    # Files of a user's own
    done("beside the checkpoints", a_run(lambda run: thesis(run / "checkpoints")), LONGER),
    done("beside the winner", a_run(lambda run: thesis(run / "best")), LONGER),
    done("under the names of a kept winner", a_run(at("best/result.json"), at("best/report.html")), LONGER),
    done("a winner's result of the user's, in a complete run", a_run(at("best/result.json")), RESUME, rewrites=()),
    done(
        "everywhere, started again", a_run(*(lambda run, part=part: thesis(run / part) for part in PARTS)), OVERWRITE,
        "run/best", "run/checkpoints", "stays",
    ),
    done("pipes and sockets beside a run's own", a_run(
        *(at(f"{part}/{name}", make) for part in PARTS for name, make in (("pipe", pipe), ("socket", bind)))), LONGER),
    done("a link with a checkpoint's name", a_run(at("checkpoints/9", link("../../one"))), LONGER),
    goes_on("notes in the model", a_run(at("best/model/notes.txt")), "best/model", "'notes.txt'", NOT_OURS),
    goes_on("a folder in the model", a_run(at("best/model/eval/scores.json")), "'eval'", NOT_OURS),
    goes_on("a pipe in the model", a_run(at("best/model/pipe", pipe)), "'pipe'", NOT_OURS),
    goes_on("a model trained further", a_run(at("best/model/config.json")), "'config.json'", "was changed"),
    goes_on("a model of the user's", a_run(without("best/model", lambda path: write(path / "a.bin"))), NOT_OURS),
    goes_on("an empty folder with a checkpoint's name", a_run(at("checkpoints/4", Path.mkdir)), "holds '4'", NOT_OURS),
    goes_on("a user's next checkpoint", a_run(at("checkpoints/4/data.csv")), "holds '4'", NOT_OURS),
    goes_on("a file with a checkpoint's name", a_run(at("checkpoints/4")), "holds '4'", NOT_OURS),
    goes_on("a pipe for a history", a_run(without("history.jsonl", pipe)), "history.jsonl", "no regular file"),
    goes_on("a socket for a result", a_run(without("result.json", bind)), "result.json", "no regular file"),
    *(
        goes_on(f"a link to a thesis for {name}", a_run(at("../thesis"), without(name, to_thesis)),
                f"run/{name}: is a link")
        for name in ("environment.json", "timing.jsonl", "history.backup.jsonl", "heldout_answers.jsonl", "result.json",
                     "controls.safetensors", "best/recipe.yaml")
    ),
    goes_on("a link to another model for the winner", a_run(moved("best/model")), "best/model: is a link"),
    goes_on("a link to a folder for a front", a_run(at("best/front", link("../../one"))), "front: is a link"),
    goes_on("a link to another run for a stage", into_a_stage("stages/stage-1", "../../other"), "stage-1: is a link"),
    goes_on("checkpoints of another run in a stage",
            into_a_stage("stages/stage-1/checkpoints", "../../../other/checkpoints"), "leads into another run"),
    goes_on("the run's own checkpoints in a stage", into_a_stage("stages/stage-1/checkpoints", "../../checkpoints"),
            "leads to the same folder"),
    goes_on("stages that are the run", a_run(at("stages/stage-1", link("..")), at("stages/stage-2", link(".."))),
            "stage-1: is a link"),
    goes_on("a pipe for a page", a_run(without("report.html", pipe)), "report.html", "no regular file"),
    goes_on("a link to nowhere for a result", a_run(without("result.json", link("nowhere"))), "leads nowhere"),
    overwrites("a pipe for a recipe", a_run(without("best/recipe.yaml", pipe)), "recipe.yaml", "no regular file"),
    overwrites("a user's folder with a checkpoint's name", a_run(
        without("checkpoints/2", lambda path: write(path / "data.csv"))), "holds '2'", NOT_OURS),
    overwrites("notes in the model", a_run(at("best/model/notes.txt")), "'notes.txt'", NOT_OURS),
    overwrites("notes in a checkpoint", a_run(at("checkpoints/2/notes.txt")), "'2/notes.txt'", NOT_OURS),
    overwrites("notes in a front", a_run(at("best/front/notes.txt")), "best/front", "'notes.txt'", NOT_OURS),
    overwrites(
        "notes in a kept winner", a_run(at("winners/002/recipe.yaml"), at("winners/002/notes.txt")), "winners/002",
        "'notes.txt'", NOT_OURS,
    ),
    overwrites("a result on another disk", a_run(moved("result.json")), "run/result.json: is a link"),
    overwrites("a model on another disk", a_run(moved("best/model")), "best/model: is a link"),
    refused("a pipe for the lock", a_run(at("lock", pipe)), RESUME, "run/lock", "move it"),
    refused("a socket for the lock", a_run(at("lock", bind)), OVERWRITE, "run: cannot be written"),
    refused("started again: notes in a stage", a_chain(at("stages/stage-1/notes.txt")), OVERWRITE, "'notes.txt'"),
    # Models
    refused("a merge over a pipe", lambda w: pipe(w / "out"), MERGE_OVER, "out: is a file"),
    refused("a merge over a socket", lambda w: bind(w / "out"), MERGE_OVER, "out: is a file"),
    refused("a merge over a model with a pipe", merged_with(at("out/pipe", pipe)), MERGE_OVER, "'pipe'"),
    refused("a merge over a model with a socket", merged_with(at("out/socket", bind)), MERGE_OVER, "'socket'"),
    done("a merge beside half-written names of the user's", merged_with(
        at(".out.evojax-merge-new.01234567"), at(".out.evojax-merge-old.0123456z", link("one")),
        at(".out.evojax-merge-old.mine/a"), at(".out.evojax-merge-new.0123456p", pipe)),
        MERGE_OVER, rewrites=("out",)),
    refused("a merge into a run's checkpoints on another disk", a_run(linked("checkpoints")),
            ("merge", "recipe.yaml", "run/checkpoints/8"), "lies inside of", "run/checkpoints"),
    refused("a merge over a winner on another disk", a_run(linked("best")),
            ("merge", "recipe.yaml", "run/best/model", "--overwrite"), "run/best"),
    refused("an export over a winner on another disk", a_run(linked("best")),
            ("export", "run", "disk/best/model", "--overwrite"), "lies inside of"),
    refused("an export over a pipe", a_run(lambda run: pipe(run.parent / "out")), (*EXPORT, "--overwrite"), "a file"),
    done("an export over a link", a_run(lambda run: ((run.parent / "disk").mkdir(), link("disk")(run.parent / "out"))),
         (*EXPORT, "--overwrite"), rewrites=("disk",)),
    # Tables
    done("scores to a link", evaluated(at("real.json", Path.touch), at("scores.json", link("real.json"))), (),
         rewrites=("real.json",)),
    done("samples to a link of a link", evaluated(
        at("real.jsonl", Path.touch), at("two.link", link("real.jsonl")), at("samples.jsonl", link("two.link")),
        option="--samples", name="samples.jsonl"), (), rewrites=("real.jsonl",)),
    done("plans to a link", planned(at("real.json", Path.touch), at("plans.json", link("real.json"))), PLAN,
         rewrites=("real.json",)),
    writes("a pipe", evaluated(at("scores.json", pipe)), "scores.json: --json: is no regular file"),
    writes("a link to a pipe", evaluated(at("pipe", pipe), at("scores.json", link("pipe"))), "is no regular file"),
    writes("a socket", evaluated(at("scores.json", bind), option="--samples"), "--samples: is no regular file"),
    writes("standard output", evaluated(name="/dev/stdout"), "/dev/stdout: --json: is no regular file"),
    writes("a link to standard output", evaluated(at("scores.json", link("/dev/stdout"))), "is no regular file"),
    writes("a number of an open file", evaluated(name="/dev/fd/1", option="--samples"), "is no regular file"),
    writes("a device", evaluated(name="/dev/null"), "/dev/null: --json: is no regular file"),
    writes("a link to nowhere", evaluated(at("scores.json", link("nowhere"))), "is a link that leads nowhere"),
    writes("a link to itself", evaluated(at("scores.json", link("scores.json"))), "scores.json: --json"),
    writes("a link to a table of the user's", evaluated(
        at("real.json"), at("scores.json", link("real.json"))), "holds no scores"),
    writes("a pipe for plans", planned(at("plans.json", pipe)), "plans.json: --json: is no regular", command=PLAN),
    writes("a link to a folder", planned(at("disk/a"), at("plans.json", link("disk"))), "is a folder", command=PLAN),
    writes("standard error for plans", planned(), "is no regular file",
           command=("plan", "config.yaml", "--json", "/dev/stderr")),
]  # fmt: skip
