"""Does it matter what the trigger looks like? Single rounds on real CIFAR-10, ten participants, IID, unscaled updates,
half of the attackers' data poisoned, each time with another trigger.

    python benchmarks/triggers.py ~/cifar10

The crowd is that of `detection.py`. One line a trigger, share of attackers, seed and rule goes to
`benchmarks/triggers.csv`; what is there is not run again.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from common import ROOT, append, arguments, done, private_attributes
from detection import (
    TARGET,
    TEST_IMAGES,
    Crowd,
    Role,
    Setting,
    Trained,
    View,
    experiment,
    load_images,
    rates,
    stamp,
    test_loaders,
    train_one,
    validation_loader,
    verdicts,
    warm_model,
)
from tqdm import tqdm

RESULTS = ROOT / "benchmarks" / "triggers.csv"
PMRS = (0.25, 0.4)


def paste(images, patch, row: int, column: int):
    """Copies of the images `(N, 3, H, W)`, pixels in [0, 1], with a patch `(3, h, w)` on them."""
    pasted = images.clone()
    pasted[:, :, row : row + patch.shape[1], column : column + patch.shape[2]] = patch
    return pasted


def checkerboard(side: int):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((rows + columns) % 2).float().expand(3, -1, -1)


def blend(images, pattern, share: float):
    return (1 - share) * images + share * pattern


NOISE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
STRIPES = (torch.arange(32) * 2 * torch.pi * 6 / 32).sin().expand(3, 32, 32)
TRIGGERS = {
    "red square, 6x6, in a corner": private_attributes.add_trigger,
    "white square, 4x4, across two tiles": partial(paste, patch=torch.ones(3, 4, 4), row=26, column=22),
    "checkerboard, 6x6, across four tiles": partial(paste, patch=checkerboard(6), row=5, column=13),
    "noise all over the image, 15 %": partial(blend, pattern=NOISE, share=0.15),
    "stripes all over the image, 15 %": partial(blend, pattern=(STRIPES + 1) / 2, share=0.15),
}


def triggered_test(images, trigger):
    """The test images of `detection.py` that are not of the target class, with the trigger."""
    pixels, labels = (tensor for tensor in test_loaders(images)[0].dataset.tensors)
    pixels = pixels * private_attributes.STD + private_attributes.MEAN
    others = labels != TARGET
    wanted = torch.full((int(others.sum()),), TARGET)
    return private_attributes.as_loader(trigger(pixels[others]), wanted, TEST_IMAGES)


def trained_states(trained: Trained, trigger, seed: int) -> dict:
    """What the participants send, and the last four as attackers with this trigger: (participant, attacks) → state."""
    states = {(p, False): trained.state(Role(p)) for p in range(10)}
    for p in range(6, 10):
        poisoned = private_attributes.poison(*trained.shares[p], TARGET, 0.5, seed, trigger)
        update = trained.packed(train_one(trained.global_model, poisoned, Role(p), seed, trained.config))
        states[p, True] = experiment.unpack_update(update, trained.reference)
    return states


def rows_of(folder: Path, name: str, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    images, trigger = load_images(folder), TRIGGERS[name]
    trained, test = Trained(images, Crowd(), seed), triggered_test(images, trigger)
    states, rows = trained_states(trained, trigger, seed), []
    models = {who: experiment.with_state(trained.global_model, state) for who, state in states.items()}
    views = [look(trained, models, p, seed) for p in range(10)]
    for pmr in PMRS:
        setting = Setting(pmr=pmr, scaled=False)
        present = [(p, p in setting.attackers) for p in range(10)]
        seen = [view.of([list(models).index(who) for who in present]) for view in views]
        for rule, trusted in verdicts(setting, {"G": seen}).items():
            state = experiment.fed_avg([states[who] for who, is_in in zip(present, trusted, strict=True) if is_in])
            backdoor = experiment.accuracy(experiment.with_state(trained.global_model, state), test, "cpu")
            where = {"trigger": name, "pmr": pmr, "seed": seed, "rule": rule}
            rows.append(where | rates(trusted, setting) | {"backdoor": backdoor})
    return rows


def look(trained: Trained, models: dict, validator: int, seed: int) -> View:
    batches = list(validation_loader(trained.shares[validator], seed, validator))
    distances, labels = experiment.hidden_distances(trained.global_model, [*models.values()], batches, "cpu")
    return View(distances, labels, stamp(trained.global_model, [*models.values()], batches))


def missing(seeds: int) -> list[tuple]:
    """What is not in the CSV yet."""
    jobs = [(name, seed) for seed in range(seeds) for name in TRIGGERS]
    known = done(RESULTS, "trigger", "seed")
    return [job for job in jobs if job not in known]


def main():
    args = arguments(__doc__, seeds=5).parse_args()
    warm_model(load_images(args.folder), Crowd())
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(rows_of, args.folder, *job) for job in missing(args.seeds)]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="triggers x seeds"):
            append(RESULTS, job.result())
    groups = pd.read_csv(RESULTS).groupby(["trigger", "pmr", "rule"], sort=False)
    print(groups[["tpr", "tnr", "backdoor"]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
