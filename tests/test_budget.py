"""The adaptive sample budget: which images, how many, and that nothing is lost in the worst case."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


class Seen(torch.utils.data.Dataset):
    """Random images of three classes that remembers who was asked for, after `forget`."""

    def __init__(self, samples):
        self.images = torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        self.asked = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        self.asked.append(int(index))
        return self.images[index], int(index) % 3


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_every_beginning_is_as_balanced_as_it_can_be(experiment, labels):
    labels = np.array(labels)
    order = experiment.balanced_order(labels)
    assert sorted(order) == list(range(len(labels)))
    for stop in range(1, len(labels) + 1):
        taken = {label: (labels[order[:stop]] == label).sum() for label in labels}
        left = {label: (labels == label).sum() - taken[label] for label in taken}
        assert all(not left[label] or taken[label] >= max(taken.values()) - 1 for label in taken)


@given(st.integers(0, 100_000))
def test_portions_double_and_cover_everything_once(experiment, samples):
    parts = experiment.portions(samples)
    assert parts[0][0] == 0 and parts[-1][1] == samples
    assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
    assert all(stop <= max(experiment.FIRST_PORTION, 2 * start) for start, stop in parts)


def named(models):
    return {f"model {index}": model for index, model in enumerate(models)}


def test_a_clear_case_needs_one_portion(experiment, small_models):
    """Four models a step of 0.05 away, one of 0.5: that no redraw can change."""
    origin, models = small_models
    inspection = experiment.Inspection(Seen(2000))
    assert inspection.decide(origin, named(models), "model 0", "cpu") == {"model 4"}
    assert inspection.images == experiment.FIRST_PORTION


def test_in_the_worst_case_it_is_the_vote_on_all_images_each_looked_at_once(experiment, small_models, monkeypatch):
    origin, models = small_models
    monkeypatch.setattr(experiment, "is_settled", lambda *args: False)
    inspection = experiment.Inspection(Seen(500))
    found = inspection.decide(origin, named(models), "model 0", "cpu")
    assert inspection.images == 500
    once_for_the_labels, for_the_stamps = list(range(500)), inspection.order[: experiment.STAMPED].tolist()
    assert sorted(inspection.dataset.asked) == sorted(once_for_the_labels * 2 + for_the_stamps)
    everything = torch.utils.data.DataLoader(Seen(500), batch_size=100)
    assert found == {f"model {m}" for m in experiment.validate_models(origin, models, 0, everything, "cpu")}


@pytest.mark.parametrize("samples", ["adaptive", 200, None])
@pytest.mark.parametrize("settled", [True, False])
def test_portions_of_models_change_nothing(experiment, small_models, monkeypatch, samples, settled):
    """Five models at once, and in portions of one, three and one, as often as it asks for them."""
    origin, models = small_models
    monkeypatch.setattr(experiment, "is_settled", lambda *args: settled)
    torch.manual_seed(3)
    at_once = experiment.Inspection(Seen(500), samples)
    expected = at_once.decide(origin, named(models), "model 0", "cpu")
    torch.manual_seed(3)
    inspection, crowd, laps = experiment.Inspection(Seen(500), samples), list(named(models).items()), 0
    while True:
        laps += 1
        for portion, last in ((crowd[:1], False), (crowd[1:4], False), (crowd[4:], True)):
            found = inspection.decide(origin, dict(portion), "model 0", "cpu", complete=last)
        if found is not None:
            break
    assert (found, inspection.images) == (expected, at_once.images)
    assert laps == (3 if samples == "adaptive" and not settled else 1)
    assert expected == {"model 4"}


def test_a_vote_on_the_edge_is_not_settled(experiment):
    """One of six models moves further by just the factor that makes it a suspect, on noisy samples."""
    rng = np.random.default_rng(0)
    distances = rng.lognormal(0, 0.3, (1, 60, 6, 2))
    distances[:, :, 4] *= np.exp(experiment.LEAST_EFFECT)
    labels = np.arange(60) % 3
    assert not experiment.is_settled(distances, labels, 0, "crowd", rng)
    distances[:, :, 4] *= 10
    assert experiment.is_settled(distances, labels, 0, "crowd", rng)


@pytest.mark.parametrize(("rule", "stamped", "innocent"), [("crowd", 0, set()), ("paper", 8, {"model 2"})])
def test_without_stamps_no_image_is_looked_at_for_them(experiment, small_models, rule, stamped, innocent):
    """The published rule accuses an innocent one too, as it often does in so small a crowd."""
    origin, models = small_models
    inspection = experiment.Inspection(Seen(200), 200, rule, stamped)
    assert inspection.decide(origin, named(models), "model 0", "cpu") == {"model 4"} | innocent
    assert sorted(inspection.dataset.asked) == sorted([*range(200)] * 2), "for the labels and for the distances"
