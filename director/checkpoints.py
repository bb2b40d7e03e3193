"""What a run has led to, kept after every round in `runs/<name>/round-0001/`: complete, or not there.

Each holds `state.json`, `model.safetensors`, and `SHA256SUMS` for `sha256sum --check`.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

KEPT = 2  # rounds; the one before is used if the last is damaged


def folder_of(runs: Path, name: str) -> Path:
    """Where a run of that name is kept; `ValueError` if it is no name."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", name):
        raise ValueError(f"a run cannot be called {name[:100]!r}: letters, digits, - and _, at most 100")
    return runs / name


def save(folder: Path, round: int, state: dict, model: bytes) -> None:
    """Keeps a round. Whatever happens meanwhile, there is afterwards the whole of it, or nothing of it."""
    final = folder / f"round-{round:04}"
    making = folder / f".{final.name}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    files = {"state.json": json.dumps(state, indent=1).encode(), "model.safetensors": model}
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    for name, content in (files | {"SHA256SUMS": sums.encode()}).items():
        with (making / name).open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # of a run that was continued from an earlier round
    making.rename(final)
    for old in rounds(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def rounds(folder: Path) -> list[Path]:
    """What is kept of a run, the last round first."""
    return sorted(folder.glob("round-[0-9]*"), key=by_number, reverse=True)


def by_number(round: Path) -> tuple[int, str]:
    return len(round.name), round.name  # after round-9999 comes round-10000


def load(folder: Path) -> tuple[dict, bytes]:
    """State and model of the last round that is undamaged.

    Raises: `FileNotFoundError` with one line if there is none.
    """
    for kept in rounds(folder):
        try:
            return check(kept)
        except (OSError, ValueError) as error:
            log.warning("%s is damaged (%s): the round before is used", kept, error)
    known = sorted((path for path in folder.parent.glob("*") if rounds(path)), key=lambda path: path.stat().st_mtime)
    latest = ", ".join(path.name for path in known[:-4:-1])
    there = f"the latest are {latest}" if latest else "nor of any other"
    raise FileNotFoundError(f"nothing is kept of a run {folder.name} in {folder.parent}; {there}")


def check(kept: Path) -> tuple[dict, bytes]:
    """State and model of a round; `ValueError` or `OSError` if a file is not what was written."""
    sums = dict(reversed(line.split("  ", 1)) for line in (kept / "SHA256SUMS").read_text().splitlines())
    contents = {name: (kept / name).read_bytes() for name in ("state.json", "model.safetensors")}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != sums.get(name):
            raise ValueError(f"{name} does not have its checksum")
    return json.loads(contents["state.json"]), contents["model.safetensors"]
