"""LoRA adapters in PEFT's format: a base's tensors with an adapter's, expanded one by one while they are read.

An adapter folder holds adapter_config.json and adapter_model.safetensors. Each adapted weight `W [out, in]` has two
factors, `A [r, in]` and `B [out, r]`; the merged weight is `W + scale · B A` with `scale = alpha / r`, or `alpha /
sqrt(r)` where the adapter says use_rslora (Hu et al. 2022, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732).
DoRA adds a magnitude `m [out]`: the merged weight is `m · (W + scale · B A) / ‖W + scale · B A‖` per row (Liu et al.
2024, arXiv:2402.09353). A parameter of E experts, which `target_parameters` names, has one pair of factors `A [E · r,
in]` and `B [out, r · E]`: expert e's are rows `e · r` to `(e + 1) · r` and columns `e`, `e + E`, …. Rows of an
embedding may have been trained by themselves (`trainable_token_indices`). Values are rounded as PEFT's merge_and_unload
rounds them: computed in float32, and cast to the base's dtype once.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from evojax_merge.checkpoints.adapted_tensors import (
    AdaptedTensor,
    DoraTensor,
    ExpertColumns,
    adapted_experts,
    trained_rows,
)
from evojax_merge.checkpoints.config_file import decoder_settings
from evojax_merge.checkpoints.decoder_folder import DecoderFolder, TensorSlice, decoder_of, in_memory
from evojax_merge.checkpoints.folder import ComputedTensor, Folder, Tensor, is_float, read_header
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, nearest, shown
from evojax_merge.models.architecture import EMBEDDING, Architecture, Leaf
from evojax_merge.models.config_keys import FINITE, TEXTS, Expected, whole
from evojax_merge.schema.patterns import pattern_matches

Number = TypeVar("Number", int, float)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
# The prefix that PEFT puts before the names of the base's modules.
PREFIX = "base_model.model."
# A module's name, and the part of its adapter that the tensor is.
PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<linear>lora_[AB])\.weight|(?P<embedding>lora_embedding_[AB])|"
    r"(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|token_adapter\.(?P<rows>trainable_tokens_delta))"
)
ROWS = "trainable_tokens_delta"
# PEFT wraps a module once for each of its adapted parameters, the first one innermost.
WRAPPED = ".base_layer"
PEFT_WRAPPERS = re.compile(r"(\.token_adapter)?(\.base_layer)+(?=\.)")
# PEFT may write a module that was trained as a whole three times: by its own name, and with one of these behind it.
COPIES = re.compile(r"\.(modules_to_save|original_module)(?=\.)")
# Keys of adapter_config.json that change an adapter's meaning in ways that a low-rank sum cannot express.
REFUSED_KEYS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "use_bdlora", "use_qalora",
)  # fmt: skip
# Initialisations that leave the base as it is; all others change it when the adapter is made.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# The rules for the values of adapter_config.json. Ranks of adapters in use go up to some hundreds.
TARGETS = "target_modules"
BASE = Expected(lambda value: value is None or isinstance(value, str), "a folder or a hub id")
NAMES = replace(TEXTS, words="a list of modules' names")
PATTERNS = Expected(lambda value: isinstance(value, dict), "a mapping from modules' names")
RANK = whole(1, 2**16)
TOKENS = "trainable_token_indices"
INDICES = Expected(
    lambda value: isinstance(value, list) and all(type(index) is int and index >= 0 for index in value),
    "a list of tokens' numbers",
)
SWITCH = Expected(lambda value: value is None or isinstance(value, bool), "true or false")
# The keys that switch something on, by the field of `AdapterConfig`.
SWITCHES = {
    "rank_stabilised": "use_rslora", "fan_in_fan_out": "fan_in_fan_out", "ties_weights": "ensure_weight_tying",
    "is_dora": "use_dora",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter, from its adapter_config.json.

    base: the model that the adapter was trained on, by the name that its author used. ranks, alphas: by pattern of
    module names, for modules with other values than `rank` and `alpha`. targets: the adapted modules, by names,
    ends of names, or one regular expression. parameters: the adapted parameters of modules, by names or ends of
    names. rows: by name of an embedding or head, the numbers of the rows that were trained; of the name None: of
    any. ties_weights: the adapter ties its embedding and head where the base does. is_dora: every adapted weight
    has a magnitude.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: tuple[str, ...] | str
    parameters: tuple[str, ...]
    rows: Mapping[str | None, tuple[int, ...]]
    saved_modules: tuple[str, ...]
    rank_stabilised: bool
    fan_in_fan_out: bool
    ties_weights: bool
    is_dora: bool

    def rank_of(self, module: str) -> int:
        return self._by_pattern("rank_pattern", self.ranks, module, self.rank)

    def scale(self, module: str) -> float:
        """The factor that the module's `B A` is multiplied by."""
        rank = self.rank_of(module)
        alpha = self._by_pattern("alpha_pattern", self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def adapts(self, module: str) -> bool:
        """Return whether PEFT would give a base's module of this name an adapter."""
        if isinstance(self.targets, str):
            where = f"{self.path}: target_modules"
            return self.targets == "all-linear" or pattern_matches(where, self.targets, module, "fullmatch")
        return _ends_with(module, self.targets)

    def adapts_parameter(self, name: str) -> bool:
        """Return whether PEFT would give a parameter of this name an adapter."""
        return _ends_with(name, self.parameters)

    def saves(self, name: str) -> bool:
        """Return whether a tensor belongs to a module that was trained as a whole."""
        return any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in self.saved_modules)

    def _by_pattern(self, key: str, values: Mapping[str, Number], module: str, default: Number) -> Number:
        """The value of the first pattern that is the module's name or an end of it, as PEFT looks them up."""
        where = f"{self.path}: {key}"
        fitting = (
            value for text, value in values.items() if pattern_matches(where, rf"(.*\.)?({text})$", module, "match")
        )
        return next(fitting, default)


