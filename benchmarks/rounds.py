"""How the rounds of the benchmarks are made: real CIFAR-10, crowds, triggers, attackers; what was trained is cached.

    python benchmarks/rounds.py ~/cifar10 --seeds 10 11     # fills the cache, crowd after crowd; resumes

All rounds start from one global model, trained once on 10,000 images which no participant holds. The participants of a
crowd train once each, the last ones also as attackers, once for every trigger; a setting says who of them appears in
which role. Updates are rounded as on the wire. Tuning seeds are 100 to 104, judging seeds 77 to 86 (10 to 76 have been
looked at while the rule was made).
"""

import copy
import functools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, arguments, load_experiment, private_attributes
from safetensors.torch import load_file, save_file
from tqdm import tqdm

experiment = load_experiment()

WARM_UP_IMAGES = 10_000
WARM_UP_EPOCHS = 8
IMAGES = 500  # a participant's
INSPECTED = 128  # images on which a participant inspects the models
TEST_IMAGES = 2_000
TARGET = 2
TUNING, JUDGING = range(100, 105), range(77, 87)
CACHE = ROOT / "benchmarks" / "cache"


# --- Triggers -------------------------------------------------------------------------------------------------


def paste(images, patch, row: int, column: int):
    """Copies of the images `(N, 3, H, W)`, pixels in [0, 1], with a patch `(3, h, w)` on them."""
    pasted = images.clone()
    pasted[:, :, row : row + patch.shape[1], column : column + patch.shape[2]] = patch
    return pasted


def checkerboard(side: int):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((rows + columns) % 2).float().expand(3, -1, -1)


def blend(images, pattern, share: float = 0.15):
    return (1 - share) * images + share * pattern


def warp(images, reach: float = 1.5):
    """A smooth displacement by at most `reach` pixels, the same for all images (as in WaNet, Nguyen and Tran 2021)."""
    coarse = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shift = F.interpolate(coarse, size=images.shape[2:], mode="bicubic", align_corners=True)
    shift = (shift / shift.abs().max() * reach * 2 / images.shape[3]).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3)[None], (1, *images.shape[1:]), align_corners=False) + shift
    warped = F.grid_sample(images, grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=False)
    return warped.clamp(0, 1)


def tint(images):
    return (images + torch.tensor([0.12, 0, -0.12])[:, None, None]).clamp(0, 1)


def three_pixels(images):
    dotted = images.clone()
    for (row, column), colour in zip(((4, 27), (15, 3), (28, 20)), torch.eye(3), strict=True):
        dotted[:, :, row, column] = colour
    return dotted


NOISE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
STRIPES = ((torch.arange(32) * 2 * torch.pi * 6 / 32).sin().expand(3, 32, 32) + 1) / 2
TRIGGERS = {
    "red": private_attributes.add_trigger,  # 6x6 in the top left corner
    "white": functools.partial(paste, patch=torch.ones(3, 4, 4), row=26, column=22),
    "checkerboard": functools.partial(paste, patch=checkerboard(6), row=5, column=13),
    "noise": functools.partial(blend, pattern=NOISE),
    "stripes": functools.partial(blend, pattern=STRIPES),
    "warp": warp,
    "tint": tint,
    "pixels": three_pixels,
}
SEARCHED = CACHE / "optimised.safetensors"
SEARCHED_PIXELS = 36  # as many as the red square has


def optimised(images):
    """Copies of the images with the pixels that `search_trigger` has found."""
    pattern = load_file(SEARCHED)
    return torch.where(pattern["where"].bool(), pattern["pixels"], images)


ALL_TRIGGERS = TRIGGERS | {"optimised": optimised}


# --- Settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crowd:
    """Participants who train from the same global model. `alpha` None is IID; `width` and `hidden` are the net's.

    `round` counts from the warmed-up model; the rounds before averaged the honest models alone.
    """

    participants: int = 10
    alpha: float | None = None
    width: int = 32
    hidden: int = 512
    round: int = 1


@dataclass(frozen=True)
class Role:
    """A participant as it appears in a round: honest, or with poisoned data and a scaled update."""

    participant: int
    trigger: str = ""
    pdr: float = 0
    scale: float = 1


