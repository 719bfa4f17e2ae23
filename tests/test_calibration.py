"""Methods that look at activations, against float64 formulas on what transformers computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import refusal, run_here
from helpers.families import Family, build_family
from helpers.files import write_lines, write_yaml
from helpers.models import even_records, load_torch, random_records, state, tiny_config, word_tokenizer, words
from helpers.sampling import sample
from helpers.searches import problem_of, search_config, task_section
from merge_kernels import METHODS, CombineInputs, combine, prepare

from evojax_merge.checkpoints import kept_vectors
from evojax_merge.checkpoints import moments as moments_module
from evojax_merge.errors import InputError
from evojax_merge.schema.yaml_reader import load_yaml

PROMPTS = [record["prompt"] for record in random_records(40, seed=11)]
NO_KEYS = np.zeros((0, 2), np.uint32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and two models that lie far from it, with `prompts.jsonl` and `more.jsonl`. Read only."""
    family = build_family(tmp_path_factory.mktemp("pair"), tiny_config(num_hidden_layers=2, tie_word_embeddings=True))
    write_lines(family.root / "prompts.jsonl", [{"text": prompt} for prompt in PROMPTS[:20]])
    write_lines(family.root / "more.jsonl", [{"text": prompt} for prompt in PROMPTS[20:]])
    return family


def tokens_of(prompts: list[str]) -> list[list[int]]:
    return [word_tokenizer(words())(prompt)["input_ids"] for prompt in prompts]


def covariances(model: Any, prompts: list[str], part: str = "") -> dict[str, np.ndarray]:
    """`Xᵀ X` float64 of the inputs of linear layers in blocks, by the weights' names, by hooks of torch. part: of the
    names of modules."""
    model, found = model.double(), dict[str, np.ndarray]()

    def hook(name: str) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).numpy()
            found[name] = found.get(name, 0.0) + x.T @ x

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and part in name:
            module.register_forward_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        for tokens in tokens_of(prompts):
            model(torch.tensor([tokens]))
    return found


def squared_gradients(folder: Path, prompts: list[str]) -> dict[str, np.ndarray]:
    """The mean squares of the gradients of each prompt's log-probability, by torch."""
    model, found = load_torch(folder).double(), dict[str, np.ndarray]()
    for tokens in tokens_of(prompts):
        model.zero_grad()
        logs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        logs[range(len(tokens) - 1), tokens[1:]].sum().backward()
        for name, values in model.named_parameters():
            found[name] = found.get(name, 0.0) + values.grad.numpy() ** 2 / len(prompts)
    return found


def regmean(models: list[np.ndarray], moments: list[np.ndarray | None], weights: Any, alpha: float) -> np.ndarray:
    if moments[0] is None:
        return sum(w * model for w, model in zip(weights, models, strict=True)) / len(models)
    shrunk = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in moments if g is not None]
    products = [w * model @ g for w, model, g in zip(weights, models, shrunk, strict=True)]
    return sum(products) @ np.linalg.inv(sum(shrunk))


def recipe_of(family: Family, method: str, base: bool = False, **changes: Any) -> dict[str, Any]:
    models = [
        {"model": str(parent), "parameters": {"weight": w}}
        for parent, w in zip(family.parents, (1.0, 0.8), strict=True)
    ]
    document = {
        "merge_method": method, "models": models, "dtype": "float32",
        "calibration": {"file": str(family.root / "prompts.jsonl"), "prompt": "{text}"},
    }  # fmt: skip
    return document | ({"base_model": str(family.base)} if base else {}) | changes


@pytest.mark.parametrize("base", [False, True])
def test_a_merge_by_regmean_is_that_of_hooks_and_float64(base: bool, pair: Family, tmp_path: Path) -> None:
    calibration = {"file": [str(pair.root / name) for name in ("prompts.jsonl", "more.jsonl")], "prompt": "{text}"}
    recipe = recipe_of(pair, "regmean", base, calibration=calibration, parameters={"alpha": 0.7})
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "out")
    merged, origin = state(tmp_path / "out"), state(pair.base)
    models = [state(parent) for parent in pair.parents]
    parts = (PROMPTS[:20], PROMPTS[20:])
    moments = [covariances(load_torch(folder), part) for folder, part in zip(pair.parents, parts, strict=True)]
    assert len(moments[0]) == 14 and set(moments[0]) < set(merged)
    for name, values in merged.items():
        start = origin[name].astype(np.float64) if base else 0.0
        deltas = [model[name].astype(np.float64) - start for model in models]
        expected = start + regmean(deltas, [each.get(name) for each in moments], (1.0, 0.8), 0.7)
        np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-4, err_msg=name)
    # It is not the average.
    name = "model.layers.1.mlp.down_proj.weight"
    average = sum(w * model[name] for w, model in zip((1.0, 0.8), models, strict=True)) / 2
    assert base or np.abs(merged[name] - average).max() > 0.01


