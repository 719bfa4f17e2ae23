"""Hostile GGUF files: headers that lie about sizes, metadata of the wrong kind, and tensors that contradict them.

The files are written byte by byte: the package's own writer refuses most of them.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hostile import MERGE, SEARCH, Case, World, changing, config, link

FILE = "one.gguf"
EVALUATE = ("evaluate", FILE, "--tasks", "config.yaml")
PLAN = ("plan", "config.yaml", "--target", "cpu")
U8, I32, U32, F32, BOOL, TEXT, LIST, U64, F64 = 0, 5, 4, 6, 7, 8, 9, 10, 12
FORMATS = {U8: "B", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", F64: "d"}
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 48, 3, 4, 2
LETTERS = [chr(first + i) for first in (ord("a"), ord("A")) for i in range(26)]
TOKENS = ["<pad>", "<s>", "</s>", *LETTERS, "ab", "cd", *(f"<extra_{i}>" for i in range(7))]
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """A value of the metadata as it is in the file: the number of its type, and its bytes."""

    kind: int
    content: bytes


@dataclass
class Tensor:
    """A tensor: its sizes, innermost first, the number of its quantisation, and its bytes; `offset`: where the header
    says that it lies, by default where it does."""

    sizes: list[int]
    kind: int
    content: bytes
    offset: int | None = None


@dataclass
class Gguf:
    """A GGUF file before it is written. `version`, `tensor_count` and `key_count`: what its header says."""

    metadata: list[tuple[str | bytes, Any]]
    tensors: list[tuple[str | bytes, Tensor]]
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    tail: Callable[[bytes], bytes] = field(default=lambda content: content)

    def set(self, **changes: Any) -> None:
        """Set keys of the metadata, `__` for a dot; the value `...` removes a key."""
        for name, value in changes.items():
            key = name.replace("__", ".")
            self.metadata = [pair for pair in self.metadata if pair[0] != key]
            if value is not ...:
                self.metadata.append((key, value))

    def tensor(self, name: str) -> Tensor:
        return dict(self.tensors)[name]

    def content(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.metadata) if self.key_count is None else self.key_count,
        )
        header = self.magic + struct.pack("<I2Q", self.version, *counts)
        for key, value in self.metadata:
            raw = encoded(value)
            header += text(key) + struct.pack("<I", raw.kind) + raw.content
        data = b""
        for name, tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            header += text(name) + struct.pack(f"<I{len(tensor.sizes)}Q", len(tensor.sizes), *tensor.sizes)
            header += struct.pack("<IQ", tensor.kind, offset)
            data += padded(tensor.content)
        return self.tail(padded(header) + data)


def padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % 32)


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encoded(value: Any) -> Raw:
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool):
        return Raw(BOOL, struct.pack("<?", value))
    if isinstance(value, int):
        kind = U32 if 0 <= value < 2**32 else I32 if value < 0 else U64
        return Raw(kind, struct.pack(f"<{FORMATS[kind]}", value))
    if isinstance(value, float):
        return Raw(F32, struct.pack("<f", value))
    if isinstance(value, str | bytes):
        return Raw(TEXT, text(value))
    items = [encoded(item) for item in value]
    kind = items[0].kind if items else TEXT
    return Raw(LIST, struct.pack("<IQ", kind, len(items)) + b"".join(item.content for item in items))


def listed(kind: int, count: int, content: bytes = b"") -> Raw:
    """A list of so many values of a kind, and the bytes that are there of them."""
    return Raw(LIST, struct.pack("<IQ", kind, count) + content)


def nested(depth: int) -> Raw:
    """Lists of one list each."""
    return Raw(LIST, struct.pack("<IQ", LIST, 1) * depth + struct.pack("<IQ", U8, 0))


def good(world: World) -> Gguf:
    """The world's model `one` as a GGUF file with a tokenizer of letters."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama", "llama.context_length": 256, "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS, "llama.feed_forward_length": 80, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (VOCAB - 3), "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    weights = load_file(world / "one/model.safetensors")
    rows = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    rows |= {
        f"blk.{i}.{there}.weight": f"model.layers.{i}.{own}.weight"
        for i in range(LAYERS)
        for own, there in NAMES.items()
    }
    tensors = [(name, float32(weights[own])) for name, own in rows.items()]
    return Gguf(list(metadata.items()), tensors)