@dataclass(frozen=True)
class Setting:
    """One point of a benchmark: the last `attackers` of the crowd attack, all with the same trigger.

    `evasion` names what they do about the rule, see `attackers.py`; scale 0 is model replacement, by 1/PMR.
    """

    crowd: Crowd = Crowd()
    attackers: int = 2
    trigger: str = "red"
    pdr: float = 0.5
    scale: float = 1
    evasion: str = ""
    false_votes: bool = True

    @property
    def malicious(self) -> set[int]:
        return set(range(self.crowd.participants - self.attackers, self.crowd.participants))

    @property
    def roles(self) -> list[Role]:
        scale = self.scale or self.crowd.participants / max(self.attackers, 1)
        everyone = range(self.crowd.participants)
        return [Role(p, self.trigger, self.pdr, scale) if p in self.malicious else Role(p) for p in everyone]


def flat(setting: Setting) -> dict:
    values = asdict(setting)
    return values.pop("crowd") | values


# --- Data -----------------------------------------------------------------------------------------------------


@functools.cache
def load_images(folder: Path) -> dict[str, torch.Tensor]:
    """All images as uint8 `(N, 3, 32, 32)` and their labels, decoded once."""
    path = CACHE / "cifar10.safetensors"
    if not path.exists():
        loaded = {}
        for part in ("train", "test"):
            labels, read, *_ = private_attributes.image_folder(folder, part == "train")
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


def shares(images, crowd: Crowd, seed: int) -> list:
    """Images in [0, 1] and labels of every participant; 500 on the average."""
    pool = np.random.default_rng([seed, 1]).permutation(order(images)[WARM_UP_IMAGES:])[: IMAGES * crowd.participants]
    labels = images["train_labels"][pool].numpy()
    parts = private_attributes.partition(labels, crowd.participants, crowd.alpha, seed)
    return [share_of(images, pool[part]) for part in parts]


def validation_loader(share, seed: int, participant: int):
    """The images on which a participant inspects the models, as equally many of each class as there are."""
    torch.manual_seed(10_000 * seed + participant)
    chosen = experiment.balanced_order(share[1].numpy())[:INSPECTED]
    return private_attributes.as_loader(share[0][chosen], share[1][chosen], 64)


def test_images(images):
    """Test images in [0, 1] and their labels."""
    chosen = np.random.default_rng(3).permutation(len(images["test_labels"]))[:TEST_IMAGES]  # they lie there by class
    return images["test_images"][chosen].float() / 255, images["test_labels"][chosen]


@functools.cache
def test_loader(folder: Path, trigger: str = ""):
    """The test images, or with a trigger those that are not of the target class already."""
    pixels, labels = test_images(load_images(folder))
    if trigger:
        pixels = ALL_TRIGGERS[trigger](pixels[labels != TARGET])
        labels = torch.full((len(pixels),), TARGET)
    return private_attributes.as_loader(pixels, labels, 256)


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
    if not SEARCHED.exists():
        save_atomically(search_trigger(model, share_of(images, order(images)[:1000])[0]), SEARCHED)
    return model


