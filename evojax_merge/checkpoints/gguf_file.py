"""GGUF files (llama.cpp's format) as models: config, tokenizer, and tensors that are dequantised while they are read.

A tensor's name in a GGUF file is that of its part in any family (`blk.0.attn_q.weight`); the package gguf knows what
Hugging Face calls it. What llama.cpp changes in a family's weights when it writes them is undone here (`FAMILIES`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.folder import FLOAT_DTYPES, BytesOfFile, Folder, MappedFile
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

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata of a key, behind the architecture's name where it begins with a dot. Raises InputError where it
        is missing and has no default, or is of another kind."""
        name = f"{self.architecture}{key}" if key.startswith(".") else key
        found = self.metadata.get(name, default)
        if found is None:
            raise InputError(self.path, f"{name}: missing; expected {kind.__name__} for this architecture")
        if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
            raise InputError(self.path, f"{name}: {shown(found)}; expected {kind.__name__}")
        return found


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
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # whatever a file that ends too soon, or is none, makes of the reader
        reason = " ".join(str(error).split())[:200]
        raise InputError(path, f"not a GGUF file, or damaged or truncated ({reason or type(error).__name__})") from None
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise InputError(path, f"general.architecture: {shown(family)}; expected one of {', '.join(FAMILIES)}")
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1 and ROUTER not in tensor.name]
    kinds = {tensor.tensor_type for tensor in matrices}
    kind_of, single = gguf.GGMLQuantizationType, np.dtype(np.float32)
    # One dtype for all matrices: what is quantised is a product and a sum of halves that no shorter float holds.
    halves = {kind_of.F16: np.dtype(np.float16), kind_of.BF16: np.dtype(ml_dtypes.bfloat16)}
    dtype = halves.get(next(iter(kinds)), single) if len(kinds) == 1 else single
    mapped, tensors = MappedFile(path), {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        start = int(tensor.data_offset)
        own = dtype if len(shape) > 1 and ROUTER not in tensor.name else single
        tensors[tensor.name] = GgufTensor(
            mapped, own, shape, start, start + int(tensor.n_bytes), int(tensor.tensor_type)
        )
    return GgufFile(path, metadata, tensors)


# ---------------------------------------------------------------------------------------------------------------
# The model's config


def write_config(file: GgufFile, folder: Path) -> None:
    """Write config.json and generation_config.json. Raises InputError for what the family's config cannot say."""
    import transformers

    family = file.family
    architecture = find_architecture(family.model_type)
    assert architecture.config_class is not None
    if file.metadata.get(f"{file.architecture}.expert_count") and not family.experts_key:
        raise InputError(file.path, f"{file.architecture}.expert_count: expected no experts in this architecture")
    hidden, heads = file.value(".embedding_length", int), file.value(".attention.head_count", int)
    per_head = hidden // max(heads, 1)
    rotated = per_head if family.long_rope else file.value(".rope.dimension_count", int, per_head)
    head_dim = file.value(".attention.key_length", int, rotated)
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ends = {key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    ends = {key: value for key, value in ends.items() if value is not None}
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(file.path, "has no tensor token_embd.weight; expected a whole model")
    values: dict[str, Any] = {
        "architectures": [architecture.config_class.removesuffix("Config").removesuffix("Text") + "ForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.value(".feed_forward_length", int),
        "num_hidden_layers": file.value(".block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.value(".attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.value(".context_length", int),
        # The shortest decimal that is this float32: 1e-05, not 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(file.value(".attention.layer_norm_rms_epsilon", float)))),
        "rope_parameters": (_phi_rope if family.long_rope else _rope_parameters)(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": str(embedding.dtype),
    }
    if family.norm_offset:
        values |= _gemma_settings(file, values)
    if family.experts_key:
        values |= _mixture_settings(file)
    if family.long_rope:
        values |= {
            "original_max_position_embeddings": _first_length(file),
            # 0 where there is no window.
            "sliding_window": file.value(".attention.sliding_window", int, 0) or None,
        }
    biased = "blk.0.attn_q.bias" in file.tensors
    if "attention_bias" in architecture.keys and biased:
        values["attention_bias"] = True
    if "head_dim" not in architecture.keys:
        del values["head_dim"]
    try:
        getattr(transformers, architecture.config_class)(**values, **ends).save_pretrained(folder)
        transformers.GenerationConfig(**ends).save_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise InputError(file.path, f"its settings make no config ({' '.join(str(error).split())[:200]})") from None


def _gemma_settings(file: GgufFile, common: Mapping[str, Any]) -> dict[str, Any]:
    """What a Gemma's config says besides, and otherwise than those of other families. Soft caps and windows that the
    file does not name are those of the config's class."""
    is_large = common["num_hidden_layers"] == file.family.large
    per_head = common["hidden_size"] // max(common["num_attention_heads"], 1)
    values: dict[str, Any] = {"query_pre_attn_scalar": per_head if is_large else common["head_dim"]}
    keys = {
        "attn_logit_softcapping": (".attn_logit_softcapping", float),
        "final_logit_softcapping": (".final_logit_softcapping", float),
        "sliding_window": (".attention.sliding_window", int),
    }
    for name, (key, kind) in keys.items():
        if f"{file.architecture}{key}" in file.metadata:
            values[name] = file.value(key, kind)
    if file.architecture == "gemma3":
        pattern = file.value(".attention.sliding_window_pattern", int, WINDOW_PATTERN)
        kinds = ("sliding_attention", "full_attention")
        values["layer_types"] = [kinds[(i + 1) % pattern == 0] for i in range(common["num_hidden_layers"])]
        local = {"rope_type": "default", "rope_theta": file.value(".rope.freq_base_swa", float, LOCAL_THETA)}
        values["rope_parameters"] = {"full_attention": common["rope_parameters"], "sliding_attention": local}
    return values


def _mixture_settings(file: GgufFile) -> dict[str, Any]:
    """What a mixture's config says besides. Widths that older files do not name are those of their tensors."""
    family = file.family
    values: dict[str, Any] = {
        family.experts_key: file.value(".expert_count", int),
        "num_experts_per_tok": file.value(".expert_used_count", int),
    }
    if family.weights_sum_to_one is None:
        return values
    own, shared = (file.tensors.get(f"blk.0.ffn_gate_{kind}.weight") for kind in ("exps", "shexp"))
    width = own.shape[-2] if own is not None and len(own.shape) == 3 else None
    values["moe_intermediate_size"] = file.value(".expert_feed_forward_length", int, width)
    values["norm_topk_prob"] = file.value(".expert_weights_norm", bool, family.weights_sum_to_one)
    if shared is not None:
        key = ".expert_shared_feed_forward_length"
        values["shared_expert_intermediate_size"] = file.value(key, int, shared.shape[0])
    return values


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    theta = file.value(".rope.freq_base", float, 10000.0)
    scaling = file.value(".rope.scaling.type", str, "none")
    if "rope_freqs.weight" in file.tensors:
        found = file.tensors["rope_freqs.weight"].read()
        for factor in LLAMA3_FACTORS:
            expected = _llama3_factors(theta, head_dim, factor)
            if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4):
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
    rope = {"rope_type": scaling, "rope_theta": theta, "factor": file.value(".rope.scaling.factor", float)}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = file.value(".rope.scaling.original_context_length", int)
    return rope


def _first_length(file: GgufFile) -> int:
    """The length of the texts that a model was first trained on."""
    return file.value(".rope.scaling.original_context_length", int, file.value(".context_length", int))


def _phi_rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """RoPE of a part of each head, or LongRoPE, whose factors lie in tensors, float32."""
    scaling = file.value(".rope.scaling.type", str, "none")
    if scaling not in ("none", "longrope"):
        raise InputError(file.path, f"phi3.rope.scaling.type: {shown(scaling)}; expected none or longrope")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": file.value(".rope.freq_base", float, 10000.0),
        "partial_rotary_factor": file.value(".rope.dimension_count", int, head_dim) / max(head_dim, 1),
    }
    found = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    missing = [name for name in found.values() if name not in file.tensors]
    if len(missing) == len(found):
        return rope
    if missing:
        raise InputError(file.path, f"has no tensor {missing[0]}; expected LongRoPE's factors, long and short")
    context, original = file.value(".context_length", int), _first_length(file)
    rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
    rope |= {key: file.tensors[name].read().tolist() for key, name in found.items()}
    # What the lengths say already is left to them: the file's is rounded.
    stretched = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0
    told = file.value(".rope.scaling.attn_factor", float, stretched)
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

    model = file.value("tokenizer.ggml.model", str)
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in kinds:
        raise InputError(file.path, f"tokenizer.ggml.model: {shown(model)}; expected one of {', '.join(kinds)}")
    tokens = file.value("tokenizer.ggml.tokens", list)
    backend = kinds[model](file, tokens)
    _add_marked(file, backend, tokens)
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {}
    for name, key in keys.items():
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise InputError(file.path, f"tokenizer.ggml.{key}_token_id: {shown(number)}; expected a token's number")
        if number is not None:
            special[f"{name}_token"] = tokens[number]
    # Not all files say that texts begin with a token: those of SentencePiece and of Llama 3 do.
    begins = model == "llama" or file.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    if file.value("tokenizer.ggml.add_bos_token", bool, begins) and "bos_token" in special:
        _begin_with(backend, special["bos_token"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.value(".context_length", int),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = [pair.partition(" ") for pair in file.value("tokenizer.ggml.merges", list)]
    odd = next((first + space + second for first, space, second in merges if not second or " " in second), None)
    if odd is not None:
        raise InputError(file.path, f"tokenizer.ggml.merges: {shown(odd)}; expected pairs of tokens")
    return [(first, second) for first, _, second in merges]


def _byte_level(file: GgufFile, tokens: list[str]) -> Any:
    """Byte-level BPE, over words that are split as `tokenizer.ggml.pre` says."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    splits = _word_splits()
    pre = file.value("tokenizer.ggml.pre", str, "default")
    if pre not in splits:
        raise InputError(file.path, f"tokenizer.ggml.pre: {shown(pre)}; expected one of {', '.join(splits)}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
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


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Any:
    """SentencePiece's BPE with byte fallback. Its merges are those that the scores of its tokens imply."""
    import transformers
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, file.value("tokenizer.ggml.scores", list), strict=False))
    spaced = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer = transformers.LlamaTokenizer(
        vocab=vocabulary, merges=generate_merges(vocabulary, scores), add_prefix_space=spaced
    )
    return tokenizer.backend_tokenizer


def _add_marked(file: GgufFile, backend: Any, tokens: list[str]) -> None:
    """Tokens that are never split: control tokens, as special ones, and those that a user added."""
    import gguf
    from tokenizers import AddedToken

    kinds = file.value("tokenizer.ggml.token_type", list)
    marked = list(zip(tokens, kinds, strict=False))
    control = [token for token, kind in marked if kind == gguf.TokenType.CONTROL]
    added = [token for token, kind in marked if kind == gguf.TokenType.USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])


def _begin_with(backend: Any, token: str) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, backend.token_to_id(token))],
    )  # fmt: skip


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
        raise InputError(file.path, error.what) from None
    names = gguf.get_tensor_name_map(numbers[file.architecture], decoder.layers)
    leaves = {name: leaf for name, leaf, _ in tensors_of(decoder)}
    places = {name: _place_in_file(file, names, name, leaf, place) for name, leaf, place in tensors_of(decoder)}
    missing = [(own, name) for name, (own, _) in places.items() if own not in file.tensors]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise InputError(file.path, f"has no tensor {missing[0][0]} ({missing[0][1]}){more}")
    used = {own for own, _ in places.values()}
    extra = [name for name in file.tensors if name not in used and name not in OF_POSITIONS]
    if extra:
        raise InputError(file.path, f"holds a tensor that its architecture does not have: {extra[0]}")
    for own in used:
        _check_kind(file, own)
    found = {name: _named(file, decoder, leaf, name, places[name]) for name, leaf in leaves.items()}
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


