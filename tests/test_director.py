"""The director goes on after experiments that it cannot run, and says why it could not."""

import asyncio
import socket
import zipfile

import pytest
import yaml
from conftest import ROOT, load_module


@pytest.fixture
def server(monkeypatch):
    """Our director, OpenFL's with our kind of experiment."""
    module = load_module("server", ROOT / "director" / "server.py")
    monkeypatch.setattr(module.director, "Experiment", module.Experiment)
    monkeypatch.setattr(module.director, "asyncio", module.ShortNaps())
    monkeypatch.setattr(module.experiment, "asyncio", module.ShortNaps())
    return module


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def archive(folder, name: str, code: str, port: int):
    """What the notebook sends: a plan, and code."""
    settings = {"ticket": f"ticket of {name}", "checkpoint": False}
    plan = {
        "aggregator": {
            "defaults": "",
            "template": "openfl.experimental.workflow.component.Aggregator",
            "settings": {"rounds_to_train": 1},
        },
        "federated_flow": {"template": "src.experiment.Flow", "settings": settings},
        "network": {"settings": {"agg_addr": "localhost", "agg_port": port}},
    }
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as file:
        file.writestr("plan/plan.yaml", yaml.safe_dump(plan))
        file.writestr("src/__init__.py", "")
        file.writestr("src/experiment.py", code)
    return folder / f"{name}.zip"


def flow_states(server, archives) -> list:
    """What the notebook would receive for each of these, sent one after another."""

    async def play():
        director = server.Director(tls=False, install_requirements=False)
        director.ack_envoy_connection_request("Amsterdam")
        loop = asyncio.ensure_future(director.start_experiment_execution_loop())
        states = []
        for path in archives:
            await director.set_new_experiment(path.stem, "experimenter", ["Amsterdam"], path)
            said = [line async for line in director.stream_experiment_stdout(path.stem, "experimenter")]
            states.append((await director._flow_status.get(), said))
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
    states = flow_states(server, [archive(tmp_path, name, code, port) for name in ("first", "second")])
    for name, ((finished, state), said) in zip(("first", "second"), states, strict=True):
        assert not finished and said == []
        assert state.ticket == f"ticket of {name}"
        assert "the director could not run the experiment" in state.error and words in state.error


def test_a_taken_port_is_named(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as owner:
        owner.bind(("", 0))
        owner.listen()
        taken = owner.getsockname()[1]
        [((finished, state), _)] = flow_states(server, [archive(tmp_path, "only", "", taken)])
    assert not finished and f"port {taken} cannot be used" in state.error
