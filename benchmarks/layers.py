"""In which layers do two updates have something in common? Honest participants with like data, and colluders.

    python benchmarks/layers.py ~/cifar10

The overlap of a pair in each middle layer, above the median of all pairs and in standard deviations of the lower four
fifths of them, as the kinship of a round is standardised; mean over the honest validators. Dirichlet 0.5, tuning seeds.
Of honest crowds the three closest pairs by the mean over the layers. A line a pair goes to
`benchmarks/results/layers.csv`; what is there is not run again.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import RESULTS, append, arguments, done
from detection import Inspected, states_of
from rounds import Crowd, Setting, experiment, flat
from tqdm import tqdm

TABLE = RESULTS / "layers.csv"
COLLUDERS = (
    Setting(Crowd(alpha=0.5)),
    Setting(Crowd(alpha=0.5), pdr=0.1),
    Setting(Crowd(alpha=0.5), trigger="noise", evasion="orthogonal"),
)
QUIET = tuple(Setting(Crowd(size, 0.5), attackers=0, trigger="", pdr=0) for size in (10, 40))
CLOSEST = 3  # honest pairs


def standardised(by_layer: np.ndarray) -> np.ndarray:
    """Overlaps `(L, M, M)` of each layer above the median of its pairs, in standard deviations of the lower ones."""
    pairs = np.sort(by_layer[:, *np.triu_indices(by_layer.shape[1], 1)], axis=1)
    scatter = pairs[:, : int(0.8 * pairs.shape[1])].std(axis=1, ddof=1)
    return (by_layer - np.median(pairs, axis=1)[:, None, None]) / scatter[:, None, None]


def pairs_of(folder: Path, setting: Setting, seed: int) -> list[dict]:
    """A row for the pair of colluders, or for each of the closest honest ones."""
    inspected, found = Inspected(folder, setting.crowd, seed), []
    states = states_of(inspected.trained, setting)
    for validator in tqdm(sorted({*range(len(states))} - setting.malicious), desc=f"inspections, {seed}", leave=False):
        directions = inspected.seen(validator, setting, states).directions
        found.append(standardised(experiment.overlap(directions, directions)))
    by_layer = np.mean(found, axis=0)
    everyone = zip(*np.triu_indices(len(states), 1), strict=True)
    closest = sorted(everyone, key=lambda pair: -by_layer[:, *pair].mean())[:CLOSEST]
    chosen = [tuple(sorted(setting.malicious))] if setting.attackers else closest
    where = flat(setting) | {"seed": seed}
    return [
        where | {"pair": "{}-{}".format(*pair)} | {f"layer {n}": round(z, 2) for n, z in enumerate(by_layer[:, *pair])}
        for pair in chosen
    ]


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("participants", "attackers", "trigger", "pdr", "evasion", "seed")
    known, points = done(TABLE, *columns), [(setting, seed) for setting in (*COLLUDERS, *QUIET) for seed in args.seeds]
    for setting, seed in tqdm(points, desc="crowds"):
        where = flat(setting) | {"seed": seed}
        if tuple(where[column] or 0 for column in columns) not in known:
            append(TABLE, pairs_of(args.folder, setting, seed))
    print(pd.read_csv(TABLE).dropna(axis=1, how="all").to_string(index=False))


if __name__ == "__main__":
    main()
