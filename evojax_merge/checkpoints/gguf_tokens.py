"""A tokenizer as the metadata of a GGUF file: the inverse of what `gguf_file.write_tokenizer` reads."""

import json
from pathlib import Path
from typing import Any

from evojax_merge.checkpoints.gguf_file import SPECIAL_TOKENS, WHOLE_WORDS, import_gguf, word_splits
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.errors import InputError, library_errors, shown

# Splits of words are compared on a text in which all known splits differ.
PROBE = (
    "Hello WORLDFoo barBAZ don't WE'LL it's 1234567 v2.10  spaces   x\n\n  y\t/z\r\nñandú 日本語，。テスト "
    "<tag/> a_b--c!!\n?? \u0301e e\u0301 ٣٤٥ 12 3a4 'S /\n\n\n end  "
)
BYTES = {f"<0x{i:02X}>" for i in range(256)}


def tokenizer_metadata(folder: Path, rows: int) -> dict[str, Any]:
    """The metadata of the tokenizer in a folder. rows: the number of rows of the model's embedding. Raises InputError
    for a tokenizer that GGUF has no form for, and for more tokens than rows."""
    gguf, tokenizer = import_gguf(folder), load_tokenizer(folder)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = {} if backend is None else json.loads(backend.to_str())
    model = state.get("model", {})
    if model.get("type") != "BPE":
        what = f"its tokenizer is a {shown(model.get('type'))}"
        raise InputError(folder, f"{what}; a GGUF file takes byte-pair encodings (BPE)")
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= rows:
        raise InputError(
            folder, f"its tokenizer has {max(vocabulary.values()) + 1:,} tokens, and the embedding {rows:,} rows"
        )
    of_row = {i: token for token, i in vocabulary.items()}
    tokens = [of_row.get(i, f"[PAD{i}]") for i in range(rows)]
    in_bytes = bool(model.get("byte_fallback"))
    kinds = [gguf.TokenType.NORMAL if i in of_row else gguf.TokenType.UNUSED for i in range(rows)]
    for token in state.get("added_tokens", []):
        is_special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        kinds[token["id"]] = is_special
    if in_bytes:
        kinds = [gguf.TokenType.BYTE if token in BYTES else kind for token, kind in zip(tokens, kinds, strict=True)]
        unknown = vocabulary.get(model.get("unk_token") or "<unk>")
        if unknown is not None:
            kinds[unknown] = gguf.TokenType.UNKNOWN
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [int(k) for k in kinds]}
    if in_bytes:
        # SentencePiece merges the pair first that makes the token of the highest score.
        ranks = {token: -float(i) for i, token in enumerate(dict.fromkeys(a + b for a, b in pairs))}
        spaced = "".join(backend.encode("a", add_special_tokens=False).tokens).startswith("▁")
        metadata |= {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [ranks.get(token, -float(len(ranks)) if i in of_row else 0.0)
                                      for i, token in enumerate(tokens)],
            "tokenizer.ggml.add_space_prefix": spaced,
        }  # fmt: skip
    else:
        merges = [" ".join(pair) for pair in pairs]
        pre = _split_name(folder, backend, bool(model.get("ignore_merges")))
        metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    ids = {key: getattr(tokenizer, f"{name}_token_id") for name, key in SPECIAL_TOKENS.items()}
    metadata |= {f"tokenizer.ggml.{key}_token_id": number for key, number in ids.items() if number is not None}
    # Some tokenizers have no token for any letter.
    around = tokenizer("a")["input_ids"]
    metadata["tokenizer.ggml.add_bos_token"] = around[:1] == [ids["bos"]]
    metadata["tokenizer.ggml.add_eos_token"] = around[-1:] == [ids["eos"]]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return metadata | ({"tokenizer.chat_template": template} if template and isinstance(template, str) else {})


def _split_name(folder: Path, backend: Any, whole_words: bool) -> str:
    """llama.cpp's name of the way in which a tokenizer splits words. Raises InputError where no known way is it."""
    from tokenizers import pre_tokenizers

    splits = {name: steps for name, steps in word_splits().items() if (name in WHOLE_WORDS) == whole_words}
    with library_errors(folder, "its tokenizer splits no words"):
        words = backend.pre_tokenizer.pre_tokenize_str(PROBE)
    for name, steps in splits.items():
        if name != "default" and pre_tokenizers.Sequence(steps).pre_tokenize_str(PROBE) == words:
            return name
    raise InputError(
        folder, f"its tokenizer splits words as none of {', '.join(splits)} does; expected one of these: llama.cpp "
        "would find other tokens (its convert_hf_to_gguf.py knows more of them)",
    )  # fmt: skip
