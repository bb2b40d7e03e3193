"""Ten rounds in a row: real CIFAR-10, ten participants; a faint attack (a tenth of the data of two attackers poisoned,
updates unscaled), a single attacker, two who attack in every second round, and none, also in other crowds.

    python benchmarks/ten_rounds.py ~/cifar10

Each round is judged by the default rule, whose validators remember what was sent before, beside the oracle that
averages the honest models and plain FedAvg, each with a global model of its own. Attackers draw in every round anew
which of their images they poison. One line a round goes to `benchmarks/results/ten_rounds.csv`; what is there is not
run again.
"""

from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import FIGURES, RESULTS, append, arguments, done
from detection import rates
from rounds import (
    JUDGING,
    Crowd,
    Setting,
    config_of,
    experiment,
    load_images,
    measure,
    shares,
    train_one,
    validation_loader,
    warm_model,
)
from tqdm import tqdm

matplotlib.use("Agg")
ROUNDS = 10
DEFENCES = ("crowd", "oracle", "plain FedAvg")
PARTS = {
    "faint": Setting(pdr=0.1),
    "quiet": Setting(attackers=0, trigger="", pdr=0),
    "single": Setting(attackers=1),
    "alternating": Setting(pdr=0.5),
    **{f"single, {trigger}": Setting(attackers=1, trigger=trigger) for trigger in ("stripes", "noise", "warp")},
    **{f"quiet, {participants} participants": Setting(Crowd(participants), 0, "", 0) for participants in (5, 6, 20)},
}
PAUSES = {"alternating"}  # parts in which attackers behave in every second round


def runs(parts, seeds, defences=DEFENCES) -> list[tuple]:
    """(part, setting, seed, defence), what is asked first coming first."""
    crowds = [
        (part, replace(PARTS[part], crowd=replace(PARTS[part].crowd, alpha=alpha)), seed)
        for seed in seeds
        for part in parts
        for alpha in (None, 0.5)
    ]
    return [(*crowd, d) for crowd in crowds for d in defences if crowd[1].attackers or d == "crowd"]


def ballots(global_model, models, loaders, setting: Setting, pasts: list) -> np.ndarray:
    """Votes `(voter, model)` of one round; `pasts` is what each validator remembers, and is brought up to date."""
    everyone, rows = set(range(len(models))), []
    for voter, loader in enumerate(loaders):
        if voter in setting.malicious:
            found = everyone - setting.malicious
        else:
            seen = experiment.look(global_model, models, loader, "cpu")
            found = experiment.vote(seen, voter, "crowd", [pasts[voter].get(m, []) for m in range(len(models))])
            directions = {m: [layer[m] for layer in seen.directions] for m in range(len(models))}
            pasts[voter] = experiment.remembered(pasts[voter], directions)
        rows.append([int(model not in found) for model in range(len(models))])
    return np.array(rows)


def play(folder: Path, part: str, setting: Setting, seed: int, defence: str) -> list[dict]:
    """Ten rounds from the warmed-up model; a row each."""
    images, config = load_images(folder), config_of(setting.crowd)
    model, mine = warm_model(images, setting.crowd), shares(images, setting.crowd, seed)
    loaders = [list(validation_loader(share, seed, p)) for p, share in enumerate(mine)]
    rows, pasts, layers = [], [{} for _ in mine], experiment.middle_layers(model)
    for number in range(1, ROUNDS + 1):
        now = replace(setting, attackers=0) if part in PAUSES and number % 2 == 0 else setting
        reference = model.state_dict()
        trained = [train_one(model, mine[r.participant], r, seed + 1_000 * number, config) for r in now.roles]
        sent = [experiment.pack_update(state, reference, config.update_dtype) for state in trained]
        states = [experiment.unpack_update(update, reference) for update in sent]
        accepted = np.array([defence != "oracle" or m not in setting.malicious for m in range(len(states))])
        if defence == "crowd":
            models = [experiment.with_state(model, state) for state in states]
            accepted = experiment.stacked_clustering(ballots(model, models, loaders, setting, pasts))
        taken = [states[m] for m in np.flatnonzero(accepted)]
        if defence != "plain FedAvg" and taken:
            lengths, _ = experiment.look_at_updates(reference, states, {})
            taken = [experiment.clipped_avg(taken, reference, np.median(lengths), layers)]
        model = experiment.with_state(model, experiment.fed_avg(taken)) if taken else model
        where = {"part": part, "alpha": setting.crowd.alpha, "seed": seed, "defence": defence, "round": number}
        rows.append(where | rates(accepted, now) | measure(folder, model, [], setting.trigger))
    return rows


def missing(parts, seeds, defences, path: Path) -> list[tuple]:
    """What is not in the CSV yet."""
    known = done(path, "part", "alpha", "seed", "defence")
    return [run for run in runs(parts, seeds, defences) if (run[0], run[1].crowd.alpha or 0, *run[2:]) not in known]


def picture(rows: pd.DataFrame, path: Path) -> None:
    """Backdoor accuracy over the rounds of the faint attack, mean of the seeds and each of them."""
    attacked = rows[rows["part"] == "faint"].fillna({"alpha": 0})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    styles = {"plain FedAvg": ("tab:orange", "--"), "crowd": ("tab:blue", "-"), "oracle": ("black", ":")}
    for axis, (alpha, part) in zip(axes, attacked.groupby("alpha"), strict=False):
        for defence, (colour, style) in styles.items():
            by_seed = part[part["defence"] == defence].pivot(index="round", columns="seed", values="backdoor")
            axis.plot(by_seed, color=colour, linewidth=0.6, alpha=0.5, linestyle=style)
            axis.plot(by_seed.mean(axis=1), color=colour, linestyle=style, linewidth=2, label=defence)
        axis.set(title=f"Dirichlet {alpha:g}" if alpha else "IID", xlabel="round", ylim=(0, 1))
    axes[0].set_ylabel("backdoor accuracy")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*JUDGING])
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=[*DEFENCES])
    parser.add_argument("--results", type=Path, default=RESULTS / "ten_rounds.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(exist_ok=True)
    for run in tqdm(missing(args.parts, args.seeds, args.defences, args.results), desc="runs of ten rounds"):
        append(args.results, play(args.folder, *run))
    rows = pd.read_csv(args.results)
    if (rows["part"] == "faint").any():
        picture(rows, FIGURES / f"{args.results.stem}.png")
    groups = rows.groupby(["part", "alpha", "defence"], dropna=False)
    print("all rounds", groups[["tpr", "tnr", "main", "backdoor"]].mean().round(3).to_string(), sep="\n")
    last = rows[rows["round"] == ROUNDS].groupby(["part", "alpha", "defence"], dropna=False)
    print("the last", last[["main", "backdoor"]].agg(["mean", "max"]).round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main()
