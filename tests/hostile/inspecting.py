"""Wrong input of `inspect` and `init`: models that cannot be opened, data of no kind of task, and files that are not
theirs to write."""

import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from hostile import Case, World, changing, instead

INSPECT = ("inspect", "base", "one", "two")
INIT = ("init", "mine.yaml", "--base", "base", "--parents", "one", "two", "--data", "tasks.jsonl")


def nothing(world: World) -> None:
    """The input is as it was; the command is wrong."""


def inspecting(name: str, change: Callable[[World], Any], *says: str, command: tuple[str, ...] = INSPECT) -> Case:
    return Case(f"inspect: {name}", change, says, command)


def writing(name: str, change: Callable[[World], Any], *says: str, command: tuple[str, ...] = INIT) -> Case:
    return Case(f"init: {name}", change, says, command)


@changing
def without(world: World, *files: str) -> None:
    for file in files:
        (world / file).unlink()


def written(name: str, content: str | bytes) -> Callable[[World], None]:
    return lambda world: world.write(name, content) and None


def edited(name: str, **changes: Any) -> Callable[[World], None]:
    return lambda world: world.edit(name, **changes)


def data(*lines: Any) -> Callable[[World], None]:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return written("tasks.jsonl", text)


def truncated(world: World) -> None:
    file = world / "one/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(world: World) -> None:
    (world / "one/model.safetensors").unlink()
    world.write("one/pytorch_model.bin", b"\x80\x04.")


def deeper(world: World) -> None:
    """`one` has a layer less than its config says, and than the others have."""
    file = world / "one/model.safetensors"
    tensors = {name: values for name, values in load_file(file).items() if ".layers.2." not in name}
    save_file(tensors, file, {"format": "pt"})
    world.edit("one/config.json", num_hidden_layers=2)


def strange_tensors(world: World) -> None:
    """Tensors without entries, a number without an axis, and numbers that float32 does not hold."""
    for name in ("one", "two"):
        file = world / name / "model.safetensors"
        more = {
            "empty": np.zeros((0, 5), np.float32), "flat": np.zeros((5, 0), np.float32),
            "number": np.array(1.0, np.float32), "large": np.full((40, 40), 1e300), "zero": np.zeros((40, 40)),
            "counts": np.arange(3),
        }  # fmt: skip
        save_file(load_file(file) | more, file, {"format": "pt"})


def linked_nowhere(world: World) -> None:
    (world / "mine.yaml").symlink_to("nowhere")


def folder(name: str) -> Callable[[World], None]:
    return lambda world: (world / name).mkdir()


def same(world: World) -> None:
    shutil.rmtree(world / "two")
    (world / "two").symlink_to("one")


def third_parent(world: World) -> None:
    shutil.copytree(world / "two", world / "three")


def other_architecture(world: World) -> None:
    world.edit("one/config.json", model_type="qwen2")


def escaped(world: World) -> tuple[str, ...]:
    return ("inspect", "base", "a\x1b[31mb\u202e")


def init_with(*arguments: str) -> tuple[str, ...]:
    return ("init", "mine.yaml", *arguments)


ROWS = [{"prompt": "w5 w6", "target": "w7"}] * 5

