"""Any net: what is recorded of it, what travels of it, and what is said before it is trained."""

import contextlib
import copy

import pytest
import torch
from torch import nn


class Residual(nn.Module):
    """Linear layers with an addition in between, in place or not."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace, self.relu = inplace, nn.ReLU(inplace)
        self.a, self.b, self.out = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, images):
        hidden = self.a(images.flatten(1))
        more = self.relu(self.b(hidden))
        if self.inplace:
            hidden += more
        else:
            hidden = hidden + more
        return self.out(self.relu(hidden))


class Patches(nn.Module):
    """A patch embedding, attention with a residual connection, and a head; `(N, 3, 8, 8)`."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.embed, self.attend = nn.Conv2d(3, 8, 4, stride=4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp, self.out = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 10)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        attended, _ = self.attend(tokens, tokens, tokens)
        for more in (attended, self.mlp(attended)):
            tokens = tokens.add_(more) if self.inplace else tokens + more
        return self.out(tokens.mean(1))


class Shared(nn.Module):
    """A layer that is used twice, with the functional activation, in place or not."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace, self.a, self.out = inplace, nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, images):
        hidden = images.flatten(1)
        for _ in range(2):
            hidden = nn.functional.relu(self.a(hidden), inplace=self.inplace)
        return self.out(hidden)


NETS = {
    "activation": lambda inplace: nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.ReLU(inplace), nn.Flatten(), nn.Linear(4, 5), nn.ELU(inplace=inplace), nn.Linear(5, 10)
    ),
    "normalised": lambda inplace: nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Flatten(), nn.Linear(4, 10)
    ),
    "residual": Residual,
    "attention": Patches,
    "shared": Shared,
}


def batch(name, count=20):
    side = 8 if name == "attention" else 2
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def moved(model, by=0.1):
    """A copy with other parameters."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return other


def distances(experiment, name, model, others):
    loader = [(batch(name), torch.arange(20) % 10)]
    return experiment.hidden_distances(model, others, loader, "cpu")[0]


@pytest.mark.parametrize("name", NETS)
def test_a_model_is_at_no_distance_from_itself(experiment, name):
    for inplace in (True, False):
        model = NETS[name](inplace)
        assert distances(experiment, name, model, [model, moved(model)])[1, :, 0].max() == 0


@pytest.mark.parametrize("name", NETS)
def test_it_makes_no_difference_whether_a_net_works_in_place(experiment, name):
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = NETS[name](inplace)
        found.append(distances(experiment, name, model, [model, moved(model)]))
    assert (found[0] == found[1]).all()
    assert (found[0][1, :, 1].mean(axis=0) > 0).all(), "each layer is seen"


@pytest.mark.parametrize(
    ("activation", "belongs"), [(nn.ReLU(), True), (nn.ReLU(inplace=True), True), (nn.Tanh(), False)]
)
def test_an_activation_that_could_work_in_place_belongs_to_its_layer(experiment, activation, belongs):
    layer, images = nn.Linear(3, 5), torch.randn(50, 3)
    output, _ = experiment.recorded(nn.Sequential(layer, activation, nn.Linear(5, 2)), images)[0]
    assert torch.equal(output, activation(layer(images)) if belongs else layer(images))


def test_dropout_between_a_layer_and_its_activation_does_nothing(experiment):
    layer, images = nn.Linear(3, 5), torch.randn(50, 3)
    net = nn.Sequential(layer, nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(5, 2)).eval()
    output, _ = experiment.recorded(net, images)[0]
    assert torch.equal(output, layer(images).relu())


# --- The dry pass -------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A net `(N, 3, 2, 2)` → `(N, 10)` whose forward pass the test says."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images):
        return self.run(self, images)


