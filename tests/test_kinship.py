"""The default rule's evidence: what updates and functions have in common, replays, framing, copies, hostile values."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

OUTPUTS, RANK = 128, 4


@pytest.fixture(scope="module")
def conv_models(experiment):
    """A global net with middle convolutions and ten local ones; the last three push the same weights further."""
    config = experiment.Config(hidden=16, width=32)
    origin = experiment.initial_model(config)
    generator = torch.Generator().manual_seed(0)
    shared = {n: torch.randn(v.shape, generator=generator) for n, v in origin.state_dict().items()}
    models = []
    for index in range(10):
        state = {}
        for name, value in origin.state_dict().items():
            update = torch.randn(value.shape, generator=generator)
            if index >= 7 and value.dim() == 4:
                update = update + 0.2 * low_rank(shared[name])
            state[name] = value + 0.002 * update / update.norm() * value.numel() ** 0.5
        models.append(experiment.with_state(origin, state))
    return origin, models


def low_rank(tensor, rank=4):
    matrix = tensor.flatten(1)
    left, strength, right = torch.linalg.svd(matrix, full_matrices=False)
    cut = left[:, :rank] @ torch.diag(strength[:rank]) @ right[:rank]
    return (cut / cut.norm() * matrix.norm()).view_as(tensor)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(40, 3, 32, 32, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels, torch.arange(40) % 10), batch_size=20)


def state_with(origin, models, changes):
    """Models of which some are replaced, index → how its update follows from another's: (index, factor)."""
    reference, states = origin.state_dict(), [model.state_dict() for model in models]
    for index, (source, factor) in changes.items():
        states[index] = {n: reference[n] + factor * (states[source][n] - reference[n]) for n in reference}
    loaded = [copy.deepcopy(origin) for _ in states]
    for model, state in zip(loaded, states, strict=True):
        model.load_state_dict(state)
    return loaded


# --- Principal directions ----------------------------------------------------------------------------------------


def test_principal_directions_span_what_a_plain_decomposition_finds(experiment, rng):
    update = torch.from_numpy(rng.normal(size=(OUTPUTS, 6, 3, 3)))
    left, _, _ = np.linalg.svd(update.flatten(1).numpy(), full_matrices=False)
    found = experiment.principal_directions(update)
    np.testing.assert_allclose(found @ found.T, left[:, :RANK] @ left[:, :RANK].T, atol=1e-6)


@pytest.mark.parametrize("factor", [-1, 1e-20, 1e20])
def test_neither_sign_nor_scale_enters(experiment, rng, factor):
    update = torch.from_numpy(rng.normal(size=(OUTPUTS, 54)))
    once, scaled = (experiment.principal_directions(u)[None] for u in (update, factor * update))
    assert experiment.overlap([once], [scaled]).item() == pytest.approx(1 - RANK / OUTPUTS)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_has_no_directions_is_like_nobody(experiment, value):
    assert not experiment.principal_directions(torch.full((OUTPUTS, 9), value)).any()


def test_an_update_of_lower_rank_has_fewer_directions(experiment):
    flat = torch.zeros(OUTPUTS, 9)
    flat[5] = 1
    found = experiment.principal_directions(flat)
    assert np.abs(found).sum() == pytest.approx(1) and abs(found[5]).max() == pytest.approx(1)


def test_random_updates_overlap_by_chance_only(experiment, rng):
    some, others = ([np.stack([np.linalg.qr(rng.normal(size=(OUTPUTS, RANK)))[0] for _ in range(200)])] for _ in "ab")
    assert experiment.overlap(some, others).mean() == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("directions", [0, 1, 2, 4])
def test_what_random_updates_of_lower_rank_share_is_chance_too(experiment, rng, directions):
    some, others = (np.stack([np.linalg.qr(rng.normal(size=(OUTPUTS, RANK)))[0] for _ in range(200)]) for _ in "ab")
    some[..., directions:] = 0
    assert experiment.overlap([some], [others]).mean() == pytest.approx(0, abs=2e-3)


def test_skew_is_taken_out(experiment, rng):
    """Two updates that share nothing but the class gradients are not alike without them."""
    gradient = torch.from_numpy(rng.normal(size=(1, OUTPUTS * 9)))
    skew = experiment.span(gradient)
    updates = [20 * gradient.view(OUTPUTS, 9) + torch.from_numpy(rng.normal(size=(OUTPUTS, 9))) for _ in range(2)]
    plain, cleared = (
        [experiment.principal_directions(u)[None] for u in experiment.without_skew(torch.stack(updates), s)]
        for s in (None, skew)
    )
    assert experiment.overlap([plain[0]], [plain[1]]) > 3 * experiment.overlap([cleared[0]], [cleared[1]])


