"""The demo family: tiny models whose weights come with the package, others of the same kind that are trained on the
spot, families of looped models, classifiers, image generators and translators, a vision-language model with a text
model, and a real small model from a package.

References: `zoo:base`, `zoo:maths`, `zoo:japanese` are models, `zoo:search.jsonl` and `zoo:heldout.jsonl` task files;
`zoo:3/base` belongs to the family of seed 3, which is trained first, and `zoo:experts/sums` is one of six more experts
of `zoo:base`, which are trained first as well. `zoo:loops/plus`, `zoo:loops/3/plus` belong to the looped families
(loops). `backend: torch` opens the image classifiers of `zoo:vit/low` (vit) and `zoo:vit8/from0` (vit8), the image
generators of `zoo:ddpm/low` (ddpm) and the translators of `zoo:t5/french` (t5). `zoo:evovlm/vision` belongs to the
models of the table-top EvoVLM, which come with the package (evovlm), `zoo:smollm2/base` to the real model (smollm2).
All of them are kept in the user's cache folder once made.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.system.data_packages import cache_folder as packages_cache_folder

if TYPE_CHECKING:
    from evojax_merge.zoo.tiny_llama import Plan

PREFIX = "zoo:"
MODELS = ("base", "maths", "japanese")
FILES = ("search.jsonl", "heldout.jsonl")
# More experts of the packaged base: three of hard sums in English, three that answer in Japanese.
EXPERTS = ("sums", "differences", "both", "easy_sums", "copying", "mixed")
# Kinds of families, each in the module of its name, which has a FAMILY.
KINDS = ("ddpm", "evovlm", "lengths", "loops", "t5", "vit", "vit8")
# The version of the training recipe in `arithmetic` and of the packaged weights: each version has a folder of its own.
VERSION = "v3"
# A seed, where there is one, and the name of a model or file of the seed's family.
NUMBERED = re.compile(r"(?:([0-9]{1,9})/)?([^/]+)")


def cache_folder() -> Path:
    """The folder in which the zoo keeps the models that it made."""
    return packages_cache_folder() / "zoo"


def resolve_reference(reference: str, plan: "Plan | None" = None) -> Path:
    """The path of a model or task file of the zoo; the zoo unpacks or trains its family where it is missing.

    `plan` replaces the usual length of training for a family that has to be made. Raises InputError for a name that the
    zoo does not have.
    """
    name = reference.removeprefix(PREFIX)
    kind, _, rest = name.partition("/")
    if name.startswith("smollm2/"):
        from evojax_merge.zoo import smollm2

        return smollm2.resolve_reference(rest)
    if kind in KINDS:
        family: Family = import_module(f"evojax_merge.zoo.{kind}").FAMILY
        return family.resolve_reference(rest)
    if kind == "experts":
        if rest not in EXPERTS:
            raise _unknown(name, [f"experts/{expert}" for expert in EXPERTS], "expert")
        folder = cache_folder() / VERSION / "experts"
        if not folder.is_dir():
            from evojax_merge.zoo.arithmetic import EXPERT_STEPS, make_experts

            write_family(folder, make_experts, sum(EXPERT_STEPS.values()), f"{', '.join(EXPERTS)} of {PREFIX}base")
        return folder / rest
    match = NUMBERED.fullmatch(name)
    if match is None or match[2] not in MODELS + FILES:
        numbered = re.match(r"[0-9]{1,9}/", name)
        raise _unknown(name, [f"{numbered[0] if numbered else ''}{content}" for content in MODELS + FILES])
    folder = cache_folder() / VERSION / ("packaged" if match[1] is None else f"seed-{int(match[1])}")
    if not folder.is_dir():
        from evojax_merge.zoo.arithmetic import PLAN, make_family, unpack_family

        if match[1] is None:
            write_family(folder, unpack_family)
        else:
            seed, plan = int(match[1]), plan or PLAN
            make = partial(make_family, seed=seed, plan=plan)
            write_family(folder, make, sum(plan.steps), f"{', '.join(MODELS)} (seed {seed})")
    return folder / match[2]


def _unknown(name: str, names: Sequence[str], what: str = "model or file") -> InputError:
    """The error for a name that the zoo does not have. names: those of its kind that the zoo has."""
    near = did_you_mean(f"{PREFIX}{name}", [f"{PREFIX}{other}" for other in names])
    return InputError(f"{PREFIX}{name}", f"the zoo has no such {what}{near}")


@dataclass(frozen=True)
class Family:
    """A kind of family, one for each seed, as `zoo:NAME/3/MODEL`; `zoo:NAME/MODEL` belongs to that of seed 0.

    version: of the recipe of the models, which every change of it increases; make: (an empty folder, seed=…) writes the
    models and files of a seed; steps: those of all models' training (`make` then takes a `progress`, see
    `write_family`), 0 for models that come with the package; files: of tasks, beside the models.
    """

    name: str
    version: str
    models: Sequence[str]
    make: Callable[..., None]
    steps: int = 0
    files: Sequence[str] = FILES

    def resolve_reference(self, name: str) -> Path:
        """The path of a model or file, `3/plus` or `plus`; a missing family is written first. Raises InputError for
        another name."""
        match = NUMBERED.fullmatch(name)
        contents = (*self.models, *self.files)
        if match is None or match[2] not in contents:
            raise _unknown(f"{self.name}/{name}", [f"{self.name}/{content}" for content in contents])
        seed = int(match[1] or 0)
        folder = cache_folder() / self.version / f"seed-{seed}"
        if not folder.is_dir():
            what = f"{', '.join(self.models)} ({self.name}, seed {seed})"
            write_family(folder, partial(self.make, seed=seed), self.steps, what)
        return folder / match[2]


def save_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a task file of JSON lines."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    file.write_text("".join(lines), encoding="utf-8")


def write_family(folder: Path, make: Callable[..., None], steps: int = 0, what: str = "") -> None:
    """Have models written into a folder, which takes its name when it is complete; with a progress line where they are
    trained.

    make: (an empty folder) writes the models or, with `steps` of training of all of them together, also takes
    `progress`, a function that receives a model's name, the steps since the last call, and the loss; what: the models,
    in words.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from evojax_merge.system.file_system import atomic_folder

    try:
        if not steps:
            with atomic_folder(folder) as work:
                make(work)
            return
        console = Console(file=sys.stderr)
        console.print(f"zoo: training {what}, once, into {folder}", soft_wrap=True, highlight=False)
        columns = (
            TextColumn("zoo"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with atomic_folder(folder) as work, Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling …", total=steps)

            def advance(model: str, done: int, loss: float) -> None:
                bar.update(task, advance=done, description=f"{model}  loss {loss:.4f}")

            make(work, progress=advance)
    except InputError:
        # Another process may have made the same family meanwhile.
        if not folder.is_dir():
            raise