def sequence_first(net, images):
    return net.out(net.layer(images.flatten(2).permute(2, 0, 1)).mean(0))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), r"returns \(1, 7\), not logits \(1, 10\)"),
        (Odd(lambda net, x: (net.a(x.flatten(1)), x), a=nn.Linear(12, 10)), "returns tuple, not logits"),
        (Odd(lambda net, x: x.flatten(1)[:, :10] * 1.0), "no layer that can be inspected"),
        (
            Odd(
                lambda net, x: net.out(net.layer(x).mean((2, 3)).squeeze()),
                layer=nn.Conv2d(3, 6, 1),
                out=nn.Linear(6, 10),
            ),
            r"returns \(10,\), not logits \(1, 10\)",
        ),
        (Odd(sequence_first, layer=nn.Linear(3, 6), out=nn.Linear(6, 10)), "net's layer puts out.*put the batch first"),
        (
            Odd(lambda net, x: net.out(net.layer(x.flatten(2))[0].mean(1)), layer=nn.LSTM(4, 6), out=nn.Linear(6, 10)),
            None,
        ),
        (
            Odd(
                lambda net, x: net.out(net.layer(x.flatten(2)).flatten(1)),
                layer=nn.Conv1d(3, 5, 2),
                out=nn.Linear(15, 10),
            ),
            None,
        ),
    ],
)
def test_what_a_net_puts_out_is_checked_before_it_is_trained(experiment, net, words):
    if words:
        with pytest.raises(ValueError, match=words):
            experiment.dry_pass(net, batch(""), 10)
    else:
        assert experiment.dry_pass(net, batch(""), 10) == ["layer", "out"]


def sometimes(net, images):
    """Another layer for batches of three."""
    hidden = net.a(images.flatten(1))
    return net.out(net.b(hidden) if len(images) == 3 else hidden)


def overwrites_its_input(net, images):
    images -= 0.5
    return net.a(images.flatten(1))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Odd(sometimes, a=nn.Linear(12, 8), b=nn.Linear(8, 8), out=nn.Linear(8, 10)), "calls other layers for other"),
        (Odd(overwrites_its_input, a=nn.Linear(12, 10)), "net's a puts out something else for an image among others"),
        (
            Odd(lambda net, x: net.a(nn.functional.dropout(x.flatten(1))), a=nn.Linear(12, 10)),
            "net's a puts out something else for an image among others",
        ),
        (
            nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 10)),
            "net's 2 puts out something else for an image among others: .*look at the whole batch",
        ),
    ],
)
def test_what_depends_on_more_than_the_image_is_told(experiment, net, words):
    with pytest.raises(experiment.Unfit, match=words):
        experiment.dry_pass(net, batch(""), 10)


def test_rows_that_are_no_images_are_told_even_if_their_number_fits(experiment):
    """32 time steps of 32 images: by shapes alone nothing is wrong."""
    net = Odd(
        lambda net, x: net.out(net.layer(x.permute(1, 0, 2)).mean(0)), layer=nn.Linear(4, 6), out=nn.Linear(6, 10)
    )
    with pytest.raises(ValueError, match="layer puts out"):
        experiment.dry_pass(net, torch.randn(32, 32, 4), 10)


def test_windows_as_rows_are_images_as_long_as_those_of_one_image_follow_each_other(experiment):
    windows = lambda net, x: net.out(net.layer(x.reshape(-1, 4)).reshape(len(x), -1))  # noqa: E731
    net = Odd(windows, layer=nn.Linear(4, 6), out=nn.Linear(18, 10))
    assert experiment.dry_pass(net, batch(""), 10) == ["layer", "out"]
    assert experiment.recorded(net, batch("", 20))[0][0].shape == (20, 18)


@pytest.mark.parametrize("net", ["residual", "attention", "shared"])
def test_a_layer_that_is_never_called_is_named(experiment, net, caplog):
    model = NETS[net](True)
    model.spare = nn.Linear(3, 3)
    with caplog.at_level("INFO", logger=experiment.log.name):
        experiment.check_data(model, [(batch(net), torch.arange(20) % 10)], 10)
    assert "not called by themselves: " in caplog.text and "spare" in caplog.text


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(8)), "0.weight has no shape before the first pass"),
        (lambda: with_buffer(torch.tensor([1.0, float("nan")])), "net's table is not finite"),
        (
            lambda: Odd(None, w=nn.Parameter(torch.ones(2, dtype=torch.complex64))),
            "net's w has the type torch.complex64",
        ),
        (lambda: Odd(None, w=nn.Parameter(torch.tensor([torch.inf]))), "net's w is not finite"),
    ],
)
def test_tensors_that_cannot_be_averaged_are_named(experiment, net, words):
    with pytest.raises(ValueError, match=words):
        experiment.check_net(net())


def test_a_weight_without_a_shape_does_not_stop_those_who_look_before_it_is_told(experiment):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(64, 3), nn.LazyLinear(8))
    assert experiment.inspected_layers(net) == [net[0]] and experiment.middle_layers(net) == []