def test_class_gradients_are_of_the_model_as_it_judges_and_leave_it_alone(experiment, images):
    """Not as it trains: dropout would draw, and normalisation would count and take statistics from the images."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, OUTPUTS, 3, stride=4),
        torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.LazyLinear(10),
    )  # fmt: skip
    net(next(iter(images))[0])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    judging = experiment.class_directions(net.eval(), images)
    training = experiment.class_directions(net.train(), images)
    assert judging and all(torch.equal(judging[name][0], training[name][0]) for name in judging)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_class_gradients_are_those_of_plain_loops(experiment, conv_models, images):
    origin, _ = conv_models
    origin.eval()
    found = experiment.class_directions(origin, images)
    assert list(found) == experiment.middle_layers(origin) and len(found) == 4
    name = list(found)[0]
    pixels, labels = images.dataset.tensors
    loss = torch.nn.functional.cross_entropy(origin(pixels[labels == 3]), labels[labels == 3], reduction="sum")
    gradient = torch.autograd.grad(loss, origin.get_parameter(name))[0].flatten()
    saturated = gradient / (gradient.abs() + experiment.SATURATION * gradient.abs().mean())
    for wanted in (gradient, saturated):
        left = experiment.without_skew(wanted[None], found[name])
        assert left.norm() < 1e-2 * (wanted / wanted.abs().max()).norm()


def test_convolutions_that_are_frozen_or_never_used_cost_nobody_its_vote(experiment, conv_models, images):
    origin, models = conv_models
    frozen, *others = experiment.middle_layers(origin)
    crowd = [copy.deepcopy(model) for model in (origin, *models)]
    for model in crowd:
        model.get_parameter(frozen).requires_grad_(False)
        model.spare = torch.nn.Conv2d(OUTPUTS, OUTPUTS, 3)
        model.spare.load_state_dict(crowd[0].spare.state_dict())  # nobody trains it
    assert experiment.middle_layers(crowd[0]) == [*others, "spare.weight"]
    assert not experiment.class_directions(crowd[0], images)["spare.weight"][0].any()
    seen = experiment.look(crowd[0], crowd[1:], images, "cpu")
    assert experiment.vote(seen, 0) == {7, 8, 9}
    used = experiment.overlap(seen.directions[:-1], seen.directions[:-1])
    np.testing.assert_allclose(experiment.overlap(seen.directions, seen.directions), used)
    assert used.mean(axis=0).diagonal().min() > experiment.COPY, "a copy is known as one"


def test_where_nobody_has_moved_nobody_is_alike(experiment):
    still = [np.zeros((3, OUTPUTS, experiment.RANK))] * 2
    assert not experiment.overlap(still, still).any()


def test_a_projection_is_that_of_plain_algebra_whatever_the_lengths(experiment, rng):
    """A class without a gradient says nothing, one with a tiny gradient as much as others."""
    rows = torch.from_numpy(rng.normal(size=(3, 40))).float() * torch.tensor([[1.0], [0.0], [1e-12]])
    both = experiment.with_saturated([*rows])
    basis = torch.linalg.qr((both / both.norm(dim=1, keepdim=True))[[0, 2, 3, 5]].T.double()).Q.T
    update = torch.from_numpy(rng.normal(size=(2, 40))).float()
    update /= update.abs().amax(dim=1, keepdim=True)
    wanted = update - ((update.double() @ basis.T) @ basis).float()
    torch.testing.assert_close(experiment.without_skew(update, experiment.span(both)), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(experiment.without_skew(update, experiment.span(torch.zeros(3, 40))), update)


def test_nets_without_wide_middle_convolutions_have_no_directions(experiment, small_models, loader):
    origin, models = small_models
    assert experiment.middle_layers(origin) == []
    seen = experiment.look(origin, models, loader, "cpu")
    assert seen.directions == []
    assert experiment.vote(seen, 0) == {4}, "the others' norms and distances are there"


# --- Likeness in function ------------------------------------------------------------------------------------------


def test_likeness_is_fishers_z_of_the_cosine_within_classes(experiment, rng):
    logits, labels = rng.normal(size=(12, 3, 4)), np.arange(12) % 3
    logits[:, 2] += logits[:, 0]
    found = experiment.likeness(logits, labels)
    rows = logits - logits.mean(2, keepdims=True)
    rows = rows - np.stack([rows[labels == label].mean(0) for label in labels])
    a, b = rows[:, 0].ravel(), rows[:, 2].ravel()
    assert found[0, 2] == pytest.approx(np.arctanh(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    assert experiment.likeness(logits[:, [0, 0]], labels) == pytest.approx(np.full((2, 2), np.arctanh(0.95)))


def test_a_colluder_who_does_the_opposite_of_everybody_does_not_hide_the_others(experiment, rng):
    """It would widen the scatter of the pairs, which is the unit of kinship."""
    common, own = rng.normal(size=(64, 1, 10)), rng.normal(size=(64, 10, 10))
    logits, directions = common + own, [np.linalg.qr(rng.normal(size=(10, 128, 4)))[0]]
    plain, opposite = logits.copy(), logits.copy()
    opposite[:, 9] = -logits[:, :9].sum(axis=1)
    seen = experiment.Seen(np.ones((1, 64, 10, 2)), np.arange(64) % 10, plain, np.ones(10), directions)
    planted_pair = planted(10, [2, 7], 0, 0.1)
    near = [
        experiment.standardised(experiment.evidence(seen._replace(logits=added), 0).kinship + planted_pair, 0)[2, 7]
        for added in (plain, opposite)
    ]
    assert near[1] > 0.9 * near[0] > 5


def test_who_says_one_class_more_often_is_like_nobody(experiment):
    assert not experiment.likeness(np.ones((6, 3, 4)) * np.arange(4), np.zeros(6)).any()


# --- Who is kin ----------------------------------------------------------------------------------------------------


def planted(models, colluders, level=0.02, shared=0.2):
    pairs = np.full((models, models), float(level))
    pairs[np.ix_(colluders, colluders)] += shared
    return pairs


@pytest.mark.parametrize(("models", "colluders"), [(5, [1, 3]), (10, [2, 7]), (10, [1, 4, 6, 8]), (20, [*range(9)])])
def test_colluders_are_found_whatever_their_order(experiment, models, colluders):
    evidence = experiment.no_evidence(models)._replace(kinship=planted(models, colluders))
    own = models - 1
    assert experiment.flagged(evidence, own) == set(colluders)


def honest_pairs(rng, models):
    pairs = np.triu(rng.normal(0.02, 0.0065, (models, models)), 1)
    return pairs + pairs.T


def test_the_statistic_is_that_of_its_definition(experiment, rng):
    kinship = honest_pairs(rng, 9)
    pairs = np.sort(kinship[np.triu_indices(9, 1)])
    scatter = np.sqrt(experiment.USUAL_SCATTER * pairs[:28].std(ddof=1))
    for own in range(9):
        level = max(np.median(pairs), np.median(np.delete(kinship[own], own)))
        np.testing.assert_allclose(experiment.standardised(kinship, own), (kinship - level) / scatter)
    near = (kinship - np.median(pairs)) / scatter
    expected = (near[1, 4] + near[1, 6] + near[4, 6]) / np.sqrt(2 * 3 * np.log(math.comb(9, 3)))
    assert experiment.scan_statistic(near[1, 4] + near[1, 6] + near[4, 6], 3, 9) == pytest.approx(expected)
    for room in (2, 3, 4):
        statistic, group = experiment.closest_group(near, range(9), set(), room)
        total = sum(near[pair] for pair in itertools.combinations(group, 2))
        assert 2 <= len(group) <= room
        assert statistic == pytest.approx(experiment.scan_statistic(total, len(group), 9))


@pytest.mark.parametrize("colluders", [[3, 8], [0, 2, 5], [1, 4, 6, 9]])
def test_the_closest_group_is_the_one_among_all(experiment, rng, colluders):
    for _ in range(20):
        near = experiment.standardised(honest_pairs(rng, 10) + 0.05 * planted(10, colluders, 0, 1), 0)
        found = experiment.closest_group(near, range(10), set(), 4)
        every = [
            (experiment.scan_statistic(sum(near[p] for p in itertools.combinations(group, 2)), size, 10), group)
            for size in (2, 3, 4)
            for group in itertools.combinations(range(10), size)
        ]
        assert found[0] == pytest.approx(max(every)[0]) and sorted(found[1]) == list(max(every)[1])


def test_a_group_stands_out_where_none_of_its_pairs_does(experiment, rng):
    found = {2: 0, 4: 0}
    for _ in range(50):
        pairs = honest_pairs(rng, 10)
        for colluders in ([1, 4], [1, 4, 6, 8]):
            kinship = pairs + planted(10, colluders, 0, 0.031)  # 4.8 standard deviations
            accused = experiment.flagged(experiment.no_evidence(10)._replace(kinship=kinship), 0)
            found[len(colluders)] += accused == set(colluders)
    assert found[2] < 12 and found[4] > 42


@pytest.mark.parametrize(
    ("layers", "shared", "kin"),
    [
        ([3], 0.1, False),  # as honest participants with like data have in one layer
        ([0, 1, 2], 0.1, True),
        ([1, 2], 0.12, True),
        ([3], 0.4, True),  # which the mean over the layers shows
    ],
)
def test_what_is_alike_in_most_layers_is_kin_and_in_one_layer_only_if_it_is_much(
    experiment, rng, monkeypatch, layers, shared, kin
):
    def in_layer(some, _):
        number = int(some[0, 0, 0]) - 1
        return honest_pairs(rng, 10) + (number in layers) * planted(10, [2, 7], 0, shared)

    monkeypatch.setattr(experiment, "overlap_in_layer", in_layer)
    directions = [np.full((10, 64, 4), number) for number in range(1, 5)]
    seen = experiment.Seen(np.ones((1, 4, 10, 2)), np.zeros(4), np.zeros((4, 10, 3)), np.ones(10), directions)
    assert experiment.vote(seen, 0) == ({2, 7} if kin else set())


@pytest.mark.parametrize("models", [5, 6, 10, 20, 60])
def test_crowds_of_whom_nobody_is_kin_accuse_nobody(experiment, rng, models):
    rounds = 30 if models == 60 else 100
    kinship = (honest_pairs(rng, models) for _ in range(rounds))
    accused = [experiment.flagged(experiment.no_evidence(models)._replace(kinship=k), 0) for k in kinship]
    assert sum(map(bool, accused)) <= 0.02 * rounds


@pytest.mark.parametrize(("models", "attackers"), [(5, 2), (10, 4), (20, 9)])
def test_attackers_unlike_everybody_do_not_make_honest_models_look_alike(experiment, rng, models, attackers):
    """Three standard deviations below the others in all their pairs, which are more than half of all."""
    unlike, accused = np.arange(models) >= models - attackers, 0
    for _ in range(100):
        kinship = honest_pairs(rng, models) - 0.02 * np.logical_or.outer(unlike, unlike)
        accused += bool(experiment.flagged(experiment.no_evidence(models)._replace(kinship=kinship), 0))
    assert accused <= 5


def test_attackers_close_to_the_validator_do_not_hide_that_they_are_close_to_each_other(experiment, rng):
    """They are fewer than half of its pairs, so the level rises to that of its closest honest pair at most."""
    found = 0
    for _ in range(50):
        kinship = honest_pairs(rng, 10) + planted(10, [6, 7, 8, 9], 0, 0.08)
        kinship[0, 6:] += 0.08
        kinship[6:, 0] += 0.08
        found += experiment.flagged(experiment.no_evidence(10)._replace(kinship=kinship), 0) == {6, 7, 8, 9}
    assert found >= 48


@pytest.mark.parametrize(("scale", "shift"), [(10, 0), (1, 0.3), (4, -1)])
def test_only_what_lies_between_the_pairs_of_a_crowd_counts(experiment, rng, scale, shift):
    kinship = honest_pairs(rng, 10) + 0.07 * planted(10, [2, 3, 7], 0, 1)
    of = experiment.no_evidence(10)
    assert experiment.flagged(of._replace(kinship=kinship), 0) == {2, 3, 7}
    assert experiment.flagged(of._replace(kinship=scale * kinship + shift), 0) == {2, 3, 7}


def test_two_groups_are_both_found_if_there_is_room(experiment, rng):
    kinship = honest_pairs(rng, 12) + planted(12, [1, 2], 0, 0.3) + planted(12, [5, 7, 9], 0, 0.3)
    assert experiment.flagged(experiment.no_evidence(12)._replace(kinship=kinship), 0) == {1, 2, 5, 7, 9}


@pytest.mark.parametrize("models", [1, 2, 3, 4])
def test_tiny_crowds_have_no_pairs_to_accuse(experiment, models):
    """Two can be suspects among five and more."""
    evidence = experiment.no_evidence(models)._replace(kinship=planted(models, [0, models - 1]))
    assert experiment.flagged(evidence, 0) == set()


def test_more_than_half_are_no_minority_and_own_is_never_accused(experiment, rng):
    for _ in range(200):
        models = int(rng.integers(1, 12))
        pairs = rng.random((models, models))
        earlier = rng.normal(size=(models, models))
        evidence = experiment.Evidence(
            *rng.normal(size=(2, models)), pairs + pairs.T, earlier + earlier.T, *rng.random((2, models))
        )
        own = int(rng.integers(models))
        found = experiment.flagged(evidence, own)
        assert own not in found and len(found) <= (models - 1) // 2


def test_all_equal_accuses_nobody(experiment):
    assert experiment.flagged(experiment.no_evidence(10), 0) == set()
    assert experiment.flagged(experiment.no_evidence(10)._replace(kinship=np.full((10, 10), 0.5)), 0) == set()


def test_what_is_no_number_accuses_nobody(experiment):
    kinship = planted(10, [2, 5])
    kinship[3, 7] = kinship[7, 3] = np.nan
    assert experiment.flagged(experiment.no_evidence(10)._replace(kinship=np.full((10, 10), np.nan)), 0) == set()
    assert experiment.flagged(experiment.no_evidence(10)._replace(kinship=kinship), 0) <= {2, 5}


def test_three_who_have_learned_the_same_are_found_on_a_net(experiment, conv_models, images):
    origin, models = conv_models
    for own in range(7):
        assert experiment.validate_models(origin, models, own, images, "cpu") == [7, 8, 9]


@pytest.mark.parametrize("factor", [1.5, 2, 4, 10, 1000])
def test_scaling_is_no_cover_and_drags_nobody_along(experiment, conv_models, images, factor):
    origin, models = conv_models
    scaled = state_with(origin, models, {8: (8, factor), 9: (9, factor)})
    assert experiment.validate_models(origin, scaled, 0, images, "cpu") == [7, 8, 9]
    alone = state_with(origin, models[:7], {6: (6, factor)})
    found = experiment.validate_models(origin, alone, 0, images, "cpu")
    assert found == ([6] if factor > np.exp(experiment.LEAST_NORM) else [])


def test_the_effect_at_clipped_norm_does_not_depend_on_scale(experiment, rng):
    ratios, norms = rng.uniform(0.5, 2, (30, 6, 4)), np.array([0, 0.1, -0.1, 0, 0.0, 0])
    scaled, longer = ratios.copy(), norms.copy()
    scaled[:, 3] *= 7
    longer[3] += np.log(7)
    np.testing.assert_allclose(experiment.effects(scaled, longer), experiment.effects(ratios, norms))


# --- Copies, replays, framing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, -1, 0.3, 3])
def test_a_copy_of_this_rounds_update_frames_nobody(experiment, conv_models, images, factor):
    origin, models = conv_models
    framed = state_with(origin, models[:7], {6: (2, factor)})
    for own in (0, 1, 3):
        assert 2 not in experiment.validate_models(origin, framed, own, images, "cpu")


def test_copies_count_as_one_in_the_average(experiment, conv_models):
    origin, models = conv_models
    reference, layers = origin.state_dict(), experiment.middle_layers(origin)
    states = [models[0].state_dict(), models[1].state_dict(), models[1].state_dict(), models[1].state_dict()]
    found = experiment.clipped_avg(states, reference, 1e9, layers)
    expected = experiment.fed_avg(states[:2])
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_the_average_is_clipped_and_changes_none_of_the_states(experiment, conv_models):
    origin, models = conv_models
    reference, states = origin.state_dict(), [model.state_dict() for model in models[:2]]
    before = copy.deepcopy(states)
    found = experiment.clipped_avg(states, reference, 0.01, [])
    (length,), _ = experiment.look_at_updates(reference, [found], {})
    assert length <= 0.01
    assert all(a[n].equal(b[n]) for a, b in zip(states, before, strict=True) for n in a)


def history(experiment, seen, rounds=1):
    past = {}
    for _ in range(rounds):
        past = experiment.remembered(past, {m: [d[m] for d in seen.directions] for m in range(len(seen.lengths))})
    return past


@pytest.mark.parametrize("factor", [1, -1, 0.5, 5])
def test_who_replays_anothers_update_is_the_suspect_and_its_victim_is_not(experiment, conv_models, images, factor):
    """Participant 2 repeats a part of its update, as honest ones do; 6 sends what 2 has sent, or its negative."""
    origin, models = conv_models
    reference, before = origin.state_dict(), experiment.look(origin, [models[2]], images, "cpu")
    past = [[] for _ in range(7)]
    past[2] = history(experiment, before)[0]
    old, fresh = models[2].state_dict(), models[6].state_dict()
    victim = {n: reference[n] + 0.7 * (fresh[n] - reference[n]) + 0.5 * (old[n] - reference[n]) for n in reference}
    replay = {n: reference[n] + factor * (old[n] - reference[n]) for n in reference}
    victim, replay = (experiment.with_state(origin, state) for state in (victim, replay))
    seen = experiment.look(origin, [*models[:2], victim, *models[3:6], replay], images, "cpu")
    evidence = experiment.evidence(seen, 0, past)
    assert evidence.replays[6] > experiment.REPLAY
    found = experiment.flagged(evidence, 0)
    assert 6 in found and 2 not in found


LAYERS = 4


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_who_follows_the_mean_of_anothers_past_frames_nobody(experiment, rng, share):
    """Six participants whose updates repeat a part of themselves; the last one mixes in what the second has sent."""
    own, sent, found = rng.normal(size=(6, LAYERS, OUTPUTS, 6)), [], []
    for _ in range(10):
        updates = own @ rng.normal(size=(6, LAYERS, 6, 200)) + 2.5 * rng.normal(size=(6, LAYERS, OUTPUTS, 200))
        if sent:
            of_victim = np.stack([directions[:, 1] for directions in sent])  # (rounds, layers, outputs, RANK)
            mean = np.linalg.eigh(np.einsum("tlor,tlpr->lop", of_victim, of_victim))[1][..., -experiment.RANK :]
            followed = mean @ rng.normal(size=(LAYERS, experiment.RANK, 200))
            followed *= np.linalg.norm(updates[5]) / np.linalg.norm(followed)
            updates[5] = share * followed + (1 - share) * updates[5]
        layers = [
            [experiment.principal_directions(torch.from_numpy(u)) for u in layer] for layer in updates.swapaxes(0, 1)
        ]
        layers = [np.stack(layer) for layer in layers]
        past = [[np.concatenate([d[layer, m] for layer in range(LAYERS)]) for d in sent] for m in range(6)]
        past = [np.stack(rounds) if rounds else [] for rounds in past]
        seen = experiment.Seen(np.ones((1, 8, 6, 2)), np.zeros(8), np.zeros((8, 6, 3)), np.ones(6), layers)
        found += [experiment.flagged(experiment.evidence(seen, v, past), v) for v in (0, 2, 3, 4)]
        sent.append(np.stack(layers))
    assert all(suspects <= {5} for suspects in found)
    assert share < 0.6 or found.count({5}) >= 30, "of 36 after the first round"


def test_what_two_have_in_common_is_no_replay(experiment):
    """Colluders resemble each other's past alike; who was away so far is measured by what is usual."""
    alike = np.where(np.isin(np.arange(5), [3, 4]) & np.isin(np.arange(5), [3, 4])[:, None], 0.3, 0.02)
    assert (experiment.replays(alike, np.full(5, 4)) < experiment.REPLAY).all()
    alike[:, 2], rounds = 0, np.array([4, 4, 0, 4, 4])  # 2 has sent nothing before
    assert (experiment.replays(alike, rounds) < experiment.REPLAY).all()
    alike[2, 0] = 0.2
    assert (experiment.replays(alike, rounds) > experiment.REPLAY).tolist() == [False, False, True, False, False]


