"""Plans: what a search would take, on targets that are here and that are not."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import command
from helpers.families import Family, build_family
from helpers.files import read_json, write_json, write_yaml
from helpers.models import random_model, save, tiny_config
from helpers.sampling import thorough
from helpers.searches import search_config, task_section
from huggingface_hub.errors import LocalEntryNotFoundError
from merge_kernels import METHODS

from evojax_merge.backends.decoder.planner import planned_passes
from evojax_merge.checkpoints.abstract_bank import abstract_bank, anywhere
from evojax_merge.checkpoints.bank import load_bank
from evojax_merge.checkpoints.derived import open_model, resolve_model
from evojax_merge.checkpoints.headers import HeaderFolders, TensorHeader, write_header_only
from evojax_merge.checkpoints.parents import open_sources, tensor_shapes
from evojax_merge.errors import Failed, InputError
from evojax_merge.evaluation import compilers, liveness
from evojax_merge.evaluation.costs import Cost, Product, cost_of
from evojax_merge.evaluation.devices import ONE_DEVICE
from evojax_merge.evaluation.generation import generation_chunk
from evojax_merge.evaluation.liveness import flat_program, temporary_bytes
from evojax_merge.evaluation.planned_passes import JaxprReader, merge_bytes
from evojax_merge.evaluation.targets import find_target, live_target, one_host, target_names
from evojax_merge.models.bank import MergeSpec
from evojax_merge.problem import SearchProblem, build_problem, config_from
from evojax_merge.report.plan import Plan
from evojax_merge.steps.planning import make_plan
from evojax_merge.zoo.references import resolve_headers


def document(family: Family, **changes: Any) -> dict[str, Any]:
    return search_config(family, 3, heldout=0.25, space={"method": "ties"}) | changes


def problem_of(document: dict[str, Any], target: str = "cpu") -> SearchProblem:
    path = Path("config.yaml")
    return build_problem(path, config_from(path, document, [], None), target=find_target("target", target))


# ---------------------------------------------------------------------------------------------------------------
# Targets


def test_targets_by_name() -> None:
    assert find_target("t", "8xh100").devices == 8 and find_target("t", "h100").devices == 1
    # Two cores to a chip.
    assert find_target("t", "v5p-8").devices == 4
    v5e = find_target("t", "v5e-16")
    assert (v5e.devices, v5e.hosts, v5e.devices_per_host) == (16, 4, 4)
    hosts = find_target("t", "2x8xh100")
    assert (hosts.devices, hosts.hosts, hosts.devices_per_host, hosts.kind) == (16, 2, 8, "NVIDIA H100 80GB HBM3")
    assert find_target("t", "6xrtx3090").devices == 6 and find_target("t", "v6e-256").hosts == 64
    wrong = {"h10O": "h100", "h100x4": "4xh100", "H100:8": "8xh100", "v5e8": "v5e-8", "rtx-4090": "rtx4090"}
    for name, meant in wrong.items():
        with pytest.raises(InputError, match=f"no target '{name}' .did you mean '{meant}'"):
            find_target("--target", name)
    for name, sizes in {"v5p": "v5p-8, v5p-16, v5p-32, v5p-64", "a100": "a100-40, a100-80"}.items():
        with pytest.raises(InputError, match=f"no target '{name}'; expected one of {sizes}"):
            find_target("--target", name)
    for name in ("0xh100", "17xh100", "0x8xh100", "2x0xh100", "9999x8xh100"):
        with pytest.raises(InputError, match=f"no target '{name}'; expected 1 to 16 GPUs to a host, such as 8xh100"):
            find_target("--target", name)
    with pytest.raises(InputError, match=r"evaluation.model: 3 does not divide the 4 devices"):
        v5e.check_shards("evaluation.model", 3)


def test_the_documents_table_of_targets_has_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory in GB, bandwidth in GB/s, and the peak in bfloat16, of each chip; XLA's description of a GPU agrees."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "1")
    page = (Path(__file__).parent.parent / "docs" / "accelerators.md").read_text()
    rows = [
        re.split(r" *\| *", line.strip("| "))
        for line in page.splitlines()
        if "TFLOP" not in line and line.count("|") == 6
    ]
    figures = {
        row[0].split("`")[1]: [float(figure.replace(",", "")) for figure in row[1:4]]
        for row in rows
        if row[0].startswith("`")
    }
    chips = dict.fromkeys(re.sub(r"^(\d+x)+|^(v\d\w)-\d+$", r"\2", name) for name in target_names() if name != "cpu")
    assert list(figures) == list(chips)
    for name, shown in figures.items():
        target = find_target("t", f"{name}-8" if name.startswith("v") else name)
        rates = [target.memory / 1e9, target.bandwidth / 1e9, target.bfloat16 / 1e12]
        assert shown == pytest.approx(rates, rel=0.01), name
        if target.platform == "gpu":
            described = compilers._GPUS[target.kind]
            assert [described.memory / 1e9, described.bandwidth / 1e9] == pytest.approx(rates[:2], rel=0.06), name


def test_a_gpu_has_the_share_of_its_memory_that_jax_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    usual = find_target("t", "h100").memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert find_target("t", "h100").memory == pytest.approx(usual / 0.75 * 0.9, rel=1e-9)


def test_the_target_here_is_the_one_that_jax_found() -> None:
    target = live_target()
    assert target.platform == jax.local_devices()[0].platform and target.devices == len(jax.devices())


@pytest.mark.parametrize(
    ("kind", "version", "dtype", "products"),
    [
        ("Tesla V100-SXM2-16GB", "7.0", "float32", "float32"),
        ("NVIDIA TITAN RTX", "7.5", "float32", "float32"),
        ("NVIDIA GeForce RTX 3090", "8.6", "bfloat16", "TF32"),
        ("AMD Instinct MI300X", "gfx942", "bfloat16", "float32"),
    ],
)
def test_products_of_gpus_that_emulate_bfloat16_are_float32(
    kind: str, version: str, dtype: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of float32 are TF32 on NVIDIA's from Ampere on alone."""
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=version, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    target = live_target.__wrapped__()
    assert target.compute_dtype("auto", ["bfloat16"]) == dtype
    assert target.float32_products == products


