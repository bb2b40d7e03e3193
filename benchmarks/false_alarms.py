"""How often honest models are thrown out while nobody attacks: rounds drawn from real ones on CIFAR-10.

    python benchmarks/false_alarms.py ~/cifar10

Forty honest participants train from the global model of `detection.py` and inspect each other. What a validator sees of
a model does not depend on who else is there, so every choice of 4, 5, 6, 10 or 20 of the forty is a round of its own.
One line a partition, size and rule goes to `benchmarks/false_alarms.csv`.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from common import ROOT
from detection import Crowd, Role, Trained, experiment, load_images
from tqdm import tqdm

POOL = 40
ROUNDS = 500
SEED = 0
RESULTS = ROOT / "benchmarks" / "false_alarms.csv"


def rounds(trained: Trained, size: int, rule: str) -> list[float]:
    """Share of the models that were excluded, for each of 500 rounds."""
    rng, excluded = np.random.default_rng([SEED, size]), []
    everything = trained.views([Role(p) for p in range(POOL)])["G"]
    for _ in range(ROUNDS):
        members = rng.choice(POOL, size, replace=False)
        ballots = np.ones((size, size), dtype=int)
        for voter, member in enumerate(members):
            distances, labels = everything[member]
            ballots[voter, experiment.verdict(distances[:, :, members], labels, voter, rule)] = 0
        excluded.append(1 - experiment.stacked_clustering(ballots, rule).mean())
    return excluded


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="train/<class>/… and test/<class>/…")
    images = load_images(parser.parse_args().folder.expanduser())
    rows = []
    for alpha in (None, 0.5):
        trained = Trained(images, Crowd(POOL, alpha), SEED)
        for size in tqdm((4, 5, 6, 10, 20), desc="IID" if alpha is None else f"Dirichlet {alpha}"):
            for rule in experiment.RULES:
                excluded = np.array(rounds(trained, size, rule))
                quiet, tnr = (excluded == 0).mean(), 1 - excluded.mean()
                rows.append(
                    {"alpha": alpha, "participants": size, "rule": rule, "rounds": ROUNDS, "quiet": quiet, "tnr": tnr}
                )
                pd.DataFrame(rows).round(4).to_csv(RESULTS, index=False)
    print(pd.read_csv(RESULTS).to_string(index=False))


if __name__ == "__main__":
    main()
