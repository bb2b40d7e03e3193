"""The server's side: who decides when voters err, collude, are few, or send nonsense."""

from itertools import combinations_with_replacement, permutations, product

import numpy as np
import pytest


@pytest.mark.parametrize("rule", ["crowd", "paper"])
@pytest.mark.parametrize(
    ("votes", "accepted"),
    [
        ([[1]], [True]),
        ([[0]], [False]),
        ([[1, 1], [1, 1]], [True, True]),
        ([[1, 0], [0, 1]], [False, False]),
        ([[1, 0], [1, 1]], [True, False]),
        ([[1, 1, 0]] * 3, [True, True, False]),
        ([[1, 1, 0]] * 2 + [[0, 0, 1]], [True, True, False]),
        ([[0, 0, 0]] * 3, [False, False, False]),
        ([[1] * 5] * 5, [True] * 5),
    ],
)
def test_few_voters_and_unanimous_ones(experiment, votes, accepted, rule):
    assert experiment.stacked_clustering(votes, rule).tolist() == accepted


def rogue_patterns(models: int, rogues: int):
    """All votes `(rogues, models)` of a coalition against voters who trust the first models and not the last `rogues`.

    Models on the same side are interchangeable, and so are the rogues: one order of columns and rows is enough.
    """
    columns = [*product((0, 1), repeat=rogues)]

    def reordered(sides, order):
        return [sorted(tuple(column[row] for row in order) for column in side) for side in sides]

    for trusted in combinations_with_replacement(columns, models - rogues):
        for others in combinations_with_replacement(columns, rogues):
            sides = [[*trusted], [*others]]
            if all(sides <= reordered(sides, order) for order in permutations(range(rogues))):
                yield np.array(trusted + others).T


@pytest.mark.slow
@pytest.mark.parametrize(("models", "rogues"), [(3, 1), (4, 1), (5, 1), (5, 2), (6, 1), (6, 2), (7, 1), (7, 2), (7, 3)])
def test_no_coalition_below_half_decides(experiment, models, rogues):
    honest = np.tile([1] * (models - rogues) + [0] * rogues, (models - rogues, 1))
    expected = honest[0].astype(bool)
    for pattern in rogue_patterns(models, rogues):
        assert (experiment.stacked_clustering(np.vstack([honest, pattern])) == expected).all(), pattern


@pytest.mark.parametrize(("groups", "rogues"), [((2, 1), 2), ((2, 2), 3), ((3, 2), 4), ((2, 2, 1), 4), ((3, 3), 4)])
def test_what_honest_voters_agree_on_stands_if_they_differ_by_one_model_each(experiment, rng, groups, rogues):
    """However the coalition votes; the published stage gives way to most of these."""
    models, agreed = sum(groups) + rogues, len(groups) - 1
    honest = np.repeat([[1] * (models - rogues) + [0] * rogues] * len(groups), groups, axis=0)
    for group in range(1, len(groups)):  # whose ballots differ from the first group's in one model
        honest[sum(groups[:group]) : sum(groups[: group + 1]), group - 1] ^= 1
    near = [np.eye(models, dtype=int)[m] ^ ballot for m in range(models) for ballot in np.unique(honest, axis=0)]
    blocks = [[ballot] * rogues for ballot in near] + [rng.integers(0, 2, (rogues, models)) for _ in range(300)]
    blocks += [[near[i] for i in rng.integers(0, len(near), rogues)] for _ in range(300)]
    for block in blocks:
        verdict = experiment.stacked_clustering(np.vstack([honest, block]))
        np.testing.assert_array_equal(verdict[agreed:], honest[0, agreed:] > 0, str(block))


def erring_rounds(rule, stacked_clustering, rounds: int, error: float, participants=20, colluding=9):
    """Share of rounds in which an attacker gets in, and share of honest models accepted."""
    rng, honest = np.random.default_rng(0), participants - colluding
    truth = np.repeat([1, 0], [honest, colluding])
    let_in, accepted = 0, 0.0
    for _ in range(rounds):
        ballots = truth ^ (rng.random((honest, participants)) < error)
        np.fill_diagonal(ballots, 1)  # nobody accuses its own model
        verdict = stacked_clustering(np.vstack([ballots, np.tile(1 - truth, (colluding, 1))]), rule)
        let_in += verdict[honest:].any()
        accepted += verdict[:honest].mean()
    return let_in / rounds, accepted / rounds


def test_honest_voters_may_err(experiment):
    """20 voters, 9 colluding, every tenth honest vote wrong."""
    let_in, accepted = erring_rounds("crowd", experiment.stacked_clustering, rounds=2000, error=0.1)
    assert let_in <= 0.01
    assert accepted >= 0.99


def test_the_published_second_stage_lets_a_coalition_in_when_honest_voters_err(experiment):
    let_in = {
        rule: erring_rounds(rule, experiment.stacked_clustering, rounds=1000, error=0.1)[0]
        for rule in ("crowd", "paper")
    }
    assert let_in["paper"] > 5 * let_in["crowd"]


@pytest.mark.parametrize("votes", [None, {}, {"A": 1}, {"A": 1, "B": 1, "C": 1, "D": 1}])
def test_malformed_ballots_are_left_out_and_reported(experiment, votes):
    models, good = ["A", "B", "C"], experiment.Report(votes={"A": 1, "B": 1, "C": 0})
    reports = {"A": good, "B": good, "C": experiment.Report(votes=votes)}
    ballots, failed = experiment.usable_ballots(reports, models)
    assert ballots.keys() == {"A", "B"} and "votes" in failed["C"]
    assert experiment.count_votes(ballots, models) == ["A", "B"]


@pytest.mark.parametrize(
    ("voted_for", "rule", "accepted"),
    [("E", "crowd", []), ("AE", "crowd", []), ("ABE", "crowd", ["A", "B", "E"]), ("E", "paper", ["E"])],
)
def test_whoever_votes_alone_does_not_take_the_model_over(experiment, caplog, voted_for, rule, accepted):
    """Of few validators who are drawn, most may be attackers; honest ones leave more than half."""
    ballots = {"E": {name: int(name in voted_for) for name in "ABCE"}}
    assert experiment.count_votes(ballots, [*"ABCE"], rule) == accepted
    assert ("half of the models or more are voted out" in caplog.text) is (not accepted)


def test_nobody_is_trusted_and_the_global_model_stays(experiment):
    reference = experiment.initial_model(experiment.demo).state_dict()
    ballots = {"A": {"A": 0, "B": 0}, "B": {"A": 0, "B": 0}}
    accepted = experiment.count_votes(ballots, ["A", "B"])
    assert accepted == []
    assert experiment.next_global_model(reference, {}, accepted, experiment.demo) is reference
