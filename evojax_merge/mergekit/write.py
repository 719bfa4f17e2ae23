"""The result of a search -> a recipe in mergekit's format.

The recipe reads back (mergekit.schema) as the same numbers, so that merging it gives the bytes of a winner that is a
language model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import yaml
from merge_kernels import METHODS, Method, Options

from evojax_merge.models.architecture import LAYERS, Architecture, architecture_of, leaves_of
from evojax_merge.models.bank import MergeSpec, Recipe
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.paths import LayerPath, PathSpec
from evojax_merge.schema.genealogy import Member, member_name


@dataclass(frozen=True)
class Filters:
    """mergekit's filters: substrings of a tensor's name, of which the first match counts. components: filters, each
    with the number of its component; shared: the filter of each leaf outside of the layers; residual: the filters of
    leaves that write to the residual stream, each with its `gain_offset`."""

    components: tuple[tuple[str, int], ...]
    shared: Mapping[str, str]
    residual: Mapping[str, float]


def filters_of(architecture: Architecture, *configs: DecoderConfig) -> Filters:
    """The filters that an architecture declares, else the names of its tensors; with configs, of the leaves in a layer
    those that a model of one of them has."""
    present = {leaf.name for config in configs for leaf in leaves_of(config)}
    layer = [leaf for leaf in architecture.leaves if leaf.stack is not None and (not configs or leaf.name in present)]
    # The ends of names, after the numbers of the layer and the expert.
    tails = {leaf.name: leaf.tensor.rpartition("}")[2] for leaf in layer}
    writers = {leaf.name: leaf.gain_offset for leaf in layer if leaf.writes_residual}

    def residual(name: str) -> str:
        """The module's name, or the whole end where the module's name is in other tensors' names too."""
        *_, module, _ = tails[name].split(".")
        return tails[name] if any(module in tail for other, tail in tails.items() if other not in writers) else module

    declared = architecture.filters
    number_of = architecture.components.index
    # The longest first: one may be a part of another.
    named = sorted(((tails[leaf.name], number_of(leaf.component)) for leaf in layer), key=lambda pair: -len(pair[0]))
    parts = [(text, number_of(part)) for part, text in declared.items() if part in architecture.components]
    return Filters(
        tuple(parts if declared else named),
        {leaf.name: declared.get(leaf.name, leaf.tensor) for leaf in architecture.shared},
        {residual(name): offset for name, offset in writers.items()},
    )


def group_filters(names: Sequence[str], groups: Sequence[int]) -> list[tuple[str, int]]:
    """Filters that mean the group of each tensor, with the group's number, the longest first: modules whose tensors are
    all of one group, or the tensors' whole names where a module's name is a part of another group's names."""
    groups_of: dict[str, set[int]] = {}
    for name, group in zip(names, groups, strict=True):
        for beginning in _beginnings(name):
            groups_of.setdefault(beginning, set()).add(group)
    modules = [next(text for text in _beginnings(name) if len(groups_of[text]) == 1) for name in names]
    for texts in (modules, names):
        filters = sorted(dict(zip(texts, groups, strict=True)).items(), key=lambda pair: -len(pair[0]))
        matched = [next(group for text, group in filters if text in name) for name in names]
        if matched == list(groups):
            break
    return filters


def _beginnings(name: str) -> list[str]:
    """The names of the modules that a tensor lies in, from the outermost on, and its own."""
    ends = [place for place, letter in enumerate(name, start=1) if letter == "."]
    return [*(name[:end] for end in ends), name]


def shortest_decimal(value: Any) -> float:
    """The float whose decimal form is the shortest that reads back to the same float32."""
    return float(np.format_float_positional(np.float32(value), unique=True, trim="0"))


def recipe_document(
    recipe: Recipe, spec: MergeSpec, config: DecoderConfig, base: str | None, parents: Sequence[str]
) -> dict[str, Any]:
    """A recipe as a mergekit document, slices of layers with equal parameters joined into one.

    `recipe` holds NumPy arrays of one candidate (see models.bank.Recipe).
    """
    architecture, layers = architecture_of(config), recipe.stacks[LAYERS]
    first = {leaf.name for leaf in architecture.shared if leaf.component == "embedding"}
    filters = filters_of(architecture)
    per_layer = [{name: np.asarray(values[i]) for name, values in layers.items()} for i in range(config.layers)]
    shared = jax.tree.map(np.asarray, recipe.shared)
    starts = [
        i
        for i in range(config.layers)
        if i == 0 or any((per_layer[i][n] != per_layer[i - 1][n]).any() for n in per_layer[i])
    ]
    slices = []
    for start, end in zip(starts, [*starts[1:], config.layers], strict=True):
        extras = {name: values for name, values in shared.items() if start == 0 and name in first}
        if end == config.layers:
            extras |= {name: values for name, values in shared.items() if name not in first}
        slices.append(_slice_document(filters, per_layer[start], extras, spec, base, parents, [start, end]))
    document: dict[str, Any] = {"merge_method": spec.method_name}
    if spec.options.has_base:
        document["base_model"] = base
    elif spec.method.base_is_first_parent:
        document["base_model"] = parents[0]
    document["slices"] = slices
    switches = switch_values(spec.method, spec.options)
    if switches:
        document["parameters"] = switches
    return document | _ending(spec.method, spec.export_dtype, spec.seed)


