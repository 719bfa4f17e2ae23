"""mergekit-moe's YAML: a mixture of experts whose experts are the MLPs of dense models.

Attention, norms, embedding and head are the base's; each layer's experts are the MLPs of that layer in the models; the
router's rows come from prompts (see `gates`). Tensors are written one by one, under the names of the files that the
mixtures' makers published: each expert by itself, which every version of transformers reads.
"""

import json
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from evojax_merge.checkpoints.config_file import config_values, read_decoder_config
from evojax_merge.checkpoints.decoder_folder import LM_HEAD, TensorSlice, decoder_of
from evojax_merge.checkpoints.derived import Find, open_model, parts_of
from evojax_merge.checkpoints.folder import FLOAT_DTYPES, ComputedTensor, Tensor, is_finite, is_float
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.checkpoints.tokens import TOKENIZER_FILES, load_tokenizer
from evojax_merge.checkpoints.writer import ShardWriter, TensorSpec
from evojax_merge.config.documents import parse
from evojax_merge.errors import InputError, nearest, shown
from evojax_merge.mergekit.execute import DEFAULTS, MergeSettings, Progress
from evojax_merge.mergekit.gates import (
    EMBEDDING,
    DenseModel,
    Prompts,
    close_gates,
    prompt_gates,
    random_gates,
    router_rows,
)
from evojax_merge.mergekit.other_formats import MOE, other_format
from evojax_merge.mergekit.schema import parse_reference
from evojax_merge.models.architecture import ROUTER, find_architecture, tensor_shape, tensors_of
from evojax_merge.models.config import LlamaLikeConfig
from evojax_merge.models.families.llama_like import LEAVES
from evojax_merge.schema.section import MAX_SEED, Location, Number, Section, Text, Whole
from evojax_merge.system.regular_file import copy_regular

MOE_RECIPE = "mergekit_moe_config.yml"
RANDOM, HIDDEN = ("random", "uniform_random"), ("hidden", "hidden_avg", "hidden_last")


class Expert(Section):
    """A model whose MLPs become an expert of each layer."""

    source_model: Location
    positive_prompts: list[Text] | None = Field(None, max_length=1000)
    negative_prompts: list[Text] | None = Field(None, max_length=1000)
    noise_scale: Number | None = None
    residual_scale: Number | None = None

    @property
    def prompts(self) -> Prompts:
        return self.positive_prompts or [], self.negative_prompts or []


class RecipeLayer(Section):
    """The experts of one layer: their numbers among the recipe's `experts`, and the scale and the bias of the gate of
    each (see `gates.router_rows`)."""

    experts: list[Annotated[Whole, Field(ge=0)]] = Field(min_length=1, max_length=1000)
    scale: list[Number]
    bias: list[Number]


class MixtureRecipe(Section):
    """The file; `gate_input`, `layers` and `random_seed` are ours."""

    base_model: Location
    experts: list[Expert] = Field(min_length=1, max_length=1000)
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = "hidden"
    gate_input: Literal["layer", "normed"] = "layer"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    experts_per_token: Whole = Field(2, ge=1, le=1000)
    shared_experts: list[Expert] | None = Field(None, max_length=1)
    architecture: Text | None = None
    layers: list[RecipeLayer] | None = Field(None, min_length=1, max_length=10_000)
    random_seed: Whole = Field(0, ge=0, le=MAX_SEED)

    @property
    def all_experts(self) -> list[Expert]:
        """The experts among which the router chooses, then those that take every token."""
        return [*self.experts, *(self.shared_experts or [])]

    @property
    def experts_per_layer(self) -> int:
        """The number of experts among which the router of a layer chooses."""
        return len(self.experts if self.layers is None else self.layers[0].experts)

    def routed_expert(self, layer: int, number: int) -> Expert:
        """The expert that stands at a number in a layer."""
        return self.experts[number if self.layers is None else self.layers[layer].experts[number]]

    def routers(self, gates: np.ndarray) -> np.ndarray:
        """The routers float32[L, E, H] of all layers. gates: float32[L, K, H], those of the recipe's `experts`."""
        gates = gates[:, : len(self.experts)]
        if self.layers is None:
            return gates
        fields = zip(*((layer.experts, layer.scale, layer.bias) for layer in self.layers), strict=True)
        return router_rows(gates, *map(np.array, fields))


