"""Modules of the user's own: backends that are not there, arrays that are none, and state dicts that do not fit."""

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hostile import Case, World, changing, config

Change = Callable[[World], Any]
# A module of torch, and a function that makes none.
MODULE = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 3)

    def forward(self, image):
        return self.head(image)


make = Net


def number():
    return 3
"""
# One that is looked at before torch is.
PLAIN = "def make():\n    return None\n\n\ndef make_large(width):\n    return None\n\n\nnumber = 3\n"
# Time enough to load torch.
SLOW = 60.0
TASK = {"name": "classes", "kind": "classification", "file": "arrays.npz"}


def weights(prefix: str = "", **changes: Any) -> dict[str, np.ndarray]:
    arrays = {"head.weight": np.eye(3, 4, dtype=np.float32), "head.bias": np.ones(3, np.float32)} | changes
    return {f"{prefix}{name}": array for name, array in arrays.items() if array is not None}


@changing
def own(world: World, /, *changes: Change, source: str = MODULE, **keys: Any) -> Any:
    """A search over a module of the user's own, with these changes."""
    world.write("own.py", source)
    for name in ("first", "second"):
        save_file(weights(), world / f"{name}.safetensors")
    np.savez(world / "arrays.npz", image=np.ones((8, 4), np.float32), label=np.arange(8) % 3)
    parents = ["first.safetensors", "second.safetensors"]
    settings = {"backend": "own.py:make", "base": None, "parents": parents, "space": {"method": "linear"}}
    world.write("config.yaml", config(**{**settings, "tasks": [TASK], **keys}))
    for part in changes:
        part(world)


def named(backend: str, source: str = PLAIN) -> Change:
    return own(source=source, backend=backend)


def arrays(**arrays: Any) -> Change:
    """Examples of these arrays, which are looked at before the module is made."""
    return own(lambda world: np.savez(world / "arrays.npz", **arrays), source=PLAIN)


def examples(content: bytes) -> Change:
    return own(lambda world: world.write("arrays.npz", content), source=PLAIN)


