"""Tokenizers of the parents: are they one, and if not, which row of each parent belongs to which token.

May import errors; imports transformers when a tokenizer is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evojax_merge.errors import InputError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def load_tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer. Raises InputError where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError(folder, "has no tokenizer (expected tokenizer.json or tokenizer.model)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(folder, f"its tokenizer cannot be loaded ({reason})") from None


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def check_same_vocabulary(folders: Sequence[Path]) -> None:
    """Raises InputError unless all folders that hold a tokenizer map the same tokens to the same rows."""
    reference: tuple[Path, dict[str, int]] | None = None
    texts: set[bytes] = set()
    for folder in folders:
        if not has_tokenizer(folder):
            continue
        file = folder / "tokenizer.json"
        if file.exists():
            # Equal files need no tokenizer loaded, and most families share theirs to the byte.
            content = file.read_bytes()
            if content in texts:
                continue
            texts.add(content)
        vocabulary = load_tokenizer(folder).get_vocab()
        if reference is None:
            reference = (folder, vocabulary)
        elif vocabulary != reference[1]:
            differing = sorted(set(vocabulary.items()) ^ set(reference[1].items()))
            raise InputError(
                folder,
                f"its tokenizer differs from that of {reference[0]} (first difference: token {differing[0][0]!r}); "
                "say tokenizer_source: whose to take, so that rows are aligned by token",
            )


def row_maps(folders: Sequence[Path], source: Path) -> list[np.ndarray]:
    """For each folder the rows `int64[V]` that hold the tokens `0 … V-1` of `source`'s tokenizer.

    Raises InputError where a parent lacks a token, or where the source leaves a gap in its numbering.
    """
    wanted = load_tokenizer(source).get_vocab()
    tokens = sorted(wanted, key=wanted.__getitem__)
    if [wanted[token] for token in tokens] != list(range(len(tokens))):
        raise InputError(source, "its tokenizer leaves gaps in its numbering; rows cannot be aligned by token")
    maps = []
    for folder in folders:
        own = load_tokenizer(folder).get_vocab()
        missing = [token for token in tokens if token not in own]
        if missing:
            raise InputError(
                folder,
                f"lacks {len(missing)} tokens of {source} (such as {missing[0]!r}); cannot align its rows",
            )
        maps.append(np.array([own[token] for token in tokens], np.int64))
    return maps
