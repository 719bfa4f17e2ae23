"""The models' tokenizers: whether they are equal and, if not, which row of each model belongs to which token.

A folder's tokenizer is data: code that it brings along is never run, and nobody is asked whether to run it.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from evojax_merge.checkpoints.allowed_classes import check_folder
from evojax_merge.checkpoints.approximation import Key, Transplant, pieces_of, token_keys
from evojax_merge.checkpoints.folder import file_hash
from evojax_merge.checkpoints.json_files import read_json_object, shown
from evojax_merge.errors import InputError, library_errors
from evojax_merge.schema.approximation import Approximation
from evojax_merge.system.regular_file import check_regular, read_regular

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# Files that are no tokenizer by themselves.
BESIDE_TOKENIZER = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# The largest tokenizers in use have some 40 MB.
TOKENIZER_BYTES = 512 * 2**20
# Tokenizers take memory for every number below their largest, whether or not a token has it.
MOST_ROWS = 10_000_000
# Replacements one after the other multiply: forty of a letter by two make a terabyte of a letter.
MOST_GROWTH = 1000


# How a model is named: by its number among the merged models, or by its reference in a recipe.
ModelName = TypeVar("ModelName", int, str)


@dataclass(frozen=True)
class TokenRule(Generic[ModelName]):
    """The source of one token's row in models that lack it, or, with `force`, in all models.

    `model` None: zeros. `token`: another token of that model, or a row of it by number, in place of the same token.
    """

    model: ModelName | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerChoice:
    """The source of the merged model's tokens: model number `source`, all models, the base (the first model, without a
    base), or a folder that is none of the models'.

    `rules`: by token; a token that nobody has is added. `base`: number of the base model, None where there is none. The
    number of rows is rounded up to a multiple of `pad_to_multiple_of`. `approximation`: how a model's rows are made of
    tokens that it lacks; None: from other models' rows.
    """

    source: int | Path | Literal["union", "base"]
    base: int | None = None
    rules: Mapping[str, TokenRule[int]] = field(default_factory=dict)
    pad_to_multiple_of: int = 1
    approximation: Approximation | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The merged model's tokens, and the rows of embedding and head that belong to them.

    `rows[m]: int64[V]` is each token's row in model m, -1 where the model lacks the token; such a row is filled with
    the mean of the rows `fills[token id]`, pairs of model and row (zeros without pairs). `padding` more rows hold the
    mean of all rows. `tokenizer` is the merged model's; `copied`: the folder whose tokenizer it is, unchanged;
    `transplant`: how missing rows are approximated, in place of `fills`.
    """

    rows: tuple[np.ndarray, ...]
    fills: Mapping[int, tuple[tuple[int, int], ...]]
    padding: int
    tokenizer: Any
    copied: Path | None
    warnings: tuple[str, ...] = ()
    transplant: Transplant | None = None

    @property
    def size(self) -> int:
        return len(self.rows[0]) + self.padding


def load_tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer. Raises InputError where there is none, or where it cannot be loaded without the
    folder's code."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not has_tokenizer(folder):
        raise InputError(folder, "has no tokenizer (expected tokenizer.json or tokenizer.model)")
    _check_files(folder)
    check_folder(folder)
    code = _wanted_code(folder)
    if needs_code(folder):
        raise InputError(
            folder / "tokenizer_config.json",
            f"auto_map: {shown(code)} is custom code, which is never run; save the tokenizer once as a tokenizer.json",
        )
    # A tokenizer.json needs no code, whatever class wraps it.
    loader = AutoTokenizer if code is None else PreTrainedTokenizerFast
    with library_errors(folder, "its tokenizer cannot be loaded"):
        tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Some damaged tokenizers load all the same, and fail only in use.
        tokenizer("")
        numbers = tokenizer.get_vocab()
        parts = [
            getattr(getattr(tokenizer, "backend_tokenizer", None), name, None) for name in ("normalizer", "decoder")
        ]
        growth = max((_growth(json.loads(part.__getstate__())) for part in parts if part is not None), default=1.0)
    if growth > MOST_GROWTH:
        what = f"its tokenizer may make a text {growth:.3g} times as long; expected at most {MOST_GROWTH} times"
        raise InputError(folder, what)
    if max(numbers.values(), default=0) >= MOST_ROWS:
        last = max(numbers, key=numbers.__getitem__)
        what = f"its tokenizer gives {shown(last)} the number {numbers[last]:,}; expected less than {MOST_ROWS:,}"
        raise InputError(folder, what)
    return tokenizer


