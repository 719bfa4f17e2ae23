"""The vision side of a model: an image's features, which stand in the image's positions in front of the decoder.

They depend on the image, the model's processor and its modules outside of the decoder, and on no candidate. The model's
own processor and modules, in transformers and torch, make them once for each image, and the user's cache keeps them.
"""

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from evojax_merge.checkpoints.allowed_classes import check_folder
from evojax_merge.checkpoints.config_file import DECODER_PREFIX, DECODER_PREFIXES
from evojax_merge.checkpoints.decoder_folder import LM_HEAD, DecoderFolder
from evojax_merge.checkpoints.quiet import quiet_transformers
from evojax_merge.checkpoints.writer import PROCESSOR_FILES
from evojax_merge.errors import InputError, library_errors, shown
from evojax_merge.models.images import Grid, GridPositions, ImageTable
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import atomic_file, make_folder
from evojax_merge.tasks.images import EXTRA, RecordImage

# The larger models whose images are computed as transformers computes them. The others read texts alone: their
# positions, masks or layers know of images.
SEEING = (
    "gemma3", "idefics3", "internvl", "llava", "llava_next", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
    "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava",
)  # fmt: skip
# The input of a vision tower that says how many patches an image has in time, height and width, for M-RoPE.
GRID = "image_grid_thw"
# The keys of config.json that name the token of an image's positions.
PLACEHOLDER_KEYS = ("image_token_id", "image_token_index")
# The key of config.json that names the token in an image's place, where it is another than that of its positions.
PLACE_KEY = "boi_token_index"
# The endings of a processor's settings that say who wrote it, and not what it does.
UNCOMPARED = ("_class", "_type", "_name_or_path", "_version", "auto_map", "chat_template")
# A change of what a file of features holds.
FORMAT = "2"


@dataclass(frozen=True)
class Expansion:
    """The text that a processor puts in an image's place, and the number of the image's positions in it. grid: the
    image's in M-RoPE; None: its positions count tokens."""

    text: str
    rows: int
    grid: Grid | None = None


@dataclass(frozen=True)
class Features:
    """An image's features. rows: float32[R, hidden], in front of the decoder (or of the projector, where that is
    merged); deepstack: float32[D, R, hidden], what is added behind each of its first D layers."""

    rows: np.ndarray
    deepstack: np.ndarray


