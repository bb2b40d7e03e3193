"""Do updates in half precision change a vote? Single rounds of `detection.py`, every update sent as bfloat16, float16
and float32.

    python benchmarks/precision.py ~/cifar10

One line a setting, seed, type and participant goes to `benchmarks/precision.csv`: its vote, and whether it is that on
float32 updates.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
import torch
from common import ROOT, arguments
from detection import Crowd, Trained, experiment, flat, load_images, settings
from tqdm import tqdm

RESULTS = ROOT / "benchmarks" / "precision.csv"
DTYPES = ("float32", "bfloat16", "float16")


class TrainedOnce(Trained):
    """Keeps what was trained, so that it can be sent in several types; nothing of it is cached on disk."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kept = {}

    def sent(self, role, dtype: str):
        """The model that arrives."""
        if role not in self.kept:
            exact = self.train(role)
            self.kept[role] = {n: self.reference[n] + role.scale * (v - self.reference[n]) for n, v in exact.items()}
        packed = experiment.pack_update(self.kept[role], self.reference, dtype)
        return experiment.with_state(self.global_model, experiment.unpack_update(packed, self.reference))


def rows_of(folder: Path, crowd: Crowd, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    trained, rows = TrainedOnce(load_images(folder), crowd, seed), []
    for setting in (setting for setting in settings() if setting.crowd == crowd):
        found = {dtype: votes(trained, setting, dtype) for dtype in DTYPES}
        for dtype, by_voter in found.items():
            for voter, suspects in enumerate(by_voter):
                same = suspects == found["float32"][voter]
                rows.append(flat(setting) | {"seed": seed, "dtype": dtype, "voter": voter, "same": same})
    return rows


def votes(trained: Trained, setting, dtype: str) -> list[list[int]]:
    """Everybody's suspects, on the images of `detection.py`."""
    models = [trained.sent(role, dtype) for role in setting.roles]
    everyone = enumerate(trained.validation_loaders())
    return [experiment.validate_models(trained.global_model, models, voter, mine, "cpu") for voter, mine in everyone]


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
