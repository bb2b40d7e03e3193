"""What stamps provoke: the stamps themselves, the responses, who is a suspect by them, and a real backdoor."""

import copy

import numpy as np
import pytest
import torch

LOUD = 12  # times as loud as the others


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def crowd(rng, models=8, stamps=128, classes=10):
    """Responses of models that have nothing in common, about as loud as each other."""
    return rng.normal(size=(stamps, models, classes))


# --- Stamps -------------------------------------------------------------------------------------------------------


def test_every_tile_is_painted_in_every_corner_of_the_colour_cube_and_nothing_else_is(experiment, images):
    lowest, highest = (torch.stack([end(images[:, c]) for c in range(3)]) for end in (torch.min, torch.max))
    seen = set()
    for copies in experiment.stamped(images):
        assert copies.shape == (8, 5, 3, 32, 32)
        for painted in copies:
            changed = (painted != images).any(dim=1).any(dim=0)
            assert changed.sum() == 64
            rows, columns = (index.unique() for index in changed.nonzero(as_tuple=True))
            colour = painted[0, :, rows[0], columns[0]]
            assert (painted[:, :, changed] == colour[:, None]).all()
            assert all(value in ends for value, ends in zip(colour, zip(lowest, highest, strict=True), strict=True))
            seen.add((int(rows[0]), int(columns[0]), *colour.tolist()))
    assert len(seen) == 128


@pytest.mark.parametrize(("channels", "colours"), [(1, 2), (2, 4), (3, 8), (7, 2)])
def test_images_of_other_kinds(experiment, channels, colours):
    """Odd sides, other numbers of channels: 16 tiles that cover each pixel once."""
    images = torch.rand(2, channels, 9, 14)
    tiles = list(experiment.stamped(images))
    assert len(tiles) == 16 and tiles[0].shape == (colours, 2, channels, 9, 14)
    assert sum((copies[0, 0] != images[0]).any(0).int() for copies in tiles).eq(1).sum() >= 9 * 14 - 1


def test_what_is_no_image_has_no_stamps_and_provokes_nothing(experiment):
    models = [torch.nn.Linear(6, 4) for _ in range(5)]
    responses = experiment.stamp_responses(models[0], models, torch.randn(8, 6), "cpu")
    assert responses.shape == (0, 5, 4)
    assert experiment.provoked(responses, own=0) == set()


# --- Responses ----------------------------------------------------------------------------------------------------


def test_responses_equal_plain_loops(experiment, small_models, images):
    origin, models = small_models
    found = experiment.stamp_responses(origin, models, images, "cpu")
    assert found.shape == (128, 5, 3)
    stamps = [painted for copies in experiment.stamped(images) for painted in copies]
    with torch.no_grad():
        for b in (0, 37, 127):
            for m, model in enumerate(models):
                rows = []
                for plain, painted in zip(images, stamps[b], strict=True):
                    gap = [(model(x[None]) - origin(x[None]))[0].double() for x in (painted, plain)]
                    rows.append(gap[0] - gap[0].mean() - gap[1] + gap[1].mean())
                np.testing.assert_allclose(found[b, m], torch.stack(rows).mean(0), atol=1e-5)


def test_what_shifts_all_outputs_alike_provokes_nothing(experiment, small_models, images):
    """A model that says one class more often than the others, whatever the image, as unequal data make it do."""
    origin, _ = small_models
    shifted = copy.deepcopy(origin)
    with torch.no_grad():
        shifted.linear[-1].bias += torch.tensor([3.0, -1.0, 0.5])
    assert np.abs(experiment.stamp_responses(origin, [shifted], images, "cpu")).max() < 1e-4


# --- Who is a suspect ---------------------------------------------------------------------------------------------


def test_nobody_in_a_crowd_of_strangers(experiment, rng):
    assert all(not experiment.provoked(crowd(rng, models), own=0) for models in (1, 2, 3, 4, 10, 40))


def test_one_that_is_loud_on_a_single_stamp(experiment, rng):
    responses = crowd(rng)
    responses[17, 5] *= LOUD
    assert experiment.provoked(responses, own=0) == {5}
    assert experiment.provoked(responses, own=5) == set(), "nobody suspects itself"


def test_two_that_answer_alike_though_neither_is_loud_enough_alone(experiment, rng):
    responses, wish = crowd(rng), np.eye(10)[3]
    responses[99, [2, 6]] = 3.5 * np.linalg.norm(responses[99], axis=1).mean() * wish
    assert experiment.loudness(responses, range(8)).max() < experiment.ALONE
    assert experiment.provoked(responses, own=0) == {2, 6}
    responses[99, 6] *= -1
    assert experiment.provoked(responses, own=0) == set(), "as loud, but with another wish"


