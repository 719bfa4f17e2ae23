"""GGUF files that are written: the merge itself when they are read again, by this program and by others."""

import io
import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from helpers.commands import refusal, run_here
from helpers.families import build_family
from helpers.files import write_yaml
from helpers.models import load_torch, random_model, save, state, tiny_config
from helpers.searches import search_config
from safetensors.torch import load_file, save_file
from test_gguf import GEMMA, KIND, TEXT, VOCAB, byte_level_tokenizer, config_of, file_tensors, write_gguf
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

import evojax_merge as em
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.derived import open_model, resolve_model
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.system.file_system import NEW

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *GEMMA, "mixtral", "qwen2moe", "qwen3moe", "phi3", "phi3, long")


def sizes_of(family: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": family in ("llama", *GEMMA),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1, **({"head_dim": 32} if family in ("qwen3", "qwen3moe", *GEMMA) else {}),
    }  # fmt: skip


def model_folder(family: str, folder: Path, **changes: Any) -> Path:
    """A random model with a byte-level tokenizer, as transformers saves it."""
    config = config_of(family, sizes_of(family) | changes)
    random_model(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token="<|s|>", eos_token="<|e|>", pad_token="<|e|>",
        chat_template="{{ messages[0]['content'] }}",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def merged(folder: Path, out: Path, *options: object, dtype: str = "float32", **recipe: Any) -> str:
    models = [{"model": str(folder), "parameters": {"weight": 1.0}}]
    document = {"merge_method": "linear", "models": models, "dtype": dtype} | recipe
    path = write_yaml(out.with_suffix(".yaml"), document)
    done = run_here("merge", path, out, *options)
    return done.stdout + done.stderr


def read_again(file: Path) -> tuple[dict[str, np.ndarray], Any]:
    path = resolve_model("test", str(file), Path())
    folder = open_model(path)
    return {name: np.array(folder.read(name)) for name in folder.entries}, open_sources([path])[1]


@pytest.mark.parametrize(("family", "kind"), [
    *itertools.product(FAMILIES, ["f32", "bf16", "q8_0"]), *itertools.product(["llama", "mixtral"], ["f16", "q4_0"]),
])  # fmt: skip
def test_a_written_file_is_the_model_to_the_bit(family: str, kind: str, tmp_path: Path) -> None:
    """Ours out, ours in; of quantised types to the format's rounding; and gguf's own reader finds the tensors that
    llama.cpp's converter would have written."""
    folder = model_folder(family, tmp_path / "model")
    out = tmp_path / "out.gguf"
    said = merged(folder, out, "--type", kind)
    expected, used = state(folder), KIND[kind.upper()]
    found, config = read_again(out)
    assert set(found) == set(expected)
    head = "lm_head.weight" if "lm_head.weight" in expected else "model.embed_tokens.weight"
    for name, values in expected.items():
        is_router = name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight", "shared_expert_gate.weight"))
        stored = used if values.ndim == 2 and not is_router else KIND.F32
        stored = KIND.Q8_0 if kind == "q4_0" and name == head else stored
        rounded = gguf.dequantize(gguf.quantize(values, stored), stored)
        # A Gemma's norms have lost what 1 is too large for.
        atol = 2**-23 if family in GEMMA and values.ndim == 1 else 0
        np.testing.assert_allclose(found[name].astype(np.float32), rounded, rtol=0, atol=atol, err_msg=name)
    source = decoder_config(folder / "config.json")
    # A Mistral's file says that it is a Llama's, which has no windows; here they are longer than all texts.
    other = {"architecture": "", "windows": ()} if family == "mistral" else {}
    assert vars(config) | other == vars(source) | other
    assert "sliding window" not in said
    # The second reader.
    reader = gguf.GGUFReader(out)
    name = {"mistral": "llama", "mixtral": "llama", "phi3, long": "phi3"}.get(family, family)
    torch_config = config_of(family, sizes_of(family))
    theirs = file_tensors(family, name, torch_config, expected)
    assert {tensor.name for tensor in reader.tensors} == set(theirs)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        wanted = gguf.dequantize(gguf.quantize(theirs[tensor.name], tensor.tensor_type), tensor.tensor_type)
        np.testing.assert_array_equal(values.reshape(wanted.shape), wanted, err_msg=tensor.name)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == name and fields["general.name"] == "out"
    assert fields[f"{name}.context_length"] == torch_config.max_position_embeddings
    assert fields["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert fields["evojax_merge.card"].startswith("---\n") and "merge_method: linear" in fields["evojax_merge.recipe"]
    assert ("which is the head, is q8_0" in said) == (kind == "q4_0")


def test_the_tokenizer_finds_the_same_tokens(tmp_path: Path) -> None:
    folder = model_folder("llama", tmp_path / "model")
    merged(folder, tmp_path / "out.gguf")
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(resolve_model("test", str(tmp_path / "out.gguf"), Path()))
    for text in (TEXT, "1234 lazy dogs<|e|>", " 日本語 don't\n\n x"):
        assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)


SENTENCES = [TEXT, "watch the foxes, watch   the dogs", "lazy foxes jump over"]


@pytest.mark.parametrize("spaced", [True, False])
def test_sentencepiece_tokens_are_the_same(spaced: bool, tmp_path: Path) -> None:
    """Like a Llama's, which puts a space before a text, and as a Gemma's, which does not."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=trained, model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, hard_vocab_limit=False, add_dummy_prefix=spaced, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=["<turn>"], minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    scores = {token: pieces.get_score(i) for token, i in vocabulary.items()}
    folder = model_folder("llama", tmp_path / "model", vocab_size=len(pieces))
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=generate_merges(vocabulary, scores), add_prefix_space=spaced, add_bos_token=True
    )
    tokenizer.add_tokens(["<turn>"])
    tokenizer.save_pretrained(folder)
    merged(folder, tmp_path / "out.gguf")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", spaced)
    kinds = fields["tokenizer.ggml.token_type"]
    names = {"<unk>": "UNKNOWN", "<s>": "CONTROL", "<0x41>": "BYTE", "<turn>": "USER_DEFINED"}
    assert {token: gguf.TokenType(kinds[vocabulary[token]]).name for token in names} == names
    after = AutoTokenizer.from_pretrained(resolve_model("test", str(tmp_path / "out.gguf"), Path()))
    for text in (*SENTENCES, "<turn>the fox, 12 日本"):
        ids = after(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] and ids[0] == tokenizer.bos_token_id, text
        assert text not in SENTENCES or ids[1:] == pieces.encode(text), text


def test_the_base_of_a_merge_of_files_keeps_its_metadata(tmp_path: Path) -> None:
    """Metadata of the first file's tokens, and keys that nobody reads here, stay; its name, type and parts go."""

    def more(metadata: dict[str, Any]) -> None:
        metadata |= {
            "general.name": "the base", "general.languages": ["en", "de"], "general.license": "mit",
            "general.repo_url": "https://x", "tokenizer.ggml.pre": "dbrx", "llama.own.key": 2.5,
            "quantize.imatrix.file": "x", "tokenizer.ggml.eot_token_id": 1, "general.file_type": 7,
        }  # fmt: skip

    write_gguf(tmp_path / "first.gguf", "llama", KIND.Q8_0, change=more)
    (tmp_path / "b").mkdir()
    write_gguf(tmp_path / "b" / "second.gguf", "llama", KIND.Q8_0)
    models = [
        {"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("first.gguf", "b/second.gguf")
    ]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    run_here("merge", write_yaml(tmp_path / "r.yaml", recipe), tmp_path / "out.gguf")
    before, after = (
        {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / name).fields.items()}
        for name in ("first.gguf", "out.gguf")
    )
    changed = {"general.name": "out", "general.file_type": 32}
    for key, value in before.items():
        if key in ("general.repo_url", "quantize.imatrix.file"):
            assert key not in after
        elif not key.startswith("GGUF."):
            assert after[key] == changed.get(key, value), key
    types = [
        {key: field.types for key, field in gguf.GGUFReader(tmp_path / name).fields.items()}
        for name in ("first.gguf", "out.gguf")
    ]
    assert all(types[1][key] == kind for key, kind in types[0].items() if key in types[1])


def test_rows_that_blocks_do_not_divide_are_said(tmp_path: Path) -> None:
    folder = model_folder("llama", tmp_path / "model", intermediate_size=80)
    said = merged(folder, tmp_path / "out.gguf", "--type", "q8_0").replace("\n", " ")
    assert "q8_0 has blocks of 32 values, which do not divide the rows of blk.0.ffn_down.weight" in said
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.1.ffn_down.weight"] == "F16" and kinds["blk.1.ffn_up.weight"] == "Q8_0"


def test_scalings_of_rope_are_written(tmp_path: Path) -> None:
    """Llama 3's factors in a tensor, the others in the metadata; a scaling that files cannot express is refused."""
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for number, rope in enumerate((
        {"rope_type": "llama3", "factor": 32.0, **llama3},
        {"rope_type": "llama3", "factor": 5.3, **llama3, "original_max_position_embeddings": 4096},
        {"rope_type": "llama3", "factor": 4.0, **llama3, "original_max_position_embeddings": 2**17, "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 128},
    )):  # fmt: skip
        folder = model_folder("llama", tmp_path / f"{number}", rope_parameters={"rope_theta": 5000.0, **rope})
        merged(folder, tmp_path / f"{number}.gguf")
        assert read_again(tmp_path / f"{number}.gguf")[1] == decoder_config(folder / "config.json")
    for rope in (
        {"rope_type": "llama3", "factor": 8.0, **llama3, "low_freq_factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
    ):
        folder = tmp_path / rope["rope_type"]
        model_folder("llama", folder, rope_parameters={"rope_theta": 5000.0, **rope})
        line = refusal("merge", linear(folder, tmp_path), tmp_path / "out.gguf")
        assert "GGUF" in line or "rope" in line
        assert not (tmp_path / "out.gguf").exists()


def linear(folder: Path, root: Path) -> Path:
    models = [{"model": str(folder), "parameters": {"weight": 1.0}}]
    return write_yaml(root / "linear.yaml", {"merge_method": "linear", "models": models})


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    folder, out = model_folder("llama", tmp_path / "model"), tmp_path / "out.gguf"
    recipe = linear(folder, tmp_path)
    words = save(random_model(tiny_config("llama")), tmp_path / "words")
    neox = AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    save(neox, tmp_path / "neox")
    odd = model_folder("llama", tmp_path / "odd")
    tokenizer = Tokenizer.from_file(str(odd / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(odd / "tokenizer.json"))
    without_tokens = (
        "its tokenizer is a 'WordLevel'; a GGUF file takes byte-pair encodings (BPE): evojax-merge merge "
        f"{tmp_path / 'linear.yaml'} {out} --type f32 --no-copy-tokenizer writes the file without tokens"
    )
    for command, says in (
        ((recipe, out, "--type", "q4_k_m"), "llama-quantize OUT.gguf OUT-q4_k_m.gguf Q4_K_M"),
        ((recipe, out, "--type", "nonsense"), "--type: 'nonsense'"),
        ((recipe, tmp_path / "folder", "--type", "q8_0"), "is for GGUF files"),
        ((linear(words, tmp_path), out), without_tokens),
        ((write_yaml(tmp_path / "neox.yaml", linear_of(tmp_path / "neox")), out), "gpt_neox"),
        ((write_yaml(tmp_path / "odd.yaml", linear_of(odd)), out), "splits words as none of"),
    ):
        if command[0].name == "linear.yaml":
            linear(words if "Word" in says else folder, tmp_path)
        line = refusal("merge", *command)
        assert says in line and NEW not in line, line
        assert sorted(path.name for path in tmp_path.glob("*.gguf")) == []
    # Without tokens it can be written.
    run_here("merge", linear(words, tmp_path), out, "--no-copy-tokenizer")
    assert "tokenizer.ggml.tokens" not in gguf.GGUFReader(out).fields


def linear_of(folder: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}]}


def test_a_file_of_another_program_is_never_replaced(tmp_path: Path) -> None:
    folder, out = model_folder("llama", tmp_path / "model"), tmp_path / "out.gguf"
    write_gguf(out, "llama")
    before = out.read_bytes()
    line = refusal("merge", linear(folder, tmp_path), out, "--overwrite")
    assert "is no GGUF file of evojax-merge" in line and out.read_bytes() == before
    out.unlink()
    merged(folder, out)
    written = out.read_bytes()
    assert "pass --overwrite" in refusal("merge", linear(folder, tmp_path), out)
    (tmp_path / f".out.gguf{NEW}0123abcd").write_bytes(b"half")
    merged(folder, out, "--overwrite")
    assert out.read_bytes() == written
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_value_beyond_the_range_of_f16_is_no_infinity(tmp_path: Path) -> None:
    folder = model_folder("llama", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = refusal("merge", linear(folder, tmp_path), tmp_path / "out.gguf", "--type", "f16")
    assert "blk.0.ffn_up.weight has values beyond its range" in line and not (tmp_path / "out.gguf").exists()


def test_a_winner_is_exported_as_it_was_scored(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96}
    family = build_family(tmp_path / "family", tiny_config(tie_word_embeddings=True, **sizes))
    for folder in (family.base, *family.parents):
        PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|e|>").save_pretrained(folder)
    config = write_yaml(tmp_path / "config.yaml", search_config(family))
    run_here("search", config, "--out", tmp_path / "run")
    out = tmp_path / "winner.gguf"
    run_here("export", tmp_path / "run", out)
    found, expected = read_again(out)[0], state(tmp_path / "run" / "best" / "model")
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    run_here("export", tmp_path / "run", out, "--type", "q8_0", "--overwrite")
    scores = em.evaluate([tmp_path / "run" / "best" / "model", out], config)
    assert abs(scores[0]["fitness"] - scores[1]["fitness"]) < 0.05
    run_here("export", tmp_path / "run", tmp_path / "split", "--shard-size", "20K")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    assert em.merge(linear(family.base, tmp_path), tmp_path / "py.gguf", type="q4_0").exists()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3, long"])
def test_llama_cpp_continues_texts_as_transformers_does(family: str, tmp_path: Path) -> None:
    """Greedy text of ten prompts, and their tokens. (llama.cpp chooses LongRoPE's factors by the context it reserves,
    transformers by the text's length.)"""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    folder = model_folder(family, tmp_path / "model")
    merged(folder, tmp_path / "out.gguf")
    model, tokenizer = load_torch(folder), AutoTokenizer.from_pretrained(folder)
    theirs = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=256, verbose=False, n_threads=1, logits_all=True)
    texts = [
        "The quick brown fox",
        "1234 lazy dogs",
        "don't jump",
        "日本語",
        "Fox! Over?\n\n  dogs",
        " a b c",
        "quick quick",
    ]
    for text in (*texts, "watch it 99", "<|s|>lazy", "and the other foxes watch it."):
        ids = tokenizer(text)["input_ids"]
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ids
        theirs.reset()
        theirs.eval(ids)
        for _ in range(12):
            with torch.no_grad():
                expected = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            assert int(np.argmax(theirs.scores[theirs.n_tokens - 1])) == expected
            ids = [*ids, expected]
            theirs.eval([expected])
