"""On a running federation: experiment after experiment, edited code, and errors that come back.

python local/federation.py -- pytest tests/live
"""

import ast
import os
import time

import papermill
import pytest

LOSSES = "[mine['loss'] for mine in flflow.history[0]['per_participant'].values()]"
BIASES = "sorted(name for name in load(flflow.global_model) if 'bias' in name)"
TRAFFIC = "[(row['step'], row['down'], row['up']) for row in flflow.traffic if row['participant'] != 'aggregator']"


@pytest.fixture(scope="module")
def unchanged(execute):
    """What a round of the notebook as it is leaves: losses, names of biases, bytes of the model, traffic."""
    return ast.literal_eval(execute(show=f"({LOSSES}, {BIASES}, len(flflow.global_model), {TRAFFIC})"))


def test_errors_reach_the_notebook_and_the_next_experiment_runs(execute, request):
    """In the flow, in a module that the director lacks, and at every participant."""
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        execute({'"""One line on the last row of a history."""': "1 / 0"})
    only_there = "import sys\n\nif 'start.py' in sys.argv[0]:\n    import a_package_that_nobody_has\n"
    with pytest.raises(papermill.PapermillExecutionError, match="the director could not run.*a_package_that_nobody"):
        execute({"import copy\n": "import copy\n" + only_there})
    with pytest.raises(papermill.PapermillExecutionError, match="everybody failed in the last.*ZeroDivisionError"):
        execute({'update=memory["update"],': "update=1 / 0,"})
    assert len(request.getfixturevalue("unchanged")[0]) == 4


def test_an_edited_notebook_runs_its_new_code_at_every_envoy(execute, unchanged):
    assert 123.25 not in unchanged[0]
    net = "nn.Linear(hidden, hidden), relu(),"
    show = f"({LOSSES}, {BIASES}, flflow.history[0]['failed'])"
    changed = execute({"loss=loss,": "loss=123.25,", net: net.replace("relu", "nn.Tanh")}, show)
    assert ast.literal_eval(changed) == ([123.25] * 4, unchanged[1], {})
    _, biases, failed = ast.literal_eval(execute({net: "nn.BatchNorm1d(hidden),"}, show))
    assert biases != unchanged[1] and failed == {}


def test_what_travels_is_updates_in_half_precision_and_nobody_gets_its_own_back(unchanged):
    """Bytes counted where they are serialised, four participants; the envelopes are a few kilobytes."""
    _, _, packed, traffic = unchanged
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
