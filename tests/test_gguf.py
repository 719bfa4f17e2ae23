"""GGUF files as models: what transformers reads from them, and what is refused."""

import io
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from helpers.commands import assert_refused, command, run_here
from helpers.files import read_json, write_json, write_yaml
from helpers.models import load_torch, random_model, state, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
)

from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.decoder_folder import decoder_of
from evojax_merge.checkpoints.derived import SOURCES, TENSORS, input_files, open_model, reference_to, resolve_model
from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.cli_parts import WRONG_INPUT
from evojax_merge.errors import InputError

VOCAB = 320
GEMMA = ("gemma", "gemma2", "gemma3")
# Mixtures of experts, by what transformers calls them; the architecture of Mixtral's files is that of Llama's.
MIXTURES = {"mixtral": "mixtral", "early mixtral": "mixtral", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
EXPERTS = 3
TEXT = "The quick brown fox jumps over 1234 lazy dogs, and the other foxes watch it. " * 8
KIND = gguf.GGMLQuantizationType


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|s|>", "<|e|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() <= VOCAB
    return tokenizer


def pairwise_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp keeps the rows of a Llama's query and key projections: row i of a head, and row
    i + D / 2, which Hugging Face rotates with it, side by side."""
    out = []
    for head in np.split(rows, heads):
        first, second = np.split(head, 2)
        for pair in zip(first, second, strict=True):
            out += pair
    return np.stack(out)


def write_gguf(
    path: Path,
    family: str,
    kind: Any = KIND.F32,
    change: Callable[[dict[str, Any]], None] = lambda metadata: None,
    without: str = "",
    tensors_per_part: int = 0,
) -> Any:
    """A GGUF file of a random model, by the package's writer, which leaves out the tensor `without` and splits the file
    into parts of so many tensors; the torch model, which is saved beside it as `written`."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": family in ("llama", *GEMMA),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1, **({"head_dim": 32} if family in ("qwen3", "qwen3moe", *GEMMA) else {}),
    }  # fmt: skip
    config = config_of(family, sizes)
    model, tokenizer = random_model(config), byte_level_tokenizer()
    model.save_pretrained(path.parent / "written")
    architecture = "llama" if "mixtral" in family else family.partition(",")[0]
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary += [f"<unused{i}>" for i in range(len(vocabulary), VOCAB)]
    metadata: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "rope.freq_base": 5000.0,
        "attention.key_length": getattr(config, "head_dim", None) or 16,
    }  # fmt: skip
    metadata |= own_metadata(family, config)
    if family.startswith("phi3"):
        del metadata["attention.key_length"]
    if family in ("gemma2", "gemma3"):
        metadata["attention.sliding_window"] = config.sliding_window
    if family == "gemma2":
        metadata |= {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}
    metadata = {f"{architecture}.{key}": value for key, value in metadata.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(tokenizer)],
        "tokenizer.ggml.token_type": [3, 3] + [1] * (VOCAB - 2), "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 1, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    change(metadata)
    writer = gguf.GGUFWriter(
        path, metadata.pop("general.architecture", architecture), split_max_tensors=tensors_per_part
    )
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, values in file_tensors(family, architecture, config, state(path.parent / "written")).items():
        used = kind_in_file(name, values, kind)
        if name == without:
            continue
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def kind_in_file(name: str, values: np.ndarray, kind: Any) -> Any:
    """How llama.cpp keeps a tensor in a file of this kind: routers and vectors in float32."""
    return KIND.F32 if values.ndim == 1 or "gate_inp" in name else kind


