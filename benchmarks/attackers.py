"""Colluders who know the rule: what they send instead of an ordinary poisoned update.

Each evasion is a function of a crowd after one round of training and a setting; it returns the state dicts of the
colluders. What is trained is cached, what is computed from trained updates is not.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from rounds import ALL_TRIGGERS, TARGET, TRIGGERS, Role, Setting, Trained, experiment, poisoned, private_attributes
from torch import nn


@dataclass(frozen=True)
class Evasion:
    """`on_all_triggers`: whether the benchmark tries it with every trigger."""

    states: Callable
    on_all_triggers: bool = False


def evade(trained: Trained, setting: Setting) -> list[dict]:
    """What the colluders send, rounded as on the wire."""
    return [trained.sent(state) for state in EVASIONS[setting.evasion].states(trained, setting)]


def roles_of(setting: Setting) -> list[Role]:
    return setting.roles[-setting.attackers :]


def updates_of(trained: Trained, states) -> list[dict]:
    return [{name: value - trained.reference[name] for name, value in state.items()} for state in states]


def applied(trained: Trained, updates) -> list[dict]:
    return [{name: trained.reference[name] + value for name, value in update.items()} for update in updates]


# --- Computed after training ------------------------------------------------------------------------------------


def orthogonal(trained: Trained, setting: Setting) -> list[dict]:
    """The nearest updates that are orthogonal to each other in all layers but the first and last, as long as before."""
    updates = updates_of(trained, map(trained.state, roles_of(setting)))
    weights = [name for name in trained.reference if name.endswith(".weight")]
    for name in weights[1:-1]:
        rows = torch.stack([update[name].flatten() for update in updates])
        lengths = rows.norm(dim=1, keepdim=True)
        left, _, right = torch.linalg.svd(rows / lengths, full_matrices=False)
        for update, row in zip(updates, left @ right * lengths, strict=True):
            update[name] = row.view_as(update[name])
    return applied(trained, updates)


def noisy(trained: Trained, setting: Setting) -> list[dict]:
    """White noise in every weight matrix, once as long as the update, clipped to the update's own norm afterwards."""
    generator, updates = torch.Generator().manual_seed(trained.seed), []
    for update in updates_of(trained, map(trained.state, roles_of(setting))):
        noise = {n: torch.randn(v.shape, generator=generator) for n, v in update.items() if v.dim() > 1}
        noise = {n: v / v.norm() * update[n].norm() for n, v in noise.items()}
        updates.append({n: (v + noise[n]) / 2**0.5 if n in noise else v for n, v in update.items()})
    return applied(trained, updates)


def copies(trained: Trained, setting: Setting) -> list[dict]:
    """All colluders send the same update."""
    return [trained.state(roles_of(setting)[-1])] * setting.attackers


# --- Trained otherwise ------------------------------------------------------------------------------------------


def parts(model) -> dict:
    """Names of the first convolution, of the others, of the linear layers, and of these with one or two middle ones."""
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    one, two = [convolutions[2], *linear], [*convolutions[-2:], *linear]
    return {"first": convolutions[:1], "middle": convolutions[1:], "linear": linear, "one": one, "two": two}


def only(part: str):
    """An honest update, and then the backdoor in some layers alone."""

    def train(trained: Trained, role: Role) -> dict:
        model = experiment.with_state(trained.global_model, trained.state(Role(role.participant)))
        kept = parts(model)[part]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rsplit(".", 1)[0] in kept)
        fit(model, loader_of(trained, role), trained.config.learning_rate)
        return model.state_dict()

    def cached(trained: Trained, setting: Setting) -> list[dict]:
        make = [(role, f"{cache_name(role)}-only-{part}") for role in roles_of(setting)]
        return [trained.cached(name, lambda role=role: train(trained, role)) for role, name in make]

    return cached


