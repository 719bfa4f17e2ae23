"""Models whose weights are made while they are read, from files that are no Hugging Face model folder by themselves.

`base+adapter` (mergekit's notation), an adapter alone, whose base its config names, a GGUF file, a quantised folder and
an image generator, in a folder or in a single file, with a LoRA are such models. Each such model has a folder in the
user's cache, with everything but weights (config and tokenizer: links to the base's or the adapter's, or made of the
GGUF file), and with a file `SOURCES` that names the files that the weights are made of. All other code handles this
folder like any other model's; messages name the original files.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from evojax_merge.checkpoints.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    is_adapter,
    open_adapted,
    read_adapter_config,
)
from evojax_merge.checkpoints.bitsandbytes import dequantise_bitsandbytes
from evojax_merge.checkpoints.compressed_tensors import dequantise_compressed_tensors
from evojax_merge.checkpoints.config_file import check_unquantised
from evojax_merge.checkpoints.decoder_folder import decoder_of, with_embedding
from evojax_merge.checkpoints.folder import DTYPES, INDEX_FILE, SMALL_FILES, Folder, file_hash, open_folder
from evojax_merge.checkpoints.fp4 import dequantise_modelopt, dequantise_mxfp4
from evojax_merge.checkpoints.fp8 import dequantise_fp8
from evojax_merge.checkpoints.generator_lora import lora_file, open_with_lora, write_fused
from evojax_merge.checkpoints.gguf_file import (
    SUFFIX,
    TENSORS,
    gguf_files,
    named_tensors,
    open_gguf,
    read_gguf,
    write_config,
    write_tensor_table,
    write_tokenizer,
)
from evojax_merge.checkpoints.gptq import dequantise_auto_round, dequantise_awq, dequantise_gptq
from evojax_merge.checkpoints.hints import inner_folder
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.mlx import WITH_WORDS, dequantise_mlx
from evojax_merge.checkpoints.pipelines import is_pipeline
from evojax_merge.checkpoints.quantised import QuantisedFolder, check_no_parts, dequantised_config, quantisation
from evojax_merge.checkpoints.references import local_path, resolve, split_revision
from evojax_merge.checkpoints.tokens import TOKENIZER_FILES, has_tokenizer, load_tokenizer
from evojax_merge.checkpoints.writer import MARKER
from evojax_merge.errors import InputError, name_in_messages, print_warning, shown
from evojax_merge.models.config_keys import TEXTS
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import atomic_folder, remove_file, remove_link

SOURCES = "evojax_merge_sources.json"
# The version of these folders' content: every change of the content increases it.
VERSION = 6
EMPTY: Mapping[str, Path] = MappingProxyType({})
SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class ModelSources:
    """The sources of a model's weights, as the file `SOURCES` has them. kind: a key of `KINDS`, empty where the weights
    lie in the model's folder as they are; paths: the absolute paths that the weights are made of."""

    kind: str
    paths: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The reference that names the model in recipes and configs on this machine."""
        return "+".join(map(reference_to, map(Path, self.paths))) if self.kind else self.paths[0]

    @property
    def adapted(self) -> tuple[Path, Path] | None:
        """The base of a model that an adapter or a LoRA changes, and the adapter's folder or file; None for others."""
        return (Path(self.paths[0]), Path(self.paths[1])) if self.kind in ADAPTED else None


