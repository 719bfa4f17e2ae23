"""Data under version control: files of an Oxen repository at a commit, and files that DVC or Git LFS track.

`oxen:REPOSITORY@COMMIT:FILE` is a file as a commit of a local repository has it. The repository's working tree stays as
it is: the file is restored into the user's cache. A file that DVC tracks must be the one that its `.dvc` file records,
and a pointer of Git LFS is no data.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from evojax_merge.errors import InputError, name_in_messages, without_secrets
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.system.data_packages import cache_folder
from evojax_merge.system.file_system import atomic_file, make_folder
from evojax_merge.system.regular_file import check_no_pointer, open_regular, read_regular
from evojax_merge.tasks.records import MAX_BYTES

OXEN = "oxen:"
OXEN_FORM = "oxen:REPOSITORY@COMMIT:FILE"
# A commit's id, and the fewest characters of one that may stand for it.
COMMIT, SHORTEST_ID = re.compile("[0-9a-f]{32}"), 6
# The end of the name of a file in which DVC records another one, and of a hash that is one of a folder.
DVC_SUFFIX, FOLDER_SUFFIX = ".dvc", ".dir"

# The most bytes of a list that DVC keeps of a folder.
MAX_LIST = 2**26

# The references, with full paths and commits, of files that were restored into the cache.
_references: dict[Path, str] = {}


def pinned_reference(file: str) -> str:
    """The reference of a data file in a run's config: that in an Oxen repository, with its commit, or else the path."""
    return _references.get(Path(file), file)


# ---------------------------------------------------------------------------------------------------------------
# Oxen


def oxen_file(where: str, reference: str, relative_to: Path) -> Path:
    """The file of an `oxen:` reference, in the user's cache. Raises InputError for a reference of another form, for a
    file, commit or repository that does not exist, and where the package oxenai is missing."""
    match = re.fullmatch(rf"{OXEN}(.+)@([^@:]+):([^:]+)", reference)
    if match is None:
        raise InputError(where, f"{reference}: expected {OXEN_FORM}")
    named, revision, name = match.groups()
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise InputError(where, f"{reference}: {name} lies outside of the repository; expected a path inside of it")
    folders = (Path(os.path.expanduser(named)), relative_to / named)
    repository = next((folder.resolve() for folder in folders if (folder / ".oxen").is_dir()), None)
    if repository is None:
        raise InputError(where, f"{reference}: {named} is no Oxen repository; expected a folder with .oxen in it")
    cache = cache_folder() / "oxen" / hashlib.sha256(str(repository).encode()).hexdigest()[:16]
    commit = revision if COMMIT.fullmatch(revision) and (cache / revision / inside).is_file() else None
    if commit is None:
        try:
            import oxen
        except ImportError:
            what = f"{reference}: needs the package oxenai; pip install 'evojax-merge[oxen]'"
            raise InputError(where, what) from None
        # An empty working tree of the repository, which vanishes afterwards.
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder).resolve()
            (tree / ".oxen").symlink_to(repository / ".oxen")
            try:
                repo = oxen.Repo(str(tree))
                commit = _commit(repo, revision)
                if commit is None:
                    what = f"{repository} has no commit or branch {revision}; `oxen log` lists its commits"
                    raise InputError(where, f"{reference}: {what}")
                if not (cache / commit / inside).is_file():
                    repo.restore(str(tree / inside), source=commit)
                    if not (tree / inside).is_file():
                        raise InputError(where, f"{reference}: {inside} is no file at the commit {commit}")
                    make_folder((cache / commit / inside).parent)
                    with atomic_file(cache / commit / inside) as work:
                        shutil.copyfile(tree / inside, work)
            except InputError:
                raise
            except Exception as error:
                reason = " ".join(without_secrets(str(error)).split())[:200] or type(error).__name__
                what = f"Oxen did not give it out of {repository} ({reason})"
                raise InputError(where, f"{reference}: {what}") from None
    file = cache / commit / inside
    _references[file] = f"{OXEN}{repository}@{commit}:{inside}"
    name_in_messages(file, _references[file])
    return file


def _commit(repo: Any, revision: str) -> str | None:
    """The id of a branch's last commit, or of the commit whose id begins with a revision; None where there is none."""
    heads = {branch.name: branch.commit_id for branch in repo.branches()}
    if revision in heads:
        return str(heads[revision])
    # The log is that of the current branch. A whole id may be of any branch.
    ids = {str(commit.id) for commit in repo.log()} | set(map(str, heads.values()))
    matches = [commit for commit in ids if commit.startswith(revision)]
    if len(matches) == 1 and len(revision) >= SHORTEST_ID:
        return matches[0]
    return revision if COMMIT.fullmatch(revision) else None


# ---------------------------------------------------------------------------------------------------------------
# DVC


def dvc_record(file: Path) -> Path | None:
    """The `.dvc` file that records a file, or a folder that it lies in; None where DVC does not track the file."""
    for tracked in (file, *file.parents[:-1]):
        record = tracked.with_name(f"{tracked.name}{DVC_SUFFIX}")
        if record.is_file():
            return record
        # Above its root a repository tracks nothing.
        if tracked != file and (tracked / ".dvc").is_dir():
            break
    return None


def check_data_file(where: str, file: Path) -> None:
    """Raises InputError for a pointer of Git LFS in place of data, and for a file other than DVC recorded."""
    if not file.is_file():
        return
    check_no_pointer(file)
    record = dvc_record(file)
    expected = None if record is None else _recorded_md5(record, file)
    if expected is None or (file.suffix != ".npz" and file.stat().st_size > MAX_BYTES):
        # The size is refused where the file is read.
        return
    with open_regular(file, "a data file") as handle:
        digests = [hashlib.file_digest(handle, "md5").hexdigest()]
        if handle.tell() <= MAX_BYTES:
            handle.seek(0)
            # Versions of DVC before 3 recorded the MD5 of the text with line feeds alone.
            digests.append(hashlib.md5(handle.read().replace(b"\r\n", b"\n")).hexdigest())
    if expected not in digests:
        raise InputError(
            where,
            f"{file} is not the file that {record} records (md5 {expected}); run `dvc checkout {record}` for that one, "
            "or `dvc add` to record the file as it is",
        )


def _recorded_md5(record: Path, file: Path) -> str | None:
    """The MD5 that a `.dvc` file records for a file; None: none, or DVC's cache lacks the list of the folder."""
    document = load_yaml(record)
    outs = document.get("outs") if isinstance(document, dict) else None
    tracked = record.with_name(record.name.removesuffix(DVC_SUFFIX))
    listed = outs if isinstance(outs, list) else []
    out = next((out for out in listed if isinstance(out, dict) and out.get("path") == tracked.name), None)
    md5 = None if out is None else out.get("md5")
    if not isinstance(md5, str):
        return None
    if not md5.endswith(FOLDER_SUFFIX):
        return md5 if tracked == file else None
    # The cache holds the list of the folder's files under the folder's hash, which becomes a path.
    root = next((above for above in tracked.parents if (above / ".dvc").is_dir()), None)
    if root is None or not re.fullmatch(r"[0-9a-f]{32}\.dir", md5):
        return None
    name = PurePosixPath(md5[:2]) / md5[2:]
    lists = [root / ".dvc" / "cache" / place / name for place in ("files/md5", "")]
    try:
        listed_files = read_regular(next(path for path in lists if path.is_file()), "DVC's list of a folder", MAX_LIST)
        entries = json.loads(listed_files)
        inside = file.relative_to(tracked).as_posix()
        return next((str(entry["md5"]) for entry in entries if entry["relpath"] == inside), None)
    except (StopIteration, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
