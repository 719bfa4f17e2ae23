"""Folders that torch's libraries open: what is checked before, and one mechanism for whatever a library raises."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.files import write_json

import evojax_merge
from evojax_merge.backends.torch.folders import differences
from evojax_merge.checkpoints.network_checks import check_counts, check_json, check_processor
from evojax_merge.errors import Failed, InputError, library_errors

PACKAGE = Path(evojax_merge.__file__).parent
# Methods and classes of other libraries that open a stranger's folder or file.
OPENERS = {"from_pretrained", "from_config", "from_dict", "load_lora_weights", "SentenceTransformer", "load_model"}
# The context managers that turn an error of theirs into one line.
GUARDS = {"library_errors", "_messages_of"}


def unguarded(tree: ast.AST, guarded: bool = False) -> Iterator[ast.Call]:
    """The calls of openers that stand in no guard. A lambda is called by the guard of its own function."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded
        if isinstance(node, ast.With):
            names = {getattr(item.context_expr.func, "id", "") for item in node.items
                     if isinstance(item.context_expr, ast.Call)}  # fmt: skip
            inside = guarded or bool(names & GUARDS)
        elif isinstance(node, ast.FunctionDef):
            inside = False
        elif isinstance(node, ast.Lambda):
            continue
        elif isinstance(node, ast.Call) and not guarded:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in OPENERS:
                yield node
        yield from unguarded(node, inside)


def test_whatever_opens_a_strangers_folder_is_guarded() -> None:
    calls = [
        f"{file.relative_to(PACKAGE)}: {ast.unparse(call)[:60]}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if "zoo" not in file.parts
        for call in unguarded(ast.parse(file.read_text()))
    ]
    assert calls == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a text"), AssertionError(), ZeroDivisionError("division by zero"), RecursionError("too deep"),
        MemoryError(), OverflowError("too large"), KeyError("key"), AttributeError("a\nb"), StopIteration(),
        BaseException("a panic of Rust"),
    ],
)  # fmt: skip
def test_whatever_a_library_raises_is_one_line(error: BaseException) -> None:
    with pytest.raises(InputError) as caught, library_errors("one/config.json", "cannot be opened"):
        raise error
    line = str(caught.value)
    assert line.startswith("one/config.json: cannot be opened (") and "\n" not in line
    assert type(error).__name__ in line or str(error).split()[0] in line


@pytest.mark.parametrize("error", [InputError("a", "b"), Failed("c"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_librarys_error_stays(error: BaseException) -> None:
    with pytest.raises(type(error)), library_errors("one", "cannot be opened"):
        raise error


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1,000,000"), ({"n_layer": -1}, "n_layer: -1"),
        ({"text_config": {"encoder_layers": 10**9}}, "text_config.encoder_layers"),
        ({"depths": [2, 10**5]}, "depths: 100,000"), ({"layers_per_block": 10**4}, "layers_per_block"),
        ({"num_experts": 10**5}, "num_experts"), ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"num_labels": 10**9}, "num_labels"), ({"num_train_timesteps": 0}, "num_train_timesteps: 0"),
        ({"patch_size": 0}, "patch_size: 0"), ({"image_size": [8, -8]}, "image_size: -8"),
        ({"hidden_size": 1e9}, "hidden_size"), ({"vocab_size": 10**12}, "vocab_size"),
        ({"block_out_channels": [4, 10**9]}, "block_out_channels"), ({"id2label": {"a": "b"}}, "id2label"),
        ({"id2label": [1]}, "id2label"), ({"num_hidden_layers": float("nan")}, "num_hidden_layers: nan"),
    ],
)  # fmt: skip
def test_impossible_numbers_of_a_config_are_named(tmp_path: Path, config: dict[str, Any], key: str) -> None:
    file = write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match=rf"config.json: {key}"):
        check_counts(file)


def test_usual_numbers_of_a_config_are_none_of_these(tmp_path: Path) -> None:
    usual = {
        "num_hidden_layers": 126, "vocab_size": 256_000, "max_position_embeddings": 2**20, "type_vocab_size": 0,
        "id2label": {"0": "a", "10": "b"}, "sliding_window": -1, "block_out_channels": [320, 1280], "depths": [3, 27],
        "num_key_value_heads": None, "eos_token_id": 10**12, "layers_per_block": 1_200, "rope_theta": 1e12,
    }  # fmt: skip
    check_counts(write_json(tmp_path / "config.json", usual), 1_500)
    pixels = {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}, "sampling_rate": 16_000, "n_fft": 400}
    write_json(tmp_path / "preprocessor_config.json", pixels)
    check_processor(tmp_path)
    check_processor(tmp_path / "missing")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"size": -1}, "size: -1"), ({"size": {"height": 0}}, "size.height: 0"), ({"crop_size": 10**6}, "crop_size"),
        ({"size": {"shortest_edge": 10**7}}, "size.shortest_edge"),
        ({"sampling_rate": "fast"}, "sampling_rate: 'fast'"),
        ({"sampling_rate": 0}, "sampling_rate: 0"), ({"sampling_rate": True}, "sampling_rate: True"),
        ({"feature_size": 10**9}, "feature_size"), ({"hop_length": 0}, "hop_length: 0"),
    ],
)  # fmt: skip
def test_impossible_settings_of_a_processor_are_named(tmp_path: Path, config: dict[str, Any], key: str) -> None:
    write_json(tmp_path / "preprocessor_config.json", config)
    with pytest.raises(InputError, match=rf"preprocessor_config.json: {key}"):
        check_processor(tmp_path)
    # transformers 5 reads the parts of the other file first.
    for part in ("image_processor", "feature_extractor"):
        write_json(tmp_path / "processor_config.json", {"processor_class": "CLIPProcessor", part: config})
        with pytest.raises(InputError, match=rf"/processor_config.json: (\w+\.)?{key}"):
            check_processor(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "{", '{"a": 1, "a": 2}', "[" * 99 + "]" * 99])
def test_json_that_a_library_would_fail_on_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(InputError, match=r"modules.json: "):
        check_json(tmp_path)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_another_way_to_prepare_images_is_named(tmp_path: Path, name: str) -> None:
    for folder, mean in (("first", 0.5), ("second", 0.5), ("third", 0.4)):
        (tmp_path / folder).mkdir()
        settings = {"image_mean": [mean] * 3}
        whole = {"image_processor": settings} if name == "processor_config.json" else settings
        write_json(tmp_path / folder / name, whole)
    (line,) = differences([tmp_path / "first", tmp_path / "second", tmp_path / "third"])
    assert "third: prepares images in another way" in line