# (experts, experts of a token, shared experts, an expert's width) -> keys of config.json.
Settings = Callable[[int, int, int, int], dict[str, Any]]


@dataclass(frozen=True)
class Output:
    """A kind of mixture that can be written.

    name: mergekit's; model_type, class_name: as in config.json; sources: the model_type of its dense models; shared:
    the forms of its expert that takes every token (`gated`: scaled by a gate, `plain`, `none`); settings: the keys of
    config.json beside a dense model's; described_by: the kind whose registered architecture has the same tensors,
    for a kind that is not registered, and written_name: the names of its tensors.
    """

    name: str
    model_type: str
    class_name: str
    sources: tuple[str, ...]
    shared: tuple[str, ...]
    settings: Settings
    described_by: "Output | None" = None
    written_name: Callable[[str], str] = lambda name: name


def _qwen(experts: int, per_token: int, shared: int, width: int) -> dict[str, Any]:
    keys = {"num_experts": experts, "num_experts_per_tok": per_token, "decoder_sparse_step": 1, "norm_topk_prob": True}
    return keys | {"mlp_only_layers": [], "moe_intermediate_size": width}


def _deepseek(experts: int, per_token: int, shared: int, width: int) -> dict[str, Any]:
    code = {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModel": "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}  # fmt: skip
    return {
        "n_routed_experts": experts, "n_shared_experts": shared or None, "num_experts_per_tok": per_token,
        "first_k_dense_replace": 0, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True,
        "moe_intermediate_size": width,
        "auto_map": {key: f"deepseek-ai/deepseek-moe-16b-base--{name}" for key, name in code.items()},
    }  # fmt: skip


