"""Wrong arguments of the public functions, and functions of users that return something else than was asked for: each
is refused with the argument's name."""

import traceback
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.families import Family
from helpers.trees import search_trees
from merge_kernels import METHODS, Method, Parameter, Prepared

import evojax_merge as em
from evojax_merge.search.strategies import registry

NAN = float("nan")
PARENTS = [{"a": np.ones(2, np.float32) * k, "b": {"c": np.ones(3, np.float32)}} for k in (1, 2)]


def tree(leaf: Any) -> list[Any]:
    return [{"a": leaf}, {"a": leaf}]


def search(**changes: Any) -> Any:
    given = {"parents": PARENTS, "fitness": lambda merged: -jnp.sum(merged["a"]), "generations": 1, "population": 4}
    given |= changes
    return search_trees(given.pop("parents"), given.pop("fitness"), **given)


def inside_itself() -> list[Any]:
    nested: list[Any] = [np.ones(2)]
    nested.append(nested)
    return [nested, nested]


SEARCHES: list[tuple[dict[str, Any], str]] = [
    ({"parents": None}, "parents: None; expected a list or a tuple"),
    ({"parents": []}, "parents: is empty"),
    ({"parents": "ab"}, "parents"),
    ({"parents": np.ones((2, 3))}, "parents: array"),
    ({"parents": {"x": 1}}, "parents: hold no floating-point array"),
    ({"parents": (one for one in PARENTS)}, "parents: <generator"),
    ({"parents": tree(None)}, "parents: hold no floating-point array"),
    ({"parents": [PARENTS[0], {"a": None, "b": {"c": np.ones(3)}}]}, "parents[1]: has no leaf 'a'"),
    ({"parents": tree(np.array([object()]))}, "parents[0]: leaf 'a' is of object"),
    ({"parents": tree(np.ones(2, complex))}, "parents[0]: leaf 'a' is of complex128"),
    ({"parents": tree(np.array(["x"]))}, "parents[0]: leaf 'a' is of <U1"),
    ({"parents": tree(torch.ones(2))}, "parents[0]: leaf 'a' is a Tensor; expected an array of NumPy or JAX"),
    ({"parents": tree(torch.ones(2, dtype=torch.bfloat16))}, "parents[0]: leaf 'a' is a Tensor; expected an array"),
    ({"parents": tree(np.array([NAN]))}, "parents[0]: leaf 'a' holds NaN"),
    ({"parents": [PARENTS[0], {"a": np.ones(2)}]}, "parents[1]: has no leaf 'b/c'"),
    ({"parents": [PARENTS[0], {"a": np.ones(5), "b": {"c": np.ones(3)}}]}, "parents[1]: leaf 'a' has shape"),
    ({"parents": [{1: np.ones(2), "a": np.ones(2)}] * 2}, "parents[0]: is no pytree"),
    ({"parents": inside_itself()}, "parents[0]: is no pytree"),
    ({"base": 3.0, "method": "ties"}, "parents[0]: has no leaf ''"),
    ({"fitness": None}, "tasks: None; expected a task"),
    ({"fitness": "accuracy"}, "tasks: 'accuracy'; expected a task"),
    ({"fitness": lambda: 0.0}, "tasks[0].function: python:<lambda>@"),
    ({"fitness": lambda merged, more: 0.0}, "takes (merged, more); inputs: model calls it with (model)"),
    ({"fitness": lambda merged: None}, "tasks[0]: returned None"),
    ({"fitness": lambda merged: "good"}, "tasks[0]: returned 'good'"),
    ({"fitness": lambda merged: {"score": 1.0}}, "tasks[0]: returned {'score': 1.0}"),
    ({"fitness": lambda merged: merged}, "tasks[0]: returned {'a':"),
    ({"fitness": lambda merged: (one for one in (1, 2))}, "tasks[0]: returned <generator"),
    ({"fitness": lambda merged: 1j * jnp.sum(merged["a"])}, "tasks[0]: returned complex64[]"),
    ({"fitness": lambda merged: jnp.ones((2, 2))}, "tasks[0]: returned float32[2, 2]"),
    ({"fitness": lambda merged: jnp.ones(0)}, "tasks[0]: returned float32[0]"),
    ({"fitness": lambda merged: float(merged["a"][0])}, "tasks[0]: JAX cannot trace it"),
    ({"fitness": em.host_callback(lambda merged: None)}, "tasks[0]: returned None"),
    ({"fitness": em.host_callback(lambda merged: "good")}, "tasks[0]: returned 'good'"),
    ({"fitness": em.host_callback(lambda merged: [[1], [1, 2]])}, "tasks[0]: returned [[1], [1, 2]]"),
    ({"fitness": em.host_callback(lambda merged: 1j)}, "tasks[0]: returned complex128[]"),
    ({"fitness": em.host_callback(lambda: 1.0)}, "tasks[0].function: python:<lambda>@"),
    ({"fitness": lambda merged, rows: jnp.ones(5), "examples": np.ones(3)}, "tasks[0]: returned 5 numbers for 3"),
    ({"fitness": lambda merged, rows: jnp.ones(2), "examples": np.array(["a", "b"])}, "examples: leaf '' is of <U1"),
    ({"fitness": lambda merged, rows: jnp.ones(2), "examples": np.array([None, None])}, "examples: leaf '' is of obj"),
    (
        {"fitness": lambda merged, rows: rows, "examples": {"x": np.ones(3), "y": np.ones(4)}},
        "examples: has arrays with leading axes",
    ),
    ({"fitness": lambda merged, rows: rows, "examples": [1, 2]}, "a list is a pytree of its numbers, np.array"),
    ({"method": None}, "method: None; expected a text"),
    ({"method": ["linear"]}, "method: ['linear']; expected a text"),
    ({"parameters": 5}, "space.parameters: expected a mapping, found 5"),
    ({"parameters": ["weight"]}, "space.parameters: expected a mapping, found a list"),
    ({"parameters": {"weight": None}}, "space.parameters.weight: expected a mapping (of low, high, start)"),
    ({"parameters": {"weight": {1: 2}}}, "space.parameters.weight.1: unknown key"),
    ({"parameters": {"weight": {"low": NAN}}}, "space.parameters.weight.low: expected a number"),
    ({"fixed": 1.5}, "space.fixed: expected a mapping, found 1.5"),
    ({"fixed": {"weight": NAN}}, "space.fixed.weight: expected a number"),
    ({"fixed": {3: 1}}, "space.fixed.3: the key is no text"),
    ({"rescale": 2.0}, "space.rescale: expected true, false, none, l1 or density, found 2.0"),
    ({"population": True}, "search.population: expected a whole number from 1 to 100,000, found true"),
    ({"generations": 1.5}, "generations: 1.5; expected a whole number"),
    ({"generations": -1}, "generations: "),
    ({"sigma": "wide"}, "search.sigma: expected a number from 1e-06 to 10, found 'wide'"),
    ({"sigma": NAN}, "sigma: "),
    ({"sigma": True}, "search.sigma: expected a number from 1e-06 to 10, found true"),
    ({"seeds": "uniform"}, "search.seeds: expected a list"),
    ({"seeds": [1]}, "search.seeds[0]: expected uniform"),
    ({"rungs": 2.5}, "search.rungs: expected a whole number"),
    ({"validation": True}, "search.validation: expected a share from 0"),
    ({"stop": 3}, "search.stop: expected a mapping"),
    ({"stop": {"seconds": "long"}}, "search.stop.seconds: expected a number"),
    ({"gradient": []}, "search.gradient: expected a mapping"),
    ({"seed": None}, "seed: None; expected a whole number"),
    ({"seed": True}, "seed: True; expected a whole number"),
    ({"seed": 1.5}, "seed: 1.5; expected a whole number"),
    ({"seed": 2**64}, "seed: expected a whole number from 0 to 9,223,372,036,854,775,807"),
    ({"evaluation": {"chunk": True}}, "evaluation.chunk: expected a whole number"),
    ({"evaluation": 3}, "evaluation: 3; expected"),
    ({"out": 3}, "out: 3; expected a text or a path"),
    ({"out": "a\0b"}, "out: 'a\\x00b'; expected a path"),
    ({"out": "x" * 5000}, "out: 'xxx"),
    ({"resume": "yes", "out": "run"}, "resume: 'yes'; expected True or False"),
    ({"resume": True}, "resume: there is no run folder"),
    ({"on_generation": None}, "on_generation: None; expected a function"),
    ({"on_generation": lambda: None}, "on_generation: takes ()"),
]


