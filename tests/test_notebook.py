"""The notebook of the documentation: it runs as it stands, on tiny models, and what it shows is stored in it."""

import re
from pathlib import Path

import nbformat
import pytest
from helpers.families import Family, stand_in_for_the_zoo
from helpers.sampling import thorough
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
# The notebook's sizes, and those of the test.
SMALLER = {"study.run(40)": "study.run(2)", '"population": 16': '"population": 4'}


@thorough
def test_the_notebook_runs(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_the_zoo(tmp_path / "cache", family)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells)
    for size, smaller in SMALLER.items():
        assert size in text
        for cell in notebook.cells:
            cell.source = cell.source.replace(size, smaller)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    searched = next(cell for cell in code if "study.run" in cell.source)
    # One line, the latest generation's, and nothing of the commands' output but warnings: both splits are one file.
    *warnings, line = searched.outputs
    assert line.output_type == "display_data" and line.data["text/plain"].startswith("generation 2/2  best ")
    assert all(output.name == "stderr" and "Warning" in output.text for output in warnings)
    kinds = [set(output.get("data", {})) for cell in code for output in cell.outputs]
    assert sum("text/html" in kind for kind in kinds) >= 4 and {"image/png", "text/plain"} in kinds
    assert (tmp_path / "out/notebook/model.safetensors").is_file()
    assert (tmp_path / "runs/notebook/report.html").is_file()


def test_the_stored_notebook_shows_what_its_cells_do() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run: python docs/notebook.py"
    for cell in code:
        assert not any(output.output_type in ("error", "stream") and output.get("name") != "stdout"
                       for output in cell.outputs)  # fmt: skip
    shown = [
        str(output.get("text", output.get("data", {}).get("text/plain"))) for cell in code for output in cell.outputs
    ]
    assert any(text.startswith("generation 40/40") for text in shown)
    # The winner's share of right answers is above those of its parents.
    right = [float(share) for share in re.findall(r"([\d.]+)% right", shown[-1])]
    assert len(right) == 3 and right[0] > max(right[1:])
    assert not re.search(r"/(root|home|tmp)/|https?://", "\n".join(shown))
