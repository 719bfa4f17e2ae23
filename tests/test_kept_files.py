"""Files of the user's cache: one that is damaged, another's, or something else is as good as missing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.sampling import sample

from evojax_merge.checkpoints import kept_hashes
from evojax_merge.evaluation import timings
from evojax_merge.report import page
from evojax_merge.system.kept_files import keep, read_kept

CONTENT = b"var vegaEmbed;\n" * 99


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": flipped,
    "empty, as a power failure leaves it": lambda file: file.write_bytes(b""),
    "its first half": lambda file: file.write_bytes(file.read_bytes()[: len(CONTENT) // 2]),
    "more than there was": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "no UTF-8": lambda file: file.write_bytes(bytes(range(256))),
    "another's, without a digest": lambda file: file.write_bytes(b"</script><script>alert(1)</script>"),
    "a folder": instead(Path.mkdir),
    "a pipe": instead(os.mkfifo),
    "a link that leads nowhere": instead(lambda file: file.symlink_to("nowhere")),
    "10 GB": lambda file: os.truncate(file, 10 * 2**30),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_as_good_as_missing(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "kept"
    assert read_kept(file, 2**20) is None
    keep(file, CONTENT)
    assert read_kept(file, 2**20) == CONTENT and read_kept(file, len(CONTENT) - 1) is None
    DAMAGES[damage](file)
    assert read_kept(file, 2**20) is None
    keep(file, CONTENT)
    assert damage.startswith("a ") or read_kept(file, 2**20) == CONTENT


def test_a_link_makes_way_for_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "kept").symlink_to("thesis")
    keep(tmp_path / "kept", CONTENT)
    assert read_kept(tmp_path / "kept", 2**20) == CONTENT and (tmp_path / "thesis").read_text() == "mine"


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    keep(tmp_path / "cache" / "kept", CONTENT)
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("damage", sample(["one bit", "no UTF-8", "another's, without a digest"], 1))
def test_pages_hold_the_script_that_was_kept_or_a_new_one(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page._vega.cache_clear()
    script = page._vega()
    (file,) = (tmp_path / "evojax-merge").iterdir()
    DAMAGES[damage](file)
    page._vega.cache_clear()
    assert page._vega() == script
    page._vega.cache_clear()


@pytest.mark.parametrize(
    "content",
    ['{"a": "b"}', '{"a": 1}', "[]", '{"a": "' + "0" * 63 + '"}', '{"a": "' + "0" * 64 + '\\n"}'],
)
def test_hashes_that_are_none_are_not_read(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "evojax-merge").mkdir()
    (tmp_path / "evojax-merge" / "hashes.json").write_text(content)
    assert kept_hashes._read() == {}


@pytest.mark.parametrize("change", [{"nbytes": 10**400}, {"factor": 1e308}, {"factor": 1e-300}])
def test_timings_beyond_all_machines_are_not_read(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timings.record_timings([timings.timing("scoring", 2.0, 10**6, "bench")])
    (kept,) = timings._read()
    assert timings._read() == [kept]
    (tmp_path / "evojax-merge" / "timings.json").write_text(
        timings.TypeAdapter(list[dict[str, object]]).dump_json([kept.model_dump() | change]).decode()
    )
    assert timings._read() == []