# Folders of integers, whose config may name no dtype.
_INTEGERS = partial(QuantisedFolder, default_dtype="float16", dtypes=DTYPES, unused=())
# By the quant_method that a quantised folder's config names: (the folder's path) -> the quantised folder, and the
# function that exchanges its matrices.
QUANTISED: dict[str, tuple[Callable[[Path], QuantisedFolder], Callable[[QuantisedFolder], None]]] = {
    "auto-round": (_INTEGERS, dequantise_auto_round),
    "awq": (_INTEGERS, dequantise_awq),
    "bitsandbytes": (_INTEGERS, dequantise_bitsandbytes),
    "compressed-tensors": (QuantisedFolder, dequantise_compressed_tensors),
    "fbgemm_fp8": (QuantisedFolder, dequantise_fp8),
    "fp8": (QuantisedFolder, dequantise_fp8),
    "gptq": (_INTEGERS, dequantise_gptq),
    "mlx": (partial(QuantisedFolder, dtypes=WITH_WORDS, unused=()), dequantise_mlx),
    "modelopt": (QuantisedFolder, dequantise_modelopt),
    "mxfp4": (QuantisedFolder, dequantise_mxfp4),
}


def _open_quantised(path: Path, paths: Sequence[Path], method: str) -> Folder:
    make, dequantise = QUANTISED[method]
    quantised = make(paths[0])
    dequantise(quantised)
    check_no_parts(quantised.entries, method)
    return Folder(path, quantised.entries)


# (the folder that stands for the model, the paths that its weights are made of) -> the opened model.
KINDS: dict[str, Callable[[Path, Sequence[Path]], Folder]] = {
    "adapter": lambda path, paths: open_adapted(path, open_model(paths[0]), paths[1]),
    "gguf": lambda path, paths: open_gguf(path, *paths),
    # A diffusers folder, whose components are opened one by one.
    "lora": lambda path, paths: open_folder(path),
    # The checkpoint's own path says that the model is a single file.
    "single-file lora": lambda path, paths: open_with_lora(*paths),
    **{method: partial(_open_quantised, method=method) for method in QUANTISED},
}

# The kinds of a base with an adapter.
ADAPTED = ("adapter", "lora", "single-file lora")


def sources_of(path: Path) -> ModelSources:
    """The sources of a model's weights. Reads the file of the folders that `_stand_in` makes, and of no other: models
    that strangers' stores hold lie in the cache as well. Raises InputError for a damaged file."""
    document = read_json_object(path / SOURCES, missing={}) if path.parent == _stand_ins() else {}
    if not document:
        return ModelSources("", (str(path),))
    kind, paths = document.get("kind"), document.get("paths")
    if not (isinstance(kind, str) and kind in KINDS and TEXTS.accepts(paths)):
        raise InputError(path / SOURCES, "damaged; expected a file that evojax-merge wrote; remove its folder")
    return ModelSources(kind, tuple(document["paths"]))


def open_model(path: Path) -> Folder:
    """Open a model by its headers. Raises InputError as `open_folder` does, where sources do not fit each other, where
    there is no tensor, and where parts of quantised matrices are left."""
    sources = sources_of(path)
    folder = KINDS[sources.kind](path, list(map(Path, sources.paths))) if sources.kind else open_folder(path)
    if not folder.entries:
        raise InputError(path, "has no tensor; expected the weights of a model")
    if not sources.kind and folder.config:
        check_no_parts(folder.entries, None)
    return with_embedding(folder)


def reference_to(path: Path) -> str:
    """The reference that names the model of this folder in recipes and configs: the folder, or the sources of its
    weights."""
    return sources_of(path).reference


def parts_of(path: Path) -> list[Path]:
    """The files and folders that a model is made of: its own folder, where its weights lie there."""
    sources = sources_of(path)
    return [part for source in sources.paths for part in parts_of(Path(source))] if sources.kind else [path]


def input_files(path: Path) -> set[Path]:
    """The files that scores of a model depend on: weights, config, tokenizer and chat templates."""
    names = ("config.json", "generation_config.json", ADAPTER_CONFIG, *TOKENIZER_FILES)
    parts, patterns = parts_of(path), ("*.safetensors", "chat_templates/*.jinja")
    files = {part / name for part in parts for name in names if (part / name).is_file()}
    files |= {file for part in parts for pattern in patterns for file in part.glob(pattern)}
    return files | {file for part in parts if part.is_file() for file in gguf_files(part)}