def test_one_host_of_every_slice_is_a_slice() -> None:
    for name in target_names():
        target = find_target("t", name)
        host = one_host(target)
        assert (host.kind, host.devices, host.hosts) == (target.kind, target.devices_per_host, 1)


def test_products_are_bfloat16_where_all_weights_are_and_the_target_multiplies_it(
    family: Family, tmp_path: Path
) -> None:
    h100, cpu = (find_target("t", name) for name in ("h100", "cpu"))
    assert h100.compute_dtype("auto", ["bfloat16", "bfloat16"]) == "bfloat16"
    assert h100.compute_dtype("auto", ["bfloat16", "float32"]) == h100.compute_dtype("auto", ["float16"]) == "float32"
    assert cpu.compute_dtype("auto", ["bfloat16"]) == h100.compute_dtype("float32", ["bfloat16"]) == "float32"
    base, *parents = map(str, header_models(family, tmp_path, SEVEN_B, ("base", "a", "b")))
    models = {"base": base, "parents": parents}
    assert problem_of(document(family, **models), "v5p-8").facts.compute_dtype == "bfloat16"
    assert problem_of(document(family, **models, export_dtype="float32"), "v5p-8").facts.compute_dtype == "float32"
    assert problem_of(document(family, **models)).facts.compute_dtype == "float32"
    assert problem_of(document(family), "v5p-8").facts.compute_dtype == "float32"


# ---------------------------------------------------------------------------------------------------------------
# Costs


def test_flops_of_loops_and_products() -> None:
    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 8)), jnp.ones((5, 8, 8)))
    cost = cost_of(jaxpr)
    assert cost.products == {Product(2 * 4 * 8 * 8, 4 * (4 * 8 + 8 * 8 + 4 * 8), "float32"): 5}
    assert cost_of(jaxpr, lambda eqn: 1).flops == cost.flops / 5
    target = replace(find_target("t", "h100"), float32=1e3, bandwidth=1e6)
    assert cost.seconds(target) == pytest.approx(5 * 512 / 1e3)
    assert Cost(merge_bytes=2e6).seconds(target) == pytest.approx(2.0)


def test_of_branches_the_dearest_counts_and_half_of_one_beside_nothing() -> None:
    def program(x: jax.Array, other: Any) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, other, x)

    product = Product(2 * 8**3, 3 * 4 * 8 * 8, "float32")
    for other, expected in ((lambda x: x @ x, 2), (lambda x: x, 1)):
        jaxpr = jax.make_jaxpr(partial(program, other=other))(jnp.ones((8, 8)))
        assert cost_of(jaxpr).products == {product: expected}


