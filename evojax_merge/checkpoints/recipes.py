"""Recipes as YAML, in mergekit's format: read into a plan of tensors, written from what a search found.

May import merge_kernels, models.bank and checkpoints' other files. Two settings go beyond
mergekit: `random_seed`, which fixes the masks of random methods and which mergekit ignores, and `rescale: density`
(the DARE paper's 1/density), which it refuses.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from merge_kernels import METHODS, Method, Options, Parameter

from evojax_merge.checkpoints.folder import EMBEDDING, FLOAT_DTYPES
from evojax_merge.errors import InputError, did_you_mean
from evojax_merge.models.bank import MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig

TOP_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "random_seed",
}  # fmt: skip
REFUSED_KEYS = {"modules", "tokenizer", "chat_template"}
LAYER_NAME = re.compile(r"^(?P<head>(?:.*\.)?layers\.)(?P<index>\d+)(?P<tail>\..+)$")
SWITCHES = ("normalize", "rescale", "int8_mask")

Setting = Any
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """One model of a slice: `first` is its first layer (0 in the `models` form), `settings` its parameters."""

    model: str
    first: int
    settings: Settings


@dataclass(frozen=True)
class Slice:
    """`count` output layers (None: all of the model's) made of the sources' layers in step."""

    count: int | None
    sources: tuple[Source, ...]
    settings: Settings


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it stands in the file, checked but not yet matched with tensors."""

    path: Path
    method: Method
    base: str | None
    slices: tuple[Slice, ...]
    settings: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer_source: str | None
    seed: int

    @property
    def models(self) -> list[str]:
        """Every model referred to, the base first, each once."""
        named = [] if self.base is None else [self.base]
        for part in self.slices:
            named += [source.model for source in part.sources]
        return list(dict.fromkeys(named))


@dataclass(frozen=True)
class TensorMerge:
    """How one output tensor is made: `inputs` are (model index, tensor name), the base first where there is one."""

    name: str
    inputs: tuple[tuple[int, str], ...]
    options: Options
    parameters: dict[str, np.ndarray]


def _mapping(where: str, value: Any, known: set[str], refused: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    if not isinstance(value, dict):
        raise InputError(where, f"expected a mapping, found {type(value).__name__}")
    for key in value:
        if key in refused:
            raise InputError(where, f"{key}: is not supported")
        if key not in known:
            raise InputError(where, f"{key}: unknown key{did_you_mean(str(key), known)}")
    return value


def load_yaml(path: Path) -> Any:
    """Parse a YAML file; InputError with the line where it is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise InputError(f"{path}{line}", f"not valid YAML ({getattr(error, 'problem', None) or error})") from None


def read_recipe(path: Path) -> RecipeFile:
    """Read a mergekit recipe. What is not supported is refused by name."""
    top = _mapping(str(path), load_yaml(path), TOP_KEYS, REFUSED_KEYS)
    name = top.get("merge_method")
    if name not in METHODS:
        raise InputError(path, f"merge_method: unknown method {name!r}{did_you_mean(str(name), METHODS)}")
    method = METHODS[name]
    for key in ("dtype", "out_dtype"):
        if top.get(key) is not None and top[key] not in FLOAT_DTYPES:
            raise InputError(path, f"{key}: {top[key]!r}; expected one of {', '.join(FLOAT_DTYPES)}")
    if ("models" in top) == ("slices" in top):
        raise InputError(path, "expected exactly one of the keys models, slices")
    base = top.get("base_model")
    if "models" in top:
        sources = [_source(f"{path}: models[{i}]", row, method, {"model"}) for i, row in _rows(path, top, "models")]
        slices = [Slice(None, _with_base(sources, base), {})]
    else:
        slices = [_slice(f"{path}: slices[{i}]", row, method, base) for i, row in _rows(path, top, "slices")]
    recipe = RecipeFile(
        path, method, base, tuple(slices), _settings(f"{path}: parameters", top.get("parameters"), method),
        top.get("dtype"), top.get("out_dtype"), top.get("tokenizer_source"), int(top.get("random_seed") or 0),
    )  # fmt: skip
    for part in recipe.slices:
        check_parent_count(str(path), method, base is not None, len({s.model for s in part.sources} - {base}))
    if recipe.tokenizer_source == "union":
        raise InputError(path, "tokenizer_source: union is not supported (expected base or a model of the recipe)")
    return recipe


def check_parent_count(where: str, method: Method, has_base: bool, parents: int) -> None:
    """Raises InputError where a method does not take so many parents, or needs a base that is not there."""
    if method.needs_base and not has_base:
        raise InputError(where, f"{method.name} needs a base_model, from which task vectors are taken")
    # SLERP's base is one of its two ends.
    count = parents + int(has_base and not method.needs_base and method.max_parents is not None)
    if count < method.min_parents or (method.max_parents is not None and count > method.max_parents):
        many = f"{method.min_parents}" if method.max_parents == method.min_parents else f"≥ {method.min_parents}"
        raise InputError(where, f"{method.name} takes {many} models, found {count}")


def _rows(path: Path, top: dict[str, Any], key: str) -> list[tuple[int, Any]]:
    if not isinstance(top[key], list) or not top[key]:
        raise InputError(path, f"{key}: expected a list that is not empty")
    return list(enumerate(top[key]))


def _source(where: str, row: Any, method: Method, keys: set[str]) -> Source:
    row = _mapping(where, row, keys | {"parameters"})
    missing = sorted(keys - set(row))
    if missing:
        raise InputError(where, f"{missing[0]}: missing")
    first = 0
    if "layer_range" in keys:
        layers = row["layer_range"]
        if not (isinstance(layers, list) and len(layers) == 2 and 0 <= layers[0] < layers[1]):
            raise InputError(where, f"layer_range: {layers!r}; expected [first, end] with first < end")
        first = layers[0]
    return Source(str(row["model"]), first, _settings(f"{where}.parameters", row.get("parameters"), method))


def _with_base(sources: Sequence[Source], base: str | None) -> tuple[Source, ...]:
    if base is None or any(source.model == base for source in sources):
        return tuple(sources)
    return (Source(base, sources[0].first, {}), *sources)


def _slice(where: str, row: Any, method: Method, base: str | None) -> Slice:
    row = _mapping(where, row, {"sources", "parameters"}, {"base_model", "residual_weight"})
    if not isinstance(row.get("sources"), list) or not row["sources"]:
        raise InputError(where, "sources: expected a list that is not empty")
    sources = [
        _source(f"{where}.sources[{i}]", source, method, {"model", "layer_range"})
        for i, source in enumerate(row["sources"])
    ]
    counts = {s["layer_range"][1] - s["layer_range"][0] for s in row["sources"]}
    if len(counts) != 1:
        raise InputError(where, f"layer_range: sources of unlike length {sorted(counts)}; expected one length")
    settings = _settings(f"{where}.parameters", row.get("parameters"), method)
    if base is not None and all(source.model != base for source in sources):
        raise InputError(where, f"sources: the base_model {base!r} is missing")
    return Slice(counts.pop(), tuple(sources), settings)


def _settings(where: str, value: Any, method: Method) -> Settings:
    if value is None:
        return {}
    return _mapping(where, value, {p.name for p in method.parameters} | set(SWITCHES))


# ---------------------------------------------------------------------------------------------------------------
# Settings -> numbers


def evaluate_setting(where: str, tensor: str, setting: Setting, t: float) -> Any:
    """A setting for one tensor: a scalar, a gradient over `t` in [0, 1], or the first filter that matches."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not setting:
        return None
    if all(isinstance(entry, (int, float, str)) for entry in setting):
        if any(isinstance(entry, (bool, str)) for entry in setting):
            return setting[int(t * (len(setting) - 1))]
        position = t * (len(setting) - 1)
        low = int(position)
        high = min(len(setting) - 1, low + 1)
        share = position - low
        return (1 - share) * setting[low] + share * setting[high]
    for row in setting:
        row = _mapping(where, row, {"filter", "value"})
        wanted = row.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            return evaluate_setting(where, tensor, row.get("value"), t)
    return None


def number(where: str, parameter: Parameter, value: Any) -> float:
    """A parameter's value as a finite float inside its meaning, or InputError."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise InputError(where, f"{parameter.name}: {value!r}; expected a number") from None
    if not parameter.lowest <= result <= parameter.highest or not np.isfinite(result):
        raise InputError(
            where,
            f"{parameter.name}: {value!r}; expected a number in [{parameter.lowest:g}, {parameter.highest:g}]",
        )
    return result


def options_from(where: str, method: Method, normalize: Any, rescale: Any) -> Options:
    """The switches of a merge, the method's own where they are None."""
    default = method.options
    if normalize is not None and not isinstance(normalize, bool):
        raise InputError(where, f"normalize: {normalize!r}; expected true or false")
    known = {True: "l1", False: "none", "none": "none", "l1": "l1", "density": "density"}
    if rescale is not None and rescale not in known:
        raise InputError(where, f"rescale: {rescale!r}; expected true, false, l1 or density")
    return Options(
        normalize=default.normalize if normalize is None else normalize,
        rescale=default.rescale if rescale is None else known[rescale],  # type: ignore[arg-type]
    )


def _resolve(
    recipe: RecipeFile, part: Slice, parents: Sequence[tuple[Source, str]], tensor: str, t: float
) -> tuple[Options, dict[str, np.ndarray]]:
    """`parents` with the names that the tensor has in them: where layers are shifted, their filters match those."""
    where = str(recipe.path)
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
        return number(where, spec, spec.default if found is None else found)

    parameters = {}
    for spec in recipe.method.parameters:
        if spec.per_parent:
            values: Any = [
                parameter(spec, (parent.settings, *shared), own_name, parent.model) for parent, own_name in parents
            ]
        else:
            values = parameter(spec, shared, tensor, "the merge")
        # float64: a density such as 0.537 must count the entries that 537/1000 counts.
        parameters[spec.name] = np.asarray(values, np.float64)
    options = options_from(where, recipe.method, value("normalize", shared, tensor), value("rescale", shared, tensor))
    if recipe.method.kind == "linear" and options.normalize and parameters["weight"].sum() == 0:
        raise InputError(where, f"weight: the weights for {tensor} sum to zero, which cannot be normalised")
    return options, parameters


def plan(recipe: RecipeFile, tensors: Sequence[str], layers: int) -> list[TensorMerge]:
    """Match a recipe with the tensor names of a model of `layers` layers: one row per output tensor.

    `tensors` are the names of the base, or of the first model where there is none.
    """
    index = {model: i for i, model in enumerate(recipe.models)}
    rows = []

    def add(name: str, inputs: list[tuple[Source, str]], part: Slice, t: float) -> None:
        base = [pair for pair in inputs if pair[0].model == recipe.base]
        rest = [pair for pair in inputs if pair[0].model != recipe.base]
        if not recipe.method.needs_base and recipe.method.max_parents is None:
            # To these methods a base is a model like the others, and needs a weight of its own.
            base, rest = [], inputs
        parents = rest if recipe.method.needs_base else base + rest
        options, parameters = _resolve(recipe, part, parents, name, t)
        named = tuple((index[source.model], tensor) for source, tensor in base + rest)
        rows.append(TensorMerge(name, named, options, parameters))

    in_layers = [(name, match) for name in tensors if (match := LAYER_NAME.match(name))]
    for name in (name for name in tensors if not LAYER_NAME.match(name)):
        part = recipe.slices[0] if name == EMBEDDING else recipe.slices[-1]
        add(name, [(source, name) for source in part.sources], part, 0.0)
    done = 0
    for part in recipe.slices:
        count = layers if part.count is None else part.count
        for offset in range(count):
            # A gradient over a single layer takes its last value, as mergekit does.
            t = offset / (count - 1) if count > 1 else 1.0
            model = part.sources[0].first + offset
            matching = [(name, m) for name, m in in_layers if int(m["index"]) == model]
            if not matching:
                raise InputError(recipe.path, f"layer_range: there is no layer {model} (the model has {layers})")
            for _, match in matching:
                inputs = [(source, f"{match['head']}{source.first + offset}{match['tail']}") for source in part.sources]
                add(f"{match['head']}{done}{match['tail']}", inputs, part, t)
            done += 1
    return rows


def output_layers(recipe: RecipeFile, layers: int) -> list[int]:
    """For each layer of the merged model the layer of the leading source that it stands for."""
    origins: list[int] = []
    for part in recipe.slices:
        first = part.sources[0].first
        origins += range(first, first + (layers if part.count is None else part.count))
    return origins


# ---------------------------------------------------------------------------------------------------------------
# What a search found -> YAML

# mergekit's filters are substrings of the tensor's name; the first that matches counts.
COMPONENT_FILTERS = ("self_attn", ".mlp.", "layernorm")
SHARED_FILTERS = {"embed": "embed_tokens", "final_norm": "model.norm", "head": "lm_head"}


def short(value: Any) -> float:
    """The float whose decimal form is the shortest that reads back to the same float32."""
    return float(np.format_float_positional(np.float32(value), unique=True, trim="0"))


def recipe_document(
    recipe: Recipe, spec: MergeSpec, config: DecoderConfig, base: str | None, parents: Sequence[str]
) -> dict[str, Any]:
    """A recipe as a mergekit document, slices of layers with equal parameters joined into one.

    `recipe` holds NumPy arrays of one candidate (see models.bank.Recipe).
    """
    rows = [{name: np.asarray(values[i]) for name, values in recipe.layers.items()} for i in range(config.layers)]
    shared = jax.tree.map(np.asarray, recipe.shared)
    starts = [i for i in range(config.layers) if i == 0 or any((rows[i][n] != rows[i - 1][n]).any() for n in rows[i])]
    slices = []
    for start, end in zip(starts, [*starts[1:], config.layers], strict=True):
        extras = {"embed": shared["embed"]} if start == 0 else {}
        if end == config.layers:
            extras |= {name: values for name, values in shared.items() if name != "embed"}
        slices.append(_slice_document(rows[start], extras, spec.method, base, parents, [start, end]))
    document: dict[str, Any] = {"merge_method": spec.method_name}
    if base is not None and (spec.method.needs_base or spec.method.max_parents is not None):
        document["base_model"] = base
    elif spec.method.max_parents is not None:
        document["base_model"] = parents[0]
    document["slices"] = slices
    document["parameters"] = {"normalize": spec.options.normalize}
    if spec.method.sparsifier is not None:
        rescale = {"none": False, "l1": True, "density": "density"}[spec.options.rescale]
        document["parameters"]["rescale"] = rescale
    document["dtype"] = "float32"
    document["out_dtype"] = spec.export_dtype
    if spec.method.sparsifier is not None and spec.method.sparsifier.random:
        document["random_seed"] = spec.seed
    return document


def _slice_document(
    layer: dict[str, np.ndarray],
    shared: dict[str, dict[str, np.ndarray]],
    method: Method,
    base: str | None,
    parents: Sequence[str],
    layers: list[int],
) -> dict[str, Any]:
    def setting(name: str, parent: int | None) -> Any:
        def at(values: np.ndarray) -> float:
            value = values if parent is None else values[parent]
            # On the grid: the decimal fraction itself, which counts the entries that the search counted.
            return round(float(value), 3) if name == "density" else short(value)

        rows = [{"filter": SHARED_FILTERS[leaf], "value": at(parameters[name])} for leaf, parameters in shared.items()]
        rows += [{"filter": wanted, "value": at(layer[name][c])} for c, wanted in enumerate(COMPONENT_FILTERS)]
        values = {row["value"] for row in rows}
        return values.pop() if len(values) == 1 else rows

    sources: list[dict[str, Any]] = []
    if method.needs_base and base is not None:
        sources.append({"model": base, "layer_range": layers})
    for k, parent in enumerate(parents):
        row: dict[str, Any] = {"model": parent, "layer_range": layers}
        per_parent = [p.name for p in method.parameters if p.per_parent]
        if per_parent:
            row["parameters"] = {name: setting(name, k) for name in per_parent}
        sources.append(row)
    document: dict[str, Any] = {"sources": sources}
    common = {p.name: setting(p.name, None) for p in method.parameters if not p.per_parent}
    if common:
        document["parameters"] = common
    return document


class _Dumper(yaml.SafeDumper):
    """Writes pairs such as layer ranges and filters on one line, and repeats instead of anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flow_list(dumper: yaml.SafeDumper, data: list) -> yaml.Node:
    flat = all(isinstance(entry, (int, float, str)) for entry in data) and len(data) <= 4
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


def _flow_map(dumper: yaml.SafeDumper, data: dict) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=set(data) == {"filter", "value"})


_Dumper.add_representer(list, _flow_list)
_Dumper.add_representer(dict, _flow_map)


def dump_yaml(document: Any) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
