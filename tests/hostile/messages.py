"""Output on the terminal: names that would turn it over, files that no reader may open, texts of any length, and
advice that names the right key."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import MERGE, SEARCH, Case, World, changing, config, instead, recipe

# An override of the direction of writing, a space without a width, and a terminal's sequence.
TURNED, TURNED_SHOWN = "a\u202eb\u200bc", "a\\u202eb\\u200bc"
ESCAPE, ESCAPE_SHOWN = "a\x1b[31mb", "a\\x1b[31mb"
LINE, LINE_SHOWN = "a\u2028b", "a\\u2028b"
LONG = "x" * 1_000_000

EVALUATE = ("evaluate", "one", "--tasks", "config.yaml")
PLAN = ("plan", "config.yaml", "--target", "cpu")
EXPORT = ("export", "run", "out")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:
        # A socket's address is short.
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


@changing
def run_with(world: World, name: str, make: Callable[[Path], None]) -> None:
    """A finished run, of as many files as an export reads, and one that is no file."""
    for file in ("config.yaml", "history.jsonl", "best/recipe.yaml", "result.json"):
        world.write(f"run/{file}", "")
    world.write("run/config.yaml", config(inputs={}))
    world.write("run/history.jsonl", json.dumps({"generation": 1}) + "\n")
    world.write("run/result.json", json.dumps({"generations": 1}))
    models = [{"model": str(world / name), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    world.write("run/best/recipe.yaml", {"merge_method": "linear", "models": models})
    instead(f"run/{name}", make)(world)


def special(name: str, make: Callable[[Path], None], command: tuple[str, ...], folder: str = "one") -> Case:
    verb = " ".join(command[:1])
    return Case(
        f"{verb}: {name} is a {make.__name__}", instead(f"{folder}/{name}", make),
        (f"{folder}/{name}: is no regular file", f"a {make.__name__.removeprefix('unix_')}"), command,
    )  # fmt: skip


def with_recipe(**changes: Any) -> Callable[[World], Any]:
    return lambda world: world.write("recipe.yaml", recipe(**changes))


def with_config(**changes: Any) -> Callable[[World], Any]:
    return lambda world: world.write("config.yaml", config(**changes))


def with_task(**changes: Any) -> Callable[[World], Any]:
    return with_config(tasks=[config()["tasks"][0] | changes])


def called(*command: str) -> Callable[[World], tuple[str, ...]]:
    return lambda world: command


def models(one: dict[str, Any], two: dict[str, Any]) -> Callable[[World], Any]:
    """A recipe whose two models have these parameters."""
    rows = [{"model": "one", "parameters": one}, {"model": "two", "parameters": two}]
    return with_recipe(models=rows)


@changing
def with_model_config(world: World, /, command: tuple[str, ...] = SEARCH, **changes: Any) -> tuple[str, ...]:
    world.edit("one/config.json", **changes)
    return command


def aligned(world: World) -> tuple[str, ...]:
    """A merge that loads the tokenizer of a model whose config names a dtype that there is not."""
    world.edit("one/config.json", dtype="foo")
    world.write("recipe.yaml", recipe(tokenizer_source="union"))
    return MERGE


@changing
def renamed(world: World, name: str, command: tuple[str, ...]) -> tuple[str, ...]:
    """A model whose config is no JSON, in a folder of this name."""
    os.rename(world / "one", world / name)
    world.write(f"{name}/config.json", "{")
    parameters = {"weight": 0.5, "density": 0.5}
    rows = [{"model": model, "parameters": parameters} for model in (name, "two")]
    world.write("recipe.yaml", recipe(models=rows))
    world.write("config.yaml", config(parents=[name, "two"]))
    return command


@changing
def tensor_called(world: World, name: str) -> None:
    """A model with a tensor of this name that is not in the others."""
    from safetensors.numpy import load_file, save_file

    file = world / "one" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors["model.norm.weight"]}, file, {"format": "pt"})


CARELESS = """import warnings
import numpy as np


