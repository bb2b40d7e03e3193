"""What inspection costs: this project, the published implementation and bare forward passes, side by side.

Every repetition runs all on the same models and images, one after the other, each in a process of its own; so ratios
are paired. Peak memory is what a process holds beyond its models and images.
"""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import openfl
import pandas as pd
import psutil
import torch
from common import FIGURES, RESULTS, append, done, load_experiment
from matplotlib.ticker import NullLocator
from tqdm import tqdm

matplotlib.use("Agg")
TABLE = RESULTS / "inspection.csv"
PUBLISHED = "openfl-tutorials/experimental/workflow/CrowdGuard/CrowdGuardClientValidation.py"
WAYS = ("bare forward", "published", "paper", "crowd")


@dataclass(frozen=True)
class Point:
    models: int
    samples: int
    way: str
    width: int
    hidden: int


def points() -> list[Point]:
    """Samples with four full nets, and models with narrow ones."""
    by_samples = [(4, samples, 64, 4096) for samples in (128, 500, 2000)]
    by_models = [(models, 128, 32, 512) for models in (4, 10, 20)]
    return [Point(m, s, way, w, h) for m, s, w, h in by_samples + by_models for way in WAYS]


# --- In a process of its own --------------------------------------------------------------------------------------


class Peak(threading.Thread):
    """The largest resident memory of this process, looked at every five milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.largest = self.process.memory_info().rss

    def run(self):
        while not self.done.wait(0.005):
            self.largest = max(self.largest, self.process.memory_info().rss)


def crowd_of(experiment, point: Point):
    """A global model, local models near it of which the last is twice as far away, and images of ten classes."""
    config = experiment.Config(hidden=point.hidden, width=point.width)
    origin, models = experiment.initial_model(config), []
    torch.manual_seed(0)
    for index in range(point.models):
        step = 0.002 if index < point.models - 1 else 0.004
        state = {name: value + step * torch.randn_like(value) for name, value in origin.state_dict().items()}
        models.append(experiment.with_state(origin, state))
    images, labels = torch.randn(point.samples, 3, 32, 32), torch.arange(point.samples) % 10
    return (
        origin,
        models,
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=experiment.BATCH),
    )


@torch.no_grad()
def bare_forward(origin, models, loader):
    for model in (origin, *models):
        model.eval()
    for images, _ in loader:
        for model in (origin, *models):
            model(images)


def published(experiment, origin, models, loader):
    """Its nets bring `predict_internal_states`; ours get it here."""
    spec = importlib.util.spec_from_file_location("published", Path(openfl.__file__).parent.parent / PUBLISHED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for model in (origin, *models):
        model.predict_internal_states = lambda images, model=model: [
            output.view(len(images), *([-1] if output.dim() == 2 else []))
            for output in experiment.hidden_outputs(model, images)
        ]
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        module.CrowdGuardClientValidation.validate_models(origin, models, 0, loader, "cpu")


def measure(point: Point) -> dict:
    experiment = load_experiment()
    origin, models, loader = crowd_of(experiment, point)
    run = {
        "bare forward": lambda: bare_forward(origin, models, loader),
        "published": lambda: published(experiment, origin, models, loader),
        "paper": lambda: experiment.validate_models(origin, models, 0, loader, "cpu", "paper"),
        "crowd": lambda: experiment.validate_models(origin, models, 0, loader, "cpu"),
    }[point.way]
    origin(torch.zeros(64, 3, 32, 32))  # threads and buffers are there from now on
    peak = Peak()
    peak.start()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    peak.done.set()
    return {"seconds": round(seconds, 3), "peak_mb": round((peak.largest - peak.before) / 1e6, 1)}


# --- All of them --------------------------------------------------------------------------------------------------


def run(repetitions: int) -> None:
    """Appends what is missing in the CSV, repetition after repetition."""
    known = done(TABLE, "repetition", *asdict(points()[0]))
    missing = [(r, p) for r in range(repetitions) for p in points() if (r, *asdict(p).values()) not in known]
    for repetition, point in tqdm(missing, desc="measurements"):
        command = [sys.executable, __file__, json.dumps(asdict(point))]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        append(TABLE, [{"repetition": repetition} | asdict(point) | json.loads(answer)])


def table() -> pd.DataFrame:
    """Medians over the repetitions, and of the paired ratios to bare forward passes with their range."""
    rows = pd.read_csv(TABLE)
    where = ["width", "models", "samples"]
    bare = rows[rows.way == "bare forward"].set_index(["repetition", *where])["seconds"]
    rows["ratio"] = rows["seconds"] / bare.loc[pd.MultiIndex.from_frame(rows[["repetition", *where]])].to_numpy()
    groups = rows.groupby([*where, "way"], sort=False)
    return groups.agg(
        seconds=("seconds", "median"),
        ratio=("ratio", "median"),
        least=("ratio", "min"),
        most=("ratio", "max"),
        peak_mb=("peak_mb", "median"),
    ).round(2)


def figure(summary: pd.DataFrame) -> None:
    """Time against bare forward passes, with the range of the repetitions, and memory; four full nets."""
    full = summary.xs(64, level="width").droplevel("models").reset_index()
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, value, title in zip(axes, ("ratio", "peak_mb"), ("time / bare forward passes", "MB"), strict=True):
        for way, rows in full.groupby("way", sort=False):
            [line] = axis.plot(rows["samples"], rows[value], marker="o", label=way)
            if value == "ratio":
                axis.fill_between(
                    rows["samples"], rows["least"], rows["most"], color=line.get_color(), alpha=0.15, lw=0
                )
        axis.set(title=title, xlabel="samples", yscale="log", xscale="log")
        axis.set_xticks(full["samples"].unique(), labels=full["samples"].unique(), minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].legend(frameon=False, fontsize=8)
    picture.savefig(FIGURES / "inspection.png", dpi=110)


def main(folder: Path, repetitions: int) -> None:
    """Does not need the folder: time does not depend on what is in the images."""
    run(repetitions)
    summary = table()
    print(summary.to_string())
    figure(summary)


if __name__ == "__main__":
    print(json.dumps(measure(Point(**json.loads(sys.argv[1])))))