def path_document(path: LayerPath, spec: PathSpec, parents: Sequence[str]) -> dict[str, Any]:
    """A layer path as a passthrough merge: a slice per run of consecutive layers of one parent that add equally much.

    Where a scale is not 1, `scale` multiplies the layers' outputs (a Llama's `o_proj` and `down_proj`). All keys are
    mergekit's but two: `ends`, where the embedding and head are not those of the first and last slice, and
    `gain_offsets`, where a tensor stores its gain minus a number, as in norms that store their gains less one.
    """
    steps = [(*spec.origins[m], shortest_decimal(f)) for m, f in zip(path.layers, path.residual_scales(), strict=True)]
    slices: list[dict[str, Any]] = []
    residual = filters_of(architecture_of(spec.configs[0]), *spec.configs).residual
    start = 0
    for i in range(1, len(steps) + 1):
        parent, first, fold = steps[start]
        if i < len(steps) and steps[i] == (parent, first + i - start, fold):
            continue
        source: dict[str, Any] = {"model": parents[parent], "layer_range": [first, first + i - start]}
        if fold != 1:
            writers = [{"filter": name, "value": fold} for name in residual]
            source["parameters"] = {"scale": [*writers, {"value": 1.0}]}
        slices.append({"sources": [source]})
        start = i
    document: dict[str, Any] = {
        "merge_method": "passthrough",
        "base_model": parents[path.embedding_parent],
        "slices": slices,
    }
    if {steps[0][0], steps[-1][0]} != {path.embedding_parent}:
        document["ends"] = parents[path.embedding_parent]
    offsets = {name: offset for name, offset in residual.items() if offset}
    if offsets and any(fold != 1 for *_, fold in steps):
        document["gain_offsets"] = offsets
    return document | {"dtype": "float32", "out_dtype": spec.export_dtype}


def lineage_documents(
    member: Member,
    layers: int,
    base: str | None,
    founders: Sequence[str],
    export_dtype: str,
    seed: int,
) -> list[dict[str, Any]]:
    """The merges that make a member of a pool, as a stream of mergekit documents, in order of birth. The result of a
    document with a `name` is a model to the documents after it; the last document, the member itself, has no name.

    layers: L; base: written where the method takes deltas from one; founders: references, by number. A founder is a
    single passthrough merge.
    """
    if member.is_founder:
        alone = {"merge_method": "passthrough", "models": [{"model": founders[member.number]}]}
        return [alone | {"dtype": "float32", "out_dtype": export_dtype}]
    documents = []
    for ancestor in member.lineage():
        named = {} if ancestor is member else {"name": member_name(ancestor, founders)}
        documents.append(named | _birth_document(ancestor, layers, base, founders, export_dtype, seed))
    return documents


def _birth_document(
    member: Member, layers: int, base: str | None, founders: Sequence[str], export_dtype: str, seed: int
) -> dict[str, Any]:
    method = METHODS[member.method]
    own_base = base if method.uses_base(base is not None) else None

    def sources(parents: Sequence[Member], extent: Mapping[str, Any]) -> list[dict[str, Any]]:
        # Parameters keep their order where the parents change theirs.
        names = [member_name(parent, founders) for parent in parents]
        return _sources(method, own_base, names, extent, lambda name, k: float(member.parameters[name][k]))

    def first(parents: Sequence[Member]) -> dict[str, Any]:
        """The `base_model` of a merge of these parents, if it has one."""
        given = member_name(parents[0], founders) if method.base_is_first_parent else own_base
        return {} if given is None else {"base_model": given}

    document: dict[str, Any] = {"merge_method": method.name}
    common = {p.name: float(member.parameters[p.name]) for p in method.parameters if not p.per_parent}
    switches = switch_values(method, replace(method.options, has_base=own_base is not None))
    extents = [(begin, end) for begin, end in ((0, member.split), (member.split, layers)) if begin < end]
    if len(extents) == 1:
        parents = member.ordered(0)
        document |= first(parents) | {"models": sources(parents, {})}
    else:
        document |= first(member.ordered(0))
        document["slices"] = [
            {"sources": sources(member.ordered(begin), {"layer_range": [begin, end]}), **first(member.ordered(begin))}
            for begin, end in extents
        ]
    if common or switches:
        document["parameters"] = common | switches
    return document | _ending(method, export_dtype, seed)


