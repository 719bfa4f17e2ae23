"""Run folders that are damaged, disputed, of something else, or of other inputs than now."""

import atexit
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hostile import SEARCH, Case, World, changing, run_command

RESUME = (*SEARCH, "--resume")
OVERWRITE = (*SEARCH, "--overwrite")
EXPORT = ("export", "run", "out")
GENERATIONS = 3


def put_run(world: World, name: str = "run") -> Path:
    """A finished run of the world's config, three generations long. It is made once, and copied."""
    world.edit("config.yaml", search={"generations": GENERATIONS, "population": 4})
    folder = world / name
    shutil.copytree(_template(world.root), folder)
    for file in (folder / "config.yaml", folder / "best/recipe.yaml"):
        file.write_text(file.read_text().replace(str(_root()), str(world.root)))
    return folder


@cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="template."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Of the length of a usual path below a temporary folder: YAML breaks long lines.
    return folder / "world"


@cache
def _template_in(root: Path) -> Path:
    run_command(*SEARCH, folder=root)
    return root / "run"


def _template(world: Path) -> Path:
    if not _root().exists():
        shutil.copytree(world, _root())
    return _template_in(_root())


@changing
def a_run(world: World, change: Callable[[Path], Any]) -> None:
    """A finished run that is changed."""
    change(put_run(world))


@changing
def inputs(world: World, change: Callable[[World], Any]) -> None:
    """A finished run, whose inputs are changed afterwards."""
    put_run(world)
    change(world)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def each_checkpoint(change: Callable[[Path], Any]) -> Callable[[World], None]:
    """A finished run with every file of every checkpoint changed."""
    return a_run(lambda run: [change(file) for file in files(run / "checkpoints")])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(bytes((i * 37 + 11) % 256 for i in range(path.stat().st_size or 10)))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def empty_folders(folder: Path) -> None:
    for step in (folder / "checkpoints").iterdir():
        shutil.rmtree(step)
        step.mkdir()


def replace_config(content: bytes | str) -> Callable[[World], None]:
    data = content if isinstance(content, bytes) else content.encode()
    return a_run(lambda run: (run / "config.yaml").write_bytes(data))


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[World], None]:
    def edit(run: Path) -> None:
        document = yaml.safe_load((run / "config.yaml").read_text())
        change(document)
        (run / "config.yaml").write_text(yaml.safe_dump(document))

    return a_run(edit)


def older_version(run: Path) -> None:
    """Checkpoints as they were before they held the history."""
    from orbax.checkpoint import v1 as ocp

    shutil.rmtree(run / "checkpoints")
    import numpy as np

    with ocp.training.Checkpointer((run / "checkpoints").resolve()) as checkpointer:
        checkpointer.save_pytree(GENERATIONS, {"strategy": {"mean": np.zeros(3)}, "fitness": np.zeros(5)})


