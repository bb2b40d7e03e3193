"""Many rounds in which something goes wrong all the time, drawn from a seed: all are reached, nothing is left behind.

    make soak SEED=1 ROUNDS=50

`SOAK_ROUNDS` and `SOAK_SEED` say the same to pytest. What was seen is in the folder `SOAK_RESULTS`: `soak.json`, and
`soak.png` with the director's memory. From `FULL` rounds on it is compared with a run in which nothing goes wrong.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from cluster import NAMES, ROOT, Cluster, Link

ROUNDS, SEED = int(os.environ.get("SOAK_ROUNDS", 50)), int(os.environ.get("SOAK_SEED", 1))
FULL = 50
NET = [f"rounds={ROUNDS}", "hidden=16", "width=4", "local_epochs=10"]
DATA = [(["data", "train_samples"], 300), (["data", "test_samples"], 397)]
QUIET = 3  # last rounds, in which nothing more goes wrong
BACK = 60  # seconds after a fault in which there must be a round in which nobody is missing
LAST = 5  # rounds whose accuracy is compared
POINTS = 0.02  # of main-task accuracy
GROWTH = 10  # MB by which the director's memory may still grow when half of its rounds are over


# --- What goes wrong --------------------------------------------------------------------------------------------


class Faults:
    """What goes wrong; each of `kinds` is a method that mends it again and returns who was hit and how long."""

    def __init__(self, cluster: Cluster, rng: random.Random, disk: Path | None, link: Link | None):
        self.cluster, self.rng, self.disk, self.link = cluster, rng, disk, link
        self.kinds = ["envoy_killed", "envoy_stopped", "director_killed", "ctrl_c", "notebook_killed"]
        self.kinds += ["disk_full"] * (disk is not None) + ["link_cut", "link_swallows"] * (link is not None)

    def plan(self):
        """(rounds until then, fault, seconds after the round) for ever; each kind before any comes again."""
        while True:
            for kind in self.rng.sample(self.kinds, len(self.kinds)):
                yield self.rng.randint(1, 2), kind, self.rng.uniform(0, 1)

    def envoy_killed(self) -> str:
        victim = self.rng.choice(NAMES)
        self.cluster.kill(victim)
        time.sleep(self.rng.uniform(0, 3))
        self.cluster.back(victim)
        return victim

    def envoy_stopped(self) -> str:
        victim, seconds = self.rng.choice(NAMES), self.rng.uniform(1, 12)
        self.cluster.kill(victim, signal.SIGSTOP)
        time.sleep(seconds)
        self.cluster.kill(victim, signal.SIGCONT)
        return f"{victim}, {seconds:.1f} s"

    def director_killed(self) -> str:
        self.cluster.kill("director")
        self.cluster.restart("director")
        assert f"was the director restarted? go on with: CROWDGUARD_RESUME={self.run}" in self.running.ended(60)
        self.resume()
        return ""

    def ctrl_c(self) -> str:
        self.running.interrupted()
        self.resume()
        return ""

    def begin(self, *wish) -> None:
        """A notebook runs, or goes on with, a run."""
        self.running = self.cluster.notebook(NET, *wish)
        self.run, self.experiment = self.running.submitted()

    def resume(self) -> None:
        self.cluster.wait_for("director", lambda: self.cluster.online() == set(NAMES))
        self.begin("resume", self.run)

    def notebook_killed(self) -> str:
        self.running.process.kill()
        self.running.process.wait()
        self.running = self.cluster.notebook(NET, "attach", self.experiment).reached(1)
        return ""

    def disk_full(self) -> str:
        """The director's, for some rounds."""
        before = len(self.running.rows())
        with (self.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        self.running.until(lambda: len(self.running.rows()) > before + 1 or self.running.process.poll() == 0)
        (self.disk / "filler").unlink()
        return f"{len(self.running.rows()) - before} rounds"

    def link_cut(self) -> str:
        return self.interrupt(self.link.cut)

    def link_swallows(self) -> str:
        return self.interrupt(self.link.blackhole)

    def interrupt(self, how) -> str:
        seconds = self.rng.uniform(1, 15)
        with how():
            time.sleep(seconds)
        return f"Chandler, {seconds:.1f} s"

    def wait_until_well(self, round: int) -> None:
        """Waits for a later round in which nobody is missing, unless the run has come to its end."""

        def well():
            rows = self.running.rows()
            return len(rows) == ROUNDS or (len(rows) > round and not rows[-1]["failed"])

        self.running.until(well, BACK)


class Watch(threading.Thread):
    """Looks at the director's memory and the rounds reached as long as it is watched."""

    def __init__(self, cluster: Cluster, running):
        super().__init__(daemon=True)
        self.cluster, self.running = cluster, running
        self.begun, self.over, self.seen = time.monotonic(), threading.Event(), []
        self.reached = 0

    def run(self):
        while not self.over.wait(0.5):
            director = self.cluster.processes["director"]
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                if rss := psutil.Process(director.pid).memory_info().rss / 1e6:  # not if it has just been killed
                    self.reached = max(self.reached, len(self.running().rows()))  # a new notebook is told them again
                    facts = {"second": time.monotonic() - self.begun, "round": self.reached}
                    self.seen.append(facts | {"rss_mb": rss, "director": director.pid})

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.join()

    def by_round(self) -> list[dict]:
        """What was seen last in each round, for each process of the director."""
        return list({(seen["director"], seen["round"]): seen for seen in self.seen}.values())


# --- What is left -----------------------------------------------------------------------------------------------


def processes_of(place: Path) -> list[str]:
    """Command lines of the processes that work in the place, or were told of it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.info["cmdline"] or [])
            if str(place) in words or process.environ().get("CROWDGUARD_RUNS", "").startswith(str(place)):
                found.append(words)
    return found


def left_at_work(cluster: Cluster) -> list[str]:
    """Files of experiments that are over, in the folders in which director and envoys work."""
    folders = [next((cluster.runs / name).glob(f".{name}-*")) for name in ("director", *NAMES)]
    return [str(path) for folder in folders for path in folder.iterdir() if path.name != ".metaflow"]


def can_be_bound(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("localhost", port)) != 0 and probe.bind(("", port)) is None


def main_accuracy(rows: list[dict]) -> float:
    return float(np.mean([row["main_accuracy"] for row in rows[-LAST:]]))


# --- The soak ---------------------------------------------------------------------------------------------------


@pytest.fixture
def link():
    """None where network namespaces may not be made."""
    with contextlib.ExitStack() as stack:
        made = None
        with contextlib.suppress(PermissionError):
            made = stack.enter_context(Link())
        yield made


@pytest.fixture
def disk(tmp_path):
    """The director's, of eight megabytes; None where none may be mounted."""
    folder = tmp_path / "runs" / "director"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    yield None if mounted.returncode else folder
    if not mounted.returncode:
        subprocess.run(["umount", "-l", folder], check=True)


def undisturbed(cluster: Cluster) -> dict:
    running = cluster.notebook(NET)
    with Watch(cluster, lambda: running) as watch:
        running.well(ROUNDS, 900)
    return {"rows": running.rows(), "memory": watch.by_round()}


def disturbed(cluster: Cluster, faults: Faults) -> dict:
    faults.begin()
    done = []
    with Watch(cluster, lambda: faults.running) as watch:
        for rounds, kind, after in faults.plan():
            round = len(faults.running.reached(watch.reached).rows()) + rounds
            if round > ROUNDS - QUIET:
                break
            faults.running.reached(round)
            time.sleep(after)
            begun = time.monotonic()
            fact = {"fault": kind, "round": round, "second": begun - watch.begun, "how": getattr(faults, kind)()}
            faults.wait_until_well(round)
            done.append(fact | {"seconds": time.monotonic() - begun})
        rows = faults.running.well(ROUNDS, 900).rows()
    return {"rows": rows, "memory": watch.by_round(), "faults": done}


def growth(memory: list[dict]) -> list[float]:
    """MB by which each process of the director has grown in the second half of its rounds."""
    lives = [[seen["rss_mb"] for seen in memory if seen["director"] == pid] for pid in {m["director"] for m in memory}]
    return [life[-1] - life[len(life) // 2] for life in lives]


def draw(seen: dict, path: Path) -> None:
    """The director's memory over the rounds, and what went wrong when."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("undisturbed", "tab:grey"), ("disturbed", "tab:blue")):
        memory = seen.get(name, {}).get("memory", [])
        for number, pid in enumerate(dict.fromkeys(one["director"] for one in memory)):
            life = [one for one in memory if one["director"] == pid]
            label = name if not number else None
            axes.plot([m["round"] for m in life], [m["rss_mb"] for m in life], ".-", color=colour, label=label)
    kinds = sorted({fault["fault"] for fault in seen["disturbed"]["faults"]})
    for fault in seen["disturbed"]["faults"]:
        colour = f"C{kinds.index(fault['fault']) + 1}"
        axes.axvline(fault["round"] + 0.5, color=colour, linewidth=1, alpha=0.6)
        axes.annotate(
            fault["fault"].replace("_", " "), (fault["round"] + 0.5, 0.02), xycoords=("data", "axes fraction"),
            rotation=90, fontsize=7, color=colour, ha="right",
        )  # fmt: skip
    axes.set(xlabel="round", ylabel="resident memory of the director, MB", ylim=(0, None))
    axes.legend(loc="center left")
    figure.savefig(path, dpi=150)


def test_a_federation_survives_many_rounds_with_faults_and_leaves_nothing_behind(tmp_path, monkeypatch, disk, link):
    results = Path(os.environ.get("SOAK_RESULTS", tmp_path))
    results.mkdir(parents=True, exist_ok=True)
    temporary, before = tmp_path / "tmp", {*ROOT.iterdir(), ROOT / ".federation", ROOT / ".pytest_cache"}
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    host, within = (link.here, {"Chandler": link.within}) if link else ("localhost", {})
    with Cluster(tmp_path, host, DATA, within) as cluster:
        seen = {"seed": SEED, "settings": NET} | ({"undisturbed": undisturbed(cluster)} if ROUNDS >= FULL else {})
        faults = Faults(cluster, random.Random(SEED), disk, link)
        seen["disturbed"] = disturbed(cluster, faults)
        (results / "soak.json").write_text(json.dumps(seen))
        draw(seen, results / "soak.png")
        again = cluster.notebook(["rounds=1"]).well(1).rows()[0]
        assert again["failed"] == {} and set(again["votes"]) == set(NAMES), "all are back"
        deadline = time.monotonic() + 40
        while left := left_at_work(cluster):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
    rows = seen["disturbed"]["rows"]
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert processes_of(tmp_path) == []
    assert [path.name for path in temporary.iterdir() if "torchinductor" not in path.name] == [], "but torch's cache"
    assert {*ROOT.iterdir(), ROOT / ".pytest_cache"} == before and not cluster.folder.exists()
    assert all(map(can_be_bound, cluster.ports))
    assert len(seen["disturbed"]["faults"]) >= max(2, ROUNDS // 10)
    if ROUNDS >= FULL:
        assert abs(main_accuracy(rows) - main_accuracy(seen["undisturbed"]["rows"])) <= POINTS
        assert all(grown <= GROWTH for part in ("undisturbed", "disturbed") for grown in growth(seen[part]["memory"]))
