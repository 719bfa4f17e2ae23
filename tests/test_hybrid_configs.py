"""Decoders whose layers are of several types, in configs of three kinds each, at rows shorter and longer than a
chunk."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers.decoders import greedy_tokens, load_decoder, logits
from helpers.files import write_json
from helpers.models import load_torch, random_model, save
from helpers.sampling import ALL, sample
from reference.torch_models import torch_logits, torch_tokens
from safetensors.numpy import load_file, save_file
from test_families import FAMILIES, SIZES, random_tokens

from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.errors import InputError
from evojax_merge.models import decoder
from evojax_merge.models.layers import SequenceLayout

TIED, UNTIED, ALONE = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}
# A head of values for each of keys; three recurrent layers behind each other.
DELTA = [
    TIED, UNTIED | ALONE | {"linear_num_value_heads": 2},
    UNTIED | {"num_hidden_layers": 5, "linear_conv_kernel_dim": 3, "layer_types": None, "full_attention_interval": 4},
]  # fmt: skip
CHANGES: dict[str, list[dict[str, Any]]] = {
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA,
    "qwen3_next": DELTA,
    "granitemoehybrid": [
        TIED, UNTIED | ALONE | {"num_local_experts": 0, "num_experts_per_tok": 0},
        UNTIED | {"position_embedding_type": "rope", "mamba_n_groups": 1, "mamba_conv_bias": False},
    ],
    "falcon_h1": [TIED, UNTIED | ALONE, UNTIED | {"mamba_rms_norm": False, "mamba_n_groups": 1, "mamba_d_conv": 2}],
    "nemotron_h": [
        UNTIED, UNTIED | ALONE,
        UNTIED | {"layers_block_type": ["mlp", "linear_attention", "full_attention"], "n_groups": 1},
    ],
    "lfm2": [TIED, UNTIED | ALONE, UNTIED | {"conv_bias": False, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False}],
}  # fmt: skip
CASES = [(kind, number) for kind, changes in CHANGES.items() for number in range(len(changes))]
# A chunk of a recurrence is of 64 tokens.
LENGTHS = (1, 63, 64, 65, 300) if ALL else (65,)


@pytest.fixture(scope="module", params=sample(CASES, 1), ids=lambda case: f"{case[0]}-{case[1]}")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The config, the weights, and transformers' model."""
    kind, number = request.param
    row = FAMILIES[kind]
    settings = SIZES | row.changes | {"max_position_embeddings": 512} | CHANGES[kind][number]
    config = getattr(transformers, row.config)(**settings)
    config._attn_implementation = "eager"
    folder = save(random_model(config, seed=number, std=0.22), tmp_path_factory.mktemp(kind) / "model")
    return *load_decoder(folder), load_torch(folder)


def assert_close(actual: Any, expected: np.ndarray) -> None:
    # A state gathers the rounding of all tokens before: over 300, torch's float32 is up to 2.9e-4 from its float64.
    share = 1e-4 if expected.shape[-2] < 300 else 6e-4
    np.testing.assert_allclose(actual, expected, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_those_of_transformers_at_any_length(models: tuple[Any, Any, Any], length: int) -> None:
    config, weights, theirs = models
    tokens = random_tokens(length, 1, length)
    assert_close(logits(config, weights, tokens), torch_logits(theirs, tokens))


def test_texts_behind_pads_and_drafts_are_those_of_transformers(models: tuple[Any, Any, Any]) -> None:
    """A draft that is rejected leaves the states as if it had not been."""
    config, weights, theirs = models
    prompts, new = [random_tokens(1, 65), random_tokens(2, 6)], 10
    padded = np.stack([np.concatenate([np.full(65 - len(prompt), 5), prompt]) for prompt in prompts])
    expected = [torch_tokens(theirs, prompt, new) for prompt in prompts]
    wrong = random_tokens(4, 2, 1)
    seen = np.concatenate([random_tokens(3, 2, 3), np.array(expected)[:, :5], wrong], axis=1)
    assert greedy_tokens(config, weights, padded, [0, 59], new, (), window=4, seen=seen).tolist() == expected


def test_sequences_in_one_row_know_nothing_of_each_other(models: tuple[Any, Any, Any]) -> None:
    config, weights, theirs = models
    parts = [random_tokens(seed, length) for seed, length in enumerate((7, 66, 1, 30))]
    row = np.concatenate(parts)[None]
    positions = np.concatenate([np.arange(len(part)) for part in parts])[None]
    segments = np.concatenate([np.full(len(part), number) for number, part in enumerate(parts, start=1)])[None]
    layout = SequenceLayout(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))
    states, _ = decoder.forward(config, weights, jnp.asarray(row), layout)
    expected = np.concatenate([torch_logits(theirs, part[None])[0] for part in parts])
    assert_close(decoder.logits(config, weights, states)[0], expected)


