"""What is kept of a run: its history as JSON, CSV and TensorBoard's event files, and the model (docs/history.md)."""

import contextlib
import importlib.metadata
import itertools
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

PACKAGES = ("openfl", "torch", "torchvision", "numpy", "scipy", "scikit-learn")
MEASURES = {
    "main_accuracy": "main-task accuracy",
    "backdoor_accuracy": "backdoor accuracy",
    "tpr": "TPR",
    "tnr": "TNR",
}
NAMES = ("excluded", "attackers")
HISTORIES = {"federation": "federation", "plain FedAvg": "undefended"}  # name in CSV and TensorBoard → key in JSON
OURS = ("history.*", "global_model.safetensors", "FederatedCrowdGuard.*", "*.png", "*.pdf")  # what a run leaves


def table(history: list[dict]) -> pd.DataFrame:
    """One line a round."""
    rows = pd.DataFrame(history).set_index("round")
    rows["excluded"] = [left_out(row) for row in history]
    columns = ["main_accuracy", "backdoor_accuracy", "excluded", "tpr", "tnr"]
    return rows[columns].astype(dict.fromkeys(MEASURES, float)).rename(columns=MEASURES)


def left_out(row: dict) -> str:
    """Whose models the average is without: excluded, or never there."""
    missing = {*row["participants"]} - {*row["accepted"]} - {*row["excluded"]}
    return ", ".join([*row["excluded"], *(f"{name} (no model)" for name in sorted(missing))]) or "–"


def set_aside(results: Path, resume: str) -> None:
    """Moves what an earlier run has left into a folder of its name, so that nothing is lost or mixed."""
    try:
        run = json.loads((results / "history.json").read_text())["run"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if run == resume or not (isinstance(run, str) and re.fullmatch(r"[\w-]+", run)):
        return
    copies = itertools.count(2)  # a run can go on after it has been set aside
    aside = results / run
    while aside.exists():
        aside = results / f"{run}.{next(copies)}"
    aside.mkdir()
    for file in itertools.chain.from_iterable(results.glob(pattern) for pattern in OURS):
        file.replace(aside / file.name)
    print(f"what {run} has left is in {aside}")


def left_before(results: Path, run: str) -> dict:
    """What a run that goes on has left there, or nothing: keys as in `history.json`."""
    try:
        kept = json.loads((results / "history.json").read_text())
    except (OSError, ValueError):
        return {}
    return kept if kept.get("run") == run else {}


def write(path: Path, content: bytes) -> None:
    """Writes a file whole, or not at all."""
    part = path.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Results:
    """Keeps in a folder what a run reaches, as far as it is known.

    Args:
        config: the run's settings, a dataclass.
        show: called with the history whenever it has grown.
    """

    def __init__(self, folder: Path, config=None, show: Callable[[list], None] | None = None):
        self.folder, self.show, self.logged = folder, show, {}
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        about = {
            "config": vars(config) if config else None,
            "versions": {"python": platform.python_version()} | versions,
        }
        empty = {"federation": [], "traffic": [], "undefended": [], "envoys": {}}
        self.reached = {"format": 1, "run": ""} | about | empty

    def keep(self, model: bytes = b"", **reached) -> None:
        """Writes what there is; `reached` are keys of `history.json`."""
        grown = len(reached.get("federation", [])) > len(self.reached["federation"])
        if (run := reached.get("run")) and not self.reached["run"]:
            before = left_before(self.folder, run)
            self.reached["undefended"] = before.get("undefended", [])  # which may not be run again
            self.logged = {name: len(before.get(key, [])) for name, key in HISTORIES.items()}
        self.reached |= reached
        write(self.folder / "history.json", json.dumps(self.reached, indent=1).encode())
        histories = {name: self.reached[key] for name, key in HISTORIES.items()}
        write(self.folder / "history.csv", as_csv(histories).encode())
        for name, key in HISTORIES.items():
            if key in reached:  # not what was reached before this run went on
                self.log(name, reached[key])
        if model:
            write(self.folder / "global_model.safetensors", model)
        if grown and self.show:
            self.show(self.reached["federation"])

    def log(self, name: str, history: list[dict]) -> None:
        """Writes an event file for TensorBoard with the rounds that are new.

        Not by a `SummaryWriter`: it has a thread and a queue, whose lock Ctrl-C can leave taken for ever.
        """
        known = self.logged.get(name, 0)
        if len(history) > known:
            folder = self.folder / "tensorboard" / f"{self.reached['run']} {name}"
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(EventsWriter(str(folder / "events"), f".round-{known + 1:04}")) as events:
                for row, measure in itertools.product(history[known:], MEASURES):
                    if row[measure] is not None:
                        value = scalar(measure, row[measure])
                        events.write_event(Event(wall_time=time.time(), step=row["round"], summary=value))
        self.logged[name] = len(history)


def as_csv(histories: dict[str, list[dict]]) -> str:
    """A line for each round of each history; names are joined by semicolons."""
    lines = [
        {"history": name, "round": row["round"]}
        | {measure: row[measure] for measure in MEASURES}
        | {what: ";".join(row[what]) for what in (*NAMES, "failed")}
        for name, history in histories.items()
        for row in history
    ]
    return pd.DataFrame(lines).to_csv(index=False)
