"""A recipe and the tensors of its models -> how each tensor of the merged model is made."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from merge_kernels import Method, Options, Parameter, Rescale

from evojax_merge.errors import InputError
from evojax_merge.mergekit.schema import MAX_NUMBER, RecipeFile, Setting, Settings, Slice, Source, checked_mapping

# A layer's number inside a tensor's name, in the architectures that number their layers: the outermost, where a layer's
# parts are numbered too (T5: `encoder.block.3.layer.0`).
LAYER_NAME = re.compile(
    r"^(?P<head>(?:.*?\.)??(?:layers|layer|h|blocks|block|transformer_blocks)\.)(?P<index>\d+)(?P<tail>\..+)$"
)
# What comes before the layers, in the architectures' names for it (embed_out is GPT-NeoX's head).
BEFORE_LAYERS = re.compile(r"(?:^|[._])(?:wte|wpe|embed(?!_out)\w*|\w+_embed\w*)(?:\.|$)")


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made: `inputs` are (model index, tensor name), the base first where there is one;
    gain_offset: what is added to a tensor before a passthrough merge scales it, and taken off again."""

    name: str
    inputs: tuple[tuple[int, str], ...]
    options: Options
    parameters: dict[str, np.ndarray]
    gain_offset: float = 0.0


# ---------------------------------------------------------------------------------------------------------------
# Settings -> numbers


def _endpoint(value: Any) -> Any:
    """A gradient's entry: YAML reads 1e-3 as text (1.0e-3 would be a number)."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def evaluate_setting(where: str, tensor: str, setting: Setting, t: float) -> Any:
    """A setting for one tensor: a scalar, a gradient over `t` in [0, 1], or the first filter that matches."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not setting:
        return None
    if all(isinstance(entry, (int, float, str)) for entry in setting):
        setting = [_endpoint(entry) for entry in setting]
        if any(isinstance(entry, (bool, str)) for entry in setting):
            return setting[int(t * (len(setting) - 1))]
        position = t * (len(setting) - 1)
        low = int(position)
        high = min(len(setting) - 1, low + 1)
        share = position - low
        return (1 - share) * setting[low] + share * setting[high]
    for row in setting:
        row = checked_mapping(where, row, {"filter", "value"})
        wanted = row.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            return evaluate_setting(where, tensor, row.get("value"), t)
    return None


def number(where: str, parameter: Parameter, value: Any) -> float:
    """A parameter's value as a finite float inside its meaning, or InputError."""
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
    """The switches of a merge, under the names that mergekit gives them; the method's own where they are None."""
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
    recipe: RecipeFile, part: Slice, parents: Sequence[tuple[Source, str]], tensor: str, t: float
) -> tuple[Options, dict[str, np.ndarray]]:
    """`parents` with the names that the tensor has in them: where layers are shifted, their filters match those."""
    where, method = recipe.where, recipe.method
    shared = (part.settings, recipe.settings)

    def value(name: str, scopes: Sequence[Settings], tensor: str) -> Any:
        for scope in scopes:
            if name in scope:
                found = evaluate_setting(where, tensor, scope[name], t)
                if found is not None:
                    return found
        return None

    def parameter(spec: Parameter, scopes: Sequence[Settings], tensor: str, of: str) -> float:
        found = value(spec.name, scopes, tensor)
        if found is None and spec.default is None:
            raise InputError(where, f"{spec.name}: missing for {of} and {tensor}")
        return number(f"{where}: {of}", spec, spec.default if found is None else found)

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
    switches = {name: value(name, shared, tensor) for name in method.yaml_options}
    options = options_from(where, method, switches, method.uses_base(part.base is not None))
    complaint = method.validate(options, parameters)
    if complaint is not None:
        raise InputError(where, f"{tensor}: {complaint}")
    return options, parameters


# ---------------------------------------------------------------------------------------------------------------
# Recipe -> plan


@dataclass(frozen=True)
class Layout:
    """A model's tensor names: those outside of layers, and by stack of layers (what stands before the number) and
    layer what stands after the number."""

    outside: tuple[str, ...]
    stacks: Mapping[str, Mapping[int, tuple[str, ...]]]


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


