"""GGUF files (llama.cpp's format) as models: config, tokenizer, and tensors that are dequantised while they are read.

A tensor has the same name in the GGUF files of every family (`blk.0.attn_q.weight`); the package gguf, or the
architecture's `Gguf`, maps it to the name in Hugging Face's models. This module undoes the changes that llama.cpp makes
to a family's weights when it writes them; the architecture's `Gguf` lists these.
"""

import json
import re
from collections.abc import Callable, Mapping
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
from evojax_merge.errors import InputError, library_errors, shown
from evojax_merge.models.architecture import (
    Architecture,
    Leaf,
    gguf_architectures,
    tensor_grid,
    tensor_shape,
    tensors_of,
)
from evojax_merge.models.config import DecoderConfig
from evojax_merge.models.config_keys import (
    CONTEXT,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Expected,
    is_number,
    whole,
)
from evojax_merge.models.gguf import EMBEDDING, Gguf, GgufFile

SUFFIX = ".gguf"
# In the folder that stands for a GGUF file: the positions of its tensors. Reading past a large vocabulary takes many
# seconds.
TENSORS = "evojax_merge_tensors.json"
# The numbers of a `GgufTensor` that it holds.
NUMBERS = ("kind", "start", "stop", "heads", "offset")
# The first file of a model that llama-gguf-split has split.
FIRST_PART = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")
# A part of the names of routers and of the gates of shared experts, which files store in float32 beside matrices of any
# type.
ROUTER = ".ffn_gate_inp"
# Word patterns that split between lower and upper case: Mistral's Tekken, and o200k, which keeps a contraction with its
# word, and up to three digits together.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(contraction)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(contraction)s"
    r"|%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = _CASED % {"contraction": "", "digits": r"\p{N}"}
O200K = _CASED % {"contraction": "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "digits": r"\p{N}{1,3}"}
# Tokenizers that split words as Llama 3's does. All of these and Tekken begin texts with a token where a file does not
# say, and keep a word that is a token whole, whatever the merges.
OF_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
WHOLE_WORDS = (*OF_LLAMA3, "tekken")
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# The longest piece that SentencePiece trains: longer tokens were added, and are not merged from pairs. The search for
# pairs takes time that is quadratic in the length.
LONGEST_PIECE = 512
# Rules for the values of files, beside the rules for configs.
COUNT = whole(0, 2**31 - 1)
SCORES = Expected(
    lambda value: isinstance(value, list) and all(is_number(one) and one == one for one in value), "a list of numbers"
)
TOKEN_TYPES = Expected(
    lambda value: isinstance(value, list) and all(type(one) is int for one in value), "a list of whole numbers"
)


@dataclass(frozen=True)
class GgufTensor(BytesOfFile):
    """A tensor of a GGUF file. kind: the storage type of its values, a number of gguf.GGMLQuantizationType; heads: the
    number of heads whose rows are interleaved, else 0; offset: the number that is subtracted from its values."""

    kind: int
    heads: int = 0
    offset: float = 0.0

    def read(self) -> np.ndarray:
        gguf = import_gguf(self.file)
        raw = np.empty(self.stop - self.start, np.uint8)
        self.mapped.copy(self.start, raw)
        raw = raw.reshape(*self.shape[:-1], -1)
        # Scales that are not finite make values that are not; the callers refuse these with the tensor's name.
        with np.errstate(all="ignore"):
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType(self.kind))
        values = (values - np.float32(self.offset) if self.offset else values).astype(self.dtype, copy=False)
        if not self.heads:
            return values
        # GGUF rotates neighbouring rows of a head of queries or keys as a pair, Hugging Face row i with row i + D / 2.
        return values.reshape(self.heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


@dataclass(frozen=True)
class GgufModel(GgufFile):
    """A GGUF file of a supported architecture."""

    tensors: Mapping[str, GgufTensor]

    @cached_property
    def architecture(self) -> Architecture:
        candidates = gguf_architectures()[self.metadata["general.architecture"]]
        has_experts = bool(self.metadata.get(self.key(".expert_count")))
        return next(
            (candidate for candidate in candidates if candidate.gguf and candidate.gguf.has_experts == has_experts),
            candidates[0],
        )

    @property
    def form(self) -> Gguf:
        assert self.architecture.gguf is not None
        return self.architecture.gguf

    @cached_property
    def tokens(self) -> list[str]:
        """The token of each row of the embedding."""
        name = "tokenizer.ggml.tokens"
        tokens: list[str] = self.for_each_token(name, TEXTS)
        if len(set(tokens)) < len(tokens):
            first: dict[str, int] = {}
            i, token = next((i, token) for i, token in enumerate(tokens) if first.setdefault(token, i) != i)
            raise InputError(
                self.path, f"{name}: {shown(token)} is there twice, as {first[token]} and {i}; expected each token once"
            )
        return tokens

    def for_each_token(self, name: str, expected: Expected) -> list[Any]:
        """A list in the metadata with an entry for each token, which has a row in the embedding."""
        values, rows = self.value(name, expected), self.embedding.shape[0]
        if len(values) != rows:
            raise InputError(
                self.path,
                f"{name}: has {len(values):,} entries; expected one for each of the {rows:,} rows of {EMBEDDING}",
            )
        return list(values)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens that the file names, by transformers' short names."""
        keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in SPECIAL_TOKENS.items()}
        a_token = whole(0, len(self.tokens) - 1)
        return {name: self.value(key, a_token) for name, key in keys.items() if key in self.metadata}

    def refused(self, reason: object) -> InputError:
        """The error for a fault of the config that was made from this file, in the names of the file's keys."""
        keys, text = self.form.config_keys, " ".join(str(reason).split())[:300]
        names = "|".join(map(re.escape, sorted(keys, key=len, reverse=True)))
        pattern = rf"(?:rope_parameters\.)?\b({names})\b"
        return InputError(self.path, re.sub(pattern, lambda match: self.key(keys[match[1]]), text) if keys else text)