def _growth(part: Mapping[str, Any]) -> float:
    """How many times as long a normalizer or a decoder, as tokenizer.json has them, may make a text."""
    if part["type"] == "Sequence":
        return prod(map(_growth, part.get("normalizers") or part.get("decoders") or []))
    if part["type"] != "Replace":
        return 1.0
    # An expression may match a single letter, or none.
    return max(1.0, len(part["content"]) / max(1, len(part["pattern"].get("String", ""))))


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES if name not in BESIDE_TOKENIZER)


def _check_files(folder: Path) -> None:
    """Raises InputError unless the tokenizer's files are files of a likely size, and its settings JSON objects."""
    for name in TOKENIZER_FILES:
        file = folder / name
        if not file.exists():
            continue
        size = check_regular(file, "a tokenizer's")
        if size > TOKENIZER_BYTES:
            raise InputError(file, f"has {size:,} bytes; expected a tokenizer's of at most {TOKENIZER_BYTES:,}")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_json_object(folder / name, missing={})


def _wanted_code(folder: Path) -> Any:
    """The custom code that the tokenizer's config asks for, or None."""
    wanted = read_json_object(folder / "tokenizer_config.json", missing={}).get("auto_map")
    if isinstance(wanted, dict):
        wanted = wanted.get("AutoTokenizer")
    return wanted or None


def needs_code(folder: Path) -> bool:
    """Return whether a tokenizer cannot be loaded without its makers' code: a tokenizer.json needs none."""
    return _wanted_code(folder) is not None and not (folder / "tokenizer.json").exists()


def vocabulary_warnings(folders: Sequence[Path]) -> tuple[str, ...]:
    """A line for each folder whose tokenizer has other tokens in some rows than the first tokenizer: merged row by row,
    such a row is made of two tokens; and for each without a tokenizer, where others have one. A tokenizer that needs
    custom code is not loaded. Raises InputError where any other cannot be read."""
    distinct: dict[tuple[str, ...], Path] = {}
    for folder in filter(has_tokenizer, folders):
        _check_files(folder)
        # Equal files need no tokenizer loaded, and most families share theirs to the byte.
        distinct.setdefault(_fingerprint(folder), folder)
    if not distinct:
        return ()
    first, *others = distinct.values()
    bare = [folder for folder in folders if not has_tokenizer(folder)]
    warnings = [f"{folder}: has no tokenizer; its rows are taken for those of {first}" for folder in bare]
    coded = [folder for folder in distinct.values() if needs_code(folder)]
    if coded and others:
        # The tokens of custom code are unknown; only the files can be compared.
        what = f"{coded[0]}: its tokenizer is custom code, which is never run"
        warnings.append(f"{what}; its rows are taken for those of {others[0] if coded[0] == first else first}")
    if coded or not others:
        return tuple(warnings)
    expected = _tokens_of_rows(load_tokenizer(first))
    for folder in others:
        tokens = _tokens_of_rows(load_tokenizer(folder))
        differing = [row for row in sorted(tokens.keys() | expected.keys()) if tokens.get(row) != expected.get(row)]
        if differing:
            pairs = [
                f"row {row} is {_named(tokens.get(row))}, not {_named(expected.get(row))}" for row in differing[:3]
            ]
            more = f" and {len(differing) - 3:,} more" if len(differing) > 3 else ""
            warnings.append(
                f"{folder}: its tokenizer differs from that of {first} ({', '.join(pairs)}{more}); rows are merged by "
                "their number; say tokenizer_source: whose to take, so that they are aligned by token"
            )
    return tuple(warnings)


