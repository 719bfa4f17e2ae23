"""bench/accelerators/device.py: its tables, what it leaves out, and the section of a README that it writes."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import sample, thorough
from merge_kernels import tabulate

from evojax_merge.evaluation.targets import Target, live_target

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.accelerators import device
from bench.shared import machine

# As they are measured: what needs the stored model comes before the bank takes its place.
ROWS = ["slerp", "prompts: 3", "a stored model", "TIES, merged inside the pass", "TIES, CMA-ES, by likelihood"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"METHODS": ("slerp",), "CPU_ENTRIES": 2**12, "CANDIDATES": 2, "REPEATS": 1, "PROMPTS": (3,)}
    for name, value in (sizes | {"CPU_NEW_TOKENS": 3, "CPU_EXAMPLES": 2, "POPULATION": 4, "GENERATIONS": 2}).items():
        monkeypatch.setattr(device, name, value)
    monkeypatch.setattr(machine, "CPU_PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(machine, "CPU_COPY_BYTES", 2**16)


class Only(device.Budget):
    """Measures one row, and leaves out the others."""

    def __init__(self, name: str) -> None:
        super().__init__(3600.0)
        self.name = name

    def row(self, name: str, measure: Callable[[], Sequence[str]]) -> list[list[str]]:
        if name == self.name:
            return super().row(name, measure)
        self.left_out.append(name)
        return []


def cpu() -> Target:
    return replace(live_target(), devices=1)


@pytest.mark.parametrize("name", sample(ROWS, 1))
def test_a_row_is_measured(name: str, small: None) -> None:
    section = device.measure(cpu(), "tiny", Only(name))
    lines = [line for line in section.splitlines() if line[:1] == "|"]
    heads, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert len(row) == len(heads) and row[0] == name
    figures = [float(re.sub("[,%]", "", cell).rpartition("x")[2]) for cell in row[1:]]
    assert all(np.isfinite(figures)) and min(figures) >= 0 and figures[0] > 0
    said = " ".join(section.split())
    assert f"Left out: {'; '.join(one for one in ROWS if one != name)}." in said
    assert "of the shape tiny, 0 M parameters in float32" in said


def test_the_section_of_a_device_replaces_its_older_one(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No time is left for any row, and so there is no table."""
    readme, heading = tmp_path / "README.md", f"## On {machine.device_name()}"
    for before, behind in (("", ""), (f"{heading}\n\nolder\n\n## On another\n\nkept\n", "\n## On another\n\nkept\n")):
        readme.write_text(f"# Benchmarks\n\n{before}")
        monkeypatch.setattr(sys, "argv", ["device.py", "--shape", "tiny", "--append", str(readme), "--seconds", "0"])
        device.main()
        shown = capsys.readouterr().out.strip()
        assert shown.startswith(heading) and shown.endswith("TIES, CMA-ES, by likelihood.") and "|" not in shown
        assert readme.read_text() == f"# Benchmarks\n\n{shown}\n{behind}"


def test_a_row_that_does_not_fit_is_named() -> None:
    budget = device.Budget(60.0)

    def exhausted() -> list[str]:
        raise MemoryError

    assert budget.row("one", lambda: ["1"]) == [["one", "1"]] and budget.row("two", exhausted) == []
    budget.longest = 61.0
    assert budget.row("three", lambda: ["3"]) == [] and budget.left_out == ["two (out of memory)", "three"]


@thorough
def test_a_random_bank_is_measured_as_its_weights_are(small: None, tmp_path: Path) -> None:
    _, problem = device.open_problem(tmp_path, cpu(), "tiny")
    bank, spec, models = device.random_bank(problem), problem.backend.candidates.spec, problem.backend.models
    assert jax.tree.structure(bank) == jax.tree.structure(device.abstract_bank(models.sources, models.decoder, spec))
    (stack,) = bank.stacks
    gate = bank.stacks[stack]["gate"]
    leaf, tables = gate.sources, gate.statistics
    assert leaf.shape[:2] == (2, 3) and not np.array_equal(leaf[0], leaf[1])
    measured = tabulate(spec.method, spec.options, list(np.asarray(leaf[1])), spec.prepared_for(2), lambda k: leaf)
    assert set(measured.statistics) == set(tables)
    for name, rows in measured.statistics.items():
        middle = rows[:, 100:900]
        np.testing.assert_allclose(np.asarray(tables[name])[1][:, 100:900], middle, rtol=0.15, err_msg=name)
    deltas = np.asarray(leaf[:, 1:] - leaf[:, :1])
    assert deltas.std() == pytest.approx(device.STEP, rel=0.05)
