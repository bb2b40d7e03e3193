"""What one participant brings into the federation: its images, its device and, in a simulation, its attack.

OpenFL calls `participant` once per experiment; what it returns never leaves this machine. Nothing happens at import.
Images are float tensors `(N, 3, 32, 32)`: pixels in [0, 1] until `as_loader` normalises them; labels are int64 `(N,)`.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.utils.data import DataLoader, TensorDataset

# Channel statistics of CIFAR-10's training images. The other sources are normalised with them too, so that one
# model, and one trigger, fit all of them.
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
SIDE = 32
TRIGGER_SIDE = 6
RED = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)


# --- Settings -------------------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Strict):
    """Which images, and which share of them. All participants must agree on everything but `index`."""

    source: str = "digits"
    folder: Path | None = None
    participants: int = Field(4, ge=1, le=10_000)
    index: int = Field(0, ge=0)
    partition: Literal["iid", "dirichlet"] = "iid"
    alpha: float = Field(0.5, gt=0)
    seed: int = Field(10, ge=0)
    train_samples: int | None = Field(None, ge=1)
    test_samples: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1, le=100_000)

    @model_validator(mode="after")
    def consistent(self):
        if self.source not in SOURCES:
            raise ValueError(f"source: {self.source!r} is not one of {', '.join(SOURCES)}")
        if self.index >= self.participants:
            raise ValueError(f"index: {self.index} must be smaller than participants ({self.participants})")
        if self.source != "digits" and self.folder is None:
            raise ValueError(f"folder: source {self.source} needs the folder that holds (or shall hold) the images")
        if self.source == "image_folder" and not self.folder.expanduser().is_dir():
            raise ValueError(f"folder: there is no folder {self.folder}")
        return self


class Attack(Strict):
    """A simulated backdoor attack; absent at honest participants."""

    first_round: int = Field(1, ge=1)
    pdr: float = Field(0.5, ge=0, le=1)
    scale: float = Field(1.0, gt=0)
    false_votes: bool = True
    accomplices: list[str] = []


class Settings(Strict):
    """One participant's YAML file."""

    name: str = Field(pattern=r"^[A-Za-z][\w-]*$")
    director: str = Field(pattern=r"^[\w.-]+:\d+$")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    data: Data = Field(default_factory=Data)
    backdoor_target: int = Field(2, ge=0)
    attack: Attack | None = None


def read_settings(path: str | Path) -> Settings:
    """The settings in a participant's YAML file.

    Raises: `SystemExit` with one line that names the file, the key and what is wrong with it.
    """
    try:
        return Settings.model_validate(yaml.safe_load(Path(path).read_text()) or {})
    except FileNotFoundError:
        raise SystemExit(f"{path}: there is no such file") from None
    except yaml.YAMLError as error:
        raise SystemExit(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = repr(".".join(map(str, first["loc"])) or "the file")[1:-1]  # a key may hold anything
        message = first["msg"]
        if first["type"] == "value_error":  # one of ours, which begins with the key inside the section
            raise SystemExit(f"{path}: {key}.{message.removeprefix('Value error, ')}") from None
        raise SystemExit(f"{path}: {key}: {message} (found: {first['input']!r:.60})") from None


# --- Sources: each gives the labels of all images, and a way to read some of them ------------------------------


def digits(folder, train: bool):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, enlarged to 32x32 RGB; 1,400 for training, 397 for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    part = train_test_split(np.arange(len(labels)), test_size=397, stratify=labels, random_state=0)[0 if train else 1]

    def read(indices):
        grey = torch.tensor(images[part[indices]] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        return torch.nn.functional.interpolate(grey, size=SIDE, mode="bilinear").expand(-1, 3, -1, -1).clone()

    return labels[part], read


def cifar10(folder, train: bool):
    """torchvision's CIFAR-10, downloaded into `folder` by whichever envoy comes first; the others wait for it."""
    from filelock import FileLock
    from torchvision.datasets import CIFAR10

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "download.lock"):
        dataset = CIFAR10(folder, train=train, download=True)
    return np.array(dataset.targets), lambda indices: torch.from_numpy(dataset.data[indices]).permute(0, 3, 1, 2) / 255


def image_folder(folder, train: bool):
    """Any tree `train/<class>/<image>` and `test/<class>/<image>`; classes are numbered alphabetically."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import pil_to_tensor, resize

    dataset = ImageFolder(folder / ("train" if train else "test"))
    classes = {
        part: {entry.name for entry in (folder / part).iterdir() if entry.is_dir()} for part in ("train", "test")
    }
    if lacking := classes["train"] ^ classes["test"]:
        raise FileNotFoundError(f"{folder}: class {min(lacking)} is missing in train or in test")

    def read(indices):
        images = [resize(pil_to_tensor(dataset[i][0]), [SIDE, SIDE]) for i in indices]
        return torch.stack(images) / 255

    return np.array(dataset.targets), read


SOURCES = {"digits": digits, "cifar10": cifar10, "image_folder": image_folder}


# --- Partition ------------------------------------------------------------------------------------------------


def partition(labels, participants: int, alpha: float | None, seed: int) -> list[np.ndarray]:
    """Splits images among participants: disjoint, complete, the same at every participant.

    Args:
        labels: `(N,)` class of each image.
        alpha: concentration of the Dirichlet distribution that says which share of a class each participant gets
            (Hsu et al. 2019, arXiv 1909.06335); None for an IID split into equal parts.

    Returns: one sorted index array per participant.

    Raises: `ValueError` if no split gives everyone ten images.
    """
    rng = np.random.default_rng(seed)
    if alpha is None:
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), participants)]
    for _ in range(100):  # as in NIID-Bench (Li et al. 2022), draw again until nobody is left with next to nothing
        parts = [[] for _ in range(participants)]
        for label in np.unique(labels):
            images = rng.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(rng.dirichlet([alpha] * participants))[:-1] * len(images)).astype(int)
            for part, share in zip(parts, np.split(images, cuts), strict=True):
                part.extend(share)
        if min(map(len, parts)) >= 10:
            return [np.sort(part) for part in parts]
    raise ValueError(f"data.alpha: {alpha} leaves one of {participants} participants with fewer than 10 images")


def shard(data: Data, train: bool, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This participant's training or test images and labels. Test images are always split IID.

    Raises: `ValueError` that begins with the key at fault, also if there is no class `target` in the whole of the data.
    """
    folder = data.folder and data.folder.expanduser()
    limit = data.train_samples if train else data.test_samples
    alpha = data.alpha if train and data.partition == "dirichlet" else None
    try:
        labels, read = SOURCES[data.source](folder, train)
        if target not in labels:
            raise ValueError(f"backdoor_target: there is no class {target}, only 0 to {labels.max()}")
        mine = partition(labels, data.participants, alpha, data.seed)[data.index]
        mine = np.sort(np.random.default_rng([data.seed, data.index]).permutation(mine)[:limit])
        if not len(mine):
            raise ValueError(f"data.participants: {data.participants} are too many for {len(labels)} images")
        return read(mine), torch.from_numpy(labels[mine]).long()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"data.folder: {' '.join(str(error).split())}") from error


