"""Who is found, and who is wrongly accused: single rounds of federated learning on real CIFAR-10.

    python benchmarks/detection.py ~/cifar10                            # all parts, judging seeds; resumes
    python benchmarks/detection.py ~/cifar10 --parts triggers scales    # some of them
    python benchmarks/detection.py ~/cifar10 --seeds 100 101 102 103 104 --results tuning.csv
    python benchmarks/detection.py ~/cifar10 --table                    # tables and pictures of what is there

Honest participants inspect and vote, attackers vote for each other and against everybody else. All rules judge the same
updates. For the ablation the default rule judges with one kind of evidence alone, and without each kind. One line a
setting, seed and rule goes to the CSV as soon as it is known.
"""

import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import FIGURES, RESULTS, append, arguments, done
from rounds import (
    JUDGING,
    TRIGGERS,
    Crowd,
    Setting,
    Trained,
    experiment,
    flat,
    load_images,
    measure,
    validation_loader,
)
from scipy import stats
from tqdm import tqdm

matplotlib.use("Agg")
# What can speak in a first round; `lasting` is then kinship by the mean over the layers.
KINDS = {"norms": ["norms"], "effects": ["effects"], "kinship": ["kinship", "lasting"]}
PARTITIONS = (None, 0.5)


# --- Settings -------------------------------------------------------------------------------------------------


def triggers() -> list[Setting]:
    """Every trigger, by two and by four of ten; and the faintest attack."""
    crowds = [Setting(Crowd(alpha=alpha), attackers) for alpha in PARTITIONS for attackers in (2, 4)]
    faint = [replace(setting, pdr=0.1) for setting in crowds]
    return [replace(setting, trigger=trigger) for setting in crowds for trigger in TRIGGERS] + faint


def replaced() -> list[Setting]:
    """The same by model replacement: updates scaled by 1/PMR."""
    return [replace(setting, scale=0) for setting in triggers() if setting.pdr == 0.5]


def scales() -> list[Setting]:
    base = [
        Setting(Crowd(alpha=alpha), k, trigger) for alpha in PARTITIONS for k in (2, 4) for trigger in ("red", "noise")
    ]
    return [replace(setting, scale=scale) for setting in base for scale in (1.5, 2, 2.5, 4, 10)]


def shares_of_attackers() -> list[Setting]:
    """From one of ten to nine of twenty, and one of four and of five."""
    sizes = [(4, 1), (5, 1), (5, 2), (6, 2), (10, 1), (10, 3), (20, 2), (20, 9)]
    return [
        Setting(Crowd(n, alpha), k, trigger, scale=scale)
        for alpha in PARTITIONS
        for n, k in sizes
        for trigger in ("red", "noise", "warp")
        for scale in ((1, 0) if k == 1 else (1,))
    ]


def evasions() -> list[Setting]:
    """Colluders who send what the rule does not look for, see `attackers.py`; and a trigger that is searched for."""
    from attackers import EVASIONS

    crowds = [Setting(Crowd(alpha=alpha), k) for alpha in PARTITIONS for k in (2, 4)]
    return [replace(setting, trigger="optimised") for setting in crowds] + [
        replace(setting, evasion=name, trigger=trigger)
        for name, evasion in EVASIONS.items()
        for setting in crowds
        for trigger in (TRIGGERS if evasion.on_all_triggers else ("red", "noise"))
    ]


def full_net() -> list[Setting]:
    crowds = [Crowd(alpha=alpha, width=64, hidden=4096) for alpha in PARTITIONS]
    attacked = [Setting(crowd, 4, trigger) for crowd in crowds for trigger in ("red", "noise", "stripes")]
    return [*attacked, *(Setting(crowd, 0, "") for crowd in crowds)]


PARTS = {
    "triggers": triggers,
    "orthogonal": lambda: [setting for setting in evasions() if setting.evasion == "orthogonal"],
    "replaced": replaced,
    "scales": scales,
    "shares": shares_of_attackers,
    "evasions": lambda: [setting for setting in evasions() if setting.evasion != "orthogonal"],
    "full": full_net,
}


# --- Judging --------------------------------------------------------------------------------------------------


