"""`evojax-merge bench`: its rows on small models, what it leaves out, its JSON, and comparisons."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.commands import command, refusal, run_here
from helpers.files import read_json, write_json
from helpers.sampling import sample, thorough
from merge_kernels import tabulate

from evojax_merge.benchmarks import device, references
from evojax_merge.benchmarks.device import Budget, Measurement, Sizes
from evojax_merge.checkpoints.abstract_bank import abstract_bank
from evojax_merge.errors import Failed, InputError
from evojax_merge.evaluation.targets import Target, live_target

SMALL = Sizes(
    ("tiny",), entries=2**12, new_tokens=3, examples=2, candidates=2, passes=2, prompts=(3,), population=4,
    generations=2, repeats=1,
)  # fmt: skip
# The order in which they are measured: what needs the stored model comes before the bank takes its place.
ROWS = [*device.SEARCHES, device.MERGED, device.STORED, "3 prompts", "slerp"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evojax_merge.commands.bench.CPU", SMALL)
    monkeypatch.setattr(device, "METHODS", ("slerp",))
    monkeypatch.setattr(references, "CPU_PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(references, "CPU_COPY_BYTES", 2**16)


class Only(Budget):
    """Measures some rows, and leaves out the others."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(3600.0, lambda name: None)
        self.names = names

    def row(self, name: str, measure: Callable[[], Measurement]) -> list[Measurement]:
        if name in self.names:
            return super().row(name, measure)
        self.left_out.append(name)
        return []


def cpu() -> Target:
    return replace(live_target(), devices=1)


@pytest.mark.parametrize("name", sample(ROWS, 1))
def test_a_row_is_measured(name: str, small: None) -> None:
    benchmark = device.measure(cpu(), SMALL, Only([name]))
    (row,) = benchmark.rows
    assert row.name == name and row.workload
    assert all(np.isfinite(value) and value > 0 for value in row.figures.values())
    assert benchmark.left_out == [other for other in ROWS if other != name]
    assert (benchmark.shape, benchmark.dtype) == ("tiny", "float32") and benchmark.matrix_peak > 0


def test_the_command_writes_and_compares(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of two runs of the kernels, and the rows that no time was left for."""
    monkeypatch.setattr("evojax_merge.commands.bench.Budget", lambda seconds, announce: Only(["slerp"]))
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    out = run_here("bench", "--json", first).stdout
    assert "## On " in out and "| slerp | 2 |" in out and f"Left out: {'; '.join(ROWS[:-1])}." in " ".join(out.split())
    document = read_json(first)
    assert {"versions", "driver", "processor", "devices"} <= document["environment"].keys()
    # As if the earlier device had been half as fast, with an older driver, and had merged another tensor by TIES.
    (row,) = document["rows"]
    row["figures"]["M parameters/s"] /= 2
    document["environment"]["driver"] = "older"
    write_json(first, document)
    out = run_here("bench", "--json", second, "--compare", first).stdout
    assert "| slerp | M parameters/s |" in out and "- driver: older then, " in out
    row["workload"] = "another tensor"
    assert command("bench", "--compare", write_json(first, document)) == 0
    assert "Not compared: slerp (another tensor then, 2 candidates of" in " ".join(capsys.readouterr().out.split())


def test_wrong_options(tmp_path: Path, small: None) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"rows": []}')
    for arguments, message in (
        (("--shape", "8B"), "--shape: there is no shape '8B'"),
        (("--json", mine), "--json: exists, and holds no benchmark"),
        (("--compare", mine), "--compare: holds no benchmark; expected a file of `evojax-merge bench --json`"),
        (("--compare", tmp_path / "none.json"), "--compare: No such file or directory; expected a file of"),
    ):
        err = refusal("bench", *arguments)
        assert message in err
    assert mine.read_text() == '{"rows": []}'


def test_models_that_do_not_fit_are_refused_by_shape(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--shape tiny: does not fit"):
        device.open_problem(tmp_path, replace(cpu(), memory=1), SMALL)


def test_a_row_that_does_not_fit_is_named() -> None:
    row, announced = Measurement("merging", "one", "", {}), list[str]()
    budget = Budget(60.0, announced.append)

    def exhausted() -> Measurement:
        raise MemoryError

    def failing() -> Measurement:
        raise Failed("not finite")

    assert budget.row("one", lambda: row) == [row] and budget.row("two", exhausted) == budget.row("three", failing)
    budget.longest = 61.0
    assert budget.row("four", lambda: row) == [] and announced == ["one", "two", "three", "four"]
    assert budget.left_out == ["two (out of memory)", "three (not finite)", "four (no time is left)"]


def test_references_stop_when_they_have_taken_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(references.time, "perf_counter", lambda: next(clock))
    runs: list[int] = []
    assert references.median_seconds(lambda: runs.append(1), 5, enough=2.0) == 1.0
    assert len(runs) == 3


@thorough
def test_a_random_bank_is_measured_as_its_weights_are(small: None, tmp_path: Path) -> None:
    _, problem = device.open_problem(tmp_path, cpu(), SMALL)
    bank, spec, models = device.random_bank(problem), problem.backend.candidates.spec, problem.backend.models
    assert jax.tree.structure(bank) == jax.tree.structure(abstract_bank(models.sources, models.decoder, spec))
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
