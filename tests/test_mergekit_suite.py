"""What the tests of mergekit say of whole merges, of models that transformers writes: every recipe is merged by both
programs, and the tensors are compared. Of methods that draw at random the models alone.

Tokens and chat templates are in test_tokens.py and test_parity.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.files import read_json
from helpers.mergekit import assert_same_tensors, merge_by_mergekit
from helpers.models import state
from safetensors.torch import load_file

from evojax_merge.errors import InputError
from evojax_merge.mergekit.execute import merge_to, prepare
from evojax_merge.mergekit.schema import parse_recipe

TEXT = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3,
          "intermediate_size": 28}  # fmt: skip


def llava_config() -> Any:
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT)
    return transformers.LlavaConfig(vision_config=vision, text_config=text)


def gpt2_config() -> Any:
    return transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, n_positions=16, vocab_size=24, bos_token_id=1, eos_token_id=2
    )


def t5_config() -> Any:
    return transformers.T5Config(
        d_model=16, d_kv=8, d_ff=20, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=24,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip


FAMILIES: Mapping[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, lambda: transformers.LlamaConfig(**TEXT)),
    "granite": (transformers.GraniteForCausalLM, lambda: transformers.GraniteConfig(**TEXT)),
    "gpt2": (transformers.GPT2LMHeadModel, gpt2_config),
    "llava": (transformers.LlavaForConditionalGeneration, llava_config),
    "t5": (transformers.T5ForConditionalGeneration, t5_config),
    "mixtral": (transformers.MixtralForCausalLM, lambda: transformers.MixtralConfig(
        **TEXT, num_key_value_heads=1, num_local_experts=2
    )),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of each family, called after it: read only. `mergekit` holds the same with the names that tensors
    have in transformers' models: under those of files mergekit finds no text decoder in a LLaVA."""
    root = tmp_path_factory.mktemp("mergekit")
    for family, (kind, config) in FAMILIES.items():
        for seed, name in enumerate("abc"):
            torch.manual_seed(seed)
            model = kind(config())
            model.save_pretrained(root / f"{family}_{name}")
            model.save_pretrained(root / "mergekit" / f"{family}_{name}", save_original_format=False)
    return root


def merged(document: dict[str, Any], out: Path) -> Path:
    merge_to(prepare(parse_recipe(Path("recipe.yaml"), document)), out, card="")
    return out


def of_two(method: str, base: str | None = None, weights: bool = True, **parameters: Any) -> dict[str, Any]:
    """A recipe of the models a and b."""
    rows = [
        {"model": name} | ({"parameters": {"weight": w}} if weights else {}) for name, w in (("a", 0.6), ("b", 0.4))
    ]
    document: dict[str, Any] = {"merge_method": method, "models": rows, "dtype": "float32"}
    return (
        document | ({} if base is None else {"base_model": base}) | ({"parameters": parameters} if parameters else {})
    )


def nuslerps() -> dict[str, dict[str, Any]]:
    cancelling = of_two("nuslerp", "c", nuslerp_row_wise=False, nuslerp_flatten=False)
    for row, weight in zip(cancelling["models"], (-0.5, 0.5), strict=True):
        row["parameters"] = {"weight": weight}
    rows = {"nuslerp of weights that cancel": cancelling}
    for base in (None, "c"):
        for flatten, row_wise in ((True, False), (False, False), (False, True)):
            name = f"nuslerp {'flat' if flatten else 'by columns' if row_wise else 'by rows'}"
            document = of_two("nuslerp", base, nuslerp_row_wise=row_wise, nuslerp_flatten=flatten)
            rows[f"{name}, {'deltas' if base else 'tensors'}"] = document
    return rows