def _ends_with(name: str, ends: Collection[str]) -> bool:
    """Return whether a module's or parameter's name is one of `ends`, or ends with one, in whole parts."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def is_adapter(path: Path) -> bool:
    """Return whether a folder holds an adapter and no model. Some trainers save the base's config.json with it."""
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    weights = {file.name for pattern in ("*.safetensors*", "pytorch_model*.bin*") for file in path.glob(pattern)}
    return weights == {ADAPTER_FILE} or not (path / "config.json").exists()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json. Raises InputError for another kind of adapter than LoRA, for settings that a merge into
    the base's weights cannot express, and for invalid values."""
    path = folder / ADAPTER_CONFIG
    raw = read_json_object(path, missing="expected an adapter folder as PEFT saves it")
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(path, f"peft_type: {shown(kind)} is not supported; expected LORA (DoRA is one)")
    for key in REFUSED_KEYS:
        if raw.get(key):
            raise InputError(
                path, f"{key}: {shown(raw[key])} is not supported; merge the adapter in with peft's merge_and_unload"
            )
    start = raw.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise InputError(
            path,
            f"init_lora_weights: {shown(start)} changes the base as well; save the adapter converted to a plain LoRA "
            "(peft's save_pretrained with path_initial_model_for_weight_conversion)",
        )

    def by_pattern(key: str, expected: Expected) -> dict[str, Any]:
        entries = PATTERNS.check(path, key, raw.get(key) or {})
        return {name: expected.check(path, f"{key}.{name}", value) for name, value in entries.items()}

    base = BASE.check(path, "base_model_name_or_path", raw.get("base_model_name_or_path"))
    targets = raw.get(TARGETS) or []
    if not isinstance(targets, str):
        targets = tuple(NAMES.check(path, TARGETS, targets))
    rows = raw.get(TOKENS) or {}
    if not isinstance(rows, dict):
        rows = {None: rows}
    return AdapterConfig(
        path=path,
        base=base or None,
        rank=RANK.check(path, "r", raw.get("r", 8)),
        alpha=float(FINITE.check(path, "lora_alpha", raw.get("lora_alpha", 8))),
        ranks=by_pattern("rank_pattern", RANK),
        alphas={name: float(value) for name, value in by_pattern("alpha_pattern", FINITE).items()},
        targets=targets,
        parameters=tuple(NAMES.check(path, "target_parameters", raw.get("target_parameters") or [])),
        rows={name: tuple(INDICES.check(path, TOKENS, numbers)) for name, numbers in rows.items()},
        saved_modules=tuple(NAMES.check(path, "modules_to_save", raw.get("modules_to_save") or [])),
        **{field: bool(SWITCH.check(path, key, raw.get(key))) for field, key in SWITCHES.items()},
    )


