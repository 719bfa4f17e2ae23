"""Hostile outputs: places where a model must not be written, above all over something that somebody else made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import MERGE, Case, World, changing, recipe

OVERWRITE = ("merge", "recipe.yaml", "out", "--overwrite")


def merged(world: World, name: str = "out") -> Path:
    """A model that this program wrote, as it writes it."""
    from evojax_merge.mergekit.execute import merge_to, prepare
    from evojax_merge.mergekit.streams import read_stream

    merge_to(prepare(read_stream(world / "recipe.yaml").result), world / name, card="card")
    return world / name


def model_with(change: Callable[[Path], Any]) -> Callable[[World], None]:
    """`out` is a model of ours in which somebody has changed something."""
    return lambda w: change(merged(w)) and None


def onto(place: str, *flags: str) -> Callable[[World], Any]:
    return lambda w: ("merge", "recipe.yaml", place, *flags)


def case(name: str, change: Callable[[World], Any], *says: str, command: tuple[str, ...] = OVERWRITE) -> Case:
    return Case(name, change, says, command)


def parent(name: str) -> Case:
    return case(f"the model {name}", onto(name, "--overwrite"), "which this command reads; choose another folder")


def ours(world: World) -> tuple[str, ...]:
    """A parent that is itself a merge of ours, to the byte."""
    merged(world, "first")
    world.write("recipe.yaml", recipe(base_model="first"))
    return ("merge", "recipe.yaml", "first", "--overwrite")


@changing
def linked(world: World, place: str, to: str) -> Any:
    (world / place).symlink_to(to)
    return ("merge", "recipe.yaml", place, "--overwrite")


def notes(world: World) -> None:
    world.write("out/paper.tex", "\\begin{document}")
    world.write("out/.git/HEAD", "ref: refs/heads/main")


def finished_run(world: World) -> None:
    """What a search leaves, as far as an export reads it."""
    world.write("run/config.yaml", {"inputs": {}, "parents": ["one", "two"]})
    world.write("run/history.jsonl", '{"generation": 0}\n')
    world.write("run/checkpoints/1/state", "state")
    models = [{"model": str(world / n), "parameters": {"weight": 1, "density": 1}} for n in ("one", "two")]
    world.write("run/best/recipe.yaml", recipe(base_model=str(world / "base"), models=models))
    merged(world, "run/best/model")


@changing
def of_run(world: World, *arguments: str) -> Any:
    finished_run(world)
    return arguments


def downloaded(world: World) -> None:
    """A model of ordinary names that is no source of the merge."""
    shutil.copytree(world / "one", world / "out")


def carded(world: World) -> None:
    """An output without a marker, and a file of the user's in it."""
    out = merged(world)
    (out / "evojax_merge.json").unlink()
    (out / "README.md").write_text("---\ntags:\n- merge\n- evojax-merge\n---\n")
    (out / "eval.log").write_text("mine")


def tuned(out: Path) -> None:
    """Other weights under the same name, of the same size."""
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)


def replaced_by_link(out: Path) -> None:
    (out / "README.md").rename(out.parent / "card.md")
    (out / "README.md").symlink_to("../card.md")


@changing
def marker(world: World, content: str) -> None:
    downloaded(world)
    world.write("out/evojax_merge.json", content)


def source_inside(world: World) -> None:
    shutil.move(world / "one", merged(world) / "one")
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("out/one", "two")]
    world.write("recipe.yaml", recipe(models=models))


def weights_linked_from(world: World) -> None:
    """A parent whose weights lie in the folder that would be replaced."""
    out = merged(world)
    (world / "one/model.safetensors").unlink()
    (world / "one/model.safetensors").symlink_to(out / "model.safetensors")


def recipe_inside(world: World) -> tuple[str, ...]:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("../one", "../two")]
    out = merged(world)
    world.write("out/README.md", recipe(base_model="../base", models=models))
    return ("merge", str(out / "README.md"), "out", "--overwrite")


