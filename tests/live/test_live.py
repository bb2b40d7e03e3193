"""On a running federation: experiment after experiment, edited code, and errors that come back.

python local/federation.py -- pytest tests/live
"""

import ast
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from experimenter import run  # noqa: E402

TINY = ["rounds=1", "local_epochs=1", "hidden=16"]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Executes the notebook's exported cells and those that run it on the federation; returns its last output."""
    assert "CROWDGUARD_DIRECTOR" in os.environ, "these tests need a federation: see the top of this file"

    def go(old="", new="", show="flflow.history", director=None):
        notebook = run.with_settings(nbformat.read(run.NOTEBOOK, as_version=4), "demo", TINY)
        wanted = ("workspace", "federation")
        notebook.cells = [c for c in notebook.cells if run.exported(c) or any(run.tagged(c, tag) for tag in wanted)]
        assert not old or any(old in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new) if old else cell.source
        notebook.cells.append(nbformat.v4.new_code_cell(show))
        source, output = tmp_path / "source.ipynb", tmp_path / "output.ipynb"
        nbformat.write(notebook, source)
        monkeypatch.setenv("CROWDGUARD_NOTEBOOK", str(source))
        monkeypatch.setenv("CROWDGUARD_RESULTS", str(tmp_path))
        if director:
            monkeypatch.setenv("CROWDGUARD_DIRECTOR", director)
        papermill.execute_notebook(source, output, cwd=ROOT, progress_bar=False)
        return nbformat.read(output, as_version=4).cells[-1].outputs[0]["data"]["text/plain"]

    return go


def test_an_edited_notebook_runs_its_new_code_at_every_envoy(execute):
    losses = "[mine['loss'] for mine in flflow.history[0]['per_participant'].values()]"
    before = execute(show=losses)
    assert "123.25" not in before
    assert execute(old='"loss": loss,', new='"loss": 123.25,', show=losses) == "[123.25, 123.25, 123.25, 123.25]"


def test_an_error_in_the_flow_reaches_the_notebook_and_the_next_experiment_runs(execute):
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        execute(old='"""One line on a row of history."""', new="1 / 0")
    assert execute(show="len(flflow.history)") == "1"


def test_experiments_that_cannot_go_well_say_why_and_the_next_one_runs(execute):
    """One that cannot be loaded at the director, and one in which every participant fails."""
    only_there = "import sys\n\nif 'start.py' in sys.argv[0]:\n    import a_package_that_nobody_has\n"
    with pytest.raises(papermill.PapermillExecutionError, match="the director could not run.*a_package_that_nobody"):
        execute(old="import asyncio\n", new="import asyncio\n" + only_there)
    with pytest.raises(papermill.PapermillExecutionError, match="everybody failed in every round.*ZeroDivisionError"):
        execute(old='"update": memory["update"],', new='"update": 1 / 0,')
    assert execute(show="len(flflow.history)") == "1"


def test_what_travels_is_updates_in_half_precision_and_nobody_gets_its_own_back(execute):
    """Bytes counted where they are serialised, four participants; the envelopes are a few kilobytes."""
    rows = "[(row['step'], row['down'], row['up']) for row in flflow.traffic if row['participant'] != 'aggregator']"
    packed, traffic = ast.literal_eval(execute(show=f"(len(flflow.global_model), {rows})"))
    updates = {"train": (1, 1), "local_validation": (3, 0), "evaluate": (1, 0)}
    assert sorted(step for step, _, _ in traffic) == sorted(list(updates) * 4)
    for step, down, up in traffic:
        for sent, count in zip((down, up), updates[step], strict=True):
            assert abs(sent - count * packed / 2) < 10_000


def test_no_director_is_said_at_once(execute):
    started = time.monotonic()
    with pytest.raises(papermill.PapermillExecutionError, match="no director at localhost:1 .*make run"):
        execute(director="localhost:1")
    assert time.monotonic() - started < 120, "it must not wait for ever"
