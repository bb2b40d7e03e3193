"""Who is found, and who is wrongly accused: single rounds of federated learning on real CIFAR-10, judged by every rule.

    python benchmarks/detection.py ~/cifar10                 # all settings, five seeds; continues where it was stopped
    python benchmarks/detection.py ~/cifar10 --table         # the table and the heat map of what is there

A round starts from a global model that was trained once on 10,000 images which no participant holds. All rules judge
the same updates, and so does the published rule with the reference of the published notebook, a net that was never
trained. One line a setting, seed and rule goes to `benchmarks/detection.csv` as soon as it is known.
"""

import argparse
import copy
import csv
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import ROOT, load_experiment, private_attributes
from tqdm import tqdm

matplotlib.use("Agg")
experiment = load_experiment()

WARM_UP_IMAGES = 10_000
WARM_UP_EPOCHS = 8
IMAGES = 500  # a participant's
INSPECTED = 128  # images on which a participant inspects the models
TEST_IMAGES = 2_000
TARGET = 2
RESULTS = ROOT / "benchmarks" / "detection.csv"


@dataclass(frozen=True)
class Setting:
    """One point of the benchmark. `alpha` None is IID; `width` and `hidden` are those of the net."""

    participants: int = 10
    pmr: float = 0.25
    pdr: float = 0.5
    scaled: bool = True
    alpha: float | None = None
    false_votes: bool = True
    width: int = 32
    hidden: int = 512

    @property
    def attackers(self) -> int:
        return int(self.pmr * self.participants)


def settings() -> list[Setting]:
    """A base setting varied along each axis, and the hard corners."""
    base = Setting()
    axes = [base]
    axes += [replace(base, participants=n) for n in (4, 6, 20)]
    axes += [replace(base, pmr=pmr) for pmr in (0.1, 0.4, 0.45)]
    axes += [replace(base, participants=20, pmr=pmr) for pmr in (0.05, 0.45)]
    axes += [replace(base, pdr=0.1), replace(base, scaled=False), replace(base, false_votes=False)]
    axes += [replace(base, alpha=alpha) for alpha in (1.0, 0.5)]
    honest = [replace(base, pmr=0, participants=n, alpha=alpha) for n in (4, 5, 6, 10, 20) for alpha in (None, 0.5)]
    hard = [replace(base, pmr=0.45, scaled=False, participants=20)]
    hard += [replace(base, pmr=0.4, scaled=scaled, alpha=0.5) for scaled in (True, False)]
    hard += [replace(base, pmr=0.4, scaled=False), replace(base, pdr=0.1, scaled=False)]
    return list(dict.fromkeys(axes + honest + hard))


# --- Data -----------------------------------------------------------------------------------------------------


def load_images(folder: Path, cache: Path) -> dict[str, torch.Tensor]:
    """All images as uint8 `(N, 3, 32, 32)` and their labels, decoded once."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        loaded = {}
        for part in ("train", "test"):
            labels, read = private_attributes.image_folder(folder, part == "train")
            blocks = np.array_split(np.arange(len(labels)), 50)
            images = [(read(block) * 255).round().to(torch.uint8) for block in tqdm(blocks, desc=f"{part} images")]
            loaded |= {f"{part}_images": torch.cat(images), f"{part}_labels": torch.from_numpy(labels)}
        torch.save(loaded, cache)
    return torch.load(cache)


def loader(images, labels, shuffle=False, batch_size=32):
    return private_attributes.as_loader(images.float() / 255, labels, batch_size, shuffle)


def warm_model(images, setting: Setting, cache: Path):
    """The global model from which all rounds with this net start, trained once."""
    config = replace(experiment.demo, hidden=setting.hidden, width=setting.width, local_epochs=WARM_UP_EPOCHS)
    model = experiment.initial_model(config)
    path = cache / f"global-{setting.width}-{setting.hidden}.pt"
    if not path.exists():
        part = warm_up_part(len(images["train_labels"]))[:WARM_UP_IMAGES]
        torch.manual_seed(0)
        experiment.train(model, loader(images["train_images"][part], images["train_labels"][part], True), config, "cpu")
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model


def warm_up_part(count: int) -> np.ndarray:
    """An order of the training images; the first of them are for the warm-up, the rest for the participants."""
    return np.random.default_rng(0).permutation(count)


# --- One round ------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """What one round produced: the participants' models, of which the last ones are attackers', and their images."""

    global_model: torch.nn.Module
    models: list
    shards: list
    attackers: set[int]


def play(images, global_model, setting: Setting, seed: int) -> Round:
    """Trains all participants' models from the global model."""
    config = replace(experiment.demo, hidden=setting.hidden, width=setting.width, local_epochs=1)
    rest = warm_up_part(len(images["train_labels"]))[WARM_UP_IMAGES:]
    pool = np.random.default_rng([seed, 1]).permutation(rest)[: IMAGES * setting.participants]
    labels = images["train_labels"][pool].numpy()
    parts = private_attributes.partition(labels, setting.participants, setting.alpha, seed)
    attackers = set(range(setting.participants - setting.attackers, setting.participants))
    models, shards = [], []
    for index, part in enumerate(parts):
        mine = images["train_images"][pool[part]].float() / 255, images["train_labels"][pool[part]]
        shards.append(mine)
        trained_on = mine
        if index in attackers:
            trained_on = private_attributes.poison(*mine, TARGET, setting.pdr, seed)
        torch.manual_seed(1000 * seed + index)
        model = copy.deepcopy(global_model)
        experiment.train(model, private_attributes.as_loader(*trained_on, 32, shuffle=True), config, "cpu")
        if index in attackers and setting.scaled:
            model = scaled_up(model, global_model, setting.participants / setting.attackers)
        models.append(model)
    return Round(global_model, models, shards, attackers)


