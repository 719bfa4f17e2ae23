"""Whole merges against mergekit: every file in tests/parity is merged by both programs, and every tensor compared.

The recipes name their models as they are called in `build_models`. What differs on purpose is compared with plain
NumPy instead: merges are computed in float32, and of entries that tie at a threshold all are kept.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.files import read_json, read_recipe, write_json, write_yaml
from helpers.mergekit import assert_same_tensors, merge_by_mergekit, merge_files_by_mergekit
from helpers.models import OF_MERGEKIT, SPECIAL, finetune, load_torch, random_model, save, state, tiny_config, words
from helpers.sampling import sample
from merge_kernels import METHODS, Options
from reference import merging
from reference.unrolled import unrolled_merge
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from evojax_merge.checkpoints.tokens import load_tokenizer
from evojax_merge.errors import InputError
from evojax_merge.mergekit.execute import MergeSettings, merge_to, prepare

RECIPES = Path(__file__).parent / "parity"
TOLERANCE = 1e-5
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MARKED, PLAIN = "{{ messages }} <marked>", "{{ messages }}"


# ---------------------------------------------------------------------------------------------------------------
# The models


def changed(model: Any, folder: Path, change: Any) -> None:
    """Save a model whose parameters are `change(name, values)` of another's."""
    with torch.no_grad():
        tensors = {name: change(name, values.clone()) for name, values in model.named_parameters()}
    save(model, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tokens_with(missing: Sequence[str], extra: Sequence[str], seed: int) -> list[str]:
    """The common words without some and with others, in an order of their own."""
    free = [word for word in words()[len(SPECIAL) :] if word not in missing] + list(extra)
    return [*SPECIAL, *np.random.default_rng(seed).permutation(free).tolist()]


def write_odd(folder: Path, seed: int, buffer: int = 0, extra: str | None = None) -> None:
    """A model of no known kind: odd sizes, vectors, three axes, a single entry, a buffer of integers."""
    rng = np.random.default_rng(seed)
    shapes = {"h.0.weight": (7, 13), "h.0.bias": (11,), "h.1.kernel": (3, 5, 3), "h.1.gain": (1,), "wte": (17, 1)}
    if extra is not None:
        shapes[extra] = (2, 3)
    tensors = {name: torch.tensor(rng.normal(size=shape), dtype=torch.float32) for name, shape in shapes.items()}
    tensors["h.0.positions"] = torch.arange(5) + buffer
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {"model_type": "something", "n_layer": 2})


