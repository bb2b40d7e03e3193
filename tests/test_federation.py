"""The launcher: who takes part, and that nothing is left running."""

import inspect
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import load_module
from cryptography import x509
from cryptography.x509.oid import NameOID

from envoy import channel

ROOT = Path(__file__).parent.parent
LAUNCHER = ROOT / "local" / "federation.py"
sys.path[:0] = [str(ROOT / "director"), str(ROOT / "local")]

import certificates  # noqa: E402
import federation  # noqa: E402

pytestmark = pytest.mark.slow


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


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Three YAML files of an owner's own, two with an attack."""
    monkeypatch.setattr(federation, "ROOT", tmp_path)
    (tmp_path / "envoy").mkdir()
    for name, rest in (
        ("Ann", "attack: {scale: 1, first_round: 2}"),
        ("Bob", "data: {index: 7}"),
        ("Cy", "attack: {}"),
    ):
        (tmp_path / "envoy" / f"{name}.yaml").write_text(f"name: {name}\ndirector: x:1\n{rest}\n")
    return tmp_path / "envoy"


def test_files_are_obeyed(written):
    made = federation.participant_settings(None, None, "localhost:1")
    assert made["Ann"]["attack"] == {"scale": 1, "first_round": 2} and made["Cy"]["attack"] == {}
    assert "attack" not in made["Bob"] and made["Bob"]["data"] == {"index": 1, "participants": 3}
    assert federation.participant_settings(3, 2, "localhost:1") == made


def test_other_numbers_than_files_make_the_last_ones_attack_together(written):
    made = federation.participant_settings(3, 1, "localhost:1")
    assert [name for name in made if "attack" in made[name]] == ["Cy"]
    assert made["Cy"]["attack"] == {"scale": 3, "first_round": 2, "accomplices": ["Cy"]}
    assert not any("attack" in mine for mine in federation.participant_settings(3, 0, "localhost:1").values())
    for file in written.iterdir():
        file.write_text(file.read_text().partition("attack")[0])
    made = federation.participant_settings(5, 2, "x:1")
    assert list(made) == ["Ann", "Bob", "Cy", "Amsterdam", "Bangalore"]
    assert made["Bangalore"]["attack"] == {"scale": 2.5, "accomplices": ["Amsterdam", "Bangalore"]}


def test_who_does_not_take_part_is_not_counted(written):
    assert ["attack" in mine for mine in federation.participant_settings(2, None, "x:1").values()] == [False, True]
    assert ["attack" in mine for mine in federation.participant_settings(1, None, "x:1").values()] == [False]
    (written / "._Bob.yaml").write_bytes(b"\xff")  # of another system
    assert list(federation.participant_settings(None, None, "x:1")) == ["Ann", "Bob", "Cy"]


def test_an_empty_file_has_the_default_values_and_not_another_one_s(written):
    (written / "Ann.yaml").write_text("name: Ann\ndirector: x:1\ntrigger: noise\n")
    (written / "Bob.yaml").write_text("")
    made = federation.participant_settings(4, None, "x:1")
    assert "trigger" not in made["Bob"] and made["Amsterdam"]["trigger"] == "noise"


