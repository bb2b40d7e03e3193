"""How often honest models are thrown out while nobody attacks: rounds drawn from real ones on CIFAR-10.

    python benchmarks/false_alarms.py ~/cifar10

Forty honest participants train from the global model of `detection.py` and inspect each other. What a validator sees of
a model does not depend on who else is there, so every choice of 4, 5, 6, 10 or 20 of the forty is a round of its own.
One line a partition, size and rule goes to `benchmarks/false_alarms.csv`.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import ROOT, append, arguments, done
from detection import Crowd, Role, Trained, experiment, load_images, warm_model
from tqdm import tqdm

POOL = 40
SIZES = (4, 5, 6, 10, 20)
ROUNDS = 500
SEED = 0
RESULTS = ROOT / "benchmarks" / "false_alarms.csv"


def rounds(folder: Path, alpha: float | None, size: int, rule: str) -> dict:
    """How many of 500 rounds exclude nobody, and the share of models accepted."""
    torch.set_num_threads(1)
    trained = Trained(load_images(folder), Crowd(POOL, alpha), SEED)
    everything = trained.views([Role(p) for p in range(POOL)])["G"]
    rng, accepted = np.random.default_rng([SEED, size]), []
    for _ in range(ROUNDS):
        members = rng.choice(POOL, size, replace=False)
        ballots = np.ones((size, size), dtype=int)
        for voter, member in enumerate(members):
            ballots[voter, list(everything[member].of(members).suspects(voter, rule))] = 0
        accepted.append(experiment.stacked_clustering(ballots, rule).mean())
    scores = {"quiet": np.mean(np.array(accepted) == 1).round(4), "tnr": np.mean(accepted).round(4)}
    return {"alpha": alpha, "participants": size, "rule": rule, "rounds": ROUNDS} | scores


def look_at_each_other(folder: Path, alpha: float | None) -> None:
    """Fills the cache."""
    torch.set_num_threads(1)
    Trained(load_images(folder), Crowd(POOL, alpha), SEED).views([Role(p) for p in range(POOL)])


def missing() -> list[tuple]:
    """What is not in the CSV yet, the quick rule first."""
    jobs = [(alpha, size, rule) for rule in experiment.RULES for size in SIZES for alpha in (None, 0.5)]
    known = done(RESULTS, "alpha", "participants", "rule")
    return [job for job in jobs if (job[0] or 0, *job[1:]) not in known]


def main():
    args = arguments(__doc__).parse_args()
    warm_model(load_images(args.folder), Crowd(POOL))
    with ProcessPoolExecutor(args.workers) as pool:
        for job in [pool.submit(look_at_each_other, args.folder, alpha) for alpha in (None, 0.5)]:
            job.result()
        jobs = [pool.submit(rounds, args.folder, *job) for job in missing()]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="partitions x sizes x rules"):
            append(RESULTS, [job.result()])
    print(pd.read_csv(RESULTS).sort_values(["rule", "alpha", "participants"]).to_string(index=False))


if __name__ == "__main__":
    main()
