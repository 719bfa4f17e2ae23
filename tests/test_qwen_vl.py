"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with their images: M-RoPE, features inside of the decoder, and whole searches."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.commands import command, run_here
from helpers.files import edit_json, read_json, write_yaml
from helpers.models import save, words
from helpers.sampling import sample, thorough
from helpers.searches import seeing_search
from hostile import start_command
from reference.vision_models import (
    PLACEHOLDERS,
    SEEING,
    load_seeing,
    save_seeing,
    seeing_logprobs,
    seeing_model,
    seeing_text,
    write_images,
)
from safetensors.numpy import load_file, save_file
from test_vision import NEW, SHARED, SPACES, _own_cache, heldout_score, score, write_family, write_tasks
from transformers import AutoConfig, AutoModelForCausalLM

from evojax_merge.backends.decoder.vision import seeing_tokenizer, vision_of
from evojax_merge.checkpoints.config_file import read_decoder_config
from evojax_merge.checkpoints.decoder_folder import decoder_of
from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.errors import InputError
from evojax_merge.models.architecture import architecture_of
from evojax_merge.models.images import Grid, GridPositions
from evojax_merge.models.layers import SequenceLayout
from evojax_merge.tasks.images import RecordImage

__all__ = ["_own_cache"]
QWEN = [kind for kind in SEEING if kind.startswith("qwen")]
TESTS = Path(__file__).parent


# ---------------------------------------------------------------------------------------------------------------
# Positions

GRIDS = [Grid(2, 3), Grid(1, 1), Grid(4, 2), Grid(3, 1)]


def row_of(*parts: int | None) -> list[int]:
    """Tokens: a number is that of an image, None a token of a text."""
    first = np.cumsum([0, *(grid.height * grid.width for grid in GRIDS)])
    tokens: list[int] = []
    for part in parts:
        tokens += [5] if part is None else [~row for row in range(first[part], first[part + 1])]
    return tokens


def expected_places(tokens: list[int], *images: int) -> np.ndarray:
    """int[T, 3]: the positions of a row by transformers."""
    model = seeing_model("qwen2_vl").model
    kinds = torch.tensor([[int(token < 0) for token in tokens]])
    merged = model.config.vision_config.spatial_merge_size
    grids = [[1, GRIDS[i].height * merged, GRIDS[i].width * merged] for i in images]
    places, delta = model.get_rope_index(kinds, kinds, torch.tensor(grids))
    shift = GridPositions.of(GRIDS).shift(np.array(tokens))
    assert shift == -int(delta)
    return np.asarray(places[:, 0].T)


def test_positions_are_transformers() -> None:
    """The rows have unlike lengths, behind a shared prefix; segments follow a beginning with an image."""
    table = GridPositions.of(GRIDS)
    before, shared = row_of(None, 0, None), row_of(None, 3, None)
    segments = [row_of(None, 1, None, 2, None), row_of(None), row_of(2, None, None)]
    images = [(0, 3, 1, 2), (0, 3), (0, 3, 2)]
    packed = [shared + [token for segment in segments for token in segment] + [0, 0]]
    ids = [0] * len(shared) + [i + 1 for i, segment in enumerate(segments) for _ in segment] + [-1, -1]
    positions = list(range(len(before), len(before) + len(shared)))
    for segment in segments:
        positions += range(len(before) + len(shared), len(before) + len(shared) + len(segment))
    arrays = [np.array(row, np.int32) for row in (packed, [[*positions, 0, 0]], [ids])]
    (places,) = table.places(*arrays, np.array(before, np.int32))
    begin = len(shared)
    for number, (segment, of_images) in enumerate(zip(segments, images, strict=True), start=1):
        expected = expected_places(before + shared + segment, *of_images)[len(before) :]
        np.testing.assert_array_equal(places[: len(shared)], expected[: len(shared)], err_msg=str(number))
        np.testing.assert_array_equal(
            places[begin : begin + len(segment)], expected[len(shared) :], err_msg=str(number)
        )
        begin += len(segment)


