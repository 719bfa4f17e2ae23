"""Hugging Face folders as torch modules: the tensors that are merged, and the folder of a merge."""

import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from evojax_merge.backends.torch.network import Network, to_torch
from evojax_merge.checkpoints.adapters import ADAPTER_CONFIG
from evojax_merge.checkpoints.allowed_classes import check_folder, library_class
from evojax_merge.checkpoints.folder import INDEX_FILE, PICKLES, is_float, open_folder, read_header
from evojax_merge.checkpoints.hints import wrapper_hint
from evojax_merge.checkpoints.json_files import read_json, read_json_object
from evojax_merge.checkpoints.network_checks import check_counts, check_json, check_model, processor_settings
from evojax_merge.checkpoints.quiet import quiet_transformers
from evojax_merge.checkpoints.writer import CARD, MARKER
from evojax_merge.errors import InputError, library_errors, shown
from evojax_merge.system.regular_file import file_inside
from evojax_merge.tasks.function import guard_user_function

# A folder's files beside its weights that an exported folder has as well: of the processor and the tokenizer.
COPIED = {".json", ".txt", ".model", ".jinja"}
EXPECTED = "expected a folder with a config.json, as transformers writes it; own modules need backend: FILE.py:NAME"
# The file that says which modules a sentence transformer has, and the name of its class.
SENTENCE_FILE, SENTENCE = "modules.json", "SentenceTransformer"
# The file of a module of the user's own in a folder.
STATE_FILE = "model.safetensors"
WRITTEN = {"config.json", CARD, MARKER, INDEX_FILE}


def architecture(folder: Path) -> str:
    """The name of a folder's class in transformers, or SENTENCE. Raises InputError where there is none of it."""
    if (folder / SENTENCE_FILE).exists():
        if find_spec("sentence_transformers") is None:
            raise InputError(
                folder, f"has a {SENTENCE_FILE}: sentence-transformers opens it; pip install 'evojax-merge[sentence]'"
            )
        return SENTENCE
    names = read_json_object(folder / "config.json", missing=EXPECTED).get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(
            folder / "config.json", f"architectures: {shown(names)}; expected the name of transformers' class of the "
            "model, such as [ViTForImageClassification]",
        )  # fmt: skip
    kind = library_class(folder / "config.json", "architectures", "transformers", names[0], ("PreTrainedModel",))
    return str(kind.__name__)


def open_module(folder: Path) -> Any:
    """The model of a folder by transformers' own class, in the dtype of its files. Raises InputError for a folder that
    the class does not open, and for one that lacks tensors: transformers would draw them at random."""
    import transformers

    name = architecture(folder)
    for part in _module_folders(folder) if name == SENTENCE else [folder]:
        _check_safe(part)
    kind: Any = getattr(transformers, name, None)
    fails = f"{name} cannot open it"
    with quiet_transformers():
        if name == SENTENCE:
            _check_sentence(folder)
            with library_errors(folder, fails):
                from sentence_transformers import SentenceTransformer

                module = SentenceTransformer(
                    str(folder), device="cpu", local_files_only=True, trust_remote_code=False,
                    model_kwargs={"use_safetensors": True},
                )  # fmt: skip
                return module.eval()
        check_model(folder, lambda config: kind(kind.config_class.from_dict(dict(config))))
        with library_errors(folder, fails):
            module, report = kind.from_pretrained(
                folder, dtype=_stored_dtype(folder), local_files_only=True, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
    missing = sorted(report["missing_keys"])
    if missing:
        hint = wrapper_hint(missing, report["unexpected_keys"]) or "; expected a model that was trained whole"
        count = f"{len(missing)} tensor{'s' if len(missing) > 1 else ''}"
        raise InputError(folder, f"lacks {count} of {name}, such as {missing[0]}{hint}")
    return module.eval()


def _stored_dtype(folder: Path) -> Any:
    """The torch dtype of a folder's files, whatever its config says; "auto" where they have several."""
    dtypes = {str(entry.dtype) for entry in open_folder(folder).entries.values() if is_float(entry.dtype)}
    return getattr(torch, dtypes.pop(), "auto") if len(dtypes) == 1 else "auto"


def _check_sentence(folder: Path) -> None:
    """Raises InputError for a module of a sentence transformer that its class should not be given."""
    for part in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())):
        check_json(part)
        for file in sorted(part.glob("*.safetensors")):
            read_header(file)
        check_counts(part / "config.json")


def _module_folders(folder: Path) -> list[Path]:
    """The folders of a sentence transformer's modules. Raises InputError for modules of other classes than
    sentence-transformers', for folders outside, and for settings that would open more than the model itself."""
    file, folders = folder / SENTENCE_FILE, []
    modules = read_json(file)
    for number, module in enumerate(modules if isinstance(modules, list) else [modules]):
        where, values = f"{file}: [{number}]", module if isinstance(module, dict) else {}
        name, path = values.get("type"), values.get("path")
        if not isinstance(name, str) or not re.fullmatch(r"sentence_transformers(\.\w+)+", name):
            raise InputError(
                where, f"type: {shown(name)}; expected a class of sentence_transformers: code that comes with a model "
                "is not run",
            )  # fmt: skip
        folders.append(folder if path == "" else file_inside(f"{where}.path", folder, path))
        for settings in folders[-1].glob("sentence_*_config.json"):
            # Arguments of transformers: of the model these alone, and of the tokenizer any that are words.
            for key, value in read_json_object(settings, missing={}).items():
                given = value if isinstance(value, dict) else {key: value} if value else {}
                for one, argument in given.items() if key.endswith(("_args", "_kwargs")) else ():
                    is_known = one in ("dtype", "torch_dtype", "attn_implementation")
                    if not (is_known or key.startswith(("tokenizer", "processor"))) or not re.fullmatch(
                        r"[\w-]+", str(argument)
                    ):
                        raise InputError(f"{settings}: {key}", f"{shown(one)}: {shown(argument)}; expected a word")
    return folders


