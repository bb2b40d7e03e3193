"""Does the adaptive sample budget vote as all images would? On rounds of `detection.py`, with 6,000 images each.

    python benchmarks/budget.py ~/cifar10

Every honest participant inspects the models on 6,000 images that nobody has trained on, once with the adaptive budget
and once on all of them. One line a setting, seed and participant goes to `benchmarks/budget.csv`.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import ROOT, arguments, private_attributes
from detection import AT_ONCE, Crowd, Trained, experiment, flat, load_images, pool_of, settings, share_of
from tqdm import tqdm

SAMPLES = 6_000
RULE = "crowd"
METRICS = experiment.LOOKS_AT[RULE]
RESULTS = ROOT / "benchmarks" / "budget.csv"


def distances_of(trained: Trained, roles, images, seed: int):
    """Distances `(metric, S, R, L)` on 6,000 images in balanced order, and their labels."""
    torch.manual_seed(seed)
    pixels, labels = share_of(images, pool_of(images, seed)[-SAMPLES:])
    chosen = experiment.balanced_order(labels.numpy())
    loader = private_attributes.as_loader(pixels[chosen], labels[chosen], experiment.BATCH)
    views = []
    for first in range(0, len(roles), AT_ONCE):
        group = [experiment.with_state(trained.global_model, trained.state(r)) for r in roles[first : first + AT_ONCE]]
        views.append(experiment.hidden_distances(trained.global_model, group, loader, "cpu", METRICS)[0])
    return np.concatenate(views, axis=2), labels.numpy()[chosen]


def needed(distances, labels, own: int) -> int:
    """How many images the adaptive budget takes."""
    rng = np.random.default_rng(0)
    for _, stop in experiment.portions(len(labels)):
        if experiment.is_settled(distances[:, :stop], labels[:stop], own, RULE, rng):
            return stop
    return len(labels)


def rows_of(folder: Path, crowd: Crowd, seed: int) -> list[dict]:
    torch.set_num_threads(1)
    images, points = load_images(folder), [setting for setting in settings() if setting.crowd == crowd]
    trained, roles = Trained(images, crowd, seed), list(dict.fromkeys(r for s in points for r in s.roles))
    everything, labels = distances_of(trained, roles, images, seed)
    rows = []
    for setting in points:
        distances = everything[:, :, [roles.index(role) for role in setting.roles]]
        for own in sorted(set(range(crowd.participants)) - setting.attackers):
            taken = needed(distances, labels, own)
            votes = [experiment.verdict(distances[:, :n], labels[:n], own, RULE, METRICS) for n in (taken, SAMPLES)]
            row = flat(setting) | {"seed": seed, "voter": own, "images": taken, "same": votes[0] == votes[1]}
            rows.append(row)
    return rows


def main():
    parser = arguments(__doc__, seeds=2)
    args = parser.parse_args()
    crowds = [(Crowd(n, alpha), seed) for seed in range(args.seeds) for n in (4, 10) for alpha in (None, 0.5)]
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(rows_of, args.folder, *job) for job in crowds]
        rows = [row for job in tqdm(as_completed(jobs), total=len(jobs), desc="crowds x seeds") for row in job.result()]
    table = pd.DataFrame(rows).sort_values(["seed", "participants", "alpha", "pmr"])
    table.to_csv(RESULTS, index=False)
    print(table.groupby("alpha", dropna=False)[["images", "same"]].agg(["count", "mean", "max"]).round(3))
    same, share = table.same.mean(), table.images.mean() / SAMPLES
    print(f"same votes in {same:.1%} of {len(table)} cases, on {share:.1%} of the images")


if __name__ == "__main__":
    main()