def _named(file: GgufFile, decoder: DecoderConfig, leaf: Leaf, name: str, place: tuple[str, int | None]) -> GgufTensor:
    """The tensor of a place in the file, which is of a leaf and has a name in the model. Raises InputError where a
    tensor of all experts has another shape than the config says."""
    family, (own, expert) = file.family, place
    tensor, shape = file.tensors[own], tensor_shape(decoder, leaf)
    if expert is not None:
        expected = (tensor_grid(decoder, leaf)[1], *shape)
        if tensor.shape != expected:
            raise InputError(
                file.path, f"{own} has shape {list(tensor.shape)}; {file.architecture}.expert_count and the sizes of "
                f"its layers say {list(expected)}",
            )  # fmt: skip
        nbytes = (tensor.stop - tensor.start) // expected[0]
        start = tensor.start + expert * nbytes
        tensor = replace(tensor, shape=shape, start=start, stop=start + nbytes)
    elif shape == (1, *tensor.shape):
        # llama.cpp leaves out axes of one entry where it quantises a file.
        tensor = replace(tensor, shape=shape)
    heads = file.value(".attention.head_count", int)
    interleaved = {"attn_q": heads, "attn_k": file.value(".attention.head_count_kv", int, heads)}
    return replace(
        tensor,
        heads=interleaved.get(own.split(".")[-2], 0) if family.interleaved else 0,
        offset=family.norm_offset if name.endswith("norm.weight") else 0.0,
    )


def _check_kind(file: GgufFile, name: str) -> None:
    """Raises InputError where the package gguf does not dequantise a tensor of this kind."""
    gguf = import_gguf(file.path)
    kind = gguf.GGMLQuantizationType(file.tensors[name].kind)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        raise InputError(
            file.path, f"{name} is quantised as {kind.name}, which the package gguf does not dequantise"
        ) from None


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
