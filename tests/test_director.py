"""The director goes on after experiments that it cannot run, and says why it could not."""

import asyncio
import contextlib
import socket
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_module

pytestmark = pytest.mark.slow


@pytest.fixture
def server():
    return load_module("server", ROOT / "director" / "server.py")


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def archive(folder, name: str, code: str, port: int, protocol: int = 6, resume: bool = False):
    """What the notebook sends: a plan, and code."""
    plan = {
        "aggregator": {"defaults": "", "template": "", "settings": {"rounds_to_train": 1}},
        "federated_flow": {"template": "src.experiment.Flow", "settings": {}},
        "network": {"settings": {"agg_addr": "localhost", "agg_port": port}},
        "contract": {"protocol": protocol, "run": name, "resume": resume},
    }
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
        file.writestr("plan/plan.yaml", yaml.safe_dump(plan))
        file.writestr("src/__init__.py", "")
        file.writestr("src/experiment.py", code)
    return folder / f"{name}.zip"


def states_of(server, archives, runs="runs") -> list:
    """What the notebook would receive for each of these, sent at once, and what it would be told."""

    async def play():
        director = server.Director(runs=Path(runs), tls=False)
        director.ack_envoy_connection_request("Amsterdam")
        loop = asyncio.ensure_future(director.start_experiment_execution_loop())
        for path in archives:
            await director.set_new_experiment(path.stem, "experimenter", ["Amsterdam"], path)
        states = []
        for path in archives:
            known = director.experiments_registry[path.stem]
            await server.until(lambda known=known: known.state)
            states.append((known.state, [line["stdout_value"] for line in known.said]))
        with pytest.raises(TimeoutError):  # nobody is sent to an aggregator that is not there
            await asyncio.wait_for(director.wait_experiment("Amsterdam"), timeout=1)
        assert not loop.done()
        loop.cancel()
        return states

    return asyncio.run(play())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import a_package_that_nobody_has", "a_package_that_nobody_has"),
        ("raise SystemExit('no more')", "no more"),
        ("Flow = 1 / 0", "division by zero"),
    ],
)
def test_an_experiment_that_cannot_be_loaded_is_reported_and_the_next_one_is_taken(
    server, tmp_path, monkeypatch, port, code, words
):
    monkeypatch.chdir(tmp_path)
    states = states_of(server, [archive(tmp_path, name, code, port) for name in ("first", "second")])
    for state, _ in states:
        assert "the director could not run the experiment" in state.error and words in state.error
    assert "before this one; it waits for its turn" in states[1][1][0], "the second is told so"


def test_a_taken_port_is_named(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as owner:
        owner.bind(("", 0))
        owner.listen()
        taken = owner.getsockname()[1]
        [(state, _)] = states_of(server, [archive(tmp_path, "only", "", taken)])
    assert f"port {taken} cannot be used" in state.error


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5, None, "6"])
def test_a_notebook_of_another_protocol_is_refused_in_one_line(server, tmp_path, monkeypatch, port, protocol):
    monkeypatch.chdir(tmp_path)
    [(state, _)] = states_of(server, [archive(tmp_path, "only", "raise SystemExit('must not run')", port, protocol)])
    assert f"the notebook speaks protocol {protocol}, the director 6" in state.error
    assert len(state.error.splitlines()) == 1


@pytest.mark.parametrize(
    ("hidden", "told", "words"),
    [
        (512, [
            "1 rounds of only are done", "it goes on with Amsterdam, who was not in it before",
            "it goes on without Bangalore, until they are there",
        ], ""),
        (256, [], "has hidden 512, not 256: choose the same settings"),
    ],
)  # fmt: skip
def test_a_run_goes_on_with_the_same_settings_and_says_who_is_new(
    server, tmp_path, monkeypatch, port, hidden, told, words
):
    monkeypatch.chdir(tmp_path)
    state = {"settings": {"hidden": 512}, "participants": ["Bangalore"], "history": [{"round": 1}]}
    server.checkpoints.save(tmp_path / "runs" / "only", 1, state, b"model")
    code = f"class Flow:\n    def settings(self):\n        return {{'hidden': {hidden}}}\n"
    [(state, said)] = states_of(server, [archive(tmp_path, "only", code, port, resume=True)], tmp_path / "runs")
    assert said[:3] == told and words in state.error


