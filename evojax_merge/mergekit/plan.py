"""A recipe and the tensors of its models -> the plan of each tensor of the merged model."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from merge_kernels import Method, Options, Parameter, Rescale

from evojax_merge.checkpoints.generator_keys import blocks_of
from evojax_merge.errors import InputError, did_you_mean, shown
from evojax_merge.mergekit.modules import MODULES, module_of
from evojax_merge.mergekit.schema import (
    KEYS,
    MAX_NUMBER,
    Module,
    RecipeFile,
    Setting,
    Settings,
    Slice,
    Source,
    checked_mapping,
)

# A layer's number inside a tensor's name, in the architectures that number their layers: the outermost, where a layer's
# parts are numbered too (T5: `encoder.block.3.layer.0`).
LAYER_NAME = re.compile(
    r"^(?P<head>(?:.*?\.)??(?:layers|layer|h|blocks|block|transformer_blocks)\.)"
    r"(?P<index>0|[1-9][0-9]{0,8})(?P<tail>\..+)$"
)
# Modules before the layers, by the architectures' names (embed_out is GPT-NeoX's head, embedding_norm LFM2's last norm)
BEFORE_LAYERS = re.compile(r"(?:^|[._])(?:wte|wpe|embed(?!_out|ding_norm)\w*|\w+_embed\w*)(?:\.|$)")
# The number of a tensor in any other list, such as that of a module's convolutions.
NUMBERED = re.compile(r"^(?P<head>.*?\.)(?P<index>[0-9]{1,9})\.")
# The projection behind the layers of Qwen's vision towers, which takes the last value of a gradient over the layers.
BEHIND_LAYERS = re.compile(r"(?:^|\.)visual\.merger\.mlp\.")


@dataclass(frozen=True)
class TensorPlan:
    """The plan of one output tensor: `inputs` are (model index, tensor name), the base first where there is one;
    gain_offset: the number that is added to a tensor before a passthrough merge scales it, and subtracted after;
    copied: the only input is copied as it is, whatever the method does."""

    name: str
    inputs: tuple[tuple[int, str], ...]
    options: Options
    parameters: dict[str, np.ndarray]
    gain_offset: float = 0.0
    copied: bool = False


# ---------------------------------------------------------------------------------------------------------------
# Settings -> numbers


def read_number(value: Any) -> Any:
    """A text that means a number, as that number (YAML reads 1e-3 as a text, and 1.0e-3 as a number); all else as it
    is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# The texts that pydantic, and so mergekit, reads as true and false.
SWITCHES = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}


def read_switch(value: Any) -> Any:
    """A number or a text that means true or false, as a bool; all else as it is."""
    if isinstance(value, str):
        return SWITCHES.get(value.lower(), value)
    return bool(value) if value in (0, 1) else value


def evaluate_setting(
    where: str, tensor: str, setting: Setting, t: float, read: Callable[[Any], Any] = read_number,
    matches: Callable[[str, str], bool] = lambda tensor, wanted: wanted in tensor,
) -> Any:  # fmt: skip
    """A setting for one tensor: a scalar, a gradient over `t` in [0, 1], or the first filter that `matches` the tensor.
    `read` converts the entries of a gradient; if all results are numbers, they are interpolated."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not setting:
        return None
    if all(isinstance(entry, (int, float, str)) for entry in setting):
        setting = [read(entry) for entry in setting]
        if any(isinstance(entry, (bool, str)) for entry in setting):
            return setting[int(t * (len(setting) - 1))]
        position = t * (len(setting) - 1)
        low = int(position)
        high = min(len(setting) - 1, low + 1)
        share = position - low
        return (1 - share) * setting[low] + share * setting[high]
    for entry in setting:
        entry = checked_mapping(where, entry, KEYS["filter"])
        wanted = entry.get("filter")
        if wanted in (None, "*") or matches(tensor, wanted):
            return evaluate_setting(where, tensor, entry.get("value"), t, read, matches)
    return None


def number(where: str, parameter: Parameter, value: Any) -> float:
    """A parameter's value as a finite float in its valid range. Raises InputError for any other value."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise InputError(where, f"{parameter.name}: {value!r}; expected a number") from None
    except OverflowError:
        result = math.inf
    lowest, highest = max(parameter.valid_min, -MAX_NUMBER), min(parameter.valid_max, MAX_NUMBER)
    if not lowest <= result <= highest:
        raise InputError(where, f"{parameter.name}: {value!r}; expected a number in [{lowest:g}, {highest:g}]")
    return result


