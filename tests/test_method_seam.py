"""A merge method from outside: one `Method` and one call, for recipes, searches, pytrees and listings alike."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import run_here
from helpers.families import Family, stand_in_for_the_zoo
from helpers.files import write_json, write_yaml
from helpers.models import state
from helpers.searches import search_config
from helpers.trees import by_group, search_trees
from hostile import run_script
from merge_kernels import METHODS, Method, Options, Parameter, Prepared, register
from reference.merging import clipped_task_arithmetic

import evojax_merge as em
from evojax_merge import cli
from evojax_merge.spaces.parameter import GroupSpace, SearchParameter

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, METHOD_FILES = ROOT / "configs", ROOT / "kernels" / "merge_kernels" / "methods"
# A method's name that means something else: how rotary positions are scaled.
OTHER_MEANINGS = {("llama_like_gguf.py", "linear"), ("llama_like.py", "linear")}


def measure(options, inputs):
    """The root mean square of each delta, which takes a whole tensor to know."""
    base, *parents = (np.asarray(x, np.float64) for x in inputs.sources)
    deltas = [x - base for x in parents]
    return Prepared((), {"rms": np.array([np.sqrt(np.mean(d * d)) for d in deltas], np.float32)})


def clip(options, inputs):
    base, *parents = (x.astype(jnp.float32) for x in inputs.sources)
    weights, limits = inputs.parameters["weight"], inputs.parameters["cap"] * inputs.statistics["rms"]
    clipped = [w * jnp.clip(x - base, -c, c) for w, x, c in zip(weights, parents, limits, strict=True)]
    return base + sum(clipped)


CLIPPED = Method(
    "clipped",
    (
        Parameter("weight", per_parent=True, default=None, low=0.0, high=1.0),
        Parameter("cap", per_parent=False, default=1.0, low=0.0, high=3.0, valid_min=0.0),
    ),
    base="required",
    combine=clip,
    prepare=measure,
    options=Options(has_base=True),
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    em.register_method(CLIPPED)
    yield
    del METHODS["clipped"]


def test_in_a_recipe(family: Family, tmp_path: Path) -> None:
    models = [
        {"model": parent, "parameters": {"weight": w}} for parent, w in zip(family.parents, (0.7, 0.4), strict=True)
    ]
    recipe = {"merge_method": "clipped", "base_model": family.base, "models": models, "parameters": {"cap": 0.8}}
    merged = state(em.merge(recipe, tmp_path / "out"))
    base, *parents = map(state, (family.base, *family.parents))
    for name, values in merged.items():
        own = clipped_task_arithmetic(base[name], [parent[name] for parent in parents], [0.7, 0.4], 0.8)
        np.testing.assert_allclose(values, own, rtol=1e-5, atol=1e-6)


def test_in_a_search(family: Family, tmp_path: Path) -> None:
    """Its winner is what the recipe says, computed by NumPy."""
    space = {"method": "clipped", "components": ["attention+mlp+norm+embed+final_norm"], "layers_per_group": "all",
             "parameters": {"weight": {"high": 1.5}, "cap": {}}}  # fmt: skip
    config = search_config(family, space=space)
    run_here("search", write_yaml(tmp_path / "config.yaml", config), "--out", tmp_path / "run")
    run = em.open_run(tmp_path / "run")
    assert run.finished and len(run.history) == 2
    [part] = run.recipe["slices"]
    weights = [source["parameters"]["weight"] for source in part["sources"][1:]]
    base, *parents = map(state, (family.base, *family.parents))
    for name, values in state(run.model).items():
        own = clipped_task_arithmetic(
            base[name], [parent[name] for parent in parents], weights, part["parameters"]["cap"]
        )
        np.testing.assert_allclose(values, own, rtol=1e-5, atol=1e-6)


def test_attributes_say_what_a_name_would(family: Family, tmp_path: Path) -> None:
    """`base_is_first_parent` and `interpolates`, as SLERP has them, and `copies`, as passthrough has it."""

    def chord(options, inputs):
        first, second = (x.astype(jnp.float32) for x in inputs.sources)
        return first + inputs.parameters["share"] * (second - first)

    share = Parameter("share", per_parent=False, default=None, low=0.0, high=1.0, start=0.5)
    gain = Parameter("gain", per_parent=True, default=1.0, low=0.0, high=2.0)
    pair = {"min_parents": 2, "max_parents": 2, "base": "parent", "base_is_first_parent": True, "interpolates": "share"}
    methods = [
        Method("chord", (share,), combine=chord, **pair),
        Method("gained", (gain,), base="parent", combine=lambda options, inputs: 1 / 0, max_parents=1, copies="gain"),
    ]
    for method in methods:
        register(method)
    try:
        models = [{"model": parent} for parent in family.parents]
        recipe = {"merge_method": "chord", "base_model": family.parents[1], "models": models}
        merged = state(em.merge(recipe | {"parameters": {"share": 0.25}}, tmp_path / "chord"))
        one, other = map(state, family.parents)
        for name, values in merged.items():
            np.testing.assert_allclose(values, 0.75 * other[name] + 0.25 * one[name], rtol=1e-5, atol=1e-6)
        space = GroupSpace(methods[0], 2, ("all",), (SearchParameter("share", 0.0, 1.0, (0.5,)),), ())
        seeds = [space.values(jnp.asarray(genome))["share"] for genome in space.seed_genomes("seeds", "parents")]
        np.testing.assert_allclose(np.ravel(seeds), [0.0, 1.0], atol=1e-6)
        copied = state(em.merge({"merge_method": "gained", "models": models[:1]}, tmp_path / "copy"))
        assert all(values.tobytes() == one[name].tobytes() for name, values in copied.items())
    finally:
        for method in methods:
            del METHODS[method.name]


def test_of_pytrees() -> None:
    rng = np.random.default_rng(0)
    base, one, other = ({"layer": rng.normal(size=(5, 7)).astype(np.float32)} for _ in range(3))
    wanted = clipped_task_arithmetic(base["layer"], [one["layer"], other["layer"]], [0.5, 0.5], 1.2).astype(np.float32)
    found = search_trees(
        [one, other], lambda merged: -((merged["layer"] - wanted) ** 2).sum(), base=base, method="clipped",
        parameters={"cap": {}}, generations=15,
    )  # fmt: skip
    assert abs(by_group(found)["layer"]["cap"][0] - 1.2) < 0.05


def test_it_is_listed() -> None:
    assert "clipped" in run_here("methods").stdout


def compared_texts(tree: ast.Module) -> Iterator[str]:
    """The texts that a module compares with, looks for in a collection or matches, also by way of its constants."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and node.value is not None
    }

    def texts(node: ast.AST) -> Iterator[str]:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value
            elif isinstance(part, ast.Name) and part.id in constants:
                yield from texts(constants[part.id])

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            yield from texts(node)


