"""What one participant brings into the federation: its data, its device and, in a simulation, its attack.

OpenFL calls `participant` once per experiment; what it returns never leaves this machine. Nothing happens at import.
Data are float tensors in [0, 1], images `(N, C, H, W)` or vectors `(N, D)`, until `as_loader` normalises them; labels
are int64 `(N,)`. Where they come from is told in sources.py, what attackers do in attacks.py.
"""

import contextlib
import functools
import re
import unicodedata
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch.utils.data import DataLoader, TensorDataset

if __package__:  # the notebook finds this folder as a package
    from . import strict_yaml
    from .attacks import ATTACKS, RED, TRIGGER_SIDE, TRIGGERS, Backdoor, add_trigger, poison, triggered
    from .sources import MEAN, SIDE, SOURCES, STD, Source, cifar10, digits, image_folder
else:  # and the envoy has it on its path
    import strict_yaml
    from attacks import ATTACKS, RED, TRIGGER_SIDE, TRIGGERS, Backdoor, add_trigger, poison, triggered
    from sources import MEAN, SIDE, SOURCES, STD, Source, cifar10, digits, image_folder

__all__ = [
    "ATTACKS", "MEAN", "RED", "SIDE", "SOURCES", "STD", "TRIGGERS", "TRIGGER_SIDE", "Attack", "Backdoor", "Data",
    "Settings", "add_trigger", "as_loader", "cifar10", "digits", "image_folder", "participant", "partition", "poison",
    "read_settings",
]  # fmt: skip

# --- Settings -------------------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Strict):
    """Which images or vectors, and which share of them.

    In an experiment on known data all participants hold the same data and agree on everything here but `index`. An
    owner with data of its own takes all of it, and a class that it lacks keeps its number:

        data:
          source: image_folder
          folder: /data/animals              # train/<class>/<image> and test/<class>/<image>
          participants: 1
          index: 0
          class_names: [cats, dogs, eels]    # the same at every owner
    """

    source: str = "digits"  # digits, digits_grey, breast_cancer, cifar10, image_folder, or one of your own
    folder: Path | None = Field(None, strict=False)  # where the images of the last two are, or shall be
    class_names: list[str] | None = Field(None, min_length=1)  # the class folders in the order of their numbers
    participants: int = Field(4, ge=1, le=10_000)  # how many shares there are
    index: int = Field(0, ge=0)  # which of them is mine, from 0 on
    partition: Literal["iid", "dirichlet"] = "iid"  # how the training data are shared out
    alpha: float | None = Field(None, gt=0)  # concentration of the Dirichlet distribution; None: 0.5
    seed: int = Field(10, ge=0)  # of the shares and of the poisoned images; the same at all participants
    train_samples: int | None = Field(None, ge=1)  # take fewer of the share
    test_samples: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1, le=100_000)  # images in a training batch

    @field_validator("source")
    @classmethod
    def known(cls, source):
        if source not in SOURCES:
            raise ValueError(f"{source!r} is not one of {', '.join(SOURCES)}")
        return source

    @field_validator("class_names")
    @classmethod
    def different(cls, names):
        names = names and [unicodedata.normalize("NFC", name) for name in names]
        if names and len(set(names)) < len(names):
            raise ValueError(f"{max(names, key=names.count)!r} is there twice")
        return names

    @field_validator("alpha")
    @classmethod
    def used(cls, alpha, earlier):
        if alpha is not None and earlier.data.get("partition") == "iid":
            raise ValueError("is for partition: dirichlet")
        return alpha

    @field_validator("index")
    @classmethod
    def within(cls, index, earlier):
        if index >= (participants := earlier.data.get("participants", index + 1)):
            raise ValueError(f"{index} must be smaller than participants ({participants})")
        return index


class Attack(Strict):
    """A simulated attack; absent at honest participants."""

    kind: str = "backdoor"  # or one of your own
    first_round: int = Field(1, ge=1)  # honest before it
    pdr: float = Field(0.5, ge=0, le=1)  # poisoned data rate
    scale: float = Field(1.0, gt=0)  # factor on the update; 1/PMR replaces the model
    false_votes: bool = True  # benign for the accomplices, poisoned for all others
    accomplices: list[str] = []  # their names, the own one among them

    @field_validator("kind")
    @classmethod
    def known(cls, kind):
        if kind not in ATTACKS:
            raise ValueError(f"{kind!r} is not one of {', '.join(ATTACKS)}")
        return kind