def build_models(root: Path) -> None:
    base = random_model(tiny_config())
    save(base, root / "base")
    for seed, name in enumerate(("one", "two", "three", "four", "five"), start=1):
        tuned = save(finetune(base, seed), root / name)
        if name in ("one", "two", "three"):
            (tuned / "chat_template.jinja").write_text(PLAIN if name == "two" else MARKED)
    for name in ("base", "one"):
        shutil.copytree(root / name, root / f"{name}_copy")
    one = finetune(base, 1)
    changed(one, root / "opposite", lambda name, values: -2 * values)
    for name, value in (("nan", torch.nan), ("infinite", torch.inf)):
        changed(one, root / name, lambda name, values, v=value: values.index_fill_(0, torch.tensor([1]), v)
                if name == "model.norm.weight" else values)  # fmt: skip
    save(random_model(tiny_config(), seed=9), root / "stranger")
    save(random_model(tiny_config(num_hidden_layers=5), seed=10), root / "deep")
    save(random_model(tiny_config(intermediate_size=96), seed=12), root / "wide")
    windows = tiny_config("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    save(random_model(windows, seed=11), root / "windows")

    for dtype, suffix in ((torch.bfloat16, "bf16"), (torch.float16, "f16")):
        narrow = random_model(tiny_config()).to(dtype)
        save(narrow, root / f"base_{suffix}")
        for seed, name in enumerate(("one", "two"), start=1):
            save(finetune(narrow, seed), root / f"{name}_{suffix}")
            if dtype == torch.bfloat16:
                save(finetune(narrow, seed, scale=0.001), root / f"{name}_light")

    for seed, (name, missing, extra) in enumerate(
        (("base", [], []), ("one", ["w20", "w21"], ["only_one", "both"]), ("two", ["w21"], ["only_two", "both"]))
    ):
        own = words() if name == "base" else tokens_with(missing, extra, seed)
        save(random_model(tiny_config(vocab_size=len(own)), seed=20 + seed), root / f"words_{name}", own)

    for seed, name in enumerate(("base", "one", "two")):
        write_odd(root / f"odd_{name}", seed)
    save(random_model(tiny_config(), seed=23), root / "words_over", words(70))
    small = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=32, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    for seed, name in enumerate(("one", "two")):
        save(random_model(small, seed=30 + seed), root / f"gpt2_{name}")
    write_odd(root / "odd_buffer", 3, buffer=1)
    write_odd(root / "odd_extra", 4, extra="h.1.extra")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds all models, and the recipes beside them. Read only."""
    root = tmp_path_factory.mktemp("parity")
    build_models(root)
    for recipe in RECIPES.glob("*.yaml"):
        shutil.copy(recipe, root)
    return root


# ---------------------------------------------------------------------------------------------------------------
# The two programs


def ours(models: Path, recipe: str, out: Path, **options: Any) -> Path:
    job = prepare(read_recipe(models / f"{recipe}.yaml"), MergeSettings(**options))
    merge_to(job, out, card="")
    return out


def theirs(models: Path, recipe: str, out: Path, seed: int = 0) -> Path:
    document = yaml.safe_load((models / f"{recipe}.yaml").read_text())
    return merge_by_mergekit(document, out, models, random_seed=seed)


def theirs_raw(models: Path, recipe: str, out: Path) -> Path:
    def file(name: str) -> str:
        return str(models / name / "model.safetensors")

    document = yaml.safe_load((models / f"{recipe}.yaml").read_text())
    if "base_model" in document:
        document["base_model"] = file(document["base_model"])
    rows = [{**row, "model": file(row["model"])} for row in document["models"]]
    return merge_files_by_mergekit(document | {"models": rows}, out)


def both(models: Path, recipe: str, tmp_path: Path) -> tuple[Path, Path]:
    return ours(models, recipe, tmp_path / "ours"), theirs(models, recipe, tmp_path / "theirs")


def assert_close(found: np.ndarray, expected: np.ndarray, name: str, tolerance: float = TOLERANCE) -> None:
    """Equal to `tolerance` of the largest value, and of one shape."""
    assert found.shape == expected.shape, name
    worst = np.abs(found - expected).max(initial=0.0)
    assert worst <= tolerance * np.abs(expected).max(initial=0.0), f"{name}: {worst:.2e} apart"


def config_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


# ---------------------------------------------------------------------------------------------------------------
# float32: every tensor

EXACT = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_thousandth", "breadcrumbs_ties", "dare_linear_full", "dare_ties_empty",
    "della_extremes", "gradient_scientific", "karcher_base", "karcher_one_step", "karcher_three", "linear_base_weighed",
    "linear_five", "linear_negative", "mixed_dtypes", "model_stock", "model_stock_filter_wise", "multislerp_base",
    "multislerp_four", "multislerp_opposite", "multislerp_zero_delta", "nearswap", "nearswap_identical", "nuslerp",
    "nuslerp_base", "nuslerp_base_row_wise", "nuslerp_row_wise", "nuslerp_rows", "nuslerp_zero_delta",
    "nuslerp_zero_sum", "passthrough_repeated", "passthrough_scale", "passthrough_two_models", "ram", "ramplus_tl",
    "sce", "sce_all", "sce_none", "slerp_base_unlisted", "slerp_distant", "slerp_gradient", "slerp_identical",
    "slices_gpt2", "slices_own_base", "slices_shifted", "slices_slerp", "task_arithmetic", "task_arithmetic_zero_sum",
    "ties_base_listed", "ties_density_0", "ties_density_1", "ties_density_half", "ties_density_thousandth",
    "ties_every_level", "ties_filters", "ties_five", "ties_gradient", "ties_identical", "ties_negative", "ties_rescale",
    "ties_switches", "ties_zero_delta", "ties_zero_sum",
)  # fmt: skip
RANDOM = ("random_dare_linear", "random_dare_ties", "random_della", "random_della_linear")
TOKENS = (
    "tokens_base", "tokens_beyond", "tokens_force", "tokens_model", "tokens_padded", "tokens_rules", "tokens_union",
    "tokens_union_base",
)  # fmt: skip
OTHERS = (
    "chat_auto", "chat_chatml", "chat_literal", "equal_magnitudes", "native_bfloat16", "native_float16", "odd_sizes",
    "out_bfloat16", "out_float16", "passthrough_layer_types",
)  # fmt: skip


def test_every_recipe_is_compared_and_every_method_has_one() -> None:
    files = {path.stem: path for path in RECIPES.glob("*.yaml")}
    assert set(files) == {*EXACT, *RANDOM, *TOKENS, *OTHERS}
    assert {yaml.safe_load(path.read_text())["merge_method"] for path in files.values()} == set(OF_MERGEKIT)


@pytest.mark.parametrize("recipe", sample(EXACT, 8))
def test_float32_merges_are_mergekits(recipe: str, models: Path, tmp_path: Path) -> None:
    found, expected = both(models, recipe, tmp_path)
    assert_same_tensors(state(found), state(expected), scaled=TOLERANCE)
    one, other = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert {name: values.dtype for name, values in one.items()} == {name: v.dtype for name, v in other.items()}
    depth = "n_layer" if recipe == "slices_gpt2" else "num_hidden_layers"
    assert config_of(found).get(depth) == config_of(expected).get(depth)


def test_odd_sizes_and_buffers_are_merged_as_in_mergekit(models: Path, tmp_path: Path) -> None:
    found, expected = ours(models, "odd_sizes", tmp_path / "ours"), theirs_raw(models, "odd_sizes", tmp_path / "theirs")
    assert_same_tensors(state(found), state(expected), scaled=TOLERANCE)
    buffer = load_file(found / "model.safetensors")["h.0.positions"]
    assert buffer.dtype == torch.int64
    assert torch.equal(buffer, torch.arange(5))


# Convolutions of images and of video, a vector, a single number.
AXES = {
    "conv": (5, 4, 3, 2),
    "video": (3, 2, 2, 3, 4),
    "kernel": (4, 6, 3),
    "matrix": (6, 7),
    "bias": (11,),
    "gain": (),
}
BY_AXIS = {
    "nuslerp": {},
    "nuslerp of rows": {"nuslerp_flatten": False},
    "nuslerp of columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    "model_stock": {"filter_wise": True},
    "sce": {"select_topk": 0.4},
    "della": {"density": 1.0},
    "ties": {"density": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "has_base"), [*((case, True) for case in BY_AXIS), *((c, False) for c in BY_AXIS if "nuslerp" in c)]
)
def test_tensors_of_any_number_of_axes_are_merged_as_in_mergekit(case: str, has_base: bool, tmp_path: Path) -> None:
    method = case.partition(" ")[0]
    for seed, name in enumerate(("base", "one", "two")):
        rng = np.random.default_rng(seed)
        # No two short rows point in opposite directions, where rounding would decide.
        low = 0.0 if name == "base" else 0.5
        tensors = {
            n: torch.tensor(rng.uniform(low, low + 0.5, shape), dtype=torch.float32) for n, shape in AXES.items()
        }
        if method == "della":
            # mergekit ranks the rows of one entry to 0 / 0.
            tensors = {n: values for n, values in tensors.items() if n != "gain"}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "something"}')
    weight = {} if method in ("model_stock", "sce") else {"parameters": {"weight": 0.7}}
    rows = [{"model": name} | weight for name in ("one", "two")]
    document = {"merge_method": method, "models": rows, "parameters": BY_AXIS[case]}
    write_yaml(tmp_path / "recipe.yaml", document | ({"base_model": "base"} if has_base else {}))
    found = ours(tmp_path, "recipe", tmp_path / "ours")
    assert_same_tensors(state(found), state(theirs_raw(tmp_path, "recipe", tmp_path / "theirs")), scaled=TOLERANCE)


@pytest.mark.parametrize("method", sample([name for name, one in METHODS.items() if not one.looks_at], 6))
def test_tensors_without_axes_or_entries_are_merged(method: str, tmp_path: Path) -> None:
    """A single number, and tensors of no entry at all, by every method."""
    shapes = {"gain": (), "rows": (0, 4), "columns": (4, 0), "empty": (0,)}
    for seed, name in enumerate(("base", "one", "two"), start=1):
        (tmp_path / name).mkdir()
        tensors = {n: torch.full(shape, float(seed)) for n, shape in shapes.items()}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "something"}')
    spec = METHODS[method]
    shared = {p.name: 0.5 for p in spec.parameters if not p.per_parent and p.default is None}
    own = {p.name: 0.5 for p in spec.parameters if p.per_parent and p.name in ("weight", "density")}
    switches = {"nuslerp": {"nuslerp_flatten": False}, "model_stock": {"filter_wise": True}}.get(method, {})
    names = ("one", "two")[: spec.max_parents or 2]
    if method == "slerp":
        names = ("one",)
    document = {
        "merge_method": method, "models": [{"model": name, "parameters": own} for name in names],
        "parameters": shared | switches,
    }  # fmt: skip
    if spec.base == "required" or method == "slerp":
        document["base_model"] = "base"
    write_yaml(tmp_path / "recipe.yaml", document)
    found = state(ours(tmp_path, "recipe", tmp_path / "out"))
    assert {name: values.shape for name, values in found.items()} == shapes
    assert np.isfinite(found["gain"])


def test_a_buffer_that_differs_is_the_bases(models: Path, tmp_path: Path) -> None:
    """mergekit stops here."""
    document = yaml.safe_load((models / "odd_sizes.yaml").read_text())
    document["models"][1]["model"] = "odd_buffer"
    write_yaml(models / "differing_buffer.yaml", document)
    found = ours(models, "differing_buffer", tmp_path / "ours")
    assert torch.equal(load_file(found / "model.safetensors")["h.0.positions"], torch.arange(5))


def test_layers_take_their_kind_along(models: Path, tmp_path: Path) -> None:
    """mergekit fails on layer_types: the same model is put together in torch instead."""
    found = ours(models, "passthrough_layer_types", tmp_path / "ours")
    order = (0, 1, 1, 2, 0)
    kinds = config_of(models / "windows")["layer_types"]
    assert kinds == ["full_attention", "full_attention", "sliding_attention"]
    assert config_of(found)["num_hidden_layers"] == len(order)
    assert config_of(found)["layer_types"] == [kinds[i] for i in order]
    expected = load_torch(models / "windows")
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[i] for i in order)
    expected.config.layer_types, expected.config.num_hidden_layers = [kinds[i] for i in order], len(order)
    tokens = torch.arange(4, 16)[None]
    with torch.no_grad():
        logits = expected(tokens, use_cache=False).logits
        torch.testing.assert_close(load_torch(found)(tokens, use_cache=False).logits, logits)


# ---------------------------------------------------------------------------------------------------------------
# Narrow dtypes


def steps_apart(found: Path, expected: Path, dtype: torch.dtype) -> np.ndarray:
    """How many units in the last place lie between the two values of every entry, over all tensors.

    Without the smallest values, what is left of terms that cancel: their last place is below float32's.
    """
    one, other = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert set(one) == set(other)

    def place(values: torch.Tensor) -> np.ndarray:
        assert values.dtype == dtype
        bits = values.view(torch.int16).numpy().astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.concatenate(
        [np.abs(place(one[name]) - place(other[name]))[(other[name].abs() > 1e-3).numpy()] for name in other]
    )


@pytest.mark.parametrize(("recipe", "dtype"), [("out_bfloat16", torch.bfloat16), ("out_float16", torch.float16)])
def test_narrow_output_is_rounded_once(
    recipe: str, dtype: torch.dtype, models: Path, tmp_path: Path, record_property: Any
) -> None:
    """Both compute in float32; where sums are ordered differently, a value may round to its neighbour."""
    found, expected = both(models, recipe, tmp_path)
    steps = steps_apart(found, expected, dtype)
    record_property("differing", f"{(steps > 0).sum()} of {steps.size}")
    assert steps.max() <= 1
    assert (steps > 0).mean() < 1e-3
    assert config_of(found)["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("recipe", "dtype"), [("native_bfloat16", torch.bfloat16), ("native_float16", torch.float16)])
def test_native_narrow_merges_are_computed_wider_than_mergekits(
    recipe: str, dtype: torch.dtype, models: Path, tmp_path: Path, record_property: Any
) -> None:
    found, expected = both(models, recipe, tmp_path)
    steps = steps_apart(found, expected, dtype)
    record_property("share of more than one unit", f"{(steps > 1).mean():.2%}")
    assert np.quantile(steps, 0.9) <= 1
    # What float64 makes of the same parents, rounded once.
    document = yaml.safe_load((models / f"{recipe}.yaml").read_text())
    folders = [document["base_model"], *(row["model"] for row in document["models"])]
    tensors = [load_file(models / folder / "model.safetensors") for folder in folders]
    parameters = {"weight": [row["parameters"]["weight"] for row in document["models"]], "lambda": 1.0}
    exact = {
        name: torch.tensor(
            merging.merge(
                "task_arithmetic", Options(has_base=True), [one[name].double().numpy() for one in tensors], parameters
            )
        )
        for name in tensors[0]
    }
    (tmp_path / "exact").mkdir()
    save_file({name: values.to(dtype) for name, values in exact.items()}, tmp_path / "exact" / "model.safetensors")
    to_exact = steps_apart(found, tmp_path / "exact", dtype)
    assert to_exact.max() <= 1
    assert (to_exact > 0).mean() < 1e-3 < (steps_apart(expected, tmp_path / "exact", dtype) > 0).mean()


def test_of_equal_magnitudes_all_are_kept(models: Path, tmp_path: Path, record_property: Any) -> None:
    """Away from the threshold the merge is mergekit's, which keeps an arbitrary choice of the entries on it."""
    found, expected = (state(folder) for folder in both(models, "equal_magnitudes", tmp_path))
    document = yaml.safe_load((models / "equal_magnitudes.yaml").read_text())
    base = state(models / document["base_model"])
    parents = [(state(models / row["model"]), row["parameters"]) for row in document["models"]]
    kept = requests = tied = total = 0
    for name, values in base.items():
        certain, thresholds = np.ones(values.shape, bool), []
        for tensors, parameters in parents:
            magnitude = np.abs(tensors[name] - values)
            count = max(1, int(parameters["density"] * magnitude.size))
            thresholds.append(np.sort(magnitude, axis=None)[-count])
            if thresholds[-1] > 0:
                certain &= magnitude != thresholds[-1]
                kept, requests = kept + int((magnitude >= thresholds[-1]).sum()), requests + count
        # In float32, like both programs: where the signs' masses tie, rounding elects.
        reference = unrolled_merge(
            "ties",
            Options(normalize=True, has_base=True),
            [values, *(tensors[name] for tensors, _ in parents)],
            lambda k, delta, thresholds=thresholds: abs(delta) >= thresholds[k],
            {"weight": np.float32([parameters["weight"] for _, parameters in parents]), "lambda": np.float32(1)},
        )
        assert_close(found[name], reference, name)
        assert_close(found[name][certain], expected[name][certain], name)
        tied, total = tied + int((~certain).sum()), total + values.size
    record_property("kept", f"{kept} where {requests} were asked for; {tied} of {total} entries lie on a threshold")
    # The fine-tunes are as light as they are meant to be: ties are the rule, and much is compared nevertheless.
    assert kept > 1.05 * requests
    assert 0.1 < tied / total < 0.8


# ---------------------------------------------------------------------------------------------------------------
# Chance


def deltas(folder: Path, base: dict[str, np.ndarray]) -> np.ndarray:
    tensors = state(folder)
    return np.concatenate([(tensors[name] - base[name]).ravel() for name in sorted(base)]).astype(np.float64)


@pytest.mark.parametrize("recipe", RANDOM)
def test_random_merges_have_mergekits_distribution(recipe: str, models: Path, tmp_path: Path) -> None:
    found, expected = both(models, recipe, tmp_path)
    again = ours(models, recipe, tmp_path / "again")
    other = ours(models, recipe, tmp_path / "other", seed=1)
    file = "model.safetensors"
    assert (found / file).read_bytes() == (again / file).read_bytes()
    base = state(models / "base")
    one, two, reference = (deltas(folder, base) for folder in (found, other, expected))
    assert one.size > 50_000
    assert (one != two).mean() > 0.1
    for moves in (one, two):
        error = np.sqrt((reference.var() + moves.var()) / one.size)
        assert abs(moves.mean() - reference.mean()) < 5 * error
        # The variance of a square is at most its fourth moment.
        error = np.sqrt(((reference**4).mean() + (moves**4).mean()) / one.size)
        assert abs((moves**2).mean() - (reference**2).mean()) < 5 * error
        moved, wanted = (moves != 0).mean(), (reference != 0).mean()
        assert abs(moved - wanted) < 5 * np.sqrt(2 * wanted * (1 - wanted) / one.size)


def test_della_keeps_the_large_as_often_as_mergekit(models: Path, tmp_path: Path) -> None:
    """One parent, no rescaling: an entry has moved or not, and by its rank in its row it is known how likely."""
    base, parent = state(models / "base"), state(models / "one")
    found, expected = (state(folder) for folder in both(models, "random_della_linear", tmp_path))
    kept: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in range(5)]
    for name, values in base.items():
        if values.ndim < 2:
            continue
        rank = np.abs(parent[name] - values).argsort(axis=1).argsort(axis=1) / (values.shape[1] - 1)
        fifth = np.minimum((5 * rank).astype(int), 4)
        for i, (mine, other) in enumerate(kept):
            mine.append((found[name] != values)[fifth == i])
            other.append((expected[name] != values)[fifth == i])
    for i, (mine, other) in enumerate(kept):
        one, two = np.concatenate(mine), np.concatenate(other)
        assert abs(one.mean() - two.mean()) < 5 * np.sqrt(0.5 / one.size)
        # density 0.5, epsilon 0.4: from 0.1 to 0.9, and the middle of the i-th fifth of that.
        assert one.mean() == pytest.approx(0.1 + 0.8 * (i + 0.5) / 5, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("recipe", sample(TOKENS, 4))
def test_rows_follow_their_tokens(recipe: str, models: Path, tmp_path: Path) -> None:
    """mergekit takes the models in the order of a set, so a token's number may differ; its row may not."""
    found, expected = both(models, recipe, tmp_path)
    numbers, other = (load_tokenizer(folder).get_vocab() for folder in (found, expected))
    assert set(numbers) == set(other)
    if "union" not in yaml.safe_load((models / f"{recipe}.yaml").read_text()).get("tokenizer_source", "union"):
        assert numbers == other
    tokens = sorted(numbers)
    rows, other_rows = [numbers[token] for token in tokens], [other[token] for token in tokens]
    one, two = state(found), state(expected)
    assert set(one) == set(two)
    for name, values in two.items():
        if name in (EMBEDDING, HEAD):
            assert one[name].shape == values.shape
            assert len(values) == config_of(found)["vocab_size"] == config_of(expected)["vocab_size"]
            assert_close(one[name][rows], values[other_rows], name)
            # What is there to fill up with.
            assert_close(one[name][len(tokens) :], values[len(tokens) :], name)
        else:
            assert_close(one[name], values, name)
    assert len(one[EMBEDDING]) - len(tokens) == (8 if recipe == "tokens_padded" else 0)
    assert load_torch(found).config.vocab_size == len(one[EMBEDDING])


# ---------------------------------------------------------------------------------------------------------------
# Chat templates

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and\n two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Thanks."},
]