class Inspected:
    """A crowd whose models are inspected once by each participant; `seen` is what one sees of a setting's states."""

    def __init__(self, folder: Path, crowd: Crowd, seed: int):
        self.trained = Trained(load_images(folder), crowd, seed)
        self.loaders = [list(validation_loader(share, seed, p)) for p, share in enumerate(self.trained.shares)]
        self.views = {}

    def look(self, validator: int, states: list[dict]):
        models = [experiment.with_state(self.trained.global_model, state) for state in states]
        mine = self.trained.global_model, self.loaders[validator]
        skew = experiment.class_directions(*mine)
        return experiment.look(mine[0], models, mine[1], "cpu", "paper", skew)  # with the metrics of both rules

    def seen(self, validator: int, setting: Setting, states: list[dict]):
        """What the validator sees of these states; what others have sent in the same role is looked at only once."""
        together = setting if setting.evasion else None  # what colluders send depends on all of them
        roles = [(validator, role, together if role.trigger else None) for role in setting.roles]
        new = [role for role in roles if role not in self.views]
        if new:
            found = self.look(validator, [states[roles.index(role)] for role in new])
            self.views |= {role: found.of([i]) for i, role in enumerate(new)}
        return experiment.joined([self.views[role] for role in roles])


def rules() -> dict:
    """Name → what it makes of a `Seen` and the validator's index: the two rules, and the default's ablations."""
    kinds = {kind for group in KINDS.values() for kind in group}

    def without(*missing):
        def judge(seen, own):
            neutral = experiment.no_evidence(len(seen.lengths))
            evidence = experiment.evidence(of_default(seen), own)
            return experiment.flagged(evidence._replace(**{kind: getattr(neutral, kind) for kind in missing}), own)

        return judge

    ablations = {f"without {name}": without(*group) for name, group in KINDS.items()}
    ablations |= {f"{name} alone": without(*kinds - set(group)) for name, group in KINDS.items()}
    return {
        "crowd": lambda seen, own: experiment.vote(of_default(seen), own),
        "paper": lambda seen, own: experiment.vote(seen, own, "paper"),
    } | ablations


def of_default(seen):
    """The same by the metrics of the default rule."""
    wanted = [experiment.METRICS.index(metric) for metric in experiment.LOOKS_AT["crowd"]]
    return seen._replace(distances=seen.distances[wanted])


def ballots(views: dict, setting: Setting, judge) -> np.ndarray:
    """Votes `(voter, model)`, 1 for benign."""
    everyone, rows = set(range(setting.crowd.participants)), []
    for voter in sorted(everyone):
        found = everyone - setting.malicious if voter in setting.malicious else judge(views[voter], voter)
        rows.append([int(model not in found) for model in sorted(everyone)])
    return np.array(rows)


def rows_of(folder: Path, inspected: Inspected, setting: Setting, accuracy: bool) -> list[dict]:
    """A row for each rule, and for the oracle and plain FedAvg."""
    trained, everyone = inspected.trained, range(setting.crowd.participants)
    states = states_of(trained, setting)
    views = {v: inspected.seen(v, setting, states) for v in everyone if v not in setting.malicious}
    votes = {name: ballots(views, setting, judge) for name, judge in rules().items()}
    accepted = {name: experiment.stacked_clustering(of_rule) for name, of_rule in votes.items()}
    accepted["paper"] = experiment.stacked_clustering(votes["paper"], "paper")
    accepted |= {
        "plain FedAvg": np.ones(len(everyone), dtype=bool),
        "oracle": np.array([m not in setting.malicious for m in everyone]),
    }
    limit, measured, rows = float(np.median(next(iter(views.values())).lengths)), {}, []
    for name, trusted in accepted.items():
        row = flat(setting) | {"seed": trained.seed, "rule": name} | rates(trusted, setting)
        if accuracy and name in ("crowd", "paper", "plain FedAvg", "oracle"):
            clipped, taken = name in ("crowd", "oracle"), np.flatnonzero(trusted)
            if (what := (clipped, *taken)) not in measured:
                states_taken = [states[m] for m in taken]
                if clipped and len(taken):
                    states_taken = [experiment.clipped_avg(states_taken, trained.reference, limit, trained.layers)]
                measured[what] = measure(folder, trained.global_model, states_taken, setting.trigger)
            row |= measured[what]
        rows.append(row)
    where = flat(setting) | {"seed": trained.seed, "rule": "crowd, mimicked"}
    return [*rows, where | mimicked(votes["crowd"], setting)]


def mimicked(votes: np.ndarray, setting: Setting) -> dict:
    """The lowest TPR and TNR where the colluders know all ballots `(voter, model)`, and all cast an honest one but for
    one model, or call everybody benign."""
    honest = votes[[m for m in range(len(votes)) if m not in setting.malicious]]
    everyone = np.ones(len(votes), dtype=int)
    changed = [ballot ^ one for ballot in np.unique(honest, axis=0) for one in np.eye(len(votes), dtype=int)]
    tried = [np.vstack([honest, *[ballot] * setting.attackers]) for ballot in [everyone, *changed]]
    found = [rates(experiment.stacked_clustering(ballots), setting) for ballots in tried]
    return {name: min(each[name] for each in found) if setting.attackers else found[0][name] for name in found[0]}


