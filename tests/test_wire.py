"""Models on the wire, and their average."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

COUNTER = "norm.num_batches_tracked"


@pytest.fixture
def state():
    torch.manual_seed(0)
    table, counter = torch.arange(4), torch.tensor(3)
    return {"weight": torch.randn(3, 4), "bias": torch.full((3,), 1e38), "table": table, COUNTER: counter}


@pytest.fixture
def local(state):
    return {n: v + 0.01 * v.abs() if v.is_floating_point() else v for n, v in state.items()} | {
        COUNTER: torch.tensor(9)
    }


def test_an_update_in_float32_arrives_as_it_left(experiment, state, local):
    arrived = experiment.unpack_update(experiment.pack_update(local, state, "float32"), state)
    for name, value in local.items():
        torch.testing.assert_close(arrived[name], value, rtol=1e-6, atol=0)
        assert arrived[name].dtype == value.dtype


def test_half_precision_halves_the_bytes_and_keeps_most(experiment):
    origin = {"w": torch.zeros(10_000)}
    local = {"w": 0.01 * torch.randn(10_000)}
    full = len(experiment.pack_update(local, origin, "float32"))
    for dtype, loss in (("float16", 1e-3), ("bfloat16", 3e-3)):
        packed = experiment.pack_update(local, origin, dtype)
        assert len(packed) < 0.51 * full
        assert (experiment.unpack_update(packed, origin)["w"] - local["w"]).norm() < loss * local["w"].norm()


def test_the_default_keeps_the_small_steps_of_sgd(experiment):
    """Steps of 1e-8 are below float16's smallest number."""
    origin, local = {"w": torch.zeros(1000)}, {"w": torch.full((1000,), 1e-8)}
    arrived = experiment.unpack_update(experiment.pack_update(local, origin, experiment.demo.update_dtype), origin)
    torch.testing.assert_close(arrived["w"], local["w"], rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "extra": torch.zeros(1)}, "lacks or adds the tensor extra"),
        (lambda s: {n: v for n, v in s.items() if n != "bias"}, "lacks or adds the tensor bias"),
        (lambda s: {**s, "bias": torch.zeros(4)}, r"update of bias has shape \(4,\), not \(3,\)"),
        (lambda s: {**s, "bias": torch.zeros(3, dtype=torch.int64)}, "update of bias has type"),
        (lambda s: {**s, "bias": torch.zeros(3, dtype=torch.float64)}, "update of bias has type"),
        (lambda s: {**s, "bias": torch.full((3,), 3e38)}, "update of bias is not finite"),
        (lambda s: {**s, "table": torch.zeros(4)}, "update of table has type"),
        (lambda s: {**s, "table": torch.tensor([0, 1, 2, 10**6])}, "update of table changes what cannot be learned"),
        (lambda s: {**s, COUNTER: torch.tensor(-1)}, f"update of {COUNTER} changes what cannot be learned"),
        (lambda s: {**s, COUNTER: torch.tensor(2**62)}, f"update of {COUNTER} changes what cannot be learned"),
        (lambda s: {**s, "bias": torch.tensor([0.0, float("nan"), 0])}, "update of bias is not finite"),
        (lambda s: {**s, "bias": torch.full((3,), 1e30).half()}, "update of bias is not finite"),
    ],
)
def test_a_hostile_update_is_refused_with_its_reason(experiment, state, change, words):
    with pytest.raises(ValueError, match=words):
        experiment.unpack_update(save(change(state)), state)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x80\x04\x95", None])
def test_bytes_that_are_no_update_are_refused(experiment, state, data):
    with pytest.raises(ValueError, match="update is not safetensors"):
        experiment.unpack_update(data, state)


