"""The flow on OpenFL's LocalRuntime: both aggregations, and participants at which something goes wrong."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow

NAMES = ["Amsterdam", "Bangalore", "Chandler", "Detroit"]
ATTACK = {"first_round": 2, "scale": 4, "accomplices": ["Detroit"]}


class BrokenLoader:
    """A disk that fails when it is read."""

    dataset = ((torch.zeros(3, 32, 32), 0),)

    def __iter__(self):
        raise OSError("disk failure")


class Saboteur:
    """Sends what is not a number, and votes nonsense."""

    def attacks(self, round):
        return True

    def training_data(self, round, loader):
        return loader

    def update(self, round, local, reference):
        return {name: value * float("nan") for name, value in local.items()}

    def vote(self, round, votes):
        return {"nobody": 7}


@pytest.fixture
def run(experiment, private_attributes, tmp_path, monkeypatch):
    """Runs the flow with tiny shards of the digits; `changes` are private attributes by name."""
    from openfl.experimental.workflow.interface import Aggregator, Collaborator
    from openfl.experimental.workflow.runtime import LocalRuntime

    monkeypatch.chdir(tmp_path)  # metaflow writes into the current folder
    monkeypatch.setenv("METAFLOW_USER", "tests")
    tiny = replace(experiment.demo, rounds=2, local_epochs=1, hidden=16, width=16)

    def attributes(name, changes):
        data = {"index": NAMES.index(name), "train_samples": 40, "test_samples": 30}
        mine = private_attributes.participant(name, data, attack=ATTACK if name == "Detroit" else None)
        return mine | changes.get(name, {})

    def run_flow(changes=None, **fields):
        collaborators = [
            Collaborator(name=n, private_attributes_callable=functools.partial(attributes, n, changes or {}))
            for n in NAMES
        ]
        flow = experiment.FederatedCrowdGuard(replace(tiny, **fields))
        flow.runtime = LocalRuntime(Aggregator(name="aggregator"), collaborators, backend="single_process")
        with contextlib.redirect_stdout(io.StringIO()):
            flow.run()
        return flow

    return run_flow


ROW = {
    "round", "aggregation", "participants", "main_accuracy", "backdoor_accuracy", "backdoor", "per_participant",
    "votes", "accepted", "excluded", "attackers", "tpr", "tnr", "failed",
}  # fmt: skip


@pytest.mark.parametrize("aggregation", ["CrowdGuard", "FedAvg"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_exactly_as_many_rows_as_rounds(run, aggregation, rounds):
    flow = run(aggregation=aggregation, rounds=rounds)
    assert [row["round"] for row in flow.history] == list(range(1, rounds + 1))
    assert flow.history == json.loads(json.dumps(flow.history))
    for row in flow.history:
        assert row.keys() == ROW
        assert row["aggregation"] == aggregation
        assert sorted(row["accepted"] + row["excluded"]) == NAMES
        assert row["failed"] == {}
        assert set(row["per_participant"]) == set(NAMES)
        assert set(row["votes"]) == (set(NAMES) if aggregation == "CrowdGuard" else set())
        assert 0 <= row["main_accuracy"] <= 1
    assert flow.error is None


def test_ground_truth_scores_the_attacked_round_only(run):
    first, second = run(aggregation="FedAvg").history
    assert (first["attackers"], first["tpr"], first["tnr"]) == ([], None, 1)
    assert (second["attackers"], second["tpr"], second["tnr"]) == (["Detroit"], 0, 1)


def test_a_liar_votes_for_itself_alone(run):
    assert run().history[1]["votes"]["Detroit"] == {name: int(name == "Detroit") for name in NAMES}


def test_fed_avg_is_the_mean_of_what_the_participants_trained(experiment, private_attributes, run):
    """The global model after one round, computed by hand from the same seeds."""
    flow = run(aggregation="FedAvg", rounds=1, update_dtype="float32")
    model = experiment.initial_model(flow.config)
    start, total = model.state_dict(), None
    for index, name in enumerate(NAMES):
        data = {"index": index, "train_samples": 40, "test_samples": 30}
        loader = private_attributes.participant(name, data)["train_loader"]
        mine = experiment.with_state(model, start)
        torch.manual_seed(experiment.seed_of(flow.config, 1, name))
        experiment.train(mine, loader, flow.config, "cpu")
        state = mine.state_dict()
        total = state if total is None else {key: total[key] + state[key] for key in state}
    for key, value in experiment.load(flow.global_model).items():
        torch.testing.assert_close(value, total[key] / 4, rtol=1e-4, atol=1e-6)


def test_accuracies_are_those_of_the_model_that_the_round_produced(experiment, run, private_attributes):
    flow = run(aggregation="FedAvg")
    model = experiment.with_state(experiment.initial_model(flow.config), experiment.load(flow.global_model))
    data = [{"index": i, "train_samples": 40, "test_samples": 30} for i in range(4)]
    tests = [private_attributes.participant("A", d)["test_loader"] for d in data]
    expected = sum(experiment.accuracy(model, test, "cpu") for test in tests) / 4
    assert flow.history[-1]["main_accuracy"] == pytest.approx(expected)


def test_a_participant_whose_data_cannot_be_read_is_reported_and_the_others_go_on(run):
    history = run({"Bangalore": {"train_loader": BrokenLoader()}}).history
    assert len(history) == 2
    for row in history:
        assert "disk failure" in row["failed"]["Bangalore"]
        assert "Bangalore" not in row["accepted"] + row["excluded"]
        assert "Bangalore" not in row["votes"]
        assert len(row["votes"]) == 3


def test_an_update_that_is_not_finite_and_a_malformed_ballot_are_reported_and_left_out(run):
    row = run({"Chandler": {"adversary": Saboteur()}}, rounds=1).history[0]
    assert "not finite" in row["failed"]["Chandler"]
    assert "Chandler" in row["excluded"]
    assert all("Chandler" not in ballot for ballot in row["votes"].values())
    assert row["tpr"] == 1


@pytest.mark.parametrize("lie", [{"main_accuracy": None}, {"images": 0}, {"backdoor_images": 0}])
def test_measures_that_cannot_be_are_left_out_and_reported(experiment, lie):
    honest = experiment.Report(main_accuracy=0.5, backdoor_accuracy=0.0, images=10, backdoor_images=9)
    measures, failed = experiment.usable_measures({"A": honest, "B": replace(honest, **lie)})
    assert (list(measures), list(failed)) == (["A"], ["B"])


def test_who_has_not_trained_is_neither_attacker_nor_honest(experiment):
    report = experiment.Report
    trained = {"A": report(attacks=True), "B": report(), "C": report(attacks=False), "D": report(failure="disk")}
    row = experiment.history_row(experiment.demo, 1, [*trained], trained, {}, {}, ["B", "C"], {}, {})
    assert (row["attackers"], row["tpr"], row["tnr"]) == (["A"], 1, 1)


def test_if_nobody_delivers_the_global_model_stays(experiment, run):
    flow = run({name: {"train_loader": BrokenLoader()} for name in NAMES}, rounds=1)
    assert flow.history[0]["accepted"] == []
    assert len(flow.history[0]["failed"]) == 4
    untrained = experiment.initial_model(flow.config).state_dict()
    for name, value in experiment.load(flow.global_model).items():
        assert value.equal(untrained[name].bfloat16().float()), "as it was sent in the beginning"


@pytest.mark.parametrize(
    ("field", "value"), [("rule", "best"), ("rounds", 0), ("learning_rate", -1), ("validation_samples", "None")]
)
def test_wrong_settings_name_the_field(experiment, field, value):
    with pytest.raises(ValueError, match=field):
        experiment.Config(**{field: value})


def test_a_failing_measurement_is_reported(run):
    row = run({"Amsterdam": {"test_loader": BrokenLoader()}}, rounds=1).history[0]
    assert "disk failure" in row["failed"]["Amsterdam"]
    assert row["per_participant"]["Amsterdam"]["main_accuracy"] is None
    assert 0 <= row["main_accuracy"] <= 1


def test_without_attackers_there_is_no_ground_truth(run):
    row = run({"Detroit": {"adversary": None}}, rounds=1).history[0]
    assert (row["tpr"], row["tnr"]) == (None, None)


def without_times(history):
    parts = [{name: mine | {"seconds": None} for name, mine in row["per_participant"].items()} for row in history]
    return [row | {"per_participant": part} for row, part in zip(history, parts, strict=True)]


def test_chunks_of_one_megabyte_change_nothing_but_the_number_of_messages(experiment, run, monkeypatch):
    """A net of one megabyte, so that every model is a chunk of its own; own models are looked at with the first."""
    handed, inspect_models = [], experiment.inspect_models

    def counted(config, task, *rest):
        handed.append((len(task.updates), task.complete))
        return inspect_models(config, task, *rest)

    monkeypatch.setattr(experiment, "inspect_models", counted)
    whole = run(width=32)
    assert len(handed) == 2 * 4
    handed.clear()
    parts = run(width=32, message_mb=1)
    assert len(handed) == 2 * 4 * 4
    assert sum(complete for _, complete in handed) == 2 * 4
    assert {models for models, _ in handed} == {1}
    assert without_times(parts.history) == without_times(whole.history)
    assert parts.global_model == whole.global_model


def test_every_chunk_is_judged_on_the_same_images_even_if_they_are_drawn(experiment, run, monkeypatch):
    seen, look, inspected_images = [], experiment.look, experiment.inspected_images

    class Noisy(torch.utils.data.Dataset):
        def __init__(self, dataset):
            self.dataset = dataset

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            image, label = self.dataset[index]
            return image + torch.randn_like(image), label

    def watched(global_model, models, images, *rest):
        seen.append(torch.cat([batch for batch, _ in images]).numpy().tobytes())
        return look(global_model, models, images, *rest)

    monkeypatch.setattr(experiment, "look", watched)
    monkeypatch.setattr(experiment, "inspected_images", lambda data, samples: inspected_images(Noisy(data), samples))
    run(rounds=1, width=32, message_mb=1)
    assert len(seen) > 3 * 4 and len({*seen}) == 4, "a set of images for each of the four participants"


def test_a_validator_that_never_decides_is_given_up_and_reported(experiment, run, monkeypatch):
    monkeypatch.setattr(experiment, "inspect_models", lambda *args: experiment.Report())
    row = run(message_mb=1, rounds=1).history[0]
    assert row["votes"] == {} and row["accepted"] == []
    assert set(row["failed"]) == set(NAMES)


def test_who_could_decide_at_once_is_not_asked_again(experiment, run, monkeypatch):
    """All models in one chunk: a validator that does not decide is stalling."""
    asked = []

    def nothing(config, task, name, *rest):
        asked.append(name)
        return experiment.Report()

    monkeypatch.setattr(experiment, "inspect_models", nothing)
    row = run(rounds=1).history[0]
    assert sorted(asked) == NAMES and set(row["failed"]) == set(NAMES)


def test_some_validators_decide_for_all(run):
    history = run(validators_per_round=2, rounds=2).history
    for row in history:
        assert len(row["votes"]) == 2
        assert row["failed"] == {}
        assert all(set(ballot) == set(NAMES) for ballot in row["votes"].values())
        assert "local_validation" in row["per_participant"][next(iter(row["votes"]))]["seconds"]
    again = run(validators_per_round=2, rounds=2).history
    assert [list(row["votes"]) for row in again] == [list(row["votes"]) for row in history]


def test_the_draw_of_validators_is_fair_and_depends_on_the_updates(experiment):
    names, config = [f"P{i}" for i in range(10)], experiment.Config(validators_per_round=3)
    counts = dict.fromkeys(names, 0)
    for sent in range(500):
        drawn = experiment.draw_validators(config, 1, dict.fromkeys(names, b"%d" % sent))
        assert len(set(drawn)) == 3
        for name in drawn:
            counts[name] += 1
    assert all(100 <= count <= 200 for count in counts.values()), "150 each on the average, four deviations are 41"
    everybody = experiment.draw_validators(experiment.Config(validators_per_round=10), 1, dict.fromkeys(names, b""))
    assert everybody == names


def test_validators_remember_what_was_sent(run):
    """Everybody's, but not that of an update which never arrived."""
    memories = {name: {} for name in NAMES}
    changes = {name: {"memory": memory} for name, memory in memories.items()}
    run(changes | {"Chandler": {"memory": memories["Chandler"], "train_loader": BrokenLoader()}}, rounds=2)
    present = set(NAMES) - {"Chandler"}
    for name in present:
        assert memories[name]["past"].keys() == present
        assert all(len(rounds) == 2 for rounds in memories[name]["past"].values())


