"""GGUF files (llama.cpp's format) as models: config, tokenizer, and tensors that are dequantised while they are read.

A tensor's name in a GGUF file is that of its part in any family (`blk.0.attn_q.weight`); the package gguf knows what
Hugging Face calls it. What llama.cpp changes in a family's weights when it writes them is undone here (`FAMILIES`).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.folder import FLOAT_DTYPES, BytesOfFile, Folder, MappedFile
from evojax_merge.checkpoints.gguf_header import read_gguf_header
from evojax_merge.checkpoints.json_files import read_json_object
from evojax_merge.errors import InputError, shown
from evojax_merge.models.architecture import (
    Leaf,
    find_architecture,
    tensor_grid,
    tensor_shape,
    tensors_of,
)
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.config_keys import (
    CONTEXT,
    DEPTH,
    EPSILON,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Expected,
    above,
    is_number,
    whole,
)

SUFFIX = ".gguf"
# In the folder that stands for a GGUF file: where its tensors lie. A large vocabulary takes many seconds to walk past.
TENSORS = "evojax_merge_tensors.json"
# The RoPE scalings of Llama 3.1 and 3.2, which GGUF keeps as a tensor of factors: all else than `factor` is the same.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_FACTORS = (8.0, 32.0)
# In the names of routers and of the gates of shared experts, which files keep in float32 beside whatever matrices.
ROUTER = ".ffn_gate_inp"
# What LongRoPE divides the frequencies by, beyond the length of the first training and up to it.
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
# How words are split where upper and lower case part them: Mistral's Tekken, and o200k, which keeps a contraction with
# its word and up to three digits together.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(contraction)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(contraction)s"
    r"|%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = _CASED % {"contraction": "", "digits": r"\p{N}"}
O200K = _CASED % {"contraction": "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": r"\p{N}{1,3}"}
# Tokenizers that split words as Llama 3's does. All of these and Tekken's begin texts with a token where a file does
# not say whether, and take a word that is a token whole, whatever their merges.
OF_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
WHOLE_WORDS = (*OF_LLAMA3, "tekken")
# The keys of a file's metadata, behind its architecture's name, by what a Hugging Face config and its class call them.
CONFIG_KEYS = {
    "hidden_size": ".embedding_length", "hidden size": ".embedding_length", "head_dim": ".attention.key_length",
    "intermediate_size": ".feed_forward_length", "num_hidden_layers": ".block_count",
    "num_attention_heads": ".attention.head_count", "number of attention heads": ".attention.head_count",
    "num_key_value_heads": ".attention.head_count_kv", "max_position_embeddings": ".context_length",
    "original_max_position_embeddings": ".rope.scaling.original_context_length",
    "partial_rotary_factor": ".rope.dimension_count", "rope_theta": ".rope.freq_base", "factor": ".rope.scaling.factor",
    "sliding_window": ".attention.sliding_window", "num_experts": ".expert_count", "num_local_experts": ".expert_count",
    "num_experts_per_tok": ".expert_used_count", "moe_intermediate_size": ".expert_feed_forward_length",
}  # fmt: skip
# The keys that say the sizes in which the shapes of an architecture's leaves are written, of those that a file has.
SIZE_KEYS = {
    "hidden": (".embedding_length",), "queries": (".attention.head_count", ".attention.key_length"),
    "keys": (".attention.head_count_kv", ".attention.head_count", ".attention.key_length"),
    "queries_keys_values": (".attention.head_count", ".attention.head_count_kv", ".attention.key_length"),
    "head_dim": (".attention.key_length", ".attention.head_count"), "gate_up": (".feed_forward_length",),
    "mlp": (".feed_forward_length", ".expert_feed_forward_length"), "experts": (".expert_count",),
    "shared_mlp": (".expert_shared_feed_forward_length",), "vocab": ("tokenizer.ggml.tokens",),
}  # fmt: skip
EMBEDDING = "token_embd.weight"
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# SentencePiece trains no longer pieces: longer tokens are added ones, and no pairs of others make them. To look for
# such pairs takes time by the square of the length.
LONGEST_PIECE = 512
# Rules for a file's values, beside those for a config's.
FACTOR, THETA, COUNT = above(0), above(1), whole(0, 2**31 - 1)
SCORES = Expected(
    lambda value: isinstance(value, list) and all(is_number(one) and one == one for one in value), "a list of numbers"
)
TOKEN_TYPES = Expected(
    lambda value: isinstance(value, list) and all(type(one) is int for one in value), "a list of whole numbers"
)
# What files hold for the positions, which a Hugging Face model has in its config.
OF_POSITIONS = ("rope_freqs.weight", LONG_FACTORS, SHORT_FACTORS)


@dataclass(frozen=True)
class Family:
    """What a GGUF architecture is in Hugging Face's words. interleaved: rows of the query and key projections are kept
    in pairs (see `halves_apart`); norm_offset: how much more than Hugging Face's the norms' weights are; large: the
    number of layers of the model whose queries are scaled by the hidden size for each head (of Gemma, of which the file
    does not say it; see llama.cpp's `f_attention_scale`); long_rope: positions may be LongRoPE's, and of a part of each
    head, of `rope.dimension_count` entries; experts_key: of a mixture what its config calls the number of experts;
    weights_sum_to_one: whether the weights of a token's experts do, where its config says so (llama.cpp knows it by the
    architecture)."""

    model_type: str
    interleaved: bool = False
    norm_offset: float = 0.0
    large: int = 0
    long_rope: bool = False
    experts_key: str = ""
    weights_sum_to_one: bool | None = None


FAMILIES = {
    "gemma2": Family("gemma2", norm_offset=1.0, large=46),
    "gemma3": Family("gemma3_text", norm_offset=1.0, large=62),
    "llama": Family("llama", interleaved=True),
    "phi3": Family("phi3", long_rope=True),
    "qwen2": Family("qwen2"),
    "qwen2moe": Family("qwen2_moe", experts_key="num_experts", weights_sum_to_one=False),
    "qwen3": Family("qwen3"),
    "qwen3moe": Family("qwen3_moe", experts_key="num_experts", weights_sum_to_one=True),
}
# What a Llama with experts is.
MIXTRAL = Family("mixtral", interleaved=True, experts_key="num_local_experts")
# The frequencies of Gemma 3's layers with a sliding window, and which layers these are: all but every sixth.
LOCAL_THETA, WINDOW_PATTERN = 10_000.0, 6


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order in which GGUF keeps the rows of a Llama's query and key projections. rows: `[heads * D, …]`.

    GGUF rotates neighbouring rows of a head as a pair, Hugging Face row i with row i + D / 2.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class GgufTensor(BytesOfFile):
    """A tensor of a GGUF file. kind: how its values are kept, a number of gguf.GGMLQuantizationType; heads: of
    interleaved rows how many heads they are of, else 0; offset: what is taken off its values."""

    kind: int
    heads: int = 0
    offset: float = 0.0

    def read(self) -> np.ndarray:
        gguf = import_gguf(self.file)
        raw = self.mapped.read(self.start, self.stop).reshape(*self.shape[:-1], -1)
        # Scales that are not finite make values that are none, which whoever reads them refuses by name.
        with np.errstate(all="ignore"):
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType(self.kind))
        values = (values - np.float32(self.offset) if self.offset else values).astype(self.dtype, copy=False)
        return halves_apart(values, self.heads) if self.heads else values


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was walked through: what it says of its model, its tokenizer included, and its tensors by their
    names there, with shapes in Hugging Face's order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What llama.cpp calls its architecture."""
        return str(self.metadata["general.architecture"])

    @property
    def family(self) -> Family:
        if self.architecture == "llama" and self.metadata.get("llama.expert_count"):
            return MIXTRAL
        return FAMILIES[self.architecture]

    def key(self, name: str) -> str:
        """A key of the metadata: `name`, behind the architecture's name where it begins with a dot."""
        return f"{self.architecture}{name}" if name.startswith(".") else name

    def value(self, name: str, expected: Expected, default: Any = None) -> Any:
        """The metadata of `key(name)`. Raises InputError where it is missing and has no default, or is not what is
        expected."""
        value = self.metadata.get(self.key(name), default)
        if value is None:
            raise InputError(self.path, f"{self.key(name)}: missing; expected {expected.words} for this architecture")
        if not expected.accepts(value):
            raise InputError(self.path, f"{self.key(name)}: {shown(value)}; expected {expected.words}")
        return value

    @property
    def embedding(self) -> GgufTensor:
        """That of the tokens, `[vocab, hidden]`."""
        tensor = self.tensors.get(EMBEDDING)
        if tensor is None:
            raise InputError(self.path, f"has no tensor {EMBEDDING}; expected a whole model")
        if len(tensor.shape) != 2:
            raise InputError(self.path, f"{EMBEDDING} has shape {list(tensor.shape)}; expected a matrix")
        return tensor

    @cached_property
    def tokens(self) -> list[str]:
        """The token of each row of the embedding."""
        name, rows = "tokenizer.ggml.tokens", self.embedding.shape[0]
        tokens: list[str] = self._for_each_row(name, TEXTS, rows)
        if len(set(tokens)) < rows:
            first: dict[str, int] = {}
            i, token = next((i, token) for i, token in enumerate(tokens) if first.setdefault(token, i) != i)
            raise InputError(
                self.path, f"{name}: {shown(token)} is there twice, as {first[token]} and {i}; expected each token once"
            )
        return tokens

    def for_each_token(self, name: str, expected: Expected) -> list[Any]:
        """A list in the metadata with an entry for each token."""
        return self._for_each_row(name, expected, len(self.tokens))

    def _for_each_row(self, name: str, expected: Expected, rows: int) -> list[Any]:
        values: list[Any] = self.value(name, expected)
        if len(values) != rows:
            raise InputError(
                self.path,
                f"{name}: has {len(values):,} entries; expected one for each of the {rows:,} rows of {EMBEDDING}",
            )
        return values

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The numbers of the special tokens that the file names, by the short names that transformers has for them."""
        keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in SPECIAL_TOKENS.items()}
        a_token = whole(0, len(self.tokens) - 1)
        return {name: self.value(key, a_token) for name, key in keys.items() if key in self.metadata}

    def refused(self, reason: object) -> InputError:
        """The error for what is wrong with the config that was made of this file, in the file's own words."""
        names = "|".join(sorted(CONFIG_KEYS, key=len, reverse=True))
        text = " ".join(str(reason).split())[:300]
        return InputError(
            self.path,
            re.sub(rf"(?:rope_parameters\.)?\b({names})\b", lambda match: self.key(CONFIG_KEYS[match[1]]), text),
        )


