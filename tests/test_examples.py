"""Every example runs as it is, in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE_FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(EXAMPLE_FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_notebook_runs(tmp_path: Path) -> None:
    (notebook,) = EXAMPLE_FOLDER.glob("*.ipynb")
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for name, few in (("steps = Net(), [], 2000", "steps = Net(), [], 20"), ("8192", "64"), ("16_384", "512")):
        assert name in code
        code = code.replace(name, few)
    (tmp_path / "cells.py").write_text("import matplotlib\nmatplotlib.use('Agg')\n" + code)
    result = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "sliced Wasserstein distance" in result.stdout


def test_notebook_was_executed() -> None:
    (notebook,) = EXAMPLE_FOLDER.glob("*.ipynb")
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