def _check_safe(folder: Path) -> None:
    """Raises InputError for a folder whose weights are pickled alone: to read them would run what they hold. And for
    what `check_folder` refuses."""
    check_folder(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            folder, f"{ADAPTER_CONFIG}: names another model beside this one; expected a model without an adapter"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLES)
    if pickled:
        raise InputError(
            folder, f"{pickled[0]}: is pickled, and reading it would run its code; expected safetensors, which "
            "save_pretrained writes",
        )  # fmt: skip


def merged_tensors(module: Any) -> "OrderedDict[str, Any]":
    """The tensors of a module that merges change, in its order: all floating-point parameters and buffers of its files,
    such as a batch norm's means and variances. Tied parameters stand once."""
    stored = set(module.state_dict())
    tensors = OrderedDict(module.named_parameters())
    tensors.update((name, buffer) for name, buffer in module.named_buffers() if name in stored)
    return OrderedDict((name, tensor.detach()) for name, tensor in tensors.items() if tensor.is_floating_point())


def to_arrays(tensors: Mapping[str, Any]) -> "OrderedDict[str, np.ndarray]":
    """Tensors as arrays, without a copy."""
    return OrderedDict((name, _array(tensor)) for name, tensor in tensors.items())


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    result: np.ndarray = tensor.numpy()
    return result


def open_network(module: Any) -> Network:
    """The network of a module, whose tensors become float32."""
    merged = set(merged_tensors(module))
    module = module.float().requires_grad_(False)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return Network(module, {name: tensor.detach() for name, tensor in tensors.items() if name not in merged})


def _put(module: Any, weights: Mapping[str, Any]) -> None:
    """Give a module the tensors of a merge."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, array in weights.items():
        tensors[name].data = to_torch(np.array(array))


def save_merge(weights: Mapping[str, Any], source: Path, folder: Path) -> None:
    """Write a merge as transformers does, with the files of `source` beside its weights."""
    module = open_module(source)
    _put(module, weights)
    with quiet_transformers():
        if hasattr(module, "encode"):
            module.save(str(folder), create_model_card=False)
        else:
            module.save_pretrained(folder)
    for file in sorted(source.iterdir()):
        target = folder / file.name
        if file.is_file() and file.suffix in COPIED and file.name not in WRITTEN and not target.exists():
            shutil.copyfile(file, target)


@dataclass(frozen=True)
class OwnModules:
    """State dicts in safetensors of a module of the user's. name: the backend in the config; make: () -> the module."""

    where: str
    name: str
    make: Callable[[], Any]

    def open(self, path: Path) -> Any:
        """The module with the tensors of a file, or of a folder with one. Raises InputError where they do not fit."""
        from safetensors.torch import load_model

        if path.is_dir():
            _check_safe(path)
        file = path / STATE_FILE if path.is_dir() else path
        if file.suffix != ".safetensors":
            raise InputError(
                file, "expected a .safetensors file of a state dict: reading a pickled one would run its code"
            )
        with guard_user_function(self.name):
            module = self.make()
        if not isinstance(module, torch.nn.Module):
            raise InputError(self.where, f"{self.name} returned {shown(module)}; expected a torch.nn.Module")
        with library_errors(file, f"does not fit {self.name}"):
            missing, unexpected = load_model(module, file, strict=False)
        hint = wrapper_hint(missing, unexpected) or f"; expected the state dict of {self.name}'s module"
        for names, what in ((missing, "lacks"), (unexpected, "has, and the module has not,")):
            if names:
                raise InputError(file, f"{what} {sorted(names)[0]}{hint}")
        return module.eval()

    def save(self, weights: Mapping[str, Any], source: Path, folder: Path) -> None:
        """Write a merge as a state dict."""
        from safetensors.torch import save_model

        module = self.open(source)
        _put(module, weights)
        save_model(module, str(folder / STATE_FILE))


def label_names(folder: Path) -> dict[int, str]:
    """The names of a classifier's labels by number; those that stand for none (LABEL_0) are left out."""
    names = read_json_object(folder / "config.json", missing={}).get("id2label") if folder.is_dir() else None
    if not isinstance(names, dict):
        return {}
    return {int(number): str(name) for number, name in names.items() if str(name) != f"LABEL_{number}"}


def differences(folders: Sequence[Path]) -> list[str]:
    """A line for each model whose labels, or whose way to prepare images, differ from those of the first."""
    lines, first, named = [], folders[0], label_names(folders[0])
    for model in folders[1:]:
        other = label_names(model)
        differing = next((i for i in named if i in other and other[i] != named[i]), None)
        if differing is not None:
            lines.append(
                f"{model}: label {differing} is {other[differing]!r}, but {named[differing]!r} in {first}; merges "
                "are scored by the latter"
            )
        if processor_settings(model)[1] != processor_settings(first)[1]:
            lines.append(f"{model}: prepares images in another way than {first}, whose way all candidates have")
    return lines