def import_gguf(where: object) -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(where, "a GGUF file needs the package gguf; pip install 'evojax-merge[gguf]'") from None
    return gguf


def read_gguf(path: Path) -> GgufFile:
    """Walk through a GGUF file; no tensor is read. Raises InputError where it is damaged or truncated, or of a family
    that is not known."""
    gguf = import_gguf(path)
    header = read_gguf_header(path, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    architecture = header.metadata.get("general.architecture")
    if architecture is None:
        raise InputError(path, f"general.architecture: missing; expected one of {', '.join(FAMILIES)}")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise InputError(path, f"general.architecture: {shown(architecture)}; expected one of {', '.join(FAMILIES)}")
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise InputError(
            path, f"split.count: {shown(parts)}; expected a whole model: join its parts (llama-gguf-split --merge)"
        )
    _check_kinds(path, {place.kind: name for name, place in header.tensors.items()})

    def is_matrix(name: str) -> bool:
        return len(header.tensors[name].shape) > 1 and ROUTER not in name

    kinds = {place.kind for name, place in header.tensors.items() if is_matrix(name)}
    kind_of, single = gguf.GGMLQuantizationType, np.dtype(np.float32)
    # One dtype for all matrices: what is quantised is a product and a sum of halves that no shorter float holds.
    halves = {kind_of.F16: np.dtype(np.float16), kind_of.BF16: np.dtype(ml_dtypes.bfloat16)}
    dtype = halves.get(next(iter(kinds)), single) if len(kinds) == 1 else single
    mapped = MappedFile(path)
    tensors = {
        name: GgufTensor(mapped, dtype if is_matrix(name) else single, place.shape, place.start, place.stop, place.kind)
        for name, place in header.tensors.items()
    }
    return GgufFile(path, header.metadata, tensors)


def _check_kinds(path: Path, names: Mapping[int, str]) -> None:
    """Raises InputError where the package gguf does not dequantise a kind of tensor. names: a tensor of each kind."""
    gguf = import_gguf(path)
    for number, name in names.items():
        kind = gguf.GGMLQuantizationType(number)
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            raise InputError(
                path, f"{name} is quantised as {kind.name}, which the package gguf does not dequantise"
            ) from None


# ---------------------------------------------------------------------------------------------------------------
# The model's config


def write_config(file: GgufFile, folder: Path) -> None:
    """Write config.json and generation_config.json. Raises InputError for what the family's config cannot say."""
    import transformers

    family = file.family
    architecture = find_architecture(family.model_type)
    assert architecture.config_class is not None
    if file.value(".expert_count", COUNT, 0) and not family.experts_key:
        raise InputError(file.path, f"{file.architecture}.expert_count: expected no experts in this architecture")
    hidden, heads = file.value(".embedding_length", SIZE), file.value(".attention.head_count", SIZE)
    head_dim = _head_dim(file, hidden, heads)
    ends = {f"{name}_token_id": file.special_ids.get(name) for name in ("bos", "eos", "pad")}
    ends = {key: number for key, number in ends.items() if number is not None}
    values: dict[str, Any] = {
        "architectures": [architecture.config_class.removesuffix("Config").removesuffix("Text") + "ForCausalLM"],
        "vocab_size": file.embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.value(".feed_forward_length", SIZE),
        "num_hidden_layers": file.value(".block_count", DEPTH),
        "num_attention_heads": heads,
        "num_key_value_heads": file.value(".attention.head_count_kv", SIZE, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.value(".context_length", CONTEXT),
        # The shortest decimal that is this float32: 1e-05, not 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(file.value(".attention.layer_norm_rms_epsilon", EPSILON)))),
        "rope_parameters": (_phi_rope if family.long_rope else _rope_parameters)(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": str(file.embedding.dtype),
    }
    if family.norm_offset:
        values |= _gemma_settings(file, values)
    if family.experts_key:
        values |= _mixture_settings(file)
    if family.long_rope:
        values |= {
            "original_max_position_embeddings": _first_length(file),
            # 0 where there is no window.
            "sliding_window": file.value(".attention.sliding_window", COUNT, 0) or None,
        }
    biased = "blk.0.attn_q.bias" in file.tensors
    if "attention_bias" in architecture.keys and biased:
        values["attention_bias"] = True
    if "head_dim" not in architecture.keys:
        del values["head_dim"]
    try:
        getattr(transformers, architecture.config_class)(**values, **ends).save_pretrained(folder)
        transformers.GenerationConfig(**ends).save_pretrained(folder)
    except Exception as error:  # whatever transformers' own validation raises is about the file
        raise file.refused(f"its settings make no {family.model_type} config ({error})") from None


def _head_dim(file: GgufFile, hidden: int, heads: int) -> int:
    """The entries of each head. A file that says how many of them are rotated says all, but for a LongRoPE's family."""
    rotated = file.key(".rope.dimension_count")
    if rotated in file.metadata and not file.family.long_rope:
        head_dim: int = file.value(".attention.key_length", SIZE, file.value(".rope.dimension_count", SIZE))
        if file.metadata[rotated] != head_dim:
            raise InputError(
                file.path, f"{rotated}: {file.metadata[rotated]}; expected all {head_dim} entries of a head"
            )
        return head_dim
    if hidden % heads and file.key(".attention.key_length") not in file.metadata:
        raise InputError(
            file.path, f"{file.key('.attention.head_count')}: {heads:,}; expected a divisor of "
            f"{file.key('.embedding_length')}, {hidden:,}",
        )  # fmt: skip
    return file.value(".attention.key_length", SIZE, hidden // heads)


def _gemma_settings(file: GgufFile, common: Mapping[str, Any]) -> dict[str, Any]:
    """What a Gemma's config says besides, and otherwise than those of other families. Soft caps and windows that the
    file does not name are those of the config's class."""
    is_large = common["num_hidden_layers"] == file.family.large
    per_head = common["hidden_size"] // max(common["num_attention_heads"], 1)
    values: dict[str, Any] = {"query_pre_attn_scalar": per_head if is_large else common["head_dim"]}
    keys = {
        "attn_logit_softcapping": (".attn_logit_softcapping", FACTOR),
        "final_logit_softcapping": (".final_logit_softcapping", FACTOR),
        "sliding_window": (".attention.sliding_window", SIZE),
    }
    for name, (key, expected) in keys.items():
        if file.key(key) in file.metadata:
            values[name] = file.value(key, expected)
    if file.architecture == "gemma3":
        pattern = file.value(".attention.sliding_window_pattern", SIZE, WINDOW_PATTERN)
        kinds = ("sliding_attention", "full_attention")
        values["layer_types"] = [kinds[(i + 1) % pattern == 0] for i in range(common["num_hidden_layers"])]
        local = {"rope_type": "default", "rope_theta": file.value(".rope.freq_base_swa", THETA, LOCAL_THETA)}
        values["rope_parameters"] = {"full_attention": common["rope_parameters"], "sliding_attention": local}
    return values


def _mixture_settings(file: GgufFile) -> dict[str, Any]:
    """What a mixture's config says besides. Widths that older files do not name are those of their tensors."""
    family = file.family
    values: dict[str, Any] = {
        family.experts_key: file.value(".expert_count", SIZE),
        "num_experts_per_tok": file.value(".expert_used_count", SIZE),
    }
    if family.weights_sum_to_one is None:
        return values
    own, shared = (file.tensors.get(f"blk.0.ffn_gate_{kind}.weight") for kind in ("exps", "shexp"))
    width = own.shape[-2] if own is not None and len(own.shape) == 3 else None
    values["moe_intermediate_size"] = file.value(".expert_feed_forward_length", SIZE, width)
    values["norm_topk_prob"] = file.value(".expert_weights_norm", SWITCH, family.weights_sum_to_one)
    if shared is not None:
        key = ".expert_shared_feed_forward_length"
        values["shared_expert_intermediate_size"] = file.value(key, SIZE, shared.shape[0])
    return values


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    theta = file.value(".rope.freq_base", THETA, 10000.0)
    scaling = file.value(".rope.scaling.type", TEXT, "none")
    frequencies = file.tensors.get("rope_freqs.weight")
    if frequencies is not None:
        factors = LLAMA3_FACTORS if frequencies.shape == (-(-head_dim // 2),) else ()
        for factor in factors:
            if np.allclose(frequencies.read(), _llama3_factors(theta, head_dim, factor), rtol=1e-4):
                return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}
        raise InputError(
            file.path, "rope_freqs.weight: not the factors of Llama 3.1 or 3.2; expected a RoPE scaling that is known"
        )
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        raise InputError(
            file.path, f"{file.architecture}.rope.scaling.type: {shown(scaling)}; expected none, linear or yarn"
        )
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": file.value(".rope.scaling.factor", FACTOR)}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = file.value(".rope.scaling.original_context_length", CONTEXT)
    return rope


def _first_length(file: GgufFile) -> int:
    """The length of the texts that a model was first trained on."""
    length: int = file.value(".rope.scaling.original_context_length", CONTEXT, file.value(".context_length", CONTEXT))
    return length


def _phi_rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """RoPE of a part of each head, or LongRoPE, whose factors lie in tensors, float32."""
    scaling = file.value(".rope.scaling.type", TEXT, "none")
    if scaling not in ("none", "longrope"):
        raise InputError(file.path, f"phi3.rope.scaling.type: {shown(scaling)}; expected none or longrope")
    rotated = file.value(".rope.dimension_count", whole(1, head_dim), head_dim)
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": file.value(".rope.freq_base", THETA, 10000.0),
        "partial_rotary_factor": rotated / head_dim,
    }
    found = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    missing = [name for name in found.values() if name not in file.tensors]
    if len(missing) == len(found):
        return rope
    if missing:
        raise InputError(file.path, f"has no tensor {missing[0]}; expected LongRoPE's factors, long and short")
    for name in found.values():
        if file.tensors[name].shape != (rotated // 2,):
            raise InputError(
                file.path, f"{name} has shape {list(file.tensors[name].shape)}; by {file.key('.rope.dimension_count')} "
                f"it would be {[rotated // 2]}",
            )  # fmt: skip
    context, original = file.value(".context_length", CONTEXT), _first_length(file)
    rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    rope |= {key: file.tensors[name].read().tolist() for key, name in found.items()}
    # What the lengths say already is left to them: the file's is rounded.
    stretched = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0
    told = file.value(".rope.scaling.attn_factor", FACTOR, stretched)
    return rope if math.isclose(told, stretched, rel_tol=1e-6) else rope | {"attention_factor": told}


def _llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """float64[head_dim / 2]: what Llama 3.1 divides the frequency of each pair by."""
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / (
        2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    )
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


# ---------------------------------------------------------------------------------------------------------------
# The tokenizer


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write the tokenizer as Hugging Face's files. Raises InputError for one of a kind that is not known."""
    import transformers

    model = file.value("tokenizer.ggml.model", TEXT)
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in kinds:
        raise InputError(file.path, f"tokenizer.ggml.model: {shown(model)}; expected one of {', '.join(kinds)}")
    try:
        backend = kinds[model](file)
        _add_marked(file, backend)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(file.path, f"tokenizer.ggml.tokens: they make no tokenizer ({reason})") from None
    # Not all files say that texts begin with a token: those of SentencePiece and of Llama 3 do.
    begins = model == "llama" or file.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    if file.value("tokenizer.ggml.add_bos_token", SWITCH, begins) and "bos" in file.special_ids:
        _begin_with(backend, file.tokens, file.special_ids["bos"])
    template = "tokenizer.chat_template"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": file.tokens[number] for name, number in file.special_ids.items()},
        chat_template=file.value(template, TEXT) if template in file.metadata else None,
        model_max_length=file.value(".context_length", CONTEXT),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    """The pairs of tokens that make another one, of those that the file has."""
    known, pairs = set(file.tokens), list[tuple[str, str]]()
    for merge in file.value("tokenizer.ggml.merges", TEXTS):
        first, _, second = merge.partition(" ")
        if first not in known or second not in known or first + second not in known:
            raise InputError(
                file.path, f"tokenizer.ggml.merges: {shown(merge)}; expected two tokens that make a third, by a space"
            )
        pairs.append((first, second))
    return pairs


def _byte_level(file: GgufFile) -> Any:
    """Byte-level BPE, over words that are split as `tokenizer.ggml.pre` says."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    splits = _word_splits()
    pre = file.value("tokenizer.ggml.pre", TEXT, "default")
    if pre not in splits:
        raise InputError(file.path, f"tokenizer.ggml.pre: {shown(pre)}; expected one of {', '.join(splits)}")
    vocabulary = {token: i for i, token in enumerate(file.tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(file), ignore_merges=pre in WHOLE_WORDS))
    if splits[pre] is splits["qwen2"]:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_splits() -> dict[str, list[Any]]:
    """How text is split into words, and these into bytes, by what `tokenizer.ggml.pre` calls it."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def by_pattern(pattern: str) -> list[Any]:
        return [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    qwen2, llama3, o200k = map(by_pattern, (PRETOKENIZE_REGEX, TikTokenConverter().pattern, O200K))
    return {
        "default": [plain],
        "gpt-2": [plain],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), plain],
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), qwen2),
        # Phi-4's vocabulary is of the same words as Llama 3's.
        **dict.fromkeys(("dbrx", "smaug-bpe", *OF_LLAMA3), llama3),
        # Phi-4-mini's is o200k.
        **dict.fromkeys(("gpt-4o", "llama4"), o200k),
        "tekken": by_pattern(TEKKEN),
    }


def _sentencepiece(file: GgufFile) -> Any:
    """SentencePiece's BPE with byte fallback. Its merges are those that the scores of its tokens imply."""
    import transformers
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {token: i for i, token in enumerate(file.tokens)}
    scores = zip(file.tokens, file.for_each_token("tokenizer.ggml.scores", SCORES), strict=True)
    merged = {token: score for token, score in scores if len(token) <= LONGEST_PIECE}
    spaced = file.value("tokenizer.ggml.add_space_prefix", SWITCH, True)
    tokenizer = transformers.LlamaTokenizer(
        vocab=vocabulary, merges=generate_merges(vocabulary, merged), add_prefix_space=spaced
    )
    return tokenizer.backend_tokenizer


def _add_marked(file: GgufFile, backend: Any) -> None:
    """Tokens that are never split: control tokens, as special ones, and those that a user added."""
    import gguf
    from tokenizers import AddedToken

    marked = list(zip(file.tokens, file.for_each_token("tokenizer.ggml.token_type", TOKEN_TYPES), strict=True))
    control = [token for token, kind in marked if kind == gguf.TokenType.CONTROL]
    added = [token for token, kind in marked if kind == gguf.TokenType.USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])


def _begin_with(backend: Any, tokens: list[str], number: int) -> None:
    """Have texts begin with a token. Its name may hold what separates the parts of a template that is written as a
    text: so another one stands for it there."""
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single="first:0 $A:0", pair="first:0 $A:0 first:1 $B:1", special_tokens=[("first", number)]
    )
    state = template.__getstate__().replace(b'"first"', json.dumps(tokens[number]).encode())
    template.__setstate__(state)
    backend.post_processor = template