@pytest.mark.parametrize(
    ("kept", "differs"), [([4, 4], None), ([5, 4], "0.bias"), ([4, 4, 4], "2.bias"), ([4], "1.bias")]
)
def test_a_run_goes_on_with_the_net_that_it_had(experiment, kept, differs):
    now, before = (nn.Sequential(*(nn.Linear(4, size) for size in sizes)).state_dict() for sizes in ([4, 4], kept))
    with pytest.raises(experiment.Unfit, match=f"differs in {differs}") if differs else contextlib.nullcontext():
        experiment.check_same(now, before, "the run that shall go on")


def test_extra_state_is_named(experiment):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    with pytest.raises(ValueError, match="0._extra_state is no tensor"):
        experiment.check_net(nn.Sequential(Extra(2, 2)))


@pytest.mark.parametrize(
    ("labels", "words"),
    [(torch.tensor([0, 8]), "labels from 0 to 8, but classes = 5"), (torch.tensor([-1, 2]), "labels from -1 to 2")],
)
def test_labels_are_classes(experiment, labels, words):
    with pytest.raises(ValueError, match=words):
        experiment.check_data(NETS["residual"](False), [(batch("", 2), labels)], 5)


def test_a_loader_without_a_batch_is_told(experiment):
    with pytest.raises(ValueError, match="gives no batch: see batch_size"):
        experiment.check_data(NETS["residual"](False), [], 10)


# --- Tensors that are not learned ---------------------------------------------------------------------------------


def with_buffer(value, name="table"):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer(name, value)
    return net


CONSTANTS = {
    "table": torch.arange(600.0) * 83.5,
    "mask": torch.full((4, 4), -torch.inf).triu(1),
    "rotary": torch.polar(torch.ones(5), torch.arange(5.0)),
    "bf16": torch.tensor([1.0, 3.1], dtype=torch.bfloat16),
    "third": torch.tensor([1 / 3], dtype=torch.float64),
    "index": torch.arange(7),
    "flags": torch.tensor([True, False]),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_constant_stays_what_it_is(experiment, name, dtype):
    """From the first model over two rounds of training, averaging and rounding."""
    model = with_buffer(CONSTANTS[name], name)
    others, packed = experiment.buffers(model), None
    state = model.state_dict()
    for _ in range(3):
        reference = experiment.load(packed) if packed else {}
        packed = experiment.apply_delta(packed, experiment.pack_update(state, reference, dtype, others), model)
        held = experiment.load(packed)
        assert torch.equal(held[name], CONSTANTS[name]) and held[name].dtype == CONSTANTS[name].dtype
        locals_ = [held | {"0.weight": held["0.weight"] + 0.1 * i} for i in (1, 2, 3)]
        sent = [experiment.pack_update(local, held, dtype, others) for local in locals_]
        assert all(name not in experiment.load(update) for update in sent), "it need not travel"
        arrived = [experiment.unpack_update(update, held, others) for update in sent]
        state = experiment.clipped_avg(arrived, held, 0.1, [], others)


def test_a_minority_s_statistics_move_nothing_far(experiment):
    """They are in no norm and clipped by none: one running mean far away would be a model of its own."""
    model = with_buffer(torch.zeros(1))
    reference, others = model.state_dict(), experiment.buffers(model)
    states = [reference | {"1.running_mean": torch.full((2,), v), "1.num_batches_tracked": torch.tensor(int(10 * v))}
              for v in (0.1, 0.2, 0.3, 1e5, -1e5)]  # fmt: skip
    found = experiment.clipped_avg(states, reference, 1, [], others)
    assert found["1.running_mean"].tolist() == pytest.approx([0.2, 0.2]) and found["1.num_batches_tracked"] == 2
    found = experiment.clipped_avg(states[:4], reference, 1, [], others)
    assert found["1.running_mean"].tolist() == pytest.approx([0.25, 0.25])
    assert found["table"] is reference["table"] and found.keys() == reference.keys()


def test_statistics_are_averaged_as_they_are(experiment):
    """A variance that falls from 0.3 to 1e-4 would be negative after bfloat16, and after scaling."""
    model = with_buffer(torch.zeros(1))
    reference, others = {**model.state_dict(), "1.running_var": torch.full((2,), 0.3)}, experiment.buffers(model)
    local = reference | {"1.running_var": torch.full((2,), 1e-4), "1.num_batches_tracked": torch.tensor(4)}
    arrived = experiment.unpack_update(experiment.pack_update(local, reference, "bfloat16", others), reference, others)
    assert torch.equal(arrived["1.running_var"], local["1.running_var"])
    assert arrived["1.num_batches_tracked"] == 4
    averaged = experiment.clipped_avg([arrived, arrived], reference, 1e-9, [], others)
    assert torch.equal(averaged["1.running_var"], local["1.running_var"])
    assert torch.equal(experiment.rescaled(arrived, reference, 10, others)["1.running_var"], local["1.running_var"])


def test_statistics_are_no_directions(experiment):
    model = with_buffer(torch.zeros(1))
    reference, others = model.state_dict(), experiment.buffers(model)
    local = reference | {"1.running_mean": torch.full((2,), 1e6)}
    assert experiment.look_at_updates(reference, [local], {}, others)[0] == [0]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("table", torch.tensor([2.0]), None),
        ("table", torch.tensor([2.0], dtype=torch.float16), "has type"),
        ("table", torch.tensor([torch.inf]), "not finite"),
        ("table", torch.zeros(2), "has shape"),
        ("1.num_batches_tracked", torch.tensor(-1), "cannot be learned"),
    ],
)
def test_a_buffer_in_an_update_is_checked(experiment, name, value, words):
    model = with_buffer(torch.zeros(1))
    reference, others = model.state_dict(), experiment.buffers(model)
    packed = experiment.pack_model({n: v for n, v in reference.items() if n not in others} | {name: value})
    if words:
        with pytest.raises(ValueError, match=words):
            experiment.unpack_update(packed, reference, others)
    else:
        assert torch.equal(experiment.unpack_update(packed, reference, others)[name], value)


