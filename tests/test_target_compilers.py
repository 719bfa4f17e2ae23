"""What the compilers of targets that are not here make of a search's passes. `make test-targets` installs them."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from helpers import Family
from test_planning import document, header_models

from evojax_merge.evaluation.compilers import CompilerMissing, collectives, target_compiler
from evojax_merge.evaluation.targets import find_target
from evojax_merge.planning import make_plan
from evojax_merge.problem import build_problem, config_from
from evojax_merge.report.plan import Plan

# A Llama whose axes all differ, small enough to compile at once and large enough that what is padded does not count.
SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
SOURCES = 3
# A target, and how many of its devices share a candidate.
CASES = [("v5e-1", 1), ("v5e-4", 4), ("h100", 1), ("4xh100", 4)]


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
    """The scoring pass of a candidate of a bfloat16 bank, as a target's compiler makes it."""
    base, *parents = header_models(family, tmp_path_factory.mktemp("models"), SIZES, ("base", "a", "b"))

    @cache
    def of(name: str, model: int) -> Compiled:
        target = find_target("target", name)
        try:
            compiler = target_compiler(target, model)
        except CompilerMissing as error:
            pytest.skip(str(error))
        settings = {"model": model, "chunk": 1, "compute_dtype": "bfloat16"}
        models = {"base": str(base), "parents": list(map(str, parents))}
        config = config_from(
            Path("config.yaml"), document(family, **models, evaluation=settings, export_dtype="bfloat16"), [], None
        )
        problem = build_problem(Path("config.yaml"), config, target=target)
        plan = make_plan(problem, problem.batched_tasks(), compiler=compiler)
        return Compiled(plan, compiler.programs()[0])

    return of


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
    """Two sums for each layer, and far less than weights; a single device exchanges nothing. TPUs' compiler also cuts
    some matrices anew while it merges them."""
    found = compiled(name, model)
    exchanged = collectives(found.program)
    if model == 1:
        assert not exchanged
        return
    layers = SIZES["num_hidden_layers"]
    sums, _ = exchanged["all-reduce"]
    assert 2 * layers <= sums <= 3 * layers
    assert set(exchanged) == {"all-reduce"} or find_target("target", name).platform == "tpu"
    assert sum(nbytes for _, nbytes in exchanged.values()) < found.plan.bank_bytes / 2


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
