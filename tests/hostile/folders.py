"""Folders of strangers: names that lead outside of them, classes that would run their code, and pickles, in diffusers
folders, indices of shards, adapters and LoRAs, single files, tokenizers, sentence transformers and records."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hostile import MERGE, SEARCH, Case, World, changing, config, recipe
from hostile.tasks_of_strangers import case, harness

Change = Callable[[World], Any]
MODELS = ("base", "one", "two")
PLAN = ("plan", "config.yaml")
INSPECT = ("inspect", "one", "two")
EVALUATE = ("evaluate", "base", "--tasks", "config.yaml")
# Time enough to load torch and transformers.
SLOW = 90.0
# What any code of a stranger would leave behind: `check` refuses a file that was not there.
MARK = "code-ran"
CODE = f"open({MARK!r}, 'w').close()\n"


class _Payload:
    """An object whose pickle makes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(MARK),)


PICKLE = pickle.dumps(_Payload())


@changing
def changes(world: World, *parts: Change) -> None:
    for part in parts:
        part(world)


def write(name: str, content: Any) -> Change:
    """A file; a mapping or a list as JSON."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return lambda world: world.write(name, text) and None


# ---------------------------------------------------------------------------------------------------------------
# Diffusers folders

INDEX = {
    "_class_name": "DDPMPipeline", "_diffusers_version": "0.42.1", "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}  # fmt: skip
GENERATORS = ("models/a", "models/b")
UNET = "models/a/unet/diffusion_pytorch_model"
LINEAR = {
    "merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 0.5}} for name in GENERATORS],
}  # fmt: skip


@changing
def generators(world: World, /, *parts: Change, merged: dict[str, Any] = LINEAR, **index: Any) -> None:
    """Two folders of diffusers, the first with further entries of its index, and what lies beside them."""
    for seed, name in enumerate(GENERATORS):
        (world / f"{name}/unet").mkdir(parents=True)
        weights = np.full((2, 2), seed, np.float32)
        save_file({"conv.weight": weights}, world / f"{name}/unet/diffusion_pytorch_model.safetensors")
        write(f"{name}/unet/config.json", {"_class_name": "UNet2DModel"})(world)
        write(f"{name}/scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler"})(world)
        write(f"{name}/model_index.json", INDEX | (index if seed == 0 else {}))(world)
    for thesis in ("notes/thesis.json", "models/notes/thesis.json", "models/a/unet/deep/thesis.json"):
        write(thesis, {"mine": thesis})(world)
    world.write("recipe.yaml", merged)
    changes(*parts)(world)


def component(name: str) -> dict[str, Any]:
    return {name: ["diffusers", "DDPMScheduler"]}


OUTSIDE = ("model_index.json: ", "lies outside of its folder", "expected a plain name inside of ")
COMPONENTS = [
    Case(f"a component called {what}", generators(**component(name)), OUTSIDE, MERGE)
    for what, name in {
        "as the folder beside": "../notes", "as a folder farther up": "../../notes", "as its folder": ".",
        "as the folder above": "..", "as the root": "/", "by a whole path": "/etc", "as nothing": "",
        "by a path inside": "unet/deep", "by a way round": "unet/../../notes", "as a home": "~",
        "as root's home": "~root",
        "by a path of Windows": "..\\notes", "by a drive": "C:notes", "with a line end": "no\ntes",
        "with a colour": "\x1b[31mnotes", "with a NUL": "no\0tes", "with letters turned round": "a\u202eb",
        "by a name of a kilobyte": "a" * 1000, "with a slash behind": "scheduler/",
        "with a point before": "./scheduler",
    }.items()
] + [
    Case("a component of the second model outside", generators(
         write("models/b/model_index.json", INDEX | component("../notes"))), OUTSIDE, MERGE),
    Case("a component outside that a recipe names", generators(
         merged=LINEAR | {"components": {"../notes": "models/a"}}, **component("../notes")), OUTSIDE, MERGE),
    Case("a component outside that a recipe merges", generators(
         merged=LINEAR | {"components": {"../notes": "merge"}}, **component("../notes")), OUTSIDE, MERGE),
    Case("a component that is a number", generators(unet=7, vae=["diffusers", 7]), ("vae: ",), MERGE),
    Case("a component of three parts", generators(vae=["a", "b", "c"]), ("vae: ", "a library and a class"), MERGE),
    Case("a component that is not there", generators(**component("vae")), ("there is no folder vae/",), MERGE),
    Case("a component called as the model's card", generators(
         write("models/a/README.md/x.json", {}), **component("README.md")),
         ("out: could not be written",), MERGE, lines=2),
    Case("weights of a component outside", generators(
         lambda world: os.rename(world / f"{UNET}.safetensors", world / "models/a/unet/part.safetensors"),
         write(f"{UNET}.safetensors.index.json", {"weight_map": {"conv.weight": "../../b/unet/x.safetensors"}})),
         ("weight_map.conv.weight: ", "lies outside of its folder"), MERGE),
]  # fmt: skip
PICKLED_COMPONENTS = [
    Case(f"a component in {name}", generators(
         lambda world: os.remove(world / f"{UNET}.safetensors"), write(f"models/a/unet/{name}", PICKLE)),
         ("models/a/unet: ", "holds pickle files only"), MERGE)
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.ckpt", "weights.PKL", "weights.pickle")
] + [
    Case("a component that is kept, in a pickle", generators(
         write("models/a/text_encoder/pytorch_model.bin", PICKLE), text_encoder=["transformers", "CLIPTextModel"]),
         ("models/a/text_encoder: ", "holds pickle files only"), MERGE, lines=2),
]  # fmt: skip


def with_lora(name: str, content: Any = PICKLE) -> Change:
    model = [{"model": f"models/a+{name}", "parameters": {"weight": 1}}]
    return generators(write(name, content), merged=LINEAR | {"models": model})


LORAS = [
    *(Case(f"a LoRA in {name}", with_lora(name), ("expected a LoRA in safetensors",), MERGE)
      for name in ("lora.bin", "lora.pt", "lora.ckpt", "lora.pickle", "lora", "lora.safetensors.pkl")),
    Case("a LoRA that is a pickle by another name", with_lora("lora.safetensors"), ("lora.safetensors: ",), MERGE),
    Case("a folder of a LoRA in a pickle", changes(
         with_lora("lora/pytorch_lora_weights.bin"), lambda world: world.write("recipe.yaml", LINEAR | {
             "models": [{"model": "models/a+lora", "parameters": {"weight": 1}}]})),
         ("pytorch_lora_weights.safetensors: is missing",), MERGE),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Indices of shards, single files, adapters


@changing
def index(world: World, value: Any, name: str = "one") -> None:
    """A model whose index names this file for a tensor."""
    os.rename(world / f"{name}/model.safetensors", world / f"{name}/part.safetensors")
    (world / f"{name}/pytorch_model.bin").write_bytes(PICKLE)
    weight_map = {"model.norm.weight": value, "lm_head.weight": "part.safetensors"}
    write(f"{name}/model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})(world)


IN_INDEX = ("one/model.safetensors.index.json: weight_map.model.norm.weight: ",)
SHARDS = [
    *(Case(f"a shard {what}", index(name), (*IN_INDEX, "lies outside of its folder"), command)
      for what, (name, command) in {
          "of another model": ("../two/model.safetensors", MERGE), "by a whole path": ("/etc/passwd", MERGE),
          "by a way round": ("a/../../two/model.safetensors", SEARCH), "of a home": ("~/model.safetensors", MERGE),
          "by a path of Windows": ("..\\two\\model.safetensors", MERGE), "that is nothing": ("", MERGE),
          "that is a folder": (".", MERGE), "that is a number": (7, MERGE), "that is a list": (["a"], INSPECT),
          "with a NUL": ("a\0.safetensors", MERGE), "of a kilobyte": ("a" * 1000 + ".safetensors", PLAN),
          "of a path of a kilobyte": ("a/" * 600 + "b.safetensors", PLAN), "looked at": ("../two/x", INSPECT),
      }.items()),
    *(Case(f"a shard in {name}", index(name), (*IN_INDEX, "the name of a safetensors file"), MERGE)
      for name in ("pytorch_model.bin", "part.pt", "part.safetensors.pickle", "part")),
]  # fmt: skip


def single(name: str) -> Change:
    models = [{"model": one, "parameters": {"weight": 0.5}} for one in (name, "two")]
    return changes(write(name, PICKLE), lambda world: world.write("recipe.yaml", {
        "merge_method": "linear", "models": models}))  # fmt: skip


def pickles_only(name: str, model: str = "one") -> Change:
    return changes(lambda world: os.remove(world / f"{model}/model.safetensors"), write(f"{model}/{name}", PICKLE))


FILES = [
    *(Case(f"a checkpoint in {name}", single(name), (f"{name}: is a pickle", "expected a safetensors file"), MERGE)
      for name in ("a.ckpt", "a.pt", "a.pth", "a.bin", "a.pkl", "a.pickle", "a.joblib", "a.CKPT")),
    *(Case(f"a model in {name}", pickles_only(name), ("/one: holds pickle files only",), command)
      for name, command in {
          "pytorch_model.bin": MERGE, "model.pt": MERGE, "model.ckpt": SEARCH, "model.pickle": MERGE,
          "model.PKL": INSPECT, "model.joblib": PLAN,
      }.items()),
]  # fmt: skip


def adapter(*parts: Change, **settings: Any) -> Change:
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    return changes(
        write("lora/adapter_config.json", lora | {"base_model_name_or_path": "base"} | settings),
        write("lora/adapter_model.bin", PICKLE), *parts,
        lambda world: world.write("recipe.yaml", recipe(base_model="base", models=[
            {"model": "lora", "parameters": {"weight": 1, "density": 1}}])),
    )  # fmt: skip


ADAPTERS = [
    Case("an adapter in a pickle", adapter(), ("/lora: holds its adapter as a pickle",), MERGE),
    Case("an adapter that is a pickle by another name", adapter(write("lora/adapter_model.safetensors", PICKLE)),
         ("lora/adapter_model.safetensors: ",), MERGE),
    Case("an adapter of a base that is a pickle", adapter(
         write("a.ckpt", PICKLE), base_model_name_or_path="../a.ckpt",
         revision=None), ("a.ckpt",), MERGE),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Tokenizers and classes


@changing
def everywhere(world: World, /, file: str, **settings: Any) -> None:
    """Keys of a JSON file of all models, whose code lies beside it."""
    for model in MODELS:
        if not (world / f"{model}/{file}").exists():
            write(f"{model}/{file}", {})(world)
        world.edit(f"{model}/{file}", **settings)
        world.write(f"{model}/mine.py", f"{CODE}from transformers import LlamaForCausalLM as Mine\n")


SETTINGS = "tokenizer_config.json"
AUTO_MAP = {"AutoProcessor": "mine.Mine", "AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}
YES = "y\n" * 9
CLASSES = [
    *(Case(f"a tokenizer that is {what}", everywhere(SETTINGS, tokenizer_class=name, auto_map=AUTO_MAP),
           (f"base/{SETTINGS}: tokenizer_class: ",), command, stdin=YES, seconds=30)
      for what, (name, command) in {
          "any processor": ("AutoProcessor", SEARCH), "any fast processor": ("AutoProcessorFast", EVALUATE),
          "any tokenizer": ("AutoTokenizer", SEARCH), "a pipeline": ("pipeline", SEARCH),
          "a model": ("LlamaForCausalLM", EVALUATE), "any model": ("AutoModelForCausalLM", PLAN),
      }.items()),
    Case("a tokenizer that a config names", changes(
         everywhere(SETTINGS, tokenizer_class=...), everywhere("config.json", tokenizer_class="AutoProcessor")),
         ("base/config.json: tokenizer_class: ",), SEARCH, stdin=YES, seconds=30),
    Case("a processor that is any", everywhere(SETTINGS, processor_class="AutoProcessor"),
         ("processor_class: ",), SEARCH, stdin=YES, seconds=30),
    Case("a tokenizer's file of another model", everywhere(
         SETTINGS, fast_tokenizer_files=["../two/tokenizer.1.0.0.json"]),
         ("fast_tokenizer_files: ", "lies outside"), SEARCH, seconds=30),
    Case("a template's name that leads outside", changes(
         everywhere(SETTINGS, chat_template=[{"name": "../../thesis", "template": "x"}]),
         lambda world: world.write("recipe.yaml", recipe(tokenizer={"source": "union", "pad_to_multiple_of": 3}))),
         ("chat_template: ", "lies outside"), MERGE, seconds=30),
    Case("a config that names a pickle of weights", everywhere("config.json", transformers_weights="a.bin"),
         ("a.bin: is a pickle",), SEARCH, seconds=30),
]  # fmt: skip


def torch_search(*parts: Change, **document: Any) -> Change:
    networks = {
        "backend": "torch", "base": ..., "space": {"method": "linear", "parameters": {"weight": {}}},
        "parents": ["one", "two"],
    } | document  # fmt: skip
    return changes(*parts, lambda world: world.edit("config.yaml", **networks))


def architectures(name: Any) -> Change:
    return torch_search(everywhere(
        "config.json", architectures=[name], model_type="mine",
        auto_map={"AutoConfig": "mine.Mine", str(name): "mine.Mine"},
    ))  # fmt: skip


def sentence(*parts: Change, **module: Any) -> Change:
    """Sentence transformers whose second module is this one."""
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    second = first | {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    listed = [first, second | module]
    code = f"{CODE}from torch.nn import Identity as Mine\n"
    return torch_search(
        *(write(f"{model}/modules.json", listed) for model in MODELS),
        *(write(f"{model}/1_Pooling/config.json", {"word_embedding_dimension": 32}) for model in MODELS),
        *(write(f"{model}/modeling.py", code) for model in MODELS), *parts,
    )  # fmt: skip


NETWORKS = [
    *(Case(f"a network of the class {name}", architectures(name),
           ("one/config.json: architectures: ", "code that comes with a model is not run"), stdin=YES, seconds=SLOW)
      for name in ("AutoModelForCausalLM", "AutoModel", "pipeline", "Mine")),
    Case("a network beside an adapter", torch_search(write("one/adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": "../two"})), ("adapter",), seconds=SLOW),
    Case("a network whose config names a pickle", torch_search(
         everywhere("config.json", transformers_weights="pytorch_model.bin"),
         write("one/pytorch_model.bin", PICKLE)), ("pytorch_model.bin: is a pickle",), seconds=SLOW),
    Case("a network of a shard outside", torch_search(index("../two/model.safetensors")),
         (*IN_INDEX, "lies outside"), seconds=SLOW),
    Case("a network in a pickle", torch_search(pickles_only("pytorch_model.bin")),
         ("pytorch_model.bin: is pickled",), seconds=SLOW),
    Case("a module of the folder's own code", sentence(type="modeling.Mine"),
         ("one/modules.json: [1]: type: ", "is not run"), stdin=YES, seconds=SLOW),
    Case("a module that is a function", sentence(type="os.system"), ("modules.json: [1]: type: ",), seconds=SLOW),
    Case("a module outside of its folder", sentence(path="../two"), ("[1].path: ", "lies outside"), seconds=SLOW),
    Case("a module in a pickle", sentence(*(write(f"{model}/1_Pooling/pytorch_model.bin", PICKLE) for model in MODELS)),
         ("pytorch_model.bin: is pickled",), seconds=SLOW),
    Case("a module that asks for pickles", sentence(*(write(f"{model}/sentence_bert_config.json", {
        "model_args": {"use_safetensors": False}}) for model in MODELS)), ("model_args: ",), seconds=SLOW),
    *(Case(f"a module of the user's own in {name}", torch_search(
        write(name, PICKLE), write("net.py", "import torch\ndef make():\n    return torch.nn.Linear(2, 2)\n"),
        backend="net.py:make", parents=[name, name]),
        (f"{name}: expected a .safetensors file of a state dict",), seconds=SLOW)
      for name in ("net.pt", "net.bin", "net.pickle", "net")),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Files that records name


@changing
def record(world: World, /, image: Any, key: str = "image", **task: Any) -> None:
    """A search on a record with an image; `notes/1.png` and `notes/below` are there."""
    line = json.dumps({"prompt": "w5", "target": "w6", key: image})
    world.write("data/tasks.jsonl", f"{line}\n" * 4)
    world.write("notes/1.png", b"\x89PNG")
    (world / "notes/below").mkdir()
    section = {"name": "text", "kind": "likelihood", "file": "data/tasks.jsonl"} | task
    world.write("config.yaml", config(tasks=[section]))


ADVICE = ("data/tasks.jsonl:1: image", "lies outside of its folder", "images: FOLDER")
PICTURES = [
    *(Case(f"a picture {what}", record(name, **task), ADVICE, command)
      for what, (name, task, command) in {
          "of a whole path": ("/etc/passwd", {}, SEARCH), "of a folder beside": ("../notes/1.png", {}, PLAN),
          "of a home": ("~/1.png", {}, SEARCH), "by a way round": ("a/../../notes/1.png", {}, SEARCH),
          "of Windows": ("..\\notes\\1.png", {}, SEARCH), "of a drive": ("C:/1.png", {}, SEARCH),
          "with a NUL": ("1\0.png", {}, SEARCH), "that is a point": (".", {}, SEARCH),
          "of a kilobyte": ("a" * 1000, {}, SEARCH), "in a column": ({"path": "/etc/passwd"}, {}, SEARCH),
          "of a column beside": ({"bytes": None, "path": "../notes/1.png"}, {}, PLAN),
          "outside of a folder that the task names": ("../1.png", {"images": "notes/below"}, SEARCH),
          "by a whole path in a folder that the task names": ("/notes/1.png", {"images": "notes"}, SEARCH),
          "of a list": (["../notes/1.png"], {}, SEARCH), "of a task of generations": (
              "../notes/1.png", {"kind": "generation", "max_new_tokens": 4}, PLAN),
      }.items()),
    Case("pictures in a list", record(["1.png", "../notes/1.png"], "images"), ("tasks.jsonl:1: images[0]",)),
    Case("pictures' folder that is not there", record("1.png", images="nowhere"), ("tasks[0].images: ", "no folder")),
    Case("pictures' folder that is a file", record("1.png", images="recipe.yaml"), ("tasks[0].images: ", "no folder")),
    Case("pictures' folder that is a number", record("1.png", images=7), ("tasks[0].images: ",)),
    Case("a picture by an address of files", record("file:///etc/passwd"), ("no such file",)),
    Case("a picture that is a link to a device", changes(
         record("zero.png"), lambda world: os.symlink("/dev/zero", world / "data/zero.png")),
         ("zero.png: is no regular file",)),
]  # fmt: skip
INCLUDED = [
    case(f"a YAML included {what}", harness(
         include=name, more=write("outside.yaml", "metric_list: []\n")), "own.yaml: include: ", "lies outside of ")
    for what, name in {
        "from outside": "../outside.yaml", "by a whole path": "/etc/hostname",
        "by a way round": "sub/../../outside.yaml", "in a list": ["../outside.yaml"],
    }.items()
]  # fmt: skip
CASES = [
    *COMPONENTS,
    *PICKLED_COMPONENTS,
    *LORAS,
    *SHARDS,
    *FILES,
    *ADAPTERS,
    *CLASSES,
    *NETWORKS,
    *PICTURES,
    *INCLUDED,
]
