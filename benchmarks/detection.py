"""Who is found, and who is wrongly accused: single rounds of federated learning on real CIFAR-10, judged by every rule.

    python benchmarks/detection.py ~/cifar10                 # all settings, five seeds; continues where it was stopped
    python benchmarks/detection.py ~/cifar10 --table         # the table and the heat map of what is there

A round starts from a global model that was trained once on 10,000 images which no participant holds. Every rule judges
the same updates. One line a setting, seed and rule goes to `benchmarks/detection.csv` as soon as it is known.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import ROOT, load_experiment, private_attributes
from tqdm import tqdm

experiment = load_experiment()

WARM_UP_IMAGES = 10_000
WARM_UP_EPOCHS = 8
IMAGES = 500  # a participant's
INSPECTED = 128  # images on which a participant inspects the models
TEST_IMAGES = 2_000
TARGET = 2
SEEDS = range(5)
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
