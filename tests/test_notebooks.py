"""The notebooks run as they are, cell after cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(notebook: Path) -> dict[str, Any]:
    """Execute the code cells in order in one namespace, and return it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{notebook.name}[{cell['id']}]", "exec"), namespace)
    return namespace


def test_quickstart_ends_with_equality(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    matplotlib.use("Agg")
    namespace = run(NOTEBOOKS / "quickstart.ipynb")
    import matplotlib.pyplot as plt

    plt.close("all")
    assert namespace["equal"] is True
    assert namespace["resident"].std() > 0.05
    assert "transformer" in capsys.readouterr().out


def test_notebooks_are_saved_without_outputs():
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        content = json.loads(notebook.read_text())
        assert content["nbformat"] == 4
        assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
        for cell in content["cells"]:
            assert not cell.get("outputs"), f"{notebook.name}: {cell['id']}"