@pytest.mark.parametrize(("changes", "named"), SEARCHES, ids=[f"{named}" for _, named in SEARCHES])
def test_wrong_searches_of_pytrees(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(em.InputError) as caught:
        search(**changes)
    assert named in str(caught.value)


GROUPS: list[tuple[Any, str]] = [
    (lambda path: None, "groups: returned None for 'a'"),
    (lambda path: [path], "groups: returned ['a']"),
    (lambda: "a", "groups: takes ()"),
]


@pytest.mark.parametrize("number", range(len(GROUPS)))
def test_groups_that_are_something_else(number: int) -> None:
    groups, named = GROUPS[number]
    em.register_backend(f"groups_{number}", em.FunctionFactory(groups=groups))
    with pytest.raises(em.InputError) as caught:
        search(backend=f"groups_{number}")
    assert named in str(caught.value)


CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: em.merge(None, "out"), "merge: recipe: None"),
    (lambda: em.merge(3, "out"), "merge: recipe: 3"),
    (lambda: em.merge({}, None), "merge: out: None; expected a text or a path"),
    (lambda: em.merge({}, "a\0b"), "merge: out: 'a\\x00b'"),
    (lambda: em.merge({}, "out", dtype=3), "merge: dtype: 3; expected a text or None"),
    (lambda: em.merge({}, "out", dtype=["float32"]), "merge: dtype: ['float32']"),
    (lambda: em.merge({}, "out", seed=1.5), "merge: seed: 1.5; expected a whole number"),
    (lambda: em.merge({}, "out", overwrite="no"), "merge: overwrite: 'no'; expected True or False"),
    (lambda: em.merge({}, "out", strict=None), "merge: strict: None; expected True or False"),
    (lambda: em.merge({}, "out", allow_nonfinite=1), "merge: allow_nonfinite: 1"),
    (lambda: em.merge({}, "out", allow_crimes=[]), "merge: allow_crimes: []"),
    (lambda: em.evaluate(None, []), "evaluate: models: None"),
    (lambda: em.evaluate(3, []), "evaluate: models: 3"),
    (lambda: em.evaluate([None], []), "evaluate: models[0]: None"),
    (lambda: em.evaluate([], []), "models: is empty"),
    (lambda: em.evaluate("model", None), "evaluate: tasks: None"),
    (lambda: em.evaluate("model", True), "evaluate: tasks: True"),
    (lambda: em.evaluate("model", [3]), "evaluate: tasks[0]: 3"),
    (lambda: em.evaluate("model", [], split="train"), "evaluate: split: 'train'; expected 'search', 'validation'"),
    (lambda: em.evolve(None), "evolve: config: None"),
    (lambda: em.evolve([]), "evolve: config: []"),
    (lambda: em.evolve({}, out=1.5), "evolve: out: 1.5"),
    (lambda: em.evolve({}, resume=1), "evolve: resume: 1"),
    (lambda: em.evolve({}, seed=True), "evolve: seed: True"),
    (lambda: em.evolve({}, overrides="a=b"), "evolve: overrides: 'a=b'; expected a list of texts"),
    (lambda: em.evolve({}, overrides={"seed": 2}), 'expected a list of texts, such as ["search.generations=20"]'),
    (lambda: em.evolve({}, overrides=[3]), "evolve: overrides[0]: 3; expected a text"),
    (lambda: em.evolve({}, on_generation=None), "evolve: on_generation: None; expected a function"),
    (lambda: em.evolve({}, force="yes"), "evolve: force: 'yes'"),
    (lambda: em.Evaluator(None), "Evaluator: config: None"),
    (lambda: em.Evaluator({}, seed="1"), "Evaluator: seed: '1'"),
    (lambda: em.Evaluator({}, split="all"), "Evaluator: split: 'all'"),
    (lambda: em.Evaluator({}, overrides=None), "Evaluator: overrides: None"),
    (lambda: em.load_bank(None), "load_bank: parents: None"),
    (lambda: em.load_bank("model"), "load_bank: parents: 'model'; expected a list"),
    (lambda: em.load_bank([3]), "load_bank: parents[0]: 3"),
    (lambda: em.load_bank(["model"], 3), "load_bank: base: 3"),
    (lambda: em.load_bank(["model"], method=None), "load_bank: method: None"),
    (lambda: em.load_bank(["model"], fixed=3), "load_bank: fixed: 3"),
    (lambda: em.load_bank(["model"], fixed={"epsilon": NAN}), "load_bank: fixed.epsilon: nan"),
    (lambda: em.load_bank(["model"], normalize="yes"), "load_bank: normalize: 'yes'"),
    (lambda: em.load_bank(["model"], rescale=[]), "load_bank: rescale: []"),
    (lambda: em.load_bank(["model"], seed=None), "load_bank: seed: None"),
    (lambda: em.load_bank(["model"], export_dtype=None), "load_bank: export_dtype: None"),
    (lambda: em.open_run(None), "open_run: folder: None"),
    (lambda: em.open_run(b"run"), "open_run: folder: b'run'"),
    (lambda: em.open_run("a\0b"), "open_run: folder: 'a\\x00b'"),
    (lambda: em.Run("run"), "Run: path: 'run'; expected a Path"),
    (lambda: em.host_callback(None), "host_callback: function: None"),
    (lambda: em.host_callback(3), "host_callback: function: 3; expected a function"),
    (lambda: em.register_method(None), "register_method: None"),
    (lambda: em.register_strategy(None, None), "register_strategy: name: None"),
    (lambda: em.register_strategy("", lambda settings: None), "register_strategy: name: ''"),
    (lambda: em.register_strategy("two words", lambda settings: None), "register_strategy: name: 'two words'"),
    (lambda: em.register_strategy("mine", None), "register_strategy: factory: None"),
    (lambda: em.register_architecture(None), "register_architecture: architecture: None"),
    (lambda: em.register_architecture("llama"), "register_architecture: architecture: 'llama'"),
    (lambda: em.register_task(None), "register_task: kind: None"),
    (lambda: em.register_task(dict), "register_task: kind: <class 'dict'>"),
    (lambda: em.EvosaxStrategy("mine", None, None), "strategy 'mine': algorithm: None"),
]


