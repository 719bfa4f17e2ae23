"""Searching for a merge of any pytrees: what is merged, against float64 NumPy; groups, determinism, errors."""

import contextlib
import gc
import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers.files import read_json
from helpers.sampling import sample, thorough
from helpers.trees import by_group, kept_back, search_trees
from hostile import changing
from merge_kernels import METHODS
from reference import merging
from safetensors.numpy import load_file

import evojax_merge as em
from evojax_merge import Generation, Run, host_callback
from evojax_merge.errors import Failed, InputError
from evojax_merge.system.jax_environment import SETTINGS

SHAPES = {"encoder": {"kernel": (5, 7), "bias": (7,)}, "decoder": {"kernel": (3, 2, 4), "scale": ()}}


def tree(seed: int, near: Any = None, scale: float = 0.3) -> Any:
    """Random leaves of SHAPES, perhaps near those of another tree; no two magnitudes are equal."""
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    return drawn if near is None else jax.tree.map(lambda b, d: np.asarray(b + scale * d, np.float32), near, drawn)


BASE = tree(0)
PARENTS = [tree(1, BASE), tree(2, BASE)]


@changing
def similarity(merged: Any, target: Any) -> jax.Array:
    """Minus the squared distance from `target`."""
    return -sum(jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (merged, target)), strict=True))


def quick(parents: Any = None, fitness: Any = None, **settings: Any) -> Run:
    short = {"generations": 3, "population": 4}
    return search_trees(parents or PARENTS, fitness or similarity(tree(3)), **(short | settings))


def in_one_group(path: str) -> str:
    return "all"


em.register_backend("in_one_group", em.FunctionFactory(groups=in_one_group))


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


# ---------------------------------------------------------------------------------------------------------------
# What is merged


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {}),
        ("task_arithmetic", {"base": BASE, "fixed": {"lambda": 0.7}, "parameters": {"weight": {"low": -1, "high": 2}}}),
        ("ties", {"base": BASE, "fixed": {"lambda": 0.7}, "parameters": {"weight": {}, "density": {"start": 0.5}}}),
        ("slerp", {}),
    ],
)
def test_best_is_the_merge_by_its_parameters(method: str, settings: Any) -> None:
    run = quick(method=method, **settings)
    searched, best = by_group(run), run.best.merged()
    assert list(searched) == ["decoder", "encoder"]

    def check(path: Any, merged: jax.Array, base: np.ndarray, *parents: np.ndarray) -> None:
        parameters = settings.get("fixed", {}) | searched[path[0].key]
        if method == "slerp":
            (parameters["t"],) = parameters["t"]
        expected = merging.merge(method, METHODS[method].options, [base, *parents], parameters)
        assert merged.dtype == np.float32 and merged.shape == base.shape
        np.testing.assert_allclose(merged, expected, atol=2e-6)

    jax.tree_util.tree_map_with_path(check, best, BASE, *PARENTS)
    assert run.best.fitness == pytest.approx(float(similarity(tree(3))(best)), rel=1e-5)
    assert run.best.fitness >= max(row["best_so_far"] for row in run.history)


def test_search_finds_a_merge_that_is_known() -> None:
    weights = {"encoder": (0.3, 1.2), "decoder": (0.9, 0.1)}
    target = {
        group: jax.tree.map(
            lambda b, x, y, w=w: b + w[0] * (x - b) + w[1] * (y - b), *(t[group] for t in (BASE, *PARENTS))
        )
        for group, w in weights.items()
    }
    run = search_trees(
        PARENTS, similarity(target), base=BASE, method="task_arithmetic", parameters={"weight": {"high": 1.5}},
        generations=60,
    )  # fmt: skip
    for group, expected in weights.items():
        np.testing.assert_allclose(by_group(run)[group]["weight"], expected, atol=0.02)


