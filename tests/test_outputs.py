"""The outputs that are committed with the notebook: of this code, and free of what is only this machine's."""

import json
import re

import nbformat
import pytest
from conftest import ROOT

from experimenter.outputs import code_hash, lasting, transplant

PATH = ROOT / "FederatedCrowdGuard.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_they_are_of_this_code(notebook):
    assert notebook.metadata.get("outputs_of") == code_hash(notebook), "outputs are stale: make notebook"


def test_they_hold_no_errors_counts_colours_or_paths(notebook, outputs):
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    words = json.dumps(
        [
            {**output, "data": {k: v for k, v in output.get("data", {}).items() if k != "image/png"}}
            for output in outputs
        ]
    )
    assert "\\u001b" not in words
    assert not re.search(r"[\"' (](/(root|home|tmp|work|Users|mnt)/)", words)


def test_every_figure_is_there_with_its_alternative_text(outputs):
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 8
    assert all(figure.metadata["image/png"]["alt"] for figure in figures)


def test_the_file_is_small():
    assert PATH.stat().st_size < 600_000


def test_what_is_fleeting_is_left_out():
    text = 'Aggregator step "end" registered\n\nrehearsing (10 s)\nround 1 done: main 35.0%\n/tmp/x: warning\n'
    kept = lasting(nbformat.v4.new_output("stream", text=text, name="stdout"))
    assert kept.text == "round 1 done: main 35.0%\n"
    assert lasting(nbformat.v4.new_output("stream", text="warning\n", name="stderr")) is None
    figure = nbformat.v4.new_output("display_data", data={"text/plain": "<Figure>", "image/png": "abc"})
    assert lasting(figure).data == {"image/png": "abc"}


def test_outputs_of_other_cells_are_refused():
    one, other = (nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]) for code in ("1", "2"))
    with pytest.raises(SystemExit, match="other cells"):
        transplant(one, other)