# ---------------------------------------------------------------------------------------------------------------
# References


class Find(Protocol):
    """(where, reference, the folder that relative paths start in) -> the file or folder of a model; without `weights`,
    a model that is not on this machine may lack its weights."""

    def __call__(self, where: object, reference: str, relative_to: Path, *, weights: bool = True) -> Path: ...


class FindModel(Protocol):
    """A function like `resolve_model`, with a `find` of its own."""

    def __call__(
        self,
        where: object,
        reference: str,
        relative_to: Path,
        *,
        made: Mapping[str, Path] = EMPTY,
        weights: bool = True,
    ) -> Path: ...


def resolve_model(
    where: object,
    reference: str,
    relative_to: Path,
    find: Find = resolve,
    made: Mapping[str, Path] = EMPTY,
    weights: bool = True,
) -> Path:
    """The folder of a model, which `reference` names by a name that `find` takes, by `base+adapter`, or by an adapter
    whose config names its base. `find` may return a GGUF file. Without `weights`: a folder with the model's tokenizer;
    which one a model with an adapter has, depends on weights.

    `find` also resolves the names around a +; a local folder whose own name has a + comes first. `where`: the place of
    the reference, for messages; made: names that stand for folders of this process, before any others. Raises
    InputError where a model cannot be found; opening a base and an adapter shows whether they fit each other.
    """

    def exists(name: str) -> bool:
        return name in made or local_path(name, relative_to) is not None

    base, adapter = split_reference(reference, exists)
    if not weights and adapter is None:
        model = made[base] if base in made else find(where, base, relative_to, weights=False)
        if not is_adapter(model):
            return _as_folder(model) if model.is_file() else model
    if adapter is not None:
        where = f"{where}: {reference}"
        several = [name for name in (base, adapter) if "+" in name and not exists(name)]
        if several:
            raise InputError(
                where, f"{several[0]}: no such folder; expected one adapter behind a base (of several, merge the first "
                "by a document of its own with a name, and say NAME+ADAPTER)",
            )  # fmt: skip
    model = made[base] if base in made else find(where, base, relative_to)
    if adapter is not None:
        if is_adapter(model):
            raise InputError(where, f"{base} is an adapter; expected a model before the +")
        is_file = model.is_file() and model.suffix == SAFETENSORS
        if is_file or is_pipeline(model):
            lora = lora_file(str(where), find(where, adapter, relative_to))
            sources = ModelSources("single-file lora" if is_file else "lora", (str(model), str(lora)))
            if is_file:
                return _stand_in(sources, f"{model.stem}+{lora.stem}", [], lambda folder: None)
            # With the changed components' weights, and links.
            files = [*(file for file in sorted(model.rglob("*")) if file.is_file()), lora]
            state = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            write = partial(write_fused, str(where), model, lora)
            return _stand_in(sources, f"{model.name}+{lora.stem}", state, write)
        base_folder, folder = _as_folder(model), find(where, adapter, relative_to)
        if not (folder / ADAPTER_CONFIG).is_file():
            inside = inner_folder(folder, ADAPTER_CONFIG)
            advice = "expected an adapter as peft saves it" if inside is None else f"did you mean {base}+{inside}?"
            raise InputError(where, f"{adapter}: holds no {ADAPTER_CONFIG}; {advice}")
        return _with_adapter(base_folder, folder)
    if not is_adapter(model):
        if (model / ADAPTER_CONFIG).is_file() and (model / ADAPTER_FILE).exists():
            print_warning(
                f"{model}: holds an adapter beside its weights, which is not applied; {base}+{base} applies it"
            )
        return _as_folder(model)
    named = read_adapter_config(model).base
    if named is None:
        raise InputError(
            model / ADAPTER_CONFIG, "base_model_name_or_path: missing; name the base yourself, as base+adapter"
        )
    try:
        named_base = find(f"{model / ADAPTER_CONFIG}: base_model_name_or_path", named, model)
    except InputError as error:
        raise InputError(error.where, f"{error.what}; or name the base yourself, as BASE+{model.name}") from None
    if is_adapter(named_base):
        raise InputError(model / ADAPTER_CONFIG, f"base_model_name_or_path: {named} is an adapter; expected a model")
    return _with_adapter(_as_folder(named_base), model)