def _deepseek_name(name: str) -> str:
    """DeepSeek's name of a tensor of Mixtral."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    for module, other in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = name.replace(f".{module}.weight", f".{other}.weight")
    return name


# In the order in which they are tried. All normalise the weights of a token's experts to a sum of 1.
_LLAMAS = ("llama", "mistral", "phi3")
_MIXTRAL = Output(
    "Mixtral", "mixtral", "MixtralForCausalLM", (*_LLAMAS, "gemma"), ("none",),
    lambda experts, per_token, *_: {"num_local_experts": experts, "num_experts_per_tok": per_token},
)  # fmt: skip
OUTPUTS = (
    _MIXTRAL,
    Output(
        "DeepSeek MoE", "deepseek", "DeepseekForCausalLM", _LLAMAS, ("none", "plain"), _deepseek, _MIXTRAL,
        _deepseek_name,
    ),
    Output(
        "Qwen MoE", "qwen2_moe", "Qwen2MoeForCausalLM", (*_LLAMAS, "gemma", "qwen2"), ("gated",),
        lambda *numbers: {**_qwen(*numbers), "shared_expert_intermediate_size": numbers[-1]},
    ),
    Output("Qwen3 MoE", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), ("none",), _qwen),
)  # fmt: skip
DENSE = tuple(dict.fromkeys(kind for output in OUTPUTS for kind in output.sources))
# Parts of dense models that no mixture among transformers' classes has, by the model_type.
_SANDWICH = "its layers have norms behind attention and MLP"
UNFIT = {
    "gemma2": f"{_SANDWICH}, and its logits a soft cap", "gemma3_text": _SANDWICH, "gemma3n_text": _SANDWICH,
    "phi": "its attention and MLP stand side by side, and the MLP has no gate",
}  # fmt: skip
# Keys of a dense model's config that say nothing of its mixture.
DROPPED = ("architectures", "auto_map", "torch_dtype", "transformers_version", "_name_or_path", "layer_types",
           "use_bidirectional_attention", "hidden_activation")  # fmt: skip
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")


@dataclass(frozen=True)
class MixtureTensor:
    """One tensor of a mixture: that of a dense model, changed as its expert says; without an `entry`, the gates of
    layer `gates_of`, or zeros (None). is_residual: whether `residual_scale` counts; is_shared: whether the gate is that
    of the shared expert."""

    spec: TensorSpec
    entry: Tensor | None = None
    expert: Expert | None = None
    is_residual: bool = False
    gates_of: int | None = None
    is_shared: bool = False


@dataclass(frozen=True)
class MixturePlan:
    """A recipe matched with opened models: everything is checked, and nothing is computed. rows: the tensors, by name;
    config: config.json, and decoder: its meaning; models: the folder of each model, by its reference, the base
    first; notes: warnings that the headers give."""

    recipe: MixtureRecipe
    text: str
    base: DenseModel
    rows: Mapping[str, MixtureTensor]
    config: Mapping[str, Any]
    decoder: LlamaLikeConfig
    models: Mapping[str, Path]
    allow_nonfinite: bool = False
    notes: tuple[str, ...] = ()
    given_gates: np.ndarray | None = None

    @cached_property
    def gates(self) -> np.ndarray:
        """float32[L, K, H]: a gate for each of the recipe's experts, then for a shared expert that has one. Computed
        once, where they are not given. Raises InputError for prompts that the tokenizer cannot read."""
        recipe, base = self.recipe, self.base
        if self.given_gates is not None:
            return self.given_gates
        if recipe.gate_mode in RANDOM:
            shape = (base.config.layers, len(recipe.all_experts), base.config.hidden)
            return random_gates(recipe.gate_mode, shape, recipe.random_seed)
        prompted = [expert.prompts for expert in recipe.all_experts if expert.positive_prompts]
        return prompt_gates(base, load_tokenizer(base.path), prompted, recipe.gate_mode, recipe.gate_input == "normed")

    @cached_property
    def _routers(self) -> np.ndarray:
        return self.recipe.routers(self.gates)

    @property
    def warnings(self) -> list[str]:
        """Warnings, a line each; the last of them say which experts' gates are close."""
        names = [expert.source_model for expert in self.recipe.experts]
        is_random = self.recipe.gate_mode in RANDOM
        return [*self.notes, *([] if is_random else close_gates(self.gates[:, : len(names)], names))]

    @property
    def nbytes(self) -> int:
        return sum(row.spec.nbytes for row in self.rows.values())

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return [part for folder in self.models.values() for part in parts_of(folder)]

    def write(self, folder: Path, progress: Progress, max_shard_bytes: int) -> None:
        """Write the mixture into an empty folder."""
        with ShardWriter(folder, {name: row.spec for name, row in self.rows.items()}, max_shard_bytes) as writer:
            for name in writer.order:
                writer.write(name, self.tensor(name))
                progress(self.rows[name].spec.nbytes)
        texts = {"config.json": json.dumps(self.config, indent=2, ensure_ascii=False) + "\n", MOE_RECIPE: self.text}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name in ("generation_config.json", *TOKENIZER_FILES):
            if (self.base.path / name).exists():
                copy_regular(self.base.path / name, folder / name, "a model's")

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as it is written. Raises InputError for one that holds NaN or infinity."""
        row = self.rows[name]
        values = self._values(name, row).astype(row.spec.dtype, copy=False)
        if not self.allow_nonfinite and not is_finite(values):
            where = self.base.path if row.entry is None else row.entry.file
            what = f"{name} would hold NaN or Inf of it in {row.spec.dtype} (noise_scale, residual_scale, or beyond its"
            raise InputError(where, f"{what} range?); pass --allow-nonfinite to go on")
        return values

    def _values(self, name: str, row: MixtureTensor) -> np.ndarray:
        if row.entry is None:
            if row.gates_of is None:
                return np.zeros(row.spec.shape, row.spec.dtype)
            return self.gates[row.gates_of, -1:] if row.is_shared else self._routers[row.gates_of]
        values = row.entry.load()
        noise, scale = (None, None) if row.expert is None else (row.expert.noise_scale, row.expert.residual_scale)
        if noise is not None:
            rng = np.random.default_rng([self.recipe.random_seed, zlib.crc32(name.encode())])
            values = values.astype(np.float32) + np.float32(noise) * rng.standard_normal(values.shape, np.float32)
        if scale is not None and row.is_residual:
            values = values.astype(np.float32) * np.float32(scale)
        return values


# ---------------------------------------------------------------------------------------------------------------
# Recipe


def parse_mixture(path: Path, document: Any) -> tuple[MixtureRecipe, list[str]]:
    """The recipe of a YAML document, and a line for each key that mergekit-moe ignores. Raises InputError for a key
    that is nearly one of its keys, and for values that it does not take."""
    message = other_format(document)
    if message is None and isinstance(document, dict) and "merge_method" in document and "experts" not in document:
        message = "is a mergekit recipe, not a config of mergekit-moe; do it with evojax-merge merge"
    if message and message != MOE:
        raise InputError(path, message)
    ignored: list[str] = []

    def checked(place: str, section: Any, names: Collection[str]) -> Any:
        kept = {}
        for key, value in section.items() if isinstance(section, dict) else ():
            near = None if key in names else nearest(str(key), names)
            if near is not None:
                raise InputError(path, f"{place}{key}: unknown key (did you mean '{near}'?)")
            if key not in names:
                ignored.append(f"{path}: {place}{key}: not a key of mergekit-moe; ignored")
            else:
                is_model = key in ("base_model", "source_model") and isinstance(value, dict)
                kept[key] = parse_reference(f"{path}: {place}{key}", value) if is_model else value
        return kept if isinstance(section, dict) else section

    document = checked("", document, MixtureRecipe.model_fields)
    for key in ("experts", "shared_experts"):
        if isinstance(document, dict) and isinstance(document.get(key), list):
            entries = enumerate(document[key])
            document[key] = [checked(f"{key}.{i}.", entry, Expert.model_fields) for i, entry in entries]
    return parse(path, document, MixtureRecipe), ignored


def check_experts(path: Path, recipe: MixtureRecipe, allow_same: bool) -> None:
    """Raises InputError for numbers of experts and prompts with which no mixture works; allow_same: experts may all be
    one model."""
    experts, mode, per_token = recipe.experts, recipe.gate_mode, recipe.experts_per_token
    _check_layers(path, recipe)
    without = next((i for i, expert in enumerate(experts) if not expert.positive_prompts), None)
    lonely = [e.source_model for e in recipe.all_experts if e.negative_prompts and not e.positive_prompts]
    several, first, is_random = len(experts) > 1, experts[0], mode in RANDOM
    for is_fault, what in (
        (
            per_token > recipe.experts_per_layer,
            f"experts_per_token: {per_token}, of {recipe.experts_per_layer} experts; expected no more",
        ),
        (
            recipe.gate_input == "normed" and mode not in HIDDEN,
            f"gate_input: normed, and gate_mode is {mode}; expected {', '.join(HIDDEN)}",
        ),
        (
            without is not None and not is_random,
            f"experts.{without}.positive_prompts: missing; gate_mode {mode} makes an expert's gates of prompts that it "
            "should receive (random and uniform_random need none)",
        ),
        (
            several and not is_random and all(expert.prompts == first.prompts for expert in experts),
            "experts: all have the same prompts, so that the router cannot tell them apart",
        ),
        (bool(lonely), f"{', '.join(lonely)}: negative_prompts without positive_prompts"),
        (
            several and not allow_same and all(expert.source_model == first.source_model for expert in experts),
            "experts: all are one model, so that the mixture is that model, only larger; to train it afterwards, pass "
            "--i-understand-this-is-not-useful-without-training",
        ),
    ):  # fmt: skip
        if is_fault:
            raise InputError(path, what)


def _check_layers(path: Path, recipe: MixtureRecipe) -> None:
    """Raises InputError for `layers` that do not fit the recipe's experts, or each other."""
    if recipe.layers is not None and recipe.shared_experts:
        raise InputError(path, "layers: are for experts that the router chooses, and shared_experts take every token")
    for number, layer in enumerate(recipe.layers or []):
        where, count = f"layers.{number}", recipe.experts_per_layer
        beyond = next((expert for expert in layer.experts if expert >= len(recipe.experts)), None)
        if beyond is not None:
            last = len(recipe.experts) - 1
            raise InputError(path, f"{where}.experts: {beyond}; expected numbers from 0 to {last}, of the experts")
        for key in ("experts", "scale", "bias"):
            if len(getattr(layer, key)) != count:
                raise InputError(
                    path,
                    f"{where}.{key}: {len(getattr(layer, key))} of them; expected {count}, as many as layers.0.experts",
                )


