"""The notebook of the documentation runs, cell by cell, in a kernel of its own."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/notebooks/quickstart.ipynb"


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook tools themselves; cells run in another process
        nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        client.execute(env=os.environ.copy())
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    drawn = [each for cell in cells for each in cell.outputs if "image/png" in each.get("data", {})]
    assert len(drawn) == 2
    shown = cells[-1].outputs[-1]["data"]
    assert all("small-onnx" in shown[kind] for kind in ("text/plain", "text/html"))


def test_the_notebook_is_stored_without_outputs() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert '"output_type"' not in text
    assert '"execution_count": null' in text