# ---------------------------------------------------------------------------------------------------------------
# The model's tensors


def named_tensors(file: GgufFile, config: Path) -> dict[str, GgufTensor]:
    """The tensors by Hugging Face's names, in the file's order; of tensors of all experts each one's part. config: the
    config.json that was made of the file.

    Raises InputError where the model lacks one, or has one that its family does not have.
    """
    gguf = import_gguf(file.path)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    try:
        decoder = decoder_config(config)
    except InputError as error:
        raise file.refused(error.what) from None
    # Before the package makes names for as many layers as the file says, which takes seconds for thousands.
    last = f"blk.{decoder.layers - 1}."
    if not any(name.startswith(last) for name in file.tensors):
        raise InputError(file.path, f"has no tensor {last}*; {file.key('.block_count')} says {decoder.layers:,} layers")
    names = gguf.get_tensor_name_map(numbers[file.architecture], decoder.layers)
    found, used = dict[str, GgufTensor](), set[str]()
    # The first one that is missing, or of another shape, ends this: else a number of layers and experts would say how
    # long it takes.
    for name, leaf, place in tensors_of(decoder):
        own, expert = _place_in_file(file, names, name, leaf, place)
        if own not in file.tensors:
            raise InputError(file.path, f"has no tensor {own} ({name})")
        found[name] = _named(file, decoder, leaf, name, own, expert)
        used.add(own)
    extra = [name for name in file.tensors if name not in used and name not in OF_POSITIONS]
    if extra:
        raise InputError(file.path, f"holds a tensor that its architecture does not have: {extra[0]}")
    return dict(sorted(found.items(), key=lambda row: row[1].start))