def options_from(where: str, method: Method, switches: Mapping[str, Any], has_base: bool) -> Options:
    """The switches of a merge, under mergekit's names; None: the method's default. Raises InputError for an invalid
    value."""
    given = {name: value for name, value in switches.items() if value is not None}
    for name, value in given.items():
        if name != "rescale" and not isinstance(value, bool):
            raise InputError(where, f"{name}: {value!r}; expected true or false")
    rescales: dict[Any, Rescale] = {
        True: "l1", False: "none", "none": "none", "l1": "l1", "density": "density",
    }  # fmt: skip
    if "rescale" in given and given["rescale"] not in rescales:
        raise InputError(where, f"rescale: {given['rescale']!r}; expected true, false, l1 or density")
    options = replace(method.options, has_base=has_base)
    if "rescale" in given:
        options = replace(options, rescale=rescales[given["rescale"]])
    for name in ("normalize", "normalize_weights"):
        if name in given:
            options = replace(options, normalize=given[name])
    if given.get("filter_wise"):
        options = replace(options, axis=-1)
    if not given.get("nuslerp_flatten", True):
        options = replace(options, axis=0 if given.get("nuslerp_row_wise") else -1)
    return options


def _resolve(
    recipe: RecipeFile, module: Module, part: Slice, parents: Sequence[tuple[Source, str]], tensor: str, t: float,
    matches: Callable[[str, str], bool],
) -> tuple[Options, dict[str, np.ndarray]]:  # fmt: skip
    """The options and parameters of one output tensor. `parents`: each with the tensor's name in it; where layers are
    shifted, a parent's filters match that name; matches: see `evaluate_setting`. Raises InputError."""
    where, method = recipe.where, recipe.method
    shared = (part.settings, module.settings, recipe.settings)

    def value(name: str, scopes: Sequence[Settings], tensor: str, read: Callable[[Any], Any] = read_number) -> Any:
        for scope in scopes:
            if name in scope:
                setting = evaluate_setting(where, tensor, scope[name], t, read, matches)
                if setting is not None:
                    return setting
        return None

    def parameter(spec: Parameter, scopes: Sequence[Settings], tensor: str, of: str) -> float:
        setting = value(spec.name, scopes, tensor)
        if setting is None and spec.default is None:
            place = "" if spec.per_parent else "; expected it under parameters of the recipe or of a slice"
            raise InputError(where, f"{spec.name}: missing for {of} and {tensor}{place}")
        return number(f"{where}: {of}", spec, spec.default if setting is None else setting)

    parameters = {}
    for spec in method.parameters:
        if spec.per_parent:
            values: Any = [
                parameter(spec, (parent.settings, *shared), own_name, parent.model) for parent, own_name in parents
            ]
        else:
            values = parameter(spec, shared, tensor, "the merge")
        # float64: a density such as 0.537 must count the entries that 537/1000 counts.
        parameters[spec.name] = np.asarray(values, np.float64)
    switches = {name: read_switch(value(name, shared, tensor, read_switch)) for name in method.yaml_options}
    options = options_from(where, method, switches, method.uses_base(part.base is not None))
    complaint = method.validate(options, parameters)
    if complaint is not None:
        raise InputError(where, f"{tensor}: {complaint}")
    return options, parameters


# ---------------------------------------------------------------------------------------------------------------
# Filters that mean nothing


def unmatched_filters(recipe: RecipeFile, tensor_plans: Sequence[TensorPlan]) -> dict[str, str]:
    """The filters of a recipe that mean none of its planned tensors, each with a sentence that names its key and
    the names that there are: a typo would give tensors another value without a word."""
    names = {name for one in tensor_plans for name in (one.name, *(tensor for _, tensor in one.inputs))}
    blocks = blocks_of([one.name for one in tensor_plans]).names
    parts = {part for name in names for part in name.split(".") if not part.isdigit()} - {"weight", "bias"}
    sentences: dict[str, str] = {}
    for key, wanted in _filters(recipe):
        if wanted not in ("*", *blocks) and not any(wanted in name for name in names):
            hint = did_you_mean(wanted, blocks or parts)
            sentences.setdefault(wanted, f"{key}: the filter {shown(wanted)} means no tensor{hint}")
    return sentences


def _filters(recipe: RecipeFile) -> Iterator[tuple[str, str]]:
    """The filters of a recipe, each with the key of its setting."""
    scopes: list[Settings] = [recipe.settings, {"on_mismatch": recipe.on_mismatch}]
    for module in recipe.modules:
        scopes.append(module.settings)
        for part in module.slices:
            scopes += [part.settings, *(source.settings for source in part.sources)]
    for settings in scopes:
        for name, setting in settings.items():
            yield from ((name, wanted) for wanted in _named_filters(setting))
    yield from (("gain_offsets", wanted) for wanted in recipe.gain_offsets)


def _named_filters(setting: Setting) -> Iterator[str]:
    entries = setting if isinstance(setting, list) else [setting]
    for entry in entries:
        if isinstance(entry, dict):
            yield from [] if entry.get("filter") is None else [entry["filter"]]
            yield from _named_filters(entry.get("value"))