@pytest.mark.parametrize(("call", "named"), CALLS, ids=[named for _, named in CALLS])
def test_wrong_calls(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(em.InputError) as caught:
        call()
    assert named in str(caught.value)


@pytest.fixture(scope="module")
def evaluator(family: Family) -> em.Evaluator:
    task = {"name": "text", "kind": "likelihood", "file": str(family.tasks)}
    parents = [str(parent) for parent in family.parents]
    space = {"method": "task_arithmetic", "parameters": {"weight": {}}}
    return em.Evaluator({"base": str(family.base), "parents": parents, "space": space, "tasks": [task]})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda dims: None, "genome: None"),
        (lambda dims: "weights", "genome: 'weights'"),
        (lambda dims: np.zeros(dims - 1), "genome: shape ["),
        (lambda dims: np.zeros((1, dims)), "genome: shape [1, "),
        (lambda dims: [], "genome: shape [0]"),
        (lambda dims: 3.0, "genome: shape []"),
        (lambda dims: np.full(dims, NAN), "genome: NaN"),
        (lambda dims: np.full(dims, 1e300), "genome: NaN or infinite in float32"),
        (lambda dims: np.zeros(dims, complex), "genome: array"),
        (lambda dims: np.zeros(dims, bool), "genome: array"),
        (lambda dims: np.array([None] * dims), "genome: array"),
        (lambda dims: [[1], [1, 2]], "genome: [[1], [1, 2]]"),
    ],
)
def test_wrong_genomes(make: Callable[[int], Any], named: str, evaluator: em.Evaluator) -> None:
    value = make(evaluator.dims)
    with pytest.raises(em.InputError) as caught:
        evaluator.recipe(value)
    assert str(caught.value).startswith(named) and "expected" in str(caught.value)
    with pytest.raises(em.InputError, match=r"^genomes: "):
        evaluator.scores(value if np.ndim(np.array(value, object)) != 2 else value[0])


