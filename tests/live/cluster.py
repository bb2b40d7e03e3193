"""A federation whose processes can be killed one by one, and notebooks beside it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import yaml
from federation import Federation
from openfl.experimental.workflow.protocols import director_pb2, director_pb2_grpc

from envoy.channel import Identity, open_channel

ROOT = Path(__file__).parents[2]
SMALL = ["local_epochs=1", "hidden=8", "width=2", "participant_timeout=6"]
NAMES = ["Amsterdam", "Bangalore", "Chandler", "Detroit"]
FEW = [(["data", "train_samples"], 60), (["data", "test_samples"], 40)]


def together(*settings) -> list[str]:
    """`name=value` of each name, the last one counts."""
    return list({setting.partition("=")[0]: setting for some in settings for setting in some}.values())


NOTEBOOK = """
import logging, sys
from pathlib import Path

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from experimenter.connect import connect
from experimenter.results import Results

results, wish, *name = sys.argv[1:]
federation = connect(name[0] if wish == "resume" else "", Results(Path(results)))
if wish == "attach":
    federation.attach(name[0])
else:
    federation.submit_experiment(*federation.prepare_workspace_archive())
    print("submitted", federation.run, federation.name, flush=True)
    federation.get_flow_state()
print("done", flush=True)
"""


def note(fault: str, seen: str, seconds: float) -> None:
    """Writes what was seen, and how long it took, to the file that `FAULTS_LOG` names."""
    if place := os.environ.get("FAULTS_LOG"):
        with Path(place).open("a") as file:
            file.write(json.dumps({"fault": fault, "seen": seen, "seconds": round(seconds, 1)}) + "\n")


def command(*words) -> None:
    subprocess.run(words, capture_output=True, text=True, check=True)


class Link:
    """Another machine, as a network namespace, and the link to it. A context manager.

    Raises: `PermissionError` on entering if network namespaces may not be made here.
    """

    def __init__(self):
        number = os.getpid()  # others may have theirs
        self.space, self.ends = f"fcg-{number}", (f"fcg{number}a", f"fcg{number}b")
        self.here, self.there = (f"10.231.{number % 256}.{host}" for host in (1, 2))
        self.within = ("ip", "netns", "exec", self.space)

    def __enter__(self):
        here, there = self.ends
        try:
            command("ip", "netns", "add", self.space)
        except (OSError, subprocess.CalledProcessError) as error:
            words = getattr(error, "stderr", None) or error
            raise PermissionError(f"network namespaces cannot be made here: {words}") from None
        try:
            command("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", self.space)
            command("ip", "addr", "add", f"{self.here}/24", "dev", here)
            command("ip", "link", "set", here, "up")
            command("ip", "-n", self.space, "addr", "add", f"{self.there}/24", "dev", there)
            command("ip", "-n", self.space, "link", "set", there, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        command("ip", "netns", "del", self.space)

    @contextlib.contextmanager
    def cut(self):
        """Meanwhile the link is down, which both machines see."""
        command("ip", "link", "set", self.ends[0], "down")
        try:
            yield
        finally:
            command("ip", "link", "set", self.ends[0], "up")

    @contextlib.contextmanager
    def blackhole(self):
        """Meanwhile every packet is dropped, of which neither machine is told."""
        sides = list(zip((["tc", "qdisc"], ["tc", "-n", self.space, "qdisc"]), self.ends, strict=True))
        for tc, end in sides:
            command(*tc, "add", "dev", end, "root", "blackhole")
        try:
            yield
        finally:
            for tc, end in sides:
                command(*tc, "del", "dev", end, "root")


def heeds_ctrl_c() -> None:
    """In a process before its program starts: whoever began these tests in the background had Ctrl-C ignored by all."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Notebook:
    """A notebook that runs an experiment, as a process: its exported cells and what connects them to a federation."""

    def __init__(self, cluster, folder: Path, settings=(), wish="run", name="", within=()):
        from experimenter import run

        self.folder, self.log = folder, folder / "notebook.log"
        folder.mkdir(parents=True, exist_ok=True)
        notebook = run.with_settings(nbformat.read(run.NOTEBOOK, as_version=4), "demo", together(SMALL, settings))
        nbformat.write(notebook, folder / "source.ipynb")
        places = {
            "CROWDGUARD_NOTEBOOK": folder / "source.ipynb",
            "CROWDGUARD_WORKSPACE": folder / "generated_workspace",
        }
        environment = cluster.environment | {key: str(value) for key, value in places.items()}
        self.process = subprocess.Popen(
            [*within, sys.executable, "-u", "-c", NOTEBOOK, folder, wish, *([name] if name else [])],
            cwd=ROOT, stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=environment, preexec_fn=heeds_ctrl_c,
        )  # fmt: skip

    def rows(self) -> list[dict]:
        path = self.folder / "history.json"
        return json.loads(path.read_text())["federation"] if path.exists() else []

    def model(self) -> bytes:
        return (self.folder / "global_model.safetensors").read_bytes()

    def until(self, condition, seconds: float = 90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None or condition(), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)
        return self

    def reached(self, rounds: int):
        return self.until(lambda: len(self.rows()) >= rounds)

    def submitted(self) -> tuple[str, str]:
        """Names of the run and of the experiment."""
        self.until(lambda: "submitted" in self.log.read_text())
        line = next(line for line in self.log.read_text().splitlines() if line.startswith("submitted"))
        return tuple(line.split()[1:])

    def ended(self, seconds: float = 150) -> str:
        """Its log, when it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        assert self.process.poll() is not None, f"not over after {seconds} s: {self.log.read_text()[-3000:]}"
        return self.log.read_text()

    def interrupted(self) -> str:
        """Its log, when it has been ended by Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        log = self.ended(60)
        assert self.process.returncode != 0, f"it was over before: {log[-1000:]}"
        return log

    def until_back(self, name: str) -> list[dict]:
        """The rows of a run that is ended by Ctrl-C as soon as a participant that was missed has voted again."""

        def back():
            rows = self.rows()
            return any(row["failed"] for row in rows) and not rows[-1]["failed"] and name in rows[-1]["votes"]

        self.until(back, 120)
        self.interrupted()
        return self.rows()

    def well(self, rounds: int, seconds: float = 150):
        log = self.ended(seconds)
        assert self.process.returncode == 0 and len(self.rows()) == rounds, log[-3000:]
        return self