@dataclass(eq=False)
class VisionSide:
    """The vision side of a model. folder: the model; processor: the folder of its processor; placeholder: the text in
    an image's place, token: that of each of its positions; encoded, read: the number of images whose features were
    computed, or read from the cache."""

    folder: DecoderFolder
    processor: Path
    placeholder: str
    token: str
    encoded: int = 0
    read: int = 0

    @cached_property
    def key(self) -> str:
        """The hash of all that features depend on beside the image: config, processor and tensors."""
        import transformers

        config = {name: value for name, value in self.folder.whole.config.items() if name != "text_config"}
        # Where torchvision is installed, processors resize with it, and not quite as Pillow does.
        resizing = transformers.utils.is_torchvision_available()
        # In front of a projector that is merged, other rows.
        place = [] if self.folder.projector is None else ["tower"]
        settings = [FORMAT, transformers.__version__, resizing, config, *place]
        total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for file in processor_files(self.processor):
            total.update(f"{file.name}\n".encode() + file.read_bytes())
        for name, tensor in sorted(self.folder.other_modules.items()):
            total.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            for part in tensor.content():
                total.update(part.data)
        return total.hexdigest()

    def expansion(self, image: RecordImage) -> Expansion:
        """The text in an image's place. Raises InputError where the processor cannot prepare the image."""
        text, inputs = self._prepared(image)
        return Expansion(text, text.count(self.token), self._grid(inputs))

    def _grid(self, inputs: Mapping[str, Any]) -> Grid | None:
        """The grid of an image, by the inputs of the vision tower."""
        if GRID not in inputs:
            return None
        merged = self._config.vision_config.spatial_merge_size
        _, height, width = (int(size) for size in inputs[GRID][0])
        return Grid(height // merged, width // merged)

    @property
    def layers(self) -> int:
        """D, the number of the decoder's layers that an image adds to."""
        return len(getattr(self._config.vision_config, "deepstack_visual_indexes", ()))

    def features(self, image: RecordImage) -> Features:
        """An image's features, from the cache, or computed."""
        stored = self._stored(image)
        if stored is not None:
            self.read += 1
            return stored
        features = self._encoded(image, self._prepared(image)[1])
        self._store(image, features)
        self.encoded += 1
        return features

    def settings(self) -> dict[str, Any]:
        """The processor's settings by their names; those of its parts behind the part's name and a point."""
        return dict(_flat("", self._processor.to_dict()))

    def release(self) -> None:
        """Free the module, which is loaded again where another image needs it."""
        vars(self).pop("_module", None)

    # -----------------------------------------------------------------------------------------------------------
    # The cache

    def _file(self, image: RecordImage) -> Path:
        name = hashlib.sha256(f"{self.key} {image.sha256}".encode()).hexdigest()
        return cache_folder() / "features" / name[:2] / f"{name}.safetensors"

    def _stored(self, image: RecordImage) -> Features | None:
        """An image's features from the cache; None where they are not there, are those of another image, processor or
        tower, or the file is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(image), "numpy") as file:
                if file.metadata() != self._metadata(image):
                    return None
                return Features(file.get_tensor("rows"), file.get_tensor("deepstack"))
        except (OSError, SafetensorError):
            return None

    def _metadata(self, image: RecordImage) -> dict[str, str]:
        return {"image": image.sha256, "vision": self.key}

    def _store(self, image: RecordImage, features: Features) -> None:
        from safetensors.numpy import save_file

        file = self._file(image)
        make_folder(file.parent)
        with atomic_file(file) as work:
            save_file(vars(features), work, self._metadata(image))

    # -----------------------------------------------------------------------------------------------------------
    # transformers

    @cached_property
    def _processor(self) -> Any:
        """The model's processor, whose tokenizer keeps the last text that it was given."""
        path = self.processor
        if not processor_files(path):
            raise InputError(path, "has no processor, which prepares images; expected processor_config.json")
        check_folder(path)
        with _messages_of(path, "its processor cannot be loaded"):
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            processor.tokenizer = _Listener(processor.tokenizer)
        return processor

    def _prepared(self, image: RecordImage) -> tuple[str, dict[str, Any]]:
        """The text in an image's place, and the image as the module takes it."""
        pixels, processor = image.open(), self._processor
        with _messages_of(image.where, f"the processor of {self.processor} cannot prepare it"):
            inputs = processor(text=[self.placeholder], images=[pixels], return_tensors="pt")
        (text,) = processor.tokenizer.texts
        return text, dict(inputs)

    @cached_property
    def _config(self) -> Any:
        path = self.folder.path
        check_folder(path)
        with _messages_of(path, "its config cannot be loaded"):
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)

    @cached_property
    def _module(self) -> Any:
        """The model without its decoder's weights, which no feature depends on."""
        path, config = self.folder.path, copy.deepcopy(self._config)
        with _messages_of(path, "its vision tower cannot be loaded"), quiet_transformers():
            import torch
            from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

            config.text_config.num_hidden_layers, config.text_config.vocab_size = 0, 1
            config.text_config.pad_token_id = None
            tensors = {
                name: torch.from_numpy(np.array(tensor.read(), np.float32))
                for name, tensor in self.folder.vision_tensors.items()
            }
            model, report = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].from_pretrained(
                None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True,
                trust_remote_code=False, use_safetensors=True,
            )  # fmt: skip
        decoder = (DECODER_PREFIXES.get(self.folder.whole.config["model_type"], DECODER_PREFIX), LM_HEAD)
        missing = [name for name in report["missing_keys"] if not name.startswith(decoder)]
        if missing:
            raise InputError(path, f"lacks {min(missing)}; expected all tensors of its config's vision side")
        return model.eval()

    def _encoded(self, image: RecordImage, inputs: dict[str, Any]) -> Features:
        import torch

        # The model below its head names all arguments, such as the sizes of images that are not resized to one.
        model = self._module.base_model
        taken = inspect.signature(model.get_image_features).parameters
        projected: list[Any] = []
        with _messages_of(image.where, f"the vision tower of {self.folder.path} fails on it"), torch.no_grad():
            if self.folder.projector is not None:
                hook = model.multi_modal_projector.register_forward_pre_hook(lambda _, taken: projected.append(*taken))
            output = model.get_image_features(
                **{name: value for name, value in inputs.items() if name in taken}, return_dict=True
            )
            if self.folder.projector is not None:
                hook.remove()
            rows = _rows(projected or output.pooler_output)
            deepstack = [_rows(parts) for parts in getattr(output, "deepstack_features", None) or ()]
        return Features(rows, np.stack(deepstack) if deepstack else np.zeros((0, *rows.shape), np.float32))