def test_a_users_own_error_passes_through() -> None:
    for fitness in (lambda merged: 1 / 0, em.host_callback(lambda merged: 1 / 0)):
        with pytest.raises(ZeroDivisionError):
            search(fitness=fitness)


# ---------------------------------------------------------------------------------------------------------------
# Plugins that return something else


def method(combine: Callable[..., Any], **changes: Any) -> Method:
    return Method("mine", (Parameter("weight", True, 1.0, 0.0, 2.0),), base="parent", combine=combine, **changes)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (method(lambda *arguments: None), "combine returned None"),
        (method(lambda *arguments: "merged"), "combine returned 'merged'"),
        (method(lambda options, inputs: inputs.sources[0][0]), "combine returned float32[3]"),
        (method(lambda options, inputs: inputs.sources[0].astype(jnp.int32)), "combine returned int32[4, 3]"),
        (method(lambda options, inputs: list(inputs.sources)), "combine returned ["),
        (method(lambda options, inputs: inputs.sources[0], prepare=lambda *more: None), "prepare returned None"),
    ],
)
def test_methods_that_return_something_else(wrong: Method, named: str) -> None:
    before = dict(METHODS)
    with pytest.raises(em.InputError, match=r"^register_method: merge method 'mine': ") as caught:
        em.register_method(wrong)
    assert named in str(caught.value) and before == METHODS


