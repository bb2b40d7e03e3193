"""The benchmarks: who plays which role, and that they go on where they stopped."""

import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def detection():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import detection

    return detection


def test_attackers_are_fewer_than_half_and_no_setting_comes_twice(detection):
    for part in detection.PARTS.values():
        settings = part()
        assert len(settings) == len(set(settings))
        for setting in settings:
            assert 2 * len(setting.malicious) < setting.crowd.participants
            for role in setting.roles:
                assert bool(role.pdr) == (role.participant in setting.malicious)


def test_what_colluders_send_together_is_looked_at_anew_in_every_setting(detection, monkeypatch):
    """Two colluders send something else than the same two among four do; what honest participants send stays."""
    inspected, looked = object.__new__(detection.Inspected), []
    inspected.views = {}

    def look(_, states):
        looked.extend(states)
        return View(np.array(states))

    monkeypatch.setattr(inspected, "look", look)
    monkeypatch.setattr(detection.experiment, "joined", lambda views: [int(view.states[0]) for view in views])
    alone, two, four = (detection.Setting(attackers=k, evasion=e) for k, e in ((2, ""), (2, "noisy"), (4, "noisy")))
    assert inspected.seen(0, alone, [*range(10)]) == [*range(10)]
    assert inspected.seen(0, two, [*range(8), 18, 19]) == [*range(8), 18, 19]
    assert inspected.seen(0, four, [*range(6), 26, 27, 28, 29]) == [*range(6), 26, 27, 28, 29]
    assert inspected.seen(0, alone, [99] * 10) == [*range(10)]
    assert looked == [*range(10), 18, 19, 26, 27, 28, 29]


class View(NamedTuple):
    """Of several states, as `Seen` is."""

    states: np.ndarray

    def of(self, models):
        return View(self.states[models])


def test_colluders_who_know_all_ballots_are_given_the_best_of_theirs(detection):
    """Two of five see the honest three differ; without a fourth honest voter they get one of theirs in."""
    setting = detection.Setting(detection.Crowd(5), attackers=2)
    agreeing = np.array([[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 1]] * 2)
    assert detection.mimicked(agreeing, setting) == {"tpr": 1, "tnr": 1}
    agreeing[0, 3] = 1  # the first trusts the fourth, as these two will
    assert detection.mimicked(agreeing, setting) == {"tpr": 0.5, "tnr": 1}
    assert detection.mimicked(np.ones((5, 5), dtype=int), replace(setting, attackers=0)) == {"tpr": None, "tnr": 1}


def test_framers_send_so_much_of_the_victims_update_and_vote_against_it(detection):
    import framing

    own, other = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 10.0])}
    assert framing.mixed(own, other, 0.5)["w"].tolist() == [1.5, 4.5]
    assert framing.SOURCES["mean"]([own, other])["w"].tolist() == [1.5, 7]
    assert framing.SOURCES["negative"]([other, own])["w"].tolist() == [-3, -4]
    votes = [[1] * 10] * 5 + [[0] + [1] * 9]  # one of six honest voters accuses the victim, as four framers do
    scores = framing.scores((4, "last", 0.5), votes, 10)
    assert scores["victim_excluded"] == 1 and scores["accused"] == 0.2 and scores["others_excluded"] == 0
    quiet = framing.scores((0, "", 0), [[1] * 10] * 10, 10)
    assert quiet["victim_excluded"] == 0 and quiet["framers_excluded"] is None


def test_what_is_in_the_csv_is_not_run_again(detection, tmp_path):
    path, setting = tmp_path / "detection.csv", detection.Setting(detection.Crowd(alpha=0.5))
    assert detection.done(path, *detection.KEY) == set()
    detection.append(path, [detection.flat(setting) | {"seed": 3, "rule": "crowd", "tpr": 1, "tnr": 1}])
    known = detection.done(path, *detection.KEY)
    assert detection.key(setting, 3) in known
    assert detection.key(detection.Setting(), 3) not in known, "IID is another setting"


def test_every_trigger_changes_images_and_leaves_pixels_in_range(detection):
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    for trigger in detection.TRIGGERS.values():
        before, triggered = pixels.clone(), trigger(pixels)
        assert torch.equal(pixels, before), "a copy"
        assert triggered.min() >= 0 and triggered.max() <= 1 and (triggered != pixels).any()


def test_what_a_pair_has_in_common_stands_out_in_its_layer_alone(detection):
    import layers

    rng = np.random.default_rng(6)
    noise = rng.normal(0.02, 0.01, (3, 10, 10))
    noise[1, 2, 7] += 0.2
    symmetric = np.triu(noise, 1) + np.triu(noise, 1).transpose(0, 2, 1)
    found = layers.standardised(symmetric)
    assert found[1, 2, 7] == found[1, 7, 2] > 15 and np.abs(found[[0, 2], 2, 7]).max() < 5