def plan(recipe: RecipeFile, layouts: Sequence[Layout]) -> list[TensorPlan]:
    """Match a recipe with the tensor names of its models (in the order of `recipe.models`): a row per output tensor."""
    index = {model: i for i, model in enumerate(recipe.models)}
    method = recipe.method
    rows = []

    def add(name: str, inputs: list[tuple[Source, str]], part: Slice, t: float) -> None:
        # SLERP runs from the base to the other model; elsewhere a base that is merged like a parent keeps its place.
        first = method.base != "parent" or method.name == "slerp"
        ordered = sorted(inputs, key=lambda pair: pair[0].model != part.base) if first else inputs
        has_base = method.uses_base(part.base is not None)
        options, parameters = _resolve(recipe, part, ordered[int(has_base) :], name, t)
        offset = next((offset for text, offset in recipe.gain_offsets.items() if text in ordered[0][1]), 0.0)
        inputs_by_index = tuple((index[source.model], own) for source, own in ordered)
        rows.append(TensorPlan(name, inputs_by_index, options, parameters, offset))

    if recipe.slices[0].count is None:
        part = recipe.slices[0]
        own = layouts[index[part.sources[0].model]]
        for source in part.sources:
            _check_depth(recipe, source.model, layouts[index[source.model]], part.sources[0].model, own)
        for name in own.outside:
            add(name, [(source, name) for source in part.sources], part, 0.0)
        for head, layers in own.stacks.items():
            last = max(layers)
            for i, tails in sorted(layers.items()):
                for tail in tails:
                    name = f"{head}{i}{tail}"
                    add(name, [(source, name) for source in part.sources], part, i / last if last else 1.0)
        return rows

    for name in layouts[index[recipe.ends or recipe.slices[0].sources[0].model]].outside:
        part = recipe.slices[0] if BEFORE_LAYERS.search(name) else recipe.slices[-1]
        if recipe.ends is not None:
            part = Slice(0, (Source(recipe.ends, 0, {}),), {}, part.base)
        add(name, [(source, name) for source in part.sources], part, 0.0)
    done = 0
    for part in recipe.slices:
        assert part.count is not None
        head = _one_stack(recipe, part, layouts, index)
        for offset in range(part.count):
            # A gradient over a single layer takes its last value, as mergekit does.
            t = offset / (part.count - 1) if part.count > 1 else 1.0
            tails = layouts[index[part.sources[0].model]].stacks[head][part.sources[0].first + offset]
            for tail in tails:
                inputs = [(source, f"{head}{source.first + offset}{tail}") for source in part.sources]
                add(f"{head}{done}{tail}", inputs, part, t)
            done += 1
    return rows


def _check_depth(recipe: RecipeFile, model: str, found: Layout, first: str, expected: Layout) -> None:
    """Whole models are merged layer by layer, so that none may be left over."""
    one, other = ({head: len(layers) for head, layers in own.stacks.items()} for own in (found, expected))
    if one != other:
        depths = [", ".join(map(str, counts.values())) or "no" for counts in (one, other)]
        raise InputError(
            recipe.where, f"models: {model} has {depths[0]} layers, but {first} has {depths[1]}; say which with slices:"
        )


def _one_stack(recipe: RecipeFile, part: Slice, layouts: Sequence[Layout], index: Mapping[str, int]) -> str:
    """The stack that a slice's layers belong to; every source has those layers."""
    for source in part.sources:
        stacks = layouts[index[source.model]].stacks
        if len(stacks) != 1:
            known = ", ".join(stacks) or "none"
            raise InputError(
                recipe.where, f"slices: {source.model} has not one stack of numbered layers ({known}); use models:"
            )
        (head, layers), *_ = stacks.items()
        for layer in range(source.first, source.first + (part.count or 0)):
            if layer not in layers:
                raise InputError(
                    recipe.where, f"layer_range: {source.model} has no layer {layer} (it has {len(layers)})"
                )
    return head


def output_layers(recipe: RecipeFile, layouts: Sequence[Layout]) -> list[tuple[int, int]]:
    """For each layer of the merged model the model and the layer that it stands for: its slice's first source's."""
    index = {model: i for i, model in enumerate(recipe.models)}
    origins = []
    for part in recipe.slices:
        model = index[part.sources[0].model]
        stacks = layouts[model].stacks
        count = part.count if part.count is not None else max((len(layers) for layers in stacks.values()), default=0)
        origins += [(model, part.sources[0].first + i) for i in range(count)]
    return origins
