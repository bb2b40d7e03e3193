"""Whether members can get an honest participant excluded: they mix what it has sent before into their updates.

    python benchmarks/framing.py ~/cifar10

Rounds in a row on real CIFAR-10 with ten participants, of which the last one, two or four frame the first: from the
second round on they send a share of its last or first update, of the mean of its past or of its last one's negative,
each as long as their own update, beside the rest of their own; and they vote against it. All honest participants
inspect with a memory of their own. The global model follows the honest updates alone, so that all framers can be tried
on the same rounds. One line a round goes to `benchmarks/results/framing.csv`; what is there is not run again.
"""

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import RESULTS, append, arguments, done
from rounds import (
    JUDGING,
    Crowd,
    Role,
    config_of,
    experiment,
    load_images,
    shares,
    train_one,
    validation_loader,
    warm_model,
)
from tqdm import tqdm

ROUNDS = 8
VICTIM = 0
FRAMERS = (1, 2, 4)
SHARES = (0.25, 0.5, 1)  # of the victim's in what a framer sends
SOURCES = {
    "last": lambda past: past[-1],
    "first": lambda past: past[0],
    "mean": lambda past: {name: sum(update[name] for update in past) / len(past) for name in past[0]},
    "negative": lambda past: {name: -value for name, value in past[-1].items()},
}


def length(update: dict) -> float:
    return sum(value.square().sum().item() for value in update.values()) ** 0.5


def mixed(own: dict, other: dict, share: float) -> dict:
    """An update with so much of another's, which is taken at its own length."""
    factor = length(own) / length(other)
    return {name: (1 - share) * value + share * factor * other[name] for name, value in own.items()}


def arrived(update: dict, reference: dict) -> dict:
    """The state dict behind an update, rounded as on the wire."""
    packed = experiment.pack_update({n: reference[n] + v for n, v in update.items()}, reference, "bfloat16")
    return experiment.unpack_update(packed, reference)


def attempts(number: int) -> list[tuple]:
    """(framers, source, share) that are tried, and nobody; in the first round there is nothing to send yet."""
    return [(0, "", 0), *itertools.product(FRAMERS, SOURCES, SHARES)] if number > 1 else []


class Rounds:
    """The honest rounds, what everybody sends in them, and what each validator sees of it."""

    def __init__(self, folder: Path, alpha: float | None, seed: int):
        images, self.crowd = load_images(folder), Crowd(alpha=alpha)
        self.config, self.model, self.seed = config_of(self.crowd), warm_model(images, self.crowd), seed
        self.shares = shares(images, self.crowd, seed)
        self.loaders = [list(validation_loader(share, seed, p)) for p, share in enumerate(self.shares)]
        self.layers, self.past = experiment.middle_layers(self.model), []

    def next(self, number: int):
        """Trains everybody; yields what each validator sees of the honest and of every (framer, source, share)."""
        reference = self.model.state_dict()
        trained = [
            train_one(self.model, share, Role(p), self.seed + 1_000 * number, self.config)
            for p, share in enumerate(self.shares)
        ]
        updates = [{n: value - reference[n] for n, value in state.items()} for state in trained]
        sent = {(p,): arrived(update, reference) for p, update in enumerate(updates)}
        victims = [past[VICTIM] for past in self.past]
        for framer in range(len(updates) - max(FRAMERS), len(updates)) if victims else ():
            for source, share in itertools.product(SOURCES, SHARES):
                other = SOURCES[source](victims)
                sent[framer, source, share] = arrived(mixed(updates[framer], other, share), reference)
        models = [experiment.with_state(self.model, state) for state in sent.values()]
        for validator, loader in enumerate(self.loaders):
            seen = experiment.look(self.model, models, loader, "cpu")
            yield validator, {key: seen.of([index]) for index, key in enumerate(sent)}
        self.past.append(updates)
        honest = [sent[p,] for p in range(len(updates))]
        lengths, _ = experiment.look_at_updates(reference, honest, {})
        self.model = experiment.with_state(
            self.model, experiment.clipped_avg(honest, reference, np.median(lengths), self.layers)
        )


def ballot(views: dict, validator: int, attempt: tuple, memory: dict) -> list[int]:
    """The votes on everybody while the last ones frame; the memory of this attempt is brought up to date."""
    framers, *how = attempt
    everyone = range(sum(len(key) == 1 for key in views))
    seen = experiment.joined([views[(p, *how) if p >= len(everyone) - framers else (p,)] for p in everyone])
    found = experiment.vote(seen, validator, "crowd", [memory.get(p, []) for p in everyone])
    memory |= experiment.remembered(memory, {p: [layer[p] for layer in seen.directions] for p in everyone})
    return [int(p not in found) for p in everyone]


def play(folder: Path, alpha: float | None, seed: int) -> list[dict]:
    """A row for each round and attempt."""
    rounds, memories, rows = Rounds(folder, alpha, seed), {}, []
    first = defaultdict(dict)  # what each validator remembers of the round in which nobody frames
    for number in tqdm(range(1, ROUNDS + 1), desc=f"{alpha or 'IID'}, {seed}"):
        ballots = defaultdict(list)
        for validator, views in rounds.next(number):
            if number == 1:
                ballot(views, validator, (0,), first[validator])
            for attempt in attempts(number):
                if validator < len(rounds.shares) - attempt[0]:
                    memory = memories.setdefault((validator, attempt), dict(first[validator]))
                    ballots[attempt].append(ballot(views, validator, attempt, memory))
        where = {"seed": seed, "alpha": alpha, "round": number}
        rows += [where | scores(attempt, votes, len(rounds.shares)) for attempt, votes in ballots.items()]
    return rows


def scores(attempt: tuple, votes: list[list[int]], participants: int) -> dict:
    """Who is excluded, and the share of the honest voters who accuse the victim."""
    framers, source, share = attempt
    malicious = range(participants - framers, participants)
    false = [int(p != VICTIM) for p in range(participants)]
    accepted = experiment.stacked_clustering(votes + [false] * framers)
    others = [p for p in range(participants) if p != VICTIM and p not in malicious]
    return {
        "framers": framers,
        "source": source,
        "share": share,
        "accused": np.mean([not ballot[VICTIM] for voter, ballot in enumerate(votes) if voter != VICTIM]).round(3),
        "victim_excluded": int(not accepted[VICTIM]),
        "framers_excluded": np.mean([not accepted[p] for p in malicious]).round(3) if framers else None,
        "others_excluded": np.mean([not accepted[p] for p in others]).round(3),
    }


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*JUDGING])
    parser.add_argument("--results", type=Path, default=RESULTS / "framing.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(exist_ok=True)
    for seed, alpha in itertools.product(args.seeds, (0.5, None)):
        if (seed, alpha or 0) not in done(args.results, "seed", "alpha"):
            append(args.results, play(args.folder, alpha, seed))
    rows = pd.read_csv(args.results)
    outcomes = ["accused", "victim_excluded", "framers_excluded", "others_excluded"]
    rows["source"] = rows["source"].fillna("nobody")
    print(rows.groupby(["alpha", "framers", "source", "share"], dropna=False)[outcomes].mean().round(3).to_string())


if __name__ == "__main__":
    main()