def test_an_accomplice_answers_alike_where_a_suspect_is_loudest(experiment, rng):
    responses, unit = crowd(rng), 1.3 * 3.1  # by which loudness is measured: the usual length, and 0.3 of it
    wish = np.eye(10)[7] * unit
    responses[60, 4], responses[60, 6] = 5 * wish, 2.1 * wish
    assert experiment.provoked(responses, own=0) == {4, 6}
    responses[61, 4] = 12 * wish
    assert experiment.provoked(responses, own=0) == {4}, "it is loudest elsewhere"
    responses[60, 4] = responses[61, 4] = responses[62, 4]
    assert experiment.provoked(responses, own=0) == set(), "without a suspect there is no accomplice"


def test_a_roaring_model_drags_nobody_along(experiment, rng):
    responses = crowd(rng)
    responses[:, 7] = 1e6 * responses[:, 3]  # in the direction of an honest one, on every stamp
    assert experiment.provoked(responses, own=0) == {7}


def test_not_more_than_the_bound_and_the_most_suspicious_first(experiment, rng):
    responses = crowd(rng, models=7)
    for rank, model in enumerate([1, 2, 4, 6]):
        responses[rank, model] *= LOUD * (rank + 2)
    assert experiment.provoked(responses, own=0) == {2, 4, 6}


def test_equals_are_suspects_together_or_not_at_all(experiment):
    """Four of seven, each loud on a stamp of its own, are more than the bound."""
    responses = np.tile(np.eye(10)[:7], (8, 1, 1))
    for stamp, model in enumerate((1, 2, 3, 4)):
        responses[stamp, model] *= LOUD
    assert experiment.provoked(responses, own=0) == set()
    responses[3, 4] /= LOUD
    assert experiment.provoked(responses, own=0) == {1, 2, 3}


def test_the_yardstick_is_what_is_left(experiment):
    """Beside three that roar a fourth seems quiet; among the rest it is the loudest."""
    responses = np.tile(np.eye(10)[:9], (8, 1, 1))
    responses[:, [6, 7, 8]] *= 1000
    responses[:, 5] *= 1 + 9 * np.eye(8)[:, :1] * (np.arange(10) == 5)
    responses[:, [3, 4]] *= 2.5
    assert experiment.provoked(responses, own=0) == {5, 6, 7, 8}


def test_colluders_who_keep_quiet_do_not_make_honest_models_loud(experiment, rng):
    """Four of ten send next to nothing, or half of an update."""
    for part in (1e-4, 0.5):
        responses = crowd(rng, models=10) * rng.uniform(0.3, 1.7, (128, 10, 1))
        responses[:, 6:] *= part
        assert all(experiment.provoked(responses, own) == set() for own in range(6))


def test_suspects_by_distance_count_and_have_accomplices(experiment, rng):
    responses, wish = crowd(rng, models=7), np.eye(10)[3] * 1.3 * 3.1
    responses[30, 2], responses[30, 5] = 3.3 * wish, 2.2 * wish
    assert experiment.provoked(responses, own=0) == set()
    assert experiment.provoked(responses, own=0, found={2}) == {2, 5}
    assert experiment.provoked(responses, own=0, found={1, 2, 3}) == {1, 2, 3}, "no room for a fourth"


def test_the_order_of_the_models_does_not_matter(experiment, rng):
    responses = crowd(rng, models=9)
    responses[3, [2, 5, 8]] = 4.4 * np.eye(10)[1] * np.linalg.norm(responses[3], axis=1).mean()
    responses[40, 6] *= LOUD
    expected = experiment.provoked(responses, own=0)
    assert expected == {2, 5, 6, 8}
    for _ in range(20):
        order = rng.permutation(9)
        found = experiment.provoked(responses[:, order], own=int(np.flatnonzero(order == 0)[0]))
        assert {int(order[m]) for m in found} == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_a_suspect_and_drags_nobody_along(experiment, rng, value):
    responses = crowd(rng)
    responses[4, 6, 2] = value
    assert experiment.provoked(responses, own=0) == {6}
    assert experiment.provoked(responses, own=6) == set()


def test_models_that_did_not_move_do_not_count_as_silent(experiment, rng):
    """Four of nine are the global model: that makes nobody else loud, nor the bound larger."""
    responses = rng.normal(size=(128, 9, 10))
    responses[:, 5:] = 0
    responses[[3, 4, 5], [1, 2, 3]] *= LOUD
    assert len(experiment.provoked(responses, own=0)) == 2, "of three, where five are compared"
    responses[5, 3] /= LOUD
    assert experiment.provoked(responses, own=0) == {1, 2}
    assert experiment.provoked(np.zeros((128, 8, 10)), own=0) == set()