def open_adapted(path: Path, base: Folder, adapter: Path) -> Folder:
    """Open the base with the adapter of the folder `adapter`, as a folder at `path`. Reads headers, and the weights of
    modules that PEFT only wraps.

    Raises InputError where the adapter cannot be merged, or belongs to another base: for a module that the base lacks,
    or the first shape that differs.
    """
    config, file = read_adapter_config(adapter), adapter / ADAPTER_FILE
    if not file.exists() and any(adapter.glob("adapter_model.bin")):
        raise InputError(
            adapter, "holds its adapter as a pickle, which can run code when it is read; convert it once with peft "
            "(save_pretrained writes safetensors)",
        )  # fmt: skip
    tensors: Mapping[str, Tensor] = read_header(file)
    if not tensors:
        raise InputError(file, "holds no tensor; expected those of an adapter")
    decoder = decoder_of(base)
    architecture, head = decoder.architecture, decoder.names.own_head
    names = {in_memory(name): name for name in decoder.other_modules}
    names |= {decoder.in_memory(name): decoder.names.in_file(name) for name in decoder.entries}
    parameters = [] if architecture is None else [*_parameters(decoder, architecture)]
    names |= {
        parameter.name: decoder.names.in_file(parameter.leaves[0].tensor_of(parameter.layer))
        for parameter in parameters if len(parameter.leaves[0].shape) == 2
    }  # fmt: skip
    # A packed tensor, such as that of all experts, is replaced by its parts: an adapter's modules are as small as the
    # parts.
    parts_in_file = {decoder.names.in_file(name): tensor for name, tensor in decoder.entries.items()}
    kind, in_file, tied_head = Folder, {**decoder.other_modules, **parts_in_file}, None
    embedding = None if architecture is None else architecture.leaf(EMBEDDING)
    shared = None if embedding is None else decoder.entries.get(embedding.tensor)
    is_tied = decoder.config.get("tie_word_embeddings", False)
    if embedding is not None and head is not None and shared is not None and is_tied:
        pair = (decoder.in_memory(embedding.tensor), decoder.in_memory(head))
        # The adapter unties the two where either was trained as a whole module, and it does not tie them.
        if any(map(config.saves, pair)) and not config.ties_weights:
            kind = UntiedFolder
            names[pair[1]] = decoder.names.in_file(head)
            in_file[decoder.names.in_file(head)] = shared
        else:
            tied_head = pair[1]
            tensors = _without_head(config, tensors, pair, shared)
    base = kind(base.path, in_file)
    find = partial(_find, base, names, tied_head)
    modules, saved = _sorted(tensors, find)
    entries = dict(base.entries)
    for name, (key, tensor) in saved.items():
        _check_saved(base, config, name, tensor, key)
        # PEFT also saves modules that it only wraps, and the embedding and the head of a base of another size.
        is_other = tensor.dtype != base.entries[name].dtype
        if config.saves(name) or is_other or not np.array_equal(tensor.load(), base.entries[name].load()):
            entries[name] = tensor
    experts = _wrapped_modules(config, parameters)
    for module, parts in modules.items():
        if module in experts:
            entries |= _adapted_experts(config, experts[module], decoder, entries, parts)
            continue
        name = find(next(iter(parts.values())), f"{PREFIX}{module}", f"{module}.weight")
        # A known module's class decides, as in PEFT, whether its weight is stored as `[in, out]`.
        leaf = None if architecture is None else architecture.leaf_of(decoder.names.of_architecture(name))
        transposed = config.fan_in_fan_out if architecture is None else leaf is not None and leaf.transposed
        if ROWS in parts:
            entries[name] = _with_rows(config, module, name, entries[name], parts.pop(ROWS))
        if parts:
            entries[name] = _adapted(config, module, name, entries[name], parts, transposed)
    return kind(path, entries)