@pytest.mark.parametrize("kind", QWEN)
def test_tables_are_transformers(kind: str) -> None:
    model, rng = seeing_model(kind), np.random.default_rng(0)
    config = read_decoder_config("config.json", model.config.text_config.to_dict())
    places = rng.integers(0, 50, (2, 7, 3))
    rotary = model.model.language_model.rotary_emb
    expected = rotary(torch.zeros(1), torch.tensor(places).permute(2, 0, 1))
    layout = SequenceLayout(jnp.zeros((2, 7), jnp.int32), jnp.zeros((2, 7), jnp.int32), places=jnp.asarray(places))
    for ours, table in zip(architecture_of(config).position_tables(config, layout), expected, strict=True):
        np.testing.assert_allclose(ours, table[..., : ours.shape[-1]], atol=1e-5)


def test_sections_that_are_not_those_of_the_head(tmp_path: Path) -> None:
    settings = seeing_model("qwen2_5_vl").config.text_config.to_dict()
    settings["rope_parameters"]["mrope_section"] = [1, 1, 3]
    with pytest.raises(InputError, match=r"mrope_section: \[1, 1, 3\]; expected 4 frequencies together"):
        read_decoder_config("config.json", settings)
    settings["rope_parameters"]["mrope_section"] = [1, 3]
    with pytest.raises(InputError, match=r"rope_parameters.mrope_section: \[1, 3\]; expected null or three whole"):
        read_decoder_config("config.json", settings)


# ---------------------------------------------------------------------------------------------------------------
# Scores


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


def test_a_beginning_with_an_image_is_shared(root: Path) -> None:
    """It has fewer positions than tokens, so that those of all rows behind it are moved."""
    tasks = [{"kind": "likelihood", "file": "shared.jsonl"},
             {"kind": "generation", "file": "shared.jsonl", "max_new_tokens": NEW}]  # fmt: skip
    scores, _ = score(root / "one", *tasks)
    model, processor = load_seeing(root / "one")
    for number, prompt in enumerate(SHARED):
        prompt = prompt.replace("<image>", PLACEHOLDERS["qwen3_vl"])
        expected = seeing_logprobs(model, processor, prompt, [root / "0.png"], f"w{20 + number}")
        assert scores.matrices["task0"]["log_probability"][0, number] == pytest.approx(expected.mean(), abs=1e-4)
        assert scores.outputs["task1"][0][number] == seeing_text(model, processor, prompt, [root / "0.png"], NEW)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_plan_counts_what_a_search_loads(kind: str, tmp_path: Path) -> None:
    """The features in front of the decoder, those inside of it, and no other bytes."""
    folder = save_seeing(seeing_model(kind), tmp_path / "model", 0)
    decoder = decoder_of(open_folder(folder))
    tokenizer = seeing_tokenizer(load_tokenizer(folder), decoder)
    for file in write_images(tmp_path):
        image = RecordImage(str(file), hashlib.sha256(file.read_bytes()).hexdigest(), file, None)
        tokenizer.expand_images(str(file), tokenizer.placeholder, [image])
    vision = vision_of(tokenizer, [decoder])
    assert vision is not None
    planned = vision.abstract_table(32, "bfloat16", jax.ShapeDtypeStruct)
    loaded = vision.table(None, "bfloat16", jnp.asarray)
    assert planned is not None and loaded is not None
    for name in ("features", "deepstack"):
        expected, ours = getattr(planned, name), getattr(loaded, name)
        assert (expected is None) == (ours is None) == (kind != "qwen3_vl" and name == "deepstack")
        assert ours is None or (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    assert loaded.positions is not None and len(loaded.positions.spared) == len(loaded.features)


@thorough
def test_files_as_the_hub_has_them(tmp_path: Path) -> None:
    """Qwen2.5-VL's config.json has no text_config there, and its tensors other names."""
    save_seeing(seeing_model("qwen2_5_vl"), tmp_path / "model", 0, 0.05)
    write_tasks(tmp_path, PLACEHOLDERS["qwen2_5_vl"])
    expected = heldout_score(tmp_path / "model", tmp_path)

    def flat(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        del text["rope_parameters"], text["model_type"]
        config |= text | {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}

    edit_json(tmp_path / "model/config.json", flat)
    tensors = load_file(tmp_path / "model/model.safetensors")
    as_on_the_hub = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): values
        for name, values in tensors.items()
    }
    save_file(as_on_the_hub, tmp_path / "model/model.safetensors", {"format": "pt"})
    scores, _ = score(tmp_path / "model", {"kind": "likelihood", "file": "tasks.jsonl"})
    assert scores.matrices["task0"]["log_probability"].mean() == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Searches