def test_a_run_of_many_rounds_goes_on_from_its_last(server, tmp_path):
    for round in (9999, 10_000, 10_001):
        server.checkpoints.save(tmp_path / "run-1", round, {"round": round}, b"model")
    assert server.checkpoints.load(tmp_path / "run-1")[0] == {"round": 10_001}
    assert len(server.checkpoints.rounds(tmp_path / "run-1")) == server.checkpoints.KEPT


def test_a_run_that_waits_for_its_turn_can_be_stopped_at_once(server, tmp_path, monkeypatch, port):
    monkeypatch.chdir(tmp_path)

    async def play():
        director = server.Director(runs=tmp_path / "runs", tls=False)
        await director.set_new_experiment("one", "experimenter", [], archive(tmp_path, "one", "1 / 0", port))
        waiting = director.experiments_registry.get("one")
        waiting.stop("stopped by the experimenter")
        at_once = waiting.state
        loop = asyncio.ensure_future(director.start_experiment_execution_loop())
        await server.until(lambda: not director.experiments_registry.pending and not waiting.archive_path.exists(), 20)
        loop.cancel()
        return at_once, waiting.state

    at_once, later = asyncio.run(play())
    assert at_once.error == later.error == "InterruptedError: stopped by the experimenter"
    assert not (tmp_path / "one.zip").exists(), "nothing is left of it"


@pytest.mark.parametrize(
    ("timeout", "period", "fits"), [(60, 1, True), (60, 30, True), (60, 31, False), (1.5, 1, False)]
)
def test_who_would_be_given_up_between_two_heartbeats_is_not_asked(server, timeout, period, fits):
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="at least twice that"):
        server.check_heartbeats(timeout, period)


def test_the_last_results_are_kept_and_older_ones_go(server, tmp_path, monkeypatch, port):
    """A notebook that comes late gets its own result, whatever others have left behind."""
    monkeypatch.chdir(tmp_path)

    async def play():
        director = server.Director(runs=tmp_path / "runs", tls=False)
        loop = asyncio.ensure_future(director.start_experiment_execution_loop())
        names = [f"run{i}" for i in range(server.KEPT + 2)]
        for name in names:
            path = archive(tmp_path, name, f"raise ValueError({name!r})", port)
            await director.set_new_experiment(name, "experimenter", [], path)
        known = director.experiments_registry
        await server.until(lambda: names[0] not in known and names[1] not in known, 30)
        loop.cancel()
        return {name: known[name].state.error for name in names if name in known}

    errors = asyncio.run(play())
    assert list(errors) == [f"run{i}" for i in range(2, server.KEPT + 2)]
    assert all(f"ValueError: {name}" in error for name, error in errors.items())


def test_a_director_that_has_stood_still_takes_nobody_for_silent(server, tmp_path):
    """What it did not hear while it was stopped, or imported an experiment, is nobody's fault."""

    async def play():
        director = server.Director(runs=tmp_path, tls=False)
        loop = asyncio.ensure_future(director.start_experiment_execution_loop())
        director.ack_envoy_connection_request("Amsterdam")
        director.ack_envoy_connection_request("Bangalore")
        await asyncio.sleep(0.5)
        time.sleep(5)
        await asyncio.sleep(0.5)
        stood_still = director.silence("Amsterdam")
        await asyncio.sleep(2)
        director.update_envoy_status(envoy_name="Bangalore", is_experiment_running=False)
        loop.cancel()
        return stood_still, director.silence("Amsterdam"), director.silence("Bangalore")

    stood_still, silent, heard = asyncio.run(play())
    assert stood_still < 4 and heard < 0.5
    assert silent - stood_still > 1.5, "in these two seconds it could have been heard"


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"seed": 3, "middle layers": []}, "has seed 3, not 10: choose the same settings"),
        ({"seed": 10}, "was kept by a version that knows no middle layers: start a new one"),
    ],
)
def test_a_run_that_goes_on_with_something_else_is_refused(server, kept, words):
    now = {"seed": 10, "middle layers": []}
    server.check_settings(now | {"message_mb": 1}, now)
    with pytest.raises(ValueError, match=words):
        server.check_settings(kept, now)