def test_tensors_that_share_memory_travel(experiment):
    net, one = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.arange(3)
    net.register_buffer("a", one)
    net.register_buffer("b", one)
    net[1].weight = net[0].weight
    packed = experiment.load(experiment.pack_model(net.state_dict()))
    assert packed.keys() == net.state_dict().keys()
    assert experiment.buffers(net) == {"a": True, "b": True}, "a tied weight is learned under both names"


def test_as_many_outputs_are_compared_as_by_the_published_implementation(experiment):
    outputs = experiment.recorded(experiment.Net(), torch.zeros(1, 3, 32, 32))[0]
    assert [len(output) for output in outputs] == [1] * 8
    assert sum(output.shape[1] for output in outputs) == 51_210


# --- Weights that torch makes of others ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_layers_with_parametrized_weights_are_inspected_and_compared(experiment, norm):
    net = nn.Sequential(
        norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), norm(nn.Conv2d(4, 64, 3)), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )
    net(torch.zeros(1, 3, 8, 8))
    experiment.check_net(net)
    assert experiment.dry_pass(net, torch.randn(3, 3, 8, 8), 10) == ["0", "2", "5"]
    [name] = experiment.middle_layers(net)
    assert name.startswith("2.") and net.get_parameter(name).shape == (64, 4, 3, 3)
    loader = [(torch.randn(20, 3, 8, 8), torch.arange(20) % 10)]
    models = [copy.deepcopy(net) for _ in range(5)]
    for model in models:
        experiment.train(model, loader, experiment.demo, "cpu")
    assert experiment.look(net, models, loader, "cpu").directions[0].any()


class LowRank(nn.Module):
    """A weight with a low-rank addition that is trained."""

    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.zeros(2, columns))

    def forward(self, weight):
        return weight + (self.a @ self.b).view_as(weight)


def test_weights_of_which_a_part_is_trained_are_compared_by_that_part(experiment):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 64, 3), nn.Flatten(), nn.LazyLinear(10))
    net(torch.zeros(1, 3, 8, 8))
    net[1].weight.requires_grad_(False)
    nn.utils.parametrize.register_parametrization(net[1], "weight", LowRank(64, 36))
    assert experiment.dry_pass(net, torch.randn(3, 3, 8, 8), 10) == ["0", "1", "3"]
    assert experiment.middle_layers(net) == ["1.parametrizations.weight.0.a"]


def test_layers_with_sublayers_are_named(experiment, caplog):
    class Adapted(nn.Module):
        """A linear layer with a low-rank addition."""

        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = (
                nn.Linear(12, 10),
                nn.Parameter(torch.ones(12, 2)),
                nn.Parameter(torch.ones(2, 10)),
            )

        def forward(self, images):
            return self.base(images.flatten(1)) + images.flatten(1) @ self.a @ self.b

    with caplog.at_level("INFO", logger=experiment.log.name):
        experiment.check_data(nn.Sequential(Adapted()), [(batch(""), torch.arange(20) % 10)], 10)
    assert "not inspected, since they have sublayers" in caplog.text and caplog.text.strip().endswith(": 0")


