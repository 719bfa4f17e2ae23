"""Text decoders inside of larger models: searched and merged as their text architecture, exported as larger models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.commands import command
from helpers.decoders import stored_logits
from helpers.files import edit_json, read_json, write_lines, write_yaml
from helpers.models import even_records, word_tokenizer, words
from helpers.sampling import ALL, sample, thorough
from helpers.searches import search_config
from reference.torch_models import torch_logits, torch_logprobs
from safetensors.numpy import load_file, save_file

from evojax_merge.checkpoints.config_file import MULTIMODAL_MODEL_TYPES
from evojax_merge.checkpoints.decoder_folder import decoder_of
from evojax_merge.checkpoints.folder import open_folder
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.errors import InputError

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
DELTA = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 6,
    "linear_value_head_dim": 10, "linear_num_key_heads": 2, "linear_num_value_heads": 4, **TEXT,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_interleaved": True},
}  # fmt: skip
# The larger model's model_type -> its settings.
LARGER: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 60,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": None, "head_dim": 8, **TEXT},
        "vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION},
        "image_token_index": 60, "tie_word_embeddings": False,
    },
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"], **TEXT,
        },
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "image_token_index": 60, "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", "rope_parameters": MROPE, **TEXT},
        "vision_config": {"model_type": "qwen2_5_vl_vision", **QWEN_VISION},
    },
}  # fmt: skip
CLIP, SIGLIP = ({"model_type": f"{kind}_vision_model", **VISION} for kind in ("clip", "siglip"))
LLAMA, QWEN2 = ({"model_type": kind, **TEXT} for kind in ("llama", "qwen2"))
IMAGES = {"image_token_index": 60, "image_grid_pinpoints": [[8, 8]]}
MORE: dict[str, dict[str, Any]] = {
    "got_ocr2": {
        "text_config": QWEN2, "image_token_index": 60,
        "vision_config": {
            "model_type": "got_ocr2_vision", "hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "output_channels": 8,
            "global_attn_indexes": [0], "window_size": 2,
        },
    },
    "idefics3": {
        "text_config": LLAMA, "vision_config": {"model_type": "idefics3_vision", **VISION}, "image_token_id": 60,
    },
    "internvl": {
        "text_config": QWEN2, "image_token_id": 60,
        "vision_config": {"model_type": "internvl_vision", **VISION, "image_size": [8, 8], "patch_size": [4, 4]},
    },
    "llava_next": {"text_config": LLAMA, "vision_config": CLIP, **IMAGES},
    "llava_next_video": {"text_config": LLAMA, "vision_config": CLIP, "video_token_index": 61, **IMAGES},
    "llava_onevision": {"text_config": QWEN2, "vision_config": SIGLIP, **IMAGES},
    "qwen2_vl": {
        "text_config": {"model_type": "qwen2_vl_text", "rope_parameters": MROPE, **TEXT},
        "vision_config": {
            "model_type": "qwen2_vl_vision", "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2,
            "mlp_ratio": 2, "patch_size": 4,
        },
    },
    "qwen3_5": {
        "text_config": {"model_type": "qwen3_5_text", **DELTA},
        "vision_config": {"model_type": "qwen3_5_vision", "num_position_embeddings": 16, **QWEN_VISION},
    },
    "qwen3_5_moe": {
        "text_config": {
            "model_type": "qwen3_5_moe_text", **DELTA, "moe_intermediate_size": 24, "num_experts": 4,
            "num_experts_per_tok": 2, "shared_expert_intermediate_size": 20,
        },
        "vision_config": {"model_type": "qwen3_5_moe_vision", "num_position_embeddings": 16, **QWEN_VISION},
    },
    "qwen3_vl": {
        "text_config": {
            "model_type": "qwen3_vl_text", "head_dim": 8, **TEXT,
            "rope_parameters": MROPE | {"mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision", "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            **QWEN_VISION,
        },
    },
    "qwen3_vl_moe": {
        "text_config": {
            "model_type": "qwen3_vl_moe_text", "head_dim": 8, **TEXT, "moe_intermediate_size": 24, "num_experts": 4,
            "num_experts_per_tok": 2, "rope_parameters": MROPE | {"mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe_vision", "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            **QWEN_VISION,
        },
    },
    "smolvlm": {
        "text_config": LLAMA, "vision_config": {"model_type": "smolvlm_vision", **VISION}, "image_token_id": 60,
    },
    "video_llava": {
        "text_config": LLAMA, "vision_config": CLIP, "image_token_index": 60, "video_token_index": 61,
    },
    "vipllava": {
        "text_config": LLAMA, "vision_config": CLIP, "image_token_index": 60, "vision_feature_layers": [-1],
    },
}  # fmt: skip


def larger_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(LARGER | MORE)[kind])
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    for name, values in model.named_parameters():
        torch.nn.init.normal_(values, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def save_with_noise(model: Any, folder: Path, seed: int, noise: float = 0.05) -> Path:
    """A copy with noise in every tensor, its other modules' as well."""
    torch.manual_seed(seed)
    state = {name: values + noise * torch.randn_like(values) for name, values in model.state_dict().items()}
    copy = type(model)(model.config)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)
    word_tokenizer(words(64)).save_pretrained(folder)
    return folder