# ---------------------------------------------------------------------------------------------------------------
# Recipe -> plan


@dataclass(frozen=True)
class Layout:
    """A model's tensor names. outside: names outside of layers; stacks: the beginning of a name before the layer's
    number -> the number -> the ends of the layer's names."""

    outside: tuple[str, ...]
    stacks: Mapping[str, Mapping[int, tuple[str, ...]]]

    def names(self) -> list[str]:
        """All names, in full."""
        layers = [(head, i, tails) for head, rows in self.stacks.items() for i, tails in rows.items()]
        return [*self.outside, *(f"{head}{i}{tail}" for head, i, tails in layers for tail in tails)]


def layout(tensors: Sequence[str]) -> Layout:
    outside, stacks = [], dict[str, dict[int, list[str]]]()
    for name in tensors:
        match = LAYER_NAME.match(name)
        if match is None:
            outside.append(name)
        else:
            stacks.setdefault(match["head"], {}).setdefault(int(match["index"]), []).append(match["tail"])
    fixed = {head: {i: tuple(tails) for i, tails in rows.items()} for head, rows in stacks.items()}
    return Layout(tuple(outside), fixed)


def module_layouts(recipe: RecipeFile, layouts: Sequence[Layout]) -> list[list[Layout]]:
    """For each module of the recipe, each model's tensors of the module. Raises InputError for a tensor in none of the
    modules, and for a module without tensors."""
    modules = [module.name for module in recipe.modules]
    if modules == ["default"]:
        return [list(layouts)]
    parts: list[list[list[str]]] = [[[] for _ in layouts] for _ in modules]
    left: list[str] = []
    for model, model_layout in enumerate(layouts):
        for tensor in model_layout.names():
            number = module_of(tensor, modules)
            (left if number is None else parts[number][model]).append(tensor)
    # Checked first, because a misspelt module leaves its tensors without any.
    for name, models in zip(modules, parts, strict=True):
        if not any(models):
            near = "" if name in MODULES else did_you_mean(name, MODULES.keys() - set(modules))
            raise InputError(recipe.where, f"modules.{name}: the models have no tensor of it{near}")
    if left:
        expected = f"by {', '.join(MODULES)}, or by how the names of their tensors begin"
        raise InputError(recipe.where, f"modules: none has {left[0]}; expected all parts of the model ({expected})")
    return [[layout(names) for names in models] for models in parts]


# (an output tensor's name, its inputs, which are (model index, tensor name)) -> the inputs that are merged.
Fitting = Callable[[str, Sequence[tuple[int, str]]], Sequence[tuple[int, str]]]


def plan(
    recipe: RecipeFile, layouts: Sequence[Layout], fitting: Fitting = lambda name, inputs: inputs
) -> list[TensorPlan]:
    """Match a recipe with the tensor names of its models (in the order of `recipe.models`), and return a plan per
    output tensor.

    The merged model has the tensors of its first model, which is the base where there is one. `fitting` takes the name
    of each tensor and its inputs, the first model's first, and returns the inputs that are merged: the first, and any
    others. Where it returns the first alone, or too few for the method, the first is copied.
    """
    tensor_plans: list[TensorPlan] = []
    for module, module_layout in zip(recipe.modules, module_layouts(recipe, layouts), strict=True):
        tensor_plans += _plan_module(recipe, module, module_layout, fitting)
    return tensor_plans


