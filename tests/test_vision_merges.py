"""Merges of vision-language models without a search: mergekit's tensors, and an account of every tensor that is
stored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from helpers.files import read_recipe
from helpers.mergekit import assert_same_weights
from helpers.models import state
from helpers.sampling import sample
from reference.vision_models import load_seeing, save_seeing, seeing_model
from safetensors.numpy import load_file, save_file
from test_recipes import merge, mergekit_merge, write

from evojax_merge.checkpoints.decoder_folder import decoder_of
from evojax_merge.checkpoints.derived import open_model, resolve_model
from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.errors import InputError
from evojax_merge.inspection.models import read_models
from evojax_merge.mergekit.execute import prepare

# The beginnings of tensors' names as transformers writes them, and as mergekit knows them: where they differ, mergekit
# leaves the tensors out without a word.
NAMES = {
    "llava": {
        "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}  # fmt: skip
FORMAT, MODELS = {"format": "pt"}, ("base", "one", "two")
KINDS = ("llava", "qwen2_5_vl", "qwen3_vl")


def write_pair(folder: Path, kind: str) -> None:
    """A base and two parents, of which each has a vision side of its own."""
    model = seeing_model(kind)
    for seed, name in enumerate(MODELS):
        save_seeing(model, folder / name, seed, 0.05)


def rename_pair(folder: Path, kind: str, models: Sequence[str] = MODELS) -> None:
    """Give the tensors of `write_pair` the names that mergekit knows."""
    for name in models:
        file = folder / name / "model.safetensors"
        save_file({known_name(kind, tensor): values for tensor, values in load_file(file).items()}, file, FORMAT)


def known_name(kind: str, tensor: str) -> str:
    """mergekit's name of a tensor of a file."""
    names = NAMES.get(kind, {})
    begin = next((begin for begin in names if tensor.startswith(begin)), "")
    return names.get(begin, "") + tensor.removeprefix(begin)


def recipe(folder: Path, method: str) -> dict[str, Any]:
    models = [str(folder / name) for name in ("one", "two")]
    if method == "slerp":
        return {
            "merge_method": "slerp", "base_model": models[0], "models": [{"model": model} for model in models],
            "parameters": {"t": 0.3}, "dtype": "float32",
        }  # fmt: skip
    values = [{"weight": 0.7, "density": 0.5}, {"weight": 0.4, "density": 0.8}]
    return {
        "merge_method": method, "base_model": str(folder / "base"), "dtype": "float32",
        "models": [{"model": model, "parameters": chosen} for model, chosen in zip(models, values, strict=True)],
    }  # fmt: skip


CASES = [(kind, method) for kind in KINDS for method in ("ties", "slerp", "task_arithmetic")]


@pytest.mark.parametrize(("kind", "method"), sample(CASES, 3))
def test_whole_models_merge_as_in_mergekit(kind: str, method: str, tmp_path: Path) -> None:
    write_pair(tmp_path, kind)
    rename_pair(tmp_path, kind)
    document = recipe(tmp_path, method)
    written = merge(tmp_path, document)
    assert set(state(written)) == set(state(tmp_path / "one"))
    assert_same_weights(written, mergekit_merge(tmp_path, document))


def test_no_tensor_depends_on_its_name(tmp_path: Path) -> None:
    """LLaVA's files of all versions are merged alike, with all of their tensors."""
    write_pair(tmp_path, "llava")
    document = recipe(tmp_path, "task_arithmetic")
    written = state(merge(tmp_path, document))
    assert set(written) == set(state(tmp_path / "one"))
    rename_pair(tmp_path, "llava")
    expected = state(merge(tmp_path, document))
    assert len(written) == len(expected)
    for name, values in written.items():
        np.testing.assert_array_equal(values, expected[known_name("llava", name)], err_msg=name)


def test_files_of_two_ages_are_compared_and_adapted_alike(tmp_path: Path) -> None:
    """The names of a tower do not matter to `inspect`, nor to an adapter that transformers of today made."""
    write_pair(tmp_path, "llava")
    tuned = peft.get_peft_model(
        load_seeing(tmp_path / "one")[0], peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(str(tmp_path / "adapter"))
    tuned.merge_and_unload().save_pretrained(tmp_path / "expected")
    rename_pair(tmp_path, "llava", ["one"])
    one, two = read_models(["one", "two"], [tmp_path / "one", tmp_path / "two"])
    assert set(one.tensors) == set(two.tensors)
    adapted = open_model(resolve_model("test", f"{tmp_path / 'one'}+{tmp_path / 'adapter'}", tmp_path))
    expected = {known_name("llava", name): values for name, values in state(tmp_path / "expected").items()}
    assert adapted.entries.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(adapted.read(name), values, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", sample(KINDS, 1))
def test_merged_decoders_keep_the_other_tensors_of_the_named_model(kind: str, tmp_path: Path) -> None:
    """Every tensor that is stored is that of the whole merge, where the decoder has it, or the named model's."""
    write_pair(tmp_path, kind)
    document = recipe(tmp_path, "task_arithmetic")
    whole, written = (
        state(merge(tmp_path, document)),
        state(merge(tmp_path, document | {"other_modules": str(tmp_path / "two")})),
    )
    kept, decoder = state(tmp_path / "two"), decoder_of(open_folder(tmp_path / "two"))
    assert set(written) == set(kept) == {*map(decoder.names.in_file, decoder.entries), *decoder.other_modules}
    for name, values in written.items():
        expected = kept[name] if name in decoder.other_modules else whole[name]
        np.testing.assert_array_equal(values, expected, err_msg=name)


def test_a_tensor_that_one_model_has_is_named(tmp_path: Path) -> None:
    """A tensor that is left out of the merge stands in a warning; one that may matter stops it."""
    write_pair(tmp_path, "qwen2_5_vl")
    file = tmp_path / "two/model.safetensors"
    tensors = load_file(file)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {table: np.ones(4, np.float32)}, file, FORMAT)
    document = recipe(tmp_path, "task_arithmetic")
    warnings = prepare(read_recipe(write(tmp_path, document))).sources.warnings
    assert any(table in line and "left out" in line for line in warnings)
    save_file(tensors | {"visual.merger.extra.weight": np.ones(16, np.float32)}, file, FORMAT)
    with pytest.raises(InputError, match=r"does not hold the same tensors as .*: visual\.merger\.extra\.weight"):
        prepare(read_recipe(write(tmp_path, document)))
