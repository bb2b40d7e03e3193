"""Both rules: the published one against its own code on trained nets, degenerate crowds, and hostile models."""

import contextlib
import copy
import io
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def digits(private_attributes):
    """Fifty images for each of twenty participants, and sixty more in an unshuffled loader."""
    labels, read = private_attributes.digits(None, train=True)
    images, labels = read(np.arange(1060)), torch.from_numpy(labels[:1060]).long()
    shares = [private_attributes.as_loader(images[i : i + 50], labels[i : i + 50], 25) for i in range(0, 1000, 50)]
    return shares, private_attributes.as_loader(images[1000:], labels[1000:], 30)


@pytest.fixture(scope="module")
def config(experiment):
    return replace(experiment.demo, hidden=16, width=2, local_epochs=2)


@pytest.fixture(scope="module")
def origin(experiment, config, digits):
    model = experiment.initial_model(config)
    experiment.train(model, [batch for share in digits[0][:8] for batch in share], config, "cpu")
    return model


def local_models(experiment, config, origin, digits, count: int, attackers: int, seed: int):
    """Nets trained from `origin` on shares of their own; the last `attackers` of them on wrong labels."""
    models = []
    for index, share in enumerate(np.random.default_rng(seed).permutation(20)[:count]):
        wrong = index >= count - attackers
        batches = [(images, (labels + 1) % 10 if wrong else labels) for images, labels in digits[0][share]]
        torch.manual_seed(1000 * seed + index)
        models.append(copy.deepcopy(origin))
        experiment.train(models[-1], batches, config, "cpu")
    return models


def published_suspects(experiment, published, origin, models, own, loader):
    """What the installed implementation says; it calls `predict_internal_states`, which its own net has."""

    def predict(model):
        return lambda images: [
            output.view(len(images), *([-1] if output.dim() == 2 else []))
            for output in experiment.recorded(model, images)[0]
        ]

    for model in (origin, *models):
        model.predict_internal_states = predict(model)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return sorted(published.validate_models(origin, models, own, loader, "cpu"))
    finally:
        for model in (origin, *models):
            del model.predict_internal_states


