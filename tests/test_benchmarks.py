"""The benchmarks: who plays which role, and that they go on where they stopped."""

import sys

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