def split_reference(reference: str, is_known: Callable[[str], bool]) -> tuple[str, str | None]:
    """The base and the adapter that a reference names; None without an adapter. Several + are split at the one with
    most known names around it."""
    places = [i for i, character in enumerate(reference) if character == "+" and 0 < i < len(reference) - 1]
    if not places or is_known(reference):
        return reference, None
    pairs = [(reference[:i], reference[i + 1 :]) for i in places]
    return max(pairs, key=lambda pair: sum(map(is_known, pair)))


def ignored_revisions(references: Iterable[str | None], relative_to: Path) -> list[str]:
    """Warnings, a line each, about references that name revisions of local folders. Every model has `main`, so that
    revision needs no warning."""

    def is_local(name: str) -> bool:
        return local_path(name, relative_to) is not None

    parts = [part for reference in references for part in split_reference(reference or "", is_local) if part]
    lines = []
    for part in dict.fromkeys(parts):
        name, revision = split_revision(part)
        if revision not in (None, "main") and not is_local(part) and is_local(name):
            lines.append(f"{part}: {name} is a folder here, which has no revisions; {revision} is ignored")
    return lines


def _with_adapter(base: Path, adapter: Path) -> Path:
    """The folder that stands for a base with an adapter: with links to the base's files that are no weights, and to the
    adapter's of a tokenizer in place of the base's where its tokens have rows in the model."""
    files, sources = _small_files(base), ModelSources("adapter", (str(base), str(adapter)))
    stand_in = partial(_stand_in, sources, f"{base.name}+{adapter.name}")
    beside = _small_files(adapter).items()
    of_adapter = {name: file for name, file in beside if _is_of_tokenizer(name) and os.path.exists(file)}
    if of_adapter:
        # A chat template by itself goes with the base's tokenizer.
        is_whole = has_tokenizer(adapter)
        kept = {name: file for name, file in files.items() if not (is_whole and _is_of_tokenizer(name))}
        states = [(name, os.stat(file).st_size, os.stat(file).st_mtime_ns) for name, file in sorted(of_adapter.items())]
        folder = stand_in([sorted(kept), states], partial(_link, kept | of_adapter))
        if _tokens_have_rows(folder, base, adapter):
            return folder
    return stand_in(sorted(files), partial(_link, files))


def _is_of_tokenizer(name: str) -> bool:
    return name in (*TOKENIZER_FILES, "chat_templates") or name.endswith((".model", ".tiktoken"))


@cache
def _tokens_have_rows(folder: Path, base: Path, adapter: Path) -> bool:
    """Return whether the tokenizer of an adapted model has no token beyond the rows of the model's embedding. Warns
    where it has, or cannot be loaded, once in a process."""
    # That module opens models by this one.
    from evojax_merge.checkpoints.parents import Sources

    try:
        sources = Sources((decoder_of(open_model(folder)),))
        rows = sources.shape(0, sources.token_tensors.embedding)[0]
    except (InputError, LookupError):
        # Whoever opens the model says what is wrong with it.
        return False
    try:
        numbers = load_tokenizer(folder).get_vocab()
    except InputError as error:
        print_warning(f"{error}; the tokenizer of {base} is used in place of that of {adapter}: repair or remove it")
        return False
    last = max(numbers, key=numbers.__getitem__, default="")
    if numbers.get(last, -1) < rows:
        return True
    print_warning(
        f"{adapter}: its tokenizer gives {shown(last)} the number {numbers[last]:,}, but the adapted model has "
        f"{rows:,} rows; the tokenizer of {base} is used; save the adapter with the embedding that was resized for it "
        "(peft's save_embedding_layers=True), or remove its tokenizer"
    )
    return False


