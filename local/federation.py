"""A whole federation on this machine: director, envoys, mutual TLS, for as long as a command runs.

    python local/federation.py --participants 6 --malicious 2 -- python experimenter/run.py

The settings come from the YAML files in `envoy/`; `--set data.source=image_folder --set data.folder=DIR` changes them
for all participants. Everything is taken down again when the command ends, on Ctrl-C, and when this is killed.
"""

import argparse
import contextlib
import copy
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "director"), str(ROOT / "envoy")]

import strict_yaml  # noqa: E402
from certificates import make_certificates  # noqa: E402

# fmt: off
CITIES = [
    "Amsterdam", "Bangalore", "Chandler", "Detroit", "Espoo", "Fairbanks", "Galway", "Hamburg", "Istanbul", "Jakarta",
    "Kyoto", "Lima", "Montreal", "Nairobi", "Oslo", "Prague", "Quito", "Rotterdam", "Seattle", "Toronto", "Utrecht",
    "Vienna", "Warsaw", "Xiamen", "York", "Zagreb",
]
# fmt: on
CERTIFICATE_DAYS = 7
WHERE = "(ENVOY=…, --set)"  # from where a setting of all participants comes
START_TIMEOUT = 300  # seconds; importing torch five times on a busy machine takes a minute


# --- Who takes part -------------------------------------------------------------------------------------------


def names(participants: int) -> list[str]:
    return [CITIES[i] if i < len(CITIES) else f"Participant{i + 1}" for i in range(participants)]


def parse_override(text: str) -> tuple[list[str], object]:
    """`data.alpha=1.0` → (["data", "alpha"], 1.0)"""
    key, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"{text} {WHERE}: must be key=value without blanks, as in data.source=image_folder")
    ours = ("name", "director", "data", "attack", "data.index", "data.participants")
    if key in ours or key.partition(".")[0] in ours[:2] or key.count(".") > 1:
        raise SystemExit(f"{text} {WHERE}: {key} is not one setting for all participants")
    if key == "data.folder":
        return key.split("."), str(Path(value).expanduser().absolute())
    try:
        return key.split("."), strict_yaml.parse(value)
    except ValueError as error:
        raise SystemExit(f"{text} {WHERE}: {error}") from None


def written_settings(folder: Path) -> dict[str, dict]:
    """What the YAML files of participants say, name → settings; `SystemExit` with one line that names a wrong one."""
    settings = {}
    for path in sorted(folder.glob("[!.]*.yaml")):
        try:
            settings[path.stem] = mine = strict_yaml.read(path) or {}
            sections = {"the file": mine} | {key: mine[key] for key in ("data", "attack") if key in mine}
        except (ValueError, TypeError) as error:
            raise SystemExit(f"{path}: {error}") from None
        for key, section in sections.items():
            if not isinstance(section, dict):
                raise SystemExit(f"{path}: {key}: must hold keys and values (none: `{key}: {{}}`)")
        if not isinstance(place := mine.get("data", {}).get("folder") or "", str):
            raise SystemExit(f"{path}: data.folder: {place!r} is no path")
    if not settings:
        raise SystemExit(f"{folder}: there is no *.yaml of a participant")
    return settings


def attacks_of(written: dict[str, dict], everyone: list[str], malicious: int | None) -> dict[str, dict]:
    """name → attack: as written if as many shall attack; or the last ones together, their updates scaled by 1 / PMR."""
    attacks = {name: mine["attack"] for name, mine in written.items() if "attack" in mine}
    if not everyone:
        raise SystemExit("PARTICIPANTS=0 (--participants): must be at least 1")
    malicious = min(len(attacks), len(everyone) - 1) if malicious is None else malicious
    if not 0 <= malicious < len(everyone):
        words = f"MALICIOUS={malicious} of PARTICIPANTS={len(everyone)}"
        raise SystemExit(f"{words} (--malicious, --participants): must be at least 0 and fewer than all")
    if everyone == [*written] and malicious == len(attacks):
        return attacks
    attackers, model = everyone[len(everyone) - malicious :], next(iter(attacks.values()), {})
    return {name: model | {"scale": len(everyone) / malicious, "accomplices": attackers} for name in attackers}


def participant_settings(participants: int | None, malicious: int | None, director: str, overrides=()):
    """name → settings of so many participants; None: of those who have a YAML file in `envoy/`.

    They come first, in the order of their names; who has no file has the first one's settings. A name is its file's.
    """
    written, settings = written_settings(ROOT / "envoy"), {}
    others = (name for name in names((participants or 0) + len(written)) if name not in written)
    everyone = [*written, *others][: len(written) if participants is None else participants]
    attacks = attacks_of(written, everyone, malicious)
    for index, name in enumerate(everyone):
        mine = copy.deepcopy(written.get(name, next(iter(written.values())))) | {"name": name, "director": director}
        mine["data"] = mine.get("data", {}) | {"index": index, "participants": len(everyone)}
        if mine["data"].get("folder"):  # seen from here, not from the envoy's own folder and HOME
            mine["data"]["folder"] = str(Path(mine["data"]["folder"]).expanduser().absolute())
        mine.pop("attack", None)
        if name in attacks:
            mine["attack"] = copy.deepcopy(attacks[name])
        for (*sections, key), value in overrides:
            if sections != ["attack"] or name in attacks:
                place = mine
                for section in sections:
                    place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise SystemExit(f"{'.'.join([*sections, key])} {WHERE}: {sections[-1]} has no keys")
                place[key] = value
        settings[name] = mine
    return settings


