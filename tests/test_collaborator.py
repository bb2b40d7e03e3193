"""A participant's side: whatever goes wrong there is its answer, and it gives up when nobody is there."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from conftest import ROOT, load_module

pytestmark = pytest.mark.slow


@pytest.fixture
def collaborator(monkeypatch):
    module = load_module("collaborator", ROOT / "envoy" / "collaborator.py")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return module


def task(function_name="", number=0, quit=False, message=b"task"):
    return SimpleNamespace(function_name=function_name, round_number=number, quit=quit, execution_environment=message)


class Client:
    """An aggregator with these tasks, which keeps the answers."""

    def __init__(self, *tasks):
        self.tasks, self.answers = [*tasks, task(quit=True)], []

    def get_task(self):
        return self.tasks.pop(0)

    def answer(self, *answer):
        self.answers.append(answer)


class Flow:
    """A flow with one step for participants."""

    def after(self, step):
        return {"train": None}[step]

    def take_task(self, message):
        self.task = SimpleNamespace(round=1, words=message.decode())

    def train(self):
        self.report = f"{self.task.words} of {self.input} with {self.data}".encode()


@pytest.fixture
def take_part(collaborator, tmp_path):
    """Takes part in an experiment with a client's tasks."""

    def run(client, flow=Flow, private=None):
        private = {"data": "images", "memory": {}} if private is None else private
        collaborator.Collaborator("Amsterdam", client, flow, private, tmp_path / "kept").run()

    return run


def test_tasks_are_answered_one_after_the_other_until_it_is_over(take_part):
    client = Client(task("train", 1), task(), task("train", 2, message=b"another"))
    take_part(client)
    reports = [b"task of Amsterdam with images", b"another of Amsterdam with images"]
    assert client.answers == [(1, reports[0], ""), (2, reports[1], "")]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (task("train", 1, message=b"\xff"), "train: UnicodeDecodeError"),
        (task("__init__", 1), "__init__: KeyError"),
        (task("no such step", 1), "no such step: KeyError"),
    ],
)
def test_a_task_that_is_none_is_answered_with_the_reason(take_part, asked, words):
    client = Client(asked)
    take_part(client)
    [(number, report, failure)] = client.answers
    assert (number, report) == (1, b"") and failure.startswith(words)


def test_a_step_that_raises_is_answered_with_the_reason_and_the_next_task_is_taken(take_part):
    client = Client(task("train", 1), task("train", 2))
    take_part(client, private={"memory": {}})
    assert [(number, failure.split(":")[1]) for number, _, failure in client.answers] == [
        (1, " AttributeError"),
        (2, " AttributeError"),
    ]


@pytest.fixture
def participant(collaborator):
    """An envoy's part that prepares an experiment, without a director."""
    made = object.__new__(collaborator.Participant)
    made.name, made.bring, made.runs = "Amsterdam", lambda: {"data": "images", "memory": {}}, Path("runs")
    made.settings = {"name": "Amsterdam", "data": {"seed": 1, "train_samples": None}, "attack": None}
    return made