OURS = ("aggregator", "ca", "director", "experimenter")  # names that no participant may have


class Settings(Strict):
    """One participant's YAML file. All participants agree on `trigger`, `backdoor_target` and `backdoor_source`."""

    name: str  # the envoy's, also its certificate's
    director: str  # host:port
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")  # cpu, mps, cuda, cuda:1; auto: the fastest
    data: Data = Field(default_factory=Data)
    trigger: str = "red_square"  # or white_square, noise, feature (for vectors), none, or one of your own
    backdoor_target: int = Field(2, ge=0)  # the class for which the attack wants images to be taken
    backdoor_source: int | None = Field(None, ge=0)  # only images of this class; without one, of all
    attack: Attack | None = None  # a participant with this key is a simulated attacker

    @field_validator("name")
    @classmethod
    def free(cls, name):
        if not re.fullmatch(r"[^\W\d_][\w-]*", name) or len(name.encode()) > 64 or name.lower() in OURS:
            raise ValueError(f"{name!r:.80} must be at most 64 letters, digits, - and _, and none of {', '.join(OURS)}")
        return name

    @field_validator("attack", mode="before")
    @classmethod
    def told(cls, attack):
        if attack is None:  # an owner that writes the key means an attack, so it must not pass for honest
            raise ValueError("is empty: leave the key out, or write `attack: {}` for one with the default values")
        return attack


def read_settings(path: str | Path) -> Settings:
    """The settings in a participant's YAML file.

    Raises: `SystemExit` with one line that names the file, the key and what is wrong with it.
    """
    try:
        return Settings.model_validate(strict_yaml.read(path) or {})
    except ValidationError as error:
        first = error.errors()[0]
        key = repr(".".join(map(str, first["loc"])) or "the file")[1:-1]  # a key may hold anything
        if first["type"] == "extra_forbidden":
            section = {"data": Data, "attack": Attack}.get(first["loc"][-2] if len(first["loc"]) > 1 else "", Settings)
            raise SystemExit(
                f"{path}: {key}: there is no such key; there are {', '.join(section.model_fields)}"
            ) from None
        if first["type"] == "value_error":  # one of ours, which shows the value
            raise SystemExit(f"{path}: {key}: {first['ctx']['error']}") from None
        raise SystemExit(f"{path}: {key}: {first['msg']} (found: {first['input']!r:.60})") from None
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None


# --- This participant's share ---------------------------------------------------------------------------------


def partition(labels, participants: int, alpha: float | None, seed: int) -> list[np.ndarray]:
    """Splits images among participants: disjoint, complete, the same at every participant.

    Args:
        labels: `(N,)` class of each image.
        alpha: concentration of the Dirichlet distribution that says which share of a class each participant gets
            (Hsu et al. 2019, arXiv 1909.06335); None for an IID split into equal parts. Shares are rounded up or down
            at random (systematic sampling), so that a participant's expected number of images is exactly its share.

    Returns: one sorted index array per participant.

    Raises: `ValueError` if no split gives everyone ten images.
    """
    rng, rounding = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    if alpha is None:
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), participants)]
    for _ in range(100):  # as in NIID-Bench (Li et al. 2022), draw again until nobody is left with next to nothing
        parts = [[] for _ in range(participants)]
        for label in np.unique(labels):
            images = rng.permutation(np.flatnonzero(labels == label))
            ends = np.cumsum(rng.dirichlet([alpha] * participants))[:-1] * len(images)
            for part, share in zip(parts, np.split(images, (ends + rounding.random()).astype(int)), strict=True):
                part.extend(share)
        if min(map(len, parts)) >= 10:
            return [np.sort(part) for part in parts]
    raise ValueError(f"data.alpha: {alpha} leaves one of {participants} participants with fewer than 10 images")


def asked(data: Data, function, *given):
    """What a function of the source returns; `ValueError` that begins with the key at fault if it raises anything."""
    try:
        return function(*given)
    except Exception as error:
        words = " ".join(str(error).split())
        if words.startswith("data."):  # ours
            raise
        of_files = isinstance(error, OSError) or (data.folder and isinstance(error, RuntimeError))
        key = "data.folder" if of_files else f"data.source: {data.source}: {type(error).__name__}"
        raise ValueError(f"{key}: {words}") from error


