"""The demo family: tiny models whose weights come with the package, others of the same kind that are trained on the
spot, families of looped models, classifiers, image generators and translators, a vision-language model with a text
model, and a real small model from a package.

References: `zoo:base`, `zoo:maths`, `zoo:japanese` are models, `zoo:search.jsonl` and `zoo:heldout.jsonl` task files;
`zoo:3/base` belongs to the family of seed 3, which is trained first, and `zoo:experts/sums` is one of six more experts
of `zoo:base`, which are trained first as well. `zoo:loops/plus`, `zoo:loops/3/plus` belong to the looped families
(loops). `backend: torch` opens the image classifiers of `zoo:vit/low` (vit), the image generators of `zoo:ddpm/low`
(ddpm) and the translators of `zoo:t5/french` (t5). `zoo:evovlm/vision` belongs to the models of the table-top EvoVLM,
which come with the package (evovlm), `zoo:smollm2/base` to the real model (smollm2). All of them are kept in the user's
cache folder once made.
"""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.system.data_packages import cache_folder as packages_cache_folder

if TYPE_CHECKING:
    from evojax_merge.zoo.arithmetic import Plan

PREFIX = "zoo:"
MODELS = ("base", "maths", "japanese")
FILES = ("search.jsonl", "heldout.jsonl")
# More experts of the packaged base: three of hard sums in English, three that answer in Japanese.
EXPERTS = ("sums", "differences", "both", "easy_sums", "copying", "mixed")
# Kinds of families, each in the module of its name, which has a FAMILY.
KINDS = ("ddpm", "evovlm", "loops", "t5", "vit")
# The version of the training recipe in `arithmetic` and of the packaged weights: each version has a folder of its own.
VERSION = "v3"


def cache_folder() -> Path:
    """The folder in which the zoo keeps the models that it made."""
    return packages_cache_folder() / "zoo"


def resolve_reference(reference: str, plan: "Plan | None" = None) -> Path:
    """The path of a model or task file of the zoo; the zoo unpacks or trains its family where it is missing.

    `plan` replaces the usual length of training for a family that has to be made. Raises InputError for a name that the
    zoo does not have.
    """
    name = reference.removeprefix(PREFIX)
    if name.startswith("smollm2/"):
        from evojax_merge.zoo import smollm2

        return smollm2.resolve_reference(name.removeprefix("smollm2/"))
    if name.partition("/")[0] == "experts":
        return _expert(name.partition("/")[2])
    kind, _, rest = name.partition("/")
    if kind in KINDS:
        family_kind: Family = import_module(f"evojax_merge.zoo.{kind}").FAMILY
        return family_kind.resolve_reference(rest)
    match = re.fullmatch(r"(?:([0-9]{1,9})/)?([^/]+)", name)
    if match is None or match[2] not in MODELS + FILES:
        numbered = re.match(r"[0-9]{1,9}/", name)
        references = [f"{PREFIX}{numbered[0] if numbered else ''}{name_or_file}" for name_or_file in MODELS + FILES]
        raise InputError(f"{PREFIX}{name}", f"the zoo has no such model or file{did_you_mean(reference, references)}")
    if match[1] is None:
        family = cache_folder() / VERSION / "packaged"
        if not family.is_dir():
            from evojax_merge.zoo.arithmetic import unpack_family

            unpack(family, unpack_family)
        return family / match[2]
    seed = int(match[1])
    family = cache_folder() / VERSION / f"seed-{seed}"
    if not family.is_dir():
        from evojax_merge.zoo.arithmetic import Plan, make_family

        plan = plan or Plan()
        make = partial(make_family, seed=seed, plan=plan)
        train_family(family, f"{', '.join(MODELS)} (seed {seed})", plan.steps, make)
    return family / match[2]


def unpack(family: Path, write: Callable[[Path], None]) -> None:
    """Have models that come with the package written; the folder takes its name when it is complete."""
    from evojax_merge.system.file_system import atomic_folder

    try:
        with atomic_folder(family) as work:
            write(work)
    except InputError:
        # Another process may have unpacked it meanwhile.
        if not family.is_dir():
            raise