def not_finite(world: World) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(world / "one/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, world / "one/model.safetensors", {"format": "pt"})


@changing
def failing(world: World, place: str, prepared: Callable[[World], Any] = lambda w: None) -> Any:
    """A merge that is stopped in the middle."""
    prepared(world)
    not_finite(world)
    return ("merge", "recipe.yaml", place, "--overwrite")


CASES: list[Case] = [
    *map(parent, ("one", "two", "base", "two/../one", "./one/", "one/.")),
    case("a parent that is a merge of ours", ours, "first, which this command reads"),
    case("a link to a parent", linked("link", "one"), "which this command reads"),
    case("a link that leads nowhere", linked("link", "gone"), "link", "leads nowhere"),
    case("a link that leads to itself", linked("link", "link"), "link", "leads nowhere"),
    case("a link to notes", lambda w: (notes(w), linked("link", "out")(w))[1], "holds '.git'"),
    case("a new folder inside of a parent", onto("one/merged"), "lies inside of", "one"),
    case("a new folder deep inside of a parent", onto("base/a/b/c"), "lies inside of", "base"),
    case("the working directory", onto(".", "--overwrite"), "which this command reads"),
    case("the folder above", onto("..", "--overwrite"), "which this command reads"),
    case("the root", onto("/", "--overwrite"), "which this command reads"),
    case("nothing", onto("", "--overwrite"), "which this command reads"),
    case("the folder above, by its name", lambda w: ("merge", "recipe.yaml", str(w.root.parent), "--overwrite"),
         "which this command reads"),
    case("notes and a repository", notes, "out: holds '.git', which evojax-merge did not write"),
    case("a model from elsewhere", downloaded, "holds 'config.json', which evojax-merge did not write"),
    case("a file beside our model's", model_with(lambda out: (out / "notes.txt").write_text("mine")), "'notes.txt'"),
    case("a repository in our model", model_with(lambda out: (out / ".git").mkdir()), "holds '.git'"),
    case("an empty folder in our model", model_with(lambda out: (out / "runs").mkdir()), "holds 'runs'"),
    case("a checkpoint in our model", model_with(lambda out: (out / "optimizer.pt").touch()), "'optimizer.pt'"),
    case("our model with a card of the user's", model_with(lambda out: (out / "README.md").write_text("mine")),
         "holds 'README.md', which was changed after evojax-merge wrote it"),
    case("our model, trained further", model_with(tuned), "holds 'model.safetensors', which was changed"),
    case("our model with a link in it", model_with(replaced_by_link), "holds 'README.md'"),
    case("our model, write-protected", model_with(lambda out: out.chmod(0o555)), "write-protected"),
    case("our model, its weights write-protected", model_with(
        lambda out: (out / "model.safetensors").chmod(0o444)), "holds 'model.safetensors', which is write-protected"),
    case("an output without a marker, with a file of the user's", carded, "holds 'eval.log'"),
    case("a marker that is a list", marker("[]"), "holds 'config.json'"),
    case("a marker that lists nothing", marker('{"files": {}}'), "holds 'config.json'"),
    case("a marker that lists a number", marker('{"files": 3}'), "holds 'config.json'"),
    case("a marker of another model", marker(json.dumps({"files": {"config.json": "0"}})), "'config.json', which was"),
    case("a marker that is nested for ever", marker('{"files": ' + "[" * 100_000), "holds 'config.json'"),
    case("a folder that a source lies in", source_inside, "holds", "out/one, which this command reads"),
    case("a folder that a source's weights lie in", weights_linked_from, "holds", "model.safetensors, which this"),
    case("a folder that the recipe lies in", recipe_inside, "README.md, which this command reads"),
    case("a file", onto("tasks.jsonl", "--overwrite"), "tasks.jsonl: is a file"),
    case("a place below a file", onto("tasks.jsonl/out"), "tasks.jsonl/out", "tasks.jsonl is a file"),
    case("a place that cannot be written", onto("/proc/out"), "/proc/out: "),
    case("a name of 300 characters", onto("o" * 300), "cannot be written (File name too long)"),
    case("a name with an escape sequence", onto("tasks.jsonl/\x1b[2J\n"), "tasks.jsonl/\\x1b[2J\\n: cannot be written"),
    case("a folder that is there, unasked", lambda w: (w / "out").mkdir() or MERGE, "out", "--overwrite"),
    case("notes that are there, unasked", lambda w: notes(w) or MERGE, "out: holds '.git'"),
    case("a parent, unasked", onto("one"), "which this command reads; choose another folder"),
    case("an export over its run, unasked", of_run("export", "run", "run"), "run: holds run/best, which this command"),
    case("a merge that fails, to a new place", failing("new/deep/out"), "model.norm.weight"),
    case("a merge that fails, over another", failing("out", merged), "model.norm.weight"),
    case("a merge over a run", of_run("merge", "recipe.yaml", "run", "--overwrite"), "run: is a run of a search"),
    case("a merge over a winner", of_run("merge", "recipe.yaml", "run/best/model", "--overwrite"), "run/best"),
    case("a merge into a run's checkpoints", of_run("merge", "recipe.yaml", "run/checkpoints/2"), "run/checkpoints"),
    case("an export over its run", of_run("export", "run", "run", "--overwrite"), "run: holds run/best"),
    case("an export over the winner", of_run("export", "run", "run/best/model", "--overwrite"), "lies inside of"),
    case("an export over a parent", of_run("export", "run", "one", "--overwrite"), "one, which this command reads"),
    case("an export over the working directory", of_run("export", "run", ".", "--overwrite"), "holds"),
    case("an export over notes", lambda w: (notes(w), of_run("export", "run", "out", "--overwrite")(w))[1], "'.git'"),
]  # fmt: skip
