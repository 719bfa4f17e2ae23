"""Diffusers folders: the components of a pipeline, which of them are merged, and which model gives the others.

A folder has a `model_index.json`, which names a class for each component, and a folder of its own for each.
"""

import inspect
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.allowed_classes import COMPONENTS, check_folder, is_kind, library_class
from evojax_merge.checkpoints.folder import PICKLES, PIPELINE_INDEX, is_float, open_folder, weight_map
from evojax_merge.checkpoints.hints import wrapper_hint
from evojax_merge.checkpoints.json_files import read_json, read_json_object
from evojax_merge.checkpoints.network_checks import check_counts, check_model, check_processor
from evojax_merge.checkpoints.quiet import quiet_diffusers
from evojax_merge.checkpoints.writer import fingerprint
from evojax_merge.errors import InputError, did_you_mean, library_errors, shown
from evojax_merge.system.regular_file import file_inside

INDEX = PIPELINE_INDEX
# The components that are merged where a recipe or a config does not say.
DENOISERS = ("unet", "transformer")
# The word of a component that is merged.
MERGE = "merge"
# Each tokenizer comes from the model that gives its text encoder.
TOKENIZERS = {f"tokenizer{number}": f"text_encoder{number}" for number in ("", "_2", "_3", "_4")}
# The first held-out pictures of a winner and of what it is compared with, in the winner's folder.
SHEET = "contact_sheet.png"
# The component that blackens pictures; its class belongs to a pipeline, and no score asks it.
SAFETY_CHECKER = "safety_checker"
# The endings of a component's files that are copied.
COPIED = {".json", ".txt", ".model", ".jinja", ".safetensors"}
# Keys of configs that say where a component comes from, and nothing of what it is.
ORIGIN = {"_name_or_path", "_diffusers_version", "transformers_version", "_commit_hash"}


@dataclass(frozen=True)
class Pipeline:
    """A diffusers folder, by its index."""

    path: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        return read_json_object(self.path / INDEX, missing="expected a diffusers folder, which save_pretrained writes")

    @cached_property
    def classes(self) -> dict[str, tuple[str, str]]:
        """The library and the class of each component. Raises InputError for an index of another form."""
        classes = {}
        for name, value in self.index.items():
            if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
                continue
            if len(value) != 2 or not all(isinstance(part, str) for part in value):
                raise InputError(self.path / INDEX, f"{name}: {shown(value)}; expected a library and a class")
            if not file_inside(self.path / INDEX, self.path, name, plain=True).is_dir():
                raise InputError(
                    self.path / INDEX, f"{name}: there is no folder {name}/ beside it; expected a whole diffusers "
                    "folder (hf download REPOSITORY --local-dir FOLDER fetches one)",
                )  # fmt: skip
            classes[name] = (value[0], value[1])
        return classes

    @property
    def class_name(self) -> str:
        """The class of the pipeline. Raises InputError where the index names none."""
        name = self.index.get("_class_name")
        if not isinstance(name, str):
            raise InputError(self.path / INDEX, f"_class_name: {shown(name)}; expected the name of diffusers' class")
        return name

    def pipeline_class(self) -> Any:
        """Diffusers' class of the pipeline. Raises InputError where diffusers has none of this name."""
        return library_class(self.path / INDEX, "_class_name", "diffusers", self.class_name, ("DiffusionPipeline",))

    def component_class(self, component: str) -> Any:
        """The class of a component. Raises InputError for one that is not of diffusers or transformers."""
        library, name = self.classes[component]
        kind = library_class(self.path / INDEX, component, library, name, COMPONENTS.get(library, ()))
        if component == "vae" and not hasattr(kind, "decode"):
            raise InputError(self.path / INDEX, f"{component}: {library}.{name}; expected a class that decodes latents")
        return kind

    def files(self, component: str) -> list[Path]:
        """The files of a component: its settings and, of its weights, those that are loaded without a variant."""
        files = [file for file in sorted((self.path / component).rglob("*")) if file.is_file()]
        copied = [file for file in files if file.suffix in COPIED]
        plain, variants = {file.name for file in copied}, set[Path]()
        for file in copied:
            parts = file.name.split(".")
            # The second part may be a variant, such as fp16.
            if len(parts) > 2 and parts[-1] == "safetensors" and ".".join([parts[0], *parts[2:]]) in plain:
                variants.add(file)
        endings = {file.suffix.lower() for file in files}
        if ".safetensors" not in endings and not endings.isdisjoint(PICKLES):
            raise InputError(
                self.path / component, "holds pickle files only, which can run code when they are read; expected "
                "safetensors (save_pretrained writes them)",
            )  # fmt: skip
        return [file for file in copied if file not in variants]

    def variant(self, component: str) -> str | None:
        """The variant, such as fp16, of which alone a component has weights."""
        names = [file.name.split(".") for file in self.files(component) if file.suffix == ".safetensors"]
        return names[0][1].partition("-")[0] if names and len(names[0]) > 2 else None

    def content(self, component: str) -> dict[str, Any]:
        """A component's files by name, in a form that can be compared."""
        contents = {}
        for file in self.files(component):
            try:
                content = read_json(file) if file.suffix == ".json" else fingerprint(file)
            except InputError:
                content = fingerprint(file)
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key not in ORIGIN}
            contents[str(file.relative_to(self.path / component))] = content
        return contents