def plan_mixture(
    path: Path, recipe: MixtureRecipe, text: str, find: Find, relative_to: Path, settings: MergeSettings = DEFAULTS,
    allow_same: bool = False,
) -> MixturePlan:  # fmt: skip
    """Open a recipe's models, and check them against each other. find: resolves references. Raises InputError."""
    check_experts(path, recipe, allow_same)
    recipe = recipe if settings.seed is None else recipe.model_copy(update={"random_seed": settings.seed})
    references = dict.fromkeys([recipe.base_model, *(expert.source_model for expert in recipe.all_experts)])
    models = {reference: find(path, reference, relative_to) for reference in references}
    opened = {reference: open_dense(folder) for reference, folder in models.items()}
    base = opened[recipe.base_model]
    for model in opened.values():
        # Files of Llamas and Mistrals differ in their class's name alone.
        if model.kind != base.kind and {model.kind, base.kind} != {"llama", "mistral"}:
            raise InputError(
                model.where, f"model_type is {shown(model.kind)}, but the base {base.path} is {shown(base.kind)}; "
                "expected one architecture",
            )  # fmt: skip
        for name in ("layers", "hidden", "mlp", "activation", "mlp_bias"):
            mine, theirs = getattr(model.config, name), getattr(base.config, name)
            if mine != theirs:
                raise InputError(
                    model.where, f"{name} is {mine}, but {theirs} in the base {base.path}; experts are MLPs of one "
                    "shape and kind in equally many layers",
                )  # fmt: skip
    output = choose_output(path, recipe, base)
    config, decoder, notes = _mixture_config(path, recipe, output, base, settings.dtype)
    if len(recipe.experts) > base.config.hidden:
        raise InputError(
            path, f"experts: {len(recipe.experts)}, and a hidden state has {base.config.hidden} numbers; expected at "
            "most as many, for the router's rows to be independent",
        )  # fmt: skip
    if recipe.layers is not None and len(recipe.layers) != base.config.layers:
        raise InputError(path, f"layers: {len(recipe.layers)}, and the models have {base.config.layers}")
    rows = _tensors(recipe, output, base, opened, decoder, FLOAT_DTYPES.get(config.get("dtype", "")))
    read_json_object(base.path / "generation_config.json", missing={})  # it is copied, but only if it can be read
    return MixturePlan(recipe, text, base, rows, config, decoder, models, settings.allow_nonfinite, tuple(notes))