def test_a_function_without_examples_holds_nothing_out(tmp_path: Any) -> None:
    run = quick(out=tmp_path / "run", generations=6, controls=["random"])
    uniform, winner = (next(row for row in run.table if row["role"] == role) for role in ("uniform", "winner"))
    lead = winner["heldout_fitness"] - uniform["heldout_fitness"]
    assert run.result is not None and not run.result["held_out"]
    assert uniform["interval"] == [pytest.approx(lead)] * 2
    assert f"The winner is better than the uniform merge by {lead:.4f} (exactly)." in run.result["verdicts"]
    texts = [*run.result["verdicts"], (tmp_path / "run/best/model/README.md").read_text(), repr(run)]
    assert not any(re.search("held.out|never saw|too few", text) for text in texts)
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>Final scores</h2>" in page and "never saw" not in page and "Wins and losses" not in page


def test_what_is_no_weight_is_the_base_s_and_dtypes_stay() -> None:
    def with_others(own: Any, count: int) -> Any:
        half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), own["decoder"])
        others = {"steps": np.int32(count), "key": jax.random.key(count), "mask": np.arange(3) > count, "none": None}
        return {"half": half, "wide": own["encoder"], "empty": np.zeros((0, 3), np.float32), **others}

    trees = [with_others(own, count) for count, own in enumerate((BASE, *PARENTS))]
    run = quick(
        trees[1:], lambda merged: -jnp.square(merged["wide"]["kernel"]).sum() - merged["half"]["scale"],
        base=trees[0], method="dare_ties", parameters={"weight": {}, "density": {}},
    )  # fmt: skip
    best = run.best.merged()
    assert jax.tree.structure(best) == jax.tree.structure(trees[0])
    assert best["half"]["kernel"].dtype == jnp.bfloat16 and best["wide"]["bias"].dtype == np.float32
    assert int(best["steps"]) == 0 and best["mask"].tolist() == [False, True, True]
    assert (jax.random.key_data(best["key"]) == jax.random.key_data(jax.random.key(0))).all()
    assert set(by_group(run)) == {"half", "wide"}


@pytest.mark.parametrize(
    "settings", sample([{}, {"method": "task_arithmetic", "base": BASE}, {"parameters": {"weight": {"high": 2}}}], 2)
)
def test_the_greedy_soup_leaves_out_a_parent_that_hurts(settings: dict[str, Any]) -> None:
    rng, wanted = np.random.default_rng(0), np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree(9))])
    far, near = tree(7), [tree(seed, tree(9), 0.5) for seed in (11, 12, 13)]
    parents = [far, *near]
    rows = rng.normal(size=(24, wanted.size)).astype(np.float32)

    def flat(merged: Any) -> Any:
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(merged)])

    def errors(merged: Any, examples: Any) -> Any:
        return -jnp.square((examples - flat(merged)) @ jnp.ones(wanted.size) / 9) - jnp.abs(flat(merged) - wanted).sum()

    # By NumPy alone: one parent after the other, the best first.
    def score(members: list[int], examples: np.ndarray) -> float:
        average = np.mean([np.asarray(flat(parents[k])) for k in members], axis=0)
        return float(np.mean(-(((examples - average).sum(axis=1) / 9) ** 2) - np.abs(average - wanted).sum()))

    result = quick(parents, errors, examples=rows, heldout=0.25, validation=0.25, controls=["greedy"], **settings)
    chosen = rows[list(kept_back(result))]
    ranked = sorted(range(4), key=lambda k: -score([k], chosen))
    soup = ranked[:1]
    for parent in ranked[1:]:
        if score([*soup, parent], chosen) >= score(soup, chosen):
            soup.append(parent)
    assert 0 not in soup and len(soup) > 1
    (row,) = (row for row in result.table if row["role"] == "greedy")
    assert row["name"] == f"soup of {', '.join(f'parents[{k}]' for k in sorted(soup))}"
    # The strategy goes by the examples that it searches on.
    result = quick(parents, errors, examples=rows, strategy="greedy", population=None, generations=50, **settings)
    assert len(result.history) == 4
    ranked = sorted(range(4), key=lambda k: -score([k], rows))
    soup = ranked[:1]
    for parent in ranked[1:]:
        if score([*soup, parent], rows) >= score(soup, rows):
            soup.append(parent)
    weights = np.array([values["weight"] for values in by_group(result).values()])
    np.testing.assert_allclose(weights, np.tile(np.isin(range(4), soup) / len(soup), (len(weights), 1)), atol=1e-6)
    assert result.history[-1]["soup"] == len(soup)
    np.testing.assert_allclose(result.best.fitness, score(soup, rows), rtol=1e-4)