def _place_in_file(file: GgufFile, names: Any, name: str, leaf: Leaf, place: tuple[int, ...]) -> tuple[str, int | None]:
    """What the file calls a tensor, or the tensor of all experts that it is a part of, and of which expert. names: the
    package's map of names."""
    suffixes = (".weight", ".bias")
    if not leaf.has_experts:
        return names.get_name(name, try_suffixes=suffixes), None
    _, expert = place
    packed = names.get_name(name.replace(f".experts.{expert}.", ".experts."), try_suffixes=suffixes)
    # Early files of Mixtral have a tensor for each expert.
    alone = packed.replace("_exps.", f".{expert}.")
    return (packed, expert) if packed in file.tensors or alone not in file.tensors else (alone, None)


def _named(file: GgufFile, decoder: DecoderConfig, leaf: Leaf, name: str, own: str, expert: int | None) -> GgufTensor:
    """The tensor that the file calls `own`, or an expert's part of it, which is of a leaf and has a name in the model.
    Raises InputError where it has another shape than the metadata say."""
    tensor, shape = file.tensors[own], tensor_shape(decoder, leaf)
    expected = shape if expert is None else (tensor_grid(decoder, leaf)[1], *shape)
    # llama.cpp leaves out axes of one entry where it quantises a file.
    if tensor.shape not in (expected, expected[1:] if expected[0] == 1 else expected):
        axes = leaf.shape if expert is not None or not leaf.has_experts else leaf.shape[1:]
        raise InputError(file.path, _other_shape(file, own, axes, expected))
    nbytes = (tensor.stop - tensor.start) // (1 if expert is None else expected[0])
    start = tensor.start + (expert or 0) * nbytes
    heads = file.value(".attention.head_count", SIZE)
    interleaved = {"attn_q": heads, "attn_k": file.value(".attention.head_count_kv", SIZE, heads)}
    return replace(
        tensor,
        shape=shape,
        start=start,
        stop=start + nbytes,
        heads=interleaved.get(own.split(".")[-2], 0) if file.family.interleaved else 0,
        offset=file.family.norm_offset if name.endswith("norm.weight") else 0.0,
    )