def states_of(trained: Trained, setting: Setting) -> list[dict]:
    """What everybody sends."""
    states = [trained.state(role) for role in setting.roles]
    if setting.evasion:
        from attackers import evade

        states[-setting.attackers :] = evade(trained, setting)
    return states


def rates(accepted, setting: Setting) -> dict:
    """TPR, None without attackers, and TNR."""
    honest = [m for m in range(len(accepted)) if m not in setting.malicious]
    tpr = np.mean([not accepted[m] for m in setting.malicious]) if setting.malicious else None
    return {"tpr": tpr, "tnr": np.mean([accepted[m] for m in honest])}


# --- All of them ----------------------------------------------------------------------------------------------

KEY = (*flat(Setting()), "seed")  # the columns that tell one round from another


def key(setting: Setting, seed: int) -> tuple:
    return tuple(value or 0 for value in (flat(setting) | {"seed": seed}).values())


def run(folder: Path, settings: list[Setting], seeds, path: Path, accuracy: bool = True) -> None:
    """Appends what is missing in the CSV, crowd after crowd."""
    known, missing = done(path, *KEY), {}
    for seed in seeds:
        for setting in settings:
            if key(setting, seed) not in known:
                missing.setdefault((seed, setting.crowd), []).append(setting)
    path.parent.mkdir(exist_ok=True)
    with tqdm(total=sum(map(len, missing.values())), desc=path.stem) as progress:
        for (seed, crowd), mine in missing.items():
            inspected = Inspected(folder, crowd, seed)
            for setting in mine:
                started = time.perf_counter()
                rows = rows_of(folder, inspected, setting, accuracy)
                seconds = round(time.perf_counter() - started, 1)
                append(path, [row | {"seconds": seconds} for row in rows])
                progress.update()


def main():
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*JUDGING])
    parser.add_argument("--results", type=Path, default=RESULTS / "detection.csv")
    parser.add_argument("--rates-only", action="store_true", help="no accuracies, which take most of the time")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = [setting for part in args.parts for setting in PARTS[part]()]
    if not args.table:
        run(args.folder, settings, args.seeds, args.results, not args.rates_only)
    print(table(args.results).to_string())
    picture(args.results, FIGURES / f"{args.results.stem}.png")


def picture(path: Path, target: Path) -> None:
    """Who is found, a panel a crowd: mean TPR over the seeds, a line for each trigger, a dot for each seed."""
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""]).fillna({"alpha": 0, "evasion": ""})
    attacked = (rows["attackers"] > 0) & (rows["pdr"] == 0.5) & (rows["scale"] == 1)
    rows = rows[attacked & rows["evasion"].isin(["", "orthogonal"])]
    rows["kind"] = rows["trigger"] + rows["evasion"].map({"": "", "orthogonal": ", orthogonal"})
    kinds, crowds = (
        sorted(rows["kind"].unique(), key=lambda kind: ("," in kind, kind)),
        rows.groupby(["alpha", "attackers"]),
    )
    if not kinds:  # scaled updates alone
        return
    size = (2.6 * len(crowds) + 1.5, 0.24 * len(kinds) + 1)
    figure, axes = plt.subplots(1, len(crowds), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, ((alpha, attackers), part) in zip(axes[0], crowds, strict=True):
        for rule, colour, shift in (("crowd", "tab:blue", -0.15), ("paper", "tab:orange", 0.15)):
            found = part[part["rule"] == rule]
            heights = found["kind"].map(kinds.index) + shift
            axis.plot(found["tpr"], heights, ".", color=colour, alpha=0.35, markersize=5)
            mean = found.groupby("kind")["tpr"].mean()
            axis.plot(
                mean, [kinds.index(kind) + shift for kind in mean.index], "D", color=colour, label=rule, markersize=5
            )
        axis.set(
            title=f"{attackers} of ten, {f'Dirichlet {alpha:g}' if alpha else 'IID'}", xlim=(-0.05, 1.05), xlabel="TPR"
        )
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_yticks(range(len(kinds)), kinds)
    axes[0][0].invert_yaxis()
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(target, dpi=110)


def table(path: Path) -> pd.DataFrame:
    """Mean and half of the 95 % interval (Student's t) over the seeds, a line a setting and rule."""
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""])
    groups = rows.groupby([*flat(Setting()), "rule"], sort=False, dropna=False)
    scores = ["tpr", "tnr", *({"main", "backdoor"} & set(rows))]
    count = groups["seed"].count()
    half = groups[scores].sem().mul(stats.t.ppf(0.975, (count - 1).clip(lower=1)), axis=0)
    return pd.concat({"mean": groups[scores].mean(), "±": half}, axis=1).round(3)


if __name__ == "__main__":
    main()
