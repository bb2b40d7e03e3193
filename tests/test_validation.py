"""Each step of the client validation against a slow plain-loop reference, and against the published implementation."""

import contextlib
import copy
import gc
import io
import math
import weakref

import numpy as np
import pytest
import torch


def reference_distances(global_model, models, loader):
    """`hidden_distances`, sample by sample, from the formula; layers recorded without hooks."""

    def outputs(model, image):
        model.eval()
        x, recorded = image[None], []
        for module in model.convolutions:
            x = module(x)
            if isinstance(module, torch.nn.Conv2d):
                recorded.append(x)
        x = model.norm(x).flatten(1)
        for module in model.linear:
            x = module(x)
            if isinstance(module, torch.nn.Linear):
                recorded.append(x)
        return [r.flatten().double() for r in recorded]

    result, labels = [], []
    with torch.no_grad():
        for images, targets in loader:
            for image, label in zip(images, targets, strict=True):
                reference = outputs(global_model, image)
                rows = []
                for model in models:
                    pairs = list(zip(outputs(model, image), reference, strict=True))
                    cosine = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
                    rows.append((cosine, [float((a - b).norm()) for a, b in pairs]))
                result.append(rows)
                labels.append(int(label))
    return np.array(result).transpose(2, 0, 1, 3), np.array(labels)  # (metric, S, M, L)


def reference_hlbim(distances, labels, own):
    """`hlbim` in plain loops."""
    samples, models, layers = distances.shape
    rows = []
    for m in range(models):
        row = []
        for label in sorted(set(labels.tolist())):
            for layer in range(layers):
                ratios = []
                for s in range(samples):
                    if labels[s] == label:
                        mine = distances[s][own][layer]
                        ratios.append(distances[s][m][layer] / mine if mine else 0.0)
                excess = sum(ratios) / len(ratios) - 1
                row.append(math.copysign(excess * excess, excess))
        rows.append(row)
    return np.array(rows)


def test_distances_equal_a_sample_by_sample_reference(experiment, small_models, loader):
    origin, models = small_models
    distances, labels = experiment.hidden_distances(origin, models, loader, "cpu")
    expected, expected_labels = reference_distances(origin, models, loader)
    assert distances.shape == (2, 40, 5, 4)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-6)


def test_all_models_see_the_same_images_though_the_loader_shuffles(experiment, small_models, loader):
    origin, models = small_models
    shuffling = torch.utils.data.DataLoader(loader.dataset, batch_size=16, shuffle=True)
    distances, _ = experiment.hidden_distances(origin, [models[0], models[0]], shuffling, "cpu")
    np.testing.assert_array_equal(distances[:, :, 0], distances[:, :, 1])


def test_recorded_outputs_have_been_through_an_in_place_activation(experiment, small_models):
    first, *_ = experiment.recorded(small_models[0], torch.randn(8, 3, 32, 32))[0]
    assert first.shape == (8, 4 * 8 * 8)
    assert (first >= 0).all()


@pytest.mark.parametrize(("words", "whose"), [("index out of range", "the sender's"), ("out of memory", "my own")])
def test_memory_that_runs_out_is_nobodys_fault(experiment, small_models, loader, words, whose):
    origin, models = small_models
    models = [*models]
    models[2] = copy.deepcopy(models[2])
    models[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError(words)))
    with contextlib.nullcontext() if whose == "the sender's" else pytest.raises(RuntimeError, match=words):
        assert 2 in experiment.validate_models(origin, models, 0, loader, "cpu")