# The lock's holder lives as long as these tests: a child that keeps the file locked.
HOLD = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.write(handle, f"{os.getpid()} on elsewhere\\n".encode())
print(flush=True)
sys.stdin.read()
"""


def hold(folder: Path) -> int:
    """Let another process have the run folder's lock."""
    folder.mkdir(exist_ok=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    atexit.register(holder.kill)
    return holder.pid


def in_use(world: World) -> None:
    hold(put_run(world))


def in_use_from_the_start(world: World) -> None:
    hold(world / "run")


def write(name: str, content: str) -> Callable[[World], Any]:
    return lambda world: world.write(name, content)


def chat_template(world: World) -> None:
    world.edit("base/tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")


CASES: list[Case] = [
    # Two processes
    Case("another process resumes it already", in_use, ("run: is in use by process", "on elsewhere"), RESUME),
    Case("another process is in it, and it is to start again", in_use, ("in use", "on elsewhere"), OVERWRITE),
    Case("another process is in it, and nothing is said", in_use, ("in use", "on elsewhere")),
    Case("another process has just begun it", in_use_from_the_start, ("in use", "on elsewhere")),
    Case("another process has just begun it, to be resumed", in_use_from_the_start, ("in use",), RESUME),
    Case(
        "a file of another program in the place of the lock",
        a_run(lambda run: (run / "lock").write_text("a key\n")), ("run/lock", "move it"), RESUME,
    ),
    Case(
        "a link in the place of the lock",
        a_run(lambda run: (run / "lock").symlink_to("../tasks.jsonl")), ("run: cannot be written",), RESUME,
    ),
    Case("a folder in the lock's place", a_run(lambda run: (run / "lock").mkdir()), ("cannot be written",), RESUME),
    # Checkpoints of which none is left
    Case("every checkpoint cut", each_checkpoint(halve), ("checkpoints", "all 3 are damaged", "--overwrite"), RESUME),
    Case("every checkpoint emptied", each_checkpoint(empty), ("checkpoints", "--overwrite"), RESUME),
    Case("every checkpoint garbage", each_checkpoint(garble), ("checkpoints", "--overwrite"), RESUME),
    Case("every checkpoint an empty folder", a_run(empty_folders), ("checkpoints", "--overwrite"), RESUME),
    Case(
        "no checkpoints", a_run(lambda run: shutil.rmtree(run / "checkpoints")),
        ("run: has a history but no checkpoint", "--overwrite"), RESUME, leaves=("run/checkpoints",),
    ),
    Case(
        "an empty folder of checkpoints",
        a_run(lambda run: [shutil.rmtree(step) for step in (run / "checkpoints").iterdir()]),
        ("has a history but no checkpoint", "--overwrite"), RESUME,
    ),
    Case("checkpoints of an older version", a_run(older_version), ("another version", "--overwrite"), RESUME),
    # config.yaml
    Case("config.yaml is garbage", replace_config(bytes(range(256))), ("run/config.yaml",), RESUME),
    Case("config.yaml is not YAML", replace_config("a: [1\nb: }"), ("run/config.yaml",), RESUME),
    Case("config.yaml is empty", replace_config(""), ("run: is not empty and not a run folder",), RESUME),
    Case("config.yaml is a list", replace_config("[1, 2]"), ("not a run folder",), OVERWRITE),
    Case("config.yaml is gone", a_run(lambda run: (run / "config.yaml").unlink()), ("not a run folder",), RESUME),
    Case(
        "config.yaml has another sigma", edit_config(lambda c: c["search"].update(sigma=0.5)),
        ("search.sigma", "it was 0.5", "now 0.1666"), RESUME,
    ),
    Case(
        "config.yaml lacks a task", edit_config(lambda c: c.update(tasks=[])), ("run/config.yaml", "tasks"), RESUME
    ),
    Case(
        "config.yaml has inputs that are a text", edit_config(lambda c: c.update(inputs="none")),
        ("run/config.yaml", "inputs"), RESUME,
    ),
    # Other inputs
    Case("another seed", inputs(lambda world: None), ("seed differs", "it was 0", "now 7"), (*RESUME, "--seed", "7")),
    Case(
        "another chat template", inputs(chat_template), ("base/tokenizer_config.json", "has changed", "sha256"), RESUME
    ),
    Case(
        "a chat template of its own file", inputs(write("base/chat_template.jinja", "{{ bos_token }}")),
        ("base/chat_template.jinja", "is new"), RESUME,
    ),
    Case(
        "another generation config", inputs(lambda world: world.edit("base/generation_config.json", eos_token_id=5)),
        ("base/generation_config.json",), RESUME,
    ),
    Case(
        "a generation config that went",
        inputs(lambda world: [(world / name / "generation_config.json").unlink() for name in ("base", "one", "two")]),
        ("generation_config.json", "was removed"), RESUME,
    ),
    Case(
        "another tokenizer", inputs(lambda world: world.edit("one/tokenizer_config.json", padding_side="left")),
        ("one/tokenizer_config.json", "has changed"), RESUME,
    ),
    Case(
        "another task file", inputs(lambda world: (world / "tasks.jsonl").open("a").write("\n")),
        ("tasks.jsonl", "has changed"), RESUME,
    ),
    # Other folders
    Case("resume of an empty folder", lambda world: (world / "run").mkdir(), ("no run to resume",), RESUME),
    Case("a folder with notes", write("run/notes.txt", "mine"), ("not a run folder",), OVERWRITE),
    Case("an editor's file alone", write("run/.config.yaml.swp", "mine"), ("not a run folder",), OVERWRITE),
    Case("best/ with a user's file alone", write("run/best/model.txt", "mine"), ("not a run folder",), OVERWRITE),
    Case(
        "a file in the place of best", a_run(lambda run: (shutil.rmtree(run / "best"), (run / "best").write_text("x"))),
        ("run: cannot be written",), RESUME,
    ),
    # Exports of a damaged run
    Case(
        "export of a run without config.yaml", a_run(lambda run: (run / "config.yaml").unlink()),
        ("not a run folder",), EXPORT,
    ),
    Case(
        "export of a run whose recipe is garbage",
        a_run(lambda run: (run / "best/recipe.yaml").write_bytes(bytes(range(256)))), ("best/recipe.yaml",), EXPORT,
    ),
    Case(
        "export of a run whose recipe is empty", a_run(lambda run: empty(run / "best/recipe.yaml")),
        ("best/recipe.yaml",), EXPORT,
    ),
]  # fmt: skip