def float32(values: np.ndarray) -> Tensor:
    return Tensor(list(reversed(values.shape)), 0, np.asarray(values, np.float32).tobytes())


@changing
def file(world: World, edit: Callable[[Gguf], Any] = lambda gguf: None, *command: str) -> Any:
    """The file, edited, in the place of the model `one`."""
    gguf = good(world)
    edit(gguf)
    return placed(gguf.content())(world)


@changing
def placed(world: World, content: bytes) -> None:
    world.write(FILE, content)
    world.write("recipe.yaml", {"merge_method": "linear", "models": [MODEL]})
    world.write("config.yaml", config(base="base", parents=["two", FILE]))


@changing
def instead(world: World, make: Callable[[Path], Any]) -> None:
    """Something else where the file was."""
    placed(b"")(world)
    (world / FILE).unlink()
    make(world / FILE)


MODEL = {"model": FILE, "parameters": {"weight": 1.0}}


def metadata(**changes: Any) -> Callable[[World], Any]:
    return file(lambda gguf: gguf.set(**changes))


def tokenizer(**changes: Any) -> Callable[[World], Any]:
    return metadata(**{f"tokenizer__ggml__{name}": value for name, value in changes.items()})


def header(**changes: Any) -> Callable[[World], Any]:
    """The file with other numbers in its header."""
    return file(lambda gguf: [setattr(gguf, name, value) for name, value in changes.items()])


def tensor(name: str, **changes: Any) -> Callable[[World], Any]:
    return file(lambda gguf: [setattr(gguf.tensor(name), key, value) for key, value in changes.items()])


def reshaped(name: str, *sizes: int) -> Callable[[World], Any]:
    """A tensor of these sizes, innermost first, of zeros."""
    return tensor(name, sizes=list(sizes), content=b"\0" * (4 * prod(sizes)))


def without(name: str) -> Callable[[World], Any]:
    def edit(gguf: Gguf) -> None:
        gguf.tensors = [pair for pair in gguf.tensors if pair[0] != name]

    return file(edit)


def more(name: str | bytes, value: Tensor) -> Callable[[World], Any]:
    return file(lambda gguf: gguf.tensors.append((name, value)))


def key(name: str | bytes, value: Any) -> Callable[[World], Any]:
    """One more key, whether or not it is there."""
    return file(lambda gguf: gguf.metadata.append((name, value)))


def big_endian(gguf: Gguf) -> None:
    gguf.version = 3 << 24


def renamed(number: int, name: str | bytes, **changes: Any) -> Callable[[World], Any]:
    """A token with another name."""
    tokens = [*TOKENS[:number], name, *TOKENS[number + 1 :]]
    return tokenizer(tokens=tokens, **changes)


def sentencepiece(**changes: Any) -> Callable[[World], Any]:
    scores = [-float(i) for i in range(VOCAB)]
    return tokenizer(**{"model": "llama", "scores": scores, "unknown_token_id": 0, **changes})


IN_FOLDER = (f"/{FILE}: ", "expected")
IN_FILE, DAMAGED = (f"{FILE}: ",), (f"{FILE}: ", "damaged or truncated")
NORM, EMBEDDING, QUERIES = "output_norm.weight", "token_embd.weight", "blk.1.attn_q.weight"
HUGE = 2**64 - 64