def test_regmean_plusplus_reads_through_the_merged_layers(pair: Family, tmp_path: Path) -> None:
    """Each layer's inputs are those of the models whose earlier layers are merged."""
    recipe = recipe_of(pair, "regmean_plusplus")
    for model in recipe["models"]:
        model["parameters"] = {"weight": 1.0}
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / "out")
    merged, models = state(tmp_path / "out"), [state(parent) for parent in pair.parents]
    expected = {name: (models[0][name].astype(np.float64) + models[1][name]) / 2 for name in merged}
    for number in range(2):
        part, moments = f"layers.{number}.", []
        for parent, own in zip(pair.parents, models, strict=True):
            hybrid = load_torch(parent)
            tensors = {name: own[name] if part in name else values for name, values in expected.items()}
            hybrid.load_state_dict({name: torch.tensor(values) for name, values in tensors.items()}, strict=False)
            moments.append(covariances(hybrid, PROMPTS[:20], part))
        for name in moments[0]:
            deltas = [model[name].astype(np.float64) for model in models]
            expected[name] = regmean(deltas, [each[name] for each in moments], (1.0, 1.0), 0.9)
    for name, values in merged.items():
        np.testing.assert_allclose(values, expected[name], rtol=3e-4, atol=3e-4, err_msg=name)