def test_who_missed_a_step_of_the_global_model_is_reported_and_gets_it_whole(run):
    class Forgetful(dict):
        """Forgets the second version of the global model, once."""

        forgot = False

        def __setitem__(self, key, value):
            forget = (key, value) == ("version", 2) and not self.forgot
            self.forgot = self.forgot or forget
            super().__setitem__(key, value - 1 if forget else value)

    rows = run({"Chandler": {"memory": Forgetful()}}, rounds=3).history
    assert "missed a step" in rows[1]["failed"]["Chandler"]
    assert "Chandler" not in rows[1]["accepted"] + rows[1]["excluded"] and "Chandler" not in rows[1]["votes"]
    assert rows[2]["failed"] == {} and "Chandler" in rows[2]["votes"]


def test_an_average_that_cannot_be_sent_leaves_the_global_model_as_it_is(experiment, run, monkeypatch):
    def giant(states, reference):
        return [*states], {name: value * 0 + 1e6 for name, value in reference.items()}

    monkeypatch.setitem(experiment.AGGREGATIONS, "FedAvg", giant)
    flow = run(update_dtype="float16", aggregation="FedAvg", rounds=2)
    untrained = experiment.initial_model(flow.config).state_dict()
    for name, value in experiment.load(flow.global_model).items():
        assert value.equal(untrained[name].half().float())
    assert len(flow.history) == 2 and flow.error is None


