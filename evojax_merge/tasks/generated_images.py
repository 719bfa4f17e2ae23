"""Tasks of image generators: a user's function scores the pictures that a candidate draws.

Every candidate draws from the same noise, and for the same prompts; held-out examples have noise of their own. The
function gets `(records, images)`, and returns a number for each picture; higher is better.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from evojax_merge.errors import InputError, shown
from evojax_merge.schema import Location, Name, Real, Whole
from evojax_merge.tasks.function import UserFunction, load_function
from evojax_merge.tasks.records import read_file
from evojax_merge.tasks.task import Opening, Place, TaskConfig, TaskDefaults, TaskKind

Inputs = Literal["images", "latents"]
# The seed of a record's noise, where it names one.
SEED = "seed"
# The largest seed of a random number generator of torch.
MAX_SEED = 2**63 - 1


class ImageGenerationConfig(TaskConfig):
    """A task of image generators: a function scores the pictures that are drawn for prompts, or without any."""

    kind: Literal["image_generation"] = Field(description="the kind of task")
    function: Location = Field(description="FILE.py:NAME or module:name, a function (records, images) -> float[N]")
    inputs: Inputs = Field("images", description="images: float32[N, H, W, C] from 0 to 1; latents: before the decoder")
    file: Location | None = Field(None, description="JSONL, CSV or parquet of prompts; none: pictures without prompts")
    prompt: Name = Field("prompt", description="the field of the prompt")
    images: Whole = Field(64, ge=2, le=1_000_000, description="without a file: how many pictures are drawn")
    steps: Whole | None = Field(None, ge=1, le=10_000, description="of denoising; default: the pipeline's")
    guidance: Real | None = Field(None, ge=0.0, le=1000.0, description="the guidance scale; default: the pipeline's")
    height: Whole | None = Field(None, ge=1, le=8192, description="of the pictures; default: the pipeline's")
    width: Whole | None = Field(None, ge=1, le=8192, description="of the pictures; default: the pipeline's")
    batch: Whole = Field(8, ge=1, le=1024, description="how many pictures are drawn together")


@dataclass(frozen=True)
class ImageTask(TaskDefaults):
    """A task of image generators. records: of all examples, each with its prompt (None: the generator takes none) and
    the seed of its noise; indices: the numbers of those that the task has; settings: the pipeline's arguments by
    diffusers' names; section: the task's place in the config."""

    kind: ClassVar[str] = "image_generation"
    backend: ClassVar[str] = "torch"
    metric: ClassVar[str] = "score"

    name: str
    weight: float
    records: tuple[Mapping[str, Any], ...]
    prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    places: tuple[Place, ...]
    indices: tuple[int, ...]
    function: UserFunction
    inputs: Inputs
    settings: Mapping[str, Any]
    batch: int
    files: tuple[Path, ...]
    section: str
    source: Path | None

    @property
    def size(self) -> int:
        return len(self.indices)

    def subset(self, examples: Sequence[int]) -> "ImageTask":
        return replace(self, indices=tuple(self.indices[i] for i in examples))

    def contents(self) -> Sequence[tuple[Hashable, Place]]:
        return [((self.prompts[i], self.seeds[i]), self.places[i]) for i in self.indices]

    def paths(self) -> dict[str, str]:
        file = {} if self.source is None else {"file": str(self.source)}
        return {"function": self.function.place, **file}

    def failure_hint(self) -> str:
        return f"Look at what the function of task {self.name} returns"


def open_images(config: ImageGenerationConfig, opening: Opening) -> ImageTask:
    """The task on the prompts of one source. Raises InputError for a fault of the config, the function or the file."""
    where = opening.where
    function = load_function(f"{where}.function", config.function, config.inputs, opening.folder)
    settings = {
        "num_inference_steps": config.steps, "guidance_scale": config.guidance, "height": config.height,
        "width": config.width,
    }  # fmt: skip
    if config.file is None:
        if opening.heldout is not None:
            raise InputError(f"{where}.heldout", "is given without `file`; give a share, such as 0.5")
        records: list[dict[str, Any]] = [{} for _ in range(config.images)]
        places: list[Place] = [(f"{where}: picture {number}", 0) for number in range(config.images)]
        prompts: list[str | None] = [None] * config.images
        file = None
    else:
        if config.images != ImageGenerationConfig.model_fields["images"].default:
            raise InputError(f"{where}.images", "is for pictures without prompts; a file has a picture for each line")
        file = opening.file(*opening.source("file", config.file))
        read = read_file(file)
        records = [dict(record.fields) for record in read]
        places = [(str(file), record.line) if record.line else (record.where, 0) for record in read]
        prompts = [_prompt(record, config.prompt) for record in read]
    # A second source of examples has noise of its own.
    drawn = np.random.SeedSequence([opening.seed, opening.heldout is not None]).generate_state(len(records), np.uint32)
    seeds = [
        _seed(record, place, int(number)) for record, place, number in zip(records, places, drawn, strict=True)
    ]  # fmt: skip
    records = [record | {SEED: seed} for record, seed in zip(records, seeds, strict=True)]
    return ImageTask(
        config.name, config.weight, tuple(records), tuple(prompts), tuple(seeds), tuple(places),
        tuple(range(len(records))), function, config.inputs,
        {name: value for name, value in settings.items() if value is not None}, config.batch,
        (*([] if file is None else [file]), *function.files), where, file,
    )  # fmt: skip


def _prompt(record: Any, name: str) -> str:
    prompt = record.fields.get(name)
    if not isinstance(prompt, str):
        what = shown(prompt) if name in record.fields else "missing"
        raise InputError(record.where, f"{name}: {what}; expected the text of a prompt")
    return prompt


def _seed(record: Mapping[str, Any], place: Place, drawn: int) -> int:
    seed = record.get(SEED, drawn)
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        where = f"{place[0]}:{place[1]}" if place[1] else place[0]
        raise InputError(where, f"{SEED}: {shown(seed)}; expected a whole number, 0 or more")
    return seed


IMAGE_GENERATION = TaskKind(ImageGenerationConfig, open_images, source="file")