def import_gguf(where: object) -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError(where, "a GGUF file needs the package gguf; pip install 'evojax-merge[gguf]'") from None
    return gguf


def gguf_files(path: Path) -> list[Path]:
    """The files of the model in a GGUF file: the file alone, or, for the first part of a split model, the parts that
    lie beside each other."""
    match = FIRST_PART.fullmatch(path.name)
    count = int(match[2]) if match else 0
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[2]}{SUFFIX}") for i in range(2, count + 1)] if match else []
    return [path, *(part for part in parts if part.is_file())]


def read_gguf(path: Path) -> GgufModel:
    """Read the header of a GGUF file, or of all parts of a split model by its first one, and no tensor. Raises
    InputError where a file is damaged, truncated or missing, or its family is not supported."""
    gguf = import_gguf(path)
    sizes = {int(kind): block_sizes for kind, block_sizes in gguf.GGML_QUANT_SIZES.items()}
    files = gguf_files(path)
    metadata, places = read_gguf_header(path, sizes)
    architecture, supported = metadata.get("general.architecture"), gguf_architectures()
    # The parts behind the first have no other keys.
    parts = metadata.get("split.count", 1) or 1
    if parts != len(files):
        raise InputError(
            path, f"split.count: {shown(parts)}, of which {len(files)} could be read; expected all in one folder, "
            "and the name of the first, which ends in -00001-of-0000N.gguf",
        )  # fmt: skip
    if architecture is None:
        raise InputError(path, f"general.architecture: missing; expected one of {', '.join(supported)}")
    if not isinstance(architecture, str) or architecture not in supported:
        raise InputError(path, f"general.architecture: {shown(architecture)}; expected one of {', '.join(supported)}")
    mapped = dict.fromkeys(places, MappedFile(path))
    for part in files[1:]:
        _, more = read_gguf_header(part, sizes)
        if twice := places.keys() & more:
            raise InputError(part, f"holds the tensor {shown(min(twice))}, which a part before it has; damaged?")
        places |= more
        mapped |= dict.fromkeys(more, MappedFile(part))
    for number, name in {place.kind: name for name, place in places.items()}.items():
        kind = gguf.GGMLQuantizationType(number)
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise InputError(
                path, f"{name} is quantised as {kind.name}, which the package gguf does not dequantise"
            ) from None

    def is_matrix(name: str) -> bool:
        return len(places[name].shape) > 1 and ROUTER not in name

    kinds = {place.kind for name, place in places.items() if is_matrix(name)}
    kind_of, single = gguf.GGMLQuantizationType, np.dtype(np.float32)
    # One dtype for all matrices: a quantised value is a product and a sum of halves, which no shorter float holds.
    halves = {kind_of.F16: np.dtype(np.float16), kind_of.BF16: np.dtype(ml_dtypes.bfloat16)}
    dtype = halves.get(next(iter(kinds)), single) if len(kinds) == 1 else single
    tensors = {
        name: GgufTensor(
            mapped[name], dtype if is_matrix(name) else single, place.shape, place.start, place.stop, place.kind
        )
        for name, place in places.items()
    }
    return GgufModel(path, metadata, tensors)