def test_ragged_products_count_each_row_once() -> None:
    """Forward, and in the derivatives by the rows and by the matrices; whatever else a CPU would compute."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])

    def program(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
        def ragged(rows: jax.Array, matrices: jax.Array) -> jax.Array:
            return jax.lax.ragged_dot_general(rows, matrices, sizes, numbers)

        def every(rows: jax.Array, matrices: jax.Array) -> jax.Array:
            return jnp.einsum("nh,ehm->enm", rows, matrices).sum(axis=0)

        return jax.lax.platform_dependent(rows, matrices, cpu=every, default=ragged).sum()

    def products(rows: int, differentiated: Any = ()) -> Any:
        run = jax.grad(program, differentiated) if differentiated else program
        return cost_of(jax.make_jaxpr(run)(jnp.ones((rows, 4)), jnp.ones((5, 4, 6)), jnp.zeros(5, jnp.int32))).products

    assert products(9) == {Product(2 * 9 * 4 * 6, 4 * (9 * 4 + 5 * 4 * 6 + 9 * 6), "float32"): 1}
    # Two rows meet two matrices at most.
    assert products(2) == {Product(2 * 2 * 4 * 6, 4 * (2 * 4 + 2 * 4 * 6 + 2 * 6), "float32"): 1}
    assert {product.flops for product in products(9, (0, 1))} == {2 * 9 * 4 * 6}


def test_what_is_compiled_for_a_platform_is_what_counts_there() -> None:
    def times(count: int) -> Any:
        return lambda x: jnp.linalg.matrix_power(x, 2**count)

    def program(x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(x, cpu=times(1), cuda=times(3), default=times(2))

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 4)))
    found = {platform: cost_of(jaxpr, platform=platform).products.total() for platform in ("cpu", "gpu", "tpu", None)}
    assert found == {"cpu": 1, "gpu": 3, "tpu": 2, None: 2}


def test_temporaries_live_from_where_they_are_computed_to_their_last_use() -> None:
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        # Two products at a time at most; what is elementwise is part of what uses it.
        for _ in range(4):
            x = (x + 1) @ w
        return x.sum()

    n = 64
    found = temporary_bytes(jax.make_jaxpr(program)(jnp.ones((n, n)), jnp.ones((n, n))))
    assert found == pytest.approx(2 * 4 * n * n, rel=0.01)


def test_what_a_loop_carries_and_writes_into_is_where_the_argument_was() -> None:
    """Also under another shape, as the caches of a decode step are."""
    rows, columns, width = 64, 96, 32

    def program(cache: jax.Array, x: jax.Array) -> jax.Array:
        def body(i: jax.Array, cache: jax.Array) -> jax.Array:
            fresh = jnp.tanh(cache[:, 0] @ x)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(cache, fresh, i, 1)

        return jax.lax.fori_loop(1, columns, body, cache[0])[None]

    cache, x = jax.ShapeDtypeStruct((1, rows, columns, width), jnp.float32), jnp.ones((width, width))
    jaxpr = jax.make_jaxpr(program)(cache, x)
    whole = 4 * cache.size
    assert temporary_bytes(jaxpr, [cache]) < whole / 10
    assert whole <= temporary_bytes(jaxpr) < 1.1 * whole


def test_a_sum_that_goes_on_takes_the_place_of_what_was_added() -> None:
    """However many layers add to the residual stream."""

    def program(x: jax.Array, w: jax.Array, layers: int) -> jax.Array:
        for _ in range(layers):
            x = x + (x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True))) @ w
        return x @ w[:, :1]

    few, many = (
        temporary_bytes(jax.make_jaxpr(partial(program, layers=n))(jnp.ones((64, 64)), jnp.ones((64, 64))))
        for n in (3, 9)
    )
    assert few == many < 4 * 4 * 64 * 64


def test_a_gpu_copies_each_layer_of_a_stack_when_it_is_needed() -> None:
    """That is what its compiler does, one after the other."""

    def program(x: jax.Array, stack: jax.Array) -> jax.Array:
        layers = [stack[i] for i in range(3)]
        for layer in layers:
            x = x @ layer
        return x

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 64)), jnp.ones((3, 64, 64)))
    x, layer = 4 * 4 * 64, 4 * 64 * 64
    assert temporary_bytes(jaxpr) == temporary_bytes(jaxpr, platform="tpu") == 2 * x
    assert temporary_bytes(jaxpr, platform="gpu") == layer + 2 * x


def test_a_tpu_copies_slices_that_several_candidates_merge() -> None:
    """Those of a layer together; of one candidate each is part of what merges it."""
    out = 64

    def program(scales: jax.Array, x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        def layer(x: jax.Array, slices: tuple[jax.Array, jax.Array], scale: jax.Array) -> jax.Array:
            for slice_ in slices:
                x = x @ (scale * slice_)
            return x

        def one(scale: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, own: (layer(x, own, scale), None), x, (first, second))[0]

        return one(scales[0]) if scales.shape == (1,) else jax.vmap(one)(scales)

    x, stack = jnp.ones((2, out)), jnp.ones((3, out, out))
    layer = 4 * out * out
    for count, slices in ((1, 0), (4, 2)):
        jaxpr = jax.make_jaxpr(program)(jnp.ones(count), x, stack, stack)
        found = temporary_bytes(jaxpr, platform="tpu")
        assert found == pytest.approx((slices + count) * layer, rel=0.1)


def test_what_a_loop_carries_gives_way_to_what_follows_it() -> None:
    def program(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w) @ w, None), x, stack)[0]

    jaxpr = jax.make_jaxpr(program)(jnp.ones((64, 64)), jnp.ones((3, 64, 64)))
    # What is multiplied, the product, and the layer that is picked.
    assert temporary_bytes(jaxpr) == 3 * 4 * 64 * 64


def test_a_cpu_has_a_float32_copy_of_bfloat16_that_a_loop_picks_from() -> None:
    stack, x = jnp.ones((9, 64, 64), jnp.bfloat16), jnp.ones((4, 64), jnp.float32)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w.astype(jnp.float32)

    def plain(x: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (product(x, w), None), x, stack)[0]

    def behind_a_barrier(x: jax.Array, stack: jax.Array) -> jax.Array:
        def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            held, i = jax.lax.optimization_barrier((stack, i))
            return product(x, jax.lax.dynamic_index_in_dim(held, i, keepdims=False)), None

        return jax.lax.scan(body, x, jnp.arange(9))[0]

    for program, copied in ((plain, 4 * stack.size * (jax.__version_info__ < (0, 11))), (behind_a_barrier, 0)):
        jaxpr = jax.make_jaxpr(program)(x, stack)
        assert temporary_bytes(jaxpr, platform="cpu") - temporary_bytes(jaxpr) == copied
        memory = jax.jit(program).lower(x, stack).compile().memory_analysis()
        assert memory is not None
        assert abs(memory.temp_size_in_bytes - copied) < stack.size


def test_a_newer_jax_that_writes_programs_in_another_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> Any:
        raise KeyError("num_carry")

    jaxpr = jax.make_jaxpr(lambda x: jnp.cumsum(x) / 3.25)(jnp.ones(7))
    monkeypatch.setattr(liveness, "_flattened", unknown)
    with pytest.raises(KeyError):
        temporary_bytes(jaxpr)
    monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
    with pytest.raises(Failed, match=r"'num_carry'.*expected JAX 0\.12 or older: pip install 'jax==0\.12\.\*'"):
        temporary_bytes(jaxpr)


# How a value is cut that is computed of `x: [4, 8, 6]`, cut into two at its axis 1, and of `y: [8, 5]`, which is whole.
CUT_RESULTS: dict[str, tuple[Any, int | None]] = {
    "elementwise": (lambda x, y: jnp.tanh(x) + 1, 1),
    "transposed": (lambda x, y: x.transpose(2, 0, 1), 2),
    "axes taken apart": (lambda x, y: x.reshape(4, 4, 2, 6), 1),
    "an axis joined with those behind it": (lambda x, y: x.reshape(4, 48), 1),
    "an axis joined with those before it": (lambda x, y: x.reshape(32, 6), None),
    "an axis before it summed up": (lambda x, y: x.sum(axis=0), 0),
    "summed up": (lambda x, y: x.sum(axis=1), None),
    "another axis sliced": (lambda x, y: x[1:3], 1),
    "sliced": (lambda x, y: x[:, :2], None),
    "a product over another axis": (lambda x, y: jnp.einsum("abc,cd->dab", x, jnp.ones((6, 3))), 2),
    "a product over it": (lambda x, y: jnp.einsum("abc,bd->acd", x, y), None),
    "a batch of products": (lambda x, y: jnp.einsum("abc,bd->bacd", x, y), 0),
    "carried by a loop": (lambda x, y: jax.lax.fori_loop(0, 3, lambda i, z: z * 2, x), 1),
    "put together by a loop": (lambda x, y: jax.lax.scan(lambda c, z: (c, z + 1), 0.0, x)[1], 1),
    "of rows looked up": (lambda x, y: x[0][jnp.array([1, 3])], None),
    "of whole columns looked up": (lambda x, y: x[0][:, jnp.array([1, 3])], 0),
    "each sliced at a place of its own": (
        lambda x, y: jax.vmap(lambda z, i: jax.lax.dynamic_slice_in_dim(z, i, 2, 1))(x, jnp.arange(4)),
        1,
    ),
}


@pytest.mark.parametrize("name", CUT_RESULTS)
def test_what_is_computed_of_shards_is_cut_as_they_are(name: str) -> None:
    program, axis = CUT_RESULTS[name]
    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 8, 6)), jnp.ones((8, 5)))
    assert flat_program(jaxpr, (1, None), 2).axes == (axis,)


def test_devices_that_share_a_model_need_their_shares_of_what_it_computes() -> None:
    """Of an MLP that is cut by its inner entries each device has the whole of its result alone."""

    def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jnp.tanh(x @ up.T) @ down.T

    jaxpr = jax.make_jaxpr(mlp)(jnp.ones((8, 64)), jnp.ones((256, 64)), jnp.ones((64, 256)))
    inner, result = 4 * 8 * 256, 4 * 8 * 64
    assert temporary_bytes(jaxpr) == inner + result
    assert temporary_bytes(jaxpr, cut=[None, 0, 1], shards=4) == inner // 4 + result


# ---------------------------------------------------------------------------------------------------------------
# Banks and passes


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "slerp", "nuslerp", "model_stock", "sce",
                                    "tsv_m", "iso_c", "swudi_filter"])  # fmt: skip
def test_an_abstract_bank_has_the_shapes_of_the_loaded_one(family: Family, method: str) -> None:
    known = METHODS[method]
    base = [family.base] if known.options.has_base else []
    sources, config = open_sources([*base, *family.parents[: known.max_parents]])
    fixed = tuple((p.name, (float(p.default or 0),)) for p in known.parameters if not p.searched)
    spec = MergeSpec(method, known.options, 3, "float32", fixed)

    def shapes(bank: Any) -> Any:
        return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), bank)

    assert shapes(abstract_bank(sources, config, spec)) == shapes(load_bank(sources, config, spec))


def test_a_plans_flops_and_temporaries_are_the_compilers(family: Family) -> None:
    """The compiler counts a loop's body once, so here the count is compared with every loop's body once."""
    problem = problem_of(document(family))
    plan = make_plan(problem, batched := problem.prepare())
    assert plan.fits and plan.candidate.flops > 0 and plan.run.flops > 3 * plan.generation.flops
    assert plan.generation.flops == pytest.approx(4 * plan.candidate.flops)
    from evojax_merge.evaluation.evaluator import Evaluator

    evaluator = Evaluator(
        problem.backend.models.decoder, problem.backend.models.tokenizer, batched.shards[0], target=problem.target
    )
    population = problem.backend.candidates.planned_population(evaluator, 1, anywhere)
    scores = [
        one
        for one in planned_passes(evaluator, population, batched.shards[0][0], JaxprReader(problem.target, ONE_DEVICE))
        if one.name == "score"
    ]
    for one in scores:
        compiled = one.traced.lower().compile()
        counted = cost_of(one.traced.jaxpr, lambda eqn: 1).flops
        analysis = compiled.cost_analysis()
        assert analysis is not None and counted == pytest.approx(analysis["flops"], rel=0.05)


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_gradients_are_counted(family: Family, target: str) -> None:
    """A gradient computes each product three times, once more where a layer is computed again, and merges."""
    search = {"generations": 3, "strategy": "gradient", "population": 1}
    problem = problem_of(document(family, search=search), target)
    plan = make_plan(problem, problem.prepare())
    assert plan.gradient is not None
    assert 3 * plan.candidate.flops < plan.gradient.flops < 8 * plan.candidate.flops
    assert plan.generation == plan.gradient and plan.run.flops > 3 * plan.gradient.flops
    assert "gradient" in {row.name for row in plan.passes} and "score" not in {row.name for row in plan.passes}
    assert "a candidate and its gradient" in "\n".join([*plan.lines(), *plan.summary()])


def test_generations_of_a_hybrid_search_are_of_two_kinds(family: Family) -> None:
    search = {"generations": 8, "strategy": "hybrid", "population": 4, "gradient": {"generations": 3, "starts": 2}}
    problem = problem_of(document(family, search=search))
    plan = make_plan(problem, problem.prepare())
    assert plan.gradient is not None and plan.gradient_generations == 3
    searched = 3 * 2 * plan.gradient.flops + 5 * 4 * plan.candidate.flops
    assert searched < plan.run.flops < searched + 20 * plan.candidate.flops
    assert {"score", "gradient"} <= {row.name for row in plan.passes}


def test_the_choice_of_the_winner_is_planned_in_its_own_dtype(family: Family) -> None:
    search = {"generations": 1, "population": 2, "finalists": 50}
    plans = [
        make_plan(problem, problem.prepare())
        for final in (None, "bfloat16", "float32")
        for problem in [
            problem_of(
                document(
                    family, search=search,
                    evaluation={"compute_dtype": "bfloat16", "final_compute_dtype": final, "chunk": 1},
                ),
                "h100",
            )
        ]
    ]  # fmt: skip
    same, other, wider = plans
    assert same == other
    # Candidates of generations take what they took.
    assert wider.generation == same.generation and wider.passes == same.passes
    assert wider.run.seconds > 1.2 * same.run.seconds and wider.pass_bytes > same.pass_bytes


@thorough
def test_a_hybrid_search_plans_its_gradients_with_as_many_candidates_as_it_starts_from(family: Family) -> None:
    search = {"generations": 8, "strategy": "hybrid", "population": 8, "gradient": {"generations": 3, "starts": 2}}
    problem = problem_of(document(family, search=search), "h100")
    plan = make_plan(problem, problem.prepare())
    assert {row.chunk for row in plan.passes if row.name == "score"} == {8}
    assert {row.chunk for row in plan.passes if row.name == "gradient"} == {2}


@thorough
def test_candidates_that_no_device_holds_are_not_helped_by_shorter_batches(family: Family) -> None:
    """Decoding needs a candidate's own weights beside the models; two devices that share it need half of both."""
    task = {"name": "text", "kind": "exact_match", "file": str(family.tasks), "heldout": 0.25, "max_new_tokens": 4}
    problem = problem_of(document(family, tasks=[task], evaluation={"chunk": 1}), "8xh100")
    ample = make_plan(problem, tasks := problem.prepare())
    (held,) = {row.held_bytes for row in ample.passes if row.name == "decode"}

    def plan(model: int) -> Plan:
        target = replace(problem.target, memory=ample.bank_bytes + held // 2)
        evaluation = problem.backend.config.evaluation.model_copy(update={"model": model})
        config = problem.backend.config.model_copy(update={"evaluation": evaluation})
        backend = replace(problem.backend, target=target, config=config)
        return make_plan(replace(problem, backend=backend), tasks)

    alone, shared = plan(1), plan(2)
    assert not alone.fits and shared.fits
    assert any("evaluation.model: 2" in line for line in alone.advice)
    assert not any("tokens_per_batch" in line for line in alone.advice)


def test_a_plan_says_how_many_devices_a_host_of_several_has(family: Family) -> None:
    problem = problem_of(document(family), "v5e-16")
    plan = make_plan(problem, problem.prepare())
    assert "16 x TPU v5 lite, 4 to each of 4 hosts" in plan.lines()[1]


def test_how_many_candidates_generate_together_is_asked_of_the_devices_that_share_one(family: Family) -> None:
    """The prefill that tells is of a candidate, a prefix and a cache that are cut as they will be."""
    task = {"name": "words", "kind": "exact_match", "file": str(family.tasks), "max_new_tokens": 8, "heldout": 0.25}
    problem = problem_of(document(family, tasks=[task], evaluation={"model": 2}), "2xh100")
    asked: list[Any] = []

    def temporaries(traced: Any) -> int:
        asked.append(traced)
        return 10**9

    planner = problem.backend.planner().evaluator
    evaluator = replace(planner, batched_tasks=problem.prepare().shards[0], temporary_bytes=temporaries)
    population = problem.backend.candidates.planned_population(evaluator, 100, evaluator.devices.abstract)
    assert 1 < generation_chunk(evaluator, population, evaluator.batched_tasks[0]) < 100
    (prefill,) = asked
    leaves = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(prefill.args_info)]
    for name, axis in (("['q']", 2), (".states[0].keys", 1)):
        found = [own for leaf, own in zip(leaves, prefill.cut, strict=True) if leaf.endswith(name)]
        assert found == [axis], leaves


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_devices_that_share_a_candidate_do_its_work_once(kind: str, tmp_path: Path) -> None:
    family = build_family(tmp_path, tiny_config(kind, num_hidden_layers=2))

    def work(model: int) -> float:
        problem = problem_of(document(family, evaluation={"model": model}), "4xh100")
        return make_plan(problem, problem.prepare()).candidate.flops

    alone = work(1)
    for model in (2, 4):
        assert work(model) == pytest.approx(alone, rel=0.03)