HEADERS = [
    Case("no key", header(metadata=[]), (*IN_FILE, "general.architecture"), MERGE),
    Case("a magic of another case", header(magic=b"gguf"), (*IN_FILE, "not a GGUF file"), MERGE),
    Case("a file of four bytes", placed(b"GGUF"), DAMAGED, MERGE),
    Case("an empty file", placed(b""), (*IN_FILE, "not a GGUF file"), MERGE),
    Case("a folder for a file", instead(Path.mkdir), IN_FOLDER, MERGE),
    Case("a pipe for a file", instead(os.mkfifo), IN_FOLDER, MERGE),
    Case("a link to nothing", instead(link("nowhere")), ("one.gguf",), MERGE),
    Case("a link to itself", instead(link(FILE)), ("one.gguf",), MERGE),
    Case("a device for a file", instead(link("/dev/zero")), ("/dev/zero",), MERGE),
    Case("the first version", header(version=1), (*IN_FILE, "version 1", "2 or 3"), MERGE),
    Case("a version to come", header(version=99), (*IN_FILE, "version 99"), MERGE),
    Case("a big-endian file", file(big_endian), (*IN_FILE, "big-endian"), MERGE),
    Case("2^63 keys", header(key_count=2**63), DAMAGED, MERGE),
    Case("2^64 - 1 tensors", header(tensor_count=2**64 - 1), DAMAGED, MERGE),
    Case("one key more than there are", header(key_count=99), IN_FILE, MERGE),
    Case("2^60 booleans", key("x", listed(BOOL, 2**60)), (*DAMAGED, "x"), MERGE, seconds=5),
    Case("2^60 booleans, evaluated", key("x", listed(BOOL, 2**60)), DAMAGED, EVALUATE, seconds=5),
    Case("2^60 booleans, planned", key("x", listed(BOOL, 2**60)), DAMAGED, PLAN, seconds=5),
    Case("2^60 texts", key("x", listed(TEXT, 2**60)), DAMAGED, MERGE, seconds=5),
    Case("2^61 numbers of eight bytes", key("x", listed(U64, 2**61)), DAMAGED, MERGE, seconds=5),
    Case("2^60 lists", key("x", listed(LIST, 2**60)), DAMAGED, MERGE, seconds=5),
    Case("5 million booleans", key("x", listed(BOOL, 5 << 20, bytes(5 << 20))), (*IN_FILE, "x"), MERGE, seconds=5),
    Case("lists that nest deep", key("x", nested(100_000)), (*IN_FILE, "x", "nest"), MERGE),
    Case("a text of 2^64 - 1 bytes", key("x", Raw(TEXT, b"\xff" * 8)), DAMAGED, MERGE),
    Case(
        "a key of 2^63 bytes",
        header(tail=lambda content: content[:24] + (2**63).to_bytes(8, "little") + content[32:]),
        DAMAGED,
        MERGE,
    ),
    Case("a type that nobody knows", key("x", Raw(77, b"")), (*IN_FILE, "x", "77"), MERGE),
    Case("a list of a type that nobody knows", key("x", listed(77, 1)), (*IN_FILE, "x", "77"), MERGE),
    Case("a key twice", key("llama.block_count", LAYERS), (*IN_FILE, "llama.block_count", "twice"), MERGE),
    Case("a key that is not UTF-8", key(b"\xff\xfe", 1), (*IN_FILE, "UTF-8"), MERGE),
    Case("a key with colours", key("a\n\x1b[31m", Raw(77, b"")), (*IN_FILE, r"a\n\x1b[31m"), MERGE),
    Case("a key of a megabyte", key("k" * 2**20, 1), IN_FILE, MERGE),
    Case("a text that is not UTF-8", key("general.name", b"\xff\xfe"), (*IN_FILE, "general.name", "UTF-8"), MERGE),
    Case("an alignment of 0", key("general.alignment", 0), (*IN_FILE, "general.alignment"), MERGE),
    Case("an alignment of 48", key("general.alignment", 48), (*IN_FILE, "general.alignment"), MERGE),
    Case("an alignment that is a text", key("general.alignment", "32"), (*IN_FILE, "general.alignment"), MERGE),
    Case("an alignment of 2^31", key("general.alignment", 2**31), DAMAGED, MERGE),
    Case("one part of three", key("split.count", 3), (*IN_FILE, "split.count"), MERGE),
]
TENSORS = [
    Case("an offset that wraps", tensor(NORM, offset=HUGE), (*DAMAGED, NORM), MERGE),
    Case("an offset that wraps, searched", tensor(NORM, offset=HUGE), (*DAMAGED, NORM), SEARCH),
    Case("an offset beyond the end", tensor(NORM, offset=2**40), (*DAMAGED, NORM), MERGE),
    Case("an offset between two floats", tensor(NORM, offset=33), (*IN_FILE, NORM, "offset"), MERGE),
    Case("tensors that overlap", tensor(NORM, offset=32), (*IN_FILE, NORM, EMBEDDING, "overlap"), MERGE),
    Case("data cut by a byte", header(tail=lambda content: content[:-1]), DAMAGED, MERGE),
    Case("no data at all", header(tail=lambda content: content[: content.index(b"blk.2")]), DAMAGED, MERGE),
    Case("2^32 times 2^32 entries", tensor(QUERIES, sizes=[2**32, 2**32]), (*DAMAGED, QUERIES), MERGE),
    Case("2^63 entries", tensor(QUERIES, sizes=[2**63]), (*DAMAGED, QUERIES), MERGE),
    Case("no entries", tensor(QUERIES, sizes=[HIDDEN, 0]), (*IN_FILE, QUERIES), MERGE),
    Case("no axes", tensor(QUERIES, sizes=[]), (*IN_FILE, QUERIES, "axes"), MERGE),
    Case("nine axes", more("x", Tensor([1] * 9, 0, b"")), (*IN_FILE, "axes"), MERGE),
    Case("a kind that nobody knows", tensor(QUERIES, kind=77), (*IN_FILE, QUERIES, "77"), MERGE),
    Case("a kind of integers", tensor(QUERIES, kind=26), (*IN_FILE, QUERIES, "I32"), MERGE),
    Case("a row of no whole blocks", tensor(QUERIES, kind=8), (*IN_FILE, QUERIES, "32"), MERGE),
    Case("a tensor twice", more(NORM, Tensor([HIDDEN], 0, bytes(4 * HIDDEN))), (*IN_FILE, NORM, "twice"), MERGE),
    Case("a name that is not UTF-8", more(b"\xff", Tensor([1], 0, bytes(4))), (*IN_FILE, "UTF-8"), MERGE),
    Case("a name with colours", more("a\n\x1b[31m", Tensor([1], 0, bytes(4))), (*IN_FILE, r"a\n\x1b[31m"), MERGE),
    Case("a name of a megabyte", more("n" * 2**20, Tensor([1], 0, bytes(4))), IN_FILE, MERGE),
    Case("no embedding", without(EMBEDDING), (*IN_FILE, EMBEDDING), MERGE),
    Case("no final norm", without(NORM), (*IN_FILE, NORM), MERGE),
    Case("a vector for an embedding", reshaped(EMBEDDING, VOCAB), (*IN_FILE, EMBEDDING), MERGE),
    Case("a narrow embedding", reshaped(EMBEDDING, 32, VOCAB), (*IN_FILE, EMBEDDING, "llama.embedding_length"), MERGE),
    Case("wide queries", reshaped(QUERIES, HIDDEN, 96), (*IN_FILE, QUERIES, "llama.attention.head_count"), MERGE),
    Case("keys on their side", reshaped("blk.0.attn_k.weight", 24, HIDDEN), ("blk.0.attn_k.weight",), MERGE),
    Case("a matrix for a norm", reshaped(NORM, HIDDEN, 1), (*IN_FILE, NORM), MERGE),
    Case("a norm of one entry", reshaped(NORM, 1), (*IN_FILE, NORM), EVALUATE),
    Case(
        "a narrow feed-forward", reshaped("blk.2.ffn_up.weight", HIDDEN, 64),
        (*IN_FILE, "blk.2.ffn_up.weight", "llama.feed_forward_length"), MERGE,
    ),
    Case("a head of other rows", more("output.weight", float32(np.ones((63, HIDDEN)))), ("output.weight",), MERGE),
    Case("one of several biases", more("blk.0.attn_q.bias", float32(np.zeros(48))), ("blk.0.attn_k.bias",), MERGE),
    Case("odd frequencies", more("rope_freqs.weight", float32(np.ones(7))), ("rope_freqs.weight",), MERGE),
    Case(
        "frequencies of integers", more("rope_freqs.weight", Tensor([6], 26, bytes(24))), ("rope_freqs.weight",), MERGE
    ),
    Case("weights that are not finite", tensor(NORM, content=b"\xff" * 4 * HIDDEN), ("NaN or Inf",), MERGE),
    Case(
        "halves whose scale is infinite",
        tensor("blk.0.attn_output.weight", kind=1, content=b"\x00\x7c" * HIDDEN * HIDDEN),
        ("NaN or Inf",), MERGE,
    ),
]  # fmt: skip