# ---------------------------------------------------------------------------------------------------------------
# The model's config


def write_config(file: GgufModel, folder: Path) -> None:
    """Write config.json and generation_config.json. Raises InputError for metadata that the family's config has no form
    for."""
    import transformers

    architecture = file.architecture
    if file.value(".expert_count", COUNT, 0) and not file.form.has_experts:
        raise InputError(file.path, f"{file.key('.expert_count')}: expected no experts in this architecture")
    read = file.form.read_settings(file)
    settings = {key: value for key, value in read.items() if key in architecture.keys}
    settings |= {"dtype": str(file.embedding.dtype)}
    # None where the file names no token: the defaults of a class are other vocabularies' tokens.
    ends = {f"{name}_token_id": file.special_ids.get(name) for name in ("bos", "eos", "pad")}
    name = architecture.config_class
    try:
        if name is None:
            content = json.dumps({"model_type": architecture.model_type, **settings, **ends}, indent=2)
            (folder / "config.json").write_text(content + "\n", encoding="utf-8")
        else:
            settings["architectures"] = [name.removesuffix("Config").removesuffix("Text") + "ForCausalLM"]
            getattr(transformers, name)(**settings, **ends).save_pretrained(folder)
        transformers.GenerationConfig(**ends).save_pretrained(folder)
    except Exception as error:  # any error of transformers' validation is a fault of the file
        raise file.refused(f"its settings make no {architecture.model_type} config ({error})") from None


# ---------------------------------------------------------------------------------------------------------------
# The tokenizer


def write_tokenizer(file: GgufModel, folder: Path) -> None:
    """Write the tokenizer in Hugging Face's files. Raises InputError for a kind of tokenizer that is not supported."""
    import gguf
    import transformers
    from tokenizers import AddedToken, processors

    model = file.value("tokenizer.ggml.model", TEXT)
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in kinds:
        raise InputError(file.path, f"tokenizer.ggml.model: {shown(model)}; expected one of {', '.join(kinds)}")
    with library_errors(file.path, "tokenizer.ggml.tokens: they make no tokenizer"):
        backend = kinds[model](file)
        # Tokens that are never split: control tokens, marked special, and tokens that a user added.
        marked = list(zip(file.tokens, file.for_each_token("tokenizer.ggml.token_type", TOKEN_TYPES), strict=True))
        control = [token for token, kind in marked if kind == gguf.TokenType.CONTROL]
        added = [token for token, kind in marked if kind == gguf.TokenType.USER_DEFINED]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    # Some files do not say that texts begin with a token: texts of SentencePiece and of Llama 3 do.
    begins = model == "llama" or file.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    if file.value("tokenizer.ggml.add_bos_token", SWITCH, begins) and "bos" in file.special_ids:
        # The token may contain a character that separates the parts of a template text, so a placeholder stands for it.
        number = file.special_ids["bos"]
        begin = processors.TemplateProcessing(
            single="first:0 $A:0", pair="first:0 $A:0 first:1 $B:1", special_tokens=[("first", number)]
        )
        state = begin.__getstate__().replace(b'"first"', json.dumps(file.tokens[number]).encode())
        begin.__setstate__(state)
        backend.post_processor = begin
    template = "tokenizer.chat_template"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": file.tokens[number] for name, number in file.special_ids.items()},
        chat_template=file.value(template, TEXT) if template in file.metadata else None,
        model_max_length=file.value(".context_length", CONTEXT),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _byte_level(file: GgufModel) -> Any:
    """Byte-level BPE, over the words into which `tokenizer.ggml.pre` splits text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    splits = word_splits()
    pre = file.value("tokenizer.ggml.pre", TEXT, "default")
    if pre not in splits:
        raise InputError(file.path, f"tokenizer.ggml.pre: {shown(pre)}; expected one of {', '.join(splits)}")
    vocabulary, merges = {token: i for i, token in enumerate(file.tokens)}, list[tuple[str, str]]()
    for merge in file.value("tokenizer.ggml.merges", TEXTS):
        first, _, second = merge.partition(" ")
        if first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise InputError(
                file.path, f"tokenizer.ggml.merges: {shown(merge)}; expected two tokens that make a third, by a space"
            )
        merges.append((first, second))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS))
    if splits[pre] is splits["qwen2"]:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_splits() -> dict[str, list[Any]]:
    """The steps that split text into words, and words into bytes, by their name in `tokenizer.ggml.pre`."""
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
        # Phi-4's vocabulary has the same word splits as Llama 3's.
        **dict.fromkeys(("dbrx", "smaug-bpe", *OF_LLAMA3), llama3),
        # Phi-4-mini's splits are o200k's.
        **dict.fromkeys(("gpt-4o", "llama4"), o200k),
        "tekken": by_pattern(TEKKEN),
    }


def _sentencepiece(file: GgufModel) -> Any:
    """SentencePiece's BPE with byte fallback. The scores of its tokens imply its merges."""
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