# --- What is frozen -----------------------------------------------------------------------------------------------


def test_frozen_parameters_do_not_travel_and_may_not_change(experiment):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    reference, others = net.state_dict(), experiment.buffers(net)
    moved = {name: value + 1 for name, value in reference.items()}
    honest = experiment.pack_update(moved | {"0.weight": reference["0.weight"]}, reference, "float32", others)
    assert "0.weight" not in experiment.load(honest)
    arrived = experiment.unpack_update(honest, reference, others)
    assert torch.equal(arrived["0.weight"], reference["0.weight"]) and not torch.equal(arrived["0.bias"], net[0].bias)
    with pytest.raises(ValueError, match="update of 0.weight changes what cannot be learned"):
        experiment.unpack_update(experiment.pack_update(moved, reference, "float32", others), reference, others)


def test_an_attacker_changes_what_is_learned_and_nothing_else(experiment):
    class Noisy:
        def update(self, round, local, reference):
            return {name: value + torch.randn_like(value) for name, value in local.items()}

    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state, others = net.state_dict(), experiment.buffers(net)
    sent = experiment.sent_state(Noisy(), 1, state, state, others)
    assert {name for name in state if not torch.equal(sent[name], state[name])} == state.keys() - others.keys()


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (lambda *_: None, "attack Odd: update returns NoneType, not a state dict"),
        (lambda *_: {}["strength"], "attack Odd: KeyError: 'strength'"),
    ],
)
def test_an_attack_of_ones_own_that_fails_is_named(experiment, update, words):
    odd, state = type("Odd", (), {"update": staticmethod(update)})(), nn.Linear(4, 3).state_dict()
    with pytest.raises((TypeError, RuntimeError), match=words):
        experiment.sent_state(odd, 1, state, state, {})


# --- Nets and data of which no round could make anything ----------------------------------------------------------


def tuple_in_training(net, images):
    logits = net.a(images.flatten(1))
    return (logits, logits) if net.training else logits


def counts(net, images):
    if net.training:
        net.seen += 1
    return net.a(images.flatten(1))


@pytest.mark.parametrize(
    ("net", "labels", "words"),
    [
        (Odd(tuple_in_training, a=nn.Linear(12, 10)), torch.arange(20) % 10, "cannot be trained and sent: TypeError"),
        (with_buffer(torch.tensor(0)), torch.arange(20, dtype=torch.int32) % 10, "cannot be trained and sent"),
        (None, torch.arange(20) % 10, "seen changes what cannot be learned"),
    ],
)
def test_a_net_that_cannot_be_trained_is_told_before(experiment, net, labels, words):
    if net is None:
        net = Odd(counts, a=nn.Linear(12, 10))
        net.register_buffer("seen", torch.tensor(0))
    with pytest.raises(experiment.Unfit, match=words):
        experiment.check_training(net, (batch(""), labels), experiment.demo, "cpu")


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), RuntimeError("CUDA out of memory")])
def test_what_may_pass_is_not_the_nets_fault(experiment, error):
    def broken(net, images):
        raise error

    with pytest.raises(type(error)) as raised:
        experiment.check_training(
            Odd(broken, a=nn.Linear(12, 10)), (batch(""), torch.arange(20) % 10), experiment.demo, "cpu"
        )
    assert raised.value is error


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: with_buffer(torch.zeros(2, dtype=torch.complex128)), "cannot be copied and sent"),
        (lambda: with_buffer(torch.zeros(2).to(torch.float8_e4m3fn)), "net's table has the type torch.float8_e4m3fn"),
        (lambda: Odd(None, w=nn.Parameter(torch.ones(2)), twice=Uncopied()), "cannot be copied and sent"),
    ],
)
def test_a_net_that_cannot_be_copied_or_sent_is_told(experiment, net, words):
    with pytest.raises(experiment.Unfit, match=words):
        experiment.check_net(net())


class Uncopied(nn.Module):
    def __deepcopy__(self, memo):
        raise RuntimeError("one of a kind")


def test_images_without_an_index_are_told(experiment):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3, 2, 2), 0)])

    with pytest.raises(experiment.Unfit, match="cannot be chosen by an index"):
        experiment.check_data(Odd(None), torch.utils.data.DataLoader(Stream()), 10)


def test_test_labels_that_are_no_classes_are_told(experiment):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(experiment.Unfit, match="labels from 0 to 11, but classes = 10"):
        experiment.accuracy(net, [(batch(""), torch.arange(20) % 12)], "cpu")