def open_dense(path: Path) -> DenseModel:
    """Open a dense model by its headers. Raises InputError for one that no mixture can be made of."""
    folder = decoder_of(open_model(path))
    kind = folder.config.get("model_type")
    if folder.is_part or kind not in DENSE:
        reason = f" ({UNFIT[kind]}, as no mixture of transformers' has)" if kind in UNFIT else ""
        raise InputError(
            folder.where, f"model_type is {shown(folder.whole.config.get('model_type'))}, of which no mixture can be "
            f"made{reason}; expected one of {', '.join(DENSE)}",
        )  # fmt: skip
    given = {**folder.config, "model_type": "mistral" if kind == "phi3" else kind}
    config = read_decoder_config(folder.where, given)
    assert isinstance(config, LlamaLikeConfig)
    # Defaults are written out: a mixture's class has others.
    defaults = config_values(folder.where, folder.config, find_architecture(kind))
    settings = {key: value for key, value in defaults.items() if key not in ROPE_KEYS} | given
    if not any(given.get(key) for key in ROPE_KEYS):
        settings["rope_theta"] = config.rope.theta
    parts = [_unpacked(config, name, entry) for name, entry in folder.entries.items()]
    entries = {name: tensor for tensors in parts for name, tensor in tensors}
    if kind == "gemma":
        gemma = read_decoder_config(folder.where, folder.config)
        assert isinstance(gemma, LlamaLikeConfig)
        config = replace(gemma, architecture="mistral", norm="rms", norm_offset=0.0, head_is_embedding=False)
        entries, settings = _as_llamas(entries), settings | {"tie_word_embeddings": False}
    return DenseModel(folder.where, config, entries, path, str(kind), settings)


