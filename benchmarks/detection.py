"""Who is found, and who is wrongly accused: single rounds of federated learning on real CIFAR-10, judged by every rule.

    python benchmarks/detection.py ~/cifar10                 # all settings, five seeds; continues where it was stopped
    python benchmarks/detection.py ~/cifar10 --table         # the table and the heat map of what is there

All rounds start from one global model, trained once on 10,000 images which no participant holds. The participants of a
crowd train once, the last of them also as attackers; a setting says who of them appears in which role. All rules judge
the same updates, and so does the published rule with the reference of the published notebook, a net that was never
trained. One line a setting, seed and rule goes to `benchmarks/detection.csv` as soon as it is known.
"""

import copy
import functools
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import ROOT, append, arguments, done, load_experiment, private_attributes
from safetensors.torch import load_file, save_file
from scipy import stats
from tqdm import tqdm

matplotlib.use("Agg")
experiment = load_experiment()

WARM_UP_IMAGES = 10_000
WARM_UP_EPOCHS = 8
IMAGES = 500  # a participant's
INSPECTED = 128  # images on which a participant inspects the models
TEST_IMAGES = 2_000
TARGET = 2
AT_ONCE = 8  # models in memory while they are inspected
CACHE = ROOT / "benchmarks" / "cache"
RESULTS = ROOT / "benchmarks" / "detection.csv"


# --- Settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crowd:
    """Participants who train from the same global model. `alpha` None is IID; `width` and `hidden` are the net's."""

    participants: int = 10
    alpha: float | None = None
    width: int = 32
    hidden: int = 512


@dataclass(frozen=True)
class Role:
    """A participant as it appears in a round: honest, or with poisoned data and a scaled update."""

    participant: int
    pdr: float = 0
    scale: float = 1


@dataclass(frozen=True)
class Setting:
    """One point of the benchmark."""

    crowd: Crowd = Crowd()
    pmr: float = 0.25
    pdr: float = 0.5
    scaled: bool = True
    false_votes: bool = True

    @property
    def attackers(self) -> set[int]:
        return set(range(self.crowd.participants - int(self.pmr * self.crowd.participants), self.crowd.participants))

    @property
    def roles(self) -> list[Role]:
        scale = self.crowd.participants / len(self.attackers) if self.scaled and self.attackers else 1
        everyone = range(self.crowd.participants)
        return [Role(p, self.pdr, scale) if p in self.attackers else Role(p) for p in everyone]


def settings() -> list[Setting]:
    """A base setting varied along each axis and the hard corners; these again with the full net."""
    base = Setting()
    of = {n: replace(base, crowd=Crowd(n)) for n in (4, 6, 20)}
    axes = [base, *of.values()]
    axes += [replace(base, pmr=pmr) for pmr in (0.1, 0.4)]  # 0.45 of 10 are 4 as well
    axes += [replace(of[20], pmr=pmr) for pmr in (0.05, 0.45)]
    axes += [replace(base, pdr=0.1), replace(base, scaled=False), replace(base, false_votes=False)]
    axes += [replace(base, crowd=Crowd(alpha=alpha)) for alpha in (1.0, 0.5)]
    return [*dict.fromkeys(axes + corners(32, 512)), *corners(64, 4096)]


def corners(width: int, hidden: int) -> list[Setting]:
    """No attack at every size, and attacks that are hard to see."""
    crowd = functools.partial(Crowd, width=width, hidden=hidden)
    quiet = [Setting(crowd(n, alpha), pmr=0) for n in (4, 5, 6, 10, 20) for alpha in (None, 0.5)]
    many = [Setting(crowd(20), pmr=0.45, scaled=False), Setting(crowd(), pmr=0.4, scaled=False)]
    non_iid = [Setting(crowd(alpha=0.5), pmr=0.4, scaled=scaled) for scaled in (True, False)]
    return [*quiet, *many, *non_iid, Setting(crowd(), pdr=0.1, scaled=False)]


# --- Data -----------------------------------------------------------------------------------------------------


