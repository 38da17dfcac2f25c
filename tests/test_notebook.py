"""The notebook runs from top to bottom, as its reader runs it."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


@pytest.fixture
def kernel(tmp_path):
    """A kernel of this interpreter, described here; other kernels on this machine are not looked for."""
    home = tmp_path / "kernels" / "python3"
    home.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (home / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    found = KernelSpecManager(kernel_dirs=[str(home.parent)], ensure_native_kernel=False)
    manager = KernelManager(
        kernel_name="python3", kernel_spec_manager=found, connection_file=str(tmp_path / "link.json")
    )
    yield manager
    if manager.has_kernel:
        manager.shutdown_kernel(now=True)
    assert not manager.has_kernel


def outputs(notebook, kind):
    """Return the outputs of one kind, such as "text/html", of all cells."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in found if kind in output.get("data", {})]


def test_the_notebook_is_kept_without_outputs():
    """Catches: results of some machine's run in the repository, with its paths and pictures."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 4
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


def test_the_notebook_runs_and_ends_with_what_was_learned(tmp_path, kernel):
    """Catches: a cell that fails, or shows nothing of what it says; a federation that learns nothing."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    client = NotebookClient(notebook, timeout=900, km=kernel, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment, cleanup_kc=True)  # it ends the kernel, and closes what it opened
    run, metrics = outputs(notebook, "text/html")
    assert "<td>recall_at_1</td>" in run
    assert "<th>eval_recall_at_1</th>" in metrics
    assert len(outputs(notebook, "image/png")) == 1
    assert outputs(notebook, "text/plain")[-1] == "'the delivery came too late'"
    rounds = [json.loads(line) for line in (folder / "runs" / "jargon" / "metrics.jsonl").read_text().splitlines()]
    learned = [line["eval"]["recall_at_1"] for line in rounds]
    assert max(learned) > learned[0] + 0.3
    assert (folder / "runs" / "jargon" / "adapter" / "adapter_model.safetensors").is_file()