RUN = """
import contextlib, functools, gc, json, sys
from dataclasses import replace

import experiment
import private_attributes
from openfl.experimental.workflow.interface import Aggregator, Collaborator
from openfl.experimental.workflow.runtime import LocalRuntime

names, data = json.loads(sys.argv[1]), {"train_samples": 40, "test_samples": 30}
bring = [functools.partial(private_attributes.participant, n, data | {"index": i}) for i, n in enumerate(names)]
config, histories = replace(experiment.demo, rounds=2, local_epochs=1, hidden=16, width=16), []
gc.freeze()  # OpenFL collects garbage after every step, and would look through all that is imported
for backend in ("single_process", "ray"):
    with contextlib.redirect_stdout(sys.stderr):
        participants = [Collaborator(name=n, private_attributes_callable=f) for n, f in zip(names, bring)]
        flow = experiment.FederatedCrowdGuard(config)
        flow.runtime = LocalRuntime(Aggregator(name="aggregator"), participants, backend=backend, num_actors=2)
        flow.run()
    histories.append(flow.history)
with open("histories.json", "w") as file:
    json.dump(histories, file)
"""


def test_ray_gives_the_same_results(exported, tmp_path):
    """In a process of its own, so that Ray's workers too find the exported module; with Ray two of them share four.

    One thread for all: Ray gives its workers one by itself, and sums of several threads differ in the last bits.
    """
    paths = os.pathsep.join(map(str, (exported.parent, ROOT / "envoy")))
    environment = os.environ | {"PYTHONPATH": paths, "METAFLOW_USER": "tests", "HOME": str(tmp_path)}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", RUN, json.dumps(NAMES)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    here, with_ray = map(without_times, json.loads((tmp_path / "histories.json").read_text()))
    assert here == with_ray
    assert len(here) == 2 and all(len(row["votes"]) == 4 for row in here)