def scaled_up(model, global_model, scale: float):
    attack = private_attributes.Attack(scale=scale)
    state = private_attributes.Backdoor(attack, None).update(1, model.state_dict(), global_model.state_dict())
    return experiment.with_state(model, state)


def inspect(played: Round, reference, seed: int) -> list:
    """What every validator sees: distances `(metric, S, M, L)` to the reference model, and labels `(S,)`."""
    views = []
    for index, (pixels, labels) in enumerate(played.shards):
        chosen = np.random.default_rng([seed, 2, index]).permutation(len(labels))[:INSPECTED]
        mine = private_attributes.as_loader(pixels[chosen], labels[chosen], 64)
        views.append(experiment.hidden_distances(reference, played.models, mine, "cpu"))
    return views


def ballots(views: list, played: Round, setting: Setting, rule: str) -> np.ndarray:
    """Votes `(voter, model)`, 1 for benign; false voters vote for the attackers and against everybody else."""
    rows = []
    for voter, (distances, labels) in enumerate(views):
        found = experiment.verdict(distances, labels, voter, rule)
        if voter in played.attackers and setting.false_votes:
            found = set(range(len(views))) - played.attackers
        rows.append([int(model not in found) for model in range(len(views))])
    return np.array(rows)


def judge(accepted, played: Round, test, backdoor) -> dict:
    """Scores of one verdict."""
    honest = [m for m in range(len(accepted)) if m not in played.attackers]
    measured = measure(played, np.flatnonzero(accepted), test, backdoor)
    return {
        "tpr": np.mean([not accepted[m] for m in played.attackers]) if played.attackers else None,
        "tnr": np.mean([accepted[m] for m in honest]),
    } | dict(zip(("main", "backdoor"), measured, strict=True))


def measure(played: Round, accepted, test, backdoor) -> tuple[float, float]:
    """Main-task and backdoor accuracy of the average of the accepted models; of the old global model without any."""
    states = [played.models[m].state_dict() for m in accepted] or [played.global_model.state_dict()]
    model = experiment.with_state(played.global_model, experiment.fed_avg(states))
    return experiment.accuracy(model, test, "cpu"), experiment.accuracy(model, backdoor, "cpu")