def _plan_module(recipe: RecipeFile, module: Module, layouts: Sequence[Layout], fitting: Fitting) -> list[TensorPlan]:
    index = {model: i for i, model in enumerate(recipe.models)}
    method = recipe.method
    tensor_plans = []
    blocks = blocks_of(layouts[index[_first(module.slices[0]).model]].names())
    block_places = blocks.places()

    def add(name: str, inputs: list[tuple[Source, str]], part: Slice, t: float) -> None:
        base_first = sorted(inputs, key=lambda pair: pair[0].model != part.base)
        pairs = [(index[source.model], tensor) for source, tensor in base_first]
        chosen = set(fitting(name, pairs))
        has_base = method.uses_base(part.base is not None)
        too_few = len(chosen) == 1 or len(chosen) - int(has_base) < method.min_parents
        # The base alone is the merge of the base with nothing.
        if too_few and (len(chosen) < len(pairs) or (has_base and len(pairs) == 1)):
            tensor_plans.append(TensorPlan(name, (pairs[0],), Options(), {}, copied=True))
            return
        # A base that is merged like any parent keeps its place.
        ordered = base_first if method.base != "parent" or method.base_is_first_parent else inputs
        merged = [(source, tensor) for source, tensor in ordered if (index[source.model], tensor) in chosen]
        t = block_places.get(name, t)
        options, parameters = _resolve(recipe, module, part, merged[int(has_base) :], name, t, blocks.matches)
        offset = next((offset for text, offset in recipe.gain_offsets.items() if text in merged[0][1]), 0.0)
        inputs_by_index = tuple((index[source.model], tensor) for source, tensor in merged)
        tensor_plans.append(TensorPlan(name, inputs_by_index, options, parameters, offset))

    if module.slices[0].count is None:
        part = module.slices[0]
        first = _first(part).model
        first_layout = layouts[index[first]]
        for source in part.sources:
            _check_depth(recipe, source.model, layouts[index[source.model]], first, first_layout)
        for name, t in _places(first_layout.outside).items():
            add(name, [(source, name) for source in part.sources], part, t)
        for head, layers in first_layout.stacks.items():
            last = max(layers)
            for i, tails in sorted(layers.items()):
                for tail in tails:
                    name = f"{head}{i}{tail}"
                    add(name, [(source, name) for source in part.sources], part, i / last if last else 1.0)
        return tensor_plans

    for name in layouts[index[recipe.ends or _first(module.slices[0]).model]].outside:
        part = module.slices[0] if BEFORE_LAYERS.search(name) else module.slices[-1]
        if recipe.ends is not None:
            part = Slice(0, (Source(recipe.ends, 0, {}),), {}, part.base)
        add(name, [(source, name) for source in part.sources], part, 0.0)
    done = 0
    section = f"{recipe.where}: {'' if module.name == 'default' else f'modules.{module.name}.'}slices"
    for number, part in enumerate(module.slices):
        assert part.count is not None
        head = _one_stack(f"{section}[{number}]", part, layouts, index)
        first_source = _first(part)
        for offset in range(part.count):
            # A gradient over a single layer takes its last value, as mergekit does.
            t = offset / (part.count - 1) if part.count > 1 else 1.0
            for tail in layouts[index[first_source.model]].stacks[head][first_source.first + offset]:
                inputs = [(source, f"{head}{source.first + offset}{tail}") for source in part.sources]
                add(f"{head}{done}{tail}", inputs, part, t)
            done += 1
    return tensor_plans


def _places(outside: Sequence[str]) -> dict[str, float]:
    """The positions in [0, 1] of tensors outside of layers in a gradient: by their numbers in lists of their own, else
    the start."""
    numbers = {name: match for name in outside if (match := NUMBERED.match(name)) is not None}
    last: dict[str, int] = {}
    for match in numbers.values():
        last[match["head"]] = max(last.get(match["head"], 0), int(match["index"]))

    def place(name: str) -> float:
        match = numbers.get(name)
        if match is None:
            return 0.0
        end = last[match["head"]]
        return int(match["index"]) / end if end and BEHIND_LAYERS.search(name) is None else 1.0

    return {name: place(name) for name in outside}


def _first(part: Slice) -> Source:
    """The source whose tensors a slice has: its base where the base is a source, else the first."""
    return min(part.sources, key=lambda source: source.model != part.base)


def _check_depth(recipe: RecipeFile, model: str, actual: Layout, first: str, expected: Layout) -> None:
    """Raises InputError where two models have other numbers of layers: whole models are merged layer by layer."""
    model_counts, first_counts = (
        {head: len(layers) for head, layers in model_layout.stacks.items()} for model_layout in (actual, expected)
    )
    if model_counts != first_counts:
        depths = [", ".join(map(str, counts.values())) or "no" for counts in (model_counts, first_counts)]
        raise InputError(
            recipe.where, f"models: {model} has {depths[0]} layers, but {first} has {depths[1]}; say which "
            "with slices: (models of different widths cannot be merged; `evojax-merge inspect` compares them)",
        )  # fmt: skip


def _one_stack(where: str, part: Slice, layouts: Sequence[Layout], index: Mapping[str, int]) -> str:
    """The stack that a slice's layers belong to. where: the slice, in messages. Raises InputError where a source has
    several stacks, or lacks a layer."""
    for number, source in enumerate(part.sources):
        stacks = layouts[index[source.model]].stacks
        if len(stacks) != 1:
            names = ", ".join(stacks) or "none"
            raise InputError(where, f"{source.model} has not one stack of numbered layers ({names}); use models:")
        (head, layers), *_ = stacks.items()
        end = source.first + (part.count or 0)
        for layer in range(source.first, end):
            if layer not in layers:
                raise InputError(
                    f"{where}.sources[{number}]", f"layer_range [{source.first}, {end}] goes to layer {end - 1}, but "
                    f"{source.model} has no layer {layer}: it has layers {min(layers)} to {max(layers)}",
                )  # fmt: skip
    return head