def count_differing_tokens(first: Path, folder: Path) -> int | None:
    """The number of rows that have other tokens in the tokenizers of two folders, or no token in one of them. None
    where the files differ and a tokenizer needs custom code, which is never run. Raises InputError where a tokenizer
    cannot be read."""
    for path in (first, folder):
        _check_files(path)
    if _fingerprint(first) == _fingerprint(folder):
        return 0
    if needs_code(first) or needs_code(folder):
        return None
    expected, tokens = (_tokens_of_rows(load_tokenizer(path)) for path in (first, folder))
    return sum(expected.get(row) != tokens.get(row) for row in expected.keys() | tokens.keys())


def chat_template(folder: Path) -> str | None:
    """A folder's default chat template, as transformers finds it: a file of its own, or a key of the tokenizer's
    config. None where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_regular(file, "a chat template", TOKENIZER_BYTES).decode(errors="replace")
    named = read_json_object(folder / "tokenizer_config.json", missing={}).get("chat_template")
    if isinstance(named, list):
        entries = [entry for entry in named if isinstance(entry, dict) and entry.get("name") == "default"]
        named = entries[-1].get("template") if entries else None
    return named if isinstance(named, str) and named else None


def _tokens_of_rows(tokenizer: Any) -> dict[int, str]:
    return {row: token for token, row in tokenizer.get_vocab().items()}


def _named(token: str | None) -> str:
    return "no token" if token is None else shown(token)


def _fingerprint(folder: Path) -> tuple[str, ...]:
    """The hashes of the files that assign rows to tokens."""
    whole = folder / "tokenizer.json"
    files = (
        [whole] if whole.exists() else [folder / name for name in TOKENIZER_FILES] + sorted(folder.glob("*.tiktoken"))
    )
    return tuple(file_hash(file) if file.is_file() else "" for file in files)


def unite(tokenizers: Sequence[Any], first: int, counts: Sequence[int]) -> Any:
    """A tokenizer with the tokens of all: tokenizer number `first`, with the others' further tokens added to it.

    The plain tokens of each model come in the order of its rows, then the added tokens of all: a token that one model
    has added stays an added token, even if it is plain in another. counts: the rows of each model; a token beyond them
    has no row and is left out.
    """
    import copy

    plain, added = dict[str, None](), dict[str, Any]()
    for i in (first, *(i for i in range(len(tokenizers)) if i != first)):
        own_added = dict(sorted(tokenizers[i].added_tokens_decoder.items()))
        contents = {token.content for token in own_added.values()}
        for row, token in sorted(_tokens_of_rows(tokenizers[i]).items()):
            if row < counts[i] and token not in contents:
                plain.setdefault(token)
        for row, token in own_added.items():
            if row < counts[i]:
                added.setdefault(token.content, token)
    united = copy.deepcopy(tokenizers[first])
    vocabulary = set(united.get_vocab())
    united.add_tokens([token for token in plain if token not in vocabulary and token not in added])
    united.add_tokens(list(added.values()))
    return united


def without_unused(tokenizer: Any, count: int) -> Any:
    """The tokenizer without the tokens that lie beyond `count` rows; the same object where there are no such tokens, or
    where it is no fast tokenizer."""
    import copy

    from tokenizers import Tokenizer

    if not tokenizer.is_fast or all(row < count for row in tokenizer.get_vocab().values()):
        return tokenizer
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < count]
    model = document["model"]
    tokens = model["vocab"]
    if isinstance(tokens, dict):
        model["vocab"] = {token: row for token, row in tokens.items() if row < count}
    else:
        model["vocab"] = tokens[:count]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        kept = [all(part in model["vocab"] for part in (*pair, "".join(pair))) for pair in pairs]
        model["merges"] = [merge for merge, keep in zip(model["merges"], kept, strict=True) if keep]
    stripped = copy.deepcopy(tokenizer)
    stripped._tokenizer = Tokenizer.from_str(json.dumps(document))
    return stripped


def align(folders: Sequence[Path], counts: Sequence[int], choice: TokenizerChoice) -> Vocabulary:
    """The merged model's vocabulary. counts: the rows that each model's embedding has.

    A token that a model lacks takes the base's row, else its only owner's, else the mean over those who have it.
    Raises InputError where the numbering has gaps, where a rule cannot be followed, and where a row cannot be
    approximated for want of common tokens.
    """
    if choice.approximation is not None:
        return _transplanted(folders, counts, choice, choice.approximation)
    first = choice.base if choice.base is not None else 0
    bare = [folder for i, folder in enumerate(folders) if i != first and not has_tokenizer(folder)]
    tokenizers = [load_tokenizer(folders[first] if folder in bare else folder) for folder in folders]
    owned = [
        {token: row for token, row in tokenizer.get_vocab().items() if row < count}
        for tokenizer, count in zip(tokenizers, counts, strict=True)
    ]
    if isinstance(choice.source, Path):
        folder, taken = choice.source, load_tokenizer(choice.source)
    else:
        source = choice.source if isinstance(choice.source, int) else first
        folder, taken = folders[source], tokenizers[source]
    tokenizer = taken
    if choice.source in ("union", "base", choice.base):
        # A token without a row even in the base is not one of the merged model's.
        tokenizer = without_unused(tokenizer, counts[first])
    if choice.source == "union":
        if tokenizer is not taken:
            # As it loads after saving: a special token that was removed from its vocabulary is still in its settings,
            # and comes back after all other tokens.
            with tempfile.TemporaryDirectory() as saved:
                tokenizer.save_pretrained(saved)
                tokenizer = load_tokenizer(Path(saved))
        tokenizer = unite([tokenizer if i == first else other for i, other in enumerate(tokenizers)], first, counts)
    unknown = [token for token in choice.rules if token not in tokenizer.get_vocab()]
    copied = folder if tokenizer is taken and not unknown else None
    if unknown:
        tokenizer.add_tokens(unknown)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if [row for _, row in tokens] != list(range(len(tokens))):
        raise InputError(folder, "its tokenizer leaves gaps in its numbering; rows cannot be aligned by token")
    rows = np.array([[vocabulary.get(token, -1) for token, _ in tokens] for vocabulary in owned], np.int64)
    fills: dict[int, tuple[tuple[int, int], ...]] = {}
    for number, (token, _) in enumerate(tokens):
        rule = choice.rules.get(token)
        if rule is not None and rule.force:
            rows[:, number] = -1
            fills[number] = _by_rule(folders, owned, counts, token, rule)
        elif (rows[:, number] < 0).any():
            owners = tuple((model, int(row)) for model, row in enumerate(rows[:, number]) if row >= 0)
            from_base = tuple(pair for pair in owners if pair[0] == choice.base)
            default = from_base or owners
            fills[number] = default if rule is None else _by_rule(folders, owned, counts, token, rule)
    warnings = [f"{folder}: has no tokenizer; its rows are taken for those of {folders[first]}" for folder in bare]
    named = [token for token, _ in tokens]
    nowhere = [token for number, token in enumerate(named) if fills.get(number) == () and token not in choice.rules]
    if nowhere:
        some = f"{', '.join(map(shown, nowhere[:3]))}{' …' if len(nowhere) > 3 else ''}"
        warnings.append(f"{folder}: no model has {len(nowhere):,} of its tokens ({some}); their rows are zero")
    padding = -len(tokens) % choice.pad_to_multiple_of
    return Vocabulary(tuple(rows), fills, padding, tokenizer, copied, tuple(warnings))


def _transplanted(
    folders: Sequence[Path], counts: Sequence[int], choice: TokenizerChoice, how: Approximation
) -> Vocabulary:
    """The vocabulary where each model approximates the tokens that it lacks."""
    assert isinstance(choice.source, int | Path)
    donor = folders[choice.source] if isinstance(choice.source, int) else choice.source
    tokenizer = load_tokenizer(donor)
    keys = token_keys(tokenizer)
    if sorted(keys) != list(range(len(keys))):
        raise InputError(donor, "its tokenizer leaves gaps in its numbering; rows cannot be aligned by token")
    rows, pieces, warnings = [], {}, []
    texts = sum(keys[number][0][0] == "text" for number in range(len(keys)))
    for model, (folder, count) in enumerate(zip(folders, counts, strict=True)):
        source = load_tokenizer(folder)
        owned: dict[Key, int] = {}
        # Among tokens of the same bytes a text comes before <0x41>.
        by_length = sorted(
            token_keys(source).items(), key=lambda item: (len(source.convert_ids_to_tokens(item[0])), item[0])
        )
        for row, own_keys in by_length:
            for key in own_keys if row < count else ():
                owned.setdefault(key, row)
        numbers = np.array(
            [next((owned[key] for key in keys[i] if key in owned), -1) for i in range(len(keys))], np.int64
        )
        if model == choice.source:
            numbers = np.where(np.arange(len(keys)) < count, np.arange(len(keys)), -1)
        missing = np.flatnonzero(numbers < 0)
        shared = sum(numbers[i] >= 0 for i in range(len(keys)) if keys[i][0][0] == "text")
        share = f"has {shared:,} of the {texts:,} tokens of {donor} ({shared / max(texts, 1):.1%})"
        if missing.size and not shared and how.needs_shared:
            raise InputError(
                folder, f"{share}; {how.approximate} needs tokens that both have: expected approximate: subword, or a "
                "donor that shares some",
            )  # fmt: skip
        if missing.size:
            warnings.append(f"{folder}: {share}; the rows of {missing.size:,} are made by {how.approximate}")
        if how.approximate == "subword":
            pieces[model] = pieces_of(source, [keys[int(number)][0] for number in missing])
        rows.append(numbers)
    transplant = Transplant(how, donor, pieces)
    padding = -len(keys) % choice.pad_to_multiple_of
    return Vocabulary(tuple(rows), {}, padding, tokenizer, donor, tuple(warnings), transplant)


def _by_rule(
    folders: Sequence[Path], owned: Sequence[Mapping[str, int]], counts: Sequence[int], token: str, rule: TokenRule[int]
) -> tuple[tuple[int, int], ...]:
    if rule.model is None:
        return ()
    folder, count = folders[rule.model], counts[rule.model]
    if isinstance(rule.token, int):
        if not 0 <= rule.token < count:
            raise InputError(folder, f"token {shown(token)}: there is no row {rule.token} (the embedding has {count})")
        return ((rule.model, rule.token),)
    wanted = token if rule.token is None else rule.token
    row = owned[rule.model].get(wanted, -1)
    if row < 0:
        raise InputError(folder, f"token {shown(token)}: it has no token {shown(wanted)}")
    return ((rule.model, row),)


def aligned_rows(vocabulary: Vocabulary, model: int, tensors: Mapping[int, np.ndarray]) -> np.ndarray:
    """Model `model`'s embedding or head `[V, …]` with its rows in the merged order.

    tensors: the model's tensor and those that `fills` refers to, by model number, in any float dtype.
    """
    tensor, rows = tensors[model], vocabulary.rows[model]
    missing = np.flatnonzero(rows < 0)
    if not missing.size and not vocabulary.padding:
        return tensor[rows]
    result = tensor[np.maximum(rows, 0)].astype(np.float32)
    for number in missing:
        parts = [np.asarray(tensors[donor][row], np.float32) for donor, row in vocabulary.fills[int(number)]]
        result[number] = np.mean(parts, axis=0) if parts else 0.0
    return padded_rows(vocabulary, result)


def padded_rows(vocabulary: Vocabulary, rows: np.ndarray) -> np.ndarray:
    """The rows of all tokens `[V, …]`, with the vocabulary's padding behind them."""
    if not vocabulary.padding:
        return rows
    return np.concatenate([rows, np.broadcast_to(rows.mean(axis=0), (vocabulary.padding, *rows.shape[1:]))])