class Normalised(torch.nn.Module):
    """A net with statistics, and with tables that nobody learns."""

    def __init__(self, classes):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()
        )
        self.head = torch.nn.Linear(512, classes)
        self.register_buffer("mask", torch.full((10, 10), -torch.inf).triu(1))
        self.register_buffer("table", torch.arange(600.0) * 83.5)

    def forward(self, images):
        return self.head(self.layers(images)) + 0 * self.mask.diagonal()


def test_statistics_and_tables_survive_an_attack_that_scales(experiment, run, monkeypatch):
    def normalised(config):
        torch.manual_seed(config.seed)
        return Normalised(config.classes)

    monkeypatch.setattr(experiment, "initial_model", normalised)
    flow = run(rounds=3, aggregation="FedAvg")
    state, fresh = experiment.load(flow.global_model), normalised(flow.config).state_dict()
    assert all(torch.equal(state[name], fresh[name]) for name in ("mask", "table"))
    assert (state["layers.1.running_var"] > 0).all() and state["layers.1.num_batches_tracked"] > 0
    assert [row["failed"] for row in flow.history] == [{}] * 3


def test_what_no_round_can_mend_ends_the_run_at_once(run):
    with pytest.raises(RuntimeError, match=r"nobody can train: .*labels from 0 to 9, but classes = 5: set `classes`"):
        run(classes=5)


def test_who_measures_another_backdoor_is_left_out(experiment, run, private_attributes):
    other = private_attributes.participant("Bangalore", {"index": 1, "test_samples": 30}, trigger="noise")
    changed = {key: other[key] for key in ("backdoor_loader", "backdoor")}
    row = run({"Bangalore": changed}, rounds=1).history[0]
    assert row["failed"] == {
        "Bangalore": "measures another backdoor (trigger noise, target 2, source None) than the others "
        "(trigger red_square, target 2, source None)"
    }
    assert row["per_participant"]["Bangalore"]["backdoor_accuracy"] is None


def test_who_numbers_the_classes_otherwise_is_left_out(run, private_attributes):
    alike, otherwise = (private_attributes.numbering(classes) for classes in (["ant", "bee"], ["bee", "ant"]))
    told = {name: {"backdoor": otherwise if name == "Detroit" else alike} for name in NAMES}
    failed = run(told, rounds=1).history[0]["failed"]
    assert failed.keys() == {"Detroit"} and "bee/ant" in failed["Detroit"]


