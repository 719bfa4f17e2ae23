"""Records whose images cannot be had, and vision-language models that do not fit each other."""

import functools
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.models import save, words
from reference.vision_models import save_seeing, seeing_model, write_images
from transformers import AutoModelForCausalLM

from hostile import SEARCH, Case, World, changing, config

Change = Callable[[World], Any]
GOOD = {"prompt": "<image> w5", "target": "w6", "image": "0.png"}
PLAN = ("plan", "config.yaml")
# Time enough to load torch, transformers and a processor.
SLOW = 60.0


@functools.cache
def _models() -> Path:
    """LLaVA-shaped models `base`, `one` and `two`, and images."""
    folder = Path(tempfile.mkdtemp())
    for seed, name in enumerate(("base", "one", "two")):
        save_seeing(seeing_model("llava"), folder / name, seed)
    write_images(folder)
    return folder


@changing
def records(world: World, /, *records: dict[str, Any], **changes: Any) -> None:
    """A search whose task has these records, behind a good one and before two others."""
    lines = [GOOD, *records, GOOD | {"target": "w7"}, GOOD | {"target": "w8"}]
    world.write("tasks.jsonl", "".join(json.dumps(record) + "\n" for record in lines))
    world.write("config.yaml", config(**changes))


@changing
def seeing(world: World, *changes: Change) -> None:
    """A world whose models see images, with these changes."""
    for name in ("base", "one", "two"):
        shutil.rmtree(world / name)
    shutil.copytree(_models(), world.root, dirs_exist_ok=True)
    for part in (records(), *changes):
        part(world)


def png(width: int, height: int) -> bytes:
    """The beginning of an image of a size, and none of its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def pictured(world: World) -> None:
    """A picture in a record of a world of text models."""
    write_images(world.root)
    records()(world)


def people(*answers: str) -> Change:
    return lambda world: world.write("tasks.jsonl", json.dumps(GOOD | {"all": answers}) + "\n")


@changing
def text_model(world: World, /, **sizes: Any) -> None:
    """A text model `text` of other sizes as the second parent."""
    settings = seeing_model("llava").config.text_config
    for name, value in sizes.items():
        setattr(settings, name, value)
    torch.manual_seed(0)
    save(AutoModelForCausalLM.from_config(settings).float(), world / "text", words(64))
    world.edit("config.yaml", parents=["one", "text"])


@changing
def edited(world: World, name: str, *keys: str, value: Any) -> None:
    """A key of a JSON file, by its path, with another value."""
    document = json.loads((world / name).read_text())
    part = document
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    world.write(name, json.dumps(document))


def task(**keys: Any) -> Change:
    section = {"name": "text", "kind": "generation", "file": "tasks.jsonl", "max_new_tokens": 4} | keys
    return lambda world: world.edit("config.yaml", tasks=[section])


LINE = "tasks.jsonl:2: "
PICTURES = [
    Case("a picture for models that see none", pictured,
         ("tasks.jsonl:1", "has an image, and the models see none", "expected a vision-language model")),
    Case("a place without a picture", seeing(records({"prompt": "<image> w5", "target": "w6"})),
         (LINE, "its prompt has 1 place for 0 images"), seconds=SLOW),
    Case("a picture without a place", seeing(records(GOOD | {"prompt": "w5"})),
         (LINE, "its prompt has 0 places for 1 image; expected one <image> for each"), PLAN, seconds=SLOW),
    Case("more pictures than places", seeing(records(GOOD | {"image": ["0.png", "1.png"]})),
         (LINE, "its prompt has 1 place for 2 images"), seconds=SLOW),
    Case("a picture that is not there", seeing(records(GOOD | {"image": "none.png"})),
         (LINE, "image: none.png: no such file", "expected an image: a path"), seconds=SLOW),
    Case("a bomb of pixels", seeing(lambda world: world.write("big.png", png(60_000, 60_000)),
                                    records(GOOD | {"image": "big.png"})),
         (LINE, "image: big.png"), PLAN, seconds=SLOW),
    Case("a picture without its pixels", seeing(lambda world: world.write("cut.png", png(10, 10)),
                                                records(GOOD | {"image": "cut.png"})),
         (LINE, "image: cut.png: cannot be read as an image"), seconds=SLOW),
    Case("a device as a picture", seeing(records(GOOD | {"image": "/dev/zero"})),
         (LINE, "image: '/dev/zero' lies outside of its folder"), seconds=SLOW),
]  # fmt: skip
MODELS = [
    Case("processors that differ", seeing(edited("two/processor_config.json", "image_processor", "image_mean",
                                                 value=[0.5, 0.5, 0.5])),
         ("/two: its processor's image_processor.image_mean is [0.5, 0.5, 0.5]", "/base [0.48", "expected one"),
         PLAN, seconds=SLOW),
    Case("processors that cut images differently", seeing(edited("one/processor_config.json", "patch_size", value=6)),
         ("/one: its processor's patch_size is 6", "/base 4"), SEARCH, seconds=SLOW),
    Case("a processor that is none", seeing(edited("base/processor_config.json", "processor_class", value="Nothing")),
         ("base", "processor"), seconds=SLOW),
    Case("a text model of another width", seeing(text_model(hidden_size=40, intermediate_size=48)),
         ("/text: ", "has shape", "/base"), seconds=SLOW),
    Case("a text model of another depth", seeing(text_model(num_hidden_layers=3)),
         ("/text/config.json: layers is 3, but 2 in the first model",), seconds=SLOW),
    Case("a text model of other heads", seeing(text_model(num_key_value_heads=4)),
         ("/text: ", "k_proj.weight has shape [32, 32], but [16, 32]"), seconds=SLOW),
    Case("other modules of a text model", seeing(text_model(), lambda world: world.edit(
        "config.yaml", other_modules="text")), ("other_modules: ", "is a text decoder alone"), seconds=SLOW),
]  # fmt: skip
TASKS = [
    Case("people's answers of no field", seeing(task(metric="vqa_accuracy")), ("tasks[0].accept: missing",),
         PLAN, seconds=SLOW),
    Case("too few people's answers", seeing(people("w6", "w7", "w6"), task(metric="vqa_accuracy", accept="all")),
         ("tasks.jsonl:1: all: has 3; vqa_accuracy is for more than 3",), PLAN, seconds=SLOW),
    Case("a data set of the hub without a network", task(file="hub:owner/name:test"), ("hub:owner/name:test: ",),
         seconds=SLOW, environment=(("HF_HUB_OFFLINE", "1"),)),
    Case("a data set of no owner", task(file="hub:name"), ("hub:name: expected hub:owner/dataset",)),
]  # fmt: skip
CASES = [*PICTURES, *MODELS, *TASKS]