def setting(name: str, *values: Any) -> list[Case]:
    """A setting of the model that has another value, is missing, or is of another kind."""
    return [
        Case(f"{name} {value!r:.20}", metadata(**{f"llama__{name}": value}), (*IN_FILE, name.replace("__", ".")), MERGE)
        for value in values
    ]


NAN, INF = float("nan"), float("inf")
SETTINGS = [
    Case("an architecture that is a list", metadata(general__architecture=["llama"]), ("general.architecture",), MERGE),
    Case("an architecture that is a number", metadata(general__architecture=3), ("general.architecture",), MERGE),
    Case("no architecture", metadata(general__architecture=...), ("general.architecture", "missing"), MERGE),
    Case("an architecture of a megabyte", metadata(general__architecture="x" * 2**20), ("expected one of",), MERGE),
    *setting("attention__head_count", 0, 3, 32, 10**9, -1, 2**63, "4", [4, 4, 4], 4.0, True, ...),
    *setting("attention__head_count_kv", 0, 3, 8, 10**9, [2, 2, 2]),
    *setting("attention__key_length", 0, 7, 10**9, 24, NAN),
    *setting("attention__layer_norm_rms_epsilon", NAN, INF, -1.0, 5.0, "1e-6", Raw(F64, struct.pack("<d", 1e300))),
    *setting("block_count", 0, 9999, 10**9, 2**63, NAN, [3]),
    *setting("context_length", 0, -1, 2**62, "256"),
    *setting("embedding_length", 0, 47, 2**31, [48]),
    *setting("feed_forward_length", 0, 81, [80, 80, 80]),
    *setting("rope__dimension_count", 0, 5, 2**31, [12]),
    *setting("rope__freq_base", NAN, 0.0, -1.0, INF, "1e4"),
    *setting("rope__scaling__type", 7, "ntk", ["linear"]),
    *setting("expert_count", -1, "8", [8]),
    Case("experts without a number for a token", metadata(llama__expert_count=8), ("llama.expert_used_count",), MERGE),
    Case(
        "10^9 experts", metadata(llama__expert_count=10**9, llama__expert_used_count=2),
        ("experts",), MERGE,
    ),
    Case(
        "a scaling without a factor", metadata(llama__rope__scaling__type="linear"), ("rope.scaling.factor",), MERGE
    ),
    Case(
        "a scaling by nothing",
        metadata(llama__rope__scaling__type="yarn", llama__rope__scaling__factor=0.0), ("rope.scaling.factor",), MERGE,
    ),
    Case(
        "a scaling from no length",
        metadata(
            llama__rope__scaling__type="yarn", llama__rope__scaling__factor=2.0,
            llama__rope__scaling__original_context_length=0,
        ),
        ("rope.scaling.original_context_length",), MERGE,
    ),
    Case("a head count that is a text, searched", metadata(llama__attention__head_count="4"), ("head_count",), SEARCH),
    Case("a head count of 3, planned", metadata(llama__attention__head_count=3), ("head_count",), PLAN),
]  # fmt: skip