def _rows(parts: Sequence[Any]) -> np.ndarray:
    """float32[R, hidden]: an image's parts, one after the other."""
    rows = [part.reshape(-1, part.shape[-1]).float().numpy() for part in parts]
    return np.concatenate(rows)


class _Listener:
    """A tokenizer that keeps the texts of its last call: a processor gives it those that images are expanded in."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, text: Any, *arguments: Any, **options: Any) -> Any:
        self.texts = [text] if isinstance(text, str) else list(text)
        return self._tokenizer(text, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@contextmanager
def _messages_of(where: object, what: str) -> Iterator[None]:
    """Raises the errors of transformers and torch as one line."""
    try:
        import torch  # noqa: F401

        with library_errors(where, what, (ImportError,)):
            yield
    except ModuleNotFoundError as error:
        raise InputError(where, f"images need the package {error.name}; {EXTRA}") from None
    except ImportError as error:
        # transformers' own words about a package that a processor lacks.
        raise InputError(where, f"{what} ({' '.join(str(error).split())[:200]}); {EXTRA}") from None


# ---------------------------------------------------------------------------------------------------------------
# Models that see, in a search


@dataclass(eq=False)
class VisionTokenizer:
    """A larger model's tokenizer, which places images (see `tasks.images`). tokenizer: that of its texts; side: the
    vision side, None where images are refused, for the reason `refusal`; placeholder: the text in an image's place;
    placeholder_id: the token of each of its positions, None where the tokenizer has none; sides: the vision sides of
    all models that are scored, whose processors prepare images alike."""

    tokenizer: Any
    side: VisionSide | None
    refusal: str = ""
    placeholder: str = ""
    placeholder_id: int | None = None
    sides: tuple[VisionSide, ...] = ()
    # By the hash of an image: the image, the text in its place, and its first row among all features.
    _placed: dict[str, tuple[RecordImage, Expansion, int]] = field(default_factory=dict)
    rows: int = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.tokenizer(*arguments, **options)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    @property
    def images(self) -> int:
        """The number of images that were placed."""
        return len(self._placed)

    def expand_images(self, where: str, text: str, images: Sequence[RecordImage]) -> str:
        if self.side is None:
            if images:
                raise InputError(where, f"has an image; {self.refusal}")
            return text
        first, *pieces = text.split(self.placeholder)
        if len(pieces) != len(images):
            raise InputError(
                where, f"its prompt has {_counted(len(pieces), 'place')} for {_counted(len(images), 'image')}; "
                f"expected one {self.placeholder} for each",
            )  # fmt: skip
        return first + "".join(self._place(image)[1].text + piece for image, piece in zip(images, pieces, strict=True))

    def number_images(self, where: str, tokens: Sequence[int], images: Sequence[RecordImage]) -> list[int]:
        rows = iter(row for image in images for row in self._rows_of(image))
        count = sum(token == self.placeholder_id for token in tokens)
        expected = sum(self._place(image)[1].rows for image in images)
        if count != expected:
            raise InputError(
                where, f"has {count:,} positions of images, and the processor leaves {expected:,}; expected a target "
                f"without {self.placeholder}",
            )  # fmt: skip
        return [~next(rows) if token == self.placeholder_id else token for token in tokens]

    @property
    def positions(self) -> GridPositions | None:
        """The positions of the rows of all images that were placed; None where these count tokens."""
        grids = [expansion.grid for _, expansion, _ in self._placed.values()]
        return None if None in grids else GridPositions.of([grid for grid in grids if grid is not None])

    def features(self, side: VisionSide) -> Features:
        """The features of all images that were placed, by a vision side. Raises InputError where it makes others than
        this tokenizer has positions for."""
        parts = []
        for image, expansion, _ in self._placed.values():
            parts.append(side.features(image))
            count = len(parts[-1].rows)
            if count != expansion.rows:
                raise InputError(
                    side.folder.path, f"its vision tower makes {count:,} features of {image.where}, which has "
                    f"{expansion.rows:,} positions; expected models with one processor, which fits their towers",
                )  # fmt: skip
        return Features(
            np.concatenate([part.rows for part in parts]), np.concatenate([part.deepstack for part in parts], axis=1)
        )

    def _place(self, image: RecordImage) -> tuple[RecordImage, Expansion, int]:
        if image.sha256 not in self._placed:
            assert self.side is not None
            for other in () if self._placed else self.sides:
                check_processor(self.side, other)
            expansion = self.side.expansion(image)
            self._placed[image.sha256] = image, expansion, self.rows
            self.rows += expansion.rows
        return self._placed[image.sha256]

    def _rows_of(self, image: RecordImage) -> range:
        _, expansion, first = self._place(image)
        return range(first, first + expansion.rows)


def seeing_tokenizer(tokenizer: Any, folder: DecoderFolder | None) -> Any:
    """A tokenizer that places images, for the larger model in a folder; the tokenizer itself for a decoder alone."""
    if folder is None or not folder.is_part:
        return tokenizer
    config, kind = folder.whole.config, folder.whole.config["model_type"]
    number = next((config[key] for key in PLACEHOLDER_KEYS if config.get(key) is not None), None)
    if number is None:
        from transformers import CONFIG_MAPPING

        number = getattr(CONFIG_MAPPING[kind](), PLACEHOLDER_KEYS[0], None)
    # A text model's tokenizer may have a word under the number.
    added = {str(token_id): token for token_id, token in tokenizer.added_tokens_decoder.items()}
    token = added.get(str(number))
    if token is None:
        refusal = f"the tokenizer of {tokenizer.name_or_path} lacks its token, {shown(number)} in the config.json of "
        return VisionTokenizer(tokenizer, None, f"{refusal}{folder.path}; expected tokenizer_source: that model")
    if kind not in SEEING:
        refusal = f"texts alone are scored with {kind} models; expected {', '.join(SEEING)}, or a record without it"
        return VisionTokenizer(tokenizer, None, refusal, token.content, number)
    place = added.get(str(config.get(PLACE_KEY)), token).content
    side = VisionSide(folder, folder.path, place, token.content)
    return VisionTokenizer(tokenizer, side, "", place, number)


@dataclass(eq=False)
class Vision:
    """The images of a search's tasks in front of its models. tokenizer: has placed the images; kept: the vision side
    that candidates have; sides: those of models, by their folders."""

    tokenizer: VisionTokenizer
    kept: VisionSide
    sides: Mapping[Path, VisionSide]
    _tables: dict[str, ImageTable] = field(default_factory=dict)

    @property
    def files(self) -> set[Path]:
        """The files that the features depend on beside the models' own."""
        sides = self.sides.values() if self.tokenizer.images else ()
        return {file for side in sides for file in processor_files(side.processor)}

    def abstract_table(self, hidden: int, dtype: str, place: Callable[..., Any]) -> ImageTable | None:
        """The images as abstract arrays, which `place` makes; None where there are none."""
        if not self.tokenizer.images:
            return None
        shape = (self.tokenizer.rows, hidden)
        rows, layers = place(shape, jnp.dtype(dtype)), self.kept.layers
        deepstack = place((layers, *shape), jnp.dtype(dtype)) if layers else None
        return ImageTable(rows, deepstack, self.tokenizer.positions)

    def table(self, model: Path | None, dtype: str, put: Callable[..., Any]) -> ImageTable | None:
        """The images on the devices, in front of candidates (None), or of a stored model, which has the features of
        candidates where it has no vision side; None where there are none."""
        if not self.tokenizer.images:
            return None
        side = self.kept if model is None else self.sides.get(model, self.kept)
        if side is not self.kept:
            return self._table(side, dtype, put)
        if dtype not in self._tables:
            self._tables[dtype] = self._table(side, dtype, put)
        return self._tables[dtype]

    def _table(self, side: VisionSide, dtype: str, put: Callable[..., Any]) -> ImageTable:
        features = self.tokenizer.features(side)
        rows, deepstack = (put(part.astype(jnp.dtype(dtype))) for part in (features.rows, features.deepstack))
        return ImageTable(rows, deepstack if len(features.deepstack) else None, self.tokenizer.positions)

    def prepare(self) -> str | None:
        """Compute all features that a search needs and that the cache lacks, and return one line about them; None
        where there are no images."""
        if not self.tokenizer.images:
            return None
        sides = {side.key: side for side in self.sides.values()}.values()
        for side in sides:
            side.encoded = side.read = 0
            self.tokenizer.features(side)
            side.release()
        encoded, read = sum(side.encoded for side in sides), sum(side.read for side in sides)
        return (
            f"images: {self.tokenizer.images:,} ({self.tokenizer.rows:,} positions), {encoded:,} encoded by the vision "
            f"tower, {read:,} read from {cache_folder() / 'features'}"
        )