def _unpacked(config: LlamaLikeConfig, name: str, entry: Tensor) -> list[tuple[str, Tensor]]:
    """A Llama's tensors that a tensor of a Phi-3 is, or packs, with their names."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    packed = {"qkv_proj": (("q", queries), ("k", keys), ("v", keys)), "gate_up_proj": (("gate", config.mlp),
              ("up", config.mlp))}  # fmt: skip
    module = next((module for module in packed if name.endswith(f".{module}.weight")), None)
    if module is None or len(entry.shape) != 2:
        return [(name, entry)]
    parts, start = list[tuple[str, Tensor]](), 0
    for part, rows in packed[module]:
        parts.append((name.replace(module, f"{part}_proj"), TensorSlice(entry, (slice(start, start + rows),))))
        start += rows
    return parts


def _as_llamas(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Gemma's tensors as a Llama's: the norms' gains, which are stored less one, the embedding times the square root
    of the hidden size, and the head, which is the embedding as it is stored."""

    def converted(name: str, entry: Tensor) -> Tensor:
        formula = _add_one if name.endswith("norm.weight") else _scale_rows if name == EMBEDDING else None
        return entry if formula is None else ComputedTensor(np.dtype(np.float32), entry.shape, (entry,), formula)

    head = {LM_HEAD: entries[EMBEDDING]} if EMBEDDING in entries else {}
    return head | {name: converted(name, entry) for name, entry in entries.items()}


def _add_one(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0].astype(np.float32) + np.float32(1)


def _scale_rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    # The factor is rounded to the dtype of the rows, as Gemma's code rounds it.
    factor = np.array(parts[0].shape[1] ** 0.5).astype(parts[0].dtype)
    return parts[0].astype(np.float32) * factor.astype(np.float32)


def choose_output(path: Path, recipe: MixtureRecipe, base: DenseModel) -> Output:
    """The first kind of mixture that fits a recipe, or the one that it names. Raises InputError where none fits."""
    wanted = (recipe.architecture or "").lower()
    named = [
        output for output in OUTPUTS if wanted in ("", output.model_type) or output.name.lower().startswith(wanted)
    ]
    if not named:
        names = ", ".join(output.model_type for output in OUTPUTS)
        raise InputError(path, f"architecture: {shown(recipe.architecture)}; expected one of {names}")
    reasons = [_misfit(recipe, base, output) for output in named]
    if None in reasons:
        return named[reasons.index(None)]
    listed = "; ".join(f"{output.name}: {reason}" for output, reason in zip(named, reasons, strict=True))
    raise InputError(path, f"no kind of mixture fits these models ({listed})")


def _misfit(recipe: MixtureRecipe, base: DenseModel, output: Output) -> str | None:
    """The reason why a recipe's mixture cannot be of a kind; None: it can."""
    if base.kind not in output.sources:
        return f"its models are {', '.join(output.sources)}, not {base.kind}"
    config = base.config
    if output.model_type == "deepseek" and config.heads * config.head_dim != config.hidden:
        return f"its code takes heads of {config.hidden // config.heads}, and head_dim is {config.head_dim}"
    shared = recipe.shared_experts or []
    if not shared:
        return None if "none" in output.shared else "needs shared_experts, one of them"
    if "gated" in output.shared:
        is_gated = recipe.gate_mode in RANDOM or bool(shared[0].positive_prompts)
        return None if is_gated else "needs positive_prompts of its shared expert"
    if "plain" not in output.shared:
        return "has no shared experts"
    return "has no gate of its shared expert, and so no prompts" if shared[0].positive_prompts else None


