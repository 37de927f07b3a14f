"""The notebooks run from top to bottom."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

SHORTER = """
NAME = "notebook"
NUM_TRIALS = 2
config = biggan.presets.laptop().override(
    {"dataset": "digits", "total_kimg": 1, "eval.every_kimg": 0.5, "eval.num_samples": 64}
)
"""


def execute(name, parameters=None):
    """A notebook, executed where it lies; fails with what its cell raised."""
    path = ROOT / "notebooks" / name
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = parameters
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    return notebook


def outputs(notebook, kind):
    """All outputs of a media type, in order."""
    return [
        output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


def printed(notebook):
    return "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )


def test_the_sweep(digits):
    notebook = execute("sweep.ipynb", SHORTER)
    assert len(outputs(notebook, "image/png")) == 3  # Two plots and a sheet.
    assert "optim.lr_g" in outputs(notebook, "text/html")[-2]  # The table of trials.
    assert "of the full grid's training" in printed(notebook)
    assert "notebook v1 the first version" in printed(notebook)


@pytest.mark.usefixtures("tiny_model")
def test_calling_the_endpoint(endpoint, monkeypatch):
    monkeypatch.setenv("BIGGAN_URL", endpoint)
    notebook = execute("endpoint.ipynb")
    assert len(outputs(notebook, "image/png")) == 6
    assert "tiny@v1: 16 pixels, 10 classes" in printed(notebook)
    assert "(160, 16, 16, 1)" in outputs(notebook, "text/plain")[5]
    assert "422" in printed(notebook)