def test_methods_that_are_right_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    right = method(lambda options, inputs: inputs.sources[0], prepare=lambda *more: Prepared((), {}))
    try:
        assert em.register_method(right) is right and METHODS["mine"] is right
    finally:
        METHODS.pop("mine", None)


class Constant:
    """A strategy that always asks for zeros."""

    name, population = "constant", 4

    def init(self, key: Any, genomes: np.ndarray) -> Any:
        return {"dims": np.zeros(genomes.shape[1])}

    def ask(self, key: Any, state: Any) -> Any:
        return np.zeros((4, len(state["dims"])), np.float32), state

    def tell(self, key: Any, state: Any, genomes: Any, scores: Any) -> Any:
        return state

    def finalists(self, state: Any) -> Any:
        return np.zeros((1, len(state["dims"])), np.float32)

    def metrics(self, state: Any) -> Any:
        return {}


STRATEGIES: list[tuple[dict[str, Any], str]] = [
    ({"ask": lambda self, key, state: None}, "returned None from ask"),
    ({"ask": lambda self, key, state: "genomes"}, "returned 'genomes' from ask"),
    ({"ask": lambda self, key, state: (None, state)}, "asked for genomes of shape []"),
    ({"ask": lambda self, key, state: (np.zeros((3, len(state["dims"]))), state)}, "asked for genomes of shape [3, "),
    ({"ask": lambda self, key, state: (np.zeros((4, 99)), state)}, "asked for genomes of shape [4, 99]"),
    ({"ask": lambda self, key, state: (np.full((4, len(state["dims"])), NAN), state)}, "expected finite genomes"),
    ({"ask": lambda self, key, state: (np.full((4, len(state["dims"])), "x"), state)}, "expected finite genomes"),
    ({"tell": lambda self, key, state, genomes, scores: None}, "returned None from tell"),
    ({"metrics": lambda self, state: None}, "returned None from metrics"),
    ({"metrics": lambda self, state: {"sigma": "wide"}}, "returned {'sigma': 'wide'} from metrics"),
    ({"finalists": lambda self, state: None}, "returned None from finalists"),
    ({"finalists": lambda self, state: np.zeros(3)}, "from finalists"),
]


@pytest.mark.parametrize(("changes", "named"), STRATEGIES, ids=[named for _, named in STRATEGIES])
def test_strategies_that_answer_something_else(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    em.register_strategy("constant", lambda settings: type("Wrong", (Constant,), changes)())
    with pytest.raises(em.Failed, match=r"^the strategy constant ") as caught:
        search(strategy="constant")
    assert named in str(caught.value)


@pytest.mark.parametrize("made", [None, "cma_es", 3, type("Few", (Constant,), {"population": "many"})()])
def test_factories_that_make_something_else(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    em.register_strategy("constant", lambda settings: made)
    with pytest.raises(em.InputError, match=r"the strategy constant (lacks|has population 'many')"):
        search(strategy="constant")


def test_a_wrong_argument_has_a_short_traceback() -> None:
    """Frames of the caller, and of the function that was called: notebooks show them all."""
    with pytest.raises(em.InputError, match="unknown method") as raised:
        em.MergeSpace(em.load_models(None, PARENTS), "linaer")
    files = [entry.filename for entry in traceback.extract_tb(raised.tb)]
    assert sum("evojax_merge" in file for file in files) <= 1 and files[0] == __file__