def ids(name: str, *values: Any) -> list[Case]:
    where = (*IN_FILE, f"tokenizer.ggml.{name}_token_id")
    return [
        Case(f"{name} id {value!r:.20}", tokenizer(**{f"{name}_token_id": value}), where, MERGE) for value in values
    ]


def token_key(name: str, *values: Any, make: Callable[..., Callable[[World], Any]] = tokenizer) -> list[Case]:
    where = (*IN_FILE, f"tokenizer.ggml.{name}")
    return [Case(f"{name} {value!r:.20}", make(**{name: value}), where, MERGE) for value in values]


TOKENIZERS = [
    *ids("eos", "</s>", NAN, True, -1, VOCAB, 2**32 - 1, 2**63, [2], 2.0),
    *ids("bos", "<s>", False, VOCAB),
    *ids("unknown", INF, [0]),
    *ids("padding", "", 10**9),
    *token_key("tokens", [1] * VOCAB, [], TOKENS[:-1], [*TOKENS, "x"], "a b c", [TOKENS], ...),
    *token_key("token_type", ["x"] * VOCAB, [1.0] * VOCAB, [1], [], "control", ...),
    *token_key("merges", [1, 2], ["ab"], ["a b c"], ["a ß"], ["a c"], "a b", [["a", "b"]], ...),
    *token_key("pre", 7, ["default"], "x" * 2**20),
    *token_key("model", 7, ["gpt2"], "bert", "", ...),
    *token_key("add_bos_token", 1, "yes", [True]),
    *token_key("scores", ["0"] * VOCAB, [True] * VOCAB, [NAN] * VOCAB, [0.0], [], "x", ..., make=sentencepiece),
    *token_key("add_space_prefix", 1, "no", make=sentencepiece),
    Case("merges of a megabyte", tokenizer(merges=["a " + "x" * 2**20]), (*IN_FILE, "tokenizer.ggml.merges"), MERGE),
    Case("a token that is not UTF-8", renamed(5, b"\xff"), (*IN_FILE, "tokenizer.ggml.tokens", "UTF-8"), MERGE),
    Case("a token twice", renamed(5, TOKENS[6]), (*IN_FILE, "tokenizer.ggml.tokens", "twice"), MERGE),
    Case(
        "a template that is a list", metadata(tokenizer__chat_template=["{{ x }}"]), ("tokenizer.chat_template",), MERGE
    ),
    Case("a template that is a number", metadata(tokenizer__chat_template=7), ("tokenizer.chat_template",), MERGE),
    Case("an id that is a text, evaluated", tokenizer(eos_token_id="</s>"), ("eos_token_id",), EVALUATE),
    Case("tokens that are numbers, planned", tokenizer(tokens=[1] * VOCAB), ("tokenizer.ggml.tokens",), PLAN),
    Case("a first token with a colon", renamed(1, "<s>:0:1"), (), MERGE, 0, ("out",)),
    Case("a first token with a space", renamed(1, "begin here"), (), MERGE, 0, ("out",)),
    Case("a first token of money", renamed(1, "$A"), (), MERGE, 0, ("out",)),
    Case("a token of a megabyte", renamed(60, "x" * 2**20), (), MERGE, 0, ("out",)),
    Case(
        "a SentencePiece token of a megabyte",
        sentencepiece(tokens=[*TOKENS[:-1], "x" * 2**20]),
        (),
        MERGE,
        0,
        ("out",),
    ),
    Case("a file as it should be", file(), (), MERGE, 0, ("out",)),
    Case("a SentencePiece file as it should be", sentencepiece(), (), MERGE, 0, ("out",)),
]
CASES = HEADERS + TENSORS + SETTINGS + TOKENIZERS
