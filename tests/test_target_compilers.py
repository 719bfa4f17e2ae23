"""What the compilers of targets that are not here make of a search's passes. `make test-targets` installs them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers.families import Family
from jax.sharding import SingleDeviceSharding
from test_planning import document, header_models

from evojax_merge.evaluation.compilers import CompilerMissing, collectives, target_compiler
from evojax_merge.evaluation.targets import find_target
from evojax_merge.models.attention import prefill_attention
from evojax_merge.models.layers import SequenceLayout
from evojax_merge.problem import build_problem, config_from
from evojax_merge.report.plan import Plan
from evojax_merge.steps.planning import make_plan

# A Llama whose axes all differ, small enough to compile at once and large enough that what is padded does not count.
SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": 768, "num_hidden_layers": 2,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
SOURCES = 3
# A target, and how many of its devices share a candidate; of several hosts one is compiled for.
CASES = [("v5e-1", 1), ("v5e-16", 4), ("v5e-8", 4), ("h100", 1), ("4xh100", 4)]


# An instruction of optimised HLO: its name, the dtype and shape of its result, the operation and its operands.
INSTRUCTION = re.compile(r"%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(([^)]*)\)")


@dataclass(frozen=True)
class Instruction:
    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    plan: Plan
    program: jax.stages.Compiled

    def instructions(self) -> list[Instruction]:
        return [
            Instruction(
                name, dtype, tuple(map(int, filter(None, shape.split(",")))), operation,
                tuple(operand.strip().split(" ")[-1].lstrip("%") for operand in operands.split(",")),
            )
            for name, dtype, shape, operation, operands in INSTRUCTION.findall(self.program.as_text() or "")
        ]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The scoring pass of a candidate of a bfloat16 bank, as a target's compiler makes it; of two for each group of
    devices, where there are several groups."""
    models = header_models(family, tmp_path_factory.mktemp("models"), SIZES, ("base", "a", "b"))

    @cache
    def of(name: str, model: int) -> Compiled:
        groups = find_target("target", name).devices_per_host // model
        plan, programs = compile_passes(family, models, name, {"model": model, "chunk": groups})
        return Compiled(plan, programs[0])

    return of