def check_processor(side: VisionSide, other: VisionSide) -> None:
    """Raises InputError where the processor of another model prepares images in another way, by the first setting that
    differs."""
    if _contents(side.processor) == _contents(other.processor):
        return
    settings, others = side.settings(), other.settings()
    for name in sorted(settings.keys() | others.keys()):
        if settings.get(name) != others.get(name) and not name.endswith(UNCOMPARED):
            raise InputError(
                other.processor, f"its processor's {name} is {shown(others.get(name))}, and that of {side.processor} "
                f"{shown(settings.get(name))}; expected one processor, which prepares the images of all models",
            )  # fmt: skip


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in processor_files(folder)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings in a mapping of mappings, each by its whole name."""
    if not isinstance(value, Mapping):
        # Processors have tuples where their files have lists.
        yield name, list(value) if isinstance(value, tuple) else value
        return
    for key, part in value.items():
        yield from _flat(f"{name}.{key}".removeprefix("."), part)


def vision_of(tokenizer: Any, folders: Sequence[DecoderFolder]) -> Vision | None:
    """The images of tasks in front of models in these folders; None where no images are computed for their
    tokenizer."""
    if not isinstance(tokenizer, VisionTokenizer) or tokenizer.side is None:
        return None
    kept = tokenizer.side
    sides = {
        # A model with an adapter has the processor of no folder of its own.
        folder.path: VisionSide(
            folder, folder.path if processor_files(folder.path) else kept.processor, kept.placeholder, kept.token
        )
        for folder in folders
        if folder.is_part and folder.whole.config["model_type"] in SEEING
    }
    tokenizer.sides = tuple(sides.values())
    return Vision(tokenizer, kept, sides | {kept.folder.path: kept})


def processor_files(folder: Path) -> list[Path]:
    """The files of a folder's processor."""
    return [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