class Cluster(Federation):
    """Director and envoys, of which each can be ended and started again."""

    def __init__(self, folder: Path, host="localhost", data=FEW, within=None):
        """`data` changes the participants' settings; `within` is participant → command that runs it elsewhere."""
        super().__init__(len(NAMES), 0, data, host)
        self.ports = [int(self.address.rpartition(":")[2]), int(self.environment["CROWDGUARD_AGGREGATOR_PORT"])]
        self.commands, self.place, self.count, self.within = {}, folder, 0, within or {}
        self.runs = folder / "runs"
        self.environment["CROWDGUARD_RUNS"] = str(self.runs)
        self.environment["PYTHONPATH"] = str(ROOT)

    def start_director(self, certificates):
        super().start_director(certificates)
        file = self.folder / "director.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"envoy_health_check_period": 1}))
        self.kill("director")
        self.restart("director")

    def program(self, *what):
        """As one starts it by hand, without `--work`: it works on the disk of its `runs`."""
        return super().program(*what)[:-2]

    def spawn(self, name, command, within=()):
        self.commands[name] = command
        super().spawn(name, command, within or self.within.get(name, ()))

    def kill(self, name: str, how=signal.SIGKILL) -> None:
        os.kill(self.processes[name].pid, how)
        if how == signal.SIGKILL:
            self.processes[name].wait(timeout=10)

    def restart(self, name: str) -> None:
        """Starts it again; its log goes on in another file."""
        self.count += 1
        self.log(name).rename(self.log(name).with_suffix(f".{self.count}.log"))
        self.spawn(name, self.commands[name])
        if name == "director":
            self.wait_for(name, self.director_listens)

    def back(self, *names: str) -> None:
        """Starts envoys again and waits until they are connected."""
        for name in names:
            self.restart(name)
        for name in names:
            self.wait_for(name, lambda name=name: "is connected" in self.log(name).read_text())

    def all_are_there(self) -> None:
        """Waits until all envoys have joined the director that has been restarted."""
        names = list(self.settings)
        words = "Envoy {} is connected"
        self.wait_for("director", lambda: all(words.format(n) in self.log("director").read_text() for n in names))

    def online(self) -> set[str]:
        """Names of the participants of whom the director has heard lately."""
        with open_channel(self.address, Identity.of("experimenter", self.folder / "certificates")) as channel:
            known = director_pb2_grpc.DirectorStub(channel).GetEnvoys(director_pb2.GetEnvoysRequest()).envoy_infos
        return {envoy.envoy_name for envoy in known if envoy.is_online}

    def notebook(self, settings=(), wish="run", name="", within=()) -> Notebook:
        self.count += 1
        return Notebook(self, self.place / f"notebook{self.count}", settings, wish, name, within)
