"""How time and memory grow with the number of participants: one round on LocalRuntime, all in one process.

    python benchmarks/growth.py      # continues where it was stopped

Every number of participants runs in a process of its own, with a narrow net and twelve of the digits each. The first
part of memory is there with any number of participants; what grows is counted from there.
"""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import FIGURES, RESULTS, append, arguments, done, load_experiment, private_attributes
from inspection import Peak
from tqdm import tqdm

matplotlib.use("Agg")
TABLE = RESULTS / "growth.csv"
PARTICIPANTS = (4, 10, 20, 40, 70, 100)
IMAGES = 12


def round_of(experiment, participants: int):
    """One round with so many participants, of whom nobody attacks; returns the flow."""
    from openfl.experimental.workflow.interface import Aggregator, Collaborator
    from openfl.experimental.workflow.runtime import LocalRuntime

    data = {"participants": participants, "train_samples": IMAGES, "test_samples": 4, "batch_size": IMAGES}
    bring = {f"P{i}": functools.partial(private_attributes.participant, f"P{i}", data | {"index": i})
             for i in range(participants)}  # fmt: skip
    members = [Collaborator(name=name, private_attributes_callable=call) for name, call in bring.items()]
    small = {"hidden": 64, "width": 8, "validation_samples": None}
    config = replace(experiment.demo, rounds=1, local_epochs=1, **small)
    flow = experiment.FederatedCrowdGuard(config)
    flow.runtime = LocalRuntime(Aggregator(name="aggregator"), members, backend="single_process")
    with contextlib.redirect_stdout(io.StringIO()):
        flow.run()
    return flow


@torch.no_grad()
def forward_seconds(experiment, config) -> float:
    """Median time of one bare forward pass of a participant's images."""
    model, images, times = experiment.initial_model(config).eval(), torch.randn(IMAGES, 3, 32, 32), []
    for _ in range(50):
        started = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def measure(participants: int) -> dict:
    experiment = load_experiment()
    round_of(experiment, 2)  # what is loaded and allocated once
    peak = Peak()
    peak.start()
    flow = round_of(experiment, participants)
    peak.done.set()
    [row] = flow.history
    seconds = [mine["seconds"]["local_validation"] for mine in row["per_participant"].values()]
    return {
        "validation_seconds": round(float(np.median(seconds)), 3),
        "longest_validation": max(seconds),
        "forward_seconds": round(forward_seconds(experiment, flow.config), 5),
        "peak_mb": round((peak.largest - peak.before) / 1e6, 1),
        "update_mb": round(len(flow.global_model) / 2e6, 3),
        "voters": len(row["votes"]),
    }


def run(repetitions: int) -> None:
    known = done(TABLE, "repetition", "participants")
    missing = [(r, n) for r in range(repetitions) for n in PARTICIPANTS if (r, n) not in known]
    for repetition, participants in tqdm(missing, desc="numbers of participants"):
        command = [sys.executable, __file__, "--participants", str(participants)]
        with tempfile.TemporaryDirectory() as folder:  # metaflow writes into the current one
            environment = os.environ | {"METAFLOW_USER": "benchmark"}
            ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        measured = json.loads(ended.stdout.splitlines()[-1])
        append(TABLE, [{"repetition": repetition, "participants": participants} | measured])


def figure(rows: pd.DataFrame) -> None:
    """Medians with their range, the straight line through them, and what the forward passes alone would take."""
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = {"validation_seconds": "validation, seconds a participant", "peak_mb": "memory of all, MB"}
    for axis, (value, title) in zip(axes, titles.items(), strict=True):
        groups = rows.groupby("participants")[value]
        middle = groups.median()
        reach = [middle - groups.min(), groups.max() - middle]
        slope, constant = np.polyfit(rows["participants"], rows[value], 1)
        axis.errorbar(middle.index, middle, yerr=reach, fmt="o", capsize=3)
        axis.plot(middle.index, constant + slope * middle.index, color="gray", lw=1)
        axis.set(title=title, xlabel="participants N", ylim=(0, None))
        axis.annotate(f"{constant:.3g} + {slope:.3g} N", (0.05, 0.88), xycoords="axes fraction")
    forward = rows["forward_seconds"].median()
    axes[0].plot(
        middle.index, forward * middle.index, ls="--", color="gray", lw=1, label=f"forward passes, {forward:.2g} N"
    )
    axes[0].legend(frameon=False, fontsize=8, loc="center left")
    picture.savefig(FIGURES / "growth.png", dpi=110)


def main() -> None:
    parser = arguments(__doc__, folder=False)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--participants", type=int, help="only measures one round with so many, for all of them")
    args = parser.parse_args()
    if args.participants:
        print(json.dumps(measure(args.participants)))
        return
    run(args.repetitions)
    rows = pd.read_csv(TABLE)
    print(rows.groupby("participants").median().to_string())
    figure(rows)


if __name__ == "__main__":
    main()