def rows_of(images, setting: Setting, seed: int, cache: Path):
    """One row a rule, and one each for plain FedAvg and for the oracle that averages the honest models alone."""
    started = time.perf_counter()
    global_model = warm_model(images, setting, cache)
    played = play(images, global_model, setting, seed)
    pixels, labels = images["test_images"][:TEST_IMAGES].float() / 255, images["test_labels"][:TEST_IMAGES]
    others = labels != TARGET
    triggered = private_attributes.add_trigger(pixels[others])
    test = private_attributes.as_loader(pixels, labels, 256)
    backdoor = private_attributes.as_loader(triggered, torch.full_like(labels[others], TARGET), 256)
    random = experiment.initial_model(replace(experiment.demo, hidden=setting.hidden, width=setting.width, seed=seed))
    views = {"G": inspect(played, global_model, seed), "random": inspect(played, random, seed)}
    judged = {rule: (rule, "G") for rule in experiment.RULES} | {"paper, random reference": ("paper", "random")}
    verdicts = {
        name: experiment.stacked_clustering(ballots(views[reference], played, setting, rule))
        for name, (rule, reference) in judged.items()
    }
    verdicts["plain FedAvg"] = np.ones(setting.participants, dtype=bool)
    verdicts["oracle"] = np.array([m not in played.attackers for m in range(setting.participants)])
    for name, accepted in verdicts.items():
        scores = judge(accepted, played, test, backdoor)
        seconds = round(time.perf_counter() - started, 1)
        yield asdict(setting) | {"seed": seed, "rule": name} | scores | {"seconds": seconds}


# --- All of them ----------------------------------------------------------------------------------------------


def run(folder: Path, seeds, limit: int | None) -> None:
    """Appends what is missing in the CSV, hard corners and base setting alike, seed after seed."""
    cache = Path(__file__).parent / "cache"
    images = load_images(folder, cache / "cifar10.pt")
    points = [(seed, setting) for seed in seeds for setting in settings()]
    known = finished()
    missing = [(seed, setting) for seed, setting in points if key(asdict(setting) | {"seed": seed}) not in known]
    for seed, setting in tqdm(missing[:limit], desc="settings x seeds"):
        append(list(rows_of(images, setting, seed, cache)))


def key(row: dict) -> tuple:
    """What tells one round from another."""
    alpha = row["alpha"] if row["alpha"] and not pd.isna(row["alpha"]) else None
    return tuple(row[name] for name in asdict(Setting()) if name != "alpha") + (alpha, row["seed"])


def finished() -> set[tuple]:
    if not RESULTS.exists():
        return set()
    return {key(row) for row in pd.read_csv(RESULTS).to_dict("records")}


def append(rows: list[dict]) -> None:
    """All rows of one round at once, so that a round is in the file either whole or not at all."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def label(row) -> str:
    partition = "IID" if pd.isna(row.alpha) else f"Dirichlet {row.alpha:g}"
    attack = f"PMR {row.pmr:g}, PDR {row.pdr:g}, {'scaled' if row.scaled else 'unscaled'}" if row.pmr else "no attack"
    return f"{row.participants:2d} participants, {partition}, {attack}" + ("" if row.false_votes else ", honest votes")


def table() -> pd.DataFrame:
    """Mean and half of the 95 % interval over the seeds, a line a setting and rule."""
    rows = pd.read_csv(RESULTS)
    rows["setting"] = [label(row) for row in rows.itertuples()]
    groups = rows.groupby(["setting", "rule"], sort=False)[["tpr", "tnr", "main", "backdoor"]]
    count = groups.count().clip(lower=1)
    return pd.concat({"mean": groups.mean(), "±": 1.96 * groups.std() / np.sqrt(count)}, axis=1).round(3)


def heat_map(summary: pd.DataFrame, path: Path) -> None:
    """TPR and TNR of every setting and rule."""
    means = summary["mean"].drop(index=["plain FedAvg", "oracle"], level="rule")
    figure, axes = plt.subplots(
        1, 2, figsize=(13, 1.5 + 0.28 * len(means.unstack())), sharey=True, layout="constrained"
    )
    for axis, score in zip(axes, ("tpr", "tnr"), strict=True):
        values = means[score].unstack("rule", sort=False)
        axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(values.shape[1]), values.columns)
        axis.set_yticks(range(values.shape[0]), values.index, fontsize=8)
        axis.set_title(score.upper())
        for (row, column), value in np.ndenumerate(values):
            axis.text(column, row, "–" if np.isnan(value) else f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="train/<class>/… and test/<class>/…")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="stop after so many rounds")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    args = parser.parse_args()
    if not args.table:
        run(args.folder.expanduser(), range(args.seeds), args.limit)
    summary = table()
    print(summary.to_string())
    heat_map(summary, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
