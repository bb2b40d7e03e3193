"""Do updates in half precision change a vote? Single rounds of `detection.py`, every update sent as bfloat16, float16
and float32.

    python benchmarks/precision.py ~/cifar10

One line a setting, seed, type and participant goes to `benchmarks/precision.csv`: whether its vote is that on float32
updates.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from common import ROOT, arguments
from detection import Crowd, Setting, Trained, flat, load_images, settings
from tqdm import tqdm

RESULTS = ROOT / "benchmarks" / "precision.csv"
DTYPES = ("float32", "bfloat16", "float16")


class SentAs(Trained):
    """A crowd whose updates travel in another type; a cache of its own."""

    def __init__(self, images, crowd: Crowd, seed: int, dtype: str):
        super().__init__(images, crowd, seed)
        if dtype != self.config.update_dtype:
            self.config, self.folder = replace(self.config, update_dtype=dtype), self.folder / dtype
            self.folder.mkdir(exist_ok=True)


def rows_of(folder: Path, crowd: Crowd, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    images, points = load_images(folder), [setting for setting in settings() if setting.crowd == crowd]
    votes = {dtype: votes_of(SentAs(images, crowd, seed, dtype), points) for dtype in DTYPES}
    rows = []
    for dtype, by_setting in votes.items():
        for setting, by_voter in by_setting.items():
            for voter, suspects in enumerate(by_voter):
                same = suspects == votes["float32"][setting][voter]
                rows.append(flat(setting) | {"seed": seed, "dtype": dtype, "voter": voter, "same": same})
    return rows


def votes_of(trained: Trained, points: list[Setting]) -> dict:
    """setting → everybody's suspects, on the images of `detection.py`."""
    trained.views(list(dict.fromkeys(role for setting in points for role in setting.roles)))  # all at once
    views = {setting: trained.views(setting.roles)["G"] for setting in points}
    return {setting: [view.suspects(voter, "crowd") for voter, view in enumerate(v)] for setting, v in views.items()}


def main():
    args = arguments(__doc__, seeds=1).parse_args()
    crowds = list(dict.fromkeys(setting.crowd for setting in settings() if setting.crowd.width < 64))
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(rows_of, args.folder, crowd, seed) for seed in range(args.seeds) for crowd in crowds]
        rows = [row for job in tqdm(as_completed(jobs), total=len(jobs), desc="crowds x seeds") for row in job.result()]
    pd.DataFrame(rows).to_csv(RESULTS, index=False)
    print(pd.DataFrame(rows).groupby("dtype")["same"].agg(["count", "mean"]))


if __name__ == "__main__":
    main()