def write_family(root: Path, kind: str) -> None:
    model = larger_model(kind)
    for seed, name in enumerate(("base", "one", "two")):
        save_with_noise(model, root / name, seed)
    write_lines(root / "tasks.jsonl", even_records(6))
    write_lines(root / "heldout.jsonl", even_records(4, seed=1))


def rename(folder: Path, new_names: dict[str, str]) -> None:
    """Give tensors of a folder's file other prefixes."""
    tensors = load_file(folder / "model.safetensors")
    for old, new in new_names.items():
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: v for name, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load_whole(folder: Path) -> Any:
    """The folder as transformers reads it as the larger model, with all of its tensors, and all that the model has."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def assert_kept(folder: Path, of: Path) -> None:
    """Every tensor outside of the decoder is what it is in another folder, to the byte."""
    found, expected = (decoder_of(open_folder(one)) for one in (folder, of))
    assert found.other_modules.keys() == expected.other_modules.keys() and found.other_modules
    for name in found.other_modules:
        np.testing.assert_array_equal(found.whole.read(name), expected.whole.read(name))


def tokens_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 60, (2, 13)).astype(np.int32)


@pytest.mark.parametrize("kind", sample(LARGER, 2))
def test_a_merge_of_text_decoders_is_the_larger_model(kind: str, tmp_path: Path) -> None:
    write_family(tmp_path, kind)
    tokens = tokens_of(0)
    expected = torch_logits(load_whole(tmp_path / "one"), tokens)
    np.testing.assert_allclose(stored_logits(tmp_path / "one", tokens), expected, atol=1e-4)
    recipe = {
        "merge_method": "ties", "base_model": str(tmp_path / "base"), "other_modules": str(tmp_path / "two"),
        "models": [
            {"model": str(tmp_path / name), "parameters": {"weight": 0.7, "density": 0.5}} for name in ("one", "two")
        ],
        "dtype": "float32",
    }  # fmt: skip
    write_yaml(tmp_path / "recipe.yaml", recipe)
    (tmp_path / "two/preprocessor_config.json").write_text("{}")
    assert command("merge", tmp_path / "recipe.yaml", tmp_path / "out") == 0
    found = torch_logits(load_whole(tmp_path / "out"), tokens)
    np.testing.assert_allclose(stored_logits(tmp_path / "out", tokens), found, atol=1e-4)
    assert np.abs(found - expected).max() > 1e-2
    assert_kept(tmp_path / "out", tmp_path / "two")


@thorough
def test_a_merge_of_ministral_3_inside_of_mistral_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 12.0, "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.7,
    }  # fmt: skip
    text = {"model_type": "ministral3", "head_dim": 8, "rope_parameters": rope, **TEXT}
    monkeypatch.setitem(LARGER, "mistral3", LARGER["mistral3"] | {"text_config": text})
    test_a_merge_of_text_decoders_is_the_larger_model("mistral3", tmp_path)
    assert (tmp_path / "out/preprocessor_config.json").read_text() == "{}"


def test_every_larger_model_is_in_a_table() -> None:
    assert {*LARGER, *MORE} == MULTIMODAL_MODEL_TYPES


@pytest.mark.skipif(not ALL, reason="EVOJAX_TEST_ALL")
@pytest.mark.parametrize("kind", sample(MORE, 2))
def test_a_text_has_the_logits_that_it_has_in_the_larger_model(kind: str, tmp_path: Path) -> None:
    save_with_noise(larger_model(kind), tmp_path / "one", 0)
    expected = torch_logits(load_whole(tmp_path / "one"), tokens_of(0))
    np.testing.assert_allclose(stored_logits(tmp_path / "one", tokens_of(0)), expected, atol=1e-4)
    assert decoder_of(open_folder(tmp_path / "one")).other_modules


SPACES = {
    "merges": {"space": {"method": "dare_ties", "layers_per_group": 2}},
    "paths": {"data_flow": {"moves": 2, "window": 1}},
    "pool": {"pool": {"methods": ["dare_ties", "slerp"], "size": 4}},
}


@pytest.mark.parametrize("space", SPACES if ALL else ["pool"])
def test_a_search_exports_the_larger_model_that_it_scored(space: str, tmp_path: Path) -> None:
    """With tensors named as in files of earlier versions of transformers."""
    write_family(tmp_path, "llava")
    earlier = {
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector.",
    }  # fmt: skip
    for name in ("base", "one"):
        rename(tmp_path / name, earlier)
    rename(tmp_path / "two", {new: old for old, new in earlier.items()})
    document = search_config(heldout="heldout.jsonl", parents=["one", "two"], **{"space": None, **SPACES[space]})
    assert command("search", write_yaml(tmp_path / "search.yaml", document), "--out", tmp_path / "run") == 0
    out = tmp_path / "run/best/model"
    assert_kept(out, tmp_path / "base")
    assert any(name.startswith("language_model.model.layers.0.") for name in open_folder(out).entries)
    result = read_json(tmp_path / "run/result.json")
    (winner,) = (row for row in result["table"] if row["role"] == "winner")
    (scored,) = winner["heldout_scores"].values()
    theirs, ids, means = load_whole(out), {word: i for i, word in enumerate(words(64))}, []
    for line in (tmp_path / "heldout.jsonl").read_text().splitlines():
        prompt, own = ([ids[word] for word in json.loads(line)[key].split()] for key in ("prompt", "target"))
        means.append(torch_logprobs(theirs, prompt, own).mean())
    assert scored == pytest.approx(float(np.mean(means)), abs=1e-4)


def test_settings_beside_those_of_the_other_modules(tmp_path: Path) -> None:
    """Qwen2.5-VL's config.json on the hub has no text_config, its files no prefix of the decoder's own."""
    save_with_noise(larger_model("qwen2_5_vl"), tmp_path / "one", 0)
    expected = stored_logits(tmp_path / "one", tokens_of(0))

    def flat(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        del text["rope_parameters"], text["model_type"]
        config |= text | {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}

    edit_json(tmp_path / "one/config.json", flat)
    rename(tmp_path / "one", {"model.language_model.": "model.", "model.visual.": "visual."})
    np.testing.assert_array_equal(stored_logits(tmp_path / "one", tokens_of(0)), expected)
    np.testing.assert_allclose(torch_logits(load_whole(tmp_path / "one"), tokens_of(0)), expected, atol=1e-4)


def test_rows_for_tokens_that_a_config_says_twice_are_written_twice(tmp_path: Path) -> None:
    save_with_noise(larger_model("llava"), tmp_path, 0)
    edit_json(tmp_path / "config.json", lambda config: config.update(vocab_size=64))
    decoder = decoder_of(open_folder(tmp_path))
    config = decoder.whole_config(decoder.config | {"vocab_size": 60})
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 60


def test_logits_that_the_larger_model_leaves_unscaled_are_refused(tmp_path: Path) -> None:
    save_with_noise(larger_model("llava"), tmp_path, 0)
    edit_json(tmp_path / "config.json", lambda config: config["text_config"].update(model_type="granite"))
    with pytest.raises(InputError, match="text_config: model_type is 'granite', whose logits transformers leaves"):
        open_sources([tmp_path])


@thorough
def test_what_is_said_of_other_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_family(tmp_path, "llava")
    text = transformers.AutoModelForCausalLM.from_config(larger_model("llava").config.text_config).float()
    text.save_pretrained(tmp_path / "text")
    word_tokenizer(words(64)).save_pretrained(tmp_path / "text")
    document = search_config(None, 1, base=None, parents=["text", "one"], space={"method": "linear"})

    def search(**changes: Any) -> str:
        write_yaml(tmp_path / "search.yaml", document | changes)
        code = command("search", tmp_path / "search.yaml", "--out", tmp_path / "run", "--overwrite")
        out, error = capsys.readouterr()
        return " ".join((error if code == 2 else out).split())

    assert "other_modules: expected base or one of the parents" in search(other_modules="two")
    assert "is a text decoder alone; expected a larger model" in search(other_modules="text")
    # A text model's own layers in the decoder of a larger one.
    assert f"other modules: those of {tmp_path / 'one'}" in search()
    assert_kept(tmp_path / "run/best/model", tmp_path / "one")
    # A tensor that the decoder should not have is none of the other modules.
    tensors = load_file(tmp_path / "two/model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in name)
    tensors[name.replace("weight", "bias")] = np.zeros(32, np.float32)
    save_file(tensors, tmp_path / "two/model.safetensors", {"format": "pt"})
    assert f"does not have: {name.replace('weight', 'bias')}" in search(parents=["one", "two"])