def _small_files(model: Path) -> dict[str, str]:
    """The files of a model's folder that are no weights, by name."""
    patterns = (*SMALL_FILES, "chat_templates", "*.tiktoken")
    files = {file.name: str(file) for pattern in patterns for file in model.glob(pattern)}
    excluded = {INDEX_FILE, MARKER, SOURCES, TENSORS, ADAPTER_CONFIG}
    return {name: file for name, file in files.items() if name not in excluded}


def _link(files: Mapping[str, str], folder: Path) -> None:
    for name, file in files.items():
        os.symlink(file, folder / name)


def _as_folder(model: Path) -> Path:
    """The folder that stands for a GGUF file or a quantised folder; any other folder itself. Raises InputError for an
    unknown quantisation."""
    if model.is_file() and model.suffix == SUFFIX:

        def write_gguf(folder: Path) -> None:
            file = read_gguf(model)
            write_config(file, folder)
            write_tokenizer(file, folder)
            write_tensor_table(named_tensors(file, folder / "config.json"), folder)

        state = [number for file in map(Path.stat, gguf_files(model)) for number in (file.st_size, file.st_mtime_ns)]
        return _stand_in(ModelSources("gguf", (str(model),)), model.stem, state, write_gguf)
    method = quantisation(model).get("quant_method")
    if not isinstance(method, str) or method not in QUANTISED:
        # Checked before the tensors are read, which may have dtypes that only the quantisation's method explains.
        check_unquantised(model / "config.json", read_json_object(model / "config.json", missing={}))
        return model
    files, config = _small_files(model), dequantised_config(model)
    del files["config.json"]

    def write(folder: Path) -> None:
        _link(files, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return _stand_in(ModelSources(method, (str(model),)), model.name, [sorted(files), config], write)


def _stand_in(sources: ModelSources, name: str, state: Any, write: Callable[[Path], None]) -> Path:
    """The folder in the cache that stands for a model of these sources in this state: written where it is missing or
    damaged. Messages name the files that the folder's files are made of."""
    key = hashlib.sha256(json.dumps([VERSION, asdict(sources), state]).encode()).hexdigest()
    short = name.encode()[:80].decode(errors="ignore")
    folder = _stand_ins() / f"{short}-{key[:16]}"
    # Something else has the folder's name.
    remove_link(folder)
    remove_file(folder)
    try:
        document = read_json_object(folder / SOURCES, missing={})
        is_intact = document == json.loads(json.dumps({**asdict(sources), "files": _contents(folder)}))
    except (InputError, OSError):
        is_intact = False
    if not is_intact:
        is_damaged = folder.is_dir()
        try:
            with atomic_folder(folder, overwrite=is_damaged) as work:
                write(work)
                document = {**asdict(sources), "files": _contents(work)}
                (work / SOURCES).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except InputError:
            # Another process may have made it meanwhile.
            if is_damaged or not folder.is_dir():
                raise
    source = Path(sources.paths[0])
    name_in_messages(folder, sources.reference)
    for file in folder.iterdir():
        made_of = os.readlink(file) if file.is_symlink() else source / file.name if source.is_dir() else source
        name_in_messages(file, made_of)
    return folder


def _stand_ins() -> Path:
    return cache_folder() / "models"


def _contents(folder: Path) -> dict[str, str]:
    """The files below a folder by name: the targets of links, and the hashes of all other files."""
    return {
        file.relative_to(folder).as_posix(): f"-> {os.readlink(file)}" if file.is_symlink() else file_hash(file)
        for file in sorted(folder.rglob("*"))
        if file.name != SOURCES and (file.is_symlink() or file.is_file())
    }