CASES = [
    # Models.
    inspecting("no such model", nothing, "nowhere: no such folder", command=("inspect", "base", "nowhere")),
    inspecting("no model at all", nothing, "Missing argument", command=("inspect",)),
    inspecting("a name that turns a terminal over", escaped, "\\x1b[31m", "\\u202e"),
    inspecting("an empty name, which is the working folder", nothing, "holds no model.safetensors",
               command=("inspect", "base", "")),
    inspecting("no such base", nothing, "--base: nowhere: no such folder", command=(*INSPECT, "--base", "nowhere")),
    inspecting("a folder without weights", without("one/model.safetensors"), "holds no model.safetensors"),
    inspecting("pickled weights", pickled, "holds pickle files only"),
    inspecting("truncated weights", truncated, "one/model.safetensors: truncated"),
    inspecting("weights that are text", written("one/model.safetensors", "weights"), "one/model.safetensors"),
    inspecting("weights that are a pipe", instead("one/model.safetensors", os.mkfifo), "is no regular file but a pipe"),
    inspecting("a config that is no JSON", written("one/config.json", "{"), "one/config.json: not valid JSON"),
    inspecting("a config that is a list", written("one/config.json", "[]"), "expected a JSON object"),
    inspecting("a tokenizer that is text", written("one/tokenizer.json", "tokens"), "its tokenizer cannot be loaded"),
    inspecting("a tokenizer that is a pipe", instead("one/tokenizer.json", os.mkfifo), "is no regular file but a pipe"),
    inspecting("a model given twice", nothing, "is given twice", command=("inspect", "base", "one", "one")),
    inspecting("a model under two names", same, "two: is given twice"),
    inspecting("a GGUF file that is text", written("a.gguf", "GGUF"), "a.gguf", command=("inspect", "base", "a.gguf")),
    inspecting("an adapter of nothing", written("lora/adapter_config.json", "{}"), "lora/adapter_config.json",
               command=("inspect", "base", "lora")),
    inspecting("no such model of the zoo", nothing, "did you mean 'zoo:maths'?", command=("inspect", "zoo:math")),
    inspecting("a hub id without a network", nothing, "the hub did not give it", command=("inspect", "owner/name")),
    # Files of a report.
    inspecting("a picture of an unknown kind", nothing, "expected a name that ends in .png or .svg",
               command=(*INSPECT, "--picture", "a.bmp")),
    inspecting("a picture in place of other work", written("a.png", "notes"), "a.png: --picture: exists",
               command=(*INSPECT, "--picture", "a.png")),
    inspecting("a picture in a folder that is not there", nothing, "--picture: cannot be written",
               command=(*INSPECT, "--picture", "plots/a.png")),
    inspecting("one file for picture and JSON", nothing, "is the file of --json as well",
               command=(*INSPECT, "--picture", "a.png", "--json", "./a.png")),
    inspecting("JSON in place of a model's config", nothing, "one/config.json: --json: exists",
               command=(*INSPECT, "--json", "one/config.json")),
    inspecting("JSON in place of a folder", nothing, "is a folder", command=(*INSPECT, "--json", "one")),
    # What an inspection describes, and does not refuse.
    Case("inspect: another architecture", other_architecture, (), INSPECT, 0),
    Case("inspect: a layer less", deeper, (), INSPECT, 0),
    Case("inspect: strange tensors", strange_tensors, (), (*INSPECT, "--json", "out.json"), 0, ("out.json",)),
    Case("inspect: model_type is a list", edited("one/config.json", model_type=["llama"]), (), INSPECT, 0),
    Case("inspect: no config", without("one/config.json"), (), INSPECT, 0),
    Case("inspect: vocab_size is a text", edited("one/config.json", vocab_size="many"), (), INSPECT, 0),
    Case("inspect: a template that is no text", written("one/chat_template.jinja", b"\xff\xfe"), (), INSPECT, 0),
    Case("inspect: a template that is a number", edited("one/tokenizer_config.json", chat_template=7), (), INSPECT, 0),
    # A first config: models and methods.
    writing("no such model", nothing, "--parents: nowhere: no such folder",
            command=init_with("--base", "base", "--parents", "one", "nowhere", "--data", "tasks.jsonl")),
    writing("no such base", nothing, "--base: nowhere: no such folder",
            command=init_with("--base", "nowhere", "--parents", "one", "--data", "tasks.jsonl")),
    writing("no parents", nothing, "--parents: missing", command=init_with("--data", "tasks.jsonl", "--parents")),
    writing("no data", nothing, "--data or --lm-eval: missing", command=INIT[:-2]),
    writing("two sources of data", nothing, "--hub: cannot go with --data", command=(*INIT, "--hub", "owner/name")),
    writing("no such method", nothing, "did you mean 'dare_ties'?", command=(*INIT, "--method", "dare-ties")),
    writing("a method without parameters", nothing, "karcher has no parameter", command=(*INIT, "--method", "karcher")),
    writing("a method of two parents", third_parent, "slerp", command=init_with(
        "--base", "base", "--parents", "one", "two", "three", "--data", "tasks.jsonl", "--method", "slerp")),
    writing("a method that needs a base", nothing, "--base: missing", command=init_with(
        "--parents", "one", "two", "--data", "tasks.jsonl", "--method", "ties")),
    writing("the base is a parent", nothing, "one: is given twice", command=init_with(
        "--base", "one", "--parents", "one", "two", "--data", "tasks.jsonl")),
    writing("two architectures", other_architecture, "expected one architecture"),
    writing("two depths", deeper, "one"),
    writing("a folder without weights", without("one/model.safetensors"), "holds no model.safetensors"),
    writing("no tokenizer", without("base/tokenizer.json", "base/tokenizer_config.json"), "torch (no tokenizer)"),
    writing("generations below 1", nothing, "--budget-generations", command=(*INIT, "--budget-generations", "0")),
    # Data.
    writing("no such data", nothing, "--data: nowhere.jsonl: no such file", command=(*INIT[:-1], "nowhere.jsonl")),
    writing("data that are a model", nothing, "is no regular file but a folder", command=(*INIT[:-1], "one")),
    writing("data that are weights", nothing, "one/model.safetensors",
            command=(*INIT[:-1], "one/model.safetensors")),
    writing("data that are a pipe", instead("tasks.jsonl", os.mkfifo), "is no regular file but a pipe"),
    writing("no records", data(), "holds no example"),
    writing("one record", data(ROWS[0]), "holds one example"),
    writing("a record that is no JSON", data("{"), "tasks.jsonl:1: not valid JSON"),
    writing("a later record that is no JSON", data(*ROWS, "{"), "tasks.jsonl:6: not valid JSON"),
    writing("a record that is a list", data([1]), "expected a JSON object"),
    writing("a record without fields", data({}, {}), "its fields (none) say no kind of task"),
    writing("fields of no task", data({"a": 1, "b": 2}), "tasks.jsonl:1: its fields (a, b)", "question and answer"),
    writing("fields of a thousand names", data({f"f{n}\x1b": n for n in range(1000)}), "say no kind of task"),
    writing("a later record of other fields", data(*ROWS, {"text": "w5"}), "tasks.jsonl:6", "no field 'prompt'"),
    writing("choices without an answer", data({"question": "w5", "choices": ["w6", "w7"]}), "but no answer"),
    writing("choices without a question", data({"choices": ["w6", "w7"], "answer": 0}), "but no question"),
    writing("an answer that is no choice", data(*[{"question": "w5", "choices": ["w6", "w7"], "answer": 9}] * 2),
            "answer: 9; expected an index"),
    writing("a conversation without an answer", data({"messages": [{"role": "user", "content": "w5"}]}),
            "its fields (messages) say no kind of task"),
    writing("a conversation of numbers", data({"messages": [1, 2]}), "messages[0]: 1; expected a list of turns"),
    writing("a conversation whose turns have no text",
            data(*[{"messages": [{"role": "user"}, {"role": "assistant"}]}] * 2), "messages[0]: {'role': 'user'}; exp"),
    writing("a text that is a list", data({"text": ["w5"]}, {"text": ["w6"]}), "expected a text or a number"),
    writing("parquet that is text", written("a.parquet", "PAR1"), "cannot be read as parquet",
            command=(*INIT[:-1], "a.parquet")),
    writing("a data set without a network", nothing, "hub:owner/name", command=(*INIT[:-2], "--hub", "owner/name")),
    writing("a data set of no name", nothing, "expected hub:owner/dataset", command=(*INIT[:-2], "--hub", "name")),
    # The file.
    writing("a file that is there", written("mine.yaml", "mine: true"), "mine.yaml: exists already"),
    writing("a link that leads nowhere", linked_nowhere, "mine.yaml: exists already"),
    writing("a folder of its name", folder("mine.yaml"), "is a folder", command=(*INIT, "--overwrite")),
    writing("a name of another kind", nothing, "expected a name that ends in .yaml", command=(
        "init", "tasks.jsonl", *INIT[2:], "--overwrite")),
    writing("a folder that is not there", nothing, "cannot be written", command=("init", "no/mine.yaml", *INIT[2:])),
]  # fmt: skip
