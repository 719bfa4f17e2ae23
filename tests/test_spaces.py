"""The parameter space: bounds, groups, and the way from a genome to a recipe and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_kernels import METHODS, grid_index
from reference.spectral import SPECTRAL

from evojax_merge.config.search_config import Bounds
from evojax_merge.models.architecture import LAYERS
from evojax_merge.spaces.bounds import EDGE, from_unit, to_unit
from evojax_merge.spaces.parameter import ParameterSpace, SearchParameter, component_groups, uniform_start
from evojax_merge.spaces.search_parameters import search_parameters_of

NAMES = ("attention", "mlp", "norm")


def make_space(
    method: str = "ties",
    layers: int = 5,
    layers_per_group: int = 2,
    components: tuple[tuple[str, ...], ...] = (("attention",), ("mlp", "norm")),
    shared: tuple[str, ...] = ("embed", "final_norm", "head"),
    search_parameters: tuple[SearchParameter, ...] = (
        SearchParameter("weight", -0.5, 1.5, (0.4, 0.6)),
        SearchParameter("density", 0.0, 1.0, (0.7,)),
    ),
    fixed: tuple[tuple[str, tuple[float, ...]], ...] = (("lambda", (1.2,)),),
    parents: int = 2,
) -> ParameterSpace:
    return ParameterSpace(
        method=METHODS[method], parents=parents, layers=layers, layers_per_group=layers_per_group, names=NAMES,
        components=components, shared=shared, search_parameters=search_parameters, constants=fixed,
    )  # fmt: skip


def unit(x: Any) -> np.ndarray:
    return np.asarray(jax.jit(to_unit)(np.asarray(x, np.float32)), np.float64)


# ---------------------------------------------------------------------------------------------------------------
# Bounds


def test_bounds_map_is_pycma_s() -> None:
    from cma.transformations import BoxConstraintsLinQuadTransformation

    theirs = BoxConstraintsLinQuadTransformation([[0.0, 1.0]])
    free = np.linspace(-4, 5, 3001)
    np.testing.assert_allclose(unit(free), [theirs([x])[0] for x in free], atol=2e-6)


def test_bounds_map_is_monotone_inside_and_mirrored_outside() -> None:
    inside = np.linspace(-EDGE, 1 + EDGE, 2001)
    assert (np.diff(unit(inside)) >= 0).all()
    assert (np.diff(unit(inside[::40])) > 0).all()
    distance = np.linspace(0, 1 + 2 * EDGE, 101)
    np.testing.assert_allclose(unit(-EDGE - distance), unit(-EDGE + distance), atol=1e-6)
    np.testing.assert_allclose(unit(1 + EDGE + distance), unit(1 + EDGE - distance), atol=1e-6)
    period = 2 * (1 + 2 * EDGE)
    np.testing.assert_allclose(unit(inside + 3 * period), unit(inside), atol=1e-5)


def test_bounds_map_reaches_both_bounds_and_is_the_identity_between() -> None:
    assert unit([-EDGE, 1 + EDGE]).tolist() == [0.0, 1.0]
    middle = np.linspace(EDGE, 1 - EDGE, 50).astype(np.float32)
    np.testing.assert_allclose(unit(middle), middle, atol=1e-7)


def test_bounds_map_has_a_continuous_derivative() -> None:
    free = np.linspace(-1.5, 2.5, 8001)
    step = free[1] - free[0]
    with jax.enable_x64(True):
        values = np.asarray(to_unit(jnp.asarray(free, jnp.float64)))
        slopes = np.asarray(jax.vmap(jax.grad(to_unit))(jnp.asarray(free, jnp.float64)))
    numerical = np.diff(values) / step
    # The derivative changes by at most the second derivative, 1/(2 EDGE), times the step: no jump anywhere.
    assert np.abs(np.diff(numerical)).max() < 1.01 * step / (2 * EDGE)
    np.testing.assert_allclose(slopes[1:-1], (numerical[1:] + numerical[:-1]) / 2, atol=step / EDGE)
    assert np.abs(slopes).max() <= 1 + 1e-9


@given(st.floats(0, 1))
def test_from_unit_inverts_to_unit(value: float) -> None:
    free = float(from_unit(np.array(value)))
    assert -EDGE <= free <= 1 + EDGE
    # In float32 near a bound the map is flat and its inverse steep: compare values, not genomes.
    assert unit(free) == pytest.approx(value, abs=2e-7)


# ---------------------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize(
    ("layers", "per_group", "spans"),
    [
        (3, 1, ["layer 0", "layer 1", "layer 2"]),
        (5, 2, ["layers 0-1", "layers 2-3", "layer 4"]),
        (4, 9, ["layers 0-3"]),
    ],
)
def test_groups_are_named_in_the_order_of_the_genome(layers: int, per_group: int, spans: list[str]) -> None:
    space = make_space(layers=layers, layers_per_group=per_group)
    expected = [f"{span} {part}" for span in spans for part in ("attention", "mlp+norm")]
    assert list(space.groups) == [*expected, "embed", "head"]
    tied = make_space(layers=layers, layers_per_group=per_group, shared=("embed", "final_norm"))
    assert list(tied.groups) == [*expected, "embed"]
    assert space.dims == len(space.groups) * 4
    assert tied.dims == len(tied.groups) * 4


@pytest.mark.parametrize("per_group", [1, 2, 5])
@pytest.mark.parametrize(
    "components", [(NAMES,), (("norm",), ("mlp",), ("attention",)), (("attention",), ("mlp", "norm"))]
)
def test_each_gene_moves_its_own_group_and_parent_and_nothing_else(
    per_group: int, components: tuple[tuple[str, ...], ...]
) -> None:
    """The layout, from outside: perturb one gene, see which numbers of the recipe change."""
    space = make_space(layers_per_group=per_group, components=components)
    middle = np.full(space.dims, 0.5, np.float32)
    perturbed = np.concatenate([middle[None], middle + 0.25 * np.eye(space.dims, dtype=np.float32)])
    recipes = jax.tree.map(np.asarray, jax.jit(jax.vmap(space.recipe))(jnp.asarray(perturbed)))
    blocks = -(-5 // per_group)
    gene = 0
    for name in ("weight", "density"):
        for group in range(len(space.groups)):
            for parent in range(2):
                gene += 1
                expected = np.zeros((5, 3, 2), bool)
                block, part = divmod(group, len(components))
                if block < blocks:
                    layers = range(block * per_group, min(5, (block + 1) * per_group))
                    columns = [NAMES.index(component) for component in components[part]]
                    expected[np.ix_(list(layers), columns, [parent])] = True
                moved = {key: values[gene] != values[0] for key, values in recipes.stacks[LAYERS].items()}
                np.testing.assert_array_equal(moved[name], expected)
                others = [key for key in moved if key != name]
                assert not any(moved[key].any() for key in others)
                for leaf in space.shared:
                    own = {"embed": block == blocks and part == 0, "head": group == len(space.groups) - 1}
                    # The final norm goes with the norms of the last layer.
                    own["final_norm"] = bool(expected[4, NAMES.index("norm")].any())
                    shifted = recipes.shared[leaf][name][gene] != recipes.shared[leaf][name][0]
                    assert shifted.tolist() == [own[leaf] and k == parent for k in range(2)]
    assert gene == space.dims


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        (["attention", "mlp", "norm"], (("attention",), ("mlp",), ("norm",))),
        (["norm + attention", "mlp"], (("norm", "attention"), ("mlp",))),
        (["attention+mlp+norm"], (NAMES,)),
        (["attention", "mlp"], None),
        (["attention", "mlp", "norm", "norm"], None),
        (["attention+mlp", "mlp+norm"], None),
        (["attention", "mlp", "head"], None),
        ([], None),
    ],
)
def test_component_groups_partition_the_components(text: list[str], groups: Any) -> None:
    assert component_groups(text, NAMES) == groups


# ---------------------------------------------------------------------------------------------------------------
# Values


def test_values_stay_inside_their_bounds_for_any_genome() -> None:
    space = make_space()
    genomes = np.random.default_rng(0).normal(scale=5, size=(50, space.dims)).astype(np.float32)
    values = jax.jit(jax.vmap(space.values))(jnp.asarray(genomes))
    for axis in space.search_parameters:
        found = np.asarray(values[axis.name])
        assert found.min() >= axis.low - 1e-6
        assert found.max() <= axis.high + 1e-6
        # Both halves of the range are used.
        assert np.ptp(found) > 0.9 * (axis.high - axis.low)


def test_densities_lie_on_the_grid() -> None:
    space = make_space()
    genomes = np.random.default_rng(0).uniform(-0.05, 1.05, (20, space.dims)).astype(np.float32)
    recipes = jax.jit(jax.vmap(space.recipe))(jnp.asarray(genomes))
    for found in (recipes.stacks[LAYERS]["density"], recipes.shared["head"]["density"]):
        thousandths = np.asarray(found, np.float64) * 1000
        np.testing.assert_allclose(thousandths, np.rint(thousandths), atol=1e-3)
        np.testing.assert_array_equal(np.asarray(grid_index(found)), np.rint(thousandths))


LAWFUL = make_space(layers=3)
values_of = jax.jit(LAWFUL.values)


@settings(max_examples=30)
@given(st.data())
def test_genome_of_the_values_of_a_genome_has_those_values(data: st.DataObject) -> None:
    space = LAWFUL
    elements = st.floats(-EDGE, 1 + EDGE, allow_subnormal=False)
    genome = np.array(data.draw(st.lists(elements, min_size=space.dims, max_size=space.dims)), np.float32)
    values = {name: np.asarray(v) for name, v in values_of(genome).items()}
    back = space.genome(values)
    assert back.shape == genome.shape
    assert back.dtype == np.float32
    again = values_of(back)
    np.testing.assert_allclose(np.asarray(again["weight"]), values["weight"], atol=2e-6)
    np.testing.assert_array_equal(np.asarray(again["density"]), values["density"])
    # Away from the bounds the map is the identity, and the genome itself comes back (densities to half a step).
    steep = (genome > EDGE) & (genome < 1 - EDGE)
    np.testing.assert_allclose(back[steep], genome[steep], atol=0.51e-3)


def test_start_is_what_was_asked_for() -> None:
    space = make_space()
    values = space.values(jnp.asarray(space.start))
    np.testing.assert_allclose(np.asarray(values["weight"]), np.broadcast_to([0.4, 0.6], (8, 2)), atol=1e-6)
    np.testing.assert_allclose(np.asarray(values["density"]), np.full((8, 2), 0.7), atol=1e-6)


def test_start_may_be_a_bound() -> None:
    search_parameters = (SearchParameter("weight", 0.0, 1.0, (0.0, 1.0)), SearchParameter("density", 0.0, 1.0, (1.0,)))
    values = make_space(search_parameters=search_parameters).values(
        jnp.asarray(make_space(search_parameters=search_parameters).start)
    )
    np.testing.assert_allclose(np.asarray(values["weight"]), np.broadcast_to([0.0, 1.0], (8, 2)), atol=1e-6)
    assert (np.asarray(values["density"]) == 1).all()


UNIFORM = {
    "weight": 1 / 3, "density": 1.0, "lambda": 1.0, "t": 0.5, "scale": 1.0, "select_topk": 1.0,
    "epsilon": 0.15, "gamma": 0.01, "eps": 1e-8, "max_iter": 10, "tol": 1e-5, "r": 0.1, "alpha": 1.0,
    "width": 0.5, "offset": 0.0, "maxiter": 100, "ftol": 1e-20,
    "rank_share": 0.85, "common_share": 0.8, "core_density": 0.001, "steps": 300.0, "filter": 1.0,
}  # fmt: skip
# Methods whose defaults are others.
UNIFORM_OF = {
    "ram": {"epsilon": 1e-5}, "ramplus_tl": {"epsilon": 1e-5, "alpha": 0.2}, "weighted_sum": {"alpha": 0.5},
    "top_k_tensor_sum": {"width": 1.0}, "geometric_median": {"eps": 1e-6},
    **{name: {"weight": 1.0} for name in SPECTRAL}, "iso_c": {"lambda": 1.5},
    **{name: {"weight": 1.0, "alpha": 0.9} for name in ("regmean", "regmean_plusplus")}, "fisher": {"weight": 1.0},
    "iso_cts": {"weight": 1.0, "lambda": 1.5}, "tsv_m": {"weight": 1.0, "rank_share": 1.0},
}  # fmt: skip


# NearSwap has no uniform merge: its t is a distance that the recipe has to give.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "nearswap"])
def test_uniform_start_is_the_uniform_merge(name: str) -> None:
    method = METHODS[name]
    uniform = UNIFORM | UNIFORM_OF.get(name, {})
    for parameter in method.parameters:
        expected = (uniform[parameter.name],) * (3 if parameter.per_parent else 1)
        assert uniform_start(method, parameter.name, 3) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_a_search_of_dellas_densities_starts_inside_of_its_bounds(name: str) -> None:
    (density, _), _ = search_parameters_of("space", METHODS[name], 3, {"density": Bounds(), "weight": Bounds()}, {})
    assert len(density.start) == 3 and all(density.low < value < density.high for value in density.start)
    # A density that is not searched has the method's default.
    _, others = search_parameters_of("space", METHODS[name], 3, {"weight": Bounds()}, {})
    assert dict(others)["density"] == (1.0,) * 3


@pytest.mark.parametrize("name", ["della", "sce"])
def test_every_density_is_on_the_grid_whatever_its_name(name: str) -> None:
    key = {"della": "density", "sce": "select_topk"}[name]
    constants = (("weight", (0.5,)), ("lambda", (1.0,)), ("epsilon", (0.1,))) if name == "della" else ()
    space = make_space(name, search_parameters=(SearchParameter(key, 0.2, 0.8, (0.5,)),), fixed=constants)
    assert space.dims == len(space.groups) * (2 if name == "della" else 1)
    genomes = np.random.default_rng(0).uniform(-0.05, 1.05, (20, space.dims)).astype(np.float32)
    found = np.asarray(jax.jit(jax.vmap(space.recipe))(jnp.asarray(genomes)).stacks[LAYERS][key], np.float64)
    assert found.shape == ((20, 5, 3, 2) if name == "della" else (20, 5, 3))
    np.testing.assert_allclose(found * 1000, np.rint(found * 1000), atol=1e-3)
    assert found.min() >= 0.2 - 1e-6
    assert found.max() <= 0.8 + 1e-6
    # What is no density is not rounded.
    weights = make_space(
        search_parameters=(SearchParameter("weight", 0.2, 0.8, (0.5,)),),
        fixed=(("density", (1.0,)), ("lambda", (1.0,))),
    )
    moved = np.asarray(weights.recipe(jnp.full(weights.dims, 1 / 3)).stacks[LAYERS]["weight"], np.float64)
    np.testing.assert_allclose(moved, 0.4, atol=1e-6)
    off = np.asarray(weights.recipe(jnp.full(weights.dims, 0.1234567)).stacks[LAYERS]["weight"], np.float64) * 1000
    assert (np.abs(off - np.rint(off)) > 0.01).all()


# ---------------------------------------------------------------------------------------------------------------
# Recipes


def test_recipes_of_a_population_are_those_of_its_genomes() -> None:
    space = make_space()
    genomes = np.random.default_rng(0).uniform(-0.3, 1.3, (7, space.dims)).astype(np.float32)
    population = jax.jit(jax.vmap(space.recipe))(jnp.asarray(genomes))
    for p, genome in enumerate(genomes):
        alone = space.recipe(jnp.asarray(genome))
        for found, expected in zip(jax.tree.leaves(population), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(found[p]), np.asarray(expected), atol=1e-6)


def test_recipe_has_every_parameter_of_its_method() -> None:
    """Searched and fixed ones, per parent and common ones, for every component of every layer and shared leaf."""
    recipe = make_space().recipe(jnp.full(make_space().dims, 0.5))
    shapes = {"weight": (2,), "density": (2,), "lambda": ()}
    assert {name: values.shape for name, values in recipe.stacks[LAYERS].items()} == {
        name: (5, 3, *shape) for name, shape in shapes.items()
    }
    assert set(recipe.shared) == {"embed", "final_norm", "head"}
    for parameters in recipe.shared.values():
        assert {name: values.shape for name, values in parameters.items()} == shapes
    assert (np.asarray(recipe.stacks[LAYERS]["lambda"]) == np.float32(1.2)).all()

    slerp = make_space("slerp", search_parameters=(SearchParameter("t", 0.0, 1.0, (0.5,)),), fixed=())
    assert slerp.dims == len(slerp.groups)
    assert slerp.recipe(jnp.asarray(slerp.start)).stacks[LAYERS]["t"].shape == (5, 3)


@pytest.mark.parametrize("name", METHODS)
def test_recipe_of_any_method_has_all_that_the_method_takes(name: str) -> None:
    """What may be searched is, the rest is fixed; a method with nothing to search has an empty genome."""
    method = METHODS[name]
    parents = min(2, method.max_parents or 2)
    search_parameters = tuple(SearchParameter(p.name, p.low, p.high, (p.low,)) for p in method.parameters if p.searched)
    fixed = tuple((p.name, (float(p.default or 0.0),)) for p in method.parameters if not p.searched)
    space = make_space(name, search_parameters=search_parameters, fixed=fixed, parents=parents)
    per_group = sum(parents if p.per_parent else 1 for p in method.parameters if p.searched)
    assert space.dims == len(space.groups) * per_group
    assert space.start.shape == (space.dims,)
    assert space.start.dtype == np.float32
    recipe = jax.jit(space.recipe)(jnp.asarray(space.start))
    assert set(recipe.stacks[LAYERS]) == {p.name for p in method.parameters}
    for parameter in method.parameters:
        shape = (parents,) if parameter.per_parent else ()
        expected = parameter.low if parameter.searched else float(parameter.default or 0.0)
        for found, lead in (
            (recipe.stacks[LAYERS][parameter.name], (5, 3)),
            (recipe.shared["head"][parameter.name], ()),
        ):
            assert found.shape == (*lead, *shape)
            np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6)
    if name in ("karcher", "model_stock"):
        assert space.dims == 0


def test_fixed_parameters_may_differ_between_parents() -> None:
    space = make_space(
        search_parameters=(SearchParameter("weight", 0.0, 1.0, (0.5,)),),
        fixed=(("density", (0.2, 0.9)), ("lambda", (1.0,))),
    )
    recipe = space.recipe(jnp.asarray(space.start))
    expected = np.broadcast_to(np.array([0.2, 0.9], np.float32), (5, 3, 2))
    np.testing.assert_array_equal(np.asarray(recipe.stacks[LAYERS]["density"]), expected)
    assert space.dims == len(space.groups) * 2


@pytest.mark.parametrize(
    ("name", "fixed", "expected"),
    [("ties", {}, "weight"), ("slerp", {}, "t"), ("ties", {"weight": 1.0}, "density"), ("sce", {}, "select_topk")],
)
def test_without_parameters_the_first_of_the_method_is_searched(
    name: str, fixed: dict[str, float], expected: str
) -> None:
    searched, constants = search_parameters_of("space", METHODS[name], 2, {}, fixed)
    default = METHODS[name].parameter(expected)
    assert [(one.name, one.low, one.high) for one in searched] == [(expected, default.low, default.high)]
    assert {one.name for one in METHODS[name].parameters} == {expected, *(constant for constant, _ in constants)}
