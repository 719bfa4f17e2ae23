"""Advice of plans: whoever follows a line of it once has a search that fits."""

import re
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.sampling import sample

from evojax_merge.benchmarks.header_models import MISTRAL_7B, problem_for, write_examples, write_models
from evojax_merge.evaluation.targets import find_target
from evojax_merge.report.plan import Plan
from evojax_merge.steps.advice import NOTHING_FITS
from evojax_merge.steps.planning import make_plan

# As many bytes as models of many layers, which take longer to trace: 3 GB, 29 GB and 288 GB a model.
WIDTHS = {"small": (2, 131072), "middle": (4, 294912), "large": (8, 1466368)}
PARENTS = 3
USES = {"likelihood": ("likelihood", "cma_es"), "generation": ("generation", "cma_es"),
        "gradient": ("likelihood", "gradient")}  # fmt: skip
SETTING = re.compile(r"evaluation\.(\w+): (\w+)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def folder(name: str) -> Path:
        layers, width = WIDTHS[name]
        path = tmp_path_factory.mktemp(name)
        write_models(path, MISTRAL_7B | {"num_hidden_layers": layers, "intermediate_size": width}, PARENTS)
        write_examples(path, 20, prompt=20)
        return path

    return folder


def plan_of(folder: Path, use: str, target: str, parents: int = PARENTS, method: str = "task_arithmetic",
            **settings: Any) -> Plan:  # fmt: skip
    mode, strategy = USES[use]
    asked = find_target("target", target)
    problem = problem_for(folder, parents, method, mode, asked, strategy=strategy, **{"bank": "device"} | settings)
    return make_plan(problem, problem.prepare())


def follow(line: str, search: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a search that has followed a line of advice."""
    changed = dict(search)
    for key, value in SETTING.findall(line):
        changed[key] = int(value) if value.isdigit() else value
    if named := re.match(r"--target (\S+)", line):
        changed["target"] = named[1]
    if fewer := re.match(r"(\d+) fewer", line):
        changed["parents"] = PARENTS - int(fewer[1])
    if method := re.search(r"space\.method: (\w+)", line):
        changed["method"] = method[1]
    with monkeypatch.context() as patch:
        if "XLA_PYTHON_CLIENT_MEM_FRACTION" in line:
            patch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        assert changed != search or "FRACTION" in line, line
        return plan_of(**changed)


CASES = [
    *product(["middle"], USES, ["rtx4090", "8xh100", "v5e-8"], ["device"]),
    ("middle", "generation", "rtx4090", "host"), ("small", "gradient", "v5e-1", "device"),
    ("large", "generation", "8xh100", "host"), ("large", "likelihood", "2x8xh100", "device"),
    ("large", "generation", "v5p-16", "device"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "use", "target", "bank"), sample(CASES, 2))
def test_following_each_advice_once_makes_a_search_fit(
    name: str, use: str, target: str, bank: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"folder": models(name), "use": use, "target": target, "bank": bank}
    plan = plan_of(**search)
    assert not plan.fits and plan.advice
    for line in plan.advice:
        if line != NOTHING_FITS:
            assert follow(line, search, monkeypatch).fits, line
    # What costs no other device stands first.
    is_target = [line.startswith("--target") for line in plan.advice]
    assert is_target == sorted(is_target)


def test_a_method_with_a_number_for_each_entry_is_told_which_has_none(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"folder": models("small"), "use": "likelihood", "target": "l40s", "method": "della"}
    plan = plan_of(**search)
    (line,) = [line for line in plan.advice if "space.method" in line]
    assert not plan.fits and follow(line, search, monkeypatch).fits


def test_where_nothing_fits_that_is_said(tmp_path: Path) -> None:
    write_models(tmp_path, MISTRAL_7B | {"num_hidden_layers": 1, "intermediate_size": 2**27}, 2)
    write_examples(tmp_path, 10, prompt=5)
    plan = plan_of(tmp_path, "generation", "rtx4090", parents=2)
    assert plan.advice == (NOTHING_FITS,) and "nothing that was planned" in plan.what_would_fit()