def _sorted(
    tensors: Mapping[str, Tensor], find: Callable[[Tensor, str, str], str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[str, Tensor]]]:
    """The tensors of an adapter's file: each module's parts by their kind, and the whole tensors, with their keys, by
    their names in the base. find: (a tensor, its key, the name that it has in memory) -> its name in the base."""
    modules: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (trained := COPIES.sub("", key)) != key and trained in tensors:
            continue
        if not is_float(tensor.dtype):
            raise InputError(tensor.file, f"{key} holds {tensor.dtype}; expected float weights (a quantised adapter?)")
        inner = key.removeprefix(PREFIX)
        part = PART.fullmatch(inner)
        if part is not None:
            module = part["module"]
            kind_of_part = part["linear"] or part["embedding"] or part["magnitude"] or part["rows"]
            if kind_of_part in modules.setdefault(module, {}):
                raise InputError(tensor.file, f"holds {PREFIX}{module}.{kind_of_part} twice, also as {key}")
            modules[module][kind_of_part] = tensor
        elif "lora_" in inner:
            raise InputError(tensor.file, f"{key}: a part of an adapter that is not known; expected lora_A and lora_B")
        else:
            name = find(tensor, key, PEFT_WRAPPERS.sub("", inner))
            if name in saved:
                raise InputError(
                    tensor.file, f"holds {name} twice: as {saved[name][0]} and as {key}; expected one of them"
                )
            saved[name] = key, tensor
    return modules, saved


@dataclass(frozen=True)
class UntiedFolder(Folder):
    """A folder in which the head is a tensor of its own, whatever its config.json says."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return super().config | {"tie_word_embeddings": False}


def _without_head(
    config: AdapterConfig, tensors: Mapping[str, Tensor], pair: tuple[str, str], shared: Tensor
) -> dict[str, Tensor]:
    """An adapter's tensors without those of a tied head that say the same as the embedding's. pair: the names of
    embedding and head; shared: the base's tensor of both."""
    embedding, head = (f"{PREFIX}{name.removesuffix('weight')}" for name in pair)
    plain = {PEFT_WRAPPERS.sub("", key): tensor for key, tensor in tensors.items()}

    def is_copy(key: str, tensor: Tensor) -> bool:
        name = PEFT_WRAPPERS.sub("", key)
        if not name.startswith(head):
            return False
        if config.ties_weights and name == f"{head}weight":
            return True
        other = plain.get(name.replace(head, embedding, 1), shared)
        return tensor.shape == other.shape and np.array_equal(tensor.load(), other.load())

    return {key: tensor for key, tensor in tensors.items() if not is_copy(key, tensor)}


def _find(base: Folder, names: Mapping[str, str], tied_head: str | None, tensor: Tensor, key: str, name: str) -> str:
    """The base's name of the tensor that PEFT calls `name`; checkpoints of some families omit the first part of a name.
    names: the decoder's tensor names in memory -> in the file. Raises InputError where the base has no such tensor, and
    for a tied head, whose name in memory is `tied_head`."""
    if tied_head is not None and _ends_with(name, [tied_head]):
        raise InputError(
            tensor.file, f"{key}: changes the head, which is the embedding in {base.path} (tie_word_embeddings); "
            "expected a base with a head of its own",
        )  # fmt: skip
    candidates = (name, names.get(name), names.get(in_memory(name)), name.partition(".")[2])
    base_name = next(
        (candidate for candidate in candidates if candidate is not None and candidate in base.entries), None
    )
    if base_name is None:
        near = nearest(name, names.keys() | base.entries.keys())
        hint = "" if near is None else f" (did you mean '{near}'?)"
        raise InputError(
            tensor.file, f"{key}: the base {base.path} has no tensor {name}{hint}; expected an adapter of this base"
        )
    return base_name


def resized_base(rows: int) -> str:
    """The advice on a base of another number of tokens' rows than an adapter needs."""
    return f"save a copy of the base with {rows} rows (transformers' resize_token_embeddings({rows}))"