def test_containers_and_names_of_leaves_do_not_matter_to_the_kernels() -> None:
    """The same arrays as a dict, in another order, and in lists: one group's merge is the same bit for bit."""

    def as_lists(x: Any) -> Any:
        return [(x["encoder"]["bias"], x["decoder"]["kernel"]), [x["decoder"]["scale"], x["encoder"]["kernel"]]]

    wanted = tree(3)["encoder"]["kernel"]
    settings = {"method": "ties", "parameters": {"weight": {}, "density": {"start": 0.5}}, "backend": "in_one_group"}
    one = quick(PARENTS, lambda m: -jnp.square(m["encoder"]["kernel"] - wanted).sum(), base=BASE, **settings)
    listed = [as_lists(x) for x in PARENTS]
    other = quick(listed, lambda m: -jnp.square(m[1][1] - wanted).sum(), base=as_lists(BASE), **settings)
    assert by_group(one) == by_group(other) and list(by_group(one)) == ["all"]
    assert same(as_lists(one.best.merged()), other.best.merged())


def test_order_of_parents_changes_no_mask() -> None:
    settings = {"method": "dare_linear", "base": BASE, "parameters": {"lambda": {}}}
    one = quick(PARENTS, fixed={"weight": [0.4, 0.9], "density": [0.3, 0.6]}, **settings)
    other = quick(PARENTS[::-1], fixed={"weight": [0.9, 0.4], "density": [0.6, 0.3]}, **settings)
    merged = one.best.merged()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, other.best.merged())
    # They do thin out: where neither parent's entry is kept, the base's stays.
    untouched = np.mean(np.asarray(merged["encoder"]["kernel"]) == BASE["encoder"]["kernel"])
    assert 0.05 < untouched < 0.6


# ---------------------------------------------------------------------------------------------------------------
# Groups


def test_groups_are_the_modules_below_what_all_leaves_share() -> None:
    def linen(own: Any) -> Any:
        return {"params": {"net": {"Dense_0": own["encoder"], "Dense_1": own["decoder"]}}}

    nested = [linen(x) for x in PARENTS]
    target = jnp.zeros(())
    assert set(by_group(quick(nested, lambda m: target))) == {"Dense_0", "Dense_1"}
    paths: list[str] = []

    def by_kind(path: str) -> str:
        paths.append(path)
        return path.rsplit("/", 1)[-1]

    em.register_backend("by_kind", em.FunctionFactory(groups=by_kind))
    assert set(by_group(quick(nested, lambda m: target, backend="by_kind"))) == {"kernel", "bias", "scale"}
    assert "params/net/Dense_0/kernel" in paths
    assert set(by_group(quick([np.ones(3), np.zeros(3)], lambda m: m.sum()))) == {"all"}


class Small(nnx.Module):
    def __init__(self, seed: int, width: int = 3) -> None:
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)

    def __call__(self, x: Any) -> jax.Array:
        return self.norm(self.first(x))