def test_no_method_is_known_by_its_name() -> None:
    """A method's file alone knows its name: what else depends on the method asks for an attribute."""
    files = [*(ROOT / "evojax_merge").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    files = [file for file in files if METHOD_FILES not in file.parents]
    assert len(files) > 100
    names = METHODS.keys() - {"clipped"}
    compared = {(file.name, text) for file in files for text in compared_texts(ast.parse(file.read_text("utf-8")))}
    assert not {(file, text) for file, text in compared if text in names} - OTHER_MEANINGS


def test_every_file_of_methods_registers_some() -> None:
    for file in METHOD_FILES.glob("[!_]*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert any(isinstance(call, ast.Name) and "register" in call.id for call in calls), file


def with_changes(**changes: object) -> Method:
    return Method(**({"name": "mine", "parameters": CLIPPED.parameters, "base": "required", "combine": clip} | changes))


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (CLIPPED, "'clipped': the name is registered already"),
        (with_changes(name="ties"), "'ties': the name is registered already"),
        (with_changes(name="my method"), "no word"),
        (with_changes(yaml_options=("loud",)), "'loud' is no YAML option; expected some of normalize,"),
        (with_changes(yaml_options=("rescale", "rescale")), "rescale stands more than once"),
        (with_changes(base="maybe"), "base is 'maybe'"),
        (with_changes(interpolates="t"), "interpolates is 't'; expected the name of one of its parameters"),
        (with_changes(copies="scale"), "copies is 'scale'; expected the name of one of its parameters"),
        (with_changes(combine=lambda sources, weights, numbers: 0), r"expected combine\(options, inputs\)"),
        (with_changes(prepare=lambda options: None), r"expected prepare\(options, inputs\)"),
        (with_changes(parameters=[*CLIPPED.parameters]), "cannot be hashed"),
        (with_changes(parameters=(Parameter("a", False, 0.0, low=1.0, high=0.0),)), r"a: bounds \[1, 0\]"),
        ("clipped", "expected a merge_kernels.Method"),
    ],
)
def test_what_cannot_be_registered(method: Method, named: str) -> None:
    before = dict(METHODS)
    with pytest.raises(ValueError, match=named):
        register(method)
    with pytest.raises(em.InputError, match=named):
        em.register_method(method)
    assert before == METHODS


def test_a_name_that_is_nearly_right(family: Family, tmp_path: Path) -> None:
    config = search_config(parents=["parent0"], space={"method": "cliped"})
    search = ["search", str(write_json(tmp_path / "config.json", config)), "--out", str(tmp_path / "run")]
    for ask in (
        lambda: em.merge({"merge_method": "cliped"}, tmp_path / "out"),
        lambda: search_trees([{}], lambda merged: 0.0, method="cliped"),
        lambda: em.load_bank([], method="cliped"),
        lambda: cli.cli.main(search, standalone_mode=False),
    ):
        with pytest.raises(em.InputError, match=r"unknown method 'cliped' \(did you mean 'clipped'\?\)"):
            ask()


def test_the_example_in_configs(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/own_method.py, as a user runs it; tiny models stand where the demo family would be."""
    folders = stand_in_for_the_zoo(tmp_path / "cache", family)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run_script(CONFIGS / "own_method.py", folder=tmp_path)
    assert done.stdout == "wrote runs/own_method\n", done.stderr
    base, maths, japanese = (state(folder) for folder in folders.values())
    for name, values in state(tmp_path / "runs" / "own_method").items():
        deltas = [one[name].astype(np.float64) - base[name] for one in (maths, japanese)]
        merged = np.where(np.sign(deltas[0]) == np.sign(deltas[1]), 0.8 * deltas[0] + 0.6 * deltas[1], 0.0)
        np.testing.assert_allclose(values, base[name] + merged, rtol=1e-5, atol=1e-6)