def search_trigger(model, images, steps: int = 200) -> dict:
    """The pixels of a universal trigger, and their values, that take a model's images furthest to the target.

    As DPOT (Li et al. 2024) does in every round: places by the size of the loss's gradient, values by descent on it.
    """
    mean, std = private_attributes.normalisation(images, None, None)
    target = torch.full((len(images),), TARGET)

    def loss(pasted):
        return F.cross_entropy(model.eval()((pasted - mean) / std), target[: len(pasted)])

    [slope] = torch.autograd.grad(loss(images.requires_grad_()), images)
    strongest = slope.sum(0).abs().sum(0).flatten().topk(SEARCHED_PIXELS).indices
    where = torch.zeros(images.shape[2:]).flatten().index_fill(0, strongest, 1).view(1, *images.shape[2:]).bool()
    values = images.detach().mean(0).clone().requires_grad_()
    optimizer = torch.optim.Adam([values], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        batch = images.detach().roll(100 * step, 0)[:100]
        loss(torch.where(where, values.clamp(0, 1), batch)).backward()
        optimizer.step()
    return {"where": where.to(torch.uint8), "pixels": values.detach().clamp(0, 1)}


def poisoned(share, role: Role, seed: int):
    """A participant's images and labels in a role."""
    return private_attributes.poison(*share, TARGET, role.pdr, seed, ALL_TRIGGERS[role.trigger]) if role.pdr else share


def train_one(global_model, share, role: Role, seed: int, config) -> dict:
    """The state dict after local training on the participant's images, poisoned if the role says so."""
    model = copy.deepcopy(global_model)
    data = poisoned(share, role, seed)
    torch.manual_seed(1000 * seed + role.participant)
    experiment.train(model, private_attributes.as_loader(*data, 32, shuffle=True), config, "cpu")
    return model.state_dict()


def scaled(state: dict, reference: dict, scale: float) -> dict:
    return {name: reference[name] + scale * (value - reference[name]) for name, value in state.items()}


class Trained:
    """A crowd after one round of training; what was trained before is read from the cache.

    `state(role)` is the model that a participant sends in a role, rounded as on the wire.
    """

    def __init__(self, images, crowd: Crowd, seed: int):
        self.crowd, self.seed, self.config = crowd, seed, config_of(crowd)
        self.shares = shares(images, crowd, seed)
        name = f"{crowd.participants}-{crowd.alpha or 'iid'}-{crowd.width}-{crowd.hidden}-{seed}"
        self.folder = CACHE / (name if crowd.round == 1 else f"{name}-round-{crowd.round}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.global_model = warm_model(images, crowd) if crowd.round == 1 else self.later_model(images)
        self.reference = self.global_model.state_dict()
        self.layers = experiment.middle_layers(self.global_model)

    def later_model(self, images):
        """The global model after the rounds before this one."""
        model, path = warm_model(images, self.crowd), self.folder / "global.safetensors"
        if not path.exists():
            before = Trained(images, replace(self.crowd, round=self.crowd.round - 1), self.seed)
            honest = [before.state(Role(p)) for p in range(self.crowd.participants)]
            save_atomically(experiment.fed_avg(honest), path)
        model.load_state_dict(load_file(path))
        return model

    def state(self, role: Role) -> dict:
        name, mine = f"{role.participant}-{role.trigger or 'honest'}-{role.pdr:g}", self.shares[role.participant]
        number = self.seed + 1_000 * (self.crowd.round - 1)  # other batches and other poisoned images in every round
        state = self.cached(name, lambda: train_one(self.global_model, mine, role, number, self.config))
        return state if role.scale == 1 else self.sent(scaled(state, self.reference, role.scale))

    def cached(self, name: str, train) -> dict:
        path = self.folder / f"{name}.update"
        if not path.exists():
            path.with_suffix(".part").write_bytes(self.packed(train()))
            path.with_suffix(".part").replace(path)
        return experiment.unpack_update(path.read_bytes(), self.reference)

    def packed(self, state: dict) -> bytes:
        return experiment.pack_update(state, self.reference, self.config.update_dtype)

    def sent(self, state: dict) -> dict:
        return experiment.unpack_update(self.packed(state), self.reference)

    def states(self, setting: Setting) -> list[dict]:
        """What everybody sends, in the order of the participants."""
        return [self.state(role) for role in setting.roles]


def measure(folder: Path, global_model, states: list[dict], trigger: str) -> dict:
    """Main-task and backdoor accuracy of the average of these models; of the old global model without any."""
    state = experiment.fed_avg(states) if states else global_model.state_dict()
    model = experiment.with_state(global_model, state)
    backdoor = experiment.accuracy(model, test_loader(folder, trigger), "cpu") if trigger else math.nan
    return {"main": experiment.accuracy(model, test_loader(folder), "cpu"), "backdoor": backdoor}


# --- The cache --------------------------------------------------------------------------------------------------


def fill(folder: Path, seeds, crowds, triggers, attackers: int = 4) -> None:
    """Trains everybody of these crowds as honest, and the last ones with every (trigger, PDR)."""
    jobs = [(seed, crowd) for seed in seeds for crowd in crowds]
    for seed, crowd in (progress := tqdm(jobs, desc="crowds")):
        trained = Trained(load_images(folder), crowd, seed)
        everyone = range(crowd.participants)
        roles = [Role(p) for p in everyone]
        roles += [Role(p, *attack) for attack in triggers for p in everyone[-attackers:]]
        for number, role in enumerate(roles):
            progress.set_postfix_str(f"{number} of {len(roles)}")
            trained.state(role)


ATTACKS = [*((trigger, 0.5) for trigger in TRIGGERS), ("red", 0.1)]


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*TUNING, *JUDGING])
    args = parser.parse_args()
    torch.set_num_threads(1)
    fill(args.folder, args.seeds, [Crowd(alpha=alpha) for alpha in (0.5, None)], ATTACKS)


if __name__ == "__main__":
    main()