COPY: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": "a"}]}
GRADIENT = of_two("task_arithmetic", "c") | {"parameters": {"lambda": [0.0, 1.0, 0.3]}}
LLAMA: dict[str, dict[str, Any]] = {
    **nuslerps(),
    "passthrough of a scale": COPY | {"parameters": {"scale": [{"filter": "o_proj", "value": 0}, {"value": 1}]}},
    "linear": of_two("linear"),
    "slerp": of_two("slerp", "a", weights=False, t=[0.2, 0.9]),
    "task_arithmetic": of_two("task_arithmetic", "c"),
    "breadcrumbs": of_two("breadcrumbs", "c"),
    "ties": of_two("ties", "c", density=0.3),
    "sce": of_two("sce", "c", weights=False, select_topk=0.5),
    "ram": of_two("ram", "c", weights=False),
    "ramplus_tl": of_two("ramplus_tl", "c", weights=False, r=0.05, alpha=1.0, epsilon=0.01),
    "multislerp": of_two("multislerp", "c"),
    "model_stock": of_two("model_stock", "c", weights=False),
    "model_stock by rows": of_two("model_stock", "c", weights=False, filter_wise=True),
    "nearswap": of_two("nearswap", "a", weights=False, t=0.0001),
    "karcher": of_two("karcher", weights=False, max_iter=5, tol=1e-5),
}
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "granite": {name: LLAMA[name] for name in ("linear", "slerp")} | {"copy": COPY},
    "gpt2": {
        "twice": {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 3]}]}] * 2},
    },
    # Convolutions, and two stacks of unlike depth, of which each has the whole gradient.
    "llava": {
        name: LLAMA[name]
        for name in ("linear", "slerp", "breadcrumbs", "ties", "model_stock", "model_stock by rows", *nuslerps())
        if "columns" not in name
    } | {"gradient": GRADIENT},
    # Layers whose parts are numbered, and experts.
    "t5": {"gradient": GRADIENT},
    "mixtral": {"gradient": GRADIENT},
}  # fmt: skip
RECIPES = {
    f"{family}: {name}": (family, document)
    for family, documents in ({"llama": LLAMA} | OTHERS).items()
    for name, document in documents.items()
}


def named(value: Any, root: Path, family: str) -> Any:
    """The recipe with the family's models in place of a, b and c."""
    if isinstance(value, dict):
        return {
            key: str(root / f"{family}_{entry}") if key in ("model", "base_model") else named(entry, root, family)
            for key, entry in value.items()
        }
    return [named(entry, root, family) for entry in value] if isinstance(value, list) else value


def tensors_of(folder: Path, family: str) -> dict[str, np.ndarray]:
    """By the names that transformers' model has for them, whatever those of the file."""
    model, told = FAMILIES[family][0].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"]
    return {name: values.numpy() for name, values in model.state_dict().items()}


@pytest.mark.parametrize("case", RECIPES)
def test_the_models_are_mergekit_s(case: str, models: Path, tmp_path: Path) -> None:
    family, document = RECIPES[case]
    found = merged(named(document, models, family), tmp_path / "ours")
    expected = merge_by_mergekit(named(document, models / "mergekit", family), tmp_path / "theirs")
    one, other = tensors_of(found, family), tensors_of(expected, family)
    assert_same_tensors(one, other, rtol=1e-4, atol=2e-6)
    config = read_json(found / "config.json")
    if family == "gpt2":
        assert config["n_layer"] == (6 if "slices" in document else 3)


def test_each_expert_is_trimmed_by_itself_however_experts_are_stored(models: Path, tmp_path: Path) -> None:
    """Each as a tensor of its own, or all of a layer's as one; mergekit trims all of a layer's at once."""
    document = of_two("ties", "c", density=0.3)
    one = merged(named(document, models, "mixtral"), tmp_path / "apart")
    other = merged(named(document, models / "mergekit", "mixtral"), tmp_path / "fused")
    assert state(models / "mixtral_a").keys() != state(models / "mergekit" / "mixtral_a").keys()
    expected = tensors_of(one, "mixtral")
    assert_same_tensors(tensors_of(other, "mixtral"), expected)


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize(
    "document",
    [
        of_two("dare_ties", "c", density=0.66), of_two("della", "c", density=0.66, epsilon=0.05, **{"lambda": 0.5}),
        of_two("arcee_fusion", "a", weights=False),
    ],
    ids=lambda document: document["merge_method"],
)  # fmt: skip
def test_what_is_drawn_at_random_or_measured_closely_is_a_model(
    family: str, document: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    """In bfloat16, with every tensor of the base, and some entries of it."""
    found = merged(named(document | {"dtype": "bfloat16"}, models, family), tmp_path / "ours")
    values = load_file(found / "model.safetensors")
    base = load_file(models / f"{family}_{document['base_model']}" / "model.safetensors")
    assert set(values) == set(base)
    changed = total = 0
    for name, tensor in values.items():
        assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all()
        changed += int((tensor != base[name].bfloat16()).sum())
        total += tensor.numel()
    assert 0 < changed < total


def test_an_epsilon_beyond_the_density_is_refused_as_by_mergekit(models: Path, tmp_path: Path) -> None:
    document = named(of_two("della", "c", density=0.66, epsilon=1.35), models, "llama")
    with pytest.raises(ValueError, match="psilon"):
        merge_by_mergekit(document, tmp_path / "theirs")
    with pytest.raises(InputError, match="epsilon"):
        merged(document, tmp_path / "ours")


def test_a_scale_of_zero_is_zero(models: Path, tmp_path: Path) -> None:
    found = state(merged(named(LLAMA["passthrough of a scale"], models, "llama"), tmp_path / "ours"))
    for name, values in found.items():
        assert (not values.any()) == ("o_proj" in name), name