# ---------------------------------------------------------------------------------------------------------------
# What is refused

KERNELS = {
    "granitemoehybrid": "mamba_d_conv", "falcon_h1": "mamba_d_conv", "nemotron_h": "conv_kernel",
    "qwen3_next": "linear_conv_kernel_dim", "qwen3_5_text": "linear_conv_kernel_dim", "lfm2": "conv_L_cache",
    "lfm2_moe": "conv_L_cache",
}  # fmt: skip
# Python makes no float of it.
HUGE = 10**400
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family's type of layer": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention", "mamba", "sliding_attention", "mamba", "mamba", "mamba"]},
        "layer_types: layer 3 is 'sliding_attention'",
    ),
    "a pattern of another depth": ("granitemoehybrid", {"layer_types": ["mamba"] * 6}, r"\(7\) .*layer_types. \(6\)"),
    "heads that do not divide": ("qwen3_next", {"linear_num_value_heads": 24}, "24 is not a multiple of .*16"),
    "groups that do not divide": ("falcon_h1", {"mamba_n_groups": 5}, "24 heads of Mamba in 5 groups"),
    "a chunk of nothing": ("falcon_h1", {"mamba_chunk_size": 0}, "mamba_chunk_size: 0"),
    "a head that is never tied": ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings: True; expected"),
    "a convolution of nothing": ("lfm2", {"conv_L_cache": 0}, "conv_L_cache: 0"),
    **{
        f"a convolution of {tokens} tokens, {kind}": (kind, {key: tokens}, f"{key}: {tokens}; .* 2 to 256")
        for kind, key in KERNELS.items() for tokens in (1, 3000)
    },
    **{
        f"{key} {value}, {kind}": (kind, {key: value}, f"{key}: .*; expected")
        for kind, key, value in (
            ("granitemoehybrid", "time_step_limit", [0, HUGE]), ("falcon_h1", "time_step_limit", [math.nan, 1.0]),
            ("falcon_h1", "time_step_limit", [math.inf, 1.0]), ("falcon_h1", "mlp_multipliers", [HUGE, 1.0]),
            ("falcon_h1", "ssm_multipliers", [math.nan] * 5), ("falcon_h1", "mlp_multipliers", [math.inf, 1.0]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_means_no_layers_is_refused(case: str, tmp_path: Path) -> None:
    kind, changes, named = REFUSED[case]
    file = write_json(tmp_path / "config.json", FAMILIES[kind].hub | {"num_hidden_layers": 7} | changes)
    with pytest.raises(InputError, match=named) as raised:
        decoder_config(file)
    assert "\n" not in str(raised.value)


def tiny(kind: str, folder: Path, **changes: Any) -> Path:
    config = getattr(transformers, FAMILIES[kind].config)(**(SIZES | FAMILIES[kind].changes | changes))
    return save(random_model(config), folder)


def test_parents_of_unlike_patterns_are_refused(tmp_path: Path) -> None:
    types = ["full_attention", "linear_attention", "linear_attention"]
    models = [tiny("qwen3_5_text", tmp_path / "a"), tiny("qwen3_5_text", tmp_path / "b", layer_types=types)]
    with pytest.raises(InputError, match=r"layer_types|layers\.0|linear_attn"):
        open_sources(models)


def test_a_checkpoint_without_decay_rates_is_refused(tmp_path: Path) -> None:
    folder = tiny("qwen3_5_text", tmp_path / "a")
    file = folder / "model.safetensors"
    save_file({name: values for name, values in load_file(file).items() if "A_log" not in name}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.0\.linear_attn\.A_log"):
        open_sources([folder])