def _other_shape(file: GgufFile, name: str, axes: tuple[str, ...], expected: tuple[int, ...]) -> str:
    """The message for a tensor whose shape is not the expected one. axes: the names of its sizes."""
    shape = file.tensors[name].shape
    sizes = shape if len(shape) == len(expected) else (0,) * len(expected)
    differing = [axis for axis, size, right in zip(axes, sizes, expected, strict=True) if size != right]
    keys = dict.fromkeys(file.key(key) for axis in differing for key in SIZE_KEYS.get(axis, ()))
    says = " and ".join(key for key in keys if key in file.metadata) or "its metadata"
    return f"{name} has shape {list(shape)}; by {says} it would be {list(expected)}"


def write_tensor_table(tensors: Mapping[str, GgufTensor], folder: Path) -> None:
    """Write where a GGUF file's tensors lie into the folder that stands for it."""
    table = {
        name: {
            "dtype": str(one.dtype), "shape": one.shape, "kind": one.kind, "start": one.start, "stop": one.stop,
            "heads": one.heads, "offset": one.offset,
        }
        for name, one in tensors.items()
    }  # fmt: skip
    (folder / TENSORS).write_text(json.dumps(table) + "\n", encoding="utf-8")


def open_gguf(path: Path, file: Path) -> Folder:
    """The GGUF file that the folder `path` stands for. Raises InputError where the file has gone."""
    if not file.is_file():
        raise InputError(file, "is missing; expected a GGUF file")
    table, mapped = read_json_object(path / TENSORS, missing={}), MappedFile(file)
    return Folder(
        path,
        {
            name: GgufTensor(
                mapped, FLOAT_DTYPES[row["dtype"]], tuple(row["shape"]), row["start"], row["stop"], row["kind"],
                row["heads"], row["offset"],
            )
            for name, row in table.items()
        },
    )  # fmt: skip