def score(records, log_probabilities):
    warnings.warn("careless", RuntimeWarning)
    np.float32(3e38) * np.float32(10)
    return [float("nan")] * len(records)
"""


def careless(world: World) -> None:
    """A function at which NumPy and Python warn, and of which no candidate gets a number."""
    world.write("own.py", CARELESS)
    task = {"name": "mine", "kind": "function", "function": "own.py:score", "inputs": "log_probabilities"}
    world.write("config.yaml", config(tasks=[task | {"file": "tasks.jsonl"}]))


CASES = [
    # Files that are none.
    special("config.json", pipe, MERGE),
    special("config.json", device, MERGE),
    special("config.json", unix_socket, SEARCH),
    special("tokenizer.json", pipe, EVALUATE),
    special("tokenizer.json", device, MERGE),
    special("chat_template.jinja", pipe, SEARCH),
    special("chat_template.jinja", device, EVALUATE),
    special("chat_templates/tool.jinja", pipe, EVALUATE),
    special("README.md", pipe, MERGE),
    special("README.md", pipe, SEARCH),
    special("README.md", device, MERGE),
    special("README.md", unix_socket, EVALUATE),
    special("preprocessor_config.json", device, MERGE, "base"),
    special("preprocessor_config.json", pipe, SEARCH),
    special("generation_config.json", pipe, PLAN, "base"),
    special("stray.safetensors", pipe, SEARCH),
    special("spiece.model", pipe, EVALUATE),
    special("quantize_config.json", device, MERGE),
    Case("config.json is a folder", instead("one/config.json", Path.mkdir), ("is no regular file but a folder",)),
    Case("the tasks are a device", lambda world: ("evaluate", "one", "--tasks", "/dev/zero"), ("is no regular file",)),
    Case("the recipe is a pipe", instead("recipe.yaml", pipe), ("recipe.yaml: is no regular file",), MERGE),
    Case("the config is a socket", instead("config.yaml", unix_socket), ("config.yaml: is no regular file",)),
    Case("the examples are a device", instead("tasks.jsonl", device), ("/dev/zero: is no regular file",)),
    Case(
        "export: the card of the winner is a pipe", run_with("best/model/README.md", pipe),
        ("README.md: is no regular file",), EXPORT,
    ),
    # An export needs the recipe alone, no history and no result.
    Case("export: the history is a pipe", run_with("history.jsonl", pipe), (), EXPORT, status=0, leaves=("out",)),
    Case("export: the result is a device", run_with("result.json", device), (), EXPORT, status=0, leaves=("out",)),
    Case("export: the recipe is a pipe", run_with("best/recipe.yaml", pipe), ("is no regular file",), EXPORT),
    # Names that would turn a terminal over.
    Case("a model's path turns, merged", renamed(TURNED, MERGE), (f"{TURNED_SHOWN}/config.json",)),
    Case("a model's path turns, searched", renamed(TURNED, SEARCH), (f"{TURNED_SHOWN}/config.json",)),
    Case("a model's path has a sequence", renamed(ESCAPE, MERGE), (f"{ESCAPE_SHOWN}/config.json",)),
    Case("a model's path has a line separator", renamed(LINE, MERGE), (f"{LINE_SHOWN}/config.json",)),
    Case("a tensor's name turns", tensor_called(TURNED), (TURNED_SHOWN,), MERGE, status=0, leaves=("out",)),
    Case("a tensor's name has a sequence", tensor_called(ESCAPE), (ESCAPE_SHOWN,), SEARCH),
    Case("a key of the config turns", with_config(**{TURNED: 1}), (f"{TURNED_SHOWN}: unknown key",)),
    Case("a key of the config has a line separator", with_config(**{LINE: 1}), (f"{LINE_SHOWN}: unknown key",)),
    Case("a task's name has a sequence", with_task(name=ESCAPE), ("tasks[0].name", ESCAPE_SHOWN)),
    Case("a task's file turns", with_task(file=TURNED), (TURNED_SHOWN,)),
    Case("a method's name turns", with_recipe(merge_method=TURNED), (TURNED_SHOWN,), MERGE),
    Case("a section of keys turns", called("keys", TURNED), (TURNED_SHOWN,)),
    Case("a section of keys has a sequence", called("keys", ESCAPE), (ESCAPE_SHOWN,)),
    Case("an option turns", called(*SEARCH, f"--{TURNED}"), (TURNED_SHOWN,)),
    Case("a command has a sequence", called(ESCAPE), (ESCAPE_SHOWN,)),
    Case("an override turns", called(*SEARCH, "--set", f"{TURNED}=1"), (TURNED_SHOWN,)),
    Case("a target turns", called(*PLAN[:-1], TURNED), (TURNED_SHOWN,)),
    Case("a dtype turns", with_model_config(dtype=TURNED), ("one/config.json: dtype", TURNED_SHOWN)),
    # Texts of a megabyte.
    Case("a long key", with_config(**{LONG: 1}), ("config.yaml: xxx", "[…]")),
    Case("a long name of a task", with_task(name=LONG), ("tasks[0].name",)),
    Case("a long path of a model", with_recipe(base_model=LONG), ("recipe.yaml: xxx", "[…]"), MERGE),
    Case("a long method", with_recipe(merge_method=LONG), ("merge_method: unknown method", "[…]"), MERGE),
    Case("a long tokenizer_source", with_recipe(tokenizer_source=LONG), ("tokenizer_source: xxx",), MERGE),
    Case("a long value of a model's config", with_model_config(hidden_size=LONG), ("one/config.json: hidden_size",)),
    Case("a long dtype of a model's config", with_model_config(dtype=LONG), ("one/config.json: dtype: unknown dtype",)),
    Case("a long section of keys", called("keys", LONG[:100_000]), ("keys: xxx", "[…]")),
    # Advice.
    Case("a dtype that there is not, searched", with_model_config(dtype="foo"), ("one/config.json: dtype: unknown",)),
    Case("a torch_dtype that there is not", with_model_config(EVALUATE, torch_dtype="foo"), ("torch_dtype: unknown",)),
    Case("a dtype that there is not, aligned", aligned, ("one/config.json: dtype: unknown dtype 'foo'",)),
    Case("a dtype that is nearly one", with_model_config(dtype="bfloat1"), ("did you mean 'bfloat16'",)),
    Case(
        "two slips: the second model's", models({"weight": 1, "weigth": 1}, {"wieght": 1}),
        ("missing for two", "(models[1].parameters.wieght: did you mean 'weight'?)"), MERGE,
    ),
    Case(
        "two slips: a tensor's name is no key",
        with_recipe(
            merge_method="slerp", base_model="one", wieght=1, parameters={"tt": 0.5},
            models=[{"model": "one"}, {"model": "two"}],
        ),
        ("t: missing",), MERGE,
    ),
    Case("nothing near: a key", with_config(foo=1), ("foo: unknown key (known: ",)),
    Case("nothing near: a short key", with_config(bar=1), ("bar: unknown key (known: ",)),
    Case("nothing near: a method", with_recipe(merge_method="hello"), ("unknown method 'hello' (known: ",), MERGE),
    Case("nothing near: a strategy", with_config(search={"strategy": "foo"}), ("unknown strategy 'foo' (known: ",)),
    Case("something near: a method", with_recipe(merge_method="lin"), ("(did you mean 'linear'?)",), MERGE),
    # Lines of libraries.
    Case("warnings of libraries come before no error", careless, ("error: generation 1: all 4 candidates failed",),
         status=1, leaves=("run",), seconds=60.0),
]  # fmt: skip