def _mixture_config(
    path: Path, recipe: MixtureRecipe, output: Output, base: DenseModel, dtype: str | None
) -> tuple[dict[str, Any], LlamaLikeConfig, list[str]]:
    """config.json, its meaning, and warnings. Raises InputError where the kind of mixture lacks a part of the base."""
    shared = len(recipe.shared_experts or [])
    numbers = (recipe.experts_per_layer, recipe.experts_per_token, shared, base.config.mlp)
    kept = {key: value for key, value in base.settings.items() if key not in DROPPED}
    if output.model_type != "mixtral":
        # Their classes have windows only under conditions that a dense model's keys do not describe.
        kept |= {key: value for key, value in (("sliding_window", None), ("use_sliding_window", False)) if key in kept}
    registered = output.described_by or output
    decoder = read_decoder_config(path, {**kept, **registered.settings(*numbers), "model_type": registered.model_type})
    assert isinstance(decoder, LlamaLikeConfig)
    warnings = []
    if base.config.windows != decoder.windows:
        warnings.append(
            f"{base.path}: its layers see {min(base.config.windows):,} tokens (sliding_window), and those of a "
            f"{output.name} see all: longer texts get other answers"
        )
    # A Qwen MoE has biases, which may be 0.
    allowed = {"architecture", "windows"} | ({"qkv_bias"} if decoder.qkv_bias else set())
    values = asdict(decoder)
    for name, value in asdict(base.config).items():
        if name not in allowed and value != values[name]:
            raise InputError(
                base.where, f"{name} is {shown(value)}, which a {output.name} cannot have; expected another "
                "architecture, or models without it",
            )  # fmt: skip
    if output is not registered:
        warnings.append(
            f"a {output.name} runs by code from the hub (trust_remote_code); neither transformers nor this program "
            "opens it without"
        )
    dtypes = (dtype, recipe.dtype, base.settings.get("dtype"), base.settings.get("torch_dtype"))
    named = next((name for name in dtypes if name in FLOAT_DTYPES), None)
    written = {"model_type": output.model_type, "architectures": [output.class_name]} | output.settings(*numbers)
    return {**kept, **written, **({} if named is None else {"dtype": named})}, decoder, warnings


def _tensors(
    recipe: MixtureRecipe, output: Output, base: DenseModel, opened: Mapping[str, DenseModel], decoder: LlamaLikeConfig,
    dtype: np.dtype | None,
) -> dict[str, MixtureTensor]:  # fmt: skip
    """The mixture's tensors by name. Raises InputError for a tensor that a model lacks or has in another shape."""
    dense = {leaf.name: leaf for leaf in LEAVES}
    shared = next(iter(recipe.shared_experts or []), None)
    rows: dict[str, MixtureTensor] = {}

    def add(name: str, leaf: str, shape: tuple[int, ...], layer: int, expert: Expert | None) -> None:
        model, tensor = base if expert is None else opened[expert.source_model], dense[leaf].tensor_of(layer)
        entry = model.entries.get(tensor)
        if entry is None:
            raise InputError(model.path, f"has no tensor {tensor}, which its config asks for")
        if entry.shape != shape or not is_float(entry.dtype):
            raise InputError(
                entry.file, f"{tensor} is {entry.dtype} {list(entry.shape)}; expected float weights {list(shape)}"
            )
        spec = TensorSpec(shape, dtype or entry.dtype)
        rows[name] = MixtureTensor(spec, entry, expert, is_residual=leaf == "down")

    for name, leaf, place in tensors_of(decoder):
        written, shape, layer = output.written_name(name), tensor_shape(decoder, leaf), place[0] if place else 0
        computed = TensorSpec(shape, dtype or np.dtype(np.float32))
        if leaf.component == ROUTER or leaf.name == "shared_expert_gate":
            is_shared = leaf.component != ROUTER
            rows[written] = MixtureTensor(computed, gates_of=layer, is_shared=is_shared)
        elif leaf.name.endswith("_bias") and not base.config.qkv_bias:
            rows[written] = MixtureTensor(computed)
        elif leaf.has_experts:
            add(written, leaf.name, shape, layer, recipe.routed_expert(layer, place[1]))
        else:
            of_shared = leaf.name.startswith("shared_")
            add(written, leaf.name.removeprefix("shared_"), shape, layer, shared if of_shared else None)
            if output.model_type == "deepseek" and shared is not None and leaf.name == "mlp_norm":
                for part in ("gate", "up", "down"):
                    other = f"model.layers.{layer}.mlp.shared_experts.{part}_proj.weight"
                    add(other, part, tensor_shape(base.config, dense[part]), layer, shared)
    return rows
