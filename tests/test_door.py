"""Who may come in: a director as a process, and callers whose certificates, names or software do not fit."""

import datetime
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import psutil
import pytest
import yaml
from conftest import ROOT
from openfl.experimental.workflow.protocols import director_pb2, director_pb2_grpc

from envoy import channel

sys.path.append(str(ROOT / "director"))

import certificates  # noqa: E402
import checkpoints  # noqa: E402

pytestmark = pytest.mark.slow

CODE = grpc.StatusCode


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Running:
    """A director as a process, from a folder of its own or the project's."""

    def __init__(self, folder: Path, program: Path = ROOT / "director", path: str = "", options: tuple = ()):
        self.port, self.folder, self.log = free_port(), folder, folder / "director.log"
        self.address = f"localhost:{self.port}"
        config = folder / "director.yaml"
        config.write_text(yaml.safe_dump({"port": self.port, "envoy_health_check_period": 5}))
        self.process = subprocess.Popen(
            [sys.executable, "-u", program / "start.py", config, "--certificates", folder / "certificates", *options],
            cwd=folder, stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("localhost", self.port)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def says(self, words: str, seconds: float = 10) -> str:
        """The line of the log with these words."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.log.read_text().splitlines():
                if re.search(words, line):
                    return line
            time.sleep(0.1)
        raise AssertionError(f"{words!r} is not in the log:\n{self.log.read_text()}")

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Certificates of ours, and of another CA."""
    folder = tmp_path_factory.mktemp("door")
    certificates.make_certificates(folder / "certificates", "localhost", ["Amsterdam", "Mallory"])
    certificates.make_certificates(folder / "foreign", "localhost", ["Amsterdam"])
    return folder


@pytest.fixture(scope="module")
def director(place):
    running = Running(place)
    yield running
    running.end()


def ours(place, name="Amsterdam"):
    return channel.Identity.of(name, place / "certificates")


def test_another_federation_with_the_same_runs_leaves_the_folder_in_which_this_one_works(place, director):
    other = Running(place)
    other.end()
    assert {folder.name for folder in (place / "runs").glob(".director*")} >= {
        f".director-{running.port}" for running in (director, other)
    }
    assert Path(psutil.Process(director.process.pid).cwd()).name == f".director-{director.port}"


def test_a_folder_to_work_in_loses_nothing_that_is_in_it(place, tmp_path):
    (tmp_path / "mine").write_text("data")
    Running(place, options=("--work", tmp_path)).end()
    assert {path.name[:9] for path in tmp_path.iterdir()} == {"mine", ".director"}


def test_who_fits_is_let_in(place, director):
    channel.handshake(director.address, ours(place))
    channel.greet(director.address, ours(place))


def test_a_name_with_umlauts_is_let_in(place, director, tmp_path):
    shutil.copytree(place / "certificates", tmp_path / "certificates")
    certificates.make_certificates(tmp_path / "certificates", None, ["Zürich"])
    mine = ours(tmp_path, "Zürich")
    channel.handshake(director.address, mine)
    stub = director_pb2_grpc.DirectorStub(channel.open_channel(director.address, mine))
    request = director_pb2.GetExperimentDataRequest(experiment_name="x", collaborator_name="Zürich")
    error = outcome(lambda: stub.GetExperimentData(request, timeout=10))
    assert error.code() is CODE.NOT_FOUND, "which is told to the certificate of Zürich alone"


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_ipv6_director_is_reached_by_its_literal(tmp_path):
    certificates.make_certificates(tmp_path / "certificates", "[::1]", ["Amsterdam"])
    running = Running(tmp_path)
    try:
        address = channel.plain_address(f"[::1]:{running.port}")
        channel.handshake(address, channel.Identity.of("Amsterdam", tmp_path / "certificates"))
        channel.greet(address, channel.Identity.of("Amsterdam", tmp_path / "certificates"))
    finally:
        running.end()


@pytest.mark.parametrize("variable", channel.PROXIES)
def test_a_proxy_that_is_in_the_way_is_named(place, director, monkeypatch, variable):
    for name in (*channel.PROXIES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert channel.around(director.address) == ""
    monkeypatch.setenv(variable, "http://user:secret@127.0.0.1:9")
    channel.handshake(director.address, ours(place))  # by a bare socket
    with pytest.raises(ConnectionError, match=f"goes through the proxy that {variable} names") as said:
        channel.greet(director.address, ours(place))
    assert len(str(said.value).splitlines()) == 1 and "secret" not in str(said.value)
    assert "no_proxy=localhost" in str(said.value)
    monkeypatch.setenv("no_proxy", "localhost")
    channel.greet(director.address, ours(place))


def test_another_ca_is_refused_in_one_line_on_both_sides(place, director):
    foreign = channel.Identity.of("Amsterdam", place / "foreign")
    with pytest.raises(
        ConnectionError, match=f"{director.address} has no certificate that .*ca.crt vouches for"
    ) as said:
        channel.handshake(director.address, foreign)
    assert len(str(said.value).splitlines()) == 1
    port = director.address.rpartition(":")[2]
    with pytest.raises(
        ConnectionError, match="certificates.py --renew director --director 127.0.0.2"
    ):  # where it listens as well
        channel.handshake(f"127.0.0.2:{port}", ours(place))
    mixed = replace(foreign, ca=ours(place).ca)
    with pytest.raises(ConnectionError, match="hangs up: it knows another CA"):
        channel.handshake(director.address, mixed)
    director.says("refused at the door: its certificate has expired or is not signed by our CA")
    with pytest.raises(ValueError, match="Amsterdam.crt: is not signed by ca.crt"):
        mixed.check("Amsterdam")


def test_an_expired_certificate_is_named_before_anybody_is_called(place, tmp_path, monkeypatch):
    shutil.copytree(place / "certificates", tmp_path / "c")
    monkeypatch.setattr(certificates, "CLOCKS_DIFFER", datetime.timedelta(days=2))
    certificates.make_certificates(tmp_path / "c", None, [], days=-1, renew=("Amsterdam",))
    with pytest.raises(
        ValueError, match=r"Amsterdam.crt: is valid from 20..-..-.. to 20..-..-.. only: have it renewed"
    ):
        channel.Identity.of("Amsterdam", tmp_path / "c")
    assert "EXPIRED" in certificates.show_certificates(tmp_path / "c")


def test_the_certificate_of_another_is_named_before_anybody_is_called(place, tmp_path):
    shutil.copytree(place / "certificates", tmp_path / "c")
    shutil.copy(tmp_path / "c" / "Mallory.crt", tmp_path / "c" / "Amsterdam.crt")
    with pytest.raises(ValueError, match="Amsterdam.crt: is the certificate of Mallory, not of Amsterdam"):
        channel.Identity.of("Amsterdam", tmp_path / "c")
    shutil.copy(place / "certificates" / "Amsterdam.crt", tmp_path / "c")
    shutil.copy(tmp_path / "c" / "Mallory.key", tmp_path / "c" / "Amsterdam.key")
    with pytest.raises(ValueError, match="Amsterdam.key: is not the key of Amsterdam.crt"):
        channel.Identity.of("Amsterdam", tmp_path / "c")
    (tmp_path / "c" / "Amsterdam.key").write_text("no key")
    with pytest.raises(ValueError, match="Amsterdam.key: cannot be read"):
        channel.Identity.of("Amsterdam", tmp_path / "c")


def test_no_participant_passes_for_the_director(tmp_path):
    """Not even one that is called as its host."""
    certificates.make_certificates(tmp_path / "certificates", "localhost", ["Amsterdam", "localhost"])
    for part in ("crt", "key"):
        shutil.copy(tmp_path / "certificates" / f"localhost.{part}", tmp_path / "certificates" / f"director.{part}")
    running = Running(tmp_path)
    try:
        with pytest.raises(ConnectionError, match="has no certificate that"):
            channel.handshake(running.address, channel.Identity.of("Amsterdam", tmp_path / "certificates"))
        with pytest.raises(ConnectionError, match="refuses"):
            channel.greet(running.address, channel.Identity.of("Amsterdam", tmp_path / "certificates"))
    finally:
        running.end()


def test_a_pki_of_one_s_own_will_do(place, tmp_path):
    """A root, and an authority below it that has signed everybody."""
    own, files = tmp_path / "certificates", {}
    own.mkdir()
    for name, above in {"root": None, "between": "root", "director": "between", "Amsterdam": "between"}.items():
        key = certificates.ec.generate_private_key(certificates.ec.SECP256R1())
        issuer, issuer_key = (above, files[above][1]) if above else (name, key)
        authority = name in ("root", "between")
        extensions = [(certificates.x509.BasicConstraints(ca=authority, path_length=None), True)]
        if name == "director":
            host = certificates.x509.SubjectAlternativeName([certificates.alternative_name("localhost")])
            extensions.append((host, False))
        made = certificates.issue(name, key, certificates.common_name(issuer), issuer_key, 30, extensions)
        files[name] = made.public_bytes(certificates.serialization.Encoding.PEM), key
    (own / "ca.crt").write_bytes(files["root"][0])
    for name in ("director", "Amsterdam"):
        (own / f"{name}.crt").write_bytes(files[name][0] + files["between"][0])
        certificates.write_private(own / f"{name}.key", files[name][1])
    running = Running(tmp_path)
    try:
        identity = channel.Identity.of("Amsterdam", own)
        channel.handshake(running.address, identity)
        channel.greet(running.address, identity)
    finally:
        running.end()
    (own / "Amsterdam.crt").write_bytes(files["Amsterdam"][0])  # without the authority between
    with pytest.raises(ValueError, match="Amsterdam.crt: is not signed by ca.crt"):
        channel.Identity.of("Amsterdam", own)


def test_without_certificate_or_tls_nobody_comes_in(place, director):
    bare = grpc.ssl_channel_credentials(ours(place).ca.read_bytes())
    for opened in (grpc.secure_channel(director.address, bare), grpc.insecure_channel(director.address)):
        with pytest.raises(grpc.RpcError):
            director_pb2_grpc.DirectorStub(opened).GetEnvoys(director_pb2.GetEnvoysRequest(), timeout=5)
    director.says("refused at the door: it has no certificate")
    director.says("refused at the door: it speaks no TLS")
    with socket.create_server(("localhost", 0)) as deaf, pytest.raises(ConnectionError, match="nobody answers at"):
        deaf.settimeout(0)
        address = f"localhost:{deaf.getsockname()[1]}"
        deaf.close()
        channel.handshake(address, ours(place))


IN_ANOTHER_NAME = {
    "EnvoyConnectionRequest": director_pb2.SendConnectionRequest(envoy_name="Amsterdam"),
    "UpdateEnvoyStatus": director_pb2.UpdateEnvoyStatusRequest(name="Amsterdam"),
    "WaitExperiment": director_pb2.WaitExperimentRequest(collaborator_name="Amsterdam"),
    "GetExperimentData": director_pb2.GetExperimentDataRequest(experiment_name="x", collaborator_name="Amsterdam"),
    "GetEnvoys": director_pb2.GetEnvoysRequest(),
    "GetFlowState": director_pb2.GetFlowStateRequest(),
    "GetExperimentStdout": director_pb2.GetExperimentStdoutRequest(experiment_name="x"),
    "SetNewExperiment": iter([director_pb2.ExperimentInfo(name="x")]),
}


def outcome(call):
    """How a call ends, be it answered once or in a stream."""
    try:
        answer = call()
        return list(answer) if hasattr(answer, "__next__") else answer
    except grpc.RpcError as error:
        return error


@pytest.mark.parametrize("rpc", IN_ANOTHER_NAME)
def test_a_call_is_answered_for_the_certificate_s_own_name_alone(place, director, rpc):
    stub = director_pb2_grpc.DirectorStub(channel.open_channel(director.address, ours(place, "Mallory")))
    error = outcome(lambda: getattr(stub, rpc)(IN_ANOTHER_NAME[rpc], timeout=10))
    assert error.code() is CODE.PERMISSION_DENIED and "for the certificate of" in error.details()
    director.says(r"Mallory at ipv.*:\d+ has called in the name of '(Amsterdam|experimenter)'")


def test_every_call_of_the_director_is_tried_above():
    calls = {name for name in vars(director_pb2_grpc.DirectorServicer) if name[0].isupper()}
    assert calls == {*IN_ANOTHER_NAME, "ConnectRuntime"}, "which OpenFL answers to nobody"


def test_an_experiment_is_given_to_its_participants_alone(place, director):
    stub = director_pb2_grpc.DirectorStub(channel.open_channel(director.address, ours(place, "Mallory")))
    request = director_pb2.GetExperimentDataRequest(experiment_name="../../etc/passwd", collaborator_name="Mallory")
    error = outcome(lambda: stub.GetExperimentData(request, timeout=10))
    assert error.code() is CODE.NOT_FOUND and "etc" not in error.details()


def test_an_experiment_that_is_there_is_not_given_to_others(place, director):
    def stub(name):
        return director_pb2_grpc.DirectorStub(channel.open_channel(director.address, ours(place, name)))

    contract, network = {"protocol": channel.PROTOCOL}, {"settings": {"agg_port": director.port}}  # which is taken
    with zipfile.ZipFile(waits_for_its_port := io.BytesIO(), "w") as file:
        file.writestr("plan/plan.yaml", yaml.safe_dump({"contract": contract, "network": network}))
    for experiment, archive in (("first", waits_for_its_port.getvalue()), ("theirs", b"archive")):
        sent = director_pb2.ExperimentInfo(name=experiment, collaborator_names=["Amsterdam"])
        sent.experiment_data.size, sent.experiment_data.exp_data = len(archive), archive
        assert stub("experimenter").SetNewExperiment(iter([sent]), timeout=10).status
    for name in ("Amsterdam", "Mallory"):
        request = director_pb2.GetExperimentDataRequest(experiment_name="theirs", collaborator_name=name)
        got = outcome(lambda name=name, request=request: stub(name).GetExperimentData(request, timeout=10))
        if name == "Amsterdam":
            assert [part.exp_data for part in got] == [b"archive"]
        else:
            assert got.code() is CODE.NOT_FOUND


def test_a_certificate_without_a_name_is_nobody_s(place, director, tmp_path):
    key = certificates.ec.generate_private_key(certificates.ec.SECP256R1())
    authority = certificates.common_name("FederatedCrowdGuard CA")
    _, ca_key = certificates.certificate_authority(place / "certificates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "common_name", lambda name: certificates.x509.Name([]))
        made = certificates.issue("", key, authority, ca_key, 30, [])
    (tmp_path / "no.crt").write_bytes(made.public_bytes(certificates.serialization.Encoding.PEM))
    certificates.write_private(tmp_path / "no.key", key)
    nameless = channel.Identity(place / "certificates" / "ca.crt", tmp_path / "no.crt", tmp_path / "no.key")
    stub = director_pb2_grpc.DirectorStub(channel.open_channel(director.address, nameless))
    error = outcome(lambda: stub.EnvoyConnectionRequest(director_pb2.SendConnectionRequest(envoy_name=""), timeout=10))
    assert error.code() is CODE.PERMISSION_DENIED


# --- Software that does not fit -------------------------------------------------------------------------------------


def notebook_side(director, place, monkeypatch):
    """The experimenter's module, for this director."""
    import experimenter.connect as connect

    monkeypatch.setattr(connect, "DIRECTOR", director.address)
    monkeypatch.setattr(connect, "CERTIFICATES", place / "certificates")
    return connect


@pytest.mark.parametrize(("facts", "words"), [
    ((("protocol", "1"), ("openfl", "1.9")), "it has protocol 1, not 6"),
    ((("protocol", "6"), ("openfl", "1.8")), "it has openfl 1.8, not 1.9"),
    ((), "it has protocol unknown, not 6 and openfl unknown, not 1.9"),
])  # fmt: skip
def test_a_stale_envoy_is_refused_in_one_line_that_reaches_the_notebook(
    place, director, monkeypatch, caplog, facts, words
):
    with monkeypatch.context() as old:
        old.setattr(channel, "OURS", facts)
        with pytest.raises(ConnectionError, match=words) as said:
            channel.greet(director.address, ours(place))
    assert len(str(said.value).splitlines()) == 1
    director.says(rf"Amsterdam at ipv.*:\d+ is refused: {words}")
    federation = notebook_side(director, place, monkeypatch).Federation()
    assert federation.collaborators == []
    assert f"Amsterdam was refused: {words}" in caplog.text
    channel.greet(director.address, ours(place))
    caplog.clear()
    assert federation.get_envoys() == [] and "refused" not in caplog.text, "it has come again, updated"


def test_the_envoy_itself_ends_with_that_line(place, director, tmp_path):
    (tmp_path / "openfl-1.8.dist-info").mkdir()
    (tmp_path / "openfl-1.8.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: openfl\nVersion: 1.8\n")
    settings = tmp_path / "Amsterdam.yaml"
    settings.write_text(f"name: Amsterdam\ndirector: {director.address}\n")
    command = [sys.executable, ROOT / "envoy" / "start.py", settings, "--certificates", place / "certificates"]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert ended.returncode == 1 and "openfl 1.8, not 1.9" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr


@pytest.mark.parametrize(("old", "new", "words"), [
    ("PROTOCOL = 6", "PROTOCOL = 1", "protocol 1, not 6|protocol 6, not 1"),
    ('OPENFL = "1.9"', 'OPENFL = "1.10"', "the director has OpenFL 1.9 and needs 1.10"),
])  # fmt: skip
def test_a_stale_director_is_refused_in_one_line_that_reaches_the_notebook(
    place, tmp_path, monkeypatch, old, new, words
):
    """A copy of director/ with another number; and one for which the OpenFL beside it is the wrong one."""
    shutil.copytree(ROOT / "director", tmp_path / "director")
    for file in ("aggregator.py", "start.py"):
        text = (tmp_path / "director" / file).read_text()
        (tmp_path / "director" / file).write_text(text.replace(old, new))
    shutil.copytree(place / "certificates", tmp_path / "certificates")
    stale = Running(tmp_path, tmp_path / "director")
    try:
        connect = notebook_side(stale, place, monkeypatch)
        with pytest.raises(ConnectionError, match=words) as said:
            connect.connect()
        assert len(str(said.value).splitlines()) == 1
        with pytest.raises(ConnectionError, match=words):
            channel.greet(stale.address, ours(place))
    finally:
        stale.end()


@pytest.mark.parametrize("name", ["experimenter", "director"])
def test_a_certificate_that_is_no_participant_s_takes_no_part(place, director, monkeypatch, name):
    stub = director_pb2_grpc.DirectorStub(channel.open_channel(director.address, ours(place, name)))
    request = director_pb2.SendConnectionRequest(envoy_name=name)
    error = outcome(lambda: stub.EnvoyConnectionRequest(request, timeout=10))
    assert error.code() is CODE.PERMISSION_DENIED and "is no participant's name" in error.details()
    assert name not in notebook_side(director, place, monkeypatch).Federation().collaborators


@pytest.mark.parametrize(("lasts", "calls"), [([700, 0], 2), ([5, 5, 700, 0], 4), ([5] * 300, 120)])
def test_an_outage_is_counted_from_its_begin(place, director, monkeypatch, lasts, calls):
    """A stream that breaks after hours has not been silent for so long; a director that is away is given up."""
    connect = notebook_side(director, place, monkeypatch)
    federation, now, made = connect.Federation(), [0.0], []
    federation.name = "mine"

    class Broken(grpc.RpcError):
        def code(self):
            return CODE.UNAVAILABLE

        def details(self):
            return "Socket closed"

    def call():
        made.append(lasts[len(made)])
        now[0] += made[-1]
        if made[-1]:
            raise Broken
        return "answer"

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(connect, "time", clock)
    if 0 in lasts:
        assert federation.insist(call) == "answer"
    else:
        with pytest.raises(ConnectionError, match="no answer from .* for 600 s"):
            federation.insist(call)
    assert abs(len(made) - calls) <= 2


def test_an_experiment_that_cannot_be_submitted_ends_in_one_line(place, director, monkeypatch, tmp_path):
    """The experimenter's certificate is exchanged in between; and then the director is gone."""
    connect = notebook_side(director, place, monkeypatch)
    federation = connect.Federation()
    archive = tmp_path / "experiment.zip"
    for identity, address, words in (
        (ours(place, "Mallory"), director.address, "this is for the certificate of"),
        (ours(place, "Amsterdam"), f"localhost:{free_port()}", "refuses: "),
    ):
        archive.write_bytes(b"archive")
        monkeypatch.setattr(connect, "DIRECTOR", address)
        federation._runtime_dir_client = connect.DirectorClient(identity)
        with pytest.raises(ConnectionError, match=f"the director at {address} .*{words}") as said:
            federation.submit_experiment(archive, "mine")
        assert len(str(said.value).splitlines()) == 1 and not archive.exists()


def test_ctrl_c_in_the_middle_of_a_call_does_not_keep_the_run_from_being_stopped(place, director, monkeypatch, caplog):
    """The interrupted call's lock may stay taken, and the thread that serves its channel then waits for it for ever."""
    federation = notebook_side(director, place, monkeypatch).Federation()
    federation.name = "an experiment"

    taken = []

    def interrupted():
        taken.append(federation._runtime_dir_client.lines(federation.name, 0)._state.condition)
        taken[0].acquire()
        time.sleep(1)
        raise KeyboardInterrupt

    def wait():
        with pytest.raises(KeyboardInterrupt):
            federation.get_flow_state()
        taken[0].release()

    monkeypatch.setattr(federation, "follow", interrupted)
    notebook = threading.Thread(target=wait, daemon=True)
    notebook.start()
    notebook.join(20)
    assert not notebook.is_alive() and "stopping the run" in caplog.text


@pytest.mark.parametrize(("address", "words"), [
    ("localhost", "CROWDGUARD_DIRECTOR: 'localhost' is not host:port"),
    ("größe.example.org:1", "größe.example.org:1 must be written as xn--gre-6ka8i.example.org:1"),
])  # fmt: skip
def test_an_address_that_is_none_is_told_to_the_notebook(place, monkeypatch, address, words):
    import experimenter.connect as connect

    monkeypatch.setattr(connect, "DIRECTOR", address)
    with pytest.raises(ConnectionError, match=words):
        connect.assert_director()


def test_a_run_of_which_nothing_is_kept_is_refused_before_anything_is_done(place, director, monkeypatch):
    connect = notebook_side(director, place, monkeypatch)
    connect.assert_director()
    for run, words in (
        ("run-of-nobody", "refuses: nothing is kept of a run run-of-nobody"),
        ("-run", "refuses: a run cannot be called '-run'"),
        ("../runs", "RESUME=../runs: a run's name has letters"),
        ("run-ä", "RESUME=run-ä: a run's name has letters"),
    ):
        with pytest.raises(ConnectionError, match=re.escape(words)):
            connect.assert_director(run)
    folder = place / "runs" / "run-1"
    checkpoints.save(folder, 1, {}, b"")
    connect.assert_director("run-1")
    checkpoints.save(folder, 1, {"settings": {"seed": 10}}, b"")
    connect.assert_director("run-1", SimpleNamespace(seed=10, rounds=20))  # which may have become another
    with pytest.raises(ConnectionError, match="refuses: the run that shall go on has seed 10, not 3"):
        connect.assert_director("run-1", SimpleNamespace(seed=3, rounds=20))
    with pytest.raises(ConnectionError, match="participant_timeout is 1 s, and heartbeats come every"):
        connect.assert_director(config=SimpleNamespace(participant_timeout=1))
    with pytest.raises(ConnectionError, match="the latest are run-1"):
        connect.assert_director("run-2")


@pytest.mark.parametrize(
    "settings", ["[1]", "5", "null", "x", "[" * 5_000, '{"participant_timeout": NaN}', '{"participant_timeout": []}']
)
def test_settings_that_are_none_are_refused_too(place, director, monkeypatch, settings):
    connect = notebook_side(director, place, monkeypatch)
    stub = connect.DirectorClient(connect.identity()).stub
    with pytest.raises(grpc.RpcError) as said:
        stub.GetEnvoys(connect.director_pb2.GetEnvoysRequest(), metadata=(("settings", settings),))
    assert said.value.code() is grpc.StatusCode.NOT_FOUND and said.value.details()


def test_certificates_can_be_renewed_and_listed(place, tmp_path):
    shutil.copytree(place / "certificates", tmp_path / "c")
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    command = [sys.executable, ROOT / "director" / "certificates.py", "--folder", tmp_path / "c"]
    subprocess.run([*command, "--renew", "Mallory", "--days", "30"], check=True, capture_output=True)
    changed = {path.name for path in (tmp_path / "c").iterdir() if before[path.name] != path.read_bytes()}
    assert changed == {"Mallory.crt", "Mallory.key"}
    channel.Identity.of("Mallory", tmp_path / "c")
    listed = subprocess.run([*command, "--list"], check=True, capture_output=True, text=True).stdout
    assert re.search(r"Mallory.crt +Mallory +until 20..-..-.., 29 days left +SHA-256 [0-9a-f:]+", listed)
    assert [line.split()[0] for line in listed.splitlines()] == sorted(
        ["Amsterdam.crt", "Mallory.crt", "ca.crt", "director.crt", "experimenter.crt"]
    )


def test_a_key_is_its_owner_s_alone_and_fits_its_certificate(place, tmp_path):
    """Whatever rights the last one had, and though a call was interrupted between the two files."""
    shutil.copytree(place / "certificates", tmp_path / "c")
    key, before = tmp_path / "c" / "Mallory.key", (tmp_path / "c" / "Amsterdam.key").read_bytes()
    key.chmod(0o644)
    certificates.make_certificates(tmp_path / "c", None, ["Mallory"], renew=("Mallory",))
    assert key.stat().st_mode & 0o777 == 0o600
    key.write_bytes(before)
    certificates.make_certificates(tmp_path / "c", None, ["Amsterdam", "Mallory"])
    channel.Identity.of("Mallory", tmp_path / "c")
    with pytest.raises(SystemExit, match="--renew Malory: there is no .*Malory.crt"):
        certificates.make_certificates(tmp_path / "c", None, [], renew=("Malory",))
    assert key.read_bytes() != before == (tmp_path / "c" / "Amsterdam.key").read_bytes()