def test_what_was_sent_before_is_compared_with_each_update(experiment, rng):
    """Rounds that one participant was away, another all of them, against plain loops."""

    def draw(models):
        return np.linalg.qr(rng.normal(size=(models, OUTPUTS, RANK)))[0]

    directions, past = (
        [draw(3), draw(3)],
        [np.concatenate([draw(4), draw(4)], axis=1), [], np.concatenate([draw(2)] * 2, 1)],
    )
    found, rounds = experiment.over_rounds(directions, past)
    assert rounds.tolist() == [4, 0, 2] and not found[:, 1].any()
    for m, n in itertools.product(range(3), (0, 2)):
        pairs = [
            np.square(layer[m].T @ sent[k * OUTPUTS : (k + 1) * OUTPUTS]).sum() / RANK - RANK / OUTPUTS
            for sent in past[n]
            for k, layer in enumerate(directions)
        ]
        assert found[m, n] == pytest.approx(np.mean(pairs))


def test_who_has_moved_one_layer_alone_resembles_no_more_than_that(experiment, rng):
    """A member that learns a victim's directions in one of three layers does not make the victim its copier."""
    directions = [np.linalg.qr(rng.normal(size=(3, OUTPUTS, RANK)))[0] for _ in range(3)]
    victim, nothing = directions[0][1], np.zeros((OUTPUTS, RANK))
    past = [
        [],
        np.concatenate([layer[1] for layer in directions])[None],
        np.concatenate([victim, nothing, nothing])[None],
    ]
    found, _ = experiment.over_rounds(directions, past)
    assert found[1, 2] == pytest.approx((1 - RANK / OUTPUTS) / 3)