def search_config(root: Path, tmp_path: Path, space: str, **more: Any) -> Path:
    return write_yaml(tmp_path / "search.yaml", seeing_search(root, space, SPACES[space]) | more)


def heldout_scores(run: Path) -> dict[str, float]:
    """The scores of the held-out table: of the winner, the base and the parents, by their names."""
    table = read_json(run / "result.json")["table"]
    rows = [row for row in table if row["role"] in ("winner", "base", "parent")]
    names = [row["role"] if row["role"] != "parent" else row["name"].split("/")[-1] for row in rows]
    return dict(zip(names, (next(iter(row["heldout_scores"].values())) for row in rows), strict=True))


def score_alone(folder: Path, root: Path) -> float:
    """The score of a folder on `tasks.jsonl` by transformers, in a process without this package."""
    program = [sys.executable, TESTS / "reference/vision_scores.py", folder, root / "tasks.jsonl"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@thorough
@pytest.mark.parametrize("space", SPACES)
def test_a_search_exports_what_it_scored(space: str, root: Path, tmp_path: Path) -> None:
    config = search_config(root, tmp_path, space)
    assert command("search", config, "--out", tmp_path / "run") == 0
    for name, scored in heldout_scores(tmp_path / "run").items():
        folder = tmp_path / "run/best/model" if name == "winner" else root / name
        expected = score_alone(folder, root) if name == "winner" else heldout_score(folder, root)
        assert scored == pytest.approx(expected, abs=1e-4), name


@thorough
def test_a_killed_search_ends_in_the_same_bytes(root: Path, tmp_path: Path) -> None:
    config = search_config(root, tmp_path, "merges", search={"generations": 4, "population": 4})
    assert command("search", config, "--out", tmp_path / "whole/run") == 0
    out = tmp_path / "killed/run"
    process = start_command("search", config, "--out", out, environment=[("XDG_CACHE_HOME", str(tmp_path))])
    while not (out / "history.jsonl").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    assert command("search", config, "--out", out, "--resume") == 0
    for name in ("history.jsonl", "result.json", "best/recipe.yaml", "best/model/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole/run" / name).read_bytes(), name


# The larger model -> its text model.
TEXT_MODELS = {"qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}


def save_text_model(kind: str, folder: Path, seed: int, **changes: Any) -> None:
    """A text model of a larger model's layers, whose tokenizer lacks the token of images."""
    tokens = [token for token in words() if token != "w60"]
    settings = seeing_model(kind).config.text_config.to_dict()
    rope = {name: settings["rope_parameters"][name] for name in ("rope_type", "rope_theta")}
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps",
    )  # fmt: skip
    shapes = {name: settings[name] for name in names} | {"head_dim": 8, "vocab_size": len(tokens)}
    if "rope_theta" in changes:
        rope |= {"rope_theta": changes.pop("rope_theta")}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(TEXT_MODELS[kind], **shapes | {"rope_parameters": rope} | changes)
    save(AutoModelForCausalLM.from_config(config).float(), folder, tokens)


@pytest.mark.parametrize("kind", sample(TEXT_MODELS, 1))
def test_a_text_model_merges_into_the_decoder(kind: str, tmp_path: Path) -> None:
    root = write_family(tmp_path, kind)
    for name, seed in (("text", 1), ("japanese", 2)):
        save_text_model(kind, tmp_path / name, seed)
    sees = str(root / "one")
    merged = {"base": str(root / "text"), "parents": [sees, str(root / "japanese")], "tokenizer_source": sees}
    config = search_config(root, tmp_path, "merges", **merged)
    assert command("search", config, "--out", tmp_path / "run") == 0
    scored, out = heldout_scores(tmp_path / "run"), tmp_path / "run/best/model"
    assert scored["winner"] == pytest.approx(heldout_score(out, root), abs=1e-4)
    assert read_json(out / "config.json")["model_type"] == kind
    # A text model among the parents is scored as the decoder of the model that sees: with its rows, and its places.
    recipe = {
        "models": [{"model": str(root / "japanese"), "parameters": {"weight": 1.0}},
                   {"model": sees, "parameters": {"weight": 0.0}}],
        "merge_method": "linear", "other_modules": sees, "tokenizer_source": sees,
    }  # fmt: skip
    assert command("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "alone") == 0
    assert scored["japanese"] == pytest.approx(heldout_score(tmp_path / "alone", root), abs=1e-4)


def test_a_text_model_whose_layers_differ(root: Path, tmp_path: Path) -> None:
    save_text_model("qwen3_vl", tmp_path / "text", 0, intermediate_size=48)
    sees = str(root / "one")
    merged = {"base": str(tmp_path / "text"), "parents": [sees], "tokenizer_source": sees}
    message = " ".join(run_here("plan", search_config(root, tmp_path, "merges", **merged), status=2).stderr.split())
    assert "mlp" in message and "48" in message and "40" in message and message.count("evojax-merge") <= 1, message


@thorough
def test_a_text_model_of_another_base_frequency(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The frequencies of the model that sees win, and one line says so."""
    for name, seed in (("text", 1), ("japanese", 2)):
        save_text_model("qwen3_vl", tmp_path / name, seed, rope_theta=5e5)
    sees = str(root / "one")
    merged = {"base": str(tmp_path / "text"), "parents": [sees, str(tmp_path / "japanese")], "tokenizer_source": sees}
    config = search_config(root, tmp_path, "gradient", **merged)
    assert command("search", config, "--out", tmp_path / "run") == 0
    lines = " ".join("".join(capsys.readouterr()).split())
    note = f"rope.theta is 500000.0, and 10000.0 in {sees}; merges have the latter, and all models are scored with it"
    assert f"{tmp_path / 'text'}, {tmp_path / 'japanese'}: {note}" in lines and lines.count("rope.theta") == 1
    scored, out = heldout_scores(tmp_path / "run"), tmp_path / "run/best/model"
    settings = read_json(out / "config.json")["text_config"]["rope_parameters"]
    assert settings["rope_theta"] == 1e4
    assert scored["winner"] == pytest.approx(heldout_score(out, root), abs=1e-4)


def test_experts_are_read_in_either_orientation(tmp_path: Path) -> None:
    """The first files of Qwen3-VL-MoE hold experts as `[experts, in, out]`."""
    folder = save_seeing(seeing_model("qwen3_vl_moe"), tmp_path / "model", 0, 0.05)
    write_tasks(tmp_path, PLACEHOLDERS["qwen3_vl_moe"])
    task = {"kind": "likelihood", "file": "shared.jsonl"}
    scores, _ = score(folder, task)
    tensors = load_file(folder / "model.safetensors")
    exchanged = {
        name: np.ascontiguousarray(values.swapaxes(1, 2)) if ".experts." in name else values
        for name, values in tensors.items()
    }
    assert any((exchanged[name].shape != tensors[name].shape) for name in tensors)
    save_file(exchanged, folder / "model.safetensors", {"format": "pt"})
    again, _ = score(folder, task)
    np.testing.assert_array_equal(*(part.matrices["task0"]["log_probability"] for part in (scores, again)))