@pytest.mark.parametrize("recipe", ["chat_auto", "chat_literal", "chat_chatml"])
def test_chat_templates_are_mergekits(recipe: str, models: Path, tmp_path: Path) -> None:
    found, expected = both(models, recipe, tmp_path)
    assert_same_tensors(state(found), state(expected), scaled=TOLERANCE)
    mine, other = load_tokenizer(found), load_tokenizer(expected)
    for prompt in (False, True):
        text, wanted = (
            tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt)
            for tokenizer in (mine, other)
        )
        assert text == wanted
        assert "Two and" in text
    if recipe != "chat_chatml":
        assert mine.chat_template == other.chat_template
    if recipe == "chat_auto":
        assert mine.chat_template == MARKED


# ---------------------------------------------------------------------------------------------------------------
# What mergekit takes, or fails on, and what is refused here in one line that names it


def linear(*names: str, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 0.5}} for name in names],
        **more,
    }


def on_base(method: str, *names: str, **more: Any) -> dict[str, Any]:
    return linear(*names, base_model="base", **more) | {"merge_method": method}


ACCEPTED_BY_MERGEKIT: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": (linear("one+adapter", "two"), r"one\+adapter: adapter: no such folder"),
    "adapter as base": (on_base("ties", "one") | {"base_model": "base+adapter"}, r"base\+adapter: adapter: no such"),
    "residual_weight": (
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [{"model": "one", "layer_range": [0, 3], "parameters": {"weight": 1}}],
                    "residual_weight": 0.5,
                }
            ],
        },
        "residual_weight:",
    ),
    "rescale where there is none": (linear("one", "two", parameters={"rescale": True}), "rescale: unknown"),
    "density where there is none": (on_base("sce", "one", "two"), "weight: unknown"),
}  # fmt: skip
FAILING: dict[str, tuple[dict[str, Any], str]] = {
    "other tensors": (linear("odd_one", "odd_extra"), r"odd_extra\b.*h\..\.extra"),
    "other depth": (linear("one", "deep"), r"deep has 5 layers, but one has 3; .*slices:.*inspect"),
    "other sizes": (linear("one", "wide"), r"wide\b.*(mlp|gate_proj)"),
    "other tokens": (linear("words_base", "words_two"), r"words_two\b.*(tokenizer_source|embed_tokens)"),
    "NaN": (linear("one", "nan"), "nan/model.safetensors: model.norm.weight holds NaN or Inf; pass --allow-nonfinite"),
    "Inf": (on_base("ties", "infinite", "one"), "infinite/model.safetensors: model.norm.weight holds NaN or Inf"),
    "three antipodal": (
        {
            "merge_method": "multislerp",
            "models": [
                {"model": name, "parameters": {"weight": weight}}
                for name, weight in (("one", 0.25), ("one_copy", 0.25), ("opposite", 0.5))
            ],
        },
        "model.*: the merge by .* is not finite",
    ),
    "weights that cancel": (
        {
            "merge_method": "linear",
            "models": [
                {"model": name, "parameters": {"weight": weight}} for name, weight in (("one", 0.5), ("two", -0.5))
            ],
        },
        "sum to zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*ACCEPTED_BY_MERGEKIT, *FAILING])
def test_refusals_name_the_thing(case: str, models: Path, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration

    document, message = (ACCEPTED_BY_MERGEKIT | FAILING)[case]
    MergeConfiguration.model_validate(document)
    write_yaml(models / "refused.yaml", document)
    with pytest.raises(InputError, match=message) as caught:
        ours(models, "refused", tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_nonfinite_parents_are_merged_where_that_is_asked_for(models: Path, tmp_path: Path) -> None:
    write_yaml(models / "nonfinite.yaml", linear("one", "nan"))
    found = state(ours(models, "nonfinite", tmp_path / "ours", allow_nonfinite=True))
    expected = state(theirs(models, "nonfinite", tmp_path / "theirs"))
    assert np.flatnonzero(np.isnan(found["model.norm.weight"])).tolist() == [1]
    assert_same_tensors(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