# --- Kinship over rounds --------------------------------------------------------------------------------------------


def of_rounds(experiment, now, past, own=0, rounds=9):
    """Who is suspected by overlaps `(M, M)` of this round and mean ones, not symmetric, with the rounds before."""
    lasting = experiment.lasting_overlap(now, past, np.full(len(now), rounds))
    return experiment.flagged(experiment.no_evidence(len(now))._replace(kinship=now, lasting=lasting), own)


def honest_past(rng, models, rounds=9):
    return rng.normal(0.02, 0.0075, (rounds, models, models)).mean(axis=0)  # so they scatter on CIFAR-10


def test_kinship_over_rounds_is_that_of_its_definition(experiment, rng):
    now, past, rounds = honest_pairs(rng, 6), honest_past(rng, 6), rng.integers(0, 4, 6)
    found = experiment.lasting_overlap(now, past, rounds)
    common = {(m, n): min(past[m, n], past[n, m]) - abs(past[m, n] - past[n, m]) for m in range(6) for n in range(m)}
    known = {(m, n): min(rounds[m], rounds[n]) for m, n in common}
    levels = np.median([now[pair] for pair in common]), np.median([common[p] for p, count in known.items() if count])
    for pair, count in known.items():
        expected = (now[pair] - levels[0] + count * (common[pair] - levels[1])) / np.sqrt(1 + count)
        expected = max(expected, -2 * experiment.USUAL_SCATTER)
        assert found[pair] == found[pair[::-1]] == pytest.approx(expected)