def file_tensors(family: str, architecture: str, config: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model's tensors as llama.cpp has them: their names, order of rows, offsets of norms; all experts together."""
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], 2)
    found: dict[str, np.ndarray] = {}
    for name, own in sorted(tensors.items()):
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            own = pairwise_rows(own, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if family in GEMMA and name.endswith("norm.weight"):
            own = own + 1
        if name.endswith("shared_expert_gate.weight"):
            own = own[0]
        whole, expert, part = name.partition(".experts.")
        number, _, part = part.partition(".")
        called = names.get_name(f"{whole}{expert}{part}" if expert else name, (".weight", ".bias"))
        if not expert:
            found[called] = own
        elif family == "early mixtral":
            found[called.replace("_exps", f".{number}")] = own
        else:
            before = found.get(called)
            found[called] = own[None] if before is None else np.concatenate([before, own[None]])
    if getattr(config, "rope_parameters", {}).get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = config.rope_parameters[f"{length}_factor"]
            found[f"rope_factors_{length}.weight"] = np.array(factors, np.float32)
    return found


def own_metadata(family: str, config: Any) -> dict[str, Any]:
    """What files of a mixture and of a Phi-3 say besides."""
    if family in MIXTURES:
        found = {"expert_count": EXPERTS, "expert_used_count": 2}
        if family.startswith("qwen"):
            found["expert_feed_forward_length"] = config.moe_intermediate_size
        if family == "qwen2moe":
            found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
        return found
    if not family.startswith("phi3"):
        return {}
    context, original = config.max_position_embeddings, config.original_max_position_embeddings
    found = {
        "rope.dimension_count": 12, "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }  # fmt: skip
    if config.rope_parameters["rope_type"] == "longrope":
        found["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(context / original) / math.log(original))
    return found


def config_of(family: str, sizes: dict[str, Any]) -> Any:
    if family in GEMMA:
        return gemma_config(family, sizes)
    if family in MIXTURES:
        key = "num_local_experts" if "mixtral" in family else "num_experts"
        widths = {} if "mixtral" in family else {"moe_intermediate_size": 32}
        widths |= {"shared_expert_intermediate_size": 96} if family == "qwen2moe" else {}
        norms = {"norm_topk_prob": False} if family == "qwen2moe" else {}
        return tiny_config(MIXTURES[family], **sizes, **widths, **norms, **{key: EXPERTS})
    if family.startswith("phi3"):
        rng, long = np.random.default_rng(0), family.endswith("long")
        factors = {f"{length}_factor": rng.uniform(1, 9, 6).tolist() for length in ("long", "short")}
        rope = sizes["rope_parameters"] | {"partial_rotary_factor": 0.75}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": 40, **factors} if long else {}
        return Phi3Config(
            **sizes | {"rope_parameters": rope}, max_position_embeddings=160, sliding_window=None if long else 33,
            original_max_position_embeddings=40,
        )  # fmt: skip
    return tiny_config(family, **sizes)


def gemma_config(family: str, sizes: dict[str, Any]) -> Any:
    if family == "gemma":
        return GemmaConfig(**sizes, max_position_embeddings=96)
    common = {**sizes, "sliding_window": 12, "query_pre_attn_scalar": 32, "max_position_embeddings": 96}
    if family == "gemma2":
        return Gemma2Config(**common, attn_logit_softcapping=40.0, final_logit_softcapping=20.0)
    local = {"rope_type": "default", "rope_theta": 10_000.0}
    ropes = {"full_attention": sizes["rope_parameters"], "sliding_attention": local}
    return Gemma3TextConfig(**common | {"rope_parameters": ropes})


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, list) else pair.split(" ") for pair in merges]


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *itertools.product(["llama", "qwen2", "qwen3", *GEMMA], [KIND.F32, KIND.BF16, KIND.Q8_0]),
        *itertools.product([*MIXTURES, "phi3", "phi3, long"], [KIND.BF16, KIND.Q8_0]),
    ],
)
def test_a_gguf_file_is_the_model_that_was_written(family: str, kind: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", family, kind)
    path = resolve_model("test", str(tmp_path / "tiny.gguf"), Path())
    sources, config = open_sources([path])
    expected, folder = state(tmp_path / "written"), sources.folders[0]
    assert set(folder.entries) == set(expected)
    for name, values in expected.items():
        is_router = name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight", "shared_expert_gate.weight"))
        own, used = folder.read(name), kind if values.ndim == 2 and not is_router else KIND.F32
        assert own.shape == values.shape
        assert own.dtype == (ml_dtypes.bfloat16 if used == KIND.BF16 else np.float32)
        # Rows are quantised one by one, so that their order does not matter.
        rounded = gguf.dequantize(gguf.quantize(values, used), used)
        # A Gemma's norms have lost what 1 is too large for.
        atol = 2**-23 if family in GEMMA and values.ndim == 1 else 0
        np.testing.assert_allclose(own.astype(np.float32), rounded, rtol=0, atol=atol, err_msg=name)
    # The config that was made of the file means the model that was written into it.
    assert config == decoder_config(tmp_path / "written" / "config.json")


@pytest.mark.parametrize("family", ["llama", "qwen2", *GEMMA[1:], "qwen2moe", "qwen3moe", "phi3"])
def test_transformers_reads_the_same_weights(family: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", family, KIND.Q8_0)
    # It does not read the widths of experts.
    own = {"config": AutoConfig.from_pretrained(tmp_path / "written")} if family in MIXTURES else {}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, **own)
    # What it has dequantised it would not write.
    theirs.hf_quantizer = None
    theirs.save_pretrained(tmp_path / "theirs")
    expected = decoder_of(open_folder(tmp_path / "theirs"))
    folder = open_model(resolve_model("test", str(tmp_path / "tiny.gguf"), Path()))
    assert set(folder.entries) == set(expected.entries)
    for name in folder.entries:
        np.testing.assert_array_equal(folder.read(name), expected.read(name), err_msg=name)


def test_a_split_model_is_read_by_its_first_part(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama", KIND.Q8_0)
    write_gguf(tmp_path / "tiny.gguf", "llama", KIND.Q8_0, tensors_per_part=8)
    parts = [tmp_path / f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    folder, whole = (resolve_model("test", str(tmp_path / name), Path()) for name in (parts[0].name, "tiny.gguf"))
    assert reference_to(folder) == str(parts[0]) and set(parts) <= input_files(folder)
    for name, tensor in open_model(whole).entries.items():
        np.testing.assert_array_equal(open_model(folder).read(name), tensor.read(), err_msg=name)
    shutil.copy(parts[0], parts[2])
    with pytest.raises(InputError, match=r"tiny-00003-of-00003\.gguf: holds the tensor '.+', which a part before it"):
        resolve_model("test", str(parts[0]), Path())
    parts[2].unlink()
    with pytest.raises(InputError, match=r"its part 'tiny-00003-of-00003\.gguf' is missing"):
        open_model(folder)
    for part in parts[:2]:
        with pytest.raises(InputError, match=r"split\.count: 3, of which . could be read; expected all in"):
            resolve_model("test", str(part), Path())


def test_its_tokenizer_is_the_one_that_the_file_was_written_with(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("test", str(tmp_path / "tiny.gguf"), Path()))
    for text in (TEXT, "1234 lazy dogs<|e|>", " 日本語"):
        ids = tokenizer(text)["input_ids"]
        # The file says that texts begin with a token.
        assert ids[0] == tokenizer.bos_token_id == 0
        assert ids[1:] == byte_level_tokenizer().encode(text).ids
        assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("pre", ["gpt-4o", "tekken", "llama-bpe", "deepseek-r1-qwen"])
def test_words_are_split_and_tokens_found_as_the_file_says(pre: str, tmp_path: Path) -> None:
    """As transformers splits them; words that are tokens of Llama 3 and Mistral need no merges, and their texts begin
    with a token where the file does not say so."""
    whole = pre in ("tekken", "llama-bpe")

    def edit(metadata: dict[str, Any]) -> None:
        metadata["tokenizer.ggml.pre"] = pre
        metadata["tokenizer.ggml.tokens"][-1] = "qqq"
        del metadata["tokenizer.ggml.add_bos_token"]

    write_gguf(tmp_path / "tiny.gguf", "llama", change=edit)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("test", str(tmp_path / "tiny.gguf"), Path()))
    for text in (TEXT, "theFOX jumps, dogWATCH/\n don't 123456 foxes/", "THEthe  lazy\n\nDOG's"):
        ids = tokenizer(text)["input_ids"]
        assert ids[: int(whole)] == [0] * whole
        assert ids[int(whole) :] == theirs(text, add_special_tokens=False)["input_ids"], text
    assert (len(tokenizer("qqq", add_special_tokens=False)["input_ids"]) == 1) == whole


def test_a_token_that_a_file_does_not_name_is_none_in_the_config(tmp_path: Path) -> None:
    """Phi-3's class pads with token 32,000, which smaller vocabularies lack: transformers would not load the model."""
    write_gguf(tmp_path / "tiny.gguf", "phi3", change=lambda keys: keys.pop("tokenizer.ggml.padding_token_id"))
    folder = resolve_model("test", str(tmp_path / "tiny.gguf"), Path())
    assert AutoConfig.from_pretrained(folder).pad_token_id is None


@pytest.mark.parametrize(("layers", "scale"), [(46, 64 // 4), (26, 32)])
def test_the_largest_gemma_scales_its_queries_otherwise(layers: int, scale: int, tmp_path: Path) -> None:
    from evojax_merge.checkpoints.gguf_file import read_gguf, write_config

    write_gguf(tmp_path / "tiny.gguf", "gemma2", change=change(gemma2__block_count=layers))
    write_config(read_gguf(tmp_path / "tiny.gguf"), tmp_path)
    assert Gemma2Config.from_pretrained(tmp_path).query_pre_attn_scalar == scale


@pytest.mark.parametrize("spaced", [True, False])
def test_a_sentencepiece_tokenizer_is_the_one_that_was_trained(spaced: bool, tmp_path: Path) -> None:
    """Like a Llama's, which puts a space before a text, and as a Gemma's, which does not."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, "watch the foxes, watch   the dogs", "lazy foxes jump over"] * 20),
        model_writer=trained, model_type="bpe", vocab_size=VOCAB, byte_fallback=True, hard_vocab_limit=False,
        add_dummy_prefix=spaced, remove_extra_whitespaces=False, normalization_rule_name="identity",
        user_defined_symbols=["<turn>"], minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    kinds = [
        gguf.TokenType.UNKNOWN if pieces.is_unknown(i) else gguf.TokenType.CONTROL if pieces.is_control(i)
        else gguf.TokenType.BYTE if pieces.is_byte(i)
        else gguf.TokenType.USER_DEFINED if pieces.id_to_piece(i) == "<turn>" else gguf.TokenType.NORMAL
        for i in range(len(pieces))
    ]  # fmt: skip
    unused = [f"<unused{i}>" for i in range(VOCAB - len(pieces))]
    changes = change(
        tokenizer__ggml__model="llama", tokenizer__ggml__tokens=[*map(pieces.id_to_piece, range(len(pieces))), *unused],
        tokenizer__ggml__scores=[*map(pieces.get_score, range(len(pieces))), *(-1000.0 for _ in unused)],
        tokenizer__ggml__token_type=[int(kind) for kind in kinds] + [5] * len(unused),
        tokenizer__ggml__bos_token_id=pieces.bos_id(), tokenizer__ggml__eos_token_id=pieces.eos_id(),
        tokenizer__ggml__unknown_token_id=pieces.unk_id(), tokenizer__ggml__add_space_prefix=spaced,
    )  # fmt: skip
    write_gguf(tmp_path / "tiny.gguf", "llama", change=changes)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("test", str(tmp_path / "tiny.gguf"), Path()))
    texts = (TEXT, "foxes  watch   1234\n\n\tdogs", "日本語 ★", "a<turn>lazy dog<turn>", "the ", "")
    # A first space of a text's own is, as in transformers' LlamaTokenizer, the one that is put before it.
    for text in (*texts, *(() if spaced else (" the",))):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == pieces.bos_id()
        assert ids[1:] == pieces.encode(text), text
        assert tokenizer.decode(ids[1:]) == pieces.decode(ids[1:]), text


def test_llama_3s_rope_scaling_is_read_from_its_factors(tmp_path: Path) -> None:
    """The factors are what transformers divides the frequencies by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from evojax_merge.models.families.llama_like_gguf import LLAMA3_ROPE, llama3_factors

    for factor in (8.0, 32.0):
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, **LLAMA3_ROPE}
        config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = 5e5 ** (-np.arange(0, 128, 2) / 128)
        np.testing.assert_allclose(plain / llama3_factors(rope, 128), scaled.numpy(), rtol=1e-5)


def test_a_gguf_file_is_merged_and_adapted_like_a_folder(tmp_path: Path) -> None:
    from test_adapters import adapter

    written = write_gguf(tmp_path / "one.gguf", "llama", KIND.Q8_0)
    written.save_pretrained(tmp_path / "two")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("one.gguf", "two")],
    }
    assert command("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "out") == 0
    merged, name = load_torch(tmp_path / "out").state_dict(), "model.layers.1.mlp.up_proj.weight"
    one = open_model(resolve_model("test", str(tmp_path / "one.gguf"), Path()))
    expected = (one.read(name) + written.state_dict()[name].numpy()) / 2
    np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-6, atol=1e-7)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").bos_token == "<|s|>"
    lora, _ = adapter(tmp_path / "two", tmp_path / "lora", target_modules=["up_proj"])
    adapted = open_model(resolve_model("test", f"{tmp_path / 'one.gguf'}+{lora}", Path()))
    assert not np.array_equal(adapted.read(name), one.read(name))
    np.testing.assert_array_equal(adapted.read("model.norm.weight"), one.read("model.norm.weight"))


def change(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({name.replace("__", "."): value for name, value in keys.items()})


def cut(path: Path, nbytes: int) -> None:
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - nbytes)


def rename_key(path: Path, key: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(key, b"x" * len(key), 1))


REFUSED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "an unknown architecture": (
        lambda path: write_gguf(path, "llama", change=change(general__architecture="starcoder2")),
        ("general.architecture", "starcoder2", "llama"),
    ),
    "the second part of three": (
        lambda path: (write_gguf(path, "llama", change=change(split__count=3)), rename_key(path, b"general.archit")),
        ("split.count: 3", "the first, which ends in -00001-of-0000N.gguf"),
    ),
    "a truncated tensor": (
        lambda path: (write_gguf(path, "llama"), cut(path, 100)), ("damaged or truncated",),
    ),
    "a truncated header": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + b"\1" * 40), ("damaged or truncated",)),
    "no gguf": (lambda path: path.write_bytes(b"text" * 100), ("not a GGUF file",)),
    "an empty file": (lambda path: path.write_bytes(b""), ("not a GGUF file",)),
    "experts that it does not have": (
        lambda path: write_gguf(path, "llama", change=change(llama__expert_count=8, llama__expert_used_count=2)),
        ("has no tensor blk.0.ffn_gate_inp.weight",),
    ),
    "experts of an architecture without": (
        lambda path: write_gguf(path, "qwen2", change=change(qwen2__expert_count=8)), ("qwen2.expert_count",),
    ),
    "more experts than it has": (
        lambda path: write_gguf(path, "qwen3moe", change=change(qwen3moe__expert_count=4)),
        ("ffn_gate_inp.weight has shape [3, 64]", "qwen3moe.expert_count", "[4, 64]"),
    ),
    "half of LongRoPE": (
        lambda path: write_gguf(path, "phi3, long", without="rope_factors_short.weight"),
        ("has no tensor rope_factors_short.weight",),
    ),
    "more layers than it has": (
        lambda path: write_gguf(path, "llama", change=change(llama__block_count=3)), ("has no tensor blk.2.",),
    ),
    "fewer layers than it has": (
        lambda path: write_gguf(path, "llama", change=change(llama__block_count=1)), ("blk.1.", "does not have"),
    ),
    "another kind of number": (
        lambda path: write_gguf(path, "llama", change=change(llama__block_count="two")), ("llama.block_count", "'two'"),
    ),
    "an unknown tokenizer": (
        lambda path: write_gguf(path, "llama", change=change(tokenizer__ggml__model="rwkv")), ("ggml.model", "rwkv"),
    ),
    "an unknown way to split words": (
        lambda path: write_gguf(path, "llama", change=change(tokenizer__ggml__pre="tekken2")), ("ggml.pre", "tekken2"),
    ),
    "a rope scaling that is not known": (
        lambda path: write_gguf(path, "llama", change=change(llama__rope__scaling__type="longrope")), ("longrope",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, says = REFUSED[case]
    make(tmp_path / "tiny.gguf")
    recipe = {"merge_method": "linear", "models": [{"model": "tiny.gguf", "parameters": {"weight": 1.0}}]}
    assert_refused(("tiny.gguf", *says), "merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def replace_with_link(folder: Path) -> None:
    kept = folder.with_name("moved")
    shutil.rmtree(kept, ignore_errors=True)
    folder.rename(kept)
    folder.symlink_to(kept)


def replace_with_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


TAMPERED: dict[str, Callable[[Path], Any]] = {
    "another config": lambda folder: edit_json(folder / "config.json", rope_parameters={"rope_theta": 7.0}),
    "a tensor elsewhere": lambda folder: edit_json(folder / TENSORS, **{"model.norm.weight": {"start": 0}}),
    "other sources": lambda folder: edit_json(folder / SOURCES, paths=["/etc/passwd"]),
    "sources of another kind": lambda folder: edit_json(folder / SOURCES, kind=["gguf"]),
    "no sources": lambda folder: (folder / SOURCES).unlink(),
    "sources that are no JSON": lambda folder: (folder / SOURCES).write_text("{"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "half a tokenizer": lambda folder: cut(folder / "tokenizer.json", 100),
    "a file more": lambda folder: (folder / "added_tokens.json").write_text("{}"),
    "a link for a file": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("x")),
    "a file for the folder": replace_with_file,
    "a link for the folder": replace_with_link,
}


def edit_json(file: Path, **changes: Any) -> None:
    write_json(file, read_json(file) | changes)


@pytest.mark.parametrize("case", TAMPERED)
def test_what_is_cached_of_a_file_is_made_again_where_it_is_another(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", "llama")
    folder = resolve_model("test", str(tmp_path / "tiny.gguf"), Path())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    TAMPERED[case](folder)
    assert resolve_model("test", str(tmp_path / "tiny.gguf"), Path()) == folder
    assert not folder.is_symlink()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_messages_name_the_users_file_and_no_file_of_the_cache(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Errors of whatever looks at the folder that stands for the file, and warnings; of no great length."""
    tokens = ["x" * 2**20, "a", "b", "ab", *(f"t{i}" for i in range(VOCAB - 4))]
    changes = change(tokenizer__ggml__tokens=tokens, tokenizer__ggml__merges=["a b"])
    write_gguf(tmp_path / "tiny.gguf", "llama", change=changes)
    written = tmp_path / "written"
    byte_level = resolve_model("test", str(tmp_path / "tiny.gguf"), Path())
    with pytest.raises(InputError, match=r"tiny\.gguf: odd$") as caught:
        raise InputError(byte_level / "config.json", "odd")
    assert "evojax-merge/models" not in str(caught.value)
    # Another tokenizer, and then another number of layers.
    PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer()).save_pretrained(written)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("written", "tiny.gguf")],
    }
    write_yaml(tmp_path / "recipe.yaml", recipe)
    text = run_here("merge", tmp_path / "recipe.yaml", tmp_path / "out").stderr
    assert f"{tmp_path / 'tiny.gguf'}: its tokenizer differs" in text and len(text) < 2000
    random_model(tiny_config("llama")).save_pretrained(tmp_path / "narrow")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe).replace("written", "narrow"))
    assert command("merge", tmp_path / "recipe.yaml", tmp_path / "other") == WRONG_INPUT
    text += capfd.readouterr().err
    assert "tiny.gguf" in text.splitlines()[-1] and "evojax-merge/models" not in text


def test_an_adapter_of_a_gguf_file_is_named_by_its_own_parts(tmp_path: Path) -> None:
    from test_adapters import adapter

    write_gguf(tmp_path / "tiny.gguf", "llama").save_pretrained(tmp_path / "two")
    lora, _ = adapter(tmp_path / "two", tmp_path / "lora", target_modules=["up_proj"])
    for base, config in (("tiny.gguf", "tiny.gguf"), ("two", "two/config.json")):
        folder = resolve_model("test", f"{tmp_path / base}+{lora}", Path())
        assert str(InputError(folder / "config.json", "odd")) == f"{tmp_path / config}: odd"
        assert str(InputError("recipe.yaml", f"see {folder}")) == f"recipe.yaml: see {tmp_path / base}+{lora}"
        # A link that leads elsewhere is not followed.
        target = (folder / "config.json").readlink()
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
        assert resolve_model("test", f"{tmp_path / base}+{lora}", Path()) == folder
        assert (folder / "config.json").readlink() == target
