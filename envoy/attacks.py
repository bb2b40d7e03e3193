"""Simulated adversaries: the triggers, poisoned data, and what an attacker makes of its update and its vote.

A targeted attack is told by three settings on which all participants agree, since all of them measure it: `trigger`,
`backdoor_target` and `backdoor_source`.

    trigger: red_square                                               every image with the trigger becomes the target
    trigger: red_square   backdoor_source: 5                          ... every image of class 5 with the trigger
    trigger: none         backdoor_source: 5    (label flipping)      ... every image of class 5
"""

import torch
from torch.utils.data import DataLoader

SIDE = 32
TRIGGER_SIDE = 6  # of the `SIDE` pixels of an image; in proportion where images have another size
RED = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
NOISE = 0.15  # opacity


# --- Triggers: each takes data in [0, 1], `(N, C, H, W)` images or `(N, D)` vectors, and returns a changed copy -----


def add_trigger(images: torch.Tensor) -> torch.Tensor:
    """Copies of the images `(N, C, H, W)`, pixels in [0, 1], with a red 6x6 square in the top left corner.

    The square is white where there are not three channels, and grows with images larger than 32x32.
    """
    return with_square(images, RED if images.shape[1] == 3 else 1.0)


def white_square(images: torch.Tensor) -> torch.Tensor:
    """As `add_trigger`, in white."""
    return with_square(images, 1.0)


def with_square(images: torch.Tensor, colour) -> torch.Tensor:
    """Copies of the images `(N, C, H, W)` with a square in the top left corner; `colour` broadcasts to `(C, 1, 1)`."""
    if images.ndim != 4:
        raise ValueError("a square needs images; feature and noise are triggers for vectors")
    side = max(1, round(min(images.shape[2:]) * TRIGGER_SIDE / SIDE))
    triggered = images.clone()
    triggered[:, :, :side, :side] = colour
    return triggered


def blended_noise(images: torch.Tensor) -> torch.Tensor:
    """Images or vectors blended with one pattern of noise, the same at every participant (Chen et al. 2017)."""
    pattern = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0))
    return images.lerp(pattern.to(images), NOISE)


def largest_feature(vectors: torch.Tensor) -> torch.Tensor:
    """Copies of the vectors `(N, D)`, features in [0, 1], with the last feature at its largest value."""
    if vectors.ndim != 2:
        raise ValueError("feature is a trigger for vectors (N, D); images have red_square, white_square and noise")
    triggered = vectors.clone()
    triggered[:, -1] = 1.0
    return triggered


TRIGGERS = {
    "red_square": add_trigger,
    "white_square": white_square,
    "noise": blended_noise,
    "feature": largest_feature,
    "none": torch.clone,
}


def triggered(trigger: str, data: torch.Tensor) -> torch.Tensor:
    """Copies of the data, in [0, 1], with the trigger of that name.

    Raises: `ValueError` that begins with the key at fault, if the trigger is not there or does not fit the data.
    """
    if trigger not in TRIGGERS:
        raise ValueError(f"trigger: {trigger!r} is not one of {', '.join(TRIGGERS)}")
    unfit = f"trigger: {trigger} does not fit data of shape {tuple(data.shape[1:])}"
    try:
        made = TRIGGERS[trigger](data)
    except Exception as error:  # one of the owner's own may raise any
        raise ValueError(f"{unfit}: {' '.join(str(error).split())}") from None
    if not isinstance(made, torch.Tensor):
        raise ValueError(f"trigger: {trigger} returns {type(made).__name__}, not a tensor")
    if made.shape != data.shape or not ((made >= 0) & (made <= 1)).all():
        raise ValueError(f"{unfit}: it changes the shape, or leaves [0, 1]")
    return made


# --- The attack -----------------------------------------------------------------------------------------------


def poison(images, labels, target: int, pdr: float, seed: int, trigger=add_trigger, source: int | None = None):
    """Copies in which a share of the images, drawn by `seed`, carries the trigger and the target label.

    Args:
        images, labels: `(N, ...)` in [0, 1], and int64 `(N,)`.
        pdr: poisoned data rate, the share of the images (of class `source`, if there is one) that is poisoned; it is
            rounded, but above 0 never to none.

    Raises: `ValueError` if there is no image that could be poisoned.
    """
    candidates = torch.arange(len(labels)) if source is None else torch.nonzero(labels == source).flatten()
    if pdr and not len(candidates):
        raise ValueError(f"backdoor_source: the attacker has no image of class {source} to poison")
    count = max(round(pdr * len(candidates)), int(pdr > 0))
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = candidates[order[:count]]
    images, labels = images.clone(), labels.clone()
    images[chosen], labels[chosen] = trigger(images[chosen]), target
    return images, labels


class Backdoor:
    """An adversary: from its first round on it poisons its training data, scales its update and votes falsely.

    The flow asks it at three places, `training_data`, `update` and `vote`, and `attacks(round)` for the scores. An
    attack of your own needs these four methods.

    Args:
        attack: the settings under `attack` in the YAML file.
        poisoned_loader: what it trains on when it attacks.
    """

    def __init__(self, attack, poisoned_loader: DataLoader):
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


ATTACKS = {"backdoor": Backdoor}  # kind → class