@pytest.mark.parametrize(("colluders", "shared"), [([3, 8], 0.032), ([1, 4, 6, 9], 0.018)])
def test_who_is_a_little_closer_in_every_round_is_found_over_rounds(experiment, rng, colluders, shared):
    once, lasting = 0, 0
    for _ in range(50):
        now = honest_pairs(rng, 10) + planted(10, colluders, 0, shared)
        past = honest_past(rng, 10) + planted(10, colluders, 0, shared)
        once += experiment.flagged(experiment.no_evidence(10)._replace(kinship=now), 0) == set(colluders)
        lasting += of_rounds(experiment, now, past) == set(colluders)
    assert once <= 5 and lasting >= 48


@pytest.mark.parametrize("below", [0.0, 0.05, 0.9])
def test_an_accomplice_who_is_unlike_everybody_hides_nobody(experiment, rng, below):
    """It has no directions in the layers that are compared, or replays somebody, so its pairs are far below."""
    found = 0
    for _ in range(50):
        now = honest_pairs(rng, 10) + planted(10, [3, 8], 0, 0.035)
        past = honest_past(rng, 10) + planted(10, [3, 8], 0, 0.035)
        past[5, :] -= below
        past[:, 5] -= below
        found += of_rounds(experiment, now, past) == {3, 8}
    assert found >= 35, found


