"""Hostile checkpoints: config.json, generation_config.json, and models that do not go together."""

import json
import os
from collections.abc import Callable
from typing import Any

from hostile import MERGE, Case, World, changing, config, everywhere

CONFIG, GENERATION = "one/config.json", "base/generation_config.json"
EVALUATE = ("evaluate", "one", "--tasks", "tasks.yaml")


@changing
def _raw(world: World, name: str, content: str | bytes) -> None:
    world.write(name, content)


def _set(name: str = CONFIG, **changes: Any) -> Callable[[World], None]:
    return lambda world: world.edit(name, **changes)


def _rope(**changes: Any) -> Callable[[World], None]:
    """The same rope settings in all models."""
    return everywhere(rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | changes)


def _twice(world: World) -> None:
    text = (world / CONFIG).read_text()
    world.write(CONFIG, text.replace('"hidden_size": 48', '"hidden_size": 64, "hidden_size": 48'))


def _bom(world: World) -> None:
    world.write(CONFIG, b"\xef\xbb\xbf" + (world / CONFIG).read_bytes())


def _huge(world: World) -> None:
    world.edit(CONFIG, padding="x" * (65 << 20))


def _surrogate(world: World) -> None:
    world.write(CONFIG, (world / CONFIG).read_text().replace('"model_type"', '"note": "\\ud800", "model_type"'))


def _folder(world: World) -> None:
    (world / CONFIG).unlink()
    (world / CONFIG).mkdir()


def _pipe(world: World) -> None:
    (world / CONFIG).unlink()
    os.mkfifo(world / CONFIG)


@changing
def _evaluate(world: World, change: Callable[[World], Any]) -> None:
    world.write("tasks.yaml", {"tasks": config()["tasks"]})
    change(world)


def _link(world: World) -> None:
    (world / "again").symlink_to(world / "one")
    world.edit("config.yaml", parents=["one", "two", "again"])


def _wider(world: World) -> None:
    """`one` with 16 more rows than tokens, as trainers pad them; its tokenizer is everybody's."""
    from safetensors.numpy import load_file, save_file

    file = world / "one" / "model.safetensors"
    tensors = load_file(file)
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = rows[list(range(len(rows))) + [0] * 16]
    save_file(tensors, file, {"format": "pt"})
    world.edit(CONFIG, vocab_size=len(rows) + 16)


def _rows_that_are_not_there(world: World) -> None:
    world.edit(CONFIG, vocab_size=80)
    world.edit("config.yaml", tokenizer_source="base")


def _quantised(world: World) -> None:
    everywhere(quantization_config={"quant_method": "hqq", "nbits": 4})(world)


def _only_another_programs_weights(world: World) -> None:
    (world / "one" / "model.safetensors").rename(world / "one" / "consolidated.safetensors")


DEEP = '{"model_type": "llama", "note": ' + "[" * 100_000 + "]" * 100_000 + "}"
DEEP_ENOUGH = '{"model_type": "llama", "note": ' + "[" * 900 + "]" * 900 + "}"