def test_settings_are_no_sections(written):
    with pytest.raises(SystemExit, match=r"trigger.x \(ENVOY=…, --set\): trigger has no keys"):
        federation.participant_settings(None, None, "x:1", [(["trigger"], "noise"), (["trigger", "x"], 1)])
    with pytest.raises(SystemExit, match="director.host is not one setting"):
        federation.parse_override("director.host=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: Ann\n\tdata: {}", "not YAML"),
        ("attack:", "attack: must hold keys"),
        ("data: 5", "data: must hold keys"),
        ("- Ann", "the file: must hold keys"),
        ("data: {folder: 5}", "data.folder: 5 is no path"),
        ("data: {}\ndata: {}", "'data' is there twice"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(written, text, words):
    (written / "Ann.yaml").write_text(text)
    with pytest.raises(SystemExit, match=words) as said:
        federation.participant_settings(None, None, "localhost:1")
    assert str(said.value).startswith(str(written / "Ann.yaml")) and "\n" not in str(said.value)


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
    running = launch("--participants", "1", "--malicious", "0", "--", "sh", "-c", "echo working; sleep 600")
    assert "1 participants are online" in running.stdout.readline()
    assert "working" in running.stdout.readline()
    descendants = psutil.Process(running.pid).children(recursive=True)
    assert len(descendants) >= 4  # guardian, director, envoy, command
    os.kill(running.pid, how)
    assert gone(descendants)
    running.wait(timeout=10)


def test_nothing_is_left_of_a_federation_that_was_stopped_while_it_started(launch):
    running = launch("--participants", "1", "--malicious", "0", "--", "true")
    while not (begun := psutil.Process(running.pid).children()):
        assert running.poll() is None
        time.sleep(0.05)
    while "guardian.py" not in " ".join(begun[0].cmdline()):  # before that it is still the launcher's own
        time.sleep(0.05)
    folder = Path(begun[0].cmdline()[-1]).parent
    assert folder.exists()
    for _ in range(2):  # who is impatient presses it again
        running.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert running.wait(timeout=60) == 130 and not folder.exists()


@pytest.mark.parametrize("python", ["python3.10", "python3.13"])
def test_another_python_is_refused_before_anything_is_installed(tmp_path, python):
    """As `make` finds it: a program that says it is another one."""
    program, version = tmp_path / python, python.removeprefix("python3.")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, {version}); $2"\n')
    program.chmod(0o755)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for file in ("requirements.txt", "envoy/requirements.txt", "director/requirements.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    made = subprocess.run(["make", ".venv/ready", f"PYTHON={program}"], cwd=tmp_path, capture_output=True, text=True)
    assert f"is Python 3.{version}: choose another one" in made.stderr and not (tmp_path / ".venv").exists()


def test_an_envoy_that_cannot_start_ends_it_all_and_says_whose_log_to_read(launch):
    running = launch("--set", "attack.pdr=1.5", "--", sys.executable, "-c", "raise SystemExit('must not run')")
    descendants = []
    while running.poll() is None and len(descendants) < 3:
        descendants = psutil.Process(running.pid).children(recursive=True)
        time.sleep(0.1)
    output = running.communicate(timeout=120)[0]
    assert running.returncode == 1
    assert "Detroit ended with exit code 1; its log: " in output
    assert (
        "attack.pdr: Input should be" in output
        and "chosen for all participants (ENVOY=…, --set): attack.pdr=1.5" in output
    )
    assert "must not run" not in output
    assert gone(descendants)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--malicious", "4"], "MALICIOUS=4 of PARTICIPANTS=4"),
        (["--participants", "0"], "PARTICIPANTS=0 (--participants): must be at least 1"),
        (["--set", "data"], "data (ENVOY=…, --set): must be key=value"),
        (["--set", "trigger=noise", "--set", "trigger=none"], "trigger (ENVOY=…, --set): is given twice"),
        (["--set", "data.index=1"], "data.index=1 (ENVOY=…, --set): "),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(launch, arguments, words):
    running = launch(*arguments, "--", "true")
    assert words in running.communicate(timeout=60)[0]
    assert running.returncode == 1


@pytest.mark.parametrize(("malicious", "told"), [(1, False), (2, True), (3, True)])
def test_it_is_said_where_the_attackers_can_outvote_the_others(malicious, told, tmp_path, monkeypatch):
    monkeypatch.setattr(federation.tempfile, "mkdtemp", lambda **_: tmp_path)
    about = federation.Federation(participants=4, malicious=malicious).about()
    assert ("half or more" in about) == told


@pytest.mark.parametrize(
    "name",
    ["ca", "director", "experimenter", "aggregator", "Director", "../evil", "New York", "", "a" * 65, "ä" * 33, "a\n"],
)
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
    with pytest.raises(SystemExit, match=r"--days 365: .*ca.crt ends in -1 days"):
        certificates.make_certificates(tmp_path, "localhost", ["Amsterdam"])
    with pytest.raises(SystemExit, match="ca.crt is missing or has expired"):
        certificates.make_certificates(tmp_path, "localhost", ["Espoo"])
    assert not (tmp_path / "Espoo.crt").exists()


CERTIFICATES = [sys.executable, ROOT / "director" / "certificates.py"]


def make(folder, *arguments):
    """Exit code and standard error of certificates.py."""
    done = subprocess.run([*CERTIFICATES, "--folder", folder, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("director.example.org", "director.example.org"),
        ("größe.example.org", "xn--gre-6ka8i.example.org"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("0:0::1", "::1"),
        ("192.0.2.7", "192.0.2.7"),
        ("crowd_director", "crowd_director"),  # as in a compose file
        (".".join(["a" * 63] * 3 + ["b" * 61]), ".".join(["a" * 63] * 3 + ["b" * 61])),  # 253 characters
    ],
)
def test_a_host_is_in_the_alternative_names_and_never_the_common_name(tmp_path, asked, found):
    certificates.make_certificates(tmp_path, asked, ["Amsterdam"])
    assert certificates.director_of(tmp_path) == found
    director = x509.load_pem_x509_certificate((tmp_path / "director.crt").read_bytes())
    assert director.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "director"
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for again in (asked, None):
        certificates.make_certificates(tmp_path, again, ["Amsterdam"])
        assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("host.example.org:50051", "has a port, which belongs into the participants' YAML"),
        ("[::1]:50051", "has a port"),
        ("a" * 64, "is no host: between dots stand 1 to 63"),
        ("ä" * 70, "is no host: "),
        (".".join(["a" * 63] * 4), "is longer than 253"),
        ("a..b", "is no host: "),
        ("-a.b", "is no host: "),
        ("a b", "is no host: "),
        ("https://a.b/", "is no host: "),
        ("[a.b]", "is no host: "),
        ("10.0.0.256", "a wrong IP address"),
        ("10.0", "a wrong IP address"),
        ("", "is no host: "),
    ],
)
def test_a_host_that_is_none_is_refused_where_it_is_entered(tmp_path, host, words):
    with pytest.raises(SystemExit) as said:
        certificates.make_certificates(tmp_path / "c", host, ["Amsterdam"])
    assert str(said.value).startswith("--director ") and words in str(said.value)
    assert len(str(said.value).splitlines()) == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("days", ["-5", "0", "3650", "100000", "10000000", "99999999999999", "1.5", "x"])