def test_a_replay_does_not_widen_the_scale_for_others(experiment, rng):
    lasting, replays = honest_pairs(rng, 10) + planted(10, [3, 8], 0, 0.2), np.zeros(10)
    lasting[5], lasting[:, 5], replays[5] = -2, -2, 0.9
    evidence = experiment.no_evidence(10)._replace(lasting=lasting, replays=replays)
    assert experiment.flagged(evidence, 0) == {3, 5, 8}
    assert experiment.flagged(evidence._replace(replays=np.zeros(10)), 0) == set(), "which is what the scale does"


def test_a_vote_adds_up_what_was_sent_before(experiment, rng):
    """Two of ten whose updates have a little in common, always the same; nobody has in one round."""
    common, sent = rng.normal(size=(LAYERS, OUTPUTS, 4)), []
    for _ in range(10):
        updates = rng.normal(size=(10, LAYERS, OUTPUTS, 200))
        for colluder in (3, 8):
            updates[colluder] += 0.075 * common @ rng.normal(size=(LAYERS, 4, 200))
        layers = [
            np.stack([experiment.principal_directions(torch.from_numpy(u)) for u in layer])
            for layer in updates.swapaxes(0, 1)
        ]
        sent.append(layers)
    past = [np.stack([np.concatenate([layer[m] for layer in layers]) for layers in sent[:-1]]) for m in range(10)]
    seen = experiment.Seen(np.ones((1, 8, 10, 2)), np.zeros(8), np.zeros((8, 10, 3)), np.ones(10), sent[-1])
    for own in (0, 5):
        now, over = (experiment.evidence(seen, own, known)._replace(persistence=np.zeros(10)) for known in (None, past))
        assert experiment.flagged(now, own) == set() and experiment.flagged(over, own) == {3, 8}


