"""How often honest models are thrown out while nobody attacks: rounds drawn from real ones on CIFAR-10.

    python benchmarks/false_alarms.py ~/cifar10

Forty honest participants train from the warmed-up global model and inspect each other. What a validator sees of a model
does not depend on who else is there, so every choice of 4, 5, 6, 10 or 20 of the forty is a round of its own. One line
a seed, partition, size and rule goes to `benchmarks/results/false_alarms.csv`; what is there is not run again.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import RESULTS, append, arguments, done
from detection import Inspected, rules
from rounds import JUDGING, Crowd, Role, experiment
from tqdm import tqdm

POOL = 40
SIZES = (4, 5, 6, 10, 20)
ROUNDS = 500
JUDGES = ("crowd", "paper")


def everything(folder: Path, alpha: float | None, seed: int) -> list:
    """What each of the forty sees of all of them."""
    inspected = Inspected(folder, Crowd(POOL, alpha), seed)
    states = [inspected.trained.state(Role(p)) for p in range(POOL)]
    return [inspected.look(p, states) for p in tqdm(range(POOL), desc=f"inspections, {alpha or 'IID'}, {seed}")]


def score(views: list, size: int, rule: str, seed: int) -> dict:
    """How many of 500 rounds exclude nobody, and the share of models accepted."""
    rng, accepted, judge = np.random.default_rng([seed, size]), [], rules()[rule]
    for _ in range(ROUNDS):
        members = np.sort(rng.choice(POOL, size, replace=False))
        ballots = np.ones((size, size), dtype=int)
        for voter, member in enumerate(members):
            ballots[voter, list(judge(views[member].of(members), voter))] = 0
        accepted.append(experiment.stacked_clustering(ballots, rule).mean())
    return {"quiet": np.mean(np.array(accepted) == 1).round(4), "tnr": np.mean(accepted).round(5)}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*JUDGING])
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=["crowd"])
    parser.add_argument("--results", type=Path, default=RESULTS / "false_alarms.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(exist_ok=True)
    known = done(args.results, "seed", "alpha", "participants", "rule")
    for seed in args.seeds:
        for alpha in (0.5, None):
            missing = [(n, r) for n in SIZES for r in args.judges if (seed, alpha or 0, n, r) not in known]
            views = everything(args.folder, alpha, seed) if missing else []
            for size, rule in tqdm(missing, desc="sizes x rules"):
                where = {"seed": seed, "alpha": alpha, "participants": size, "rule": rule, "rounds": ROUNDS}
                append(args.results, [where | score(views, size, rule, seed)])
    print(pd.read_csv(args.results).to_string(index=False))


if __name__ == "__main__":
    main()