def test_days_are_positive_and_end_before_the_ca(tmp_path, days):
    code, words = make(tmp_path, "--days", days, "Amsterdam")
    assert code and "--days" in words and "Traceback" not in words
    assert not (tmp_path / "Amsterdam.crt").exists()


def test_as_long_as_the_ca_will_do(tmp_path):
    assert make(tmp_path, "--days", "3649", "Amsterdam", "Zürich") == (0, "")
    ends = [
        x509.load_pem_x509_certificate((tmp_path / f"{n}.crt").read_bytes()).not_valid_after_utc
        for n in ("Zürich", "ca")
    ]
    assert ends[0] <= ends[1]
    assert certificates.days_left(tmp_path / "Zürich.crt") == 3648


def test_a_certificate_of_before_whose_common_name_was_the_host_is_made_anew(tmp_path):
    certificates.make_certificates(tmp_path, "old.example.org", ["Amsterdam"])
    authority, key = certificates.certificate_authority(tmp_path)
    hosts = x509.SubjectAlternativeName([x509.DNSName("old.example.org"), x509.DNSName("localhost")])
    own = certificates.ec.generate_private_key(certificates.ec.SECP256R1())
    old = certificates.issue("old.example.org", own, authority, key, 30, [(hosts, False)])
    (tmp_path / "director.crt").write_bytes(old.public_bytes(certificates.serialization.Encoding.PEM))
    certificates.make_certificates(tmp_path, None, ["Espoo"])
    made = x509.load_pem_x509_certificate((tmp_path / "director.crt").read_bytes())
    assert made.subject == certificates.common_name("director")
    assert certificates.director_of(tmp_path) == "old.example.org"