def test_nnx_modules_and_their_states_are_pytrees() -> None:
    models = [Small(0), Small(1)]
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    target = 0.2 * models[0](x) + 0.8 * models[1](x)

    def error(model: Any) -> jax.Array:
        return -jnp.square(model(x) - target).mean()

    whole = quick(models, error)
    graph, _ = nnx.split(models[0])
    states = quick([nnx.state(model) for model in models], lambda state: error(nnx.merge(graph, state)))
    best = whole.best.merged()
    assert isinstance(best, Small) and set(by_group(whole)) == {"first", "norm"}
    assert whole.best.fitness == pytest.approx(float(error(best)), abs=1e-6)
    assert states.best.fitness == pytest.approx(whole.best.fitness, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# The search


def test_deterministic_for_a_seed() -> None:
    settings = {"method": "dare_ties", "base": BASE, "parameters": {"weight": {}, "density": {"start": 0.5}}}
    one, again, other = (quick(seed=seed, **settings) for seed in (1, 1, 2))
    assert same(one.best.merged(), again.best.merged()) and by_group(one) == by_group(again)
    assert one.history == again.history
    assert by_group(one) != by_group(other)


def test_strict_settings_of_jax_change_nothing() -> None:
    settings: Any = {"method": "dare_ties", "base": BASE, "parameters": {"weight": {}, "density": {"start": 0.5}}}
    default = quick(**settings)
    strict: dict[str, Any] = {
        "numpy_rank_promotion": "raise", "numpy_dtype_promotion": "strict", "transfer_guard": "disallow",
        "debug_nans": True, "debug_infs": True, "default_prng_impl": "rbg", "threefry_partitionable": False,
    }  # fmt: skip
    assert strict.keys() == SETTINGS.keys()
    models = em.load_models(BASE, PARENTS)
    by_hand = em.Study(
        models, em.MergeSpace(models, "ties"), host_callback(lambda merged: merged["encoder"]["bias"][0])
    )
    with contextlib.ExitStack() as stack:
        for name, value in strict.items():
            stack.enter_context(getattr(jax, name)(value))
        again = quick(**settings)
        genomes = by_hand.ask()
        by_hand.tell(genomes, by_hand.evaluate(genomes))
    assert again.history == default.history and len(by_hand.history) == 1


def test_host_traced_and_every_chunk_agree() -> None:
    fitness, seen = similarity(tree(3)), []
    runs = [quick(evaluation={"chunk": chunk}, on_generation=seen.append) for chunk in (1, 3, 100)]
    runs.append(quick(fitness=host_callback(lambda merged: np.asarray(fitness(merged)))))
    for run in runs[1:]:
        # The last generations follow from the first: what differs by rounding only stays near.
        for a, b in zip(runs[0].history, run.history, strict=True):
            np.testing.assert_allclose(a["fitness"], b["fitness"], rtol=1e-4)
        assert run.best.fitness == pytest.approx(runs[0].best.fitness, rel=1e-4)
    assert [generation.number for generation in seen] == [1, 2, 3] * 3
    assert all(isinstance(generation, Generation) and len(generation.fitness) == 4 for generation in seen)


def test_candidates_that_are_not_finite_have_failed() -> None:
    def positive(merged: Any) -> jax.Array:
        value = merged["encoder"]["bias"][0]
        return jnp.where(value > middle, value, jnp.nan)

    middle = (PARENTS[0]["encoder"]["bias"][0] + PARENTS[1]["encoder"]["bias"][0]) / 2
    found = quick(fitness=positive, population=8)
    failed = [row["failed"] for row in found.history]
    assert 0 < failed[0] < 8 and found.history[0]["fitness"].count(None) == failed[0]
    assert found.best.fitness is not None and found.best.fitness > middle
    with pytest.raises(Failed, match=r"generation 1: all 4 candidates failed, .* Look at what the function of task"):
        quick(fitness=lambda merged: jnp.inf)


def rows_of(merged: Any, examples: Any) -> jax.Array:
    """A score per example: how near the encoder brings its input to the target."""
    return -jnp.sum((examples["x"] @ merged["encoder"]["kernel"] - examples["y"]) ** 2, axis=1)


def linear_examples(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(count, 5)).astype(np.float32)
    middle = 0.3 * PARENTS[0]["encoder"]["kernel"] + 0.7 * PARENTS[1]["encoder"]["kernel"]
    return {"x": x, "y": x @ middle}


@pytest.mark.parametrize("rung_examples", sample(["random", "item_response"], 1))
@pytest.mark.parametrize("wrap", sample([lambda function: function, host_callback], 1))
def test_successive_halving_over_examples(wrap: Any, rung_examples: str) -> None:
    settings = {"rungs": 3, "population": 8, "generations": 6, "rung_examples": rung_examples}
    found = quick(fitness=wrap(rows_of), examples=linear_examples(24), **settings)
    for row in found.history:
        # Of 4 shards of 6 examples, 8 candidates are evaluated on one, 4 on two, 2 on all.
        assert sorted(row["examples"]) == [6] * 4 + [12] * 2 + [24] * 2
    best = found.best.merged()
    assert found.best.fitness == pytest.approx(float(rows_of(best, linear_examples(24)).mean()), rel=1e-4)


@pytest.mark.parametrize("wrap", sample([lambda function: function, host_callback], 1))
def test_a_validation_split_of_the_examples(wrap: Any, tmp_path: Any) -> None:
    examples = linear_examples(24)
    settings = {"population": 6, "generations": 4, "validation": 0.25, "validate_every": 2, "rungs": 2}
    found = quick(fitness=wrap(rows_of), examples=examples, **settings, out=tmp_path / "run")
    assert len(kept_back(found)) == 6
    assert {n for row in found.history for n in row["examples"]} == {9, 18}
    assert [row["generation"] for row in found.history if "validation" in row] == [2, 4]
    kept = np.isin(np.arange(24), kept_back(found))
    scores = rows_of(found.best.merged(), {name: leaf[kept] for name, leaf in examples.items()})
    result = read_json(tmp_path / "run/result.json")
    assert result["chosen_on"] == "validation"
    assert result["validation_fitness"]["winner"] == pytest.approx(float(scores.mean()), rel=1e-4)
    # What is kept back changes nothing in the search.
    other = {name: np.where(kept[:, None], 0, leaf) for name, leaf in examples.items()}
    again = quick(fitness=wrap(rows_of), examples=other, **settings)
    assert [row["genomes"] for row in again.history] == [row["genomes"] for row in found.history]


@pytest.mark.parametrize("strategy", sample(["gradient", "hybrid"], 1))
def test_gradients_are_of_what_is_searched_on_and_stop_in_time(strategy: str) -> None:
    examples = linear_examples(24)
    settings = {"strategy": strategy, "population": 4, "generations": 8, "validation": 0.25, "validate_every": 2}
    settings |= {"gradient": {"minibatches": 2}}
    found = quick(fitness=rows_of, examples=examples, **settings)
    kept = np.isin(np.arange(24), kept_back(found))
    other = {name: np.where(kept[:, None], 0, leaf) for name, leaf in examples.items()}
    again = quick(fitness=rows_of, examples=other, **settings)
    assert [row["genomes"] for row in again.history] == [row["genomes"] for row in found.history]
    assert max(n for row in found.history for n in row["examples"]) <= 18
    # The most generations that fit, though `hybrid` evaluates fewer candidates in some than in others.
    counts = [row["evaluations"] for row in found.history]
    most = counts[4]
    for budget, generations in ((most, 5), (counts[5] - 1, 5), (counts[5], 6)):
        short = quick(fitness=rows_of, examples=examples, **settings, stop={"evaluations": max(budget, 4)})
        assert short.history == found.history[:generations]
    halted = quick(fitness=rows_of, examples=examples, **settings, stop={"stagnation": 1})
    assert len(halted.history) == 8 or any(row["best"] is not None for row in halted.history)


def test_steps_on_minibatches_look_at_all_examples_where_the_best_may_end_them() -> None:
    settings = {"strategy": "gradient", "population": 3, "generations": 16, "gradient": {"minibatches": 2}}
    examples = linear_examples(24)
    plain = quick(fitness=rows_of, examples=examples, **settings)
    assert all(row["best"] is None for row in plain.history)
    looking = quick(fitness=rows_of, examples=examples, **settings, stop={"target": 1e9})
    # A look changes no step, and is the fitness on all examples.
    assert [row["genomes"] for row in looking.history] == [row["genomes"] for row in plain.history]
    assert [max(row["examples"]) for row in looking.history] == [12] * 7 + [24] + [12] * 7 + [24]
    best = [row["best"] for row in looking.history]
    assert best[:7] == [None] * 7 and best[7] == max(looking.history[7]["fitness"])
    halted = quick(fitness=rows_of, examples=examples, **settings, stop={"target": best[7]})
    assert halted.history == looking.history[:8]


def test_stopping_early(tmp_path: Any) -> None:
    whole = quick(generations=5)
    found = quick(generations=5, stop={"evaluations": 9}, out=tmp_path / "run")
    assert found.history == whole.history[:2]
    again = quick(generations=5, stop={"evaluations": 9}, out=tmp_path / "run", resume=True)
    assert again.history == found.history and again.best.fitness == found.best.fitness
    assert quick(generations=3, out=tmp_path / "run", resume=True).history == whole.history
    assert len(quick(generations=5, stop={"target": whole.history[2]["best_so_far"]}).history) <= 3


def test_a_run_folder_is_continued_where_it_was_broken_off(tmp_path: Any) -> None:
    whole = quick(generations=5, out=tmp_path / "whole", log=["csv"])
    logged = (tmp_path / "whole" / "history.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in logged] == ["generation", *"12345"]

    def stop(generation: Generation) -> None:
        if generation.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(generations=5, out=tmp_path / "run", on_generation=stop)
    with pytest.raises(InputError, match="holds a run already"):
        quick(generations=5, out=tmp_path / "run")
    with pytest.raises(InputError, match="sigma differs"):
        quick(generations=2, out=tmp_path / "run", resume=True, sigma=0.3)
    parents = [PARENTS[0], changed(("encoder", "bias"), np.zeros(7, np.float32))]
    with pytest.raises(InputError, match=r"parents\[1\]"):
        quick(parents, generations=2, out=tmp_path / "run", resume=True)
    seen: list[int] = []
    again = quick(generations=2, out=tmp_path / "run", resume=True, on_generation=lambda g: seen.append(g.number))
    assert seen == [4, 5]
    for name in ("history.jsonl", "best/model/params.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert same(again.best.merged(), whole.best.merged()) and again.history == whole.history
    run = em.open_run(tmp_path / "run")
    assert run.finished and len(run.history) == 5
    saved = load_file(tmp_path / "run/best/model/params.safetensors")
    assert saved.keys() == {"encoder/kernel", "encoder/bias", "decoder/kernel", "decoder/scale"}
    np.testing.assert_array_equal(saved["encoder/kernel"], whole.best.merged()["encoder"]["kernel"])


CONSTANT = jnp.ones(2)


def study_of(fitness: Any, **settings: Any) -> em.Study:
    models = em.load_models(None, {"one": PARENTS[0], "two": PARENTS[1]})
    return em.Study(
        models, em.MergeSpace(models, "linear"), fitness, strategy=em.strategies.cma_es(population=4), **settings
    )


def test_each_study_has_its_own_fitness(tmp_path: Any) -> None:
    """Also where functions differ by what no digest sees, and where the program goes to another folder meanwhile."""
    targets = [deque([1.0]), deque([2.0])]

    def fitness(target: Any) -> Any:
        return host_callback(lambda merged: target[0])

    with contextlib.chdir(tmp_path):
        studies = [study_of(fitness(target), out=f"runs/{n}") for n, target in enumerate(targets)]
    assert studies[0].config["tasks"] == studies[1].config["tasks"]
    runs = [study.run(1) for study in studies]
    assert [run.history[0]["best"] for run in runs] == [1.0, 2.0]
    assert runs[0].path == tmp_path / "runs/0" and runs[0].finished
    assert len(studies[0].run(1).history) == 2


def test_a_run_is_not_resumed_with_another_constant(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitness(merged: Any) -> jax.Array:
        return CONSTANT.sum() * merged["decoder"]["scale"]

    study_of(fitness, out=tmp_path).run(1)
    assert len(study_of(fitness, out=tmp_path, resume=True).run(1).history) == 2
    monkeypatch.setattr(sys.modules[__name__], "CONSTANT", 2 * jnp.ones(2))
    with pytest.raises(InputError, match="function differs"):
        study_of(fitness, out=tmp_path, resume=True)


def test_a_search_without_a_run_folder_leaves_none() -> None:
    run = quick()
    place, best = run.path, run.best.merged()
    assert place.is_dir() and run.finished and run.best.origin.startswith(("candidate", "parent", "uniform"))
    assert np.isfinite(best["encoder"]["kernel"]).all()
    del run
    gc.collect()
    assert not place.parent.exists()


def test_a_fitness_that_jax_cannot_trace_is_told_of_host_callback() -> None:
    with pytest.raises(InputError, match=r"JAX cannot trace it .* in Python host_callback"):
        quick(fitness=lambda merged: float(merged["encoder"]["bias"][0]))


@dataclass
class Unregistered:
    weight: float = 1.0


def changed(path: tuple[str, str], value: Any) -> Any:
    copy = jax.tree.map(lambda x: x, PARENTS[1])
    copy[path[0]][path[1]] = value
    return copy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parents": []}, "parents: is empty"),
        ({"log": ["csv"]}, "log: there is no run folder to log in; give `out`"),
        ({"log": ["table"], "out": "run"}, r"log\[0\]: expected tensorboard, wandb or csv, found 'table'"),
        ({"parents": [PARENTS[0], changed(("encoder", "kernel"), np.ones((5, 6)))]},
         r"parents\[1\]: leaf 'encoder/kernel' has shape \(5, 6\), but \(5, 7\) in parents\[0\]"),
        ({"parents": [PARENTS[0], {"encoder": PARENTS[1]["encoder"]}]},
         r"parents\[1\]: has no leaf 'decoder/kernel', which parents\[0\] has"),
        ({"parents": [PARENTS[0], changed(("encoder", "extra"), np.ones(2))]},
         r"parents\[0\]: has no leaf 'encoder/extra', which parents\[1\] has"),
        ({"parents": [{"a/b": np.ones(2), "a": {"b": np.ones(3)}}] * 2},
         r"parents\[0\]: has two leaves of the name 'a/b'; expected keys without '/'"),
        ({"parents": [Small(0), Small(1, width=5)]},
         r"parents\[1\]: leaf 'first/bias/value' has shape \(5,\), but \(3,\) in parents\[0\]"),
        ({"parents": [[np.ones(2)], (np.ones(2),)]}, r"parents\[1\]: has other containers than parents\[0\]"),
        ({"parents": [PARENTS[0], changed(("encoder", "bias"), np.full(7, np.nan))]},
         r"parents\[1\]: leaf 'encoder/bias' holds NaN or Inf"),
        ({"parents": [PARENTS[0], changed(("encoder", "bias"), "text")]}, "leaf 'encoder/bias' is a str; expected"),
        ({"parents": [PARENTS[0], Unregistered()]},
         r"leaf '' is a Unregistered; .*: jax.tree_util.register_dataclass\(Unregistered\) makes a dataclass a pytree"),
        ({"parents": [{"n": np.arange(3)}] * 2}, "no floating-point array to merge"),
        ({"base": {"encoder": BASE["encoder"]}, "method": "ties"}, "base: has no leaf 'decoder/kernel', which parents"),
        ({"method": "tie"}, r"method: unknown method 'tie' \(did you mean 'ties'\?\)"),
        ({"method": "ties"}, "base: missing; ties takes task vectors from a base"),
        ({"base": BASE}, "base: linear takes no base"),
        ({"parents": [*PARENTS, BASE], "method": "slerp"}, "slerp takes 2 models, found 3"),
        ({"method": "karcher"}, "karcher has no parameter to search"),
        ({"parameters": {"wieght": {}}}, r"parameters.wieght: linear has no such parameter"),
        ({"parameters": {"weight": {"lowest": 0}}}, r"parameters.weight.lowest: unknown key"),
        ({"parameters": {"weight": {"low": 2}}}, "low 2 is not below high 1"),
        ({"population": 1}, "population: 1; the strategy cma_es compares candidates; expected 2 or more"),
        ({"evaluation": {"chunk": 0}}, "evaluation.chunk: expected a whole number from 1 to 100,000, found 0"),
        ({"rungs": 2}, "rungs: 2; successive halving needs two examples or more, and fitness has one"),
        ({"rung_examples": "item_response"}, "search: rung_examples: item_response; without a race"),
        ({"validation": 0.2}, "validation: 0.2 of the 1 examples that .* leaves none to validate on"),
        ({"validation": 0.01, "examples": np.ones((5, 1)), "fitness": lambda merged, rows: rows[:, 0]},
         "validation: 0.01 of the 5 examples that fitness has to search on leaves none to validate on"),
        ({"validate_every": 2}, "search: validate_every: there is no validation split"),
        ({"stop": {"evaluations": 3}}, "stop.evaluations: 3 are fewer than the"),
        ({"stop": {"target": "high"}}, "stop.target: expected a number that float32 holds, found 'high'"),
        ({"stop": 5}, r"stop: expected a mapping .*, found 5"),
        ({"examples": {"x": np.ones(3), "y": np.ones(4)}}, r"arrays with leading axes of \[3, 4\]"),
        ({"strategy": "greedy", "parents": PARENTS[:1]},
         "strategy: greedy averages the weights of parents; expected the merge of 2 parents or more"),
        ({"strategy": "greedy", "method": "slerp"},
         "strategy: the space lacks the averages of some parents: slerp averages no weights; expected one of linear, "),
        ({"strategy": "greedy", "seeds": ["uniform"]}, "seeds: the strategy greedy takes none, it has its own"),
        ({"strategy": "greedy", "rungs": 2, "examples": np.ones((8, 1)), "fitness": lambda merged, rows: rows[:, 0]},
         "rungs: the strategy greedy takes none"),
        ({"strategy": "greedy", "population": 8}, "population: 8; the strategy greedy has populations of 3 here"),
        ({"controls": ["soup"]}, "controls.*greedy.*soup"),
        ({"controls": ["greedy"], "parameters": {"weight": {"low": 0.1}}},
         "controls: the space lacks .* low 0.1 is above 0"),
        ({"strategy": "cma-es"}, r"unknown strategy 'cma-es' \(did you mean 'cma_es'\?\)"),
    ],
)  # fmt: skip
def test_wrong_input_says_what_and_where(settings: dict[str, Any], said: str) -> None:
    given = {"parents": PARENTS, "fitness": similarity(BASE)} | settings
    with pytest.raises(InputError, match=said):
        search_trees(**given)


@pytest.mark.parametrize("wrap", sample([lambda function: function, host_callback], 1))
def test_wrong_fitness_is_named(wrap: Any) -> None:
    with pytest.raises(InputError, match=r"returned float32\[5, 7\]; expected a real number"):
        quick(fitness=wrap(lambda merged: merged["encoder"]["kernel"]))
    with pytest.raises(ZeroDivisionError):
        quick(fitness=wrap(lambda merged: 1 / 0))


@thorough
def test_importing_the_package_imports_no_jax() -> None:
    program = (
        "import sys, evojax_merge\n"
        "assert not {'jax', 'transformers', 'flax'} & set(sys.modules)\n"
        "assert callable(evojax_merge.Study) and callable(evojax_merge.host_callback)\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
