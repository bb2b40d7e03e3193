"""The exported module under test, and small things that several tests need."""

import functools
import gc
import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def load_module(name: str, path: Path):
    """The module in a file, which may import those beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """The file that participants receive, exported by OpenFL."""
    from openfl.experimental.workflow.notebooktools import CodeAnalyzer

    folder = tmp_path_factory.mktemp("exported")
    return CodeAnalyzer(ROOT / "FederatedCrowdGuard.ipynb", folder).script_path


@pytest.fixture(scope="session")
def experiment(exported):
    """The exported module."""
    from openfl.experimental.workflow.interface import fl_spec

    module = load_module("experiment", exported)
    # At every step OpenFL collects garbage, of all that is imported, and reads the source of everybody who has called
    # it, pytest too, to know the name of one: half a second, and most of the time of a small round.
    gc.freeze()
    fl_spec.inspect = SimpleNamespace(stack=functools.partial(inspect.stack, 0))
    return module


@pytest.fixture(scope="session")
def private_attributes():
    return load_module("private_attributes", ROOT / "envoy" / "private_attributes.py")


@pytest.fixture(scope="session")
def published():
    """The published implementation, an oracle that lies in the installed openfl package."""
    import openfl
    from matplotlib.cbook import boxplot_stats

    def boxplot(values, whis):
        """Its outliers as matplotlib counts them, without a drawing that nobody sees."""
        (box,) = boxplot_stats(values, whis=whis)
        return {"fliers": [SimpleNamespace(get_ydata=lambda: box["fliers"])]}

    tutorials = Path(openfl.__file__).parent.parent / "openfl-tutorials" / "experimental" / "workflow" / "CrowdGuard"
    module = load_module("published", tutorials / "CrowdGuardClientValidation.py")
    module.plt = SimpleNamespace(boxplot=boxplot, close=lambda: None)
    return module.CrowdGuardClientValidation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class SmallNet(torch.nn.Module):
    """A net of four inspected layers that is fast to run and knows nothing of `Net`."""

    def __init__(self, classes=3):
        super().__init__()
        self.convolutions = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.ReLU(inplace=True), torch.nn.Conv2d(4, 6, 3, stride=4)
        )
        self.norm = torch.nn.BatchNorm2d(6)
        self.linear = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Tanh(), torch.nn.Linear(8, classes))

    def forward(self, images):
        return self.linear(self.norm(self.convolutions(images)).flatten(1))


@pytest.fixture
def small_models():
    """A global model and five local ones near it; the last is further away."""
    torch.manual_seed(0)
    origin, models = SmallNet(), []
    for step in (0.05, 0.05, 0.05, 0.05, 0.5):
        model = SmallNet()
        model.load_state_dict(origin.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += step * torch.randn_like(parameter)
        models.append(model)
    return origin, models


@pytest.fixture
def loader():
    """Forty images of three classes, unshuffled, in batches of sixteen."""
    torch.manual_seed(1)
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 3
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