def test_what_a_participant_lacks_is_its_failure(experiment, private_attributes):
    flow = experiment.FederatedCrowdGuard(experiment.demo)
    flow.task, flow.input, flow.memory, flow.device, flow.train_loader = experiment.Task(1), "Eve", {}, "cpu", []
    report = experiment.report_errors(flow, experiment.local_update, "train_loader", "adversary")
    assert "adversary" in experiment.unpack_report(report).failure


def test_an_aggregation_that_forgets_a_tensor_ends_the_run_and_says_which(experiment, run, monkeypatch):
    def forgetful(states, reference):
        state = experiment.fed_avg([*states.values()])
        return [*states], {name: value for name, value in state.items() if name != "classifier.1.bias"}

    monkeypatch.setitem(experiment.AGGREGATIONS, "FedAvg", forgetful)
    with pytest.raises(experiment.Unfit, match=r"what the aggregation FedAvg returns .* differs in classifier.1.bias"):
        run(aggregation="FedAvg", rounds=1)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda states: None, "TypeError: cannot unpack .*aggregate: accepted, state = "),
        (lambda states: next(iter(states.values())), "ValueError: too many values to unpack"),
        (lambda states: (["Zed"], next(iter(states.values()))), "ValueError: Zed is accepted, and has sent no update"),
        (lambda states: ([], {n: v * torch.nan for n, v in states["Detroit"].items()}), ".* is not finite"),
        (lambda states: ([], dict.fromkeys(states["Detroit"], [])), "AttributeError: 'list' object"),
        (lambda states: states["Nobody"], r"KeyError: 'Nobody' \(<lambda>: .*states\[\"Nobody\"\]"),
    ],
)
def test_an_aggregation_that_goes_wrong_is_named(experiment, run, monkeypatch, returned, words):
    """And ends the run, whose model would never change."""
    monkeypatch.setitem(experiment.AGGREGATIONS, "FedAvg", lambda states, reference: returned(states))
    with pytest.raises(RuntimeError, match=f"aggregation FedAvg: {words}"):
        run(aggregation="FedAvg", rounds=1)


def half_frozen(experiment, monkeypatch):
    """From now on the first net has a frozen layer, and BatchNorm."""
    make = experiment.initial_model

    def initial_model(config):
        model = make(config)
        model.features[0].weight.requires_grad_(False)
        model.features.insert(1, torch.nn.BatchNorm2d(config.width))
        return model

    monkeypatch.setattr(experiment, "initial_model", initial_model)


def plain_mean(states, reference):
    """Of three equal numbers not quite that number."""
    stacked = {n: torch.stack([state[n] for state in [*states.values()][:3]]).float() for n in reference}
    return [*states], {n: values.mean(0).to(reference[n].dtype) for n, values in stacked.items()}


def of_floats(states, reference):
    names = [name for name, value in reference.items() if value.is_floating_point()]
    return [*states], {n: torch.stack([state[n] for state in states.values()]).mean(0) for n in names}


@pytest.mark.parametrize("aggregate", [plain_mean, of_floats])
def test_aggregations_need_not_care_for_what_nobody_learns(experiment, run, monkeypatch, aggregate):
    half_frozen(experiment, monkeypatch)
    monkeypatch.setitem(experiment.AGGREGATIONS, "FedAvg", aggregate)
    flow = run(aggregation="FedAvg", rounds=2)
    first, last = experiment.initial_model(flow.config).state_dict(), experiment.load(flow.global_model)
    assert [row["failed"] for row in flow.history] == [{}, {}]
    assert not last["features.4.weight"].equal(first["features.4.weight"].bfloat16().float())
    assert last["features.0.weight"].equal(first["features.0.weight"])


def test_what_the_optimiser_freezes_travels_all_the_same(experiment, run, monkeypatch):
    make = experiment.make_optimizer

    def head_first(model, config, round):
        model.features.requires_grad_(round > 1)
        return make(model, config, round)

    monkeypatch.setattr(experiment, "make_optimizer", head_first)
    assert [row["failed"] for row in run(rounds=2).history] == [{}, {}]


@pytest.mark.parametrize(("changes", "told"), [({}, 1), ({"aggregation": "FedAvg"}, 0), ({"rule": "paper"}, 0)])
def test_it_is_said_once_if_only_logits_tell_colluders(run, caplog, changes, told):
    run(rounds=1, width=8, **changes)
    assert caplog.text.count("no convolution after the first has 64 outputs: only logits tell colluders") == told
