"""Judged rounds of real CIFAR-10 and the votes on them (benchmarks/pin_votes.py): a change here changes no vote.

Whoever changes a rule on purpose makes the file anew, and says in results.md what it does.
"""

import numpy as np
import pytest
from conftest import ROOT

FILE = np.load(ROOT / "tests" / "votes.npz")
ROUNDS = sorted({int(key.split("/")[0]) for key in FILE})
KINDS = {"norms": {"norms"}, "effects": {"effects"}, "kinship": {"kinship", "lasting"}}


@pytest.fixture(params=ROUNDS)
def pinned(request, experiment):
    """What a validator has seen in a round, and the votes on it by name."""
    values = {key.split("/")[1]: FILE[key] for key in FILE if key.startswith(f"{request.param}/")}
    layers = [values[name].astype(float) for name in sorted(values) if name.startswith("direction ")]
    wide = {name: values[name].astype(float) for name in ("distances", "logits", "lengths")}
    seen = experiment.Seen(**wide, labels=values["labels"], directions=layers)
    return seen, {name.removeprefix("by "): set(votes.tolist()) for name, votes in values.items() if name[:3] == "by "}


def default_view(experiment, seen):
    wanted = [experiment.METRICS.index(metric) for metric in experiment.LOOKS_AT["crowd"]]
    return seen._replace(distances=seen.distances[wanted])


def test_the_votes_by_both_rules(experiment, pinned):
    seen, votes = pinned
    assert experiment.vote(default_view(experiment, seen), 0) == votes["crowd"]
    assert experiment.vote(seen, 0, "paper") == votes["paper"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_votes_by_one_kind_of_evidence(experiment, pinned, kind):
    seen, votes = pinned
    evidence, neutral = experiment.evidence(default_view(experiment, seen), 0), experiment.no_evidence(10)
    others = set().union(*KINDS.values()) - KINDS[kind]
    alone = evidence._replace(**{other: getattr(neutral, other) for other in others})
    assert experiment.flagged(alone, 0) == votes[f"{kind} alone"]


def test_the_rounds_exercise_every_answer():
    votes = [FILE[key] for key in FILE if key.endswith("/by crowd")]
    assert len(votes) == len(ROUNDS) == 16
    assert {0, 2, 4} <= {len(found) for found in votes}
    assert any(len(FILE[key]) for key in FILE if key.endswith("/by norms alone"))
    assert any(len(FILE[key]) for key in FILE if key.endswith("/by paper"))