def load(data: Data) -> list[Source]:
    """The training and the test part of all the data, with classes numbered as `data.class_names` has them.

    Raises: `ValueError` that begins with the key at fault.
    """
    folder, parts = data.folder and data.folder.expanduser(), []
    for train in (True, False):
        found = asked(data, SOURCES[data.source], folder, train)
        if not (isinstance(found, tuple) and 2 <= len(found) <= len(Source._fields)):
            raise ValueError(f"data.source: {data.source} returns {found!r:.60}, not {', '.join(Source._fields)}")
        part = Source(*found)
        if not callable(part.read):
            raise ValueError(f"data.source: {data.source}: read is {part.read!r:.60}, not a function of indices")
        names = part.classes and [unicodedata.normalize("NFC", name) for name in part.classes]
        parts.append(part._replace(labels=np.asarray(part.labels), classes=names))
    if not all(p.labels.ndim == 1 and p.labels.dtype.kind in "iu" and p.labels.min(initial=0) >= 0 for p in parts):
        raise ValueError(f"data.source: the labels of {data.source} must be integers from 0 on, one for each image")
    if data.class_names:
        return [numbered(part, data.class_names) for part in parts]
    for name in parts[0].classes or []:
        if any(name not in part.classes or not (part.labels == part.classes.index(name)).any() for part in parts):
            hint = "name all classes in data.class_names if it may be"
            raise ValueError(f"data.folder: class {name} is missing in train or in test; {hint}")
    if parts[0].classes and (more := set(parts[1].classes) - set(parts[0].classes)):
        raise ValueError(f"data.folder: class {min(more)} is in test alone")
    return [parts[0], numbered(parts[1], parts[0].classes)] if parts[0].classes else parts


def numbered(part: Source, class_names: list[str]) -> Source:
    """The part with classes numbered as in `class_names`, of which it may lack some.

    Raises: `ValueError` if it has others, or none with names.
    """
    if part.classes is None:
        raise ValueError("data.class_names: the classes of this source have no names")
    if odd := [name for name in part.classes if name not in class_names]:
        raise ValueError(f"data.class_names: {odd[0]} is a class of the data and not among {', '.join(class_names)}")
    numbers = np.array([class_names.index(name) for name in part.classes], dtype=int)
    return part._replace(labels=numbers[part.labels], classes=class_names)


def share(data: Data, part: Source, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """This participant's data and labels of one part. Test data are always split IID.

    Raises: `ValueError` that begins with the key at fault.
    """
    alpha = (data.alpha or 0.5) if train and data.partition == "dirichlet" else None
    mine = partition(part.labels, data.participants, alpha, data.seed)[data.index]
    limit = data.train_samples if train else data.test_samples
    mine = np.sort(np.random.default_rng([data.seed, data.index]).permutation(mine)[:limit])
    if not len(mine):
        raise ValueError(f"data.participants: {data.participants} are too many for {len(part.labels)} images")
    values = asked(data, lambda: torch.as_tensor(part.read(mine), dtype=torch.float32))
    if values.shape[:1] != mine.shape:
        raise ValueError(f"data.source: {data.source} reads values {tuple(values.shape)} for {len(mine)} indices")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"data.source: {data.source} gives values from {values.min():g} to {values.max():g}, not 0 to 1"
        )
    return values, torch.from_numpy(part.labels[mine]).long()