class Hasty(torch.nn.Module):
    """Goes without its second layer where the first one puts out large numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = torch.nn.Linear(3072, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 10)

    def forward(self, images):
        hidden = self.a(images.flatten(1))
        return self.out(hidden if hidden.abs().max() > 1000 else self.b(hidden))


def test_a_model_that_calls_other_layers_costs_its_sender_alone(experiment, loader):
    origin, models = Hasty(), [Hasty() for _ in range(5)]
    with torch.no_grad():
        models[2].a.bias += 5000
    assert 2 in experiment.validate_models(origin, models, 0, loader, "cpu")
    assert np.isfinite(experiment.hidden_distances(origin, models[:2] + models[3:], loader, "cpu")[0]).all()


def test_recording_leaves_no_hooks(experiment, small_models):
    origin, _ = small_models
    experiment.recorded(origin, torch.randn(1, 3, 32, 32))
    with pytest.raises(RuntimeError):
        experiment.recorded(origin, torch.randn(1, 5, 32, 32))
    assert not any(module._forward_hooks for module in origin.modules())


def test_hlbim_equals_plain_loops(experiment, rng):
    distances, labels = rng.random((30, 5, 4)), rng.integers(0, 3, 30)
    distances[3, 2, 1] = 0  # a zero own distance gives a ratio of 0
    np.testing.assert_allclose(
        experiment.hlbim(distances, labels, own=2), reference_hlbim(distances, labels, own=2), rtol=1e-12, atol=1e-15
    )


def test_hlbim_does_not_change_its_arguments(experiment, rng):
    distances, labels = rng.random((6, 3, 2)), np.array([0, 1, 0, 1, 0, 1])
    before = distances.copy()
    experiment.hlbim(distances, labels, own=0)
    np.testing.assert_array_equal(distances, before)


def test_scores_equal_an_eigenvector_computation(experiment, rng):
    matrix = rng.normal(size=(6, 12))
    rows = np.vstack([matrix, np.median(matrix, axis=0)])
    rows = (rows - rows.mean(0)) / rows.std(0)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    expected = rows @ vectors[:, np.argmax(values)]
    scores = experiment.crowd_scores(matrix)
    sign = np.sign(scores @ expected)
    np.testing.assert_allclose(scores, sign * expected, atol=1e-9)


@pytest.mark.parametrize(
    ("scores", "outlier"),
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0], False),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 30.0], True),  # quartiles 1.25 and 3.75: 30 > 3.75 + 5.5 * 2.5
        ([0.0, 1.0, 2.0, 3.0, 4.0, 17.0], False),  # 17 < 17.5, and 2.2 standard deviations
        ([1.0] * 5, False),
    ],
)
def test_outliers_solved_by_hand(experiment, scores, outlier):
    assert experiment.has_outlier(np.array(scores)) is outlier


def test_no_group_no_difference(experiment):
    assert not experiment.differ(np.array([1.0, 2.0]), np.array([]))


def published_suspects(published, matrix, own):
    """The published pruning of one HLBIM matrix (M, F), as one label with F layers."""
    prune = published._CrowdGuardClientValidation__prune_poisoned_models
    with contextlib.redirect_stdout(io.StringIO()):
        return set(prune(matrix.shape[1], len(matrix), own, {"metric": {0: matrix.tolist()}}))


@pytest.mark.filterwarnings("ignore")
def test_suspects_equal_the_published_ones(experiment, published):
    """200 random matrices: 4 to 12 models, from no outlier to too many."""
    found = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        models, own = int(rng.integers(4, 13)), int(rng.integers(0, 4))
        outliers = rng.random(models) < rng.choice([0.0, 0.2, 0.4])
        matrix = rng.normal(size=(models, 24)) + outliers[:, None] * rng.uniform(1, 8) * rng.normal(1, 0.3, 24)
        expected = published_suspects(published, matrix, own)
        assert experiment.paper_rule(matrix, own) == expected, seed
        found += bool(expected)
    assert 40 < found < 195, "the matrices must exercise both answers"


@pytest.mark.filterwarnings("ignore")
def test_votes_equal_the_published_ones_on_a_net(experiment, published, small_models, loader):
    origin, models = small_models

    def predict(model):
        return lambda images: [
            o.view(len(images), *([-1] if o.dim() == 2 else [])) for o in experiment.recorded(model, images)[0]
        ]

    for model in (origin, *models):
        model.predict_internal_states = predict(model)
    for own in range(len(models)):
        with contextlib.redirect_stdout(io.StringIO()):
            expected = published.validate_models(origin, models, own, loader, "cpu")
        assert experiment.validate_models(origin, models, own, loader, "cpu", "paper") == sorted(expected)


def test_a_planted_model_is_found(experiment, small_models, loader):
    origin, models = small_models
    for own in range(4):
        assert 4 in experiment.validate_models(origin, models, own, loader, "cpu", "paper")


def test_models_that_are_not_finite_are_suspects_and_drag_nobody_along(experiment, rng):
    labels = np.arange(40) % 4
    distances = rng.uniform(0.9, 1.1, (2, 40, 10, 3))
    without = experiment.verdict(distances, labels, own=0)
    broken = np.insert(distances, 3, np.nan, axis=2)
    broken[:, :, 3, :2] = np.inf
    expected = sorted([3] + [m + (m >= 3) for m in without])
    assert experiment.verdict(broken, labels, own=0) == expected


def test_a_voter_whose_own_model_is_broken_names_the_broken_ones_only(experiment, rng):
    distances = rng.random((2, 10, 5, 3))
    distances[:, :, [1, 4]] = np.nan
    assert experiment.verdict(distances, np.zeros(10), own=1) == [4]


@pytest.mark.parametrize(
    ("votes", "accepted"),
    [
        ([[1, 1, 0]] * 4, [True, True, False]),
        ([[1, 1, 0]] * 3 + [[0, 0, 1]] * 2, [True, True, False]),
        ([[1, 0]] * 2 + [[0, 1]] * 2, [False, False]),  # a tie is nobody's
        ([[1, 1, 0]] * 2 + [[0, 1, 1]] * 2, [False, True, False]),  # but what both sides trust stays
        ([[1]], [True]),
        ([[0, 1, 1]], [False, True, True]),
        ([[0, 0]] * 3, [False, False]),
        ([[1, 1, 0, 0]] * 2 + [[1, 1, 1, 0]] + [[0, 0, 1, 1]] * 2, [True, True, False, False]),
    ],
)
def test_stacked_clustering_solved_by_hand(experiment, votes, accepted):
    assert experiment.stacked_clustering(votes).tolist() == accepted


def test_no_order_of_voters_or_models_decides_anything(experiment):
    """Six voters, each accusing one or two: most of these ballots have ties somewhere."""
    for seed in range(300):
        rng = np.random.default_rng(seed)
        votes = (rng.random((6, 6)) > 0.25).astype(int)
        voters, models = rng.permutation(6), rng.permutation(6)
        accepted = experiment.stacked_clustering(votes)
        np.testing.assert_array_equal(experiment.stacked_clustering(votes[voters][:, models]), accepted[models])


def test_a_cycle_of_accusations_throws_nobody_out(experiment):
    votes = 1 - np.roll(np.eye(4, dtype=int), 1, axis=1)
    assert experiment.stacked_clustering(votes).tolist() == [True] * 4


def test_nobody_votes_nobody_is_trusted(experiment):
    assert experiment.stacked_clustering(np.empty((0, 3))).tolist() == [False] * 3


def test_no_more_than_one_layer_of_one_model_is_kept_beside_the_reference(experiment, small_models):
    """Counted where the layers compute: how many outputs are still alive whenever one is compared."""
    origin, [model, *_] = small_models
    images, computed, alive = torch.randn(8, 3, 32, 32), [], []
    reference = experiment.recorded(origin, images)[0]
    for layer in experiment.inspected_layers(model):
        layer.register_forward_hook(lambda layer, inputs, output: computed.append(weakref.ref(output)))

    def metric(output, of_layer):
        gc.collect()
        alive.append(sum(ref() is not None for ref in computed))
        return experiment.euclidean(output, of_layer)

    distances, _ = experiment.model_distances(model, images, reference, [metric])
    assert distances.shape == (1, 8, 4)
    assert len(alive) == 4 and max(alive) == 1


@pytest.mark.parametrize("samples", [64, 640])
def test_every_image_passes_once_through_every_model(experiment, small_models, samples):
    origin, models = small_models
    passed = dict.fromkeys([origin, *models], 0)
    for model in passed:
        model.register_forward_hook(lambda model, inputs, output: passed.update({model: passed[model] + len(output)}))
    batches = [(torch.randn(32, 3, 32, 32), torch.zeros(32)) for _ in range(samples // 32)]
    experiment.validate_models(origin, models, 0, batches, "cpu", "paper")
    assert set(passed.values()) == {samples}
    experiment.validate_models(origin, models, 0, batches, "cpu", "crowd")
    assert set(passed.values()) == {2 * samples}, "the default rule needs no further passes"


@pytest.mark.parametrize("wrong", [["P1"], None, {"P1"}, {5}, np.array([1])])
def test_a_rule_that_returns_anything_else_is_named(experiment, small_models, loader, monkeypatch, wrong):
    monkeypatch.setitem(experiment.RULES, "crowd", lambda seen, own, past: wrong)
    with pytest.raises(TypeError, match="rule crowd returns .*, not a set of indices below 5"):
        experiment.validate_models(*small_models, 0, loader, "cpu")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda seen, own, past: {seen.nonsense}, r"AttributeError: .*'nonsense' \(<lambda>: .*seen.nonsense"),
        (lambda seen, own, past: np.linalg.inv(np.ones((2, 3))), r"LinAlgError: .* \(<lambda>: .*np.linalg.inv"),
    ],
)
def test_a_rule_that_fails_is_named_with_its_own_line(experiment, small_models, loader, monkeypatch, rule, words):
    monkeypatch.setitem(experiment.RULES, "crowd", rule)
    with pytest.raises(RuntimeError, match=f"rule crowd: {words}"):
        experiment.validate_models(*small_models, 0, loader, "cpu", "crowd")


def test_memory_that_a_rule_lacks_is_not_the_rule_s_fault(experiment, small_models, loader, monkeypatch):
    def greedy(seen, own, past):
        raise MemoryError

    monkeypatch.setitem(experiment.RULES, "crowd", greedy)
    with pytest.raises(MemoryError):
        experiment.validate_models(*small_models, 0, loader, "cpu", "crowd")
