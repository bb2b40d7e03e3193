"""What is kept of a run: its history as JSON, CSV and TensorBoard's event files, and the model (docs/history.md)."""

import importlib.metadata
import itertools
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from tensorboardX import SummaryWriter

PACKAGES = ("openfl", "torch", "torchvision", "numpy", "scipy", "scikit-learn")
MEASURES = {
    "main_accuracy": "main-task accuracy",
    "backdoor_accuracy": "backdoor accuracy",
    "tpr": "TPR",
    "tnr": "TNR",
}
NAMES = ("excluded", "attackers")
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
    return ", ".join([*row["excluded"], *(f"{name} (missing)" for name in sorted(missing))]) or "–"


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


def what_stays(results: Path, run: str) -> dict:
    """What a run that goes on has left there that comes from this machine, and may not be reached again."""
    try:
        kept = json.loads((results / "history.json").read_text())
    except (OSError, ValueError):
        return {}
    return {key: kept[key] for key in ("undefended", "envoys") if kept.get("run") == run and key in kept}


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
        self.reached = {"format": 1, "run": "", **about, "federation": [], "traffic": []}
        self.reached |= {"undefended": [], "envoys": {}}

    def keep(self, model: bytes = b"", **reached) -> None:
        """Writes what there is; `reached` are keys of `history.json`."""
        grown = len(reached.get("federation", [])) > len(self.reached["federation"])
        if (run := reached.get("run")) and not self.reached["run"]:
            self.reached |= what_stays(self.folder, run)
        self.reached |= reached
        write(self.folder / "history.json", json.dumps(self.reached, indent=1).encode())
        histories = {"federation": self.reached["federation"], "plain FedAvg": self.reached["undefended"]}
        write(self.folder / "history.csv", as_csv(histories).encode())
        for name, history in histories.items():
            self.log(name, history)
        if model:
            write(self.folder / "global_model.safetensors", model)
        if grown and self.show:
            self.show(self.reached["federation"])

    def log(self, name: str, history: list[dict]) -> None:
        """Writes an event file for TensorBoard with the rounds that are new."""
        known, self.logged[name] = self.logged.get(name, 0), len(history)
        if len(history) > known:
            folder = self.folder / "tensorboard" / f"{self.reached['run']} {name}"
            with SummaryWriter(str(folder), filename_suffix=f".round-{history[known]['round']:04}") as events:
                for row in history[known:]:
                    for measure in MEASURES:
                        if row[measure] is not None:
                            events.add_scalar(measure, row[measure], row["round"])


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