def _check_saved(base: Folder, config: AdapterConfig, name: str, tensor: Tensor, key: str) -> None:
    """Raises InputError where a tensor cannot replace the base's: for another shape, and for an embedding that was
    trained apart from a tied head."""
    expected = base.entries[name].shape
    if tensor.shape != expected:
        is_of_tokens = decoder_settings(base.config).get("vocab_size") == expected[0]
        advice = ""
        if is_of_tokens and tensor.shape[1:] == expected[1:]:
            advice = f"; {resized_base(tensor.shape[0])}, and name COPY+ADAPTER"
        raise InputError(
            tensor.file, f"{key} has shape {list(tensor.shape)}; the base {base.path} has {list(expected)} for {name}"
            f"{advice}",
        )  # fmt: skip
    if (
        config.saves(name)
        and not config.ties_weights
        and "embed" in name
        and base.config.get("tie_word_embeddings", False)
    ):
        raise InputError(
            tensor.file, f"{key}: trained apart from the head, which is the embedding in {base.path} "
            "(tie_word_embeddings); expected an adapter with ensure_weight_tying",
        )  # fmt: skip


def _with_rows(config: AdapterConfig, module: str, name: str, base: Tensor, rows: Tensor) -> Tensor:
    """An embedding or head with rows that were trained by themselves. Raises InputError where they do not fit."""
    numbers = next((rows for end, rows in config.rows.items() if end is None or _ends_with(module, [end])), ())
    expected = (len(numbers), *base.shape[1:])
    if rows.shape != expected or not all(number < base.shape[0] for number in numbers):
        raise InputError(
            rows.file, f"{PREFIX}{module}.token_adapter.{ROWS} has shape {list(rows.shape)}; expected "
            f"{list(expected)}: {config.path.name} names {len(numbers)} rows in {TOKENS}, and the base's {name} has "
            f"{base.shape[0]:,}",
        )  # fmt: skip
    identity = np.array(numbers, np.int64).tobytes()
    return ComputedTensor(base.dtype, base.shape, (base, rows), trained_rows, (numbers,), identity)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a layer that transformers has in memory by another name or in another form than files do: its name
    there, and the leaves that it holds one above the other."""

    name: str
    layer: int
    leaves: tuple[Leaf, ...]


def _parameters(decoder: DecoderFolder, architecture: Architecture) -> Iterator[_Parameter]:
    """The parameters of all layers: routers, and a layer's experts, which are one parameter whatever the file holds."""
    tensors: dict[str, tuple[str, ...]] = {
        leaf.tensor: (leaf.name,) for leaf in architecture.leaves if leaf.shape[0] == "experts"
    }
    tensors |= architecture.packed
    depth = decoder.config.get("num_hidden_layers") if tensors else 0
    # A layer has a tensor at least, whatever the config says.
    for layer in range(min(depth, len(decoder.entries)) if isinstance(depth, int) else 0):
        for tensor, held in tensors.items():
            leaves = tuple(leaf for leaf in architecture.leaves if leaf.name in held)
            yield _Parameter(decoder.in_memory(tensor.replace("{layer}", str(layer))), layer, leaves)


def _wrapped_modules(config: AdapterConfig, parameters: Sequence[_Parameter]) -> dict[str, _Parameter]:
    """The parameters of experts that have an adapter, by the name of the wrapped module."""
    modules: dict[str, list[_Parameter]] = {}
    for parameter in parameters:
        if len(parameter.leaves[0].shape) == 3 and config.adapts_parameter(parameter.name):
            modules.setdefault(parameter.name.rpartition(".")[0], []).append(parameter)
    return {
        module + WRAPPED * depth: parameter
        for module, each in modules.items()
        for depth, parameter in enumerate(reversed(each))
    }