def test_devices_that_share_a_candidate_hold_their_parts_of_it_once(family: Family) -> None:
    task = {"name": "words", "kind": "exact_match", "file": str(family.tasks), "max_new_tokens": 8, "heldout": 0.25}

    def materialised(model: int) -> int:
        problem = problem_of(document(family, tasks=[task], evaluation={"model": model, "chunk": 1}), "2xh100")
        plan = make_plan(problem, problem.prepare())
        (row,) = {row.temporary_bytes: row for row in plan.passes if row.name == "materialise"}.values()
        return row.temporary_bytes

    assert materialised(1) / 2 <= materialised(2) < 0.6 * materialised(1)


def test_merging_moves_every_source_and_writes_the_merge(family: Family) -> None:
    problem = problem_of(document(family))
    bank = abstract_bank(
        problem.backend.models.sources, problem.backend.models.decoder, problem.backend.candidates.spec
    )  # type: ignore[attr-defined]
    entries = sum(leaf.sources.size // leaf.sources.shape[1] for leaf in bank.stacks["layers"].values())
    head = bank.shared["embed"].sources.size // 3
    # Three float32 sources are read, and a bfloat16 merge is written.
    assert merge_bytes(bank, "bfloat16") == (entries + head) * (3 * 4 + 2)


# ---------------------------------------------------------------------------------------------------------------
# The command


SEVEN_B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "head_dim": None, "tie_word_embeddings": False,
}  # fmt: skip