def test_a_merge_by_fisher_information_is_that_of_torchs_gradients(pair: Family, tmp_path: Path) -> None:
    run_here("merge", write_yaml(tmp_path / "recipe.yaml", recipe_of(pair, "fisher")), tmp_path / "out")
    merged, models = state(tmp_path / "out"), [state(parent) for parent in pair.parents]
    information = [squared_gradients(parent, PROMPTS[:20]) for parent in pair.parents]
    for name, values in merged.items():
        mean = np.mean([each[name] for each in information])
        shares = [w * (each[name] / mean + 1e-6) for w, each in zip((1.0, 0.8), information, strict=True)]
        expected = sum(share * model[name] for share, model in zip(shares, models, strict=True)) / sum(shares)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_search_over_weights_writes_what_it_scored(pair: Family, tmp_path: Path) -> None:
    """The winner's recipe names the prompts, and merging it gives the winner again."""
    write_lines(tmp_path / "tasks.jsonl", even_records(8))
    document = search_config(
        pair, 2, 3, space={"method": "regmean", "layers_per_group": "all", "fixed": {"alpha": 0.8}},
        tasks=[task_section(tmp_path / "tasks.jsonl", heldout=0.5)], calibration={"file": "some.jsonl", "limit": 9},
    )  # fmt: skip
    write_lines(tmp_path / "some.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    run = tmp_path / "run"
    run_here("search", write_yaml(tmp_path / "config.yaml", document), "--out", run)
    recipe = load_yaml(run / "best" / "recipe.yaml")
    kept = load_yaml(run / "config.yaml")["calibration"]
    assert recipe["calibration"] == kept == {"file": str(tmp_path / "some.jsonl"), "prompt": "{prompt}", "limit": 9}
    run_here("merge", run / "best" / "recipe.yaml", tmp_path / "again")
    first, second = state(run / "best" / "model"), state(tmp_path / "again")
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    assert str(tmp_path / "some.jsonl") in load_yaml(run / "config.yaml")["inputs"]


@pytest.mark.parametrize("method", sample(["regmean", "regmean_plusplus", "fisher"], 1))
def test_a_second_merge_or_search_on_the_same_models_runs_no_prompt(
    method: str, pair: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # A disk that is nearly full keeps none.
    monkeypatch.setattr(kept_vectors, "FREE_SHARE", 0.0)
    measured: list[int] = []
    measure = moments_module.Moments._measure
    monkeypatch.setattr(
        moments_module.Moments, "_measure", lambda self, source: measured.append(source) or measure(self, source)
    )

    def merge(name: str, **changes: Any) -> dict[str, np.ndarray]:
        recipe = recipe_of(pair, method, **changes)
        run_here("merge", write_yaml(tmp_path / "recipe.yaml", recipe), tmp_path / name)
        return state(tmp_path / name)

    first = merge("first")
    # RegMean++ measures both parents together.
    times = 1 if method == "regmean_plusplus" else 2
    assert len(measured) == times
    again = merge("again")
    assert all((first[name] == again[name]).all() for name in first)
    merge("weighted", models=[{"model": str(parent), "parameters": {"weight": 0.5}} for parent in pair.parents])
    write_lines(tmp_path / "tasks.jsonl", even_records(8))
    document = search_config(
        pair, 1, 3, space={"method": method}, base=None, tasks=[task_section(tmp_path / "tasks.jsonl", heldout=0.5)],
        calibration=recipe_of(pair, method)["calibration"], export_dtype="float32",
    )  # fmt: skip
    run_here("search", write_yaml(tmp_path / "config.yaml", document), "--out", tmp_path / "run")
    assert len(measured) == times
    others = {"file": str(pair.root / "more.jsonl"), "prompt": "{text}"}
    other = merge("other", calibration=others)
    assert len(measured) == 2 * times and any((first[name] != other[name]).any() for name in first)
    # Whoever comes before or behind, a parent has moments of its own.
    turned = recipe_of(pair, method)["models"][::-1]
    np.testing.assert_allclose(
        *(x["model.layers.1.mlp.down_proj.weight"] for x in (first, merge("t", models=turned))), 1e-4, 1e-5
    )


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_plan_prices_the_moments(method: str, pair: Family) -> None:
    """The bytes are those of the arrays that are measured: of weights with the same inputs one."""
    config = search_config(
        pair, 1, 2, space={"method": method}, calibration={"file": "prompts.jsonl", "prompt": "{text}"}
    )
    problem = problem_of(pair.root / "config.yaml", config)
    moments, decoder = problem.backend.models.sources.moments, problem.backend.models.decoder
    held, flops = moments.costs(decoder)
    arrays = {
        id(array): array.nbytes
        for source in (1, 2)
        for name in state(pair.base)
        if (array := moments.of(source, name)) is not None
    }
    assert held == sum(arrays.values()) and flops > 0
    text = " ".join(run_here("plan", write_yaml(pair.root / "plan.yaml", config)).stdout.split())
    assert "calibration: the moments take" in text and "or more to measure, the first time" in text


# ---------------------------------------------------------------------------------------------------------------
# Kernels


def merged_by(
    name: str, models: list[np.ndarray], moments: list[Any], weights: Any = None, **numbers: float
) -> np.ndarray:
    method = METHODS[name]
    defaults = {p.name: p.default for p in method.parameters} | numbers
    parameters = {**defaults, "weight": np.ones(len(models)) if weights is None else np.asarray(weights)}
    prepared = prepare(method, method.options, models, parameters, lambda k: NO_KEYS, lambda k: moments[k])
    return np.asarray(combine(method, method.options, CombineInputs(models, prepared.mask_keys, {}, parameters)))


def moments_of(count: int, size: int, tokens: int = 30) -> list[np.ndarray]:
    inputs = np.random.default_rng(5).normal(size=(count, tokens, size))
    return [x.T @ x for x in inputs]


MODELS = list(np.random.default_rng(2).normal(size=(3, 5, 8)).astype(np.float32))


def test_parents_may_come_in_any_order() -> None:
    for name, moments in (("regmean", moments_of(3, 8)), ("fisher", list(np.random.default_rng(1).random((3, 5, 8))))):
        merged = merged_by(name, MODELS, moments, [1.0, 0.5, 2.0])
        again = merged_by(name, MODELS[::-1], moments[::-1], [2.0, 0.5, 1.0])
        np.testing.assert_allclose(again, merged, rtol=1e-4, atol=1e-5)


def test_one_parent_and_equal_parents_stay_as_they_are() -> None:
    for name, moments in (("regmean", moments_of(3, 8)), ("fisher", list(np.random.default_rng(1).random((3, 5, 8))))):
        np.testing.assert_allclose(merged_by(name, MODELS[:1], moments[:1]), MODELS[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(merged_by(name, [MODELS[0]] * 3, moments), MODELS[0], rtol=1e-4, atol=1e-5)


def test_what_has_no_moments_is_averaged() -> None:
    for shape in ((5, 8), (8,), (2, 5, 8)):
        models = list(np.random.default_rng(2).normal(size=(2, *shape)).astype(np.float32))
        for name in ("regmean", "fisher"):
            merged = merged_by(name, models, [None, None])
            np.testing.assert_allclose(merged, (models[0] + models[1]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_singular_covariances_are_damped(alpha: float) -> None:
    """On the span of the inputs the merge answers as its formula says; where no input has been, it is the average."""
    moments = moments_of(2, 8, tokens=2)
    for moment in moments:
        moment[:, 7] = moment[7] = 0
    merged = merged_by("regmean", MODELS[:2], moments, alpha=alpha)
    assert np.isfinite(merged).all()
    np.testing.assert_allclose(merged[:, 7], (MODELS[0] + MODELS[1])[:, 7] / 2, rtol=1e-4, atol=1e-4)
    zeros = [np.zeros((8, 8))] * 2
    np.testing.assert_allclose(merged_by("regmean", MODELS[:2], zeros), (MODELS[0] + MODELS[1]) / 2, rtol=1e-5)


def test_the_filter_leads_from_the_average() -> None:
    moments = moments_of(2, 8)
    ends = [merged_by("regmean", MODELS[:2], moments, filter=share) for share in (0.0, 1.0)]
    np.testing.assert_allclose(ends[0], (MODELS[0] + MODELS[1]) / 2, rtol=1e-5, atol=1e-6)
    half = merged_by("regmean", MODELS[:2], moments, filter=0.5)
    np.testing.assert_allclose(half, (ends[0] + ends[1]) / 2, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"calibration": None}, "calibration: missing; regmean looks at the parents' inputs on prompts"),
        ({"merge_method": "linear"}, "calibration: linear looks at no prompts; leave it out"),
        ({"calibration": {"file": "no.jsonl"}}, "calibration.file: no.jsonl: no such file"),
        ({"calibration": {"file": ["prompts.jsonl"] * 3}}, "a list of 3; expected one file, or one for each of the 2"),
        ({"calibration": {"file": "prompts.jsonl", "limt": 3}}, "limt: unknown key (did you mean 'limit'?)"),
        (
            {"calibration": {"file": "prompts.jsonl", "prompt": "{question}"}},
            "prompts.jsonl:1: the record has no field",
        ),
        ({"calibration": {"file": "prompts.jsonl", "prompt": ""}}, "no prompt has two tokens or more of"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(changes: dict[str, Any], says: str, pair: Family) -> None:
    recipe = write_yaml(pair.root / "wrong.yaml", recipe_of(pair, "regmean") | changes)
    line = refusal("merge", recipe, pair.root / "refused")
    assert says in line, line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "calibration: missing; regmean looks at the parents' inputs on prompts"),
        (
            {"space": {"method": "ties"}, "calibration": {"file": "prompts.jsonl"}},
            "ties looks at no prompts",
        ),
        (
            {"space": None, "data_flow": {}, "base": None, "calibration": {"file": "prompts.jsonl"}},
            "is for a space whose",
        ),
        (
            {"space": None, "base": None, "pool": {"methods": ["regmean"]}},
            "regmean looks at prompts, which no child of a",
        ),
        ({"backend": "torch"}, "regmean looks at the inputs of language models on prompts"),
        ({"backend": "function"}, "regmean looks at the inputs of language models on prompts"),
    ],
)
def test_searches_that_cannot_look_are_refused(changes: dict[str, Any], says: str, pair: Family) -> None:
    with pytest.raises(InputError, match=says):
        problem_of(pair.root / "config.yaml", search_config(pair, 1, 2, **{"space": {"method": "regmean"}} | changes))


def test_long_prompts_are_cut_and_few_are_told(tmp_path: Path) -> None:
    family = build_family(tmp_path, tiny_config(num_hidden_layers=1, max_position_embeddings=8))
    write_lines(tmp_path / "prompts.jsonl", [{"text": " ".join(f"w{i}" for i in range(4, 24))}])
    recipe = write_yaml(tmp_path / "recipe.yaml", recipe_of(family, "regmean"))
    warned = run_here("merge", recipe, tmp_path / "out").stderr
    assert "1 of 1 prompts are longer than the context of" in warned and "are cut at 8 tokens" in warned
    assert warned.count("8 tokens for inputs of up to 80 numbers: covariances are singular, and are damped") == 1
    assert all(np.isfinite(values).all() for values in state(tmp_path / "out").values())