def test_fed_avg_solved_by_hand(experiment):
    states = [
        {"w": torch.tensor([1.0, 4.0]), "n": torch.tensor(3), "h": torch.tensor([1.0], dtype=torch.float16)},
        {"w": torch.tensor([3.0, 0.0]), "n": torch.tensor(6), "h": torch.tensor([2.0], dtype=torch.float16)},
        {"w": torch.tensor([5.0, 2.0]), "n": torch.tensor(7), "h": torch.tensor([3.0], dtype=torch.float16)},
    ]
    copies = [{name: value.clone() for name, value in state.items()} for state in states]
    mean = experiment.fed_avg(states)
    assert mean["w"].tolist() == [3.0, 2.0]
    assert mean["n"].item() == 5
    assert mean["n"].dtype == torch.int64
    assert mean["h"].dtype == torch.float16
    for state, copy in zip(states, copies, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy), "none of the arguments is changed"


@pytest.mark.parametrize("extra", ["y" * 300, "y" * 20_000_000])
def test_metadata_in_an_update_are_refused_or_dropped(experiment, state, local, extra):
    packed = experiment.pack_update(local, state, "bfloat16")
    padded = save(load(packed), metadata={"x": extra})
    updates, failed = experiment.usable_updates({"A": experiment.Report(update=padded)}, state)
    assert updates == ({"A": packed} if len(extra) < 1000 else {})
    assert len(extra) < 1000 or "a header for more" in failed["A"]


def test_many_tensors_are_refused_before_they_are_parsed(experiment, state, monkeypatch):
    many = save({f"t{i}": torch.zeros(1) for i in range(10_000)})
    monkeypatch.setattr(experiment, "load", lambda data: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match="a header for more"):
        experiment.unpack_update(many, state)


def test_the_name_of_a_tensor_cannot_forge_a_line_of_the_log(experiment, state):
    forged = save({"\nround 1 done\x1b[2J": torch.zeros(1)})
    _, failed = experiment.usable_updates({"Eve": experiment.Report(update=forged)}, state)
    assert failed["Eve"].startswith("update lacks or adds") and failed["Eve"].isprintable()


def test_usable_updates_tells_who_failed_and_why(experiment, state, local):
    good, report = experiment.pack_update(local, state, "bfloat16"), experiment.Report
    reports = {"A": report(update=good), "B": report(update=b"?"), "C": report(failure="local_update: OSError: disk")}
    updates, failed = experiment.usable_updates(reports, state)
    assert updates == {"A": good}
    assert "not safetensors" in failed["B"]
    assert failed["C"] == "local_update: OSError: disk"


@given(st.dictionaries(st.text(), st.binary(max_size=30)), st.integers(1, 60))
def test_waves_hold_every_update_once_and_are_no_larger_than_allowed(experiment, updates, most):
    chunks = experiment.in_chunks(updates, most)
    assert [name for chunk in chunks for name in chunk] == list(updates)
    assert all(chunk[name] is updates[name] for chunk in chunks for name in chunk)
    assert all(sum(map(len, chunk.values())) <= most or len(chunk) == 1 for chunk in chunks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_who_applies_the_deltas_holds_the_aggregators_model(experiment, dtype):
    """From nothing to a first model, then two deltas: bit for bit the same, and near the exact one."""
    config, memory, packed = experiment.Config(hidden=8, width=2, update_dtype=dtype), {}, None
    model = experiment.initial_model(config)
    exact = model.state_dict()
    for version in (1, 2, 3):
        before = experiment.load(packed) if packed else {}
        delta = experiment.pack_update(exact, before, dtype)
        packed = experiment.apply_delta(packed, delta, model)
        experiment.update_copy(memory, experiment.Task(1, version, version == 1, delta), model)
        assert memory["global_model"] == packed
        near = experiment.global_state(memory, version)
        assert all((near[name] - value).abs().max() <= 0.01 * (1 + value.abs().max()) for name, value in exact.items())
        exact = {name: value + 0.1 * torch.randn_like(value) for name, value in exact.items()}
    experiment.update_copy(memory, experiment.Task(1, 3, False, delta), model)
    assert memory["global_model"] == packed, "a delta that has been applied is not applied again"
    with pytest.raises(LookupError, match="cannot apply the delta to 5"):
        experiment.update_copy(memory, experiment.Task(1, 5, False, delta), model)
    experiment.update_copy(memory, experiment.Task(1, 5, True, packed), model)
    assert memory == {"global_model": packed, "version": 5}
    with pytest.raises(LookupError, match="missed a step"):
        experiment.global_state(memory, 4)
