"""What travels: whatever comes from a participant is a report or a failure with its reason, and never an error."""

import json
import pickle
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

names = st.text("abcdefghijklmnopqrstuvwxyzABC-_0123456789äß", min_size=1, max_size=12)
rates, tallies = st.floats(0, 1), st.integers(0, 10**9)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=12), inside, max_size=4),
    max_leaves=20,
)


@given(
    seconds=st.floats(0, 1e9), loss=st.none() | st.floats(0, 1e9), attacks=st.none() | st.booleans(),
    votes=st.none() | st.dictionaries(names, st.sampled_from([0, 1]), max_size=8), main_accuracy=st.none() | rates,
    images=tallies, failure=st.none() | st.text(max_size=300).filter(lambda text: text.isprintable()),
    update=st.binary(max_size=50),
)  # fmt: skip
def test_a_report_arrives_as_it_left(experiment, **parts):
    report = experiment.Report(**parts)
    assert experiment.unpack_report(experiment.pack_report(report)) == report


@given(
    round=st.integers(1, 10**6), version=tallies, whole=st.booleans(), step=st.binary(max_size=50),
    updates=st.dictionaries(names, st.binary(max_size=20), max_size=6), complete=st.booleans(),
)  # fmt: skip
def test_a_task_arrives_as_it_left(experiment, **parts):
    task = experiment.Task(**parts)
    arrived = experiment.unpack_task(experiment.pack_task(task))
    assert arrived == task and list(arrived.updates) == list(task.updates)


@pytest.mark.parametrize(
    ("task", "version"),
    [({"round": 3}, 3), ({"round": 3, "version": 4, "delta": b"to 4"}, 4)],
    ids=["train", "evaluate"],
)
def test_who_is_started_anew_holds_what_the_others_hold_after_its_task(experiment, task, version):
    model = torch.nn.Linear(2, 2)
    packed = experiment.pack_model(model.state_dict())
    sender, memory = SimpleNamespace(task=experiment.Task(**task)), {}
    as_usual = experiment.unpack_task(experiment.FederatedCrowdGuard.pack_task(sender))
    assert as_usual == sender.task
    anew = experiment.unpack_task(experiment.FederatedCrowdGuard.pack_task(sender, packed))
    experiment.update_copy(memory, anew, model)
    assert (memory["global_model"], memory["version"]) == (packed, version)


@given(st.lists(st.binary(max_size=30), max_size=6), st.integers(0, 8))
def test_parts_are_what_was_packed_or_an_error(experiment, parts, most):
    packed = experiment.pack(*parts)
    if len(parts) <= most:
        assert experiment.unpack(packed, most) == parts
    else:
        with pytest.raises(ValueError, match="lengths"):
            experiment.unpack(packed, most)


def is_usable(experiment, report):
    """Every field is of its type and within its bounds, so that whatever uses it cannot fail."""
    assert isinstance(report, experiment.Report)
    again = replace(report)  # which validates
    assert again == report
    assert report.failure is None or len(report.failure) <= 300
    return report.failure is None


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.text(max_size=50) | st.none() | st.integers())
def test_garbage_is_a_failure(experiment, message):
    assert not is_usable(experiment, experiment.unpack_report(message))


@settings(max_examples=300)
@given(anything, st.binary(max_size=20))
def test_any_json_in_the_head_is_a_report_or_a_failure(experiment, head, update):
    is_usable(experiment, experiment.unpack_report(experiment.pack(json.dumps(head).encode(), update)))


@settings(max_examples=300)
@given(st.data())
def test_any_value_of_any_field_is_a_report_or_a_failure(experiment, data):
    known = st.sampled_from([field.name for field in fields(experiment.Report)])
    head = data.draw(st.dictionaries(known, anything, max_size=4))
    report = experiment.unpack_report(experiment.pack(json.dumps(head).encode(), b"behind"))
    assert not is_usable(experiment, report) or report.update == b"behind", "an update is what stands behind the head"


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=4), st.data())
def test_a_report_in_which_bytes_were_changed_is_a_report_or_a_failure(experiment, other, data):
    packed = experiment.pack_report(experiment.Report(votes={"Amsterdam": 1, "Bangalore": 0}, loss=0.5))
    at = data.draw(st.integers(0, len(packed) - 1))
    is_usable(experiment, experiment.unpack_report(packed[:at] + other + packed[at + len(other) :]))


@pytest.mark.parametrize(
    "head",
    [
        b'{"failure": 1' + b"0" * 5000 + b"}",  # Python reads no such number
        b'{"images": 1' + b"0" * 5000 + b"}",
        b"[" * 10**6,
        b'{"votes":' * 10**5,
        b'{"seconds": "1"}',
        b'{"seconds": 1e999}',
        b'{"seconds": -1}',
        b'{"loss": NaN}',
        b'{"attacks": 1}',
        b'{"votes": {"Amsterdam": true}}',
        b'{"votes": {"Amsterdam": 1.5}}',
        b'{"images": 1e3}',
        b'{"failure": "' + b"x" * 1000 + b'"}',
        b'{"failure": "\\ud800"}',
        b'\xff\xfe{"loss": 1}',
        b'{"loss": 1}' + b" " * 2**21 + b"{}",
        b"",
        pickle.dumps({"failure": "no disk"}),
        json.dumps({"failure": "disk\nround 1 done: main 99.9%\r\x1b[2J"}).encode(),
    ],
)
def test_heads_that_are_none_are_failures_with_a_short_reason(experiment, head):
    report = experiment.unpack_report(experiment.pack(head, b""))
    assert report.failure and len(report.failure) <= 300 and len(report.failure.splitlines()) == 1