def test_what_is_lost_in_rounding_is_no_response(experiment, small_models, images):
    """Models that differ in the last bias alone."""
    origin, _ = small_models
    models = [copy.deepcopy(origin) for _ in range(6)]
    with torch.no_grad():
        for model in models:
            model.linear[-1].bias += torch.randn(3)
    assert not experiment.stamp_responses(origin, models, images, "cpu").any()


def test_few_classes_are_too_few(experiment, rng):
    responses = crowd(rng, models=8, classes=2)
    responses[3, 4] = 1000
    assert experiment.provoked(responses, own=0) == set()


# --- What is remembered -------------------------------------------------------------------------------------------


def rounds(rng, faint=(), number=8, models=10):
    """Responses by name of several rounds: noise, and from the `faint` the same wish in every round."""
    wish = 2.2 * np.eye(10)[3] * np.sqrt(10)
    for _ in range(number):
        responses = crowd(rng, models)
        for model in faint:
            responses[99, model] += wish
        yield {f"model {m}": responses[:, m] for m in range(models)}


def suspects_by_round(experiment, series):
    heard, by_round = {}, []
    for responses in series:
        found, heard = experiment.provoked_so_far(responses, "model 0", set(), heard)
        by_round.append(found)
    return by_round


def test_what_is_too_faint_for_a_round_is_found_after_some(experiment):
    rng = np.random.default_rng(5)
    faint = list(rounds(rng, faint=(4, 7)))
    assert not any(experiment.provoked_so_far(responses, "model 0", set(), {})[0] for responses in faint)
    assert suspects_by_round(experiment, faint)[3:] == [{"model 4", "model 7"}] * 5


def test_chance_does_not_add_up(experiment, rng):
    assert not any(suspects_by_round(experiment, rounds(rng, number=30)))


def test_a_single_round_marks_nobody_for_ever(experiment, rng):
    series = list(rounds(rng))
    series[2]["model 5"] = 1e30 * series[2]["model 5"]
    series[4]["model 6"] = np.full((128, 10), np.nan)
    assert suspects_by_round(experiment, series) == [set()] * 2 + [{"model 5"}, set(), {"model 6"}] + [set()] * 3


def test_the_first_round_is_judged_by_itself(experiment, rng):
    responses = crowd(rng)
    responses[17, 5] *= LOUD
    by_name = {f"model {m}": responses[:, m] for m in range(8)}
    assert experiment.provoked_so_far(by_name, "model 0", set(), {})[0] == {"model 5"}


def test_memory_by_hand(experiment):
    """Three models whose usual loudness is 2, at either stamp."""
    now = {"a": [[2, 0], [0, 2]], "b": [[0, 2], [2, 0]], "c": [[2, 0], [0, 100]]}
    now = {name: np.array(response, float) for name, response in now.items()}
    first = experiment.remembered({"a": np.ones((2, 2)), "d": np.ones((2, 2))}, now, "a")
    assert first.keys() == {"a", "b", "c", "d"}
    np.testing.assert_allclose(first["a"], [[1.4, 0.8], [0.8, 1.4]])
    np.testing.assert_allclose(first["b"], [[0, 1], [1, 0]])
    np.testing.assert_allclose(first["c"], [[1, 0], [0, 1.3 * experiment.ALONE]])
    np.testing.assert_allclose(first["d"], np.ones((2, 2)), err_msg="who is away is remembered as before")


def test_who_is_new_or_comes_back_is_compared_fairly(experiment, rng):
    series = list(rounds(rng))
    for responses in series[:6]:
        del responses["model 8"], responses["model 9"]
    for responses in series[3:5]:
        del responses["model 2"]
    assert not any(suspects_by_round(experiment, series))
    series[7]["model 9"][3] *= LOUD
    assert suspects_by_round(experiment, series)[7] == {"model 9"}


def test_colluders_who_are_known_longer_do_not_set_the_yardstick(experiment, rng):
    """Five honest ones of ten are new; four colluders have kept quiet on a third of the stamps."""
    series = list(rounds(rng))
    for responses in series[:6]:
        for model in range(6, 10):
            responses[f"model {model}"][:40] *= 1e-3
        for model in range(1, 6):
            del responses[f"model {model}"]
    assert not any(suspects_by_round(experiment, series)[6:])


@pytest.mark.parametrize("factor", [2, 9])
def test_sending_what_an_honest_model_has_provoked_before_does_not_drag_it_along(experiment, factor):
    """A free rider resends an honest update of the round before, made larger; it is found itself at factor 9."""
    accused = []
    for seed in range(20):
        series = list(rounds(np.random.default_rng(seed)))
        for before, after in zip(series, series[1:], strict=False):
            after["model 9"] = factor * before["model 1"]
        accused += [found - {"model 9"} for found in suspects_by_round(experiment, series)]
    assert sum(map(bool, accused)) <= 0.05 * len(accused)


