"""What the benchmarks share: the exported notebook and the participant's side, as modules."""

import argparse
import contextlib
import importlib.util
import io
import sys
import tempfile
import warnings
from pathlib import Path

import pandas as pd
from nbdev.export import nb_export

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
sys.path.insert(0, str(ROOT / "envoy"))
warnings.filterwarnings("ignore", module="(.*/)?(metaflow|_distutils_hack)")  # OpenFL's dependencies on their own age

import private_attributes  # noqa: E402, F401


def load_experiment():
    """The notebook's exported cells as a module."""
    with tempfile.TemporaryDirectory() as folder:
        nb_export(ROOT / "FederatedCrowdGuard.ipynb", Path(folder))
        spec = importlib.util.spec_from_file_location("experiment", Path(folder) / "experiment.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["experiment"] = module
        with contextlib.redirect_stdout(io.StringIO()):  # OpenFL announces every step
            spec.loader.exec_module(module)
    return module


def done(path: Path, *columns: str) -> set[tuple]:
    """What a CSV holds already, by some of its columns; what is not there counts as 0."""
    if not path.exists():
        return set()
    return set(pd.read_csv(path)[[*columns]].fillna(0).itertuples(index=False, name=None))


def append(path: Path, rows: list[dict]) -> None:
    """Adds rows to a CSV, all at once, so that they are in it either whole or not at all."""
    pd.DataFrame(rows).to_csv(path, mode="a", header=not path.exists(), index=False)


def arguments(description: str, folder: bool = True) -> argparse.ArgumentParser:
    """A parser, for the folder of the images where a benchmark needs it."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    if folder:
        of_images = "train/<class>/… and test/<class>/…"
        parser.add_argument("folder", type=lambda text: Path(text).expanduser(), help=of_images)
    return parser
