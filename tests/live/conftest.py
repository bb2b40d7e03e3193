"""Federations to test on, and the notebook's cells that run on them."""

import os
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "local")]

from experimenter import run  # noqa: E402


@pytest.fixture(scope="session")
def execute(tmp_path_factory):
    """Executes the notebook's exported cells and those that run it on a federation; returns its last output.

    `changes` are pieces of the notebook and what stands there instead. The federation is the one that
    `local/federation.py` has started this with, or the one of `environment`.
    """

    def go(changes=None, show="flflow.history", environment=None, settings=("rounds=1", "local_epochs=1", "hidden=16")):
        environment = environment or os.environ
        assert "CROWDGUARD_DIRECTOR" in environment, (
            "this test needs a federation: python local/federation.py -- pytest"
        )
        notebook = run.with_settings(nbformat.read(run.NOTEBOOK, as_version=4), "demo", list(settings))
        wanted = ("workspace", "federation")
        notebook.cells = [c for c in notebook.cells if run.exported(c) or any(run.tagged(c, tag) for tag in wanted)]
        for old, new in (changes or {}).items():
            assert any(old in cell.source for cell in notebook.cells), old
            for cell in notebook.cells:
                cell.source = cell.source.replace(old, new)
        notebook.cells.append(nbformat.v4.new_code_cell(show))
        folder = tmp_path_factory.mktemp("executed")
        source, output = folder / "source.ipynb", folder / "output.ipynb"
        nbformat.write(notebook, source)
        places = {key: value for key, value in environment.items() if key.startswith("CROWDGUARD_")}
        places |= {"CROWDGUARD_NOTEBOOK": str(source), "CROWDGUARD_RESULTS": str(folder)}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in places.items():
                patch.setenv(key, value)
            papermill.execute_notebook(source, output, cwd=ROOT, progress_bar=False)
        return nbformat.read(output, as_version=4).cells[-1].outputs[0]["data"]["text/plain"]

    return go
