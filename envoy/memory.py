"""What a participant remembers on its own disk: everybody's updates, so that once started anew it goes on from any of
the last rounds, and its settings when a run began. It is written here and not by the experiment's code, which need not
know of this machine's folders."""

import json
import logging
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

log = logging.getLogger(__name__)

KEPT_ROUNDS = 3


def keep(folder: Path, past: dict[str, np.ndarray], round: int) -> None:
    """Writes what is remembered after a round; without a disk the run goes on all the same."""
    try:
        forget(folder, round + 1)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "memory.part"
        part.write_bytes(save({name: np.ascontiguousarray(sent) for name, sent in past.items()}))  # or it is scrambled
        part.replace(folder / f"memory-{round:06}.safetensors")
        for old in sorted(folder.glob("memory-*"))[:-KEPT_ROUNDS]:
            old.unlink()
    except Exception as error:  # a full disk, or what is no array
        log.warning("what is remembered cannot be kept: %s", error)


def recall(folder: Path, round: int) -> dict[str, np.ndarray]:
    """What was kept before this round; nothing if that is not there or cannot be read."""
    try:
        forget(folder, round + 1)
        kept = sorted(path for path in folder.glob("memory-*") if path.name < f"memory-{round:06}")
    except OSError as error:
        log.warning("what is remembered cannot be read: %s", error)
        return {}
    for path in reversed(kept):
        try:
            return load_file(path)
        except Exception as error:  # safetensors has several, and some of Python's own
            log.warning("%s cannot be read, the round before is used: %s", path, error)
    return {}


def forget(folder: Path, round: int) -> None:
    """Removes what was kept in this round and later, before the run went on from an earlier one."""
    for path in folder.glob("memory-*"):
        if path.name >= f"memory-{round:06}":
            path.unlink()


def check_settings(folder: Path, settings: dict) -> None:
    """Notes the participant's settings when a run begins; `ValueError` if they are others when it goes on."""
    path, chosen = folder / "settings.json", json.loads(json.dumps(flat(settings)))
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = chosen
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(chosen))
        except OSError as error:  # a full disk: the run goes on all the same
            log.warning("the settings cannot be kept: %s", error)
    pairs = {key: (chosen.get(key), before.get(key)) for key in sorted(before.keys() | chosen.keys())}
    if others := [f"{key} is {now}, but was {then}" for key, (now, then) in pairs.items() if now != then]:
        raise ValueError(f"the run began with other settings (choose them, or remove {path}): {', '.join(others)}")


def flat(settings: dict) -> dict:
    """{"data": {"seed": 1}} → {"data.seed": 1}"""
    sections = {key: value if isinstance(value, dict) else {"": value} for key, value in settings.items()}
    return {f"{key}.{name}".strip("."): value for key, mine in sections.items() for name, value in mine.items()}