def open_component(pipeline: Pipeline, name: str, dtype: str | None = None) -> Any:
    """A component by its own class, in a dtype of torch, or in that of its files. Raises InputError for a folder that
    the class does not open, and for one that lacks tensors."""
    import torch

    kind, folder = pipeline.component_class(name), pipeline.path / name
    check_folder(folder)
    library, _ = pipeline.classes[name]
    is_model = is_kind(library, kind, COMPONENTS[library][:1])
    with quiet_diffusers():
        if is_model:
            build = kind.from_config if library == "diffusers" else lambda c: kind(kind.config_class.from_dict(dict(c)))
            check_model(folder, build)
        else:
            check_processor(folder)
            check_counts(folder / "scheduler_config.json")
    if dtype is None and is_model:
        dtypes = [str(entry.dtype) for entry in open_folder(folder).entries.values() if is_float(entry.dtype)]
        dtype = dtypes[0] if dtypes else "float32"
    with quiet_diffusers(), library_errors(folder, f"{kind.__name__} cannot open it"):
        if not is_model:
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        module, report = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            dtype=getattr(torch, dtype or "float32"), output_loading_info=True, variant=pipeline.variant(name),
        )  # fmt: skip
    missing = sorted(report["missing_keys"])
    if missing:
        hint = wrapper_hint(missing, report["unexpected_keys"])
        raise InputError(folder, f"lacks {len(missing)} tensors of {kind.__name__}, such as {missing[0]}{hint}")
    return module.eval()


def open_pipeline(pipeline: Pipeline, given: Mapping[str, Any]) -> Any:
    """The pipeline in float32, with the components that are `given`. Its class gets its components opened: by itself it
    would open pickles, and run files of their folders. Raises InputError where it does not take them."""
    kind = pipeline.pipeline_class()
    taken = inspect.signature(kind.__init__).parameters
    values = dict.fromkeys(kind._optional_components)
    values |= {name: None if isinstance(value, list) else value for name, value in pipeline.index.items()}
    unopened = pipeline.classes.keys() - given.keys() - {SAFETY_CHECKER}
    values |= {name: open_component(pipeline, name, "float32") for name in unopened}
    values |= given
    with quiet_diffusers(), library_errors(pipeline.path, f"{pipeline.class_name} cannot open it"):
        return kind(**{name: value for name, value in values.items() if name in taken})


def is_pipeline(path: Path) -> bool:
    """Return whether a folder is one of diffusers'. Raises InputError for one without its index."""
    if not path.is_dir() or (path / "config.json").exists():
        return False
    if (path / INDEX).exists():
        return True
    parts = [name for name in DENOISERS if (path / name / "config.json").is_file()]
    if parts:
        raise InputError(path, f"has a folder {parts[0]}/ but no {INDEX}; expected a whole diffusers folder")
    return False