def _adapted_experts(
    config: AdapterConfig, parameter: _Parameter, decoder: DecoderFolder, entries: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a layer's experts with their adapters, by name in the file. Raises InputError where the adapter's
    parts do not fit each other or the tensors."""
    file, rank, scale = next(iter(parts.values())).file, config.rank_of(parameter.name), config.scale(parameter.name)
    if parts.keys() != {"lora_A", "lora_B"}:
        raise InputError(file, f"{PREFIX}{parameter.name}: has {', '.join(sorted(parts))}; expected lora_A and lora_B")
    a, b, first = parts["lora_A"], parts["lora_B"], parameter.leaves[0]
    numbers = range(a.shape[0] + 1) if first.has_experts else range(1)
    names = [
        list(takewhile(entries.__contains__, (
            decoder.names.in_file(leaf.tensor_of(parameter.layer, number)) for number in numbers
        )))
        for leaf in parameter.leaves
    ]  # fmt: skip
    shapes = {entries[name].shape for each in names for name in each}
    if not all(names) or {*map(len, shapes)} != {len(first.shape) - first.has_experts} or len(shapes) > 1:
        raise InputError(file, f"{PREFIX}{parameter.name}: the base {decoder.path} has no such experts in that layer")
    (shape,) = shapes
    experts = len(names[0]) if first.has_experts else shape[0]
    outputs_first = first.has_experts or (first.shape[-1] == "hidden") != first.writes_residual
    outputs, inputs = shape[-2:] if outputs_first else reversed(shape[-2:])
    expected = (experts * rank, inputs), (outputs * len(names), experts * rank)
    if (a.shape, b.shape) != expected:
        raise InputError(
            file, f"{PREFIX}{parameter.name}: lora_A and lora_B have shapes {list(a.shape)} and {list(b.shape)}; "
            f"expected {list(expected[0])} and {list(expected[1])}: the base has {experts} experts, and the rank is "
            f"{rank}",
        )  # fmt: skip
    if not first.has_experts:
        whole, settings, identity = entries[names[0][0]], (scale, outputs_first), np.float64(scale).tobytes()
        return {names[0][0]: ComputedTensor(whole.dtype, shape, (whole, a, b), adapted_experts, settings, identity)}
    return {
        name: AdaptedTensor(
            entries[name],
            TensorSlice(a, (slice(expert * rank, (expert + 1) * rank),)),
            ExpertColumns(b, (slice(i * outputs, (i + 1) * outputs), slice(expert, None, experts))),
            scale,
        )
        for i, each in enumerate(names)
        for expert, name in enumerate(each)
    }


def _adapted(
    config: AdapterConfig, module: str, name: str, base: Tensor, parts: Mapping[str, Tensor], is_transposed: bool
) -> Tensor:
    """One weight with its adapter. Raises InputError where the adapter's parts do not fit each other or the weight."""
    of_tokens = sorted(part for part in parts if part.startswith("lora_embedding"))
    of_layer = sorted(part for part in parts if part in ("lora_A", "lora_B"))
    embedding, file = bool(of_tokens), next(iter(parts.values())).file
    if of_tokens and of_layer:
        raise InputError(
            file, f"{PREFIX}{module}.{of_tokens[0]}: is of an embedding, and {of_layer[0]} of the same module is of "
            "another layer; expected the factors of one of them",
        )  # fmt: skip
    a_name, b_name = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [part for part in (a_name, b_name) if part not in parts]
    if missing:
        raise InputError(file, f"{PREFIX}{module}: has no {missing[0]}; expected {a_name} and {b_name}")
    is_named = config.adapts(module) or config.adapts_parameter(f"{module}.weight")
    if config.targets and not is_named:
        raise InputError(
            config.path, f"target_modules: do not name {module}, of which {file.name} holds an adapter; peft would "
            "leave it out",
        )  # fmt: skip
    transposed = embedding or is_transposed
    rank, shape = config.rank_of(module), base.shape
    if len(shape) != 2:
        raise InputError(file, f"{PREFIX}{module}: adapts {name} of shape {list(shape)}; expected a matrix")
    outputs, inputs = reversed(shape) if transposed else shape
    expected = {a_name: (rank, inputs), b_name: (outputs, rank), "lora_magnitude_vector": (outputs,)}
    for part, tensor in parts.items():
        actual = tensor.shape if part != "lora_magnitude_vector" else (int(np.prod(tensor.shape)),)
        if actual != expected[part]:
            raise InputError(
                file, f"{PREFIX}{module}.{part} has shape {list(tensor.shape)}; expected {list(expected[part])}: the "
                f"base's {name} is {list(shape)}, and the rank {rank}",
            )  # fmt: skip
    adapted = AdaptedTensor(base, parts[a_name], parts[b_name], config.scale(module), transposed)
    magnitude = parts.get("lora_magnitude_vector")
    if (magnitude is not None) != config.is_dora:
        what = "no such tensor" if magnitude is None else "a tensor"
        raise InputError(
            file, f"{PREFIX}{module}.lora_magnitude_vector: found {what}, but {config.path.name} says use_dora: "
            f"{str(config.is_dora).lower()}; expected one for each adapted weight of DoRA, and no other",
        )  # fmt: skip
    return adapted if magnitude is None else DoraTensor(adapted, magnitude)