@pytest.fixture(scope="module")
def generating(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plan and the passes, by name, of a generation by candidates of such a bank."""
    models = header_models(family, tmp_path_factory.mktemp("models"), SIZES, ("base", "a", "b"))
    task = {"name": "words", "kind": "exact_match", "file": str(family.tasks), "max_new_tokens": 200, "heldout": 0.25}
    # Two candidates and more for each device.
    search = {"generations": 1, "population": 8}

    @cache
    def of(name: str, model: int) -> tuple[Plan, dict[str, jax.stages.Compiled]]:
        plan, programs = compile_passes(family, models, name, {"model": model}, tasks=[task], search=search)
        return plan, {str(one.as_text()).split(",")[0].removeprefix("HloModule jit_"): one for one in programs}

    return of


def compile_passes(
    family: Family, models: Sequence[Path], name: str, settings: dict[str, Any], **changes: Any
) -> tuple[Plan, list[jax.stages.Compiled]]:
    """The plan of a search on a target, and its passes as the target's compiler makes them. models: the base first;
    settings: of `evaluation`; changes: other keys of the config. Skips the test where the compiler is not here."""
    target = find_target("target", name)
    try:
        compiler = target_compiler(target, settings["model"])
    except CompilerMissing as error:
        pytest.skip(str(error))
    base, *parents = map(str, models)
    changes |= {"evaluation": settings | {"compute_dtype": "bfloat16"}, "export_dtype": "bfloat16"}
    config = config_from(Path("config.yaml"), document(family, base=base, parents=parents, **changes), [], None)
    problem = build_problem(Path("config.yaml"), config, target=target)
    return make_plan(problem, problem.prepare(), compiler=compiler), compiler.programs()


@pytest.mark.parametrize(("name", "model"), CASES)
def test_memory_is_reported_and_fits(compiled: Any, name: str, model: int) -> None:
    """The estimate is not far below the report; of matrices as small as these it may be above it, for their merges are
    then part of the products."""
    plan, most = compiled(name, model).plan, 1.5 if find_target("target", name).platform == "tpu" else 3
    assert plan.fits
    for row in plan.passes:
        assert row.reported_bytes is not None and 0 < row.reported_bytes < most * row.temporary_bytes


@pytest.mark.parametrize(("name", "model"), CASES)
def test_devices_that_share_a_candidate_exchange_activations(compiled: Any, name: str, model: int) -> None:
    """Two sums for each layer, and far less than weights; a single device exchanges nothing."""
    found = compiled(name, model)
    exchanged = collectives(found.program)
    if model == 1:
        assert not exchanged
        return
    assert set(exchanged) == {"all-reduce"}
    # Those of the embedding's rows and of the head's shards.
    others = 4
    assert exchanged["all-reduce"][0] - 2 * SIZES["num_hidden_layers"] in range(1, others + 1)
    assert sum(nbytes for _, nbytes in exchanged.values()) < found.plan.bank_bytes / 2
    # The plan's column counts what each device sends in a ring, for one candidate in all runs.
    (row,) = (row for row in found.plan.passes if row.name == "score")
    assert row.collectives is not None
    summed = row.collectives["all-reduce"][1] * row.runs / row.chunk
    assert row.sent_bytes == pytest.approx(2 * (model - 1) / model * summed, rel=0.05)


def test_hosts_that_share_a_candidate_exchange_activations(family: Family, tmp_path: Path) -> None:
    """Two hosts of four chips: no weights go from one to the other."""
    sizes = SIZES | {"num_key_value_heads": 8}
    models = header_models(family, tmp_path, sizes, ("base", "a", "b"))
    plan, programs = compile_passes(family, models, "v5e-16", {"model": 8, "chunk": 1})
    exchanged = collectives(programs[0])
    assert set(exchanged) == {"all-reduce"}
    assert exchanged["all-reduce"][0] - 2 * sizes["num_hidden_layers"] in range(1, 5)
    assert sum(nbytes for _, nbytes in exchanged.values()) < plan.bank_bytes / 2


@pytest.mark.parametrize(("name", "model", "chunk"), [("v5e-1", 1, 2), ("v5e-8", 4, 2), ("h100", 1, 2)])
def test_mixtures_are_compiled(name: str, model: int, chunk: int, family: Family, tmp_path: Path) -> None:
    """Several candidates side by side, and parts of every expert on devices that share a candidate, which exchange no
    more than those of a dense model."""
    sizes = SIZES | MIXTURE
    models = header_models(family, tmp_path, sizes, ("base", "a", "b"))
    plan, (program,) = compile_passes(family, models, name, {"model": model, "chunk": chunk})
    assert plan.fits
    exchanged = collectives(program)
    assert set(exchanged) == ({"all-reduce"} if model > 1 else set())
    if model > 1:
        assert exchanged["all-reduce"][0] - 2 * sizes["num_hidden_layers"] in range(1, 5)


def test_devices_that_share_a_candidate_exchange_activations_when_it_generates(generating: Any) -> None:
    """The same two sums in a prefill and in a decode step: a candidate lies in memory as its sources do."""
    _, programs = generating("v5e-4", 4)
    assert not collectives(programs["materialise"])
    for name in ("prefill", "decode"):
        exchanged = collectives(programs[name])
        assert set(exchanged) == {"all-reduce"}, name
        # Those of the embedding's rows, and of the best token of each shard of the head.
        others = 4
        assert exchanged["all-reduce"][0] - 2 * SIZES["num_hidden_layers"] in range(1, others + 1), name


@pytest.mark.parametrize("name", ["v5e-1", "h100"])
def test_a_generation_on_one_device_is_compiled_for_it(generating: Any, name: str) -> None:
    """The program that makes decoding's first state reads no array, and would run anywhere."""
    plan, programs = generating(name, 1)
    assert {"materialise", "prefill", "decode"} <= programs.keys()
    assert all(row.reported_bytes is not None for row in plan.passes)


def test_a_tpu_decodes_in_place(generating: Any) -> None:
    """One candidate at a time, with draft tokens, and copies of neither weights nor caches."""
    plan, programs = generating("v5p-8", 1)
    (decode,) = (row for row in plan.passes if row.name == "decode")
    program, memory = programs["decode"], programs["decode"].memory_analysis()
    weights = [leaf.size // plan.groups for leaf in jax.tree.leaves(programs["materialise"].out_info)]
    assert decode.chunk == 1 and memory is not None
    assert memory.temp_size_in_bytes < 2 * sum(weights) / 4
    cache = min(leaf.size // plan.groups for leaf in jax.tree.leaves(program.out_info.states))
    # What is brought into a core's own memory ahead of time is an operation of another name.
    copied = [math.prod(one.shape) for one in Compiled(plan, program).instructions() if one.operation == "copy"]
    assert copied and max(copied) < cache


@pytest.mark.parametrize(("name", "kernel"), [("v5p-8", "tpu_custom_call"), ("h100", "__cudnn$fmha")])
def test_attention_over_long_rows_takes_the_library_and_memory_by_their_length(name: str, kernel: str) -> None:
    """A layer's attention of a 7B model: no array has an entry for every pair of positions, with a library's kernel for
    rows of one sequence, nor in the blocks of other rows."""
    try:
        compiler = target_compiler(find_target("target", name), 1)
    except CompilerMissing as error:
        pytest.skip(str(error))

    def attention(length: int) -> Any:
        def attend(segments: jax.Array, *operands: jax.Array) -> jax.Array:
            layout = SequenceLayout(jnp.broadcast_to(jnp.arange(length), segments.shape), segments)
            return prefill_attention(jnp.int32(10**6), layout)(*operands)[0]

        place = SingleDeviceSharding(compiler.device)
        shapes = [(1, length, heads, 128) for heads in (32, 8, 8)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
        return jax.jit(attend).trace(jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place), *arrays)

    whole = attention(32768)
    assert kernel in (compiler.compiled(whole).as_text() or "")
    needed = [compiler.temporary_bytes(traced) for traced in (attention(16384), whole)]
    # A head's float32 products alone would be 4.3 GB.
    assert needed[1] < 2.2 * needed[0] and needed[1] < 2 * 32768**2, needed


@pytest.mark.parametrize(("name", "model"), CASES)
def test_the_bank_is_neither_copied_nor_widened(compiled: Any, name: str, model: int) -> None:
    """Layers are picked from where they lie: nothing computes an array of all layers of all sources."""
    stacks = [
        one
        for one in compiled(name, model).instructions()
        if len(one.shape) == 4 and one.shape[:2] == (SIZES["num_hidden_layers"], SOURCES)
    ]
    assert stacks
    for one in stacks:
        assert one.dtype == "bf16" and one.operation in ("parameter", "get-tuple-element", "bitcast"), one


@pytest.mark.parametrize(("name", "model"), CASES)
def test_products_are_of_bfloat16(compiled: Any, name: str, model: int) -> None:
    instructions = compiled(name, model).instructions()
    dtypes = {one.name: one.dtype for one in instructions}
    products = [one for one in instructions if one.operation in ("dot", "convolution") or is_gemm(one)]
    assert len(products) > 6
    for one in products:
        assert [dtypes.get(operand) for operand in one.operands[:2]] == ["bf16", "bf16"], one


def is_gemm(one: Instruction) -> bool:
    """Whether it calls a library's matrix product."""
    return one.operation == "custom-call" and "gemm" in one.name


def test_collectives_of_loops_are_counted_as_often_as_they_run() -> None:
    text = """
%add (a: f32[], b: f32[]) -> f32[] {
}
%body.1 (arg: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
}
%cond.1 (arg: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%body.2 (arg: (s32[], bf16[2])) -> (s32[], bf16[2]) {
  %all-gather-start.1 = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%y), dimensions={0}
  %all-gather-done.1 = bf16[8]{0} all-gather-done(%all-gather-start.1)
}
ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %while.1 = (s32[], f32[4,8]) while(%t), condition=%cond.1, body=%body.1
  %while.2 = (s32[], bf16[2]) while(%u), condition=%c, body=%body.2, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %all-reduce.2 = f32[4,8]{1,0} all-reduce(%z), replica_groups={}, to_apply=%add
}
"""
    program: Any = SimpleNamespace(as_text=lambda: text)
    assert collectives(program) == {"all-reduce": (7, 7 * 128), "all-gather": (3, 3 * 16)}
