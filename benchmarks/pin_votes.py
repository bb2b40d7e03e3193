"""Some judged rounds as a small file, so that a test can hold every later change to the same votes.

    python benchmarks/pin_votes.py ~/cifar10 --seeds 17 18

writes tests/votes.npz: of each round what one validator has seen, in half precision, and whom it suspected by either
rule and by each kind of evidence alone.
"""

import itertools

import numpy as np
import torch
from common import ROOT, arguments
from detection import Inspected, rules, states_of
from rounds import Crowd, Setting

ROUNDS = [
    {"attackers": 4, "trigger": "noise"},
    {"attackers": 2, "trigger": "red", "scale": 2.5},
    {"attackers": 4, "trigger": "warp", "evasion": "orthogonal"},
    {"attackers": 0, "trigger": "", "pdr": 0},
]


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18])
    args, kept = parser.parse_args(), {}
    torch.set_num_threads(1)
    for number, (seed, alpha, changes) in enumerate(itertools.product(args.seeds, (None, 0.5), ROUNDS)):
        setting = Setting(Crowd(alpha=alpha), **changes)
        inspected = Inspected(args.folder, setting.crowd, seed)
        seen = half(inspected.seen(0, setting, states_of(inspected.trained, setting)))
        values = seen._asdict() | {f"direction {i}": layer for i, layer in enumerate(seen.directions)}
        del values["directions"]
        values |= {f"by {name}": np.array(sorted(judge(widened(seen), 0)), int) for name, judge in rules().items()}
        kept |= {f"{number}/{name}": value for name, value in values.items()}
    np.savez_compressed(ROOT / "tests" / "votes.npz", **kept)


def half(seen):
    """What is stored: half precision, but for the norms."""
    small = {"distances": seen.distances.astype("f2"), "logits": seen.logits.astype("f2")}
    return seen._replace(**small, directions=[layer.astype("f2") for layer in seen.directions])


def widened(seen):
    """What is judged."""
    wide = {"distances": seen.distances.astype(float), "logits": seen.logits.astype(float)}
    return seen._replace(**wide, directions=[layer.astype(float) for layer in seen.directions])


if __name__ == "__main__":
    main()