def slow(trained: Trained, setting: Setting) -> list[dict]:
    """A quarter of the learning rate."""

    def train(role):
        model = copy.deepcopy(trained.global_model)
        fit(model, loader_of(trained, role), trained.config.learning_rate / 4)
        return model.state_dict()

    return [trained.cached(f"{cache_name(role)}-slow", lambda role=role: train(role)) for role in roles_of(setting)]


def one_each(trained: Trained, setting: Setting) -> list[dict]:
    """A trigger and a target for every colluder; the last one has the setting's trigger and the usual target."""
    others, states = [name for name in TRIGGERS if name != setting.trigger], []
    for number, role in enumerate(roles_of(setting)):
        last = number == setting.attackers - 1
        mine = role if last else replace(role, trigger=others[number])
        target = TARGET if last else (TARGET + 1 + number) % 10
        train = lambda mine=mine, target=target: train_for(trained, mine, target)  # noqa: E731
        states.append(trained.state(role) if last else trained.cached(f"{cache_name(mine)}-to-{target}", train))
    return states


def train_for(trained: Trained, role: Role, target: int) -> dict:
    model, share = copy.deepcopy(trained.global_model), trained.shares[role.participant]
    data = private_attributes.poison(*share, target, role.pdr, trained.seed, ALL_TRIGGERS[role.trigger])
    fit(model, private_attributes.as_loader(*data, 32, shuffle=True), trained.config.learning_rate)
    return model.state_dict()


def cache_name(role: Role) -> str:
    return f"{role.participant}-{role.trigger}-{role.pdr:g}"


def loader_of(trained: Trained, role: Role):
    torch.manual_seed(1000 * trained.seed + role.participant)
    return private_attributes.as_loader(
        *poisoned(trained.shares[role.participant], role, trained.seed), 32, shuffle=True
    )


def fit(model, loader, learning_rate: float) -> None:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


# --- Trained against the rule -----------------------------------------------------------------------------------

EPOCHS = 3  # the attackers take their time
PATIENCE = 4  # steps between two looks at the statistics


def against(*statistics: str):
    """Colluders who train together, each with an honest twin, and pay for what the rule would see of them: kinship, by
    the median over the layers (in a round) and by the mean (over rounds), and the effect.

    Args:
        statistics: "kinship": the energy of an update in the principal directions of the others'; "effect": the hidden
            outputs' distance to the global model's beyond the twin's. The multiplier of a penalty is doubled as long
            as the statistic is above that of the twins, and halved below it. The norm is clipped to the twin's at last.
    """
    label = "-".join(statistics)

    def states(trained: Trained, setting: Setting) -> list[dict]:
        roles = roles_of(setting)
        names = [f"{cache_name(role)}-of-{setting.attackers}-against-{label}" for role in roles]
        if not all((trained.folder / f"{name}.update").exists() for name in names):
            for name, state in zip(names, train_together(trained, roles, statistics), strict=True):
                trained.cached(name, lambda state=state: state)
        return [trained.cached(name, dict) for name in names]

    return states