def plan(protocol=6, run="one"):
    return SimpleNamespace(
        config={"contract": {"protocol": protocol, "run": run}, "federated_flow": {"template": "src.flow.Flow"}}
    )


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """The current folder, with an experiment's code in it."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "src" / "flow.py"
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


def test_every_experiment_runs_its_own_code(participant, workspace):
    for number in (1, 2):
        workspace.write_text(f"class Flow:\n    number = {number}\n" + "#" * number)
        flow, private, folder = participant.prepare(plan())
        assert flow.number == number
        assert private == {"data": "images", "memory": {}} and folder == Path("runs/Amsterdam/one")


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, None])
def test_an_envoy_of_another_protocol_says_so_in_every_answer(collaborator, participant, workspace, protocol):
    workspace.write_text("raise SystemExit('must not run')")
    client = Client(task("train", 1))
    collaborator.Collaborator("Amsterdam", client, *participant.prepare(plan(protocol))).run()
    [(_, report, failure)] = client.answers
    assert report == b"" and f"the experiment speaks protocol {protocol} and envoy/ 6" in failure


@pytest.mark.parametrize("run", ["../../elsewhere", "/elsewhere", "", None, "a" * 101])
def test_a_run_is_kept_in_no_other_folder(participant, workspace, run):
    workspace.write_text("class Flow:\n    pass\n")
    flow, reason, _ = participant.prepare(plan(run=run))
    assert flow is None and "cannot be called" in reason


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": {"seed": 2, "train_samples": None}}, "data.seed is 2, but was 1"),
        ({"attack": {"pdr": 0.5}}, "attack.pdr is 0.5, but was None"),
        (
            {"data": {"seed": 2, "train_samples": None}, "trigger": "noise"},
            "data.seed is 2, but was 1, trigger is noise, but was None",
        ),
    ],
)
def test_a_run_goes_on_with_the_settings_with_which_it_began(participant, workspace, changed, words):
    workspace.write_text("class Flow:\n    pass\n")
    for _ in range(2):
        assert participant.prepare(plan())[0], "the same settings"
    before, participant.settings = participant.settings, participant.settings | changed
    flow, reason, _ = participant.prepare(plan())
    assert flow is None and reason.endswith(words)
    assert re.search(r"began with other settings \(choose them, or remove .*settings.json\)", reason)
    assert participant.prepare(plan(run="two"))[0], "another run"
    participant.settings = before
    assert participant.prepare(plan())[0]


def test_without_a_disk_nobody_is_refused(participant, workspace):
    workspace.write_text("class Flow:\n    pass\n")
    Path("runs").touch()
    assert participant.prepare(plan())[0]


@pytest.mark.parametrize(
    ("code", "words"),
    [("import a_package_that_nobody_has", "a_package_that_nobody_has"), ("raise SystemExit(3)", "SystemExit: 3")],
)
def test_code_that_cannot_be_loaded_is_the_answer(collaborator, participant, workspace, code, words):
    workspace.write_text(code)
    client = Client(task("train", 1))
    collaborator.Collaborator("Amsterdam", client, *participant.prepare(plan())).run()
    assert "cannot take part" in client.answers[0][2] and words in client.answers[0][2]


def test_data_that_are_gone_are_the_answer(collaborator, participant, workspace):
    workspace.write_text("class Flow:\n    pass\n")

    def gone():
        raise ValueError("data.folder: there is no folder images")

    participant.bring, client = gone, Client(task("train", 1))
    collaborator.Collaborator("Amsterdam", client, *participant.prepare(plan())).run()
    assert "data.folder: there is no folder images" in client.answers[0][2]


class NoAnswer(grpc.RpcError):
    """What gRPC raises."""

    def __init__(self, code):
        self.code, self.details = lambda: code, lambda: "words"


def test_the_aggregator_is_tried_thirty_times_in_a_row_and_not_in_all(collaborator):
    client, outcomes = object.__new__(collaborator.AggregatorClient), []
    client.address, client.connect = "localhost:1", lambda: None

    def call():
        if outcomes and outcomes.pop():
            return "answer"
        raise NoAnswer(grpc.StatusCode.UNAVAILABLE)

    for _ in range(3):
        outcomes += [True] + [False] * (collaborator.TRIES - 1)
        assert client.insist(call) == "answer"
    with pytest.raises(ConnectionError, match="no aggregator at localhost:1"):
        client.insist(call)


def test_a_refusal_is_final(collaborator):
    client, tries = object.__new__(collaborator.AggregatorClient), []
    client.address = "localhost:1"

    def call():
        tries.append(1)
        raise NoAnswer(grpc.StatusCode.PERMISSION_DENIED)

    with pytest.raises(ConnectionError, match="the aggregator at localhost:1 refuses: words"):
        client.insist(call)
    assert len(tries) == 1


class Lost(grpc.RpcError):
    """What a director says that has been restarted."""

    def code(self):
        return grpc.StatusCode.NOT_FOUND

    def details(self):
        return "unknown envoy"


def test_a_director_that_has_been_restarted_hears_of_the_envoy_at_once(collaborator, monkeypatch):
    """Else it would take it for offline until the next heartbeat, and a notebook would find nobody."""
    said = []

    def status(request, timeout):
        said.append("heartbeat")
        raise Lost

    stub = SimpleNamespace(
        UpdateEnvoyStatus=status,
        EnvoyConnectionRequest=lambda request: said.append("joins") or SimpleNamespace(accepted=True),
    )
    monkeypatch.setattr(collaborator.DirectorClient, "connect", lambda self: setattr(self, "stub", stub))
    client = collaborator.DirectorClient("localhost:1", "Amsterdam", None)
    assert client.send_health_check("Amsterdam", False) == 0
    assert said == ["heartbeat", "joins"]


class Unreachable(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.UNAVAILABLE


def test_after_a_lost_heartbeat_the_next_one_comes_before_the_envoy_is_missed(collaborator, monkeypatch):
    """The director takes experiments that give up who is silent for two of its periods."""
    period, waited = 4, []

    def status(request, timeout):
        waited.append(timeout)
        if len(waited) == 2:
            raise Unreachable
        return SimpleNamespace(health_check_period=SimpleNamespace(seconds=period))

    stub = SimpleNamespace(UpdateEnvoyStatus=status)
    monkeypatch.setattr(collaborator.DirectorClient, "connect", lambda self: setattr(self, "stub", stub))
    client = collaborator.DirectorClient("localhost:1", "Amsterdam", None)
    pauses = [client.send_health_check("Amsterdam", True) for _ in range(3)]
    assert pauses[0] == pauses[2] == period
    assert pauses[0] + waited[1] + pauses[1] <= 2 * period


def test_certificates_that_are_away_for_a_while_do_not_end_the_heartbeat(collaborator, monkeypatch, caplog):
    def connect(self):
        if hasattr(self, "stub"):
            raise FileNotFoundError("ca.crt")
        self.stub = SimpleNamespace(UpdateEnvoyStatus=lambda request, timeout: (_ for _ in ()).throw(Unreachable()))

    monkeypatch.setattr(collaborator.DirectorClient, "connect", connect)
    client = collaborator.DirectorClient("localhost:1", "Amsterdam", None)
    assert client.send_health_check("Amsterdam", False) == client.period / 2 and "no heartbeat: ca.crt" in caplog.text


class Remembering(Flow):
    """A flow with a step after which the participant remembers the rounds so far."""

    def after(self, step):
        return {"vote": None, "measure": None}[step]

    def take_task(self, message):
        self.task = SimpleNamespace(round=int(message))

    def vote(self):
        past = self.memory["past"].get("Bob", np.zeros(0))
        self.memory["past"] = {"Bob": np.append(past, self.task.round)}
        self.report = b""

    def measure(self):
        self.report = repr(self.memory["past"].get("Bob", np.zeros(0)).tolist()).encode()


def in_round(step, round):
    return task(step, message=str(round).encode())


def remembered(take_part, round, flow=Remembering):
    """What a participant that is started anew in this round remembers."""
    take_part(client := Client(in_round("measure", round)), flow, {"memory": {}})
    return client.answers[0][1].decode()


def test_a_participant_started_anew_remembers_the_rounds_before_the_one_it_is_in(take_part, tmp_path):
    take_part(Client(*(in_round("vote", round) for round in range(1, 6))), Remembering, {"memory": {}})
    assert remembered(take_part, 6) == "[1.0, 2.0, 3.0, 4.0, 5.0]"
    assert remembered(take_part, 4) == "[1.0, 2.0, 3.0]", "the run goes on from an earlier round"
    assert remembered(take_part, 3) == "[]", "no more than three rounds are kept"


def test_who_is_started_anew_between_a_vote_and_the_next_round_has_forgotten_neither(take_part):
    take_part(Client(in_round("vote", 1), in_round("vote", 2)), Remembering, {"memory": {}})
    client = Client(in_round("measure", 2), in_round("vote", 3), in_round("measure", 3))
    take_part(client, Remembering, {"memory": {}})
    assert client.answers[-1][1] == b"[1.0, 2.0, 3.0]"


def test_a_damaged_memory_is_told_and_the_one_before_is_used(take_part, tmp_path, caplog):
    take_part(Client(in_round("vote", 9999), in_round("vote", 10_000)), Remembering, {"memory": {}})
    (last := max((tmp_path / "kept").iterdir())).write_bytes(last.read_bytes()[:20])
    assert remembered(take_part, 10_001) == "[9999.0]" and "cannot be read" in caplog.text


class Odd(Remembering):
    def vote(self):
        self.memory["past"], self.report = {"Bob": "no array"}, b"voted"


@pytest.mark.parametrize("flow", [Remembering, Odd])
def test_what_cannot_be_kept_is_told_and_the_run_goes_on(take_part, tmp_path, caplog, flow):
    if flow is Remembering:
        (tmp_path / "kept").write_text("no folder")
    take_part(client := Client(in_round("vote", 1)), flow, {"memory": {}})
    assert "cannot be kept" in caplog.text and client.answers[0][2] == ""


def test_a_run_that_goes_on_from_an_earlier_round_forgets_the_later_ones(take_part):
    take_part(Client(*(in_round("vote", round) for round in range(1, 9))), Remembering, {"memory": {}})
    take_part(Client(in_round("measure", 7), in_round("vote", 7)), Remembering, {"memory": {}})
    assert remembered(take_part, 9) == "[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]", "8 was in a run that is given up"


def test_so_does_one_that_goes_on_from_far_before(take_part):
    take_part(Client(*(in_round("vote", round) for round in range(1, 13))), Remembering, {"memory": {}})
    take_part(Client(in_round("vote", 5), in_round("vote", 6)), Remembering, {"memory": {}})
    assert remembered(take_part, 8) == "[5.0, 6.0]"


class Transposed(Remembering):
    def vote(self):
        self.memory["past"], self.report = {"Bob": np.arange(6).reshape(2, 3).T}, b""


def test_arrays_in_any_order_come_back_as_they_were(take_part):
    take_part(Client(in_round("vote", 1)), Transposed, {"memory": {}})
    assert remembered(take_part, 2) == "[[0, 3], [1, 4], [2, 5]]"


def test_a_folder_that_cannot_be_read_is_told_and_the_run_goes_on(collaborator, caplog):
    client = Client(in_round("measure", 1))
    collaborator.Collaborator("Amsterdam", client, Remembering, {"memory": {}}, Path("n" * 300)).run()
    assert client.answers == [(0, b"[]", "")] and "cannot be read" in caplog.text