@pytest.mark.parametrize("sent", [np.nan, 0])
def test_who_cannot_be_heard_now_is_not_judged_by_what_is_remembered(experiment, sent):
    """Two faint ones are found in rounds 5 to 7; in the last, one sends the global model or what is no number."""
    series = list(rounds(np.random.default_rng(5), faint=(4, 7)))
    series[7]["model 7"] = np.full((128, 10), sent)
    broken = {"model 7"} if np.isnan(sent) else set()
    assert suspects_by_round(experiment, series)[6:] == [{"model 4", "model 7"}, {"model 4"} | broken]
    series[7]["model 0"] = np.full((128, 10), np.nan)
    assert suspects_by_round(experiment, series)[7] == broken, "no yardstick"


def test_where_nothing_new_is_heard_nobody_is_judged_by_the_past(experiment):
    """The two faint ones have just been found; now nearly nobody answers to anything."""
    *before, last = rounds(np.random.default_rng(5), faint=(4, 7))
    quiet = {name: np.eye(128, 10) for name in last}
    found = suspects_by_round(experiment, [*before, last, quiet])
    assert found[-2:] == [{"model 4", "model 7"}, set()]


def test_without_a_yardstick_nothing_is_added(experiment, rng):
    before = {"model 0": np.ones((128, 10)), "model 1": np.ones((128, 10))}
    own_broken = {"model 0": np.full((128, 10), np.inf), "model 1": crowd(rng)[:, 0]}
    nobody_moved = dict.fromkeys(before, np.zeros((128, 10)))
    nearly_silent = {"model 0": np.eye(128, 10), "model 1": np.eye(128, 10)}
    for responses in (own_broken, nobody_moved, nearly_silent):
        assert experiment.remembered(before, responses, "model 0") is before


# --- A real backdoor ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(experiment, private_attributes):
    """A global model and seven local ones, trained on digits; the last two carry a backdoor, their updates unscaled."""
    labels, read = private_attributes.digits(None, train=True)
    images, labels = read(np.arange(1100)), torch.from_numpy(labels[:1100]).long()
    config = experiment.Config(hidden=64, width=8, local_epochs=15, learning_rate=1e-3)
    origin = experiment.initial_model(config)
    torch.manual_seed(0)
    experiment.train(origin, private_attributes.as_loader(images[:400], labels[:400], 16, shuffle=True), config, "cpu")
    models = []
    for index, start in enumerate(range(400, 1100, 100)):
        mine = images[start : start + 100], labels[start : start + 100]
        if index >= 5:
            mine = private_attributes.poison(*mine, target=2, pdr=0.5, seed=index)
        models.append(copy.deepcopy(origin))
        torch.manual_seed(index)
        experiment.train(models[-1], private_attributes.as_loader(*mine, 16, shuffle=True), config, "cpu")
    return origin, models, private_attributes.as_loader(images[400:500], labels[400:500], 50)


def test_sleeping_backdoors_are_woken(experiment, trained):
    origin, models, loader = trained
    for own in (0, 2, 4):
        asleep = experiment.hidden_distances(origin, models, loader, "cpu", experiment.LOOKS_AT["crowd"])
        assert experiment.verdict(*asleep, own, "crowd", experiment.LOOKS_AT["crowd"]) == []
        assert experiment.validate_models(origin, models, own, loader, "cpu") == [5, 6]
        images = next(iter(loader))[0][: experiment.STAMPED]
        assert experiment.provoked(experiment.stamp_responses(origin, models, images, "cpu"), own) == {5, 6}


def test_and_honest_models_are_left_alone(experiment, trained):
    origin, models, loader = trained
    for own in range(5):
        assert experiment.validate_models(origin, models[:5], own, loader, "cpu") == []


def test_an_inspection_in_portions_asks_the_same_stamps(experiment, trained):
    """Names whose order is not that of arrival, and accomplices in different portions."""
    origin, models, loader = trained
    named = dict(zip(["g", "a", "f", "b", "e", "d", "c"], models, strict=True))
    inspection = experiment.Inspection(loader.dataset)
    for portion, complete in ((["g", "d"], False), (["a", "f", "c"], False), (["b", "e"], True)):
        found = inspection.decide(origin, {name: named[name] for name in portion}, "g", "cpu", complete)
    assert found == {"d", "c"} and inspection.heard.keys() == named.keys()
    without = experiment.Inspection(loader.dataset, stamped=0)
    assert without.decide(origin, named, "g", "cpu") == set()