def test_both_machines_read_a_host_in_the_same_way():
    assert inspect.getsource(channel.plain_host).replace("director/certificates", "envoy/channel") == inspect.getsource(
        certificates.plain_host
    )


@pytest.mark.parametrize(
    ("address", "plain"),
    [
        ("localhost:50051", "localhost:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("[0:0::1]:1", "[::1]:1"),
        ("größe.example.org:65535", "xn--gre-6ka8i.example.org:65535"),
        ("192.0.2.7:1", "192.0.2.7:1"),
    ],
)
def test_addresses_as_grpc_takes_them(address, plain):
    assert channel.plain_address(address) == plain


@pytest.mark.parametrize(
    "address",
    ["localhost", "localhost:", ":50051", "localhost:0", "localhost:65536", "localhost:050051", "localhost:١",
     "::1:50051", "[localhost]:1", "a b:1", "10.0.0.256:1", "http://a.b:1", "a:1:2", ""],
)  # fmt: skip
def test_addresses_that_are_none_are_refused_in_one_line(address):
    with pytest.raises(ValueError) as said:
        channel.plain_address(address)
    assert repr(address)[:-1] in str(said.value) or "is no host" in str(said.value)
    assert len(str(said.value).splitlines()) == 1


# --- Proxies ----------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_is_told_how_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CROWDGUARD_RUNS", str(tmp_path))
    monkeypatch.setenv("CROWDGUARD_AGAIN", "make run SET=seed=3 RESUME=")
    stopped = federation.Federation.__new__(federation.Federation)
    log = "INFO experiment run-00000002-aaaaaaaa begins\nrun-00000003-bbbbbbbb waits"
    stopped.tell_what_is_kept("no run of ours")
    assert capsys.readouterr().out == ""
    stopped.tell_what_is_kept(log)
    assert capsys.readouterr().out == "stopped before the first round\n"
    for name in ("run-00000001/round-0001", "run-00000002/round-0003", "run-00000002/round-0004"):
        (tmp_path / "director" / name).mkdir(parents=True)
    stopped.tell_what_is_kept(log)
    told = capsys.readouterr().out
    assert (
        told.startswith("stopped after round 4, go on with: make run SET=seed=3 RESUME=run-00000002")
        and told.count("\n") == 1
    )


def test_without_make_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["local/federation.py", "--", "python", "experimenter/run.py", "--set", "seed=3"])
    command = f"{sys.executable} local/federation.py -- python experimenter/run.py --set seed=3 --resume "
    assert federation.again(sys.argv[2:]) == command
    assert federation.again(["jupyter", "lab"]) == "CROWDGUARD_RESUME="


def test_logs_of_what_went_wrong_are_removed_after_a_week(tmp_path, monkeypatch):
    monkeypatch.setattr(federation, "ROOT", tmp_path)
    for days, name in ((8, "run-old"), (6, "run-young"), (8, "matplotlib")):
        folder = tmp_path / ".federation" / name
        (folder / "logs").mkdir(parents=True)
        os.utime(folder, 2 * (time.time() - 86_400 * days,))
    federation.remove_old_logs()
    assert {path.name for path in (tmp_path / ".federation").iterdir()} == {"run-young", "matplotlib"}