def _ending(method: Method, export_dtype: str, seed: int) -> dict[str, Any]:
    """The last keys of a merge's document."""
    return {"dtype": "float32", "out_dtype": export_dtype} | ({"random_seed": seed} if method.random else {})


def _sources(
    method: Method, base: str | None, parents: Sequence[str], extent: Mapping[str, Any],
    value: Callable[[str, int], Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """The models of a merge, or of a slice of one: the base, if deltas are taken from one, then the parents. extent:
    the keys of the slice; value: (a parameter, a parent's number) -> the parent's setting."""
    sources: list[dict[str, Any]] = [] if base is None else [{"model": base, **extent}]
    for k, parent in enumerate(parents):
        per_parent = {p.name: value(p.name, k) for p in method.parameters if p.per_parent}
        sources.append({"model": parent, **extent} | ({"parameters": per_parent} if per_parent else {}))
    return sources


def switch_values(method: Method, options: Options) -> dict[str, Any]:
    """The static switches, under mergekit's names."""
    values = {
        "normalize": options.normalize,
        "normalize_weights": options.normalize,
        "rescale": {"none": False, "l1": True, "density": "density"}[options.rescale],
        "nuslerp_flatten": options.axis is None,
        "nuslerp_row_wise": options.axis == 0,
        "filter_wise": options.axis is not None,
    }
    return {name: values[name] for name in method.yaml_options}


def _slice_document(
    filters: Filters,
    layer: dict[str, np.ndarray],
    shared: dict[str, dict[str, np.ndarray]],
    spec: MergeSpec,
    base: str | None,
    parents: Sequence[str],
    layers: list[int],
) -> dict[str, Any]:
    method = spec.method

    def setting(name: str, parent: int | None) -> Any:
        def at(values: np.ndarray) -> float:
            value = values if parent is None else values[parent]
            # A value on the grid is written as the decimal fraction itself, which counts the entries that the search
            # counted.
            return round(float(value), 3) if method.parameter(name).quantised else shortest_decimal(value)

        entries = [
            {"filter": filters.shared[leaf], "value": at(parameters[name])} for leaf, parameters in shared.items()
        ]
        # A model without mixtures has no parameters of a router.
        held = [(wanted, c) for wanted, c in filters.components if c < len(layer[name])]
        entries += [{"filter": wanted, "value": at(layer[name][c])} for wanted, c in held]
        values = {entry["value"] for entry in entries}
        return values.pop() if len(values) == 1 else entries

    own_base = base if spec.options.has_base else None
    document: dict[str, Any] = {"sources": _sources(method, own_base, parents, {"layer_range": layers}, setting)}
    common = {p.name: setting(p.name, None) for p in method.parameters if not p.per_parent}
    if common:
        document["parameters"] = common
    return document


class _Dumper(yaml.SafeDumper):
    """Writes pairs such as layer ranges and filters on one line, and repeats instead of anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    list,
    lambda dumper, data: dumper.represent_sequence(
        "tag:yaml.org,2002:seq",
        data,
        flow_style=all(isinstance(entry, (int, float, str)) for entry in data) and len(data) <= 4,
    ),
)
_Dumper.add_representer(
    dict,
    lambda dumper, data: dumper.represent_mapping(
        "tag:yaml.org,2002:map", data.items(), flow_style=set(data) in ({"filter", "value"}, {"value"})
    ),
)


def in_dtype(text: str, dtype: str | None) -> str:
    """The YAML that this program wrote of a recipe, or a card that ends in such a YAML, with another `out_dtype`;
    unchanged for None."""
    before, key, tail = text.rpartition("\nout_dtype: ")
    _, _, behind = tail.partition("\n")
    return text if dtype is None or not key else f"{before}{key}{dtype}\n{behind}"


def dump_documents(documents: Sequence[Any]) -> str:
    """A YAML stream of these documents."""
    return "---\n".join(map(dump_yaml, documents))


def dump_yaml(document: Any) -> str:
    """A YAML text of one document."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
