"""What a live federation on this machine sends, and what it spends its time on: four envoys, the full net.

    python benchmarks/federation.py ~/cifar10      # half an hour on 2 cores; continues where it was stopped

The bytes are counted where OpenFL serialises the messages. A hand-over is what lies between two steps of the
aggregator; the participant that answers last decides how long it takes: its work, the way of its messages there and
back with their serialisation, and the rest, which is waiting; `waiting` is that of one hand-over.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pandas as pd
import psutil
from common import RESULTS, ROOT, append, arguments, done
from tqdm import tqdm

TABLE = RESULTS / "federation.csv"
ENVOYS = {"data.source": "image_folder", "data.train_samples": 256, "data.test_samples": 128, "attack.first_round": 1}
CONFIG = {"rounds": 2, "rule": "crowd", "validation_samples": 128}
DTYPES = ("bfloat16", "float32")


class Tree(threading.Thread):
    """The largest memory of this process's descendants together, shared pages counted once, looked at every second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.done = 0, threading.Event()

    def run(self):
        while not self.done.wait(1):
            self.largest = max(self.largest, sum(map(self.size, psutil.Process().children(recursive=True))))

    @staticmethod
    def size(process) -> int:
        try:
            return process.memory_full_info().pss
        except psutil.Error:
            return 0


def options(changes: dict) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def history_of(folder: Path, dtype: str) -> tuple[dict, float]:
    """Runs the notebook on a federation of its own; returns what it writes, and the peak of memory in GB."""
    with tempfile.TemporaryDirectory() as results:
        notebook = [sys.executable, "experimenter/run.py", "--config", "published", "--results", results]
        launch = [sys.executable, "local/federation.py", *options(ENVOYS | {"data.folder": folder})]
        command = [*launch, "--", *notebook, *options(CONFIG | {"update_dtype": dtype})]
        tree = Tree()
        tree.start()
        ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        tree.done.set()
        if ended.returncode:
            raise RuntimeError(f"the federation failed:\n{ended.stdout[-3000:]}")
        return json.loads((Path(results) / "history.json").read_text()), tree.largest / 1e9


def steps(written: dict) -> list[dict]:
    """A row for each step of the participants: its bytes, and where its time went."""
    hand_overs, tasks, ended = {}, [], None
    for row in sorted(written["traffic"], key=lambda row: row["given"]):
        if row["participant"] != "aggregator":
            tasks.append(row)
            continue
        if tasks:  # several hand-overs a step if the models come in chunks
            hand_overs.setdefault((tasks[0]["round"], tasks[0]["step"]), []).append((tasks, row["given"] - ended))
        tasks, ended = [], row["taken"]
    return [step_row(written["federation"], *where, those) for where, those in hand_overs.items()]


def step_row(history: list[dict], number: int, step: str, hand_overs: list) -> dict:
    last = [max(tasks, key=lambda task: task["taken"]) for tasks, _ in hand_overs]
    wall, away = sum(seconds for _, seconds in hand_overs), sum(task["taken"] - task["given"] for task in last)
    work = history[number - 1]["per_participant"][last[-1]["participant"]]["seconds"][step]
    times = {"wall": wall, "work": work, "transport": away - work, "waiting": (wall - away) / len(hand_overs)}
    megabytes = pd.DataFrame([task for tasks, _ in hand_overs for task in tasks])[["down", "up"]] / 1e6
    sizes = {"down_mb": megabytes["down"].sum(), "up_mb": megabytes["up"].sum(), "largest_mb": megabytes.max().max()}
    where = {"round": number, "step": step, "hand_overs": len(hand_overs)}
    return where | {key: round(float(value), 2) for key, value in (sizes | times).items()}


def run(folder: Path, repetitions: int) -> None:
    known = done(TABLE, "repetition", "dtype")
    missing = [(r, dtype) for r in range(repetitions) for dtype in DTYPES if (r, dtype) not in known]
    for repetition, dtype in tqdm(missing, desc="federations"):
        written, peak = history_of(folder, dtype)
        where = {"repetition": repetition, "dtype": dtype}
        append(TABLE, [where | row | {"peak_gb": round(peak, 2)} for row in steps(written)])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    run(args.folder, args.repetitions)
    rows = pd.read_csv(TABLE)
    rows["total_mb"] = rows["down_mb"] + rows["up_mb"]
    print(rows.groupby(["dtype", "round", "step"], sort=False).median().drop(columns="repetition").round(2).to_string())
    print(rows.groupby(["dtype", "repetition", "round"])["total_mb"].sum().groupby(["dtype", "round"]).median())
    print(rows.groupby("dtype")[["waiting", "largest_mb", "peak_gb"]].agg(["median", "max"]))


if __name__ == "__main__":
    main()