def header_models(family: Family, folder: Path, sizes: dict[str, Any], names: Sequence[str]) -> list[Path]:
    """Models of other sizes than the family's, in bfloat16, of headers alone."""
    from evojax_merge.checkpoints.config_file import decoder_config

    found = []
    for name in names:
        model = folder / name
        model.mkdir()
        for file in family.base.iterdir():
            if not file.name.startswith(("model", "config")):
                (model / file.name).symlink_to(file)
        config = read_json(family.base / "config.json")
        shapes = tensor_shapes(decoder_config(write_json(model / "config.json", config | sizes)))
        headers = {tensor: TensorHeader("BF16", shape, 2 * int(np.prod(shape))) for tensor, shape in shapes.items()}
        write_header_only(model / "model.safetensors", headers)
        found.append(model)
    return found


def test_a_plan_for_7b_models_on_targets_that_are_not_here(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, *parents = header_models(family, tmp_path, SEVEN_B, ("base", "a", "b", "c"))
    config, out = tmp_path / "config.yaml", tmp_path / "plan.json"
    changes = {"base": f"{base}@v2", "parents": [str(parent) for parent in parents], "export_dtype": "bfloat16"}
    write_yaml(config, document(family, **changes))

    def plan(target: str, *options: str, status: int = 0) -> dict[str, Any]:
        whole = () if "evaluation.bank=auto" in options else ("--set", "evaluation.bank=device")
        assert command("plan", config, "--target", target, "--json", out, *whole, *options) == status
        (found,) = read_json(out)
        return found

    # Two layers at a time of what stays in the host's memory.
    for target, ahead in (("rtx4090", 3.5e9), ("h100", 3.5e9)):
        streamed = plan(target, "--set", "evaluation.bank=auto")
        assert streamed["fits"] and streamed["bank_bytes"] < ahead and streamed["host_bytes"] > 57.9e9
        assert any("stay in the host's memory" in note for note in streamed["notes"])
    # Hidden states that the card does not hold wait in the host's memory.
    held, waiting, twice = (
        plan("rtx4090", "--set", "evaluation.bank=host", "--set", f"search.population={population}")["host_bytes"]
        for population in (16, 20_000, 40_000)
    )
    assert twice - waiting == waiting - held > 5e9
    # A candidate that writes is on the card beside two layers: TIES of 7B on 24 GB, and no memory fraction to set.
    writing = ("--set", "tasks.0.kind=generation", "--set", "tasks.0.max_new_tokens=100")
    written = plan("rtx4090", "--set", "evaluation.bank=auto", *writing)
    assert written["fits"] and written["bank_bytes"] + written["pass_bytes"] > 17.5e9
    capfd.readouterr()
    h100 = plan("h100")
    # Four models of 7.24 billion parameters, two bytes each.
    assert h100["bank_bytes"] == pytest.approx(57.9e9, rel=0.01) and h100["fits"]
    assert h100["host_bytes"] < 20e9
    # Of DARE's random masks two numbers of each row are stored.
    dare = plan("h100", "--set", "space.method=dare_ties")
    assert dare["bank_bytes"] == pytest.approx(h100["bank_bytes"], rel=0.001) and dare["fits"]
    # DELLA's have one of each entry.
    della = plan("h100", "--set", "space.method=della", status=2)
    assert della["bank_bytes"] == pytest.approx(101.4e9, rel=0.01) and not della["fits"]
    assert any("a method that stores no number per entry" in line for line in della["advice"])
    said = capfd.readouterr()
    assert f"{base} is a folder here, which has no revisions; v2 is ignored" in said.err
    assert "does not fit: 10" in said.out and "the largest pass" in said.out
    (line,) = [
        line for line in said.err.splitlines() if "what would make it fit: evaluation.bank: host (101 GB" in line
    ]
    assert "config.yaml: does not fit: 10" in line and ", or --target h200, or --target 4xa100-40 with" in line
    # The last lines are the verdict and the time of what fits.
    plan("h100")
    verdict, seconds = capfd.readouterr().out.splitlines()[-2:]
    assert verdict.startswith("fits: 5") and seconds.startswith("time: ")
    assert max(len(verdict), len(seconds)) < 100
    assert plan("rtx4090", status=2)["candidate"]["seconds"] is None
    said = capfd.readouterr()
    assert "seconds" not in said.out and "roofline" not in said.out and "time: " not in said.out
    assert said.out.splitlines()[-1].startswith("does not fit: ")
    offered = re.findall(r"--target (\S+?)(?: with evaluation.model: (\d+))?(?:,|$)", said.err.splitlines()[-1])
    assert offered == [("a100-80", ""), ("2xa100-40", "2")]
    for name, shards in offered:
        assert plan(name, "--set", f"evaluation.model={shards or 1}")["run"]["seconds"] > 0
    for method, alone in (("della", della), ("dare_ties", dare)):
        shared = plan("8xh100", "--set", f"space.method={method}", "--set", "evaluation.model=8")
        assert shared["fits"] and shared["bank_bytes"] == pytest.approx(alone["bank_bytes"] / 8, rel=0.01)
    assert plan("v5p-8", "--set", "space.method=della")["fits"]
    # Of a pool a card has one candidate, or two layers of it; its members are on the host, or on the disk.
    pool = ("--set", "space=null", "--set", "pool={methods: [slerp], size: 8}", "--set", "search={generations: 3}")
    member = 14.48e9
    plans = {place: plan("rtx4090", *pool, "--set", f"evaluation.bank={place}") for place in ("auto", "host", "disk")}
    assert plans["auto"] == plan("rtx4090", *pool)
    assert plans["auto"]["host_bytes"] > 16 * member > 60e9 > plans["disk"]["host_bytes"]
    assert plans["disk"]["disk_bytes"] > 17 * member > plans["host"]["disk_bytes"]
    for place in ("host", "disk"):
        assert plans[place]["fits"] and plans[place]["bank_bytes"] < 1e9
        assert any("go over the link for each child" in note for note in plans[place]["notes"])


@pytest.mark.parametrize(
    "case", ["bitsandbytes, 4 bits, twice, in float32", "compressed-tensors, packed, zeros", "GPTQ", "FP8, as FBGEMM's"]
)
def test_quantised_models_are_planned_by_headers_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes of packed matrices are those of the model that is here as a whole."""
    from test_quantised import quantised

    plain = save(random_model(tiny_config(num_key_value_heads=4, tie_word_embeddings=True)), tmp_path / "plain")
    quantised(plain, tmp_path / "whole", case)
    small = tmp_path / "snapshots" / "0123456789abcdef"
    shutil.copytree(tmp_path / "whole", small, ignore=shutil.ignore_patterns("*.safetensors"))
    raw = (tmp_path / "whole" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    del header["__metadata__"]

    def download(name: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        return str(small)

    found = SimpleNamespace(tensors={name: SimpleNamespace(**row) for name, row in header.items()})
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.parse_safetensors_file_metadata", lambda *_, **options: found)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **options: ["model.safetensors"])
    folders = HeaderFolders(tmp_path / "headers")
    by_headers = resolve_headers(folders, "parents", "owner/name", tmp_path)
    whole = resolve_model("parents", str(tmp_path / "whole"), tmp_path)
    assert folders.download_bytes == pytest.approx(len(raw), abs=2000)
    entries = [
        {name: (one.shape, one.dtype) for name, one in open_model(path).entries.items()} for path in (whole, by_headers)
    ]
    assert entries[0] == entries[1]
    open_sources([by_headers, by_headers])


def offer_headers(hub: Mapping[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub have these repositories, of which small files and headers may be asked for."""
    from huggingface_hub.utils import filter_repo_objects

    def names(self: Any, name: str, **options: Any) -> list[str]:
        return [file.name for file in hub[name].iterdir()]

    def download(name: str, *, local_files_only: bool = False, revision: Any = None, **patterns: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        copy = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0123456789abcdef"
        copy.mkdir(parents=True, exist_ok=True)
        for file in filter_repo_objects(names(None, name), **patterns):
            assert not file.endswith(".safetensors")
            shutil.copyfile(hub[name] / file, copy / file)
        return str(copy)

    def metadata(self: Any, name: str, file: str, **options: Any) -> Any:
        raw = (hub[name] / file).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        header.pop("__metadata__", None)
        return SimpleNamespace(tensors={tensor: SimpleNamespace(**row) for tensor, row in header.items()})

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.parse_safetensors_file_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", names)


def test_larger_models_of_the_hub_are_planned_by_headers_under_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_text_decoders import write_family

    write_family(tmp_path, "llava")
    offer_headers({f"me/{name}": tmp_path / name for name in ("base", "one", "two")}, tmp_path / "cache", monkeypatch)
    models = {"base": "me/base", "parents": ["me/one", "me/two"], "other_modules": "me/one"}
    document = search_config(heldout="heldout.jsonl", **models)
    assert command("plan", write_yaml(tmp_path / "config.yaml", document), "--target", "h100") == 0
    assert "of me/one kept (" in " ".join(capsys.readouterr().out.split())


def test_adapters_of_the_hub_are_planned_by_headers(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_adapters import adapter

    lora, _ = adapter(family.base, tmp_path / "lora")
    offer_headers({"me/lora": lora}, tmp_path / "cache", monkeypatch)
    models = {"parents": ["me/lora", str(family.parents[0])]}
    assert command("plan", write_yaml(tmp_path / "config.yaml", document(family, **models)), "--target", "h100") == 0


def test_folders_without_weights_are_planned_by_the_shapes_of_their_configs(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(folders: Sequence[Path]) -> dict[str, Any]:
        base, *parents = map(str, folders)
        models = {"base": base, "parents": parents, "evaluation": {"compute_dtype": "float32"}}
        config = write_yaml(tmp_path / "config.yaml", document(family, **models))
        assert command("plan", config, "--target", "h100", "--json", tmp_path / "plan.json") == 0
        (plan,) = read_json(tmp_path / "plan.json")
        return {key: plan[key] for key in ("bank_bytes", "candidate", "passes", "parts")}

    bare = [tmp_path / folder.name for folder in (family.base, *family.parents)]
    for folder, whole in zip(bare, (family.base, *family.parents), strict=True):
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    expected = work((family.base, *family.parents))
    assert "holds no weights" not in capsys.readouterr().err
    assert work(bare) == expected
    says = "holds no weights; planned by the shapes that its config.json means, in F32"
    assert says in capsys.readouterr().err
    assert not any(path.suffix == ".safetensors" for folder in bare for path in folder.iterdir())


def test_repositories_of_diffusers_are_planned_by_headers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects
    from tiny_generators import make_ddpm

    from evojax_merge.backends.torch.generator import open_component
    from evojax_merge.checkpoints.pipelines import Pipeline

    whole, small = make_ddpm(tmp_path / "whole", 0), tmp_path / "snapshots" / "0123456789abcdef"
    weights = whole / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(weights, weights.with_suffix(".fp16.safetensors"))
    names = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()]
    raw = weights.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)

    def download(name: str, *, local_files_only: bool = False, revision: Any = None, **patterns: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        for file in filter_repo_objects(names, **patterns):
            (small / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / file, small / file)
        return str(small)

    found = SimpleNamespace(tensors={name: SimpleNamespace(**row) for name, row in header.items()})
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.parse_safetensors_file_metadata", lambda *_, **options: found)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **options: names)
    folders = HeaderFolders(tmp_path / "headers")
    folder = resolve_headers(folders, "parents", "owner/name", tmp_path)
    assert folders.download_bytes == pytest.approx(len(raw), abs=2000) and not list(small.rglob("*.safetensors"))
    shapes = [
        {name: tensor.shape for name, tensor in open_component(Pipeline(path), "unet").state_dict().items()}
        for path in (whole, folder)
    ]
    assert shapes[0] == shapes[1]


def test_a_plan_begins_with_the_warnings_of_its_search(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = family.tasks.read_text().splitlines(keepends=True)
    (tmp_path / "tasks.jsonl").write_text("".join(lines[:3] + lines[:3]))
    config = write_yaml(tmp_path / "config.yaml", search_config(family, tasks=[task_section(heldout=0.5)]))
    assert command("plan", config) == 0
    err = " ".join(capfd.readouterr().err.split())
    assert "warning:" in err and "3 of 6 examples repeat others of the same data" in err


def test_wrong_options_of_plan(family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, taken = tmp_path / "config.yaml", tmp_path / "mine.json"
    write_yaml(config, document(family))
    assert command("plan", config, "--target", "v5p-9") == 2
    assert "--target: there is no target 'v5p-9'; expected one of v5p-8" in capfd.readouterr().err
    taken.write_text('{"mine": 1}')
    assert command("plan", config, "--json", taken) == 2
    assert "holds no plan" in capfd.readouterr().err and taken.read_text() == '{"mine": 1}'


def test_a_hub_that_cannot_be_reached_is_one_line(family: Family, tmp_path: Path) -> None:
    """The tests have no network (HF_HUB_OFFLINE)."""
    folders = HeaderFolders(tmp_path)
    assert folders.resolve("parents", str(family.base), tmp_path) == family.base
    what = (
        r"nobody/nothing: no such folder, and the hub did not give its headers \(the variable HF_HUB_OFFLINE .* path of"
    )
    with pytest.raises(InputError, match=what):
        folders.resolve("parents", "nobody/nothing", tmp_path)
    with pytest.raises(InputError, match="no such folder; expected a model folder or a hub id"):
        folders.resolve("parents", "./nowhere", tmp_path)


PROGRAMS = {
    "scatter that adds": lambda x: jnp.zeros(8).at[jnp.array([0, 3, 3])].add(x[:3]),
    "reducer of one's own": lambda x: jax.lax.reduce(x, 1.0, lambda a, b: a * b + b, (0,)),
    "windows": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (1,), "VALID"),
    "sort": lambda x: jnp.sort(x),
    "custom derivative": lambda x: jax.nn.relu(x) + jax.nn.silu(x),
    "linear solve": lambda x: jax.scipy.linalg.solve(jnp.eye(8) + x[:, None] * x, x),
    "loop and branch": lambda x: jax.lax.while_loop(
        lambda y: y.sum() < 9, lambda y: jax.lax.cond(y[0] > 1, jnp.exp, lambda z: z + 1, y), x
    ),
    "gradient of a scan": jax.grad(lambda x: jax.lax.scan(lambda c, y: (c * y, jnp.sin(c)), x[0], x)[1].sum()),
    "checkpoint": jax.grad(lambda x: jax.checkpoint(lambda y: jnp.tanh(y) @ y)(x)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_any_program_can_be_read(name: str) -> None:
    jaxpr = jax.make_jaxpr(PROGRAMS[name])(jnp.ones(8))
    results = sum(aval.size * aval.dtype.itemsize for aval in jaxpr.out_avals)
    assert results <= temporary_bytes(jaxpr) < 10**5
    assert 0 <= cost_of(jaxpr).flops < 10**5