@contextlib.contextmanager
def once_a_crowd(published):
    """What does not depend on the validator, the models' outputs and their distances, is computed for the first one."""
    metrics = sys.modules[published.__module__].DistanceHandler
    predict, between = published._CrowdGuardClientValidation__do_predictions, metrics.get_distance
    predictions, distances = [], {}

    def do_predictions(*args):
        if not predictions:
            predictions.append(predict(*args))
        return predictions[0]

    def get_distance(*args):
        key = args[0], *map(id, args[1:])
        if key not in distances:
            distances[key] = between(*args)
        return distances[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "_CrowdGuardClientValidation__do_predictions", staticmethod(do_predictions))
        patch.setattr(metrics, "get_distance", staticmethod(get_distance))
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "crowds"), [(4, 16), (5, 13), (7, 9), (10, 6), (20, 3)])
def test_the_paper_rule_is_the_published_one_on_trained_nets(
    experiment, published, config, origin, digits, count, crowds
):
    """64 + 65 + 63 + 60 + 60 = 312 cases, from no attacker to almost half of the crowd."""
    accused = 0
    for seed in range(crowds):
        models = local_models(experiment, config, origin, digits, count, attackers=seed % ((count + 1) // 2), seed=seed)
        seen = experiment.look(origin, models, digits[1], "cpu", "paper")  # the same for every validator but for `own`
        with once_a_crowd(published):
            every = [published_suspects(experiment, published, origin, models, o, digits[1]) for o in range(count)]
        for own, expected in enumerate(every):
            assert sorted(experiment.vote(seen, own, "paper")) == expected, (seed, own)
            accused += bool(expected)
        assert experiment.validate_models(origin, models, own, digits[1], "cpu", "paper") == expected, seed
    assert accused, "the crowds must exercise both answers"


# --- Degenerate crowds, with the answers written out ------------------------------------------------------------


@pytest.mark.parametrize("rule", ["crowd", "paper"])
class TestDegenerate:
    labels = np.arange(20) % 4

    def verdict(self, experiment, distances, rule, labels=labels, own=0):
        return experiment.verdict(distances, labels, own, rule)

    def test_all_models_equal(self, experiment, rule):
        assert self.verdict(experiment, np.full((2, 20, 6, 2), 0.7), rule) == []

    def test_one_model(self, experiment, rule):
        assert self.verdict(experiment, np.random.default_rng(0).random((2, 20, 1, 2)), rule) == []

    def test_two_models(self, experiment, rule):
        """Neither has a crowd behind it: (2 - 1) // 2 = 0 may be suspected."""
        distances = np.ones((2, 20, 2, 2))
        distances[:, :, 1] = 100
        assert self.verdict(experiment, distances, rule) == []

    def test_one_label(self, experiment, rule):
        distances = np.ones((2, 20, 12, 2))
        distances[:, :, 5] = 8
        assert self.verdict(experiment, distances, rule, labels=np.zeros(20, int)) == [5]

    def test_a_voter_whose_own_model_did_not_move_accuses_nobody(self, experiment, rule):
        """Without a yardstick all ratios are 0, as published."""
        distances = np.random.default_rng(2).random((2, 20, 6, 2))
        distances[:, :, 0] = 0
        assert self.verdict(experiment, distances, rule) == []

    def test_no_samples(self, experiment, rule):
        assert self.verdict(experiment, np.empty((2, 0, 5, 2)), rule, labels=np.empty(0)) == []


def test_equal_scores_are_not_cut(experiment):
    """Two of five lie level above the rest: both or none, whatever their order."""
    values = np.zeros(5)
    values[[1, 3]] = 1
    assert experiment.outliers(values, 0, experiment.LEAST_EFFECT) == {1, 3}
    values[4] = 1  # three of five: more than the bound, and no cut goes through equals
    assert experiment.outliers(values, 0, experiment.LEAST_EFFECT) == set()


@pytest.mark.parametrize("factor", [1.5, 1.8])
def test_the_default_rule_goes_by_the_size_of_the_effect(experiment, factor):
    """Ten models whose distances hardly differ: one that is 1.5 times as far is left alone, at 1.8 times it is not."""
    distances = np.random.default_rng(3).uniform(0.98, 1.02, (2, 60, 10, 4))
    distances[:, :, 6] *= factor
    labels = np.arange(60) % 5
    assert experiment.verdict(distances, labels, own=2) == ([6] if factor > np.exp(experiment.LEAST_EFFECT) else [])


@pytest.mark.parametrize(("scatter", "found"), [(0.02, {3}), (0.25, set())])
def test_in_a_crowd_that_is_scattered_itself_a_small_effect_says_nothing(experiment, scatter, found):
    """Three models at -s, 0 and s, one 0.6 above their mean. For s = 0.25 chance alone reaches 2.01, by hand:
    Student's t at 99 % with two degrees of freedom is 6.965, times s, times the root of 4/3, is 8.042 s."""
    margin = experiment.prediction_margin(np.array([-scatter, 0, scatter]), experiment.LEAST_EFFECT)
    assert margin == pytest.approx(max(0.5, 8.042 * scatter), abs=1e-3)
    assert experiment.outliers(np.array([-scatter, 0, scatter, 0.6]), 1, experiment.LEAST_EFFECT) == found


def test_several_kinds_of_attackers_are_cut_off_one_after_the_other(experiment):
    """A first cut takes the two that are far away, a second one the two that they hid."""
    distances = np.random.default_rng(4).uniform(0.95, 1.05, (2, 60, 10, 4))
    distances[:, :, [6, 7]] *= 2
    distances[:, :, [8, 9]] *= 300
    assert experiment.verdict(distances, np.arange(60) % 5, own=0) == [6, 7, 8, 9]


def test_everybody_is_judged_by_itself(experiment):
    """Beside one that is far away, one at 0.3 is no suspect."""
    values = np.array([0, 0.01, -0.01, 0.02, -0.02, 0.3, 1.0])
    assert experiment.outliers(values, own=0, least=0.5) == {6}


# --- Hostile models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(experiment, config, origin, digits):
    return local_models(experiment, config, origin, digits, count=7, attackers=0, seed=99)


def damaged(model, how):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(how(parameter))
    return model


def nan_in_one_place(parameter):
    parameter = parameter.clone()
    parameter.view(-1)[0] = float("nan")
    return parameter


HOSTILE = {
    "nan": lambda p: torch.full_like(p, float("nan")),
    "one nan": nan_in_one_place,
    "inf": lambda p: torch.full_like(p, float("inf")),
    "-inf": lambda p: torch.full_like(p, -float("inf")),
    "zero": torch.zeros_like,
    "1e30": lambda p: p + 1e30,
    "-1e30": lambda p: p - 1e30,
    "1e4": lambda p: p + 1e4,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["crowd", "paper"])
@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_model_is_a_suspect_and_drags_nobody_along(experiment, origin, honest, digits, how, rule):
    for own in range(6):
        models = [*honest[:6], damaged(honest[6], HOSTILE[how])]
        found = experiment.validate_models(origin, models, own, digits[1], "cpu", rule)
        assert own not in found
        if rule == "crowd" or how not in ("zero", "1e4"):  # finite ones the published tests may overlook
            assert 6 in found
        if rule == "crowd":
            assert found == [6]


@pytest.mark.filterwarnings("ignore")
def test_three_of_seven_hostile_models(experiment, origin, honest, digits):
    hostile = [damaged(honest[4], HOSTILE["nan"]), damaged(honest[5], HOSTILE["1e30"]), damaged(honest[6], torch.neg)]
    assert experiment.validate_models(origin, [*honest[:4], *hostile], 1, digits[1], "cpu") == [4, 5, 6]


@pytest.mark.parametrize("rule", ["crowd", "paper"])
def test_two_identical_models_get_the_same_verdict(experiment, origin, honest, digits, rule):
    """Honest twins, and twins that moved nine times as far."""
    far = experiment.with_state(origin, {
        name: 9 * value - 8 * origin.state_dict()[name] for name, value in honest[3].state_dict().items()
    })  # fmt: skip
    for own in (0, 1, 2):
        assert experiment.validate_models(origin, [*honest[:5], honest[3]], own, digits[1], "cpu", rule) == []
        twins = [*honest[:3], far, honest[4], far, *honest[5:]]
        found = experiment.validate_models(origin, twins, own, digits[1], "cpu", rule)
        assert {3, 5} <= set(found)
        assert rule == "paper" or found == [3, 5], "the published rule takes an honest one along"


def test_a_model_that_did_not_move_drags_nobody_along(experiment, origin, honest, digits):
    for own in range(6):
        without = experiment.validate_models(origin, honest[:6], own, digits[1], "cpu")
        found = experiment.validate_models(origin, [*honest[:6], origin], own, digits[1], "cpu")
        assert found == without


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["crowd", "paper"])
def test_a_voter_whose_model_did_not_move_still_names_what_is_broken(experiment, origin, honest, digits, rule):
    models = [origin, *honest[:5], damaged(honest[6], HOSTILE["nan"])]
    assert experiment.validate_models(origin, models, 0, digits[1], "cpu", rule) == [6]


def test_tensors_that_do_not_fit_never_reach_the_voters(experiment, origin, honest):
    """Wrong shapes, types and names are refused where updates arrive; everybody else's go on."""
    reference = origin.state_dict()
    updates = {name: value - reference[name] for name, value in honest[0].state_dict().items()}
    first = next(iter(updates))
    wrong = {
        "shape": updates | {first: torch.zeros(1)},
        "more": updates | {"extra.weight": torch.zeros(2)},
        "fewer": {name: value for name, value in updates.items() if name != first},
        "type": updates | {first: updates[first].long()},
        "nan": updates | {first: updates[first] * float("nan")},
    }
    packed = {name: experiment.pack_model(update) for name, update in (wrong | {"good": updates}).items()}
    packed |= {"none": b"", "bytes": b"\x80\x04bytes"}
    reports = {name: experiment.Report(update=update) for name, update in packed.items()}
    usable, failed = experiment.usable_updates(reports, reference)
    assert list(usable) == ["good"]
    assert failed.keys() == set(reports) - {"good"}
    assert first in failed["shape"] and "extra.weight" in failed["more"] and "not finite" in failed["nan"]
