"""The detection benchmark: who plays which role, and that it goes on where it stopped."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def detection():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import detection

    return detection


def test_attackers_are_fewer_than_half_and_scale_by_one_over_their_share(detection):
    for setting in detection.settings():
        size, attackers = setting.crowd.participants, setting.attackers
        assert 2 * len(attackers) < size
        assert bool(attackers) == (setting.pmr > 0)
        for role in setting.roles:
            attacks = role.participant in attackers
            assert role.pdr == (setting.pdr if attacks else 0)
            assert role.scale == pytest.approx(size / len(attackers) if attacks and setting.scaled else 1)


def test_the_settings_the_benchmark_promises(detection):
    settings = detection.settings()
    assert len(settings) == len(set(settings))
    quiet = {(s.crowd.participants, s.crowd.alpha) for s in settings if not s.pmr and s.crowd.width == 32}
    assert quiet == {(n, alpha) for n in (4, 5, 6, 10, 20) for alpha in (None, 0.5)}
    assert {s.pmr for s in settings if s.crowd == detection.Crowd(20)} == {0, 0.05, 0.25, 0.45}


def test_what_is_in_the_csv_is_not_run_again_and_the_table_counts_it(detection, tmp_path, monkeypatch):
    monkeypatch.setattr(detection, "RESULTS", tmp_path / "detection.csv")
    assert detection.done(detection.RESULTS, *detection.KEY) == set()
    setting = detection.Setting(detection.Crowd(alpha=0.5))
    for seed, (tpr, backdoor) in enumerate([(1.0, 0.03), (0.5, 0.04), (0.5, 0.2)]):
        scores = {"crowd": (tpr, backdoor), "oracle": (1.0, 0.03)}
        detection.append(
            detection.RESULTS,
            [
                detection.flat(setting) | {"seed": seed, "rule": rule, "tpr": t, "tnr": 1, "main": 0.6, "backdoor": b}
                for rule, (t, b) in scores.items()
            ],
        )
    known = detection.done(detection.RESULTS, *detection.KEY)
    assert known == {detection.key(setting, seed) for seed in range(3)}
    assert detection.key(detection.Setting(), 0) not in known, "IID is another setting"
    crowd = detection.table(detection.results()).xs("crowd", level="rule").iloc[0]
    assert crowd["mean", "tpr"] == pytest.approx(2 / 3, abs=1e-3)
    assert crowd["", "harmless"] == 1, "let in twice, once to no effect"
    half = 4.303 * np.std([1, 0.5, 0.5], ddof=1) / 3**0.5  # Student's t with two degrees of freedom
    assert crowd["±", "tpr"] == pytest.approx(half, abs=2e-3)
    assert not pd.isna(crowd["mean", "backdoor"])


def test_every_trigger_changes_images_and_leaves_pixels_in_range(detection):
    import triggers

    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    for name, trigger in triggers.TRIGGERS.items():
        before, triggered = pixels.clone(), trigger(pixels)
        assert torch.equal(pixels, before), "a copy"
        assert triggered.min() >= 0 and triggered.max() <= 1
        touched = (triggered != pixels).any(1)[0].sum().item()
        assert touched == {"4x4": 16, "6x6": 36}.get(name.split(", ")[1], 1024)


def test_a_view_of_some_models_is_what_is_seen_of_them(detection):
    rng = np.random.default_rng(0)
    view = detection.View(rng.random((2, 20, 6, 3)) + 1, np.arange(20) % 4, rng.normal(size=(128, 6, 10)))
    view.distances[:, :, 4] *= 9
    view.responses[7, 2] *= 20
    assert view.suspects(0, "crowd") == {2, 4}
    assert view.of([0, 1, 3, 5]).suspects(0, "crowd") == set()
    assert view.of([0, 2, 1, 3]).suspects(0, "crowd") == {1}
