"""An architecture from outside: GPT-like, with attention and MLP side by side, LayerNorm, learned positions, an MLP
without gate, a head that is always tied, and tensors and config keys of its own. It has no class in transformers."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import command, run_here
from helpers.decoders import greedy_tokens, hidden_states
from helpers.files import read_json, write_json, write_lines, write_yaml
from helpers.models import even_records, word_tokenizer, words
from merge_kernels import METHODS
from reference.decoder import toy_logits
from safetensors.numpy import load_file, save_file

from evojax_merge.checkpoints.bank import load_bank, load_stored, stored_tensors
from evojax_merge.checkpoints.config_file import decoder_config
from evojax_merge.checkpoints.derived import resolve_model
from evojax_merge.checkpoints.parents import open_sources
from evojax_merge.errors import InputError
from evojax_merge.mergekit.write import filters_of
from evojax_merge.models import architecture as registry
from evojax_merge.models.architecture import LAYERS, Architecture, Leaf, register_architecture
from evojax_merge.models.bank import MergeSpec, Recipe
from evojax_merge.models.config import NO_WINDOW, DecoderConfig
from evojax_merge.models.config_keys import CONTEXT, DEPTH, EPSILON, SIZE
from evojax_merge.models.decoder import logits
from evojax_merge.models.gguf import Gguf, GgufFile
from evojax_merge.models.layers import dense, dense_heads
from evojax_merge.models.sources import LazyMerge

# A model_type that means something else: kinds of tokenizers, ways to split words, a chat template of mergekit's, a
# name in a file's metadata; and which dense models are put together to which mixtures, or to none.
OTHER_MEANINGS = {
    ("gguf_file.py", "gpt2"), ("gguf_file.py", "llama"), ("gguf_file.py", "qwen2"), ("templates.py", "mistral"),
    ("gguf_tokens.py", "gpt2"), ("gguf_tokens.py", "llama"), ("as_gguf.py", "phi3"), ("mixtures.py", "llama"),
    ("mixtures.py", "mistral"), ("mixtures.py", "mixtral"), ("mixtures.py", "phi3"), ("mixtures.py", "qwen2"),
    ("mixtures.py", "qwen2_moe"), ("mixtures.py", "qwen3"), ("mixtures.py", "qwen3_moe"), ("mixtures.py", "gemma"),
    ("mixtures.py", "gemma2"), ("mixtures.py", "gemma3_text"),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# The architecture


@dataclass(frozen=True, kw_only=True)
class ToyConfig(DecoderConfig):
    positions: int
    eps: float


def read_config(hf: Mapping[str, Any]) -> ToyConfig:
    if hf["width"] % hf["n_head"]:
        raise ValueError(f"width: {hf['width']} is not a multiple of n_head: {hf['n_head']}")
    return ToyConfig(
        architecture="toy", hidden=hf["width"], layers=hf["n_layer"], heads=hf["n_head"], kv_heads=hf["n_head"],
        head_dim=hf["width"] // hf["n_head"], vocab=hf["vocab_size"], windows=(NO_WINDOW,) * hf["n_layer"],
        head_is_embedding=True, positions=hf["max_position_embeddings"], eps=hf["layer_norm_epsilon"],
    )  # fmt: skip


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def block(config: ToyConfig, weights: Any, x: jax.Array, tables: None, attend: Any) -> Any:
    normed = layer_norm(x, weights["norm"], weights["norm_bias"], config.eps)
    attn_out, kept = attend(*(dense_heads(normed, weights, name, config.head_dim) for name in ("q", "k", "v")))
    up = jax.nn.gelu(dense(normed, weights, "up"), approximate=False)
    return x + dense(attn_out, weights, "o") + dense(up, weights, "down"), kept


HIDDEN, SQUARE = ("hidden",), ("hidden", "hidden")
LAYER = (
    Leaf("norm", "transformer.h.{layer}.ln.weight", "norm", HIDDEN, LAYERS),
    Leaf("norm_bias", "transformer.h.{layer}.ln.bias", "norm", HIDDEN, LAYERS),
    *(Leaf(n, f"transformer.h.{{layer}}.attn.{n}.weight", "attention", SQUARE, LAYERS, -2) for n in ("q", "k", "v")),
    Leaf("o", "transformer.h.{layer}.attn.proj.weight", "attention", SQUARE, LAYERS, -1, True),
    Leaf("up", "transformer.h.{layer}.mlp.fc.weight", "mlp", ("mlp", "hidden"), LAYERS, -2),
    Leaf("up_bias", "transformer.h.{layer}.mlp.fc.bias", "mlp", ("mlp",), LAYERS),
    Leaf("down", "transformer.h.{layer}.mlp.proj.weight", "mlp", ("hidden", "mlp"), LAYERS, -1, True),
)


def read_gguf_settings(file: GgufFile) -> dict[str, Any]:
    return {
        "width": file.value(".embedding_length", SIZE), "n_layer": file.value(".block_count", DEPTH),
        "n_head": file.value(".attention.head_count", SIZE), "vocab_size": file.embedding.shape[0],
        "max_position_embeddings": file.value(".context_length", CONTEXT),
    }  # fmt: skip


GGUF = Gguf(
    "toy-ggml",
    read_gguf_settings,
    names={
        "norm": "blk.{layer}.toy_norm.weight", "norm_bias": "blk.{layer}.toy_norm.bias",
        **{name: f"blk.{{layer}}.attn_{name}.weight" for name in ("q", "k", "v", "o")}, "up": "blk.{layer}.up.weight",
        "up_bias": "blk.{layer}.up.bias", "down": "blk.{layer}.down.weight", "embed": "token_embd.weight",
        "positions": "position_embd.weight", "final_norm": "output_norm.weight", "final_norm_bias": "output_norm.bias",
    },
    setting_tensors=("toy_table",),
    config_keys={"n_head": ".attention.head_count"},
    size_keys={"mlp": (".embedding_length",)},
)  # fmt: skip
TOY = Architecture(
    model_type="toy",
    leaves=(
        *LAYER,
        Leaf("embed", "transformer.wte.weight", "embedding", ("vocab", "hidden"), sharded_axis=-2),
        Leaf("positions", "transformer.wpe.weight", "embedding", ("positions", "hidden")),
        Leaf("final_norm", "transformer.ln_f.weight", "norm", HIDDEN),
        Leaf("final_norm_bias", "transformer.ln_f.bias", "norm", HIDDEN),
    ),
    keys={
        "width": SIZE, "n_layer": DEPTH, "n_head": SIZE, "vocab_size": SIZE, "max_position_embeddings": CONTEXT,
        "layer_norm_epsilon": EPSILON,
    },
    defaults={"layer_norm_epsilon": 1e-5},
    read_config=read_config,
    dimensions=lambda c: {"hidden": c.hidden, "mlp": 4 * c.hidden, "vocab": c.vocab, "positions": c.positions},
    embed=lambda c, source, tokens, layout: source.rows("embed", tokens) + source.rows("positions", layout.positions),
    position_tables=lambda c, layout: None,
    block=block,
    final_norm=lambda c, source, x: layer_norm(x, source.leaf("final_norm"), source.leaf("final_norm_bias"), c.eps),
    gguf=GGUF,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Checkpoints of it, and its forward pass once more

SIZES = {"width": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "max_position_embeddings": 40}
SETTINGS = {"model_type": "toy", "eos_token_id": 2, "somebodys_note": 1, **SIZES}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    h, shapes = 32, {"wte.weight": (64, 32), "wpe.weight": (40, 32), "ln_f.weight": (32,), "ln_f.bias": (32,)}
    for i in range(3):
        inside = {
            "ln.weight": (h,), "ln.bias": (h,), "mlp.fc.weight": (4 * h, h), "mlp.fc.bias": (4 * h,),
            "mlp.proj.weight": (h, 4 * h), **{f"attn.{name}.weight": (h, h) for name in ("q", "k", "v", "proj")},
        }  # fmt: skip
        shapes |= {f"h.{i}.{name}": shape for name, shape in inside.items()}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def write_model(folder: Path, seed: int, settings: Mapping[str, Any] = SETTINGS) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {
        name: (rng.normal(0, 0.15, shape) + ("ln" in name and "weight" in name)).astype(np.float32)
        for name, shape in tensor_shapes().items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", settings)
    word_tokenizer(words(64)).save_pretrained(folder)
    return folder


def load(folder: Path) -> tuple[DecoderConfig, Any]:
    sources, config = open_sources([folder])
    return config, load_stored(sources, config)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    register_architecture(TOY)
    root = tmp_path_factory.mktemp("toys")
    for seed, name in enumerate(("one", "two")):
        write_model(root / name, seed)
    write_lines(root / "tasks.jsonl", even_records(6))
    write_lines(root / "heldout.jsonl", even_records(4, seed=1))
    yield root
    registry._registry().pop("toy")


# ---------------------------------------------------------------------------------------------------------------


def test_forward_is_that_of_the_reference(root: Path) -> None:
    config, model = load(root / "one")
    tokens = np.random.default_rng(0).integers(4, 64, (2, 11)).astype(np.int32)
    tensors = load_file(root / "one/model.safetensors")
    found = np.asarray(logits(config, model, hidden_states(config, model, tokens)))
    for row, expected in zip(found, tokens, strict=True):
        np.testing.assert_allclose(row, toy_logits(tensors, expected, SIZES["n_head"]), atol=1e-4)
    # Padded on the left, positions begin with the first token.
    padded = np.concatenate([np.zeros((2, 3), np.int32), tokens], axis=1)
    shifted = hidden_states(config, model, padded, np.full(2, 3))
    np.testing.assert_allclose(np.asarray(logits(config, model, shifted))[:, 3:], found, atol=1e-4)


def test_it_generates_with_a_cache(root: Path) -> None:
    config, model = load(root / "one")
    tensors, prompts = load_file(root / "one/model.safetensors"), np.random.default_rng(1).integers(4, 64, (2, 6))
    for window in (1, 4):
        seen = np.zeros((2, 4), np.int32)
        found = greedy_tokens(config, model, prompts.astype(np.int32), np.array([0, 2]), 5, (), window, seen)
        for prompt, first, own in zip(prompts, (0, 2), found, strict=True):
            sequence = list(prompt[first:])
            for token in own:
                assert token == toy_logits(tensors, np.array(sequence), SIZES["n_head"])[-1].argmax()
                sequence.append(token)


def search(root: Path, name: str, space: dict[str, Any]) -> Path:
    """A search of two generations; its exported winner has the scores that it reports."""
    task = {"name": "text", "kind": "likelihood", "file": "tasks.jsonl", "heldout": "heldout.jsonl"}
    document = {"parents": ["one", "two"], **space, "tasks": [task], "search": {"generations": 2, "population": 4}}
    assert command("search", write_yaml(root / f"{name}.yaml", document), "--out", root / name) == 0
    alone = {"name": "text", "kind": "likelihood", "file": "heldout.jsonl"}
    write_yaml(root / "alone.yaml", {"tasks": [alone]})
    run_here("evaluate", root / name / "best/model", "--tasks", root / "alone.yaml", "--json", root / f"{name}.json")
    (found,) = read_json(root / f"{name}.json")
    table = read_json(root / name / "result.json")["table"]
    (expected,) = (row for row in table if row["role"] == "winner")
    assert found["scores"] == pytest.approx(expected["heldout_scores"], abs=1e-5)
    return root / name


def test_a_search_of_merges_exports_what_it_scored(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"method": "linear", "layers_per_group": 2, "components": ["attention", "mlp", "norm"]}
    out = search(root, "merges", {"space": space})
    said = " ".join(capsys.readouterr().out.split())
    assert "not read by a toy, kept for the export: somebodys_note" in said
    assert read_json(out / "best/model/config.json") == SETTINGS | {"dtype": "float32"}
    config, model = load(out / "best/model")
    tokens = np.random.default_rng(2).integers(4, 64, (1, 9)).astype(np.int32)
    found = np.asarray(logits(config, model, hidden_states(config, model, tokens)))
    tensors = load_file(out / "best/model/model.safetensors")
    np.testing.assert_allclose(found[0], toy_logits(tensors, tokens[0], SIZES["n_head"]), atol=1e-4)


def test_a_search_of_layer_paths_exports_what_it_scored(root: Path) -> None:
    out = search(root, "paths", {"data_flow": {"moves": 2, "window": 1}})
    depth = read_json(out / "best/model/config.json")["n_layer"]
    assert set(load_file(out / "best/model/model.safetensors")) == {
        name.replace("h.0.", f"h.{i}.") for name in tensor_shapes() if "h.1." not in name and "h.2." not in name
        for i in range(depth)
    }  # fmt: skip


def test_a_paths_scales_are_in_what_its_layers_write() -> None:
    # Two modules are named proj, and no other tensor.
    assert filters_of(TOY).residual == {"proj": 0.0}
    longer = Leaf("projector", "transformer.h.{layer}.attn.projector.weight", "attention", SQUARE, LAYERS)
    written = (".attn.proj.weight", ".mlp.proj.weight")
    assert tuple(filters_of(replace(TOY, leaves=(*TOY.leaves, longer), gguf=None)).residual) == written


def test_a_merge_of_two_is_theirs(root: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("one", "two")],
    }  # fmt: skip
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "merged")
    one, two, merged = (
        load_file(folder / "model.safetensors") for folder in (root / "one", root / "two", tmp_path / "merged")
    )
    config, model = load(tmp_path / "merged")
    for name, values in stored_tensors(model, config):
        np.testing.assert_allclose(values, (one[name] + two[name]) / 2, atol=1e-6)
        np.testing.assert_array_equal(values, merged[name])


def write_gguf(path: Path, model: Path, heads: int = 4, mlp: int = 128) -> None:
    """The model in a folder as a GGUF file, its tensors by the toy's names in such files."""
    architecture, tensors = "toy-ggml", load_file(model / "model.safetensors")
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "embedding_length": 32, "block_count": 3, "attention.head_count": heads, "context_length": 40,
    }  # fmt: skip
    for key, number in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", [*words(61), "a", "b", "ab"])
    writer.add_array("tokenizer.ggml.token_type", [1] * 64)
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    for leaf in TOY.leaves:
        for i in range(3) if leaf.stack else [0]:
            values = tensors[leaf.tensor_of(i)]
            values = values[:mlp] if leaf.name == "up" else values
            writer.add_tensor(GGUF.names[leaf.name].replace("{layer}", str(i)), values)
    writer.add_tensor("toy_table", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_its_gguf_file_is_read_by_its_own_names(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "one.gguf", root / "one")
    folder = resolve_model("test", str(tmp_path / "one.gguf"), Path())
    sources, config = open_sources([folder])
    assert config == replace(decoder_config(root / "one/config.json"))
    expected = load_file(root / "one/model.safetensors")
    assert set(sources.folders[0].entries) == set(expected)
    for name, values in stored_tensors(load_stored(sources, config), config):
        np.testing.assert_array_equal(values, expected[name])
    # Messages speak of the file's own keys.
    write_gguf(tmp_path / "heads.gguf", root / "one", heads=5)
    with pytest.raises(InputError, match=r"heads\.gguf: .*32 is not a multiple of toy-ggml\.attention\.head_count"):
        resolve_model("test", str(tmp_path / "heads.gguf"), Path())
    write_gguf(tmp_path / "mlp.gguf", root / "one", mlp=96)
    with pytest.raises(InputError, match=r"up\.weight has shape \[96, 32\]; by toy-ggml\.embedding_length it"):
        resolve_model("test", str(tmp_path / "mlp.gguf"), Path())
    # Without names it must be one that the package gguf knows.
    nameless = replace(TOY, gguf=Gguf("toy-ggml", read_gguf_settings))
    monkeypatch.setitem(registry._registry(), "toy", nameless)
    write_gguf(tmp_path / "nameless.gguf", root / "two")
    with pytest.raises(InputError, match=r"whose tensors the package gguf does not know; expected gguf\.names"):
        resolve_model("test", str(tmp_path / "nameless.gguf"), Path())


def test_no_architecture_is_named_outside_of_the_families() -> None:
    package = Path(registry.__file__).resolve().parent.parent
    families, named = package / "models/families", set[tuple[str, str]]()
    model_types = {path for path in registry.model_types() if path != "toy"}
    # Benchmarks write configs of models that they make.
    makers = {*families.rglob("*.py"), *(package / "benchmarks").rglob("*.py")}
    for file in set(package.rglob("*.py")) - makers:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in model_types:
                named.add((file.name, node.value))
    assert named == OTHER_MEANINGS


def test_what_an_architecture_must_say(root: Path) -> None:
    assert register_architecture(TOY) is TOY
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register_architecture(replace(TOY))
    wrong = {
        "two leaves are named 'q'": (*TOY.leaves, Leaf("q", "q.{layer}.weight", "attention", SQUARE, LAYERS)),
        "has no leaf 'embed'": LAYER,
        "no leaf has writes_residual": tuple(replace(leaf, writes_residual=False) for leaf in TOY.leaves),
        "leaf 'x': component 'mixer'; expected one of attention, mlp, norm": (
            *TOY.leaves, Leaf("x", "x.{layer}", "mixer", HIDDEN, LAYERS),
        ),
        "leaf 'x': expected {layer} in the tensor's name": (*TOY.leaves, Leaf("x", "x.{layer}", "norm", HIDDEN)),
    }  # fmt: skip
    for said, leaves in wrong.items():
        with pytest.raises(ValueError, match=f"architecture toy: {said}"):
            replace(TOY, leaves=leaves)
    with pytest.raises(ValueError, match=r"architecture toy: gguf\.names lacks the leaves k, v"):
        replace(TOY, gguf=replace(GGUF, names={name: GGUF.names[name] for name in GGUF.names.keys() - {"k", "v"}}))
    with pytest.raises(ValueError, match="filters: expected one for each of attention, embed"):
        replace(TOY, filters={"attention": "attn"})


def test_the_bank_holds_several_stacks(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an architecture with a second stack, of another depth and with leaves of its own."""
    deep = Leaf("gain", "transformer.deep.{layer}.weight", "norm", HIDDEN, "deep")
    both = replace(TOY, model_type="both", leaves=(*TOY.leaves, deep), further_stacks=lambda c: {"deep": (0, 1)},
                   read_config=lambda hf: replace(read_config(hf), architecture="both"), gguf=None)  # fmt: skip
    monkeypatch.setitem(registry._registry(), "both", both)
    for seed, name in enumerate(("one", "two")):
        folder = write_model(tmp_path / name, seed, SETTINGS | {"model_type": "both"})
        gains = {f"transformer.deep.{i}.weight": np.full(32, 10.0 * seed + i, np.float32) for i in range(2)}
        save_file(load_file(folder / "model.safetensors") | gains, folder / "model.safetensors")
    sources, config = open_sources([tmp_path / "one", tmp_path / "two"])
    spec = MergeSpec("linear", METHODS["linear"].options, 0, "float32")
    bank = load_bank(sources, config, spec)
    assert {stack: {leaf.sources.shape[:2] for leaf in leaves.values()} for stack, leaves in bank.stacks.items()} == {
        LAYERS: {(3, 2)}, "deep": {(2, 2)},
    }  # fmt: skip
    # In the other stack's norms all of the second model, else half of each.
    halves, second = jnp.full(2, 0.5), jnp.array([0.0, 1.0])
    recipe = Recipe(
        {
            LAYERS: {"weight": jnp.broadcast_to(halves, (3, 3, 2))},
            "deep": {"weight": jnp.broadcast_to(second, (2, 3, 2))},
        },
        {name: {"weight": halves} for name in bank.shared},
    )
    merged = dict(stored_tensors(LazyMerge.of(bank, recipe, spec).materialise(), config))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(merged) == set(one)
    for name, values in merged.items():
        expected = two[name] if "deep" in name else (one[name] + two[name]) / 2
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_an_unknown_model_type_is_told_the_nearest(root: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", 0, SETTINGS | {"model_type": "toys"})
    with pytest.raises(InputError) as raised:
        decoder_config(folder / "config.json")
    known = ", ".join(registry.model_types())
    assert known.startswith("apertus, arcee, cohere, ") and known.endswith(", toy")
    assert str(raised.value).endswith(
        f"config.json: model_type is 'toys' (did you mean 'toy'?); expected one of {known}"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_head": 0}, "n_head: 0; expected a whole number from 1 to 2,147,483,647"),
        ({"n_head": None}, "n_head: missing; expected a whole number"),
        ({"n_head": 5}, "width: 32 is not a multiple of n_head: 5"),
        ({"scale_emb": 12.0}, "scale_emb: 12.0 changes the forward pass of another family; a toy does not read it"),
    ],
)
def test_its_config_is_checked(root: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    settings = {key: value for key, value in (SETTINGS | changes).items() if value is not None}
    folder = write_model(tmp_path / "model", 0, settings)
    with pytest.raises(InputError, match=said):
        decoder_config(folder / "config.json")