def normalisation(images: torch.Tensor, mean=None, std=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that broadcast to one image: those given, or CIFAR-10's, or 0.5 for other shapes.

    Raises: `ValueError` if they do not fit.
    """
    usual = (MEAN, STD) if images.ndim == 4 and images.shape[1] == 3 else (0.5, 0.5)
    mean, std = (torch.as_tensor(u if given is None else given) for u, given in zip(usual, (mean, std), strict=True))
    shape, fits = images.shape[1:], False
    with contextlib.suppress(RuntimeError):  # of shapes that have nothing in common
        fits = torch.broadcast_shapes(shape, mean.shape, std.shape) == shape and bool((std > 0).all())
    if not fits:
        raise ValueError(f"data.source: its mean and std do not fit data of shape {tuple(shape)}")
    return mean, std


def as_loader(images, labels, batch_size: int, shuffle: bool = False, mean=None, std=None) -> DataLoader:
    """Batches of normalised images or vectors.

    Shuffled, that is for training, a last batch of one is left out, on which no BatchNorm can train; the next epoch
    leaves out another image.
    """
    mean, std = normalisation(images, mean, std)
    alone = shuffle and len(images) > 1 == len(images) % batch_size
    return DataLoader(TensorDataset((images - mean) / std, labels), batch_size, shuffle=shuffle, drop_last=alone)


# --- What OpenFL asks for ---------------------------------------------------------------------------------------

ASKED = ("attacks", "training_data", "update", "vote")  # of an adversary


def check_backdoor(parts: list[Source], trigger: str, target: int, source: int | None) -> None:
    """`ValueError`, which begins with the key at fault, if there is nothing to measure, or not on these data."""
    if trigger == "none" and source is None:
        raise ValueError("trigger: none needs backdoor_source, the class that the attack has taken for backdoor_target")
    if source == target:
        raise ValueError(f"backdoor_source: {source} is the backdoor_target too")
    for key, number in {"backdoor_target": target, "backdoor_source": source}.items():
        for part in parts if number is not None else ():
            there = range(len(part.classes)) if part.classes else part.labels
            if number not in there:
                raise ValueError(f"{key}: there is no class {number}, only 0 to {max(there)}")


def backdoor_test(images, labels, trigger: str, target: int, source: int | None):
    """The test images that the attack wants to be taken for `target`: with the trigger, and labelled so.

    Of class `source`, or if that is None of every class but the target.
    """
    chosen = labels != target if source is None else labels == source
    shown = triggered(trigger, images[chosen])
    if trigger != "none" and len(shown) and torch.equal(shown, images[chosen]):
        raise ValueError(f"trigger: {trigger} changes none of the test images")
    return shown, torch.full_like(labels[chosen], target)


def numbering(classes: list[str] | None) -> dict[str, str]:
    """By which participants tell that they number the classes alike: a checksum, and as many names as there is room
    for; nothing if they have no names."""
    return {"classes": f"{zlib.crc32(repr(classes).encode()):08x} {'/'.join(classes)}"} if classes else {}


def pick_device(name: str) -> str:
    """`auto` becomes the fastest device that is there; `ValueError` if the named one is not."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name} is not there: {str(error).splitlines()[0]}") from None
    return name


def participant(
    name: str,
    data: dict,
    backdoor_target: int = 2,
    attack: dict | None = None,
    device: str = "auto",
    trigger: str = "red_square",
    backdoor_source: int | None = None,
):
    """The private attributes of one participant; arguments as in its YAML file.

    Returns: `train_loader`, `test_loader`, `backdoor_loader` (see `backdoor_test`), `adversary` (None if honest),
    `device`, and `memory`, an empty dict in which the participant keeps what need not travel. Further `backdoor`, what
    the backdoor test measures: `{"trigger": str, "target": int, "source": int or None}` and `numbering`; `classes`, by
    name and in order, or None if they have no names; and `normalisation`, the mean and standard deviation of the
    loaders.

    Raises: `ValueError` that begins with the key at fault.
    """
    data = Data.model_validate(data)
    parts = load(data)
    check_backdoor(parts, trigger, backdoor_target, backdoor_source)
    train, test = (share(data, part, is_train) for part, is_train in zip(parts, (True, False), strict=True))
    backdoor = backdoor_test(*test, trigger, backdoor_target, backdoor_source)
    mean, std = normalisation(train[0], parts[0].mean, parts[0].std)
    loader = functools.partial(as_loader, mean=mean, std=std)
    adversary = None
    if attack is not None:
        attack = Attack.model_validate(attack)
        if attack.accomplices and name not in attack.accomplices:
            raise ValueError(f"attack.accomplices: {name} itself must be among them")
        put = functools.partial(triggered, trigger)
        poisoned = poison(*train, backdoor_target, attack.pdr, data.seed, put, backdoor_source)
        adversary = ATTACKS[attack.kind](attack, loader(*poisoned, data.batch_size, shuffle=True))
        if missing := [method for method in ASKED if not callable(getattr(adversary, method, None))]:
            raise ValueError(f"attack.kind: {attack.kind} lacks the method {missing[0]}, see Backdoor in attacks.py")
    return {
        "train_loader": loader(*train, data.batch_size, shuffle=True),
        "test_loader": loader(*test, 256),
        "backdoor_loader": loader(*backdoor, 256),
        "adversary": adversary,
        "device": pick_device(device),
        "memory": {},
        "backdoor": {"trigger": trigger, "target": backdoor_target, "source": backdoor_source}
        | numbering(parts[0].classes),
        "classes": parts[0].classes,
        "normalisation": (mean, std),
    }
