"""Tasks of image generators: a user's function scores the pictures that a candidate draws, or people compare them.

Every candidate draws from the same noise, and for the same prompts; held-out examples have noise of their own. The
function gets `(records, images)`, and returns a number for each picture; higher is better. For votes see
`tasks.voting`.
"""

import io
import re
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from evojax_merge.errors import InputError, shown
from evojax_merge.schema.section import Location, Name, Real, Text, Whole
from evojax_merge.tasks.function import UserFunction, load_function
from evojax_merge.tasks.images import open_image
from evojax_merge.tasks.records import read_file
from evojax_merge.tasks.task import Opening, Place, TaskConfig, TaskDefaults, TaskKind
from evojax_merge.tasks.voting import METRIC, VotesConfig, Voting, voting_of

Inputs = Literal["images", "latents"]
# The seed of a record's noise, where it names one.
SEED = "seed"
# The largest seed of a random number generator of torch.
MAX_SEED = 2**63 - 1


class DrawingConfig(TaskConfig):
    """The keys of tasks whose pictures are drawn for prompts, or without any."""

    file: Location | None = Field(None, description="JSONL, CSV or parquet of prompts; none: pictures without prompts")
    prompt: Name = Field("prompt", description="the field of the prompt")
    images: Whole = Field(64, ge=2, le=1_000_000, description="without a file: how many pictures are drawn")
    steps: Whole | None = Field(None, ge=1, le=10_000, description="of denoising; default: the pipeline's")
    guidance: Real | None = Field(None, ge=0.0, le=1000.0, description="the guidance scale; default: the pipeline's")
    height: Whole | None = Field(None, ge=1, le=8192, description="of the pictures; default: the pipeline's")
    width: Whole | None = Field(None, ge=1, le=8192, description="of the pictures; default: the pipeline's")
    batch: Whole = Field(8, ge=1, le=1024, description="how many pictures are drawn together")


class ImageGenerationConfig(DrawingConfig):
    """A task of image generators: a function scores the pictures."""

    kind: Literal["image_generation"] = Field(description="the kind of task")
    function: Location = Field(description="FILE.py:NAME or module:name, a function (records, images) -> float[N]")
    inputs: Inputs = Field("images", description="images: float32[N, H, W, C] from 0 to 1; latents: before the decoder")


class HumanImagesConfig(VotesConfig, DrawingConfig):
    """A task of image generators whose pictures people compare, or a function in their place."""

    kind: Literal["human_images"] = Field(description="the kind of task")
    question: Text = Field("Which picture is better?", description="what a judge is asked about two pictures")


@dataclass(frozen=True)
class DrawingTask(TaskDefaults):
    """A task of image generators. records: of all examples, each with its prompt (None: the generator takes none) and
    the seed of its noise; indices: the numbers of those that the task has; settings: the pipeline's arguments by
    diffusers' names; section: the task's place in the config."""

    backend: ClassVar[str] = "torch"
    by_example: ClassVar[tuple[str, ...]] = ("indices",)

    name: str
    weight: float
    records: tuple[Mapping[str, Any], ...]
    prompts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    places: tuple[Place, ...]
    indices: tuple[int, ...]
    settings: Mapping[str, Any]
    batch: int
    section: str
    source: Path | None
    inputs: Inputs

    @property
    def files(self) -> tuple[Path, ...]:
        return () if self.source is None else (self.source,)

    def contents(self) -> Sequence[tuple[Hashable, Place]]:
        return [((self.prompts[i], self.seeds[i]), self.places[i]) for i in self.indices]

    def paths(self) -> dict[str, str]:
        return {} if self.source is None else {"file": str(self.source)}


@dataclass(frozen=True)
class ImageTask(DrawingTask):
    """A task of image generators whose pictures, or latents, a user's function scores."""

    kind: ClassVar[str] = "image_generation"
    metric: ClassVar[str] = "score"

    function: UserFunction

    @property
    def files(self) -> tuple[Path, ...]:
        return (*super().files, *self.function.files)

    def paths(self) -> dict[str, str]:
        return {"function": self.function.place} | super().paths()

    def failure_hint(self) -> str:
        return f"Look at what the function of task {self.name} returns"


