"""What the compilers of targets that are not here make of a search's passes. `make test-targets` installs them."""

from pathlib import Path

import pytest
from helpers import Family
from test_planning import document

from evojax_merge.evaluation.compilers import collectives, target_compiler
from evojax_merge.evaluation.targets import find_target
from evojax_merge.planning import make_plan
from evojax_merge.problem import build_problem, config_from

pytest.importorskip("libtpu")


@pytest.mark.parametrize(("name", "model"), [("v5e-1", 1), ("v5e-4", 4)])
def test_scoring_passes_compile_for_a_tpu(family: Family, name: str, model: int) -> None:
    """With its memory reported; devices that share a candidate exchange something, and a single one nothing."""
    target = find_target("target", name)
    settings = {"model": model, "chunk": 1, "compute_dtype": "bfloat16"}
    config = config_from(Path("config.yaml"), document(family, evaluation=settings, export_dtype="bfloat16"), [], None)
    problem = build_problem(Path("config.yaml"), config, target=target)
    compiler = target_compiler(target, model)
    plan = make_plan(problem, problem.batched_tasks(), compiler=compiler)
    assert plan.fits and all(row.reported_bytes is not None for row in plan.passes)
    for program in compiler.programs():
        assert bool(collectives(program)) == (model > 1)