def test_who_colludes_for_the_first_time_after_honest_rounds_is_found_at_once(experiment, rng):
    found = 0
    for _ in range(50):
        now = honest_pairs(rng, 10) + planted(10, [3, 8], 0, 0.1)
        found += of_rounds(experiment, now, honest_past(rng, 10)) == {3, 8}
    assert found >= 48


@pytest.mark.parametrize("models", [5, 6, 10, 20])
def test_crowds_of_whom_nobody_is_kin_accuse_nobody_over_rounds(experiment, rng, models):
    accused = [of_rounds(experiment, honest_pairs(rng, models), honest_past(rng, models)) for _ in range(100)]
    assert sum(map(bool, accused)) <= 3


def test_who_resembles_anothers_past_is_not_kin_to_it_for_that(experiment, rng):
    """The victim repeats itself, so it resembles what the framer has taken from it, but less."""
    for _ in range(50):
        past = honest_past(rng, 10)
        past[7, 2] += 0.04
        past[2, 7] += 0.02
        assert 2 not in of_rounds(experiment, honest_pairs(rng, 10), past)


def test_without_rounds_in_common_there_is_kinship_of_this_round(experiment, rng):
    now, rounds = honest_pairs(rng, 8), np.full(8, 5)
    rounds[3] = 0  # has come anew
    found = experiment.lasting_overlap(now, honest_past(rng, 8), rounds)
    level = np.median(now[np.triu_indices(8, 1)])
    np.testing.assert_allclose(np.delete(found[3], 3), np.delete(now[3], 3) - level)
    alone = experiment.lasting_overlap(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1))
    assert alone.tolist() == [[0]]


def test_memory_is_bounded_and_keeps_who_is_away(experiment):
    past = {}
    for number in range(25):
        names = ["a"] if number % 2 else ["a", "b"]
        past = experiment.remembered(past, {name: [np.full((4, experiment.RANK), number)] for name in names})
    assert len(past["a"]) == experiment.MEMORY and len(past["b"]) == experiment.MEMORY
    assert past["a"][-1, 0, 0] == 24


def test_who_was_wrongly_accused_once_is_judged_anew(experiment):
    """Nothing about a suspicion is remembered, only what was sent."""
    accused = experiment.no_evidence(8)._replace(kinship=planted(8, [2, 5]))
    assert experiment.flagged(accused, 0) == {2, 5}
    assert experiment.flagged(experiment.no_evidence(8), 0) == set()


def test_who_repeats_itself_far_more_than_others_stands_out(experiment):
    persistence = np.array([0.04, 0.06, 0.05, 0.05, 0.04, 0.3])
    assert experiment.flagged(experiment.no_evidence(6)._replace(persistence=persistence), 0) == {5}


