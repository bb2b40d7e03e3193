"""What inspection costs: this project, the published implementation and bare forward passes, side by side.

    python benchmarks/inspection.py      # continues where it was stopped

On the 128 images of the default, for narrow and full nets. Every repetition runs all on the same models and images, one
after the other, each in a process of its own with one thread; so ratios are paired. Time is the processor's, of a
second run; peak memory is what the first run holds beyond its models and images.
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
from common import FIGURES, RESULTS, append, arguments, done, load_experiment
from tqdm import tqdm

matplotlib.use("Agg")
TABLE = RESULTS / "inspection.csv"
PUBLISHED = "openfl-tutorials/experimental/workflow/CrowdGuard/CrowdGuardClientValidation.py"
SAMPLES = 128
WAYS = ("bare forward", "published", "paper", "crowd")


@dataclass(frozen=True)
class Point:
    models: int
    samples: int
    way: str
    width: int
    hidden: int


def points() -> list[Point]:
    nets = ((32, 512), (64, 4096))
    return [Point(models, SAMPLES, way, *net) for net in nets for models in (4, 10, 20) for way in WAYS]


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
            for output in experiment.recorded(model, images)[0]
        ]
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        module.CrowdGuardClientValidation.validate_models(origin, models, 0, loader, "cpu")


def measure(point: Point) -> dict:
    torch.set_num_threads(1)
    experiment = load_experiment()
    origin, models, loader = crowd_of(experiment, point)
    run = {
        "bare forward": lambda: bare_forward(origin, models, loader),
        "published": lambda: published(experiment, origin, models, loader),
        "paper": lambda: experiment.validate_models(origin, models, 0, loader, "cpu", "paper"),
        "crowd": lambda: experiment.validate_models(origin, models, 0, loader, "cpu"),
    }[point.way]
    peak = Peak()
    peak.start()
    run()
    peak.done.set()
    peak.join()
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    return {"seconds": round(seconds, 3), "peak_mb": round((peak.largest - peak.before) / 1e6, 1)}


# --- All of them --------------------------------------------------------------------------------------------------


def run(repetitions: int) -> None:
    """Appends what is missing in the CSV, repetition after repetition."""
    known = done(TABLE, "repetition", *asdict(points()[0]))
    missing = [(r, p) for r in range(repetitions) for p in points() if (r, *asdict(p).values()) not in known]
    for repetition, point in tqdm(missing, desc="measurements"):
        command = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
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
    """Time against bare forward passes, with the range of the repetitions, and memory; a panel each, by net and way."""
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (width, way), rows in summary.droplevel("samples").groupby(level=["width", "way"], sort=False):
        if way == "bare forward":
            continue
        rows, style = rows.reset_index(), "-" if width == 64 else "--"
        label, colour = f"{way}, {'full' if width == 64 else 'narrow'} net", f"C{WAYS.index(way)}"
        reach = rows["ratio"] - rows["least"], rows["most"] - rows["ratio"]
        axes[0].errorbar(rows["models"], rows["ratio"], reach, marker="o", color=colour, linestyle=style, label=label)
        axes[1].plot(rows["models"], rows["peak_mb"], marker="o", color=colour, linestyle=style)
    for axis, title in zip(axes, ("processor time / bare forward passes", "peak memory, MB"), strict=True):
        axis.set(title=title, xlabel="models", yscale="log", xticks=[4, 10, 20])
    axes[0].legend(frameon=False, fontsize=7)
    picture.savefig(FIGURES / "inspection.png", dpi=110)


def main() -> None:
    parser = arguments(__doc__, folder=False)  # time does not depend on what is in the images
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--point", type=json.loads, help="only measures this one, a JSON object")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(Point(**args.point))))
        return
    run(args.repetitions)
    summary = table()
    print(summary.to_string())
    figure(summary)


if __name__ == "__main__":
    main()
