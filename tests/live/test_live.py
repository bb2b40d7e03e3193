"""On a running federation: experiment after experiment, edited code, and errors that come back.

python local/federation.py -- pytest tests/live
"""

import ast
import os
import time

import papermill
import pytest


def test_an_edited_notebook_runs_its_new_code_at_every_envoy(execute):
    losses = "[mine['loss'] for mine in flflow.history[0]['per_participant'].values()]"
    before = execute(show=losses)
    assert "123.25" not in before
    assert execute(old="loss=loss,", new="loss=123.25,", show=losses) == "[123.25, 123.25, 123.25, 123.25]"


def test_a_net_that_is_changed_in_between_is_trained_at_every_envoy(execute):
    names = "sorted(n for n in load(flflow.global_model) if 'bias' in n), flflow.history[0]['failed']"
    before = execute(show=names)
    changed = execute(old="nn.Linear(hidden, hidden), relu(),", new="nn.Linear(hidden, hidden), nn.Tanh(),", show=names)
    added = execute(old="nn.Linear(hidden, hidden), relu(),", new="nn.BatchNorm1d(hidden),", show=names)
    assert before == changed != added and added.endswith("{})")


def test_an_error_in_the_flow_reaches_the_notebook_and_the_next_experiment_runs(execute):
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        execute(old='"""One line on a row of history."""', new="1 / 0")
    assert execute(show="len(flflow.history)") == "1"


def test_experiments_that_cannot_go_well_say_why_and_the_next_one_runs(execute):
    """One that cannot be loaded at the director, and one in which every participant fails."""
    only_there = "import sys\n\nif 'start.py' in sys.argv[0]:\n    import a_package_that_nobody_has\n"
    with pytest.raises(papermill.PapermillExecutionError, match="the director could not run.*a_package_that_nobody"):
        execute(old="import copy\n", new="import copy\n" + only_there)
    with pytest.raises(papermill.PapermillExecutionError, match="everybody failed in every round.*ZeroDivisionError"):
        execute(old='update=memory["update"],', new="update=1 / 0,")
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
    with pytest.raises(
        papermill.PapermillExecutionError, match="no director: nobody answers at localhost:1 .*make run"
    ):
        execute(environment=os.environ | {"CROWDGUARD_DIRECTOR": "localhost:1"})
    assert time.monotonic() - started < 120, "it must not wait for ever"