@pytest.mark.parametrize(("length", "suspected"), [(1.0, True), (4.0, True), (0.3, True), (0.1, False)])
def test_a_participant_with_few_images_may_repeat_itself(experiment, rng, length, suspected):
    """Its short updates are hardly noisy; of usual length, the same persistence would be an attacker's."""
    own, parts = rng.normal(size=(OUTPUTS, 6)), []
    for _ in range(4):
        updates = [rng.normal(size=(OUTPUTS, 6)) for _ in range(5)] + [own + rng.normal(size=own.shape)]
        parts.append(np.stack([experiment.principal_directions(torch.from_numpy(u)) for u in updates]))
    seen = experiment.Seen(
        np.ones((1, 8, 6, 2)), np.zeros(8), np.zeros((8, 6, 3)), np.array([1, 1, 1, 1, 1, length]), [parts[-1]]
    )
    evidence = experiment.evidence(seen, 0, list(np.stack(parts[:-1], axis=1)))
    judged = evidence._replace(norms=np.zeros(6))
    assert experiment.flagged(judged, 0) == ({5} if suspected else set())


# --- Chunks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[10], [1, 9], [3, 3, 4], [1] * 10])
def test_chunks_of_models_change_nothing(experiment, conv_models, images, sizes):
    origin, models = conv_models
    whole = experiment.look(origin, models, images, "cpu")
    cuts = np.split(np.arange(10), np.cumsum(sizes)[:-1])
    parts = experiment.joined([experiment.look(origin, [models[m] for m in cut], images, "cpu") for cut in cuts])
    np.testing.assert_allclose(parts.distances, whole.distances)
    np.testing.assert_allclose(parts.logits, whole.logits)
    assert experiment.vote(parts, 3) == experiment.vote(whole, 3) == {7, 8, 9}
    assert experiment.vote(whole.of([3, 7, 8, 0, 1, 2]), 0) == {1, 2}


def test_whose_logits_are_no_numbers_is_a_suspect_and_drags_nobody_along(experiment, conv_models, images):
    """As of a net that scales them behind its last layer."""
    origin, models = conv_models
    seen = experiment.look(origin, models, images, "cpu")
    seen.logits[5, 2] = np.nan
    assert experiment.vote(seen, 0) == {2, 7, 8, 9}


def test_votes_do_not_depend_on_the_order_of_models(experiment, conv_models, images, rng):
    origin, models = conv_models
    whole = experiment.look(origin, models, images, "cpu")
    for _ in range(10):
        order = rng.permutation(10)
        found = experiment.vote(whole.of(order), int(np.flatnonzero(order == 0)[0]))
        assert {int(order[m]) for m in found} == {7, 8, 9}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_broken_models_are_suspects_and_drag_nobody_along(experiment, conv_models, images, value):
    origin, models = conv_models
    broken = copy.deepcopy(models[6])
    with torch.no_grad():
        broken.features[0].weight[0, 0, 0, 0] = value
    found = experiment.validate_models(origin, [*models[:6], broken, *models[7:]], 0, images, "cpu")
    assert found == [6, 7, 8, 9]


def test_who_has_not_moved_is_nobodys_suspect_and_nobodys_kin(experiment, conv_models, images):
    origin, models = conv_models
    assert experiment.validate_models(origin, [*models[:5], origin, origin, *models[7:]], 0, images, "cpu") == [7, 8, 9]


def test_an_update_that_clean_images_do_not_show_is_judged_by_its_norm(experiment, conv_models, images):
    """It leaves a unit that is dead on them: all hidden outputs are the global model's, exactly."""
    origin, models = (copy.deepcopy(part) for part in conv_models)
    with torch.no_grad():
        for model in (origin, *models):
            model.classifier[1].bias[0] = -1e3
        models[6] = copy.deepcopy(origin)
        models[6].classifier[4].weight[:, 0] += 50
    distances, _ = experiment.hidden_distances(origin, models, images, "cpu")
    assert not distances[1, :, 6].any() and distances[1, :, 5].any()
    assert experiment.validate_models(origin, models, 0, images, "cpu") == [6, 7, 8, 9]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_net_may_compute_in_another_precision(experiment, conv_models, images, dtype):
    origin, models = (copy.deepcopy(part) for part in conv_models)
    for model in (origin, *models):
        model.to(dtype).register_forward_pre_hook(lambda _, inputs: inputs[0].to(dtype))
    few = list(torch.utils.data.DataLoader(images.dataset, batch_size=10))[:1]  # float16 is slow on a CPU
    assert experiment.validate_models(origin, models, 0, few, "cpu") == [7, 8, 9]


def test_evidence_is_the_same_for_a_rule_of_ones_own(experiment, conv_models, images):
    """Which is shown both metrics, where the default rule is shown one."""
    origin, models = conv_models
    both, one = (experiment.look(origin, models, images, "cpu", rule) for rule in ("mine", "crowd"))
    assert len(both.distances) == 2 and len(one.distances) == 1
    np.testing.assert_array_equal(experiment.evidence(both, 0).effects, experiment.evidence(one, 0).effects)


def test_own_model_alone(experiment, conv_models, images):
    origin, models = conv_models
    assert experiment.validate_models(origin, models[:1], 0, images, "cpu") == []
