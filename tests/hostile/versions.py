"""Data that is not the version it should be, references to versions that do not exist, and logs of strangers."""

import os
from pathlib import Path
from typing import Any

from hostile import Case, World, changing
from hostile.runs import RESUME, a_run

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
LONGER = (*RESUME, "--set", "search.generations=4")


def write(name: str, content: str | bytes) -> Any:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda world: (world / name).write_bytes(data)


@changing
def search_on(world: World, file: str) -> None:
    world.edit("config.yaml", tasks=[{"name": "t", "kind": "likelihood", "file": file}])


def replaced(make: Any) -> Any:
    """A finished run with something else in the place of its log."""

    def replace(run: Path) -> None:
        (run / "run.log").unlink(missing_ok=True)
        make(run / "run.log")

    return a_run(replace)


CASES: list[Case] = [
    Case("a pointer of Git LFS for data", write("tasks.jsonl", POINTER), ("tasks.jsonl: is a pointer of Git LFS",)),
    Case(
        "a pointer of Git LFS for weights", write("one/model.safetensors", POINTER),
        ("one/model.safetensors: is a pointer of Git LFS", "git lfs pull"),
    ),
    Case(
        "data that DVC has recorded otherwise", write("tasks.jsonl.dvc", "outs: [{md5: abc, path: tasks.jsonl}]"),
        ("tasks.jsonl is not the file that", "tasks.jsonl.dvc records (md5 abc)", "dvc checkout"),
    ),
    Case("a record of DVC that is garbage", write("tasks.jsonl.dvc", bytes(range(256))), ("tasks.jsonl.dvc",)),
    Case(
        "data that DVC has not fetched", lambda world: (world / "tasks.jsonl").rename(world / "tasks.jsonl.dvc"),
        ("tasks.jsonl: no such file", "dvc pull"),
    ),
    Case("an oxen reference without a commit", search_on("oxen:repo:a.jsonl"), ("expected oxen:REPOSITORY@COMMIT",)),
    Case(
        "an oxen path outside of the repository", search_on("oxen:repo@main:../tasks.jsonl"),
        ("../tasks.jsonl lies outside of the repository",),
    ),
    Case("an oxen repository that is none", search_on("oxen:one@main:a.jsonl"), ("one is no Oxen repository",)),
    Case(
        "a logger that there is not", lambda world: world.edit("config.yaml", log=["excel"]),
        ("config.yaml: log[0]: expected tensorboard, wandb or csv",),
    ),
    Case("loggers that are a mapping", lambda world: world.edit("config.yaml", log={}), ("log: expected a list",)),
    Case("a folder in the place of the log", replaced(Path.mkdir), ("run.log: is a folder",), LONGER),
    Case("a pipe in the place of the log", replaced(os.mkfifo), ("run.log: is no regular file",), LONGER),
    Case(
        "a link in the place of the log", replaced(lambda log: log.symlink_to("../tasks.jsonl")),
        ("run.log: is no log of evojax-merge",), LONGER, status=0, rewrites=("run",), seconds=60,
    ),
]  # fmt: skip