# --- Processes ------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def without_proxy(environment: dict[str, str], *hosts: str) -> dict[str, str]:
    """The environment with these hosts exempt from proxies. gRPC reads the first of the variables, others the rest."""
    exempt = {}
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        if environment.get(name) or name != "no_grpc_proxy":  # which, where it is set, hides no_proxy
            exempt[name] = ",".join(dict.fromkeys([*filter(None, environment.get(name, "").split(",")), *hosts]))
    return environment | exempt


def runs_folder() -> Path:
    """Where the director and the envoys keep what they need to go on with a run."""
    return Path(os.environ.get("CROWDGUARD_RUNS", ROOT / "runs"))


def remove_old_logs() -> None:
    """Removes what federations that went wrong have left, once their certificates have run out."""
    for folder in (ROOT / ".federation").glob("run-*"):
        with contextlib.suppress(FileNotFoundError):  # another federation may start at the same time
            if time.time() - folder.stat().st_mtime > CERTIFICATE_DAYS * 86_400:
                shutil.rmtree(folder, ignore_errors=True)


class Federation:
    """Director and envoys as processes. A context manager; `run` runs a command beside them.

    Arguments as of `participant_settings`; attributes: `folder` (settings, certificates and logs), `environment` of
    commands that want to reach the director.
    """

    def __init__(self, participants=None, malicious=None, overrides=(), host: str = "localhost"):
        director_port, aggregator_port = free_ports(2)
        self.host, self.address = host, f"{host}:{director_port}"
        self.settings = participant_settings(participants, malicious, self.address, overrides)
        self.chosen = " ".join(f"{'.'.join(keys)}={value}" for keys, value in overrides)
        (ROOT / ".federation").mkdir(exist_ok=True)
        remove_old_logs()
        self.folder = Path(tempfile.mkdtemp(prefix="run-", dir=ROOT / ".federation"))
        self.environment = without_proxy(dict(os.environ), host, "localhost", "127.0.0.1", "::1") | {
            "CROWDGUARD_DIRECTOR": self.address,
            "CROWDGUARD_AGGREGATOR_PORT": str(aggregator_port),
            "CROWDGUARD_CERTIFICATES": str(self.folder / "certificates"),
            "CROWDGUARD_ENVOYS": str(self.folder / "envoys"),
            "CROWDGUARD_WORKSPACE": str(self.folder / "workspace" / "generated_workspace"),
            "HOME": str(self.folder / "home"),
            "CROWDGUARD_RUNS": str(runs_folder()),
            "MPLCONFIGDIR": str(ROOT / ".federation" / "matplotlib"),  # its font cache takes long to make
            "METAFLOW_USER": "experimenter",
            "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take the cores from the other processes
        }
        self.processes = {}
        self.guardian = self.command = None

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, trace):
        self.stop()
        if kind is not SystemExit:  # which says that something went wrong, and whose log to read
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self):
        certificates = self.folder / "certificates"
        make_certificates(certificates, self.host, list(self.settings), CERTIFICATE_DAYS)
        for folder in ("home", "logs", "envoys", "director", *self.settings):
            (self.folder / folder).mkdir()
        self.guardian = subprocess.Popen(
            [sys.executable, ROOT / "local" / "guardian.py", certificates],
            stdin=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.start_director(certificates)
        for name, settings in self.settings.items():
            file = self.folder / "envoys" / f"{name}.yaml"
            file.write_text(yaml.safe_dump(settings, sort_keys=False))
            self.spawn(name, self.program("envoy", file, certificates, Path(self.environment["CROWDGUARD_RUNS"])))
        for name in self.settings:
            self.wait_for(name, lambda name=name: "is connected to the director" in self.log(name).read_text())

    def start_director(self, certificates):
        port = int(self.address.rpartition(":")[2])
        file = self.folder / "director.yaml"
        period = yaml.safe_load((ROOT / "director" / "director.yaml").read_text())["envoy_health_check_period"]
        file.write_text(yaml.safe_dump({"port": port, "envoy_health_check_period": period}))
        runs = Path(self.environment["CROWDGUARD_RUNS"], "director")
        self.spawn("director", self.program("director", file, certificates, runs))
        self.wait_for("director", self.director_listens)

    def program(self, kind: str, file: Path, certificates: Path, runs: Path) -> list:
        """The command of a director or envoy; other federations may have the same `runs`."""
        options = {"--certificates": certificates, "--runs": runs, "--work": self.folder / file.stem}
        return [ROOT / kind / "start.py", file, *itertools.chain(*options.items())]

    def director_listens(self) -> bool:
        host, _, port = self.address.rpartition(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    def about(self) -> str:
        attackers = [name for name, mine in self.settings.items() if "attack" in mine]
        many = " (half or more: they can outvote the others)" if 2 * len(attackers) >= len(self.settings) else ""
        told = f"attackers: {', '.join(attackers) or 'nobody'}{many}"
        return f"{len(self.settings)} participants are online; {told}; logs: {self.folder / 'logs'}"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def spawn(self, name: str, command: list, within: tuple = ()) -> None:
        """Starts a Python program in a folder of its own, its output in a log, its life in the guardian's hands.

        `within` stands before it, a command that runs it elsewhere.
        """
        threads = max(1, (os.cpu_count() or 1) // len(self.settings))
        with self.log(name).open("w") as log:
            self.processes[name] = subprocess.Popen(
                [*within, sys.executable, "-u", *command], cwd=self.folder / name, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=self.guard,
                env=self.environment | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip

    def guard(self) -> None:
        """Tells the guardian of this very process: before its program starts, lest this be ended in between."""
        os.write(self.guardian.stdin.fileno(), f"{os.getpid()}\n".encode())

    def wait_for(self, name: str, ready) -> None:
        started = time.monotonic()
        while not ready():
            self.check()
            if time.monotonic() - started > START_TIMEOUT:
                raise SystemExit(f"{name} is not ready after {START_TIMEOUT} s; its log: {self.log(name)}")
            time.sleep(0.2)

    def check(self) -> None:
        """Raises `SystemExit` that shows the end of the log if a process has died."""
        if self.guardian.poll() is not None:
            raise SystemExit("the guardian has died, which takes the federation down")
        for name, process in self.processes.items():
            if process.poll() is not None:
                end = "\n".join(self.log(name).read_text().splitlines()[-5:])
                end = end.replace(str(self.folder / "envoys"), "envoy")  # from which those files are made
                if self.chosen and not self.command:
                    end += f"\nchosen for all participants {WHERE}: {self.chosen} (of the experiment itself: SET=…)"
                raise SystemExit(f"{name} ended with exit code {process.returncode}; its log: {self.log(name)}\n{end}")

    def run(self, command: list[str]) -> int:
        """Runs the command beside the federation; returns its exit code, raises `SystemExit` if a process dies."""
        self.command = subprocess.Popen(command, env=self.environment, start_new_session=True, preexec_fn=self.guard)
        try:
            while self.command.poll() is None:
                self.check()
                time.sleep(0.5)
        except (KeyboardInterrupt, SystemExit):
            self.tell_what_is_kept(self.log("director").read_text())
            raise
        return self.command.returncode

    def tell_what_is_kept(self, log: str) -> None:
        """Says how a run that was stopped goes on, if the director has kept a round of it."""
        again = os.environ.get("CROWDGUARD_AGAIN", "CROWDGUARD_RESUME=")  # the Makefile says how it was called
        runs, words = sorted(set(re.findall(r"\b(run-[0-9a-f]{8})-[0-9a-f]{8}\b", log))), []
        for run in runs:
            kept = [int(path.name[6:]) for path in runs_folder().glob(f"director/{run}/round-[0-9]*")]
            words += [f"stopped after round {max(kept)}, go on with: {again}{run}"] if kept else []
        if words or runs:
            print("\n".join(words) or "stopped before the first round")

    def stop(self) -> None:
        """Has the guardian end everything, or does so itself if the guardian is gone."""
        if self.guardian:
            self.guardian.stdin.close()
            for process in filter(None, [*self.processes.values(), self.command]):
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
            self.guardian.wait()
            self.guardian = None


STOPPED_BY = (signal.SIGINT, signal.SIGTERM)  # SIGINT too: a shell starts background jobs with it ignored


def interrupt(number, frame):
    for other in STOPPED_BY:  # once is enough, and what is taken down then must not be left half done
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def again(command: list[str]) -> str:
    """How a run beside this federation goes on: what stands before its name."""
    runs = any(word.endswith("experimenter/run.py") for word in command)
    return f"{shlex.join([sys.executable, *sys.argv])} --resume " if runs else "CROWDGUARD_RESUME="


def main():
    for number in STOPPED_BY:
        signal.signal(number, interrupt)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, help="how many; those who have a YAML file in envoy/")
    parser.add_argument("--malicious", type=int, help="how many attack, the last ones unless it is as in the files")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting for all participants")
    parser.add_argument("command", nargs="+", help="command to run beside the federation, after --")
    args = parser.parse_args()
    overrides = [parse_override(text) for text in args.set]
    if twice := [key for key, count in Counter(".".join(keys) for keys, _ in overrides).items() if count > 1]:
        raise SystemExit(f"{twice[0]} {WHERE}: is given twice")
    if not shutil.which(args.command[0]):
        raise SystemExit(f"there is no command {args.command[0]}")
    os.environ.setdefault("CROWDGUARD_AGAIN", again(args.command))
    try:
        with Federation(args.participants, args.malicious, overrides) as federation:
            print(federation.about(), flush=True)
            if code := federation.run(args.command):
                raise SystemExit(code)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
