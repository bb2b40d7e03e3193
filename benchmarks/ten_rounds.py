"""Attacks too faint for one round, repeated for ten: real CIFAR-10, ten participants, a tenth of the attackers' data
poisoned, updates unscaled; and ten rounds without an attack.

    python benchmarks/ten_rounds.py ~/cifar10

Each round is judged by rule `crowd`, whose validators remember the rounds before, beside the oracle that averages the
honest models and plain FedAvg, each with a global model of its own. Attackers draw in every round anew which of their
images they poison; models are averaged and inspected as they are, not rounded as on the wire. One line a round goes to
`benchmarks/ten_rounds.csv`, beside it a picture; what is there is not run again.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import ROOT, append, arguments, done
from detection import (
    Crowd,
    Setting,
    config_of,
    experiment,
    load_images,
    rates,
    shares,
    test_loaders,
    train_one,
    validation_loader,
    warm_model,
)
from tqdm import tqdm

matplotlib.use("Agg")
ROUNDS = 10
RESULTS = ROOT / "benchmarks" / "ten_rounds.csv"


def settings() -> list[Setting]:
    """The faintest attack, and none."""
    faint = Setting(pdr=0.1, scaled=False)
    return [replace(faint, crowd=Crowd(alpha=alpha), pmr=pmr) for pmr in (0.25, 0) for alpha in (None, 0.5)]


def defences(setting: Setting) -> tuple:
    return ("crowd", "oracle", "plain FedAvg") if setting.attackers else ("crowd", "oracle")


def ballots(global_model, models, datasets, setting: Setting, memories: list) -> list:
    """Votes `(voter, model)` of one round; `memories` is what each validator remembers, and is brought up to date."""
    everyone, rows = set(range(len(models))), []
    for voter, dataset in enumerate(datasets):
        if voter in setting.attackers:
            found = everyone - setting.attackers
        else:
            inspection = experiment.Inspection(dataset, heard=memories[voter])
            found = inspection.decide(global_model, dict(enumerate(models)), voter, "cpu")
            memories[voter] = inspection.heard
        rows.append([int(model not in found) for model in range(len(models))])
    return rows


def play(folder: Path, setting: Setting, seed: int, defence: str) -> list[dict]:
    """Ten rounds from the warmed-up model; a row each."""
    torch.set_num_threads(1)
    images, config = load_images(folder), config_of(setting.crowd)
    model, mine = warm_model(images, setting.crowd), shares(images, setting.crowd, seed)
    datasets = [validation_loader(share, seed, p).dataset for p, share in enumerate(mine)]
    tests, rows, memories = test_loaders(images), [], [{} for _ in mine]
    for number in range(1, ROUNDS + 1):
        states = [train_one(model, mine[r.participant], r, 100 * number + seed, config) for r in setting.roles]
        models = [experiment.with_state(model, state) for state in states]
        accepted = np.array([defence == "plain FedAvg" or m not in setting.attackers for m in range(len(models))])
        if defence == "crowd":
            accepted = experiment.stacked_clustering(ballots(model, models, datasets, setting, memories))
        if accepted.any():
            model = experiment.with_state(model, experiment.fed_avg([states[m] for m in np.flatnonzero(accepted)]))
        main, backdoor = (experiment.accuracy(model, test, "cpu") for test in tests)
        where = {"alpha": setting.crowd.alpha, "pmr": setting.pmr, "seed": seed, "defence": defence, "round": number}
        rows.append(where | rates(accepted, setting) | {"main": main, "backdoor": backdoor})
    return rows


def missing(seeds: int) -> list[tuple]:
    """What is not in the CSV yet."""
    jobs = [(setting, seed, d) for seed in range(seeds) for setting in settings() for d in defences(setting)]
    known = done(RESULTS, "alpha", "pmr", "seed", "defence")
    return [(s, seed, d) for s, seed, d in jobs if (s.crowd.alpha or 0, s.pmr, seed, d) not in known]


def picture(rows: pd.DataFrame, path: Path) -> None:
    """Backdoor accuracy over the rounds of the attack, mean of the seeds and each of them."""
    attacked = rows[rows["pmr"] > 0].fillna({"alpha": 0})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for axis, (alpha, part) in zip(axes, attacked.groupby("alpha"), strict=True):
        for colour, (defence, runs) in zip(("tab:blue", "tab:green", "tab:red"), part.groupby("defence"), strict=True):
            by_seed = runs.pivot(index="round", columns="seed", values="backdoor")
            axis.plot(by_seed, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(by_seed.mean(axis=1), color=colour, label=defence)
        axis.set(title=f"Dirichlet {alpha:g}" if alpha else "IID", xlabel="round", ylim=(0, 1))
    axes[0].set_ylabel("backdoor accuracy")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    args = arguments(__doc__, seeds=2).parse_args()
    warm_model(load_images(args.folder), Crowd())
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(play, args.folder, *job) for job in missing(args.seeds)]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs of ten rounds"):
            append(RESULTS, job.result())
    rows = pd.read_csv(RESULTS)
    picture(rows, RESULTS.with_suffix(".png"))
    groups = rows.groupby(["alpha", "pmr", "defence"], dropna=False)[["tpr", "tnr", "main", "backdoor"]]
    print("all rounds", groups.mean().round(3), sep="\n")
    last = rows[rows["round"] == ROUNDS].groupby(["alpha", "pmr", "defence"], dropna=False)[["main", "backdoor"]]
    print("the last", last.agg(["mean", "max"]).round(3), sep="\n")


if __name__ == "__main__":
    main()
