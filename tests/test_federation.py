"""The launcher: who takes part, and that nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).parent.parent
LAUNCHER = ROOT / "local" / "federation.py"
sys.path[:0] = [str(ROOT / "director"), str(ROOT / "local")]

import certificates  # noqa: E402
import federation  # noqa: E402


def test_four_participants_are_the_four_yaml_files(private_attributes):
    made = federation.participant_settings(4, 1, "localhost:50051")
    for name, settings in made.items():
        written = private_attributes.read_settings(ROOT / "envoy" / f"{name}.yaml")
        assert private_attributes.Settings.model_validate(settings) == written


def test_more_participants_have_more_names_and_a_scale_of_one_over_pmr():
    made = federation.participant_settings(30, 10, "localhost:1", [(["attack", "pdr"], 0.1), (["data", "seed"], 3)])
    assert list(made)[:6] == ["Amsterdam", "Bangalore", "Chandler", "Detroit", "Espoo", "Fairbanks"]
    assert len(set(made)) == 30
    attackers = [name for name, settings in made.items() if "attack" in settings]
    assert attackers == list(made)[20:]
    assert all(made[name]["attack"]["scale"] == 3 for name in attackers)
    assert all(made[name]["attack"]["pdr"] == 0.1 for name in attackers)
    assert [settings["data"]["index"] for settings in made.values()] == list(range(30))
    assert {settings["data"]["seed"] for settings in made.values()} == {3}


def test_certificates_carry_the_names_and_stay_private(tmp_path):
    certificates.make_certificates(tmp_path, "director.example.org", ["Amsterdam"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "Amsterdam.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "Amsterdam"
    director = x509.load_pem_x509_certificate((tmp_path / "director.crt").read_bytes())
    names = director.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "director.example.org" in names.get_values_for_type(x509.DNSName)
    assert all(file.stat().st_mode & 0o77 == 0 for file in tmp_path.glob("*.key"))
    before = (tmp_path / "Amsterdam.crt").read_bytes()
    certificates.make_certificates(tmp_path, "director.example.org", ["Amsterdam", "Late"])
    assert (tmp_path / "Amsterdam.crt").read_bytes() == before
    x509.load_pem_x509_certificate((tmp_path / "Late.crt").read_bytes()).verify_directly_issued_by(authority)


@pytest.fixture
def launch():
    """Starts the launcher; whatever a failing test leaves is killed."""
    running = []

    def start(*arguments):
        command = [sys.executable, LAUNCHER, *arguments]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()


def gone(processes, seconds=30):
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_running(launch, how):
    running = launch("--participants", "2", "--malicious", "0", "--", "sh", "-c", "echo working; sleep 600")
    assert "2 participants are online" in running.stdout.readline()
    assert "working" in running.stdout.readline()
    descendants = psutil.Process(running.pid).children(recursive=True)
    assert len(descendants) >= 5  # guardian, director, two envoys, command
    os.kill(running.pid, how)
    assert gone(descendants)
    running.wait(timeout=10)


def test_an_envoy_that_cannot_start_ends_it_all_and_says_whose_log_to_read(launch):
    running = launch("--set", "attack.pdr=1.5", "--", sys.executable, "-c", "raise SystemExit('must not run')")
    descendants = []
    while running.poll() is None and len(descendants) < 3:
        descendants = psutil.Process(running.pid).children(recursive=True)
        time.sleep(0.1)
    output = running.communicate(timeout=120)[0]
    assert running.returncode == 1
    assert "Detroit ended with exit code 1; its log: " in output
    assert "attack.pdr" in output
    assert "must not run" not in output
    assert gone(descendants)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--malicious", "4"], "--malicious 4"),
        (["--set", "data"], "--set data: must be key=value"),
        (["--set", "data.index=1"], "--set data.index=1: "),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(launch, arguments, words):
    running = launch(*arguments, "--", "true")
    assert words in running.communicate(timeout=60)[0]
    assert running.returncode == 1


@pytest.mark.parametrize("name", ["ca", "director", "experimenter", "../evil", "New York", ""])
def test_names_that_no_participant_may_have_get_no_certificate(tmp_path, name):
    certificates.make_certificates(tmp_path, "localhost", ["Amsterdam"])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="cannot be a participant"):
        certificates.make_certificates(tmp_path, "localhost", [name])
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_the_director_certificate_follows_the_host(tmp_path):
    certificates.make_certificates(tmp_path, "localhost", ["Amsterdam"])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    certificates.make_certificates(tmp_path, "director.example.org", ["Amsterdam"])
    changed = {file.name for file in tmp_path.iterdir() if file.read_bytes() != before[file.name]}
    assert changed == {"director.crt", "director.key"}
    certificates.make_certificates(tmp_path, None, ["Espoo"])
    assert certificates.director_of(tmp_path) == "director.example.org", "who comes later does not move it"


def test_nothing_is_signed_by_a_ca_that_has_expired(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "CA_DAYS", 0)
    certificates.make_certificates(tmp_path, "localhost", ["Amsterdam"])
    with pytest.raises(SystemExit, match="ca.crt is missing or has expired"):
        certificates.make_certificates(tmp_path, "localhost", ["Espoo"])
    assert not (tmp_path / "Espoo.crt").exists()


@pytest.mark.parametrize("text", ["[]", "", "port: yes", "port: 1\nenvoy_health_check_period: 5\nhost: x", "1: 2"])
def test_a_wrong_director_yaml_ends_the_director_with_one_line(tmp_path, text):
    path = tmp_path / "director.yaml"
    path.write_text(text)
    command = [sys.executable, ROOT / "director" / "start.py", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "director.yaml: " in done.stderr