def claimed(world: World) -> None:
    """An array that says that it has a trillion numbers, and has none."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    world.write("arrays.npz", archive(**{"image.npy": header.getvalue(), "label.npy": header.getvalue()}))


def bomb(world: World) -> None:
    """Five gigabytes of zeros in five megabytes."""
    with (
        zipfile.ZipFile(world / "arrays.npz", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("image.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (5 * 2**30,)})
        for _ in range(5 * 2**10):
            member.write(bytes(2**20))


def pickled(world: World) -> None:
    np.savez(world / "arrays.npz", image=np.array([{}, {}], object), label=np.arange(2), allow_pickle=True)


def archive(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return content.getvalue()


def state(**tensors: Any) -> Change:
    return own(lambda world: save_file(tensors, world / "second.safetensors"))


def second(content: bytes, name: str = "second.safetensors") -> Change:
    """Another file as the second model."""
    return own(lambda world: world.write(name, content), parents=["first.safetensors", name])


@changing
def asked(world: World, /, **tasks: Any) -> None:
    """`evaluate` by a file of tasks, of a state dict in a folder."""
    own()(world)
    (world / "model").mkdir()
    save_file(weights(), world / "model" / "model.safetensors")
    world.write("tasks.yaml", {"tasks": [TASK], **tasks})


EVALUATE = ("evaluate", "model", "--tasks", "tasks.yaml")
BACKEND = "config.yaml: backend: "
BACKENDS = [
    Case("a file that is not there", named("none.py:make"), (f"{BACKEND}none.py: no such file",)),
    Case("a folder in its place", own(lambda world: (world / "folder.py").mkdir(), backend="folder.py:make"),
         (f"{BACKEND}folder.py: no such file",)),
    Case("a name that is not there", named("own.py:mkae"), (f"{BACKEND}own.py has no 'mkae' (did you mean 'make'?)",)),
    Case("no name", named("own.py:"), (f"{BACKEND}own.py has no ''", "known: make, make_large")),
    Case("a name of two parts", named("own.py:make.large"), (f"{BACKEND}own.py has no 'make.large'",)),
    Case("a number", named("own.py:number"), (f"{BACKEND}own.py:number is 3, which lacks check, open",)),
    Case("a function that needs an argument", named("own.py:make_large"),
         (f"{BACKEND}own.py:make_large is called without arguments (missing a required argument: 'width')",)),
    Case("a module that is not there", named("nowhere_at_all:make"), ("there is no module 'nowhere_at_all' in ",)),
    Case("a module that is no name", named("a..b:make"), (f"{BACKEND}there is no module 'a' in ",)),
    Case("no module", named(":make"), (BACKEND, "cannot be imported")),
    Case("no Python", named("own.py:make", "def make(:\n"), (BACKEND, "own.py cannot be imported (SyntaxError",)),
    Case("bytes of nothing", named("own.py:make", "x = 1\0"), (BACKEND, "own.py cannot be imported (")),
    Case("a file that fails", named("own.py:make", "x = 1\nx / 0\n"),
         (f"{BACKEND}own.py cannot be imported (line 2: ZeroDivisionError",)),
    Case("a file that ends the program", named("own.py:make", "import sys\nsys.exit(0)\n"),
         (f"{BACKEND}own.py cannot be imported (", "SystemExit: 0")),
    Case("a file that ends the process", named("own.py:make", "import os\nos._exit(0)\n"),
         (f"{BACKEND}own.py cannot be imported (",)),
    Case("a file that needs another", named("own.py:make", "import nowhere_at_all\n"),
         (f"{BACKEND}own.py cannot be imported (line 1: ModuleNotFoundError",)),
]  # fmt: skip
FILE = "arrays.npz: "
ARRAYS = [
    Case("no labels", arrays(image=np.ones((2, 4))), (f"{FILE}has no array 'label', the target (it has image)",)),
    Case("labels alone", arrays(label=np.ones(2)), (f"{FILE}has no array beside the target",)),
    Case("rows of two numbers", arrays(image=np.ones((2, 4)), label=np.arange(3)), (f"{FILE}has arrays with leading",)),
    Case("no rows", arrays(image=np.ones((0, 4)), label=np.arange(0)), (f"{FILE}has arrays with leading axes of [0]",)),
    Case("numbers without axes", arrays(image=1.0, label=1), (f"{FILE}has arrays with leading axes of [0]",)),
    Case("texts", arrays(image=np.array(["a", "b"]), label=np.arange(2)), (f"{FILE}image: an array of <U1",)),
    Case("complex numbers", arrays(image=np.ones(2, complex), label=np.arange(2)), (f"{FILE}image: an array of",)),
    Case("objects", own(pickled, source=PLAIN), (f"{FILE}is no .npz file of numbers (",)),
    Case("a trillion numbers that are claimed", own(claimed, source=PLAIN), (f"{FILE}is no .npz file of numbers (",)),
    Case("five gigabytes of zeros", own(bomb, source=PLAIN), (FILE, "unpack to 5,368,709,")),
    Case("no archive", examples(b"no archive"), (f"{FILE}is no .npz file of numbers (",)),
    Case("no bytes", examples(b""), (f"{FILE}is no .npz file of numbers (",)),
    Case("an archive of texts", examples(archive(label=b"1 2 3")), (f"{FILE}label: an array of |S5",)),
    Case("an archive of a cut array", examples(archive(**{"label.npy": b"\x93NUMPY\x01\0v\0"})), (FILE,)),
]  # fmt: skip
EXCESS = "save the state dict of the module inside"
STATES = [
    *(Case(f"a state dict behind {prefix}", state(**weights(prefix)),
           ("second.safetensors: lacks head.bias", f"its names begin with '{prefix}'", EXCESS), seconds=SLOW)
      for prefix in ("module.", "_orig_mod.", "module._orig_mod.")),
    Case("a state dict without a tensor", state(**weights(**{"head.bias": None})),
         ("second.safetensors: lacks head.bias; expected the state dict of own.py:make's module",), seconds=SLOW),
    Case("a state dict of other shapes", state(**weights(**{"head.bias": np.ones(2, np.float32)})),
         ("second.safetensors: does not fit own.py:make", "size mismatch for head.bias"), seconds=SLOW),
    Case("a pickled state dict", second(b"\x80\x04.", "second.pt"), ("second.pt: expected a .safetensors",),
         seconds=SLOW),
    Case("a folder of a pickled state dict", second(b"\x80\x04.", "folder/pytorch_model.bin"),
         ("pytorch_model.bin",), seconds=SLOW),
    Case("a cut state dict", own(lambda world: world.write(
        "second.safetensors", (world / "first.safetensors").read_bytes()[:-7])), ("second.safetensors: ",),
         seconds=SLOW),
    Case("a state dict that is no file", own(parents=["first.safetensors", "third.safetensors"]),
         ("parents[1]: third.safetensors: no such file or folder",), seconds=SLOW),
    Case("a function that makes no module", own(backend="own.py:number"),
         ("own.py:number returned 3; expected a torch.nn.Module",), seconds=SLOW),
    Case("an array that is no argument", own(lambda world: np.savez(
        world / "arrays.npz", text=np.ones((8, 4), np.float32), label=np.arange(8) % 3)),
         ("array 'text' is no argument of Net (known: image)",), ("plan", "config.yaml"), seconds=SLOW),
]  # fmt: skip
EVALUATIONS = [
    Case("a state dict without its backend", asked(), ("own modules need backend: FILE.py:NAME",), EVALUATE,
         seconds=SLOW),
    Case("a backend of tasks that is not there", asked(backend="own.py:mkae"),
         ("tasks.yaml: backend: own.py has no 'mkae' (did you mean 'make'?)",), EVALUATE, seconds=SLOW),
    Case("an unknown backend of tasks", asked(backend="torhc"),
         ("tasks.yaml: backend: unknown backend 'torhc' (did you mean 'torch'?)",), EVALUATE),
    Case("a model that is not there, of a backend", asked(backend="own.py:make"),
         ("MODELS: none.safetensors: no such file or folder",), ("evaluate", "none.safetensors", *EVALUATE[2:]),
         seconds=SLOW),
]  # fmt: skip
CASES = [*BACKENDS, *ARRAYS, *STATES, *EVALUATIONS]