def _expert(name: str) -> Path:
    """One of the six further experts, which are trained together."""
    if name not in EXPERTS:
        references = [f"{PREFIX}experts/{expert}" for expert in EXPERTS]
        raise InputError(
            f"{PREFIX}experts/{name}",
            f"the zoo has no such expert{did_you_mean(f'{PREFIX}experts/{name}', references)}",
        )
    folder = cache_folder() / VERSION / "experts"
    if not folder.is_dir():
        from evojax_merge.zoo.arithmetic import EXPERT_STEPS, make_experts

        train_family(folder, f"{', '.join(EXPERTS)} of {PREFIX}base", sum(EXPERT_STEPS.values()), make_experts)
    return folder / name


@dataclass(frozen=True)
class Family(ABC):
    """A kind of family, one for each seed, as `zoo:NAME/3/MODEL`; `zoo:NAME/MODEL` belongs to that of seed 0.

    version: of the recipe of the models, which every change of it increases; files: of tasks, beside the models.
    """

    name: str
    version: str
    models: Sequence[str]
    files: Sequence[str] = field(default=FILES, kw_only=True)

    @abstractmethod
    def write(self, family: Path, seed: int) -> None:
        """Write the models and files of a seed into a folder that does not exist."""

    def resolve_reference(self, name: str) -> Path:
        """The path of a model or file, `3/plus` or `plus`; a missing family is written first. Raises InputError for
        another name."""
        match = re.fullmatch(r"(?:([0-9]{1,9})/)?([^/]+)", name)
        contents = (*self.models, *self.files)
        if match is None or match[2] not in contents:
            references = [f"{PREFIX}{self.name}/{name_or_file}" for name_or_file in contents]
            near = did_you_mean(f"{PREFIX}{self.name}/{name}", references)
            raise InputError(f"{PREFIX}{self.name}/{name}", f"the zoo has no such model or file{near}")
        seed = int(match[1] or 0)
        family = cache_folder() / self.version / f"seed-{seed}"
        if not family.is_dir():
            self.write(family, seed)
        return family / match[2]


@dataclass(frozen=True)
class TrainedFamily(Family):
    """A kind of family that is trained on the spot.

    steps: of all models together. make: (an empty folder, seed=…, progress=…) trains the models into the folder, see
    `train_family`.
    """

    steps: int
    make: Callable[..., None]

    def write(self, family: Path, seed: int) -> None:
        what = f"{', '.join(self.models)} ({self.name}, seed {seed})"
        train_family(family, what, self.steps, partial(self.make, seed=seed))


@dataclass(frozen=True)
class PackagedFamily(Family):
    """A kind of family whose models come with the package; the seed draws the examples of its files.

    make: (an empty folder, seed=…) writes models and files into the folder.
    """

    make: Callable[..., None]

    def write(self, family: Path, seed: int) -> None:
        unpack(family, partial(self.make, seed=seed))


def train_family(family: Path, what: str, steps: int, make: Callable[..., None]) -> None:
    """Train models with a visible progress line; the folder takes its name when it is complete.

    what: the models, in words; steps: the steps of all their training. make: (an empty folder, progress=a function that
    receives the model's name, the steps since the last call, and the loss) trains the models into the folder.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from evojax_merge.system.file_system import atomic_folder

    console = Console(file=sys.stderr)
    console.print(f"zoo: training {what}, once, into {family}", soft_wrap=True, highlight=False)
    columns = (
        TextColumn("zoo"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with atomic_folder(family) as work, Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling …", total=steps)

            def advance(model: str, done: int, loss: float) -> None:
                bar.update(task, advance=done, description=f"{model}  loss {loss:.4f}")

            make(work, progress=advance)
    except InputError:
        # Another process may have made the same family meanwhile.
        if not family.is_dir():
            raise