# ---------------------------------------------------------------------------------------------------------------
# The model's tensors


def named_tensors(file: GgufModel, config: Path) -> dict[str, GgufTensor]:
    """The tensors by Hugging Face's names, in the file's order; a tensor of all experts becomes one tensor per expert.
    config: the config.json that was made from the file.

    Raises InputError where the file lacks a tensor of the model, or has a tensor that its family does not have.
    """
    try:
        decoder = decoder_config(config)
    except InputError as error:
        raise file.refused(error.what) from None
    # This check comes before the package makes names for every layer, which takes seconds for thousands of layers.
    last = f"blk.{decoder.layers - 1}."
    if not any(name.startswith(last) for name in file.tensors):
        raise InputError(file.path, f"has no tensor {last}*; {file.key('.block_count')} says {decoder.layers:,} layers")
    names = tensor_names(file.path, file.architecture, decoder.layers)
    tensors, used = dict[str, GgufTensor](), set[str]()
    # The first tensor that is missing, or of another shape, ends the loop: otherwise the file's numbers of layers and
    # experts would decide how long it takes.
    for name, leaf, place in tensors_of(decoder):
        file_name, expert = names(name, leaf, place), place[1] if leaf.has_experts else None
        # A tensor of all experts; early files of Mixtral have one tensor per expert.
        alone = file_name.replace("_exps.", f".{expert}.")
        if expert is not None and file_name not in file.tensors and alone in file.tensors:
            file_name, expert = alone, None
        if file_name not in file.tensors:
            raise InputError(file.path, f"has no tensor {file_name} ({name})")
        tensors[name] = _named(file, decoder, leaf, name, file_name, expert)
        used.add(file_name)
    extra = [name for name in file.tensors if name not in used and name not in file.form.setting_tensors]
    if extra:
        raise InputError(file.path, f"holds a tensor that its architecture does not have: {extra[0]}")
    return dict(sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)))


def tensor_names(
    where: object, architecture: Architecture, layers: int
) -> Callable[[str, Leaf, tuple[int, ...]], str]:  # fmt: skip
    """(the tensor's name in the model, its leaf, its index in the leaf's grid) -> its name in the file, from the
    architecture's `Gguf` or the package gguf."""
    form = architecture.gguf
    assert form is not None
    if form.names:
        return lambda name, leaf, place: form.names[leaf.name].replace("{layer}", str(place[0] if place else ""))
    gguf = import_gguf(where)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if form.name not in numbers:
        raise InputError(
            where,
            f"general.architecture: {form.name}, whose tensors the package gguf does not know; expected "
            f"gguf.names in the architecture {architecture.model_type}",
        )
    packaged = gguf.get_tensor_name_map(numbers[form.name], layers)

    def name_in_file(name: str, leaf: Leaf, place: tuple[int, ...]) -> str:
        if leaf.has_experts:
            name = name.replace(f".experts.{place[1]}.", ".experts.")
        packaged_name: str = packaged.get_name(name, try_suffixes=(".weight", ".bias"))
        return packaged_name

    return name_in_file


