"""Notebooks run top to bottom, at smaller settings than they are stored."""

import os
import re
from pathlib import Path

import keras
import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))
SMALL = {"STEPS = 300": "STEPS = 6", "8, 128": "4, 16"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs for c in code)
    assert "KERAS_BACKEND" in code[0].source
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", ())]
    (settings,) = tagged
    for large, small in SMALL.items():
        assert large in settings.source
        settings.source = settings.source.replace(large, small)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": os.fspath(path.parent)}},
    ).execute()
    outputs = [o for c in code for o in c.outputs]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(images) == 1
    printed = "".join(o.get("text", "") for o in outputs)
    found = re.findall(r"validation loss (\d+\.\d+)", printed)
    assert len(found) == 2
    # At the start every byte is as likely as any other: log 256 = 5.5.
    assert all(0 < float(loss) < 5.6 for loss in found)
