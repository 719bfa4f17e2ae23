"""LoRA files of image generators: a diffusers folder with a LoRA fused in, as diffusers reads and fuses it.

A file holds factors by the names of diffusers, of PEFT, or of kohya's trainer (`lora_unet_…lora_down.weight` with an
`alpha`), of the U-Net or transformer and of text encoders. A fused weight is computed in float32 and rounded to the
dtype of its file once, as other adapters are.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.folder import read_header
from evojax_merge.checkpoints.pipelines import Pipeline, open_pipeline
from evojax_merge.checkpoints.quiet import quiet_diffusers
from evojax_merge.errors import InputError, library_errors

# The file of a LoRA in a folder, as diffusers saves it.
LORA_FILE = "pytorch_lora_weights.safetensors"
OUTER_MODULE = "text_model."
# The ends of the first of a module's two factors' names.
FIRST_FACTORS = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight")


def lora_file(where: str, path: Path) -> Path:
    """The file of a LoRA, which `path` is, or which lies in the folder `path`. Raises InputError for anything else."""
    file = path / LORA_FILE if path.is_dir() else path
    if file.suffix != ".safetensors":
        raise InputError(where, f"{file}: expected a LoRA in safetensors: reading a pickled one would run its code")
    if not any(name.endswith(FIRST_FACTORS) for name in read_header(file)):
        raise InputError(where, f"{file}: holds no factors of a LoRA; expected names such as unet.….lora_A.weight")
    return file


def write_fused(where: str, base: Path, lora: Path, folder: Path) -> None:
    """Write the pipeline of the folder `base` with a LoRA fused in: the components that it changes, and links to all
    other files. Raises InputError where diffusers does not open both, and for a LoRA of another generator."""
    if find_spec("diffusers") is None or find_spec("peft") is None:
        raise InputError(where, "needs diffusers and peft; pip install 'evojax-merge[diffusion]'")
    pipeline = Pipeline(base)
    if not hasattr(pipeline.pipeline_class(), "load_lora_weights"):
        raise InputError(where, f"a {pipeline.class_name} takes no LoRA")
    fused = _fused(where, pipeline, lora)
    for file in base.rglob("*"):
        relative = file.relative_to(base)
        if file.is_file() and not (relative.parts[0] in fused and file.name.endswith((".safetensors", ".index.json"))):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file.resolve(), folder / relative)
    for name, (module, changed) in fused.items():
        _save(pipeline, name, module, changed, folder / name)


def _fused(where: str, pipeline: Pipeline, lora: Path) -> dict[str, tuple[Any, set[str]]]:
    """The modules, in float32, that a LoRA changes, by the names of their components, and the weights that it
    changes."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    opened = open_pipeline(pipeline, {})
    with quiet_diffusers(), library_errors(where, "diffusers cannot fuse it"):
        opened.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True, use_safetensors=True)
        modules = {name: one for name, one in opened.components.items() if isinstance(one, torch.nn.Module)}
        weights = {
            name: {f"{path}.weight" for path, part in module.named_modules() if isinstance(part, BaseTunerLayer)}
            for name, module in modules.items()
        }
        fused = {name: (modules[name], changed) for name, changed in weights.items() if changed}
        opened.fuse_lora(components=list(fused))
        opened.unload_lora_weights()
    expected = sum(name.endswith(FIRST_FACTORS) for name in read_header(lora))
    actual = sum(len(changed) for _, changed in fused.values())
    if actual < expected:
        raise InputError(
            where, f"{lora.name} has factors of {expected} modules, of which {pipeline.path} has {actual}; expected a "
            "LoRA of this generator",
        )  # fmt: skip
    return fused


def _save(pipeline: Pipeline, name: str, module: Any, changed: set[str], folder: Path) -> None:
    """Write a component's weights, by the names and in the dtypes of the base's files: the `changed` ones of a module,
    and all others as they are."""
    from safetensors.torch import load_file, save_file

    files = [file for file in pipeline.files(name) if file.suffix == ".safetensors"]
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    # Transformers' modules in memory have names without the outer module that files of text encoders name.
    in_file = {key.removeprefix(OUTER_MODULE): key for key in tensors} | {key: key for key in tensors}
    state = module.state_dict()
    for weight in changed:
        if weight not in in_file:
            raise InputError(pipeline.path / name, f"has no tensor {weight}, which the LoRA changes")
        key = in_file[weight]
        tensors[key] = state[weight].to(tensors[key].dtype).contiguous()
    stem = files[0].name.partition("-00001-of-")[0].removesuffix(".safetensors")
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