@functools.cache
def load_images(folder: Path) -> dict[str, torch.Tensor]:
    """All images as uint8 `(N, 3, 32, 32)` and their labels, decoded once."""
    path = CACHE / "cifar10.safetensors"
    if not path.exists():
        loaded = {}
        for part in ("train", "test"):
            labels, read = private_attributes.image_folder(folder, part == "train")
            blocks = np.array_split(np.arange(len(labels)), 50)
            images = [(read(block) * 255).round().to(torch.uint8) for block in tqdm(blocks, desc=f"{part} images")]
            loaded |= {f"{part}_images": torch.cat(images), f"{part}_labels": torch.from_numpy(labels)}
        save_atomically(loaded, path)
    return load_file(path)


def save_atomically(tensors: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def order(images) -> np.ndarray:
    """An order of the training images; the first of them are for the warm-up, the rest for the participants."""
    return np.random.default_rng(0).permutation(len(images["train_labels"]))


def share_of(images, chosen):
    return images["train_images"][chosen].float() / 255, images["train_labels"][chosen]


def pool_of(images, seed: int) -> np.ndarray:
    """The images that are not for the warm-up in this seed's order: participants get the first of them."""
    return np.random.default_rng([seed, 1]).permutation(order(images)[WARM_UP_IMAGES:])


def shares(images, crowd: Crowd, seed: int) -> list:
    """Images in [0, 1] and labels of every participant; 500 on the average."""
    pool = pool_of(images, seed)[: IMAGES * crowd.participants]
    labels = images["train_labels"][pool].numpy()
    parts = private_attributes.partition(labels, crowd.participants, crowd.alpha, seed)
    return [share_of(images, pool[part]) for part in parts]


def test_loaders(images) -> list:
    """Test images, and those that are not of the target class with the trigger."""
    chosen = np.random.default_rng(3).permutation(len(images["test_labels"]))[:TEST_IMAGES]  # they lie there by class
    pixels, labels = images["test_images"][chosen].float() / 255, images["test_labels"][chosen]
    others = labels != TARGET
    triggered = private_attributes.add_trigger(pixels[others])
    wanted = torch.full_like(labels[others], TARGET)
    return [private_attributes.as_loader(*pair, 256) for pair in ((pixels, labels), (triggered, wanted))]


# --- Training -------------------------------------------------------------------------------------------------


def config_of(crowd: Crowd, **changes):
    return replace(experiment.demo, hidden=crowd.hidden, width=crowd.width, **{"local_epochs": 1, **changes})


def warm_model(images, crowd: Crowd):
    """The global model from which all rounds with this net start, trained once."""
    config = config_of(crowd, local_epochs=WARM_UP_EPOCHS)
    model = experiment.initial_model(config)
    path = CACHE / f"global-{crowd.width}-{crowd.hidden}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        mine = share_of(images, order(images)[:WARM_UP_IMAGES])
        experiment.train(model, private_attributes.as_loader(*mine, 32, shuffle=True), config, "cpu")
        save_atomically(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model


class View(NamedTuple):
    """What a validator sees of `M` models: distances `(metric, S, M, L)`, labels `(S,)`, responses `(stamp, M, C)`."""

    distances: np.ndarray
    labels: np.ndarray
    responses: np.ndarray

    def of(self, models):
        """The same of some of the models."""
        return View(self.distances[:, :, models], self.labels, self.responses[:, models])

    def suspects(self, own: int, rule: str) -> set[int]:
        found = set(experiment.verdict(self.distances, self.labels, own, rule, experiment.METRICS))
        return experiment.provoked(self.responses, own, found) if rule == "crowd" else found


class Trained:
    """A crowd after one round of training; what was trained and seen before is read from the cache.

    `state(role)` is the model that a participant sends in a role, rounded as on the wire.
    """

    def __init__(self, images, crowd: Crowd, seed: int):
        self.crowd, self.seed, self.config = crowd, seed, config_of(crowd)
        self.global_model = warm_model(images, crowd)
        self.reference = self.global_model.state_dict()
        self.shares = shares(images, crowd, seed)
        self.folder = CACHE / f"{crowd.participants}-{crowd.alpha or 'iid'}-{crowd.width}-{crowd.hidden}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def state(self, role: Role) -> dict:
        path = self.folder / f"{role.participant}-{role.pdr:g}.update"
        if not path.exists():
            path.with_suffix(".part").write_bytes(self.packed(self.train(role)))
            path.with_suffix(".part").replace(path)
        state = experiment.unpack_update(path.read_bytes(), self.reference)
        if role.scale == 1:
            return state
        adversary = private_attributes.Backdoor(private_attributes.Attack(scale=role.scale), None)
        return experiment.unpack_update(self.packed(adversary.update(1, state, self.reference)), self.reference)

    def packed(self, state: dict) -> bytes:
        return experiment.pack_update(state, self.reference, self.config.update_dtype)

    def train(self, role: Role) -> dict:
        return train_one(self.global_model, self.shares[role.participant], role, self.seed, self.config)

    def views(self, roles: list[Role]) -> dict:
        """reference → validator → what it sees of the models in these roles, a `View`."""
        path, names = self.folder / "views.npz", [f"{r.participant}-{r.pdr:g}-{r.scale:g}" for r in roles]
        if not path.exists() or set(names) - set(np.load(path)["roles"]):
            np.savez(path.with_suffix(".part.npz"), roles=names, **self.inspect(roles))
            path.with_suffix(".part.npz").replace(path)
        kept = np.load(path)
        columns = [kept["roles"].tolist().index(name) for name in names]
        cut = functools.partial(np.split, indices_or_sections=kept["borders"])
        labels, responses = cut(kept["labels"]), kept["responses"][:, :, columns]
        return {
            name: [View(*seen) for seen in zip(cut(kept[name][:, :, columns], axis=1), labels, responses, strict=True)]
            for name in ("G", "random")
        }

    def validation_loaders(self) -> list:
        """The images on which each participant inspects the models."""
        return [validation_loader(share, self.seed, p) for p, share in enumerate(self.shares)]

    def inspect(self, roles: list[Role]) -> dict:
        """What all participants see when they inspect the models, a few models at a time."""
        batches = [list(loader) for loader in self.validation_loaders()]
        counts = [sum(len(labels) for _, labels in mine) for mine in batches]
        everyones = [batch for mine in batches for batch in mine]
        looks = {"G": self.global_model, "random": experiment.initial_model(config_of(self.crowd, seed=self.seed))}
        views, responses = {name: [] for name in looks}, []
        for first in range(0, len(roles), AT_ONCE):
            group = [experiment.with_state(self.global_model, self.state(r)) for r in roles[first : first + AT_ONCE]]
            for name, reference in looks.items():
                views[name].append(experiment.hidden_distances(reference, group, everyones, "cpu")[0])
            responses.append(np.stack([stamp(self.global_model, group, mine) for mine in batches]))
        labels = torch.cat([labels for _, labels in everyones]).numpy()
        distances = {name: np.concatenate(parts, axis=2) for name, parts in views.items()}
        borders = np.cumsum(counts)[:-1]
        return distances | {"labels": labels, "borders": borders, "responses": np.concatenate(responses, axis=2)}


def stamp(global_model, models, batches) -> np.ndarray:
    """Responses `(stamp, M, C)` to stamps on the first of the images."""
    return experiment.stamp_responses(global_model, models, batches[0][0][: experiment.STAMPED], "cpu")


def train_one(global_model, share, role: Role, seed: int, config) -> dict:
    """The state dict after local training on the participant's images, poisoned if the role says so."""
    data = private_attributes.poison(*share, TARGET, role.pdr, seed) if role.pdr else share
    model = copy.deepcopy(global_model)
    torch.manual_seed(1000 * seed + role.participant)
    experiment.train(model, private_attributes.as_loader(*data, 32, shuffle=True), config, "cpu")
    return model.state_dict()


def validation_loader(share, seed: int, participant: int):
    """The images on which a participant inspects the models."""
    chosen = np.random.default_rng([seed, 2, participant]).permutation(len(share[1]))[:INSPECTED]
    return private_attributes.as_loader(share[0][chosen], share[1][chosen], 64)


# --- Judging --------------------------------------------------------------------------------------------------


def ballots(views: list[View], setting: Setting, rule: str) -> np.ndarray:
    """Votes `(voter, model)`, 1 for benign; false voters vote for the attackers and against everybody else."""
    rows = []
    for voter, view in enumerate(views):
        found = view.suspects(voter, rule)
        if voter in setting.attackers and setting.false_votes:
            found = set(range(len(views))) - setting.attackers
        rows.append([int(model not in found) for model in range(len(views))])
    return np.array(rows)


def verdicts(setting: Setting, views: dict) -> dict:
    """Who accepts whom: rule → bool `(model,)`; also plain FedAvg, and the oracle that accepts the honest models."""
    judges = {rule: (rule, "G") for rule in experiment.RULES}
    if "random" in views:
        judges["paper, random reference"] = "paper", "random"
    found = {
        name: experiment.stacked_clustering(ballots(views[reference], setting, rule), rule)
        for name, (rule, reference) in judges.items()
    }
    everyone = range(setting.crowd.participants)
    return found | {
        "plain FedAvg": np.ones(len(everyone), dtype=bool),
        "oracle": np.array([m not in setting.attackers for m in everyone]),
    }


def rows_of(folder: Path, crowd: Crowd, seed: int, points: list[Setting]) -> list[dict]:
    """All rows of a crowd: one a setting and rule."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    images = load_images(folder)
    trained, tests = Trained(images, crowd, seed), test_loaders(images)
    roles = list(dict.fromkeys(role for setting in points for role in setting.roles))
    measured, rows = {}, []
    trained.views(roles)  # all at once
    for setting in points:
        for name, accepted in verdicts(setting, trained.views(setting.roles)).items():
            taken = tuple(role for role, is_in in zip(setting.roles, accepted, strict=True) if is_in)
            if taken not in measured:
                measured[taken] = measure(trained, taken, tests)
            rows.append(flat(setting) | {"seed": seed, "rule": name} | rates(accepted, setting) | measured[taken])
    seconds = round(time.perf_counter() - started)
    return [row | {"crowd_seconds": seconds} for row in rows]


def flat(setting: Setting) -> dict:
    values = asdict(setting)
    return values.pop("crowd") | values


def rates(accepted, setting: Setting) -> dict:
    """TPR, None without attackers, and TNR."""
    honest = [m for m in range(len(accepted)) if m not in setting.attackers]
    tpr = np.mean([not accepted[m] for m in setting.attackers]) if setting.attackers else None
    return {"tpr": tpr, "tnr": np.mean([accepted[m] for m in honest])}


def measure(trained: Trained, taken, tests) -> dict:
    """Main-task and backdoor accuracy of the average of these models; of the old global model without any."""
    state = experiment.fed_avg([trained.state(role) for role in taken]) if taken else trained.reference
    model = experiment.with_state(trained.global_model, state)
    main, backdoor = (experiment.accuracy(model, test, "cpu") for test in tests)
    return {"main": main, "backdoor": backdoor}


# --- All of them ----------------------------------------------------------------------------------------------


def run(folder: Path, seeds, workers: int) -> None:
    """Appends what is missing in the CSV, crowd after crowd, a process and a thread each."""
    known, missing = done(RESULTS, *KEY), {}
    for setting in settings():
        for seed in seeds:
            if key(setting, seed) not in known:
                missing.setdefault((seed, setting.crowd), []).append(setting)
    for crowd in {(crowd.width, crowd.hidden): crowd for _, crowd in missing}.values():
        warm_model(load_images(folder), crowd)
    narrow_first = sorted(missing, key=lambda job: (job[1].width, job[0]))
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(rows_of, folder, crowd, seed, missing[seed, crowd]) for seed, crowd in narrow_first]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="crowds x seeds"):
            append(RESULTS, job.result())


KEY = (*flat(Setting()), "seed")  # the columns that tell one round from another


def key(setting: Setting, seed: int) -> tuple:
    return tuple(value or 0 for value in (flat(setting) | {"seed": seed}).values())


# --- What is there ----------------------------------------------------------------------------------------------

RATES = ["tpr", "tnr", "main", "backdoor"]
HARMLESS = 0.02  # above the oracle's backdoor accuracy


def label(row) -> str:
    partition = "IID" if pd.isna(row.alpha) else f"Dirichlet {row.alpha:g}"
    attack = f"PMR {row.pmr:g}, PDR {row.pdr:g}, {'scaled' if row.scaled else 'unscaled'}" if row.pmr else "no attack"
    votes = "" if row.false_votes else ", honest votes"
    return f"{row.participants:2d}, {partition}, {attack}{votes}" + (", full net" if row.width == 64 else "")


def results() -> pd.DataFrame:
    """All rows; `over_oracle` is the backdoor accuracy and `under_oracle` the main-task accuracy against the oracle's,
    `harmless` says that an attacker was let in and the backdoor stayed within two points."""
    rows = pd.read_csv(RESULTS)
    rows["setting"] = [label(row) for row in rows.itertuples()]
    oracle = rows[rows.rule == "oracle"].set_index(["setting", "seed"])
    at = pd.MultiIndex.from_frame(rows[["setting", "seed"]])
    rows["over_oracle"] = rows["backdoor"].to_numpy() - oracle["backdoor"].loc[at].to_numpy()
    rows["under_oracle"] = oracle["main"].loc[at].to_numpy() - rows["main"].to_numpy()
    rows["harmless"] = (rows["tpr"] < 1) & (rows["over_oracle"] <= HARMLESS)
    return rows


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and half of the 95 % interval (Student's t) over the seeds, a line a setting and rule."""
    groups = rows.groupby(["setting", "rule"], sort=False)
    count = groups["seed"].count()
    half = groups[RATES].sem().mul(stats.t.ppf(0.975, (count - 1).clip(lower=1)), axis=0)
    counts = pd.DataFrame({"seeds": count, "harmless": groups["harmless"].sum()})
    return pd.concat({"mean": groups[RATES].mean(), "±": half, "": counts}, axis=1).round(3)


def markdown(rows: pd.DataFrame) -> str:
    """A line a setting: TPR and TNR of each rule, then main-task and backdoor accuracy; means over the seeds."""
    means = table(rows)["mean"].unstack("rule", sort=False)
    line = pd.DataFrame({"seeds": rows.groupby("setting", sort=False)["seed"].nunique()})
    for rule in ("crowd", "paper", "paper, random reference"):
        pairs = zip(means["tpr", rule], means["tnr", rule], strict=True)
        line[f"TPR / TNR, {rule}"] = [" / ".join("–" if pd.isna(x) else f"{x:.1%}" for x in pair) for pair in pairs]
    for kind in ("main", "backdoor"):
        for rule in ("plain FedAvg", "paper", "crowd", "oracle"):
            line[f"{kind}, {rule}"] = means[kind, rule].map("{:.1%}".format)
    return line.reset_index().to_markdown(index=False, disable_numparse=True)


def heat_map(summary: pd.DataFrame, path: Path) -> None:
    """TPR and TNR of every setting and rule."""
    means = summary["mean"].drop(index=["plain FedAvg", "oracle"], level="rule")
    height = 1.5 + 0.24 * len(means.unstack())
    figure, axes = plt.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    for axis, score in zip(axes, ("tpr", "tnr"), strict=True):
        values = means[score].unstack("rule", sort=False)
        axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(values.shape[1]), [name.replace(", ", ",\n") for name in values.columns])
        axis.set_yticks(range(values.shape[0]), values.index, fontsize=8)
        axis.set_title(score.upper())
        for (row, column), value in np.ndenumerate(values):
            axis.text(column, row, "–" if np.isnan(value) else f"{value:.0%}", ha="center", va="center", fontsize=7)
    figure.savefig(path, dpi=110)


def main():
    parser = arguments(__doc__, seeds=5)
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    args = parser.parse_args()
    if not args.table:
        run(args.folder, range(args.seeds), args.workers)
    rows = results()
    summary = table(rows)
    print(summary.to_string())
    RESULTS.with_suffix(".md").write_text(markdown(rows) + "\n")
    heat_map(summary, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