def interleaved_heads(form: Gguf, heads: int, kv_heads: int, file_name: str) -> int:
    """The number of heads whose rows a file interleaves; 0 for a tensor whose rows it leaves in order."""
    counts = {"attn_q": heads, "attn_k": kv_heads} if form.interleaved else {}
    return counts.get(file_name.split(".")[-2], 0)


def norm_offset(form: Gguf, name: str) -> float:
    """The number by which a file's values exceed those of the model's tensor `name`."""
    return form.norm_offset if name.endswith("norm.weight") else 0.0


def _named(
    file: GgufModel, decoder: DecoderConfig, leaf: Leaf, name: str, file_name: str, expert: int | None
) -> GgufTensor:
    """The file's tensor `file_name`, or an expert's part of it, as the leaf's tensor `name`. Raises InputError where
    its shape is not the one that the metadata imply."""
    tensor, shape = file.tensors[file_name], tensor_shape(decoder, leaf)
    expected = shape if expert is None else (tensor_grid(decoder, leaf)[1], *shape)
    # llama.cpp drops axes of one entry when it quantises a file.
    if tensor.shape not in (expected, expected[1:] if expected[0] == 1 else expected):
        axes = leaf.shape if expert is not None or not leaf.has_experts else leaf.shape[1:]
        sizes = tensor.shape if len(tensor.shape) == len(expected) else (0,) * len(expected)
        differing = [axis for axis, size, right in zip(axes, sizes, expected, strict=True) if size != right]
        keys = dict.fromkeys(file.key(key) for axis in differing for key in file.form.size_keys.get(axis, ()))
        says = " and ".join(key for key in keys if key in file.metadata) or "its metadata"
        raise InputError(
            file.path, f"{file_name} has shape {list(tensor.shape)}; by {says} it would be {list(expected)}"
        )
    nbytes = (tensor.stop - tensor.start) // (1 if expert is None else expected[0])
    start = tensor.start + (expert or 0) * nbytes
    heads = kv_heads = 0
    if file.form.interleaved:
        heads = file.value(".attention.head_count", SIZE)
        kv_heads = file.value(".attention.head_count_kv", SIZE, heads)
    return replace(
        tensor,
        shape=shape,
        start=start,
        stop=start + nbytes,
        heads=interleaved_heads(file.form, heads, kv_heads, file_name),
        offset=norm_offset(file.form, name),
    )


def write_tensor_table(tensors: Mapping[str, GgufTensor], folder: Path) -> None:
    """Write the positions of a GGUF file's tensors into the folder that stands for the file."""
    table = {
        name: {
            "file": tensor.file.name,
            "dtype": str(tensor.dtype),
            "shape": tensor.shape,
            **{key: getattr(tensor, key) for key in NUMBERS},
        }
        for name, tensor in tensors.items()
    }
    (folder / TENSORS).write_text(json.dumps(table) + "\n", encoding="utf-8")


def open_gguf(path: Path, file: Path) -> Folder:
    """The tensors of the GGUF file, or of a split model's parts, that the folder `path` stands for. Raises InputError
    where one of them is gone."""
    if not file.is_file():
        raise InputError(file, "is missing; expected a GGUF file")
    table = read_json_object(path / TENSORS, missing={})
    mapped = {part.name: MappedFile(part) for part in gguf_files(file)}
    if missing := {row["file"] for row in table.values()} - mapped.keys():
        raise InputError(file, f"its part {shown(min(missing))} is missing; expected all in one folder")
    tensors = {
        name: GgufTensor(
            mapped[row["file"]],
            FLOAT_DTYPES[row["dtype"]],
            tuple(row["shape"]),
            **{key: row[key] for key in NUMBERS},
        )
        for name, row in table.items()
    }
    return Folder(path, tensors)