@dataclass(frozen=True)
class Components:
    """The components of a merge of pipelines. merged: those that are merged; kept: the others, and the pipeline that
    gives each; notes: lines on what the pipelines do not have in common."""

    pipelines: tuple[Pipeline, ...]
    merged: tuple[str, ...]
    kept: Mapping[str, Pipeline]
    notes: tuple[str, ...]

    @property
    def first(self) -> Pipeline:
        return self.pipelines[0]

    def write_others(self, folder: Path) -> None:
        """Write everything but the merged components' weights."""
        index = dict(self.first.index)
        for name, pipeline in self.kept.items():
            index[name] = pipeline.index[name]
            _copy(pipeline, name, folder, weights=True)
        for name in self.merged:
            _copy(self.first, name, folder, weights=False)
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy(pipeline: Pipeline, component: str, folder: Path, weights: bool) -> None:
    (folder / component).mkdir(exist_ok=True)
    variant = pipeline.variant(component)
    for file in pipeline.files(component):
        is_weights = file.suffix == ".safetensors" or ".safetensors.index." in file.name
        if weights or not is_weights:
            # A variant is a component's only weights: libraries open them by their plain name.
            plain = partial(re.sub, rf"\.{variant}(?=[.-])", "")
            target = folder / component / file.relative_to(pipeline.path / component).with_name(plain(file.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            if target.name != file.name and target.suffix == ".json":
                places = weight_map(file)
                index = read_json_object(file, missing={}) | {"weight_map": {k: plain(v) for k, v in places.items()}}
                target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def choose_components(
    where: str, pipelines: Sequence[Pipeline], references: Sequence[str], wanted: Mapping[str, str]
) -> Components:
    """The components that are merged and kept. references: the pipelines' names in a recipe or config, the first of
    which gives what `wanted` does not name; wanted: a component -> `MERGE`, or one of the references. Raises InputError
    for a component that no pipeline has, and for pipelines that do not fit each other."""
    first = pipelines[0]
    for pipeline in pipelines[1:]:
        if pipeline.class_name != first.class_name:
            raise InputError(
                pipeline.path / INDEX, f"_class_name: {pipeline.class_name}, but {first.class_name} in {first.path}; "
                "expected pipelines of one class",
            )  # fmt: skip
    by_reference = dict(zip(references, pipelines, strict=True))
    component_names = list(dict.fromkeys(name for pipeline in pipelines for name in pipeline.classes))
    for name, value in wanted.items():
        if name not in component_names:
            near = did_you_mean(name, component_names)
            raise InputError(f"{where}.{name}", f"no model has it{near} (they have {', '.join(component_names)})")
        if value != MERGE and value not in by_reference:
            raise InputError(
                f"{where}.{name}", f"{shown(value)}; expected {MERGE}, or one of the models: {', '.join(references)}"
            )
        if value != MERGE and name not in by_reference[value].classes:
            raise InputError(f"{where}.{name}", f"{value} has no such component")
    chosen = dict.fromkeys((name for name in DENOISERS if name in first.classes), MERGE) | dict(wanted)
    for tokenizer, encoder in TOKENIZERS.items():
        if tokenizer in component_names and tokenizer not in chosen and chosen.get(encoder, MERGE) != MERGE:
            chosen[tokenizer] = chosen[encoder]
    merged = tuple(name for name in component_names if chosen.get(name) == MERGE)
    if not merged:
        raise InputError(where, f"none is merged; expected {MERGE} for one of {', '.join(component_names)}")
    for name in merged:
        for pipeline in pipelines:
            if name not in pipeline.classes:
                raise InputError(f"{where}.{name}", f"{pipeline.path} has no such component")
            if all(file.suffix != ".safetensors" for file in pipeline.files(name)):
                what = f"has no weights in {pipeline.path}, so that there is nothing to merge"
                raise InputError(f"{where}.{name}", what)
            if pipeline.classes[name] != first.classes[name]:
                given, expected = (".".join(one.classes[name]) for one in (pipeline, first))
                raise InputError(
                    f"{where}.{name}", f"is a {given} in {pipeline.path}, but a {expected} in {first.path}"
                )
    names = [name for name in component_names if name not in merged and (name in first.classes or name in chosen)]
    kept = {name: by_reference[chosen[name]] if name in chosen else first for name in names}
    return Components(tuple(pipelines), merged, kept, _notes(pipelines, [name for name in kept if name not in chosen]))


def _notes(pipelines: Sequence[Pipeline], names: Sequence[str]) -> tuple[str, ...]:
    """A line for each pipeline whose components, of those that the first gives without being named, are others."""
    first, lines = pipelines[0], []
    for pipeline in pipelines[1:]:
        others = [
            name for name in names
            if name in first.classes and (name not in pipeline.classes or pipeline.content(name) != first.content(name))
        ]  # fmt: skip
        if others:
            kept = "are kept" if len(others) > 1 else "is kept"
            lines.append(
                f"{pipeline.path}: {', '.join(others)}: not as in {first.path}, whose {kept} (components: names another"
                " model)"
            )
    return tuple(lines)