class Pictures:
    """The pictures that a process has drawn, as PNG files in a folder that ends with it, by their digests."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, pixels: np.ndarray) -> str:
        """Keep a picture, float[H, W, C] from 0 to 1, and return its name."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="evojax-merge-pictures-")
        content = png_of(pixels)
        name = sha256(content).hexdigest()[:32]
        path = Path(self._folder.name) / name
        if not path.exists():
            path.write_bytes(content)
        return name

    def read(self, name: str) -> bytes | None:
        """The PNG file of a picture; None: none has the name."""
        if self._folder is None or not re.fullmatch(r"[0-9a-f]{32}", name):
            return None
        path = Path(self._folder.name) / name
        return path.read_bytes() if path.exists() else None


def picture_of(pixels: np.ndarray) -> Any:
    """Pixels, float[H, W, C] from 0 to 1, as Pillow's image."""
    from PIL import Image

    levels = (np.clip(np.nan_to_num(pixels), 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def png_of(pixels: np.ndarray) -> bytes:
    """A picture, float[H, W, C] from 0 to 1, as a PNG file."""
    content = io.BytesIO()
    picture_of(pixels).save(content, "PNG")
    return content.getvalue()


@dataclass(frozen=True)
class HumanImageTask(DrawingTask):
    """A task of image generators whose metric, `preference`, comes from votes on the pictures."""

    kind: ClassVar[str] = "human_images"
    metric: ClassVar[str] = METRIC
    shows_pictures: ClassVar[bool] = True

    voting: Voting
    pictures: Pictures = field(default_factory=Pictures, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        return (*super().files, *self.voting.files)

    def prompt(self, example: int) -> str:
        return self.prompts[self.indices[example]] or ""

    def record(self, example: int) -> dict[str, Any]:
        return dict(self.records[self.indices[example]])

    def content(self, answer: str) -> np.ndarray:
        file = self.pictures.read(answer)
        assert file is not None
        pixels = np.asarray(open_image(answer, file), np.float32) / 255
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def picture(self, name: str) -> bytes | None:
        return self.pictures.read(name)

    def paths(self) -> dict[str, str]:
        return super().paths() | self.voting.paths


def _drawn(config: DrawingConfig, opening: Opening) -> dict[str, Any]:
    """The fields of a DrawingTask on the prompts of one source. Raises InputError for a fault of config or file."""
    where = opening.where
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
        if config.images != DrawingConfig.model_fields["images"].default:
            raise InputError(f"{where}.images", "is for pictures without prompts; a file has a picture for each line")
        file = opening.file(*opening.source("file", config.file))
        read = read_file(file)
        records = [dict(record.fields) for record in read]
        places = [(str(file), record.line) if record.line else (record.where, 0) for record in read]
        prompts = [record.fields.get(config.prompt) for record in read]
        for record, prompt in zip(read, prompts, strict=True):
            if not isinstance(prompt, str):
                what = shown(prompt) if config.prompt in record.fields else "missing"
                raise InputError(record.where, f"{config.prompt}: {what}; expected the text of a prompt")
    # A second source of examples has noise of its own.
    drawn = np.random.SeedSequence([opening.seed, opening.heldout is not None]).generate_state(len(records), np.uint32)
    seeds = [record.get(SEED, int(number)) for record, number in zip(records, drawn, strict=True)]
    for seed, (source, line) in zip(seeds, places, strict=True):
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            what = f"{SEED}: {shown(seed)}; expected a whole number, 0 or more"
            raise InputError(f"{source}:{line}" if line else source, what)
    return {
        "name": config.name, "weight": config.weight,
        "records": tuple(record | {SEED: seed} for record, seed in zip(records, seeds, strict=True)),
        "prompts": tuple(prompts), "seeds": tuple(seeds), "places": tuple(places),
        "indices": tuple(range(len(records))), "batch": config.batch, "section": where, "source": file,
        "settings": {name: value for name, value in settings.items() if value is not None},
    }  # fmt: skip


KINDS = (
    TaskKind(
        ImageGenerationConfig,
        lambda config, opening: ImageTask(
            function=load_function(f"{opening.where}.function", config.function, config.inputs, opening.folder),
            inputs=config.inputs,
            **_drawn(config, opening),
        ),
        source="file",
    ),
    TaskKind(
        HumanImagesConfig,
        lambda config, opening: HumanImageTask(
            **_drawn(config, opening), inputs="images", voting=voting_of(config, opening)
        ),
        source="file",
    ),
)
