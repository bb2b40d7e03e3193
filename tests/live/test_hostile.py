"""One participant of four is hostile, with a valid certificate: it costs itself alone.

    pytest tests/live/test_hostile.py

starts a federation of its own.
"""

import ast
import re
from pathlib import Path

import pytest
from federation import Federation
from hostile import PAYLOADS

HONEST = ["Amsterdam", "Bangalore", "Chandler"]


class WithOneHostile(Federation):
    """A federation in which Detroit's envoy is another program."""

    def spawn(self, name, command):
        if name == "Detroit":
            command = [Path(__file__).with_name("hostile.py"), *command[1:]]
        super().spawn(name, command)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    mark = tmp_path_factory.mktemp("mark") / "code has run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTILE_MARK", str(mark))
        with WithOneHostile(4, 0, [(["data", "train_samples"], 60), (["data", "test_samples"], 40)]) as started:
            started.mark = mark
            yield started


def test_a_hostile_participant_costs_itself_alone(execute, federation):
    """Every payload in a round of its own, and at the end a round in which it behaves."""
    settings = [
        f"rounds={len(PAYLOADS) + 1}",
        "local_epochs=1",
        "hidden=8",
        "width=2",
        "participant_timeout=15",
    ]
    history = ast.literal_eval(execute(environment=federation.environment, settings=settings))
    assert len(history) == len(PAYLOADS) + 1
    for row, (step, reason, _) in zip(history, PAYLOADS, strict=False):
        where = f"round {row['round']}: {step}, {reason}: {row['failed']}"
        assert row["failed"].keys() == ({"Detroit"} if reason else set()), where
        assert not reason or re.search(reason, row["failed"]["Detroit"]), where
        assert set(HONEST) <= row["votes"].keys(), f"the vote was skipped: {where}"
        assert all(row["votes"][voter].keys() >= set(HONEST) for voter in HONEST), where
        assert all(row["per_participant"][name]["main_accuracy"] is not None for name in HONEST), where
        assert ("Detroit" not in row["accepted"]) >= (step == "train" and reason is not None), where
    assert history[-1]["failed"] == {} and set(history[-1]["votes"]) == {*HONEST, "Detroit"}, "it is back"
    boasts = [row for row, (_, _, send) in zip(history, PAYLOADS, strict=False) if row["round"] == 18]
    others = [boasts[0]["per_participant"][name]["main_accuracy"] for name in HONEST]
    assert boasts[0]["main_accuracy"] <= sum(others) / 5 + 2 / 5 + 1e-9, "at most twice an honest participant's weight"
    assert not federation.mark.exists(), "its code has run somewhere"