def train_together(trained: Trained, roles: list[Role], statistics) -> list[dict]:
    twins = [experiment.with_state(trained.global_model, trained.state(Role(role.participant))) for role in roles]
    models = [copy.deepcopy(trained.global_model) for _ in roles]
    optimizers = [torch.optim.Adam(model.parameters(), lr=trained.config.learning_rate) for model in models]
    clean = [trained.shares[role.participant] for role in roles]
    normal = [private_attributes.as_loader(*share, 64).dataset.tensors[0][:64] for share in clean]
    allowed = [distance(trained, twin, images) for twin, images in zip(twins, normal, strict=True)]
    usual = highest_overlaps(trained, twins)
    weights = dict.fromkeys(statistics, 1.0)
    directions, step = [None] * len(models), 0
    for _ in range(EPOCHS):
        for batches in zip(*(loader_of(trained, role) for role in roles), strict=False):
            for m, (model, (images, labels)) in enumerate(zip(models, batches, strict=True)):
                optimizers[m].zero_grad()
                loss = F.cross_entropy(model.train()(images), labels)
                if "kinship" in statistics and directions[0]:
                    loss = loss + weights["kinship"] * shared_energy(trained, model, directions, m)
                if "effect" in statistics:
                    beyond = distance(trained, model, normal[m]) / allowed[m].detach() - 1
                    loss = loss + weights["effect"] * beyond.clamp(min=0)
                loss.backward()
                optimizers[m].step()
            step += 1
            if step % PATIENCE == 0:
                directions = [directions_of(trained, model) for model in models]
                if "kinship" in statistics:
                    weights["kinship"] *= 2 if (highest_overlaps(trained, models) > usual).any() else 0.5
                if "effect" in statistics:
                    ratios = [distance(trained, mo, im) / a for mo, im, a in zip(models, normal, allowed, strict=True)]
                    weights["effect"] *= 2 if max(ratios) > 1 else 0.5
                weights = {name: min(max(value, 0.01), 1000) for name, value in weights.items()}
    return [shortened(trained, model, twin) for model, twin in zip(models, twins, strict=True)]


def distance(trained: Trained, model, images):
    """Mean over the inspected layers of the hidden outputs' distance to the global model's, with gradients."""
    outputs = []
    for each in (trained.global_model, model):
        kept, layers = [], experiment.inspected_layers(each.eval())
        hooks = [
            layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.flatten(1).clone()))
            for layer in layers
        ]
        each(images)
        for hook in hooks:
            hook.remove()
        outputs.append(kept)
    pairs = zip(*outputs, strict=True)
    return torch.stack([(b - a.detach()).norm(dim=1).mean() / a.detach().norm(dim=1).mean() for a, b in pairs]).mean()


def directions_of(trained: Trained, model) -> list:
    state = model.state_dict()
    return [
        torch.from_numpy(experiment.principal_directions(state[n] - trained.reference[n])).float()
        for n in trained.layers
    ]


def highest_overlaps(trained: Trained, models) -> np.ndarray:
    """Of the closest pair, by the mean and by the median over the layers."""
    _, found = experiment.look_at_updates(
        trained.reference, [model.state_dict() for model in models], dict.fromkeys(trained.layers)
    )
    apart = experiment.overlap(found, found)[:, ~np.eye(len(models), dtype=bool)]  # layer, pair
    return np.array([apart.mean(axis=0).max(), np.median(apart, axis=0).max()])


def shared_energy(trained: Trained, model, directions: list, own: int):
    """Mean share of the update's energy that lies in the principal directions of the other colluders."""
    shares, weights = [], dict(model.named_parameters())
    for number, name in enumerate(trained.layers):
        update = (weights[name] - trained.reference[name]).flatten(1)
        energy = update.square().sum() + 1e-12
        shares += [(d[number].T @ update).square().sum() / energy for m, d in enumerate(directions) if m != own]
    return torch.stack(shares).mean()


def shortened(trained: Trained, model, twin) -> dict:
    """The model's state with an update no longer than its honest twin's."""
    (length, limit), _ = experiment.look_at_updates(trained.reference, [model.state_dict(), twin.state_dict()], {})
    return experiment.rescaled(model.state_dict(), trained.reference, min(1.0, limit / length))


EVASIONS = {
    "orthogonal": Evasion(orthogonal, on_all_triggers=True),
    "noisy": Evasion(noisy),
    "copies": Evasion(copies),
    "linear layers only": Evasion(only("linear")),
    "linear and one middle": Evasion(only("one")),
    "linear and two middle": Evasion(only("two")),
    "middle only": Evasion(only("middle")),
    "first only": Evasion(only("first")),
    "slow": Evasion(slow),
    "a trigger and target each": Evasion(one_each),
    "against effect": Evasion(against("effect")),
    "against kinship": Evasion(against("kinship")),
    "against both": Evasion(against("effect", "kinship")),
}