def test_a_name_is_given_once(tmp_path):
    with pytest.raises(SystemExit, match="Amsterdam is there twice"):
        certificates.make_certificates(tmp_path / "c", "localhost", ["Amsterdam", "Bangalore", "Amsterdam"])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_does_not_stop_the_local_federation(launch, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("no_grpc_proxy", "elsewhere.example.org")  # which hides no_proxy from gRPC
    show = 'cat "$CROWDGUARD_CERTIFICATES"/../logs/*'
    output = launch("--participants", "1", "--malicious", "0", "--", "sh", "-c", show).communicate(timeout=200)[0]
    assert "1 participants are online" in output
    assert "Amsterdam is connected to the director" in output.replace("'", "")
    assert "Warning" not in output, "of OpenFL's dependencies on their own age"


@pytest.mark.parametrize("program", ["envoy", "director"])
@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_leave_the_cores_to_others(program, given, found):
    """Before torch is imported, which would not notice it any more."""
    code = "import os, sys, start; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / program, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [found, "False"], done.stderr


def test_what_was_exempt_from_the_proxy_stays_so():
    before = {"no_proxy": "a.example.org,localhost", "NO_PROXY": "b.example.org", "HOME": "/"}
    after = federation.without_proxy(before, "localhost", "::1")
    assert after == {
        "no_proxy": "a.example.org,localhost,::1",
        "NO_PROXY": "b.example.org,localhost,::1",
        "HOME": "/",
    }
    assert federation.without_proxy({"no_grpc_proxy": "c"}, "localhost")["no_grpc_proxy"] == "c,localhost"


def test_values_on_the_command_line_are_taken_at_their_word():
    assert federation.parse_override("data.seed=010") == (["data", "seed"], "010"), "which the envoy refuses"
    assert federation.parse_override("data.alpha=1e-3") == (["data", "alpha"], 0.001)
    with pytest.raises(SystemExit, match=r"^data.seed=\{a: 1, a: 2\} \(ENVOY=…, --set\): not YAML: 'a' is there twice"):
        federation.parse_override("data.seed={a: 1, a: 2}")


# --- The director's YAML ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read_config():
    return load_module("director_start", ROOT / "director" / "start.py").read_config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "must hold the keys port, envoy_health_check_period"),
        ("", "must hold the keys"),
        ("port: yes", "port: 'yes' is not a whole number"),
        ("port: 80000", "port: '80000' is not a whole number from 1 to 65535"),
        ("port: 1\nenvoy_health_check_period: 5\nhost: x", "'host': unknown key"),
        ("1: 2", "'1': unknown key"),
        ("port: 1", "envoy_health_check_period: missing"),
        ("port: 010\nenvoy_health_check_period: 5", "port: '010' is not a whole number"),
        ("port: 1\nenvoy_health_check_period: 1:30", "envoy_health_check_period: '1:30' is not"),
        ("port: 0xC383\nenvoy_health_check_period: 5", "port: '0xC383' is not"),
        ("port: [1]\nenvoy_health_check_period: 5", "port: "),
        ("port: 1\nport: 2\nenvoy_health_check_period: 5", "'port': is there twice"),
        ("? [a]\n: 1", "unknown key"),
        ("port: 'é'".encode("latin-1"), "byte 7 is not UTF-8"),
        ("port: 1".encode("utf-16"), "byte 0 is not UTF-8"),
        ("[" * 3000, ""),
        (None, "Is a directory"),
    ],
)
def test_a_wrong_director_yaml_ends_the_director_with_one_line(tmp_path, read_config, content, words):
    path = tmp_path / "director.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as said:
        read_config(path)
    assert str(said.value).startswith(f"{path}: ") or f"'{path}'" in str(said.value)
    assert words in str(said.value) and len(str(said.value).splitlines()) == 1


def test_the_director_yaml_as_it_is_handed_out(read_config):
    assert read_config(ROOT / "director" / "director.yaml") == {"port": 50051, "envoy_health_check_period": 5}


def test_what_is_logged_again_and_again_does_not_fill_the_directors_disk():
    seldom = load_module("director_start", ROOT / "director" / "start.py").Seldom(most=3)
    records = [logging.LogRecord("door", 30, "server.py", line, "%s calls", ("Eve",), None) for line in [1] * 9 + [2]]
    said = [record.getMessage() for record in records if seldom.filter(record)]
    assert said[:2] == ["Eve calls"] * 2 and "is left out" in said[2] and said[3:] == ["Eve calls"]
