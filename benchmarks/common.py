"""What the benchmarks share: the exported notebook and the participant's side, as modules."""

import importlib.util
import sys
import tempfile
from pathlib import Path

from nbdev.export import nb_export

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "envoy"))

import private_attributes  # noqa: E402, F401


def load_experiment():
    """The notebook's exported cells as a module."""
    with tempfile.TemporaryDirectory() as folder:
        nb_export(ROOT / "FederatedCrowdGuard.ipynb", Path(folder))
        spec = importlib.util.spec_from_file_location("experiment", Path(folder) / "experiment.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["experiment"] = module
        spec.loader.exec_module(module)
    return module
