"""A diffusers pipeline as a function of some of its components' tensors, which draws pictures."""

import inspect
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evojax_merge.backends.torch.folders import merged_tensors
from evojax_merge.backends.torch.network import to_torch
from evojax_merge.checkpoints.generator_keys import BASE, VAE, blocks_of
from evojax_merge.checkpoints.pipelines import Components, open_component, open_pipeline
from evojax_merge.checkpoints.quiet import quiet_diffusers
from evojax_merge.errors import InputError, library_errors
from evojax_merge.tasks.generated_images import DrawingTask

# The projections of attention, in diffusers' names.
ATTENTION = re.compile(r"\.(?:to_[qkv]|to_out|add_[qkv]_proj|to_add_out|to_qkv)\.")
# The parts of a block that may have parameters of their own.
KINDS = ("attention", "other")


def tensors_of(modules: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """The tensors that merges change, of the merged components by their names: `component.tensor`."""
    return OrderedDict(
        (f"{component}.{name}", tensor)
        for component, module in modules.items()
        for name, tensor in merged_tensors(module).items()
    )


@dataclass(frozen=True, eq=False)
class Generator:
    """A pipeline in float32 whose merged components get their tensors with each call. modules: the merged components;
    device: where it draws."""

    pipeline: Any = field(repr=False)
    modules: Mapping[str, Any] = field(repr=False)
    device: str

    @property
    def name(self) -> str:
        return type(self.pipeline).__name__

    def draw(self, weights: Mapping[str, Any], task: DrawingTask, numbers: Sequence[int]) -> np.ndarray:
        """float32[N, …]: the pictures, or latents, of some of a task's examples. The noise of each is made on the CPU,
        and so is the same on all machines."""
        tensors = _storage(self.modules)
        for name, array in weights.items():
            tensors[name].data = to_torch(array).to(self.device).float()
        parts = []
        for begin in range(0, len(numbers), task.batch):
            batch = numbers[begin : begin + task.batch]
            generators = [torch.Generator("cpu").manual_seed(task.seeds[i]) for i in batch]
            arguments: dict[str, Any] = {"generator": generators, **task.settings}
            if "prompt" in self.arguments:
                arguments["prompt"] = [task.prompts[i] for i in batch]
            else:
                arguments["batch_size"] = len(batch)
            output = "latent" if task.inputs == "latents" else "np"
            with torch.no_grad():
                drawn = self.pipeline(**arguments, output_type=output).images
            parts.append(np.asarray(drawn.cpu().numpy() if isinstance(drawn, torch.Tensor) else drawn, np.float32))
        return np.concatenate(parts)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of the pipeline's call."""
        return inspect.signature(type(self.pipeline).__call__).parameters

    def check(self, task: DrawingTask) -> None:
        """Raises InputError for a task that the pipeline cannot draw for."""
        where, arguments = task.section, self.arguments
        has_prompt = task.prompts[0] is not None
        if has_prompt != ("prompt" in arguments):
            what = "takes no prompt; leave `file` out" if has_prompt else "takes prompts; give a `file` of them"
            raise InputError(where, f"{task.name}: a {self.name} {what}")
        foreign = next((name for name in task.settings if name not in arguments), None)
        if foreign is not None:
            raise InputError(where, f"{task.name}: a {self.name} takes no {foreign}; leave it out")
        if not has_prompt and "batch_size" not in arguments:
            raise InputError(where, f"{task.name}: a {self.name} takes neither a prompt nor batch_size; expected one")
        if task.inputs == "latents" and not hasattr(self.pipeline, "vae"):
            raise InputError(where, f"{task.name}: a {self.name} has no latents; expected inputs: images")


def _storage(modules: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters and buffers themselves, by the names of `tensors_of`."""
    return {
        f"{component}.{name}": tensor
        for component, module in modules.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def open_generator(components: Components, modules: Mapping[str, Any]) -> Generator:
    """The pipeline of the first model, with the components that other models give. modules: the merged components,
    which become float32."""
    given = {name: module.float().requires_grad_(False) for name, module in modules.items()}
    given |= {name: open_component(one, name) for name, one in components.kept.items() if one is not components.first}
    device, first = "cuda" if torch.cuda.is_available() else "cpu", components.first
    pipeline = open_pipeline(first, given)
    with quiet_diffusers(), library_errors(first.path, f"{first.class_name} cannot open it"):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.float()
    return Generator(pipeline, {name: getattr(pipeline, name) for name in modules}, device)


def save_generator(components: Components, weights: Mapping[str, Any], folder: Path) -> None:
    """Write a merge as a diffusers folder: the merged components by their own classes, in the dtype of their files, and
    the others as they are."""
    components.write_others(folder)
    for component in components.merged:
        module = open_component(components.first, component)
        tensors = _storage({component: module})
        for name, array in weights.items():
            if name.startswith(f"{component}."):
                tensors[name].data = to_torch(np.array(array))
        with quiet_diffusers():
            module.save_pretrained(folder / component)


def block_groups(names: Sequence[str], together: int | str, kinds: Sequence[Sequence[str]]) -> dict[str, str]:
    """The group of each tensor, by its name in `tensors_of`: its block, or that of `together` neighbours (all: the
    whole component). Components without blocks are a group each. kinds: the parts of a block that have parameters of
    their own, out of `KINDS`."""
    groups: dict[str, str] = {}
    by_component: dict[str, list[str]] = {}
    for name in names:
        by_component.setdefault(name.partition(".")[0], []).append(name)
    for component, members in by_component.items():
        blocks = blocks_of([name.partition(".")[2] for name in members])
        numbered = [block for block in blocks.names if block not in (BASE, VAE)]
        labels = {block: block for block in blocks.names}
        if together != "all":
            for begin in range(0, len(numbered), int(together)):
                part = numbered[begin : begin + int(together)]
                labels |= dict.fromkeys(part, part[0] if len(part) == 1 else f"{part[0]}-{part[-1]}")
        for name in members:
            block = blocks.of.get(name.partition(".")[2])
            label = component if block is None or together == "all" else labels[block]
            groups[name] = VAE if label == "vae" else label
    if len(kinds) > 1:
        joined = {kind: "+".join(group) for group in kinds for kind in group}
        return {
            name: f"{label} {joined['attention' if ATTENTION.search(name) else 'other']}"
            for name, label in groups.items()
        }
    return groups
