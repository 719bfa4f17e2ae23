"""Gradients through the merge: of every method against differences of float64 formulas, of models against differences
of their scores, and the strategies that follow them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import run_here
from helpers.decoders import differentiate_merges, score_merges
from helpers.families import Family, build_family
from helpers.files import write_json, write_lines
from helpers.models import tiny_config
from helpers.sampling import sample, thorough
from helpers.searches import search_config, task_section
from helpers.trees import by_group, search_trees
from merge_kernels import METHODS, CombineInputs, combine_differentiable, look_up_differentiable, on_grid, tabulate
from merge_kernels.gradients import HALF_WIDTH
from test_evaluator import Setting, behind_header
from test_kernels import draws_of, expected_merge, make_models, on_device, sources_of

import evojax_merge as em
from evojax_merge.config.search_config import GradientConfig
from evojax_merge.errors import InputError
from evojax_merge.evaluation import passes
from evojax_merge.evaluation.routes import whole
from evojax_merge.evaluation.scores import Scores, fitness
from evojax_merge.models.bank import Recipe, take_candidate
from evojax_merge.schema.yaml_reader import load_yaml
from evojax_merge.search.loop import INIT_KEY, generation_key
from evojax_merge.search.protocols import gradient_generations
from evojax_merge.search.seeding import seeded
from evojax_merge.search.strategies.gradient import OPTIMIZERS
from evojax_merge.search.strategies.registry import StrategySettings, make_strategy
from evojax_merge.spaces.bounds import from_unit, to_unit_with_slope

SHAPE = (16, 32)
DRAWS = draws_of(SHAPE)
# Values at which no method has a kink.
VALUES: dict[str, Any] = {
    "weight": [0.7, 0.45, 0.3], "density": [0.55, 0.7, 0.4], "lambda": 1.1, "t": 0.35, "select_topk": 0.6,
    "scale": [1.2], "epsilon": [0.1] * 3, "gamma": [0.01] * 3, "eps": 1e-8,
    "r": 0.3, "alpha": 0.9, "width": 0.5, "offset": 0.1,
    "rank_share": 0.8, "common_share": 0.8, "core_density": 0.01, "steps": 30.0, "filter": 0.7,
}  # fmt: skip
SEARCHED = [(name, p.name) for name, method in METHODS.items() for p in method.parameters if p.searched]


def numbers_of(name: str, parents: int) -> dict[str, Any]:
    """A value for every parameter, per parent or one."""
    cosine = {"alpha": 0.35}
    values = {
        "nearswap": {"t": 0.03}, "ramplus_tl": {"epsilon": 0.15}, "add_cosine_a": cosine, "add_cosine_b": cosine,
    }.get(name, {})  # fmt: skip
    return {
        p.name: np.asarray((VALUES | values)[p.name], np.float64)[:parents]
        if p.per_parent
        else (VALUES | values)[p.name]
        for p in METHODS[name].parameters
        if p.name in VALUES
    }


@pytest.mark.parametrize(("name", "parameter"), sample(SEARCHED, 6))
def test_gradients_equal_differences_of_float64_formulas(name: str, parameter: str) -> None:
    """The derivative of a weighted sum of a merge's entries, along every entry of a searched parameter. Of a density
    the difference is taken as far apart as its derivative says."""
    method = METHODS[name]
    parents = min(3, method.max_parents or 3)
    models, options = make_models(SHAPE, parents), method.options
    cotangent = np.random.default_rng(5).normal(size=SHAPE)
    numbers = numbers_of(name, parents)
    sources = sources_of(options, models)
    prepared = tabulate(method, options, sources, numbers, DRAWS)
    keys, table = tuple(map(jnp.asarray, prepared.mask_keys)), jax.tree.map(jnp.asarray, prepared.statistics)

    def weighted(parameters: Any) -> jax.Array:
        statistics = look_up_differentiable(method, table, parameters)
        inputs = CombineInputs(tuple(map(jnp.asarray, sources)), keys, statistics, parameters)
        return jnp.sum(combine_differentiable(method, options, inputs) * cotangent)

    found = np.atleast_1d(jax.grad(weighted)(on_device(numbers))[parameter])

    step = HALF_WIDTH if method.parameter(parameter).quantised else 1e-5
    for index in range(found.size):

        def moved(by: float, index: int = index) -> float:
            value = np.array(np.atleast_1d(numbers[parameter]), np.float64)
            value[index] += by
            changed = numbers | {parameter: value if method.parameter(parameter).per_parent else value[0]}
            return float((expected_merge(name, options, models, changed, DRAWS) * cotangent).sum())

        expected = (moved(step) - moved(-step)) / (2 * step)
        np.testing.assert_allclose(found[index], expected, rtol=2e-3, atol=2e-3, err_msg=f"{name} {parameter}[{index}]")


def test_density_gradients_end_at_the_interval_s_ends() -> None:
    """At density 1 the difference is one-sided, and of a method with one."""
    method, models = METHODS["ties"], make_models(SHAPE, 2)
    prepared = tabulate(method, method.options, models, {}, DRAWS)
    table = jax.tree.map(jnp.asarray, prepared.statistics)
    numbers = {"weight": np.array([0.7, 0.4]), "density": np.ones(2), "lambda": 1.0}

    def total(parameters: Any) -> jax.Array:
        statistics = look_up_differentiable(method, table, parameters)
        inputs = CombineInputs(tuple(map(jnp.asarray, models)), (), statistics, parameters)
        return jnp.sum(jnp.square(combine_differentiable(method, method.options, inputs)))

    slope = jax.grad(total)(on_device(numbers))["density"][0]
    merged = expected_merge("ties", method.options, models, numbers, DRAWS)
    below = numbers | {"density": np.array([1 - HALF_WIDTH, 1.0])}
    expected = (2 * merged * (merged - expected_merge("ties", method.options, models, below, DRAWS))).sum() / HALF_WIDTH
    np.testing.assert_allclose(slope, expected, rtol=2e-3)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "sce"])
def test_a_density_outside_of_the_interval_changes_nothing(name: str) -> None:
    """As differences say: a merge is the same at all densities above 1, and at all below 0."""
    method, models = METHODS[name], make_models(SHAPE, 2)
    options = replace(method.options, rescale="density") if name == "dare_ties" else method.options
    numbers, density = numbers_of(name, 2), method.density.name if method.density is not None else ""
    prepared = tabulate(method, options, models, numbers, DRAWS)
    keys, table = tuple(map(jnp.asarray, prepared.mask_keys)), jax.tree.map(jnp.asarray, prepared.statistics)

    @jax.jit
    def total(parameters: Any) -> jax.Array:
        statistics = look_up_differentiable(method, table, parameters)
        inputs = CombineInputs(tuple(map(jnp.asarray, models)), keys, statistics, parameters)
        return jnp.sum(jnp.square(combine_differentiable(method, options, inputs)))

    slopes = jax.jit(jax.grad(total))
    for outside, end in ((1.3, 1.0), (1.004, 1.0), (-0.2, 0.0)):
        at, moved, last = (
            on_device(numbers | {density: np.full_like(numbers[density], value)})
            for value in (outside, outside + np.sign(outside) * 0.3, end)
        )
        assert total(at) == total(moved) == total(last)
        found = slopes(at)
        np.testing.assert_array_equal(found[density], np.zeros_like(numbers[density]))
        assert all(np.isfinite(one).all() for one in jax.tree.leaves(found))


def test_the_grid_is_straight_through() -> None:
    values = jnp.array([0.0, 0.12345, 0.9999])
    np.testing.assert_array_equal(on_grid(values), np.float32([0.0, 0.123, 1.0]))
    np.testing.assert_array_equal(jax.vmap(jax.grad(on_grid))(values), np.ones(3))


# ---------------------------------------------------------------------------------------------------------------
# Through a model


def plain(recipe: Recipe) -> Recipe:
    return jax.tree.map(np.array, recipe)


def differences(setting: Setting, evaluator: Any, recipe: Recipe, step: float = 2e-3) -> Recipe:
    """The derivative of the fitness along every number of one recipe, by central differences of what the evaluator
    scores."""
    leaves, structure = jax.tree.flatten(plain(recipe))
    moved = []
    for i, leaf in enumerate(leaves):
        for place in np.ndindex(leaf.shape):
            for by in (step, -step):
                changed = [one.copy() for one in leaves]
                changed[i][place] += by
                moved.append(changed)
    population = structure.unflatten([np.stack(column) for column in zip(*moved, strict=True)])
    values = fitness(evaluator.tasks, score_merges(evaluator, setting.bank, setting.spec, population))
    slopes, begin = [], 0
    for leaf in leaves:
        own = values[begin : begin + 2 * leaf.size].reshape(*leaf.shape, 2)
        slopes.append((own[..., 0] - own[..., 1]) / (2 * step))
        begin += 2 * leaf.size
    return structure.unflatten(slopes)


def assert_gradients_close(found: Recipe, expected: Recipe, tolerance: float = 0.02) -> None:
    first, second = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(one)]) for one in (found, expected))
    assert np.linalg.norm(second) > 1e-3
    assert np.linalg.norm(first - second) <= tolerance * np.linalg.norm(second)


@pytest.fixture(scope="module")
def linear(family: Family) -> Setting:
    return Setting(family, "task_arithmetic")


def differentiable_tasks(setting: Setting) -> list[Any]:
    """Likelihood and the margin of multiple choice, behind a header that all rows share, and not."""
    text, choice, _ = setting.tasks
    return [text, replace(behind_header(choice, 40), name="margins")]


def test_gradients_of_recipes_equal_differences_of_scores(linear: Setting) -> None:
    evaluator = linear.evaluator(differentiable_tasks(linear))
    scores, gradients = differentiate_merges(evaluator, linear.bank, linear.spec, linear.recipes)
    plainly = score_merges(evaluator, linear.bank, linear.spec, linear.recipes)
    for task in evaluator.tasks:
        np.testing.assert_allclose(
            scores.matrices[task.name][task.metric], plainly.matrices[task.name][task.metric], rtol=1e-5, atol=1e-5
        )
    expected = differences(linear, evaluator, take_candidate(linear.recipes, 1))
    assert_gradients_close(take_candidate(gradients, 1), expected)


@pytest.mark.parametrize("method", sample(["ties", "slerp"], 1))
def test_layers_merged_on_the_way_have_the_gradients_of_whole_candidates(
    method: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(family, method)
    tasks = [behind_header(setting.short, 20)]
    recipes = setting.random_recipes(2)
    _, materialised = differentiate_merges(setting.evaluator(tasks), setting.bank, setting.spec, recipes)
    monkeypatch.setattr(whole, "MATERIALISE_FRACTION", 0)
    evaluator = setting.evaluator(tasks, chunk=2)
    _, streamed = differentiate_merges(evaluator, setting.bank, setting.spec, recipes)
    assert_gradients_close(streamed, materialised, 1e-3)


@pytest.mark.parametrize("kind", sample(["mistral", "qwen3", "mixtral"], 1))
@thorough
def test_other_architectures_have_gradients(kind: str, tmp_path: Path) -> None:
    setting = Setting(build_family(tmp_path, tiny_config(kind)), "task_arithmetic")
    evaluator = setting.evaluator([setting.short])
    _, gradients = differentiate_merges(evaluator, setting.bank, setting.spec, setting.recipes)
    expected = differences(setting, evaluator, take_candidate(setting.recipes, 0))
    assert_gradients_close(take_candidate(gradients, 0), expected)


def test_a_failed_candidate_has_no_gradient_and_harms_no_other(linear: Setting) -> None:
    tasks = differentiable_tasks(linear)
    recipes = plain(linear.recipes)
    recipes.stacks["layers"]["weight"][1] = 1e30
    scores, gradients = differentiate_merges(linear.evaluator(tasks), linear.bank, linear.spec, recipes)
    values = fitness(tasks, scores)
    assert np.isnan(values[1]) and np.isfinite(values[[0, 2]]).all()
    _, expected = differentiate_merges(linear.evaluator(tasks), linear.bank, linear.spec, linear.recipes)
    for p in (0, 2):
        assert_gradients_close(take_candidate(gradients, p), take_candidate(expected, p), 1e-5)


def test_later_generations_compile_nothing_for_gradients(linear: Setting) -> None:
    evaluator = linear.evaluator(differentiable_tasks(linear))
    compiled_passes = [passes.score_gradient, passes.prefix_gradient, passes.recipe_gradient, passes.add]
    differentiate_merges(evaluator, linear.bank, linear.spec, linear.random_recipes(2, 1))
    compiled = [function._cache_size() for function in compiled_passes]
    assert all(compiled)
    differentiate_merges(evaluator, linear.bank, linear.spec, linear.random_recipes(2, 2))
    assert [function._cache_size() for function in compiled_passes] == compiled


def test_a_gradient_pass_keeps_a_state_per_layer(tmp_path: Path) -> None:
    """Twice the layers need hardly more than twice the states between layers, the largest of which is one layer's
    input: what is inside of a layer is computed again."""
    temporaries = []
    for layers in (4, 8):
        setting = Setting(build_family(tmp_path / str(layers), tiny_config(num_hidden_layers=layers)), "linear")
        evaluator = setting.evaluator([setting.tasks[0]], per_batch=1024)
        (batched_task,) = evaluator.batched_tasks
        population = evaluator.merges(setting.bank, setting.spec, setting.recipes).differentiable()
        temporaries.append(whole.pass_temporaries(evaluator, population, batched_task, 1, is_gradient=True))
        assert batched_task.scoring is not None
        tokens = max(batch.tokens.size for batch in batched_task.scoring.batches)
    # Float32 states of 48 numbers, and what the compiler keeps of parameters and gradients.
    assert temporaries[1] - temporaries[0] <= 4 * (2 * 4 * 48 * tokens)


# ---------------------------------------------------------------------------------------------------------------
# Strategies


def hill(genomes: Any) -> Any:
    return -jnp.square(genomes - 0.3).sum(axis=-1)


def scores_with_gradients(genomes: np.ndarray) -> Scores:
    values = np.asarray(hill(genomes), np.float32)[:, None]
    gradients = np.asarray(jax.vmap(jax.grad(hill))(jnp.asarray(genomes)))
    return Scores(values, np.ones(values.shape, bool), np.zeros(1, int), ("hill",), np.ones(1), gradients=gradients)


def make(name: str, generations: int = 60, population: int | None = None, seeds: int = 0, **gradient: Any) -> Any:
    settings = StrategySettings(6, population, 1 / 6, generations, seeds=seeds, gradient=GradientConfig(**gradient))
    return make_strategy("search", name, settings)


def climb(strategy: Any, generations: int) -> Any:
    state = strategy.init(generation_key(0, INIT_KEY), np.full((1, 6), 0.9, np.float32))
    for number in range(generations):
        genomes, state = strategy.ask(generation_key(0, number), state)
        state = strategy.tell(generation_key(0, number), state, genomes, scores_with_gradients(np.asarray(genomes)))
    return state


@pytest.mark.parametrize(
    ("optimizer", "schedule"), sample([(one, schedule) for one in OPTIMIZERS for schedule in ("cosine", "constant")], 3)
)
def test_every_optimizer_takes_steps(optimizer: str, schedule: str) -> None:
    strategy = make("gradient", population=2, optimizer=optimizer, schedule=schedule, learning_rate=0.02)
    state = climb(strategy, 4)
    moved = strategy.finalists(state)
    # Some only begin: adadelta's steps grow from nothing.
    assert np.isfinite(moved).all() and (moved[0] != np.float32(0.9)).any()
    assert all(np.issubdtype(np.asarray(leaf).dtype, np.number) for leaf in jax.tree.leaves(state))


def test_a_start_at_a_bound_is_led_away_from_it() -> None:
    """There the map into the bounds has no slope of its own."""
    low, high = from_unit(np.array([0.0, 1.0]))
    slopes = jax.vmap(jax.grad(to_unit_with_slope))(jnp.array([low, 0.0, 0.5, 1.0, high], jnp.float32))
    np.testing.assert_allclose(slopes, [0.25, 0.5, 1.0, 0.5, 0.25], atol=1e-5)
    outside = jax.vmap(jax.grad(to_unit_with_slope))(jnp.array([low - 0.03, high + 0.03], jnp.float32))
    assert (np.sign(outside) == -1).all()
    parents = [{"w": np.ones(3, np.float32)}, {"w": np.full(3, 2, np.float32)}]
    for start in (0.0, 1.0):
        found = search_trees(
            parents, lambda merged: -jnp.square(merged["w"] - 1.4).sum(), method="slerp", strategy="gradient",
            parameters={"t": {"start": start}}, generations=60,
        )  # fmt: skip
        assert found.best.fitness > -1e-3


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
def test_every_start_climbs(optimizer: str) -> None:
    rate = {"sgd": 0.3}.get(optimizer, 0.05)
    strategy = make("gradient", population=3, optimizer=optimizer, learning_rate=rate)
    state = climb(strategy, 60)
    np.testing.assert_allclose(strategy.finalists(state), 0.3, atol=0.1)
    metrics = strategy.metrics(state)
    assert 0 <= metrics["learning_rate"] < 0.01 * rate and metrics["gradient_norm"] < 0.5


def test_a_start_that_fails_goes_on_beside_the_best() -> None:
    strategy = make("gradient", population=3)
    state = strategy.init(generation_key(0, INIT_KEY), np.full((1, 6), 0.9, np.float32))
    genomes, state = strategy.ask(generation_key(0, 0), state)
    scores = scores_with_gradients(np.asarray(genomes))
    values, gradients = scores.values.copy(), np.array(scores.gradients)
    values[1], gradients[1] = np.nan, np.nan
    best = int(np.nanargmax(values))
    state = strategy.tell(generation_key(0, 0), state, genomes, replace(scores, values=values, gradients=gradients))
    moved = strategy.finalists(state)
    assert np.isfinite(moved).all()
    assert np.abs(moved[1] - np.asarray(genomes)[best]).max() < 1


def test_a_strategy_says_how_many_generations_follow_gradients() -> None:
    hybrid = make("hybrid", generations=40, population=8, starts=2)
    strategies = [hybrid, make("gradient", population=3), make("cma_es")]
    expected = [(10, 2), (40, 3), (0, 0)]
    assert [gradient_generations(one, 40) for one in strategies] == expected
    seeds = np.zeros((1, 6), np.float32)
    assert [gradient_generations(seeded(one, seeds), 40) for one in strategies] == expected


def test_hybrid_hands_its_best_start_to_cma_es() -> None:
    strategy = make("hybrid", generations=40, population=8, starts=2)
    state = climb(strategy, 10)
    genomes, _ = strategy.ask(generation_key(0, 10), state)
    assert genomes.shape == (8, 6) and not strategy.wants_gradients(state)
    ends = strategy.finalists(state)[1:]
    np.testing.assert_array_equal(genomes[:2], ends)
    best = ends[np.argmax(hill(ends))]
    np.testing.assert_allclose(state.run.mean, best, atol=1e-6)
    assert 1 / 6 / 8 <= strategy.metrics(climb(strategy, 11))["sigma"] <= 1 / 6 * 1.5
    assert float(hill(climb(strategy, 40).run.mean)) > -1e-2


# ---------------------------------------------------------------------------------------------------------------
# Whole searches


def document(family: Family, kind: str, **search: Any) -> dict[str, Any]:
    task = task_section(family.tasks, name="task", kind=kind, heldout=0.25)
    if kind == "exact_match":
        task |= {"pattern": r"w\d+ w\d+", "max_new_tokens": 3}
    space = {"method": "ties", "parameters": {"weight": {"high": 1.5}, "density": {"low": 0.2}}}
    return search_config(family, space=space, tasks=[task], seed=3) | {"search": {"generations": 6} | search}


def history(folder: Path) -> bytes:
    return (folder / "history.jsonl").read_bytes()


@thorough
@pytest.mark.parametrize(
    ("kind", "search"),
    sample(
        [
            ("multiple_choice", {"strategy": "gradient", "seeds": ["parents"]}),
            ("exact_match", {"strategy": "hybrid", "population": 4, "gradient": {"generations": 3}}),
            ("likelihood", {"strategy": "gradient", "population": 2, "gradient": {"minibatches": 3}}),
            ("path", {"strategy": "gradient", "population": 2, "gradient": {"minibatches": 2}}),
        ],
        1,
    ),
)
def test_a_search_by_gradients_that_was_stopped_is_the_same_search(
    kind: str, search: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    if kind == "multiple_choice":
        search = search | {"generations": 4}
    config = document(family, "likelihood" if kind == "path" else kind, **search)
    if kind == "path":
        config["space"], config["data_flow"] = None, {"moves": 3, "window": 2}
    if kind == "multiple_choice":
        config["tasks"][0]["metric"] = "margin"
        records = [
            {"prompt": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i + 3} w4"], "answer": i % 2}
            for i in range(5, 17)
        ]
        config["tasks"][0]["file"] = str(write_lines(tmp_path / "choices.jsonl", records))
    em.evolve(config, out=tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(generation: Any) -> None:
        if generation.number == 2:
            raise Stopped

    with pytest.raises(Stopped):
        em.evolve(config, out=tmp_path / "parts", on_generation=stop)
    assert len(history(tmp_path / "parts").splitlines()) == 2
    em.evolve(config, out=tmp_path / "parts", resume=True)
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    for name in ("result.json", "best/model/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@thorough
def test_gradients_improve_the_fitness(family: Family, tmp_path: Path) -> None:
    run = em.evolve(document(family, "likelihood", strategy="gradient", generations=12), out=tmp_path / "run")
    best = [row["best"] for row in run.history]
    assert best[-1] > best[0] + 0.01 and {row["evaluations"] for row in run.history} == set(range(1, 13))


def test_pytrees_are_searched_by_gradients() -> None:
    rng = np.random.default_rng(0)
    base = {"a": {"w": rng.normal(size=(4, 5)).astype(np.float32)}, "b": {"w": rng.normal(size=7).astype(np.float32)}}
    parents = [jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32), base) for _ in range(2)]
    wanted = jax.tree.map(lambda x, y, z: x + 0.8 * (y - x) + 0.3 * (z - x), base, *parents)
    examples = np.linspace(0.5, 1.5, 6).astype(np.float32)

    def score(merged: Any, scales: Any) -> Any:
        miss = sum(
            jnp.sum(jnp.square(one - two)) for one, two in zip(*map(jax.tree.leaves, (merged, wanted)), strict=True)
        )
        return -miss * scales

    for minibatches in (1, 3):
        found = search_trees(
            parents, score, base=base, examples=examples, method="task_arithmetic", strategy="gradient",
            generations=80, gradient={"minibatches": minibatches, "learning_rate": 0.1},
        )  # fmt: skip
        for weights in by_group(found).values():
            np.testing.assert_allclose(weights["weight"], (0.8, 0.3), atol=0.02)


# ---------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("kind", "search", "said"),
    [
        ("exact_match", {"strategy": "gradient"}, "the gradient of the fitness, and accuracy has none; take hybrid"),
        ("likelihood", {"strategy": "gradient", "gradient": {"optimizer": "adma"}}, "adam"),
        (
            "likelihood",
            {"strategy": "gradient", "gradient": {"minibatches": 10}},
            "minibatches: 10; expected 9 at most",
        ),
        ("likelihood", {"strategy": "gradient", "rungs": 2}, "rungs: 2; gradient does not race"),
        (
            "likelihood",
            {"strategy": "hybrid", "gradient": {"generations": 6}},
            "6 generations, of which 6 follow gradients",
        ),
    ],
)
def test_what_has_no_gradient_is_refused(
    kind: str, search: dict[str, Any], said: str, family: Family, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        em.evolve(document(family, kind, **search), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@thorough
def test_hybrid_says_what_its_figures_mean(family: Family, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    search = {"strategy": "hybrid", "population": 4, "generations": 3, "gradient": {"generations": 1}}
    write_json(config, document(family, "exact_match", **search))
    said = " ".join(run_here("search", config, "--out", tmp_path / "run").stdout.split())
    assert "from generation 1 on candidates are scored on task log_probability, which has a gradient, in place" in said
    assert "from generation 2 on candidates are scored on the fitness itself: task accuracy" in said
    rows = [json.loads(line) for line in history(tmp_path / "run").splitlines()]
    assert [row.get("companion", False) for row in rows] == [True, False, False]
    assert [row["best"] is None for row in rows] == [True, False, False]
    assert load_yaml(tmp_path / "run/config.yaml")["search"]["gradient"]["optimizer"] == "adam"


def test_a_flat_fitness_is_told(family: Family) -> None:
    parents = [{"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}]
    with pytest.warns(UserWarning, match="the gradient is 0 everywhere"):
        search_trees(parents, lambda merged: jnp.round(merged["w"].sum()), strategy="gradient", generations=2)


def test_the_layers_of_a_path_have_no_gradient(family: Family, tmp_path: Path) -> None:
    """Its scales have one: test_path_gradients.py."""
    path = document(family, "likelihood", strategy="gradient")
    path.pop("space")
    with pytest.raises(InputError, match="gradient: which layers a path takes has no gradient, and scales: none"):
        em.evolve(path | {"data_flow": {"scales": "none"}}, out=tmp_path / "run")


def test_a_function_of_the_host_has_no_gradient() -> None:
    with pytest.raises(InputError, match="the strategy gradient follows a gradient, and score has none"):
        search_trees([np.ones(3, np.float32)] * 2, em.host_callback(lambda merged: 0.0), strategy="gradient")
