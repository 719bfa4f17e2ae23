"""Models in object stores and on web servers: fetched once, whole or not at all, and every failure one line."""

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers.commands import command, refusal
from helpers.families import Family, build_family
from helpers.files import read_json, write_yaml
from helpers.models import tiny_config
from helpers.searches import search_config
from test_devices import CHOICE

import evojax_merge as em
from evojax_merge.checkpoints import remote
from evojax_merge.checkpoints.derived import SOURCES, open_model, sources_of
from evojax_merge.checkpoints.gguf_file import TENSORS
from evojax_merge.checkpoints.headers import HeaderFolders
from evojax_merge.checkpoints.remote import FILES, cached, fetched
from evojax_merge.errors import InputError
from evojax_merge.system.data_packages import cache_folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return build_family(tmp_path_factory.mktemp("family"), tiny_config())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PROTOCOLS", remote.PROTOCOLS | {"memory": "fsspec"})
    return tmp_path / "cache"


class Server(SimpleHTTPRequestHandler):
    """Serves files, forbids those below `private/`, and cuts those below `short/`; counts what it was asked for."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/private/"):
            self.send_error(403)
            return
        if self.path.startswith("/short/") and self.path.endswith(".safetensors"):
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:1000])
            return
        super().do_GET()

    def do_HEAD(self) -> None:
        if self.path.startswith("/private/"):
            self.send_error(403)
            return
        super().do_HEAD()


@pytest.fixture(scope="module")
def server(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("server")
    for name in ("models", "private", "short"):
        shutil.copytree(family.root, root / name)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(root))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def stored(family: Family, name: str, address: str) -> str:
    """A model of the family in fsspec's store of this process's memory."""
    import fsspec

    store = fsspec.filesystem("memory")
    for file in (family.root / name).iterdir():
        store.pipe_file(f"{address.removeprefix('memory:/')}/{file.name}", file.read_bytes())
    return address


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_model_in_a_store_is_fetched_once_with_its_hashes(family: Family) -> None:
    address = stored(family, "parent0", "memory://bucket/models/parent0")
    assert cached(address) is None
    model = fetched("parents[0]", address)
    assert model.name == "parent0" and contents(model) == contents(family.root / "parent0")
    files = read_json(model.parent / FILES)["files"]
    content = (model / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    stored(family, "parent1", address)
    assert fetched("parents[0]", address) == cached(address) == model
    assert contents(model) == contents(family.root / "parent0")
    # A file that is gone, or cut, is fetched again, with all others.
    (model / "model.safetensors").write_bytes(content[:100])
    assert contents(fetched("parents[0]", address + "/")) == contents(family.root / "parent1")


def test_a_search_takes_models_by_address(family: Family, server: str, tmp_path: Path) -> None:
    document = search_config(family, tasks=[CHOICE], search={"population": 4, "generations": 1})
    document |= {"base": f"{server}/models/base", "parents": [f"{server}/models/parent{i}" for i in (0, 1)]}
    config = write_yaml(family.root / "remote.yaml", document)
    assert command("plan", config) == 0
    # Headers alone.
    assert not any(cached(f"{server}/models/{name}") for name in ("base", "parent0", "parent1"))
    assert command("search", config, "--out", tmp_path / "run") == 0
    run = em.open_run(tmp_path / "run")
    assert run.recipe["base_model"] == f"{server}/models/base"
    assert contents(cached(f"{server}/models/base") or Path()) == contents(family.root / "base")
    Server.asked.clear()
    assert command("merge", tmp_path / "run/best/recipe.yaml", tmp_path / "again") == 0
    assert Server.asked == []
    winner = tmp_path / "run/best/model/model.safetensors"
    assert (tmp_path / "again/model.safetensors").read_bytes() == winner.read_bytes()


def test_a_header_that_describes_no_tensor_is_named(family: Family, tmp_path: Path) -> None:
    import fsspec

    address = stored(family, "parent0", "memory://bucket/odd/parent0")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2]}}).encode()
    content = len(header).to_bytes(8, "little") + header
    fsspec.filesystem("memory").pipe_file("/bucket/odd/parent0/model.safetensors", content)
    with pytest.raises(
        InputError, match=r"model\.safetensors: 'weight': expected a tensor's dtype, shape and data_off"
    ):
        HeaderFolders(tmp_path).resolve("base", address, tmp_path)


def test_a_store_names_no_weights_of_the_user(family: Family, tmp_path: Path) -> None:
    """A folder of a store is no folder that this program made, whatever files it has."""
    import fsspec

    (tmp_path / "mine").write_bytes(b"mine" * 2**14)
    tensor = {"dtype": "float32", "shape": [64, 48], "kind": 0, "start": 0, "stop": 12288, "heads": 0, "offset": 0.0}
    files = {
        SOURCES: {"kind": "gguf", "paths": [str(tmp_path / "mine")]}, TENSORS: {"model.embed_tokens.weight": tensor},
    }  # fmt: skip
    address = stored(family, "parent0", "memory://bucket/lying/parent0")
    for name, content in files.items():
        fsspec.filesystem("memory").pipe_file(f"/bucket/lying/parent0/{name}", json.dumps(content).encode())
    model = fetched("parents[0]", address)
    assert (model / SOURCES).exists() and sources_of(model).paths == (str(model),)
    assert open_model(model).files == [model / "model.safetensors"]


@pytest.mark.parametrize(
    "entry", [{"data_offsets": [0, 2**62]}, {"data_offsets": [9, 0]}, {"data_offsets": [0, 10**400]}, {"shape": [-1]}]
)
def test_a_header_that_lies_about_sizes_is_named(entry: dict[str, Any], family: Family, tmp_path: Path) -> None:
    import fsspec

    address = stored(family, "parent0", "memory://bucket/sizes/parent0")
    row = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    header = json.dumps({"weight": row}).encode()
    content = len(header).to_bytes(8, "little") + header
    fsspec.filesystem("memory").pipe_file("/bucket/sizes/parent0/model.safetensors", content)
    with pytest.raises(
        InputError, match=r"model\.safetensors: 'weight': expected a tensor's dtype, shape and data_off"
    ):
        HeaderFolders(tmp_path).resolve("base", address, tmp_path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("models/none", "there is nothing of that name"),
        ("private/base", "this machine has no right to read it"),
        ("short/base", "model.safetensors could not be fetched|model.safetensors was cut short"),
        ("models/base?token=abc", "expected a plain address"),
        ("models/../base", "expected a plain address"),
        ("models/weights.bin", "may be a pickle"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(place: str, message: str, server: str, cache: Path) -> None:
    with pytest.raises(InputError, match=message) as raised:
        fetched("parents[0]", f"{server}/{place}")
    assert str(raised.value).startswith("parents[0]: ") and "\n" not in str(raised.value)
    assert "abc" not in str(raised.value)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_store_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fsspec

    def missing(*arguments: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    err = refusal("inspect", "s3://bucket/model")
    assert "s3://bucket/model: needs the package s3fs; pip install 'evojax-merge[remote]'" in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Access Denied"), "this machine has no right to read it"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate"), "this machine has no right to read it"),
        (ConnectionRefusedError("refused"), "no network reaches it: "),
        (OSError("Service Unavailable\nsecond"), "Service Unavailable"),
    ],
)
def test_errors_of_a_store_are_one_line(
    error: Exception, message: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    address = stored(family, "base", "memory://bucket/failing")

    def failing(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "find", failing)
    with pytest.raises(InputError, match=message) as raised:
        fetched("base", address)
    assert "\n" not in str(raised.value)


def test_a_fetch_that_ends_early_leaves_nothing(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    address = stored(family, "base", "memory://bucket/cut")

    def cut(self: Any, path: str, to: str, **options: Any) -> None:
        Path(to).write_bytes(self.cat_file(path)[:10])

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    with pytest.raises(InputError, match=r"cut short: 10 of [0-9,]+ bytes came; run the command again"):
        fetched("base", address)
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