# Each is refused by name, by a search that opens the model.
VALUES: dict[str, tuple[Callable[[World], None], str]] = {
    "a billion layers": (everywhere(num_hidden_layers=10**9), "num_hidden_layers: 1000000000"),
    "a billion layers, as a float": (_set(num_hidden_layers=1e9), "num_hidden_layers: 1000000000.0"),
    "no layers": (_set(num_hidden_layers=0), "num_hidden_layers: 0"),
    "fewer than no layers": (_set(num_hidden_layers=-3), "num_hidden_layers: -3"),
    "a text of layers": (_set(num_hidden_layers="3"), "num_hidden_layers: '3'"),
    "layers: true": (_set(num_hidden_layers=True), "num_hidden_layers: True"),
    "a size of four thousand digits": (_set(hidden_size=10**4000), "hidden_size"),
    "hidden_size that heads do not divide": (_set(head_dim=..., num_attention_heads=7), "not a multiple"),
    "key heads that do not divide heads": (_set(num_key_value_heads=3), "num_key_value_heads: 3"),
    "no key heads": (_set(num_key_value_heads=0), "num_key_value_heads: 0"),
    "head_dim 0": (_set(head_dim=0), "head_dim: 0"),
    "an odd head_dim": (everywhere(head_dim=3), "head_dim: 3"),
    "vocab_size negative": (_set(vocab_size=-1), "vocab_size: -1"),
    "vocab_size beyond the rows, aligned": (_rows_that_are_not_there, "80 rows"),
    "no positions": (everywhere(max_position_embeddings=0), "max_position_embeddings: 0"),
    "absurdly many positions": (everywhere(max_position_embeddings=1e30), "max_position_embeddings: 1e+30"),
    "absurdly many positions, exactly": (everywhere(max_position_embeddings=10**30), "max_position_embeddings"),
    "positions null": (everywhere(max_position_embeddings=None), "max_position_embeddings: None"),
    "eps negative": (everywhere(rms_norm_eps=-1e-5), "rms_norm_eps: -1e-05"),
    "eps NaN": (everywhere(rms_norm_eps=float("nan")), "rms_norm_eps: nan"),
    "eps infinite": (everywhere(rms_norm_eps=float("inf")), "rms_norm_eps: inf"),
    "eps a text": (everywhere(rms_norm_eps="1e-5"), "rms_norm_eps: '1e-5'"),
    "rope_theta 0": (_rope(rope_theta=0), "rope_theta: 0"),
    "rope_theta -1": (_rope(rope_theta=-1.0), "rope_theta: -1.0"),
    "rope_theta NaN": (_rope(rope_theta=float("nan")), "rope_theta: nan"),
    "rope_theta infinite": (_rope(rope_theta=float("inf")), "rope_theta: inf"),
    "rope_theta a text": (_rope(rope_theta="10000"), "rope_theta: '10000'"),
    "rope_theta a text, outside": (everywhere(rope_parameters=..., rope_theta="1e4"), "rope_theta: '1e4'"),
    "rope_theta null": (_rope(rope_theta=None), "rope_theta: None"),
    "rope_parameters a list": (everywhere(rope_parameters=[10000.0]), "rope_parameters: [10000.0]"),
    "rope_scaling a text": (everywhere(rope_scaling="linear"), "rope_scaling: 'linear'"),
    "rope of factor 0": (_rope(rope_type="linear", factor=0), "factor: 0"),
    "rope without its factor": (_rope(rope_type="linear"), "factor"),
    "rope of a type that is a list": (_rope(rope_type=["linear"]), "rope_type: ['linear']"),
    "rope of no known type": (_rope(rope_type="su", factor=2.0), "rope_type: 'su'"),
    "llama3 rope turned around": (
        _rope(
            rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        "low_freq_factor",
    ),
    "layer_types a text": (
        everywhere(model_type="qwen3", layer_types="full_attention"), "layer_types: 'full_attention'",
    ),
    "layer_types of another length": (everywhere(model_type="qwen3", layer_types=["full_attention"]), "layer_types"),
    "an activation that is a list": (_set(hidden_act=["silu"]), "hidden_act: ['silu']"),
    "tied: a text": (_set(tie_word_embeddings="false"), "tie_word_embeddings: 'false'"),
    "model_type a list": (_set(model_type=["llama"]), "model_type"),
    "model_type of 10,000 letters": (everywhere(model_type="l" * 10_000), "model_type"),
    "a Granite that says it is a Llama": (everywhere(residual_multiplier=0.22), "residual_multiplier: 0.22"),
    "quantised": (_quantised, "quantization_config"),
}  # fmt: skip

CASES: list[Case] = [
    *(Case(f"config.json: {name}", change, (says, "config.json" if "aligned" not in name else "one"))
      for name, (change, says) in VALUES.items()),
    # What is no JSON object at all, and what a merge, which runs no model, reads of it.
    Case("config.json: a list", _raw(CONFIG, "[]"), ("one/config.json", "a JSON object")),
    Case("config.json: null", _raw(CONFIG, "null"), ("one/config.json", "a JSON object")),
    Case("config.json: a number, merged", _raw(CONFIG, "7"), ("one/config.json", "a JSON object"), MERGE),
    Case("config.json: a long list, merged", _raw(CONFIG, json.dumps(["x" * 99] * 10**5)), ("a JSON object",), MERGE),
    Case("config.json: empty", _raw(CONFIG, ""), ("one/config.json", "not valid JSON")),
    Case("config.json: nested too deep", _raw(CONFIG, DEEP), ("one/config.json", "nests too deep")),
    Case("config.json: nested too deep for others, merged", _raw(CONFIG, DEEP_ENOUGH), ("nests too deep",), MERGE),
    Case("config.json: not UTF-8", _raw(CONFIG, b'{"model_type": "ll\xe4ma"}'), ("one/config.json", "UTF-8")),
    Case("config.json: UTF-16", _raw(CONFIG, '{"model_type": "llama"}'.encode("utf-16")), ("UTF-8",)),
    Case("config.json: with a byte-order mark", _bom, ("one/config.json", "BOM")),
    Case("config.json: a key with two values", _twice, ("one/config.json", "'hidden_size' twice")),
    Case("config.json: half a surrogate pair", _surrogate, ("one/config.json", "surrogate")),
    Case("config.json: 5,000 digits", _raw(CONFIG, '{"vocab_size": ' + "9" * 5000 + "}"), (CONFIG, "digits")),
    Case("config.json: 65 MB", _huge, ("one/config.json", "bytes")),
    Case("config.json: a folder", _folder, ("one/config.json", "is no regular file")),
    Case("config.json: a pipe that nobody writes to", _pipe, ("one/config.json", "is no regular file")),
    Case("config.json: NaN, merged", everywhere(rms_norm_eps=float("nan")), ("rms_norm_eps: nan",), MERGE),
    Case("config.json: another depth than the tensors', merged", everywhere(num_hidden_layers=2), ("3",), MERGE),
    Case("config.json: quantised, merged", _quantised, ("quantization_config", "hqq"), MERGE),
    Case("config.json: eps negative, evaluated", _evaluate(_set(rms_norm_eps=-1.0)), ("rms_norm_eps: -1.0",), EVALUATE),
    Case("weights: only another program's", _only_another_programs_weights, ("one", "model.safetensors")),
    # generation_config.json
    Case("generation_config.json: garbage", _raw(GENERATION, "{eos"), (GENERATION, "not valid JSON")),
    Case("generation_config.json: garbage, merged", _raw(GENERATION, b"\xff\x00"), (GENERATION, "UTF-8"), MERGE),
    Case(
        "generation_config.json: garbage, of the model that gives it but not the tokenizer",
        lambda world: (_raw(GENERATION, "{")(world), world.edit("config.yaml", tokenizer_source="one"), None)[-1],
        (GENERATION, "not valid JSON"),
    ),
    Case("generation_config.json: a list", _raw(GENERATION, "[2]"), (GENERATION, "a JSON object")),
    Case("generation_config.json: nested too deep", _raw(GENERATION, DEEP), (GENERATION, "nests too deep")),
    Case("eos: a text", _raw(GENERATION, '{"eos_token_id": "</s>"}'), (GENERATION, "eos_token_id: '</s>'")),
    Case("eos: a list with a text", _raw(GENERATION, '{"eos_token_id": [2, "x"]}'), (GENERATION, "eos_token_id: 'x'")),
    Case("eos: nested lists", _raw(GENERATION, '{"eos_token_id": [[2]]}'), (GENERATION, "eos_token_id: [2]")),
    Case("eos: an object", _raw(GENERATION, '{"eos_token_id": {"id": 2}}'), (GENERATION, "eos_token_id: {'id': 2}")),
    Case("eos: a fraction", _raw(GENERATION, '{"eos_token_id": 2.5}'), (GENERATION, "eos_token_id: 2.5")),
    Case("eos: true", _raw(GENERATION, '{"eos_token_id": true}'), (GENERATION, "eos_token_id: True")),
    Case("eos: beyond the vocabulary", _raw(GENERATION, '{"eos_token_id": [2, 64]}'), (GENERATION, "64", "0 to 63")),
    Case("eos: negative", _raw(GENERATION, '{"eos_token_id": -1}'), (GENERATION, "eos_token_id: -1")),
    Case(
        "eos: a text in config.json, evaluated",
        _evaluate(lambda world: (_set(eos_token_id="x")(world), (world / "one/generation_config.json").unlink())),
        (CONFIG, "eos_token_id"), EVALUATE,
    ),
    # Models that do not go together
    Case("parents: the same twice", _set("config.yaml", parents=["one", "two", "one"]), ("config.yaml: parents[2]",)),
    Case("parents: the same by another path", _set("config.yaml", parents=["one", "./two/../one"]), ("parents[1]",)),
    Case("parents: the same behind a link", _link, ("config.yaml: parents[2]", "parents[0]")),
    Case("parents: the base", _set("config.yaml", parents=["one", "base"]), ("config.yaml: parents[1]", "base")),
    Case("vocabularies: padded differently", _wider, ("one", "[80, 48]", "tokenizer_source: base")),
    Case(
        "vocabularies: padded differently, aligned as the message says",
        lambda world: (_wider(world), world.edit("config.yaml", tokenizer_source="base"), None)[-1],
        status=0, leaves=("run",), seconds=60.0,
    ),
    Case("vocabularies: padded differently, merged", _wider, ("one", "tokenizer_source: base"), MERGE),
]  # fmt: skip