def test_what_is_not_known_is_dropped(experiment):
    head = {"loss": 1.0, "next_step": "end", "execute_task_args": None, "update": "text", "__class__": "Report"}
    report = experiment.unpack_report(experiment.pack(json.dumps(head).encode(), b"update"))
    assert report == experiment.Report(loss=1.0, update=b"update")
    assert not hasattr(report, "next_step")


@given(st.dictionaries(names, st.dictionaries(names, st.sampled_from([0, 1]), max_size=4) | st.none(), max_size=4))
def test_ballots_are_one_vote_for_each_model_or_left_out(experiment, votes):
    reports = {name: experiment.Report(votes=mine) for name, mine in votes.items()}
    models = sorted({model for mine in votes.values() for model in mine or ()})
    ballots, failed = experiment.usable_ballots(reports, models)
    assert ballots.keys() | failed.keys() == reports.keys() and not ballots.keys() & failed.keys()
    assert all(list(ballot) == models for ballot in ballots.values())
    assert set(experiment.count_votes(ballots, models)) <= set(models)


@given(st.lists(st.tuples(rates, st.integers(1, 10**9)), min_size=3, max_size=9), rates, tallies)
def test_nobody_s_own_count_outweighs_the_others(experiment, honest, lie, boast):
    """However many images one claims, it moves the mean by no more than twice the median's weight can."""
    report = experiment.Report
    measures = {str(i): report(main_accuracy=rate, images=count) for i, (rate, count) in enumerate(honest)}
    mean = experiment.weighted(measures | {"liar": report(main_accuracy=lie, images=boast)}, "main_accuracy", "images")
    counts = sorted([count for _, count in honest] + [boast] * (boast > 0))
    middle = (counts[(len(counts) - 1) // 2] + counts[len(counts) // 2]) / 2
    weights = [min(count, 2 * middle) for _, count in honest]
    liar = min(boast, 2 * middle)
    expected = (sum(w * r for w, (r, _) in zip(weights, honest, strict=True)) + liar * lie) / (sum(weights) + liar)
    assert mean == pytest.approx(expected)
    assert 0 <= mean <= 1


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_bytes_as_an_update_are_refused_with_a_reason(experiment, data):
    with pytest.raises(ValueError, match="update "):
        experiment.unpack_update(data, {"weight": torch.zeros(3)})


@settings(max_examples=100)
@given(st.data())
def test_an_update_in_which_bytes_were_changed_fits_or_is_refused(experiment, data):
    reference = {"weight": torch.ones(2, 3), "bias": torch.zeros(2), "table": torch.arange(3)}
    packed = save({**reference, "weight": torch.ones(2, 3).bfloat16()})
    at, other = data.draw(st.integers(0, len(packed) - 1)), data.draw(st.binary(min_size=1, max_size=8))
    try:
        state = experiment.unpack_update(packed[:at] + other + packed[at + len(other) :], reference)
    except ValueError:
        return
    assert {n: (v.shape, v.dtype) for n, v in state.items()} == {n: (v.shape, v.dtype) for n, v in reference.items()}
    assert all(value.isfinite().all() for value in state.values()) and state["table"].equal(reference["table"])


@settings(max_examples=200)
@given(anything | st.text(max_size=80))
def test_any_yaml_is_settings_or_one_line(private_attributes, tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), errors="replace")
    try:
        private_attributes.read_settings(path)
    except SystemExit as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


@settings(max_examples=200)
@given(st.data())
def test_any_value_of_any_setting_is_settings_or_one_line(private_attributes, tmp_path_factory, data):
    keys = list(private_attributes.Settings.model_fields)
    content = {"name": "Amsterdam", "director": "localhost:1"}
    content |= data.draw(st.dictionaries(st.sampled_from(keys), anything, max_size=2))
    path = tmp_path_factory.getbasetemp() / "some.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        private_attributes.read_settings(path)
    except SystemExit as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


def cannot_be_run(images):
    raise IndexError("index out of range in self")


@pytest.mark.parametrize("rule", ["crowd", "paper"])
def test_a_model_that_cannot_be_run_is_a_suspect_and_the_ballot_arrives(experiment, small_models, loader, rule):
    origin, models = small_models
    without = experiment.validate_models(origin, models[:4], 0, loader, "cpu", rule)
    models[4].forward = cannot_be_run
    found = experiment.validate_models(origin, models, 0, loader, "cpu", rule)
    assert found == [*without, 4], "it, and nobody else because of it"