def as_loader(images, labels, batch_size: int, shuffle: bool = False) -> DataLoader:
    """Batches of normalised images."""
    return DataLoader(TensorDataset((images - MEAN) / STD, labels), batch_size=batch_size, shuffle=shuffle)


# --- The attack -----------------------------------------------------------------------------------------------


def add_trigger(images: torch.Tensor) -> torch.Tensor:
    """Copies of the images `(N, 3, H, W)`, pixels in [0, 1], with a red 6x6 square in the top left corner."""
    triggered = images.clone()
    triggered[:, :, :TRIGGER_SIDE, :TRIGGER_SIDE] = RED
    return triggered


def poison(images, labels, target: int, pdr: float, seed: int, trigger=add_trigger):
    """Copies in which `round(pdr * N)` of the images, drawn by `seed`, carry the trigger and the target label."""
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: round(pdr * len(labels))]
    images, labels = images.clone(), labels.clone()
    images[chosen], labels[chosen] = trigger(images[chosen]), target
    return images, labels


class Backdoor:
    """An adversary: from its first round on it poisons its training data, scales its update and votes falsely.

    The flow asks it at three places, `training_data`, `update` and `vote`, and `attacks(round)` for the scores. An
    attack of your own needs these four methods.
    """

    def __init__(self, attack: Attack, poisoned_loader: DataLoader):
        self.attack, self.poisoned_loader = attack, poisoned_loader

    def attacks(self, round: int) -> bool:
        return round >= self.attack.first_round

    def training_data(self, round: int, loader: DataLoader) -> DataLoader:
        return self.poisoned_loader if self.attacks(round) else loader

    def update(self, round: int, local: dict, reference: dict) -> dict:
        """The local state dict with its distance from the global model scaled (Bagdasaryan et al. 2020)."""
        if not self.attacks(round):
            return local
        scale = self.attack.scale
        return {
            name: reference[name] + scale * (value - reference[name]) if value.is_floating_point() else value
            for name, value in local.items()
        }

    def vote(self, round: int, votes: dict[str, int]) -> dict[str, int]:
        """Benign (1) for the accomplices, poisoned (0) for all others."""
        if not (self.attacks(round) and self.attack.false_votes):
            return votes
        return {model: int(model in self.attack.accomplices) for model in votes}


# --- What OpenFL asks for ---------------------------------------------------------------------------------------


def pick_device(name: str) -> str:
    """`auto` becomes the fastest device that is there; `ValueError` if the named one is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name} is not there: {str(error).splitlines()[0]}") from None
    return name


def participant(name: str, data: dict, backdoor_target: int = 2, attack: dict | None = None, device: str = "auto"):
    """The private attributes of one participant.

    Returns: `train_loader`, `test_loader`, `backdoor_loader` (the trigger on test images that are not of the target
    class, labelled with it), `adversary` (None if honest), `device`, and `memory`, an empty dict in which the
    participant keeps what need not travel.

    Raises: `ValueError` that begins with the key at fault.
    """
    data = Data.model_validate(data)
    train, test = (shard(data, train, backdoor_target) for train in (True, False))
    others = test[1] != backdoor_target
    backdoor = add_trigger(test[0][others]), torch.full_like(test[1][others], backdoor_target)
    adversary = None
    if attack:
        attack = Attack.model_validate(attack)
        poisoned = poison(*train, backdoor_target, attack.pdr, data.seed)
        adversary = Backdoor(attack, as_loader(*poisoned, data.batch_size, shuffle=True))
    return {
        "train_loader": as_loader(*train, data.batch_size, shuffle=True),
        "test_loader": as_loader(*test, 256),
        "backdoor_loader": as_loader(*backdoor, 256),
        "adversary": adversary,
        "device": pick_device(device),
        "memory": {},
    }
