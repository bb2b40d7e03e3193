"""The cells before the federation draw and show with every setting that is allowed."""

import contextlib
import io
import zlib

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import yaml
from conftest import ROOT

pytestmark = pytest.mark.slow

SMALL = {"rounds": 2, "local_epochs": 1, "hidden": 16, "width": 32}


class Normalised(torch.nn.Sequential):
    def __init__(self, classes):
        super().__init__(
            torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 64, 3, stride=4), torch.nn.Flatten(), torch.nn.Linear(256, classes),
        )  # fmt: skip


NETS = {"normalised": lambda config: Normalised(config.classes), "no convolution": lambda config: flat(3072, config)}


def flat(inputs, config):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(inputs, 20), torch.nn.ReLU(), torch.nn.Linear(20, config.classes)
    )


def write_envoys(folder, names, attackers, data, other):
    for index, name in enumerate(names):
        mine = {"name": name, "director": "localhost:50051", "device": "cpu"} | other
        mine["data"] = {"participants": len(names), "index": index, "train_samples": 60, "test_samples": 7} | data
        if name in attackers:
            mine["attack"] = {"first_round": 2, "scale": 2, "accomplices": list(attackers)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(mine))


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Runs the cells before the federation; returns what they have defined, and printed."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    envoys = tmp_path / "envoys"
    envoys.mkdir()
    monkeypatch.setenv("CROWDGUARD_ENVOYS", str(envoys))
    monkeypatch.setenv("CROWDGUARD_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("CROWDGUARD_CERTIFICATES", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))

    def go(
        names=("Ann", "Ben", "Eve"), attackers=("Eve",), data=None, net=None, until="## The federation", other=None,
        **settings,
    ):  # fmt: skip
        write_envoys(envoys, names, attackers, data or {}, other or {})
        values, printed = {"__name__": "notebook"}, io.StringIO()
        cells = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4).cells
        last = next(i for i, cell in enumerate(cells) if cell.source.startswith(until))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            for cell in cells[:last]:
                if cell.cell_type == "code":
                    exec(compile(cell.source, cell.id, "exec"), values)
                if "settings" in cell.metadata.get("tags", []):
                    values["config"] = values["replace_config"](values["config"], **(SMALL | settings))
                    values["demo"] = values["replace_config"](values["demo"], **SMALL)  # of which the figures may be
                if net and "def initial_model" in cell.source:
                    values["initial_model"] = net
                if "import NamedTuple" in cell.source:
                    values["replace_config"] = values["replace"]
        plt.close("all")
        return values, printed.getvalue()

    return go


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (2, 6), (3, 6), (5, 5), (40, 40)])
def test_with_any_number_of_participants(play, count, shown):
    names = [f"P{i:03}" for i in range(count)]
    values, printed = play(names, names[-1:] if count > 1 else (), {"train_samples": 12} if count == 40 else {})
    assert "The figures show the demo" not in printed
    assert len(values["names"]) == shown


def test_six_share_the_images_of_fewer_than_five_of_whom_one_attacks(private_attributes):
    cells, values = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4).cells, {}
    exec(next(cell.source for cell in cells if "def as_six" in cell.source), values)

    def envoys(count, attackers=1, **data):
        attack = {"scale": 4, "pdr": 0.3, "accomplices": ["A"]}
        mine = {"participants": count, "train_samples": 60} | data
        read = [
            {"name": f"N{i}", "director": "d:1", "data": mine | {"index": i}}
            | ({"attack": attack} if i < attackers else {})
            for i in range(count)
        ]
        settings = [private_attributes.Settings.model_validate(one) for one in read]
        return {one.name: one.model_dump(mode="json", exclude={"director"}) for one in settings}

    six = values["as_six"](before := envoys(4))
    assert [*six] == ["P1", "P2", "P3", "P4", "P5", "P6"] == [mine["name"] for mine in six.values()]
    assert [mine["data"]["index"] for mine in six.values()] == [*range(6)]
    assert all(mine["data"]["participants"] == 6 and mine["data"]["train_samples"] == 40 for mine in six.values())
    assert [mine["attack"] and mine["attack"]["scale"] for mine in six.values()] == [None] * 4 + [1] * 2
    assert six["P6"]["attack"]["accomplices"] == ["P5", "P6"] and six["P5"]["attack"]["pdr"] == 0.3
    assert before == envoys(4), "and what was given is as it was"
    assert len(values["as_six"](envoys(4, train_samples=None))) == 6
    owners = {name: mine | {"data": mine["data"] | {"folder": f"/data/{name}"}} for name, mine in envoys(4).items()}
    for as_they_are in (envoys(5), envoys(4, attackers=0), envoys(3, participants=9), owners, {}):
        assert values["as_six"](as_they_are) is as_they_are


def test_a_curve_without_defence_is_of_the_same_attack_and_data():
    cells, values = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4).cells, {}
    exec(next(cell.source for cell in cells if "def comparable_rows" in cell.source), values)

    def row(attackers=("Eve",), failed=(), backdoor="red square", images=90):
        tested = {name: {"images": 0 if name in failed else images} for name in ("Ann", "Eve")}
        failed = dict.fromkeys(failed, "gone")
        return {"attackers": [*attackers], "failed": failed, "backdoor": backdoor, "per_participant": tested}

    older = row() | {"per_participant": {"Ann": {"loss": 1}, "Eve": {"loss": 1}}}
    for there, same in (
        (row(), True),
        (row(attackers=()), False),
        (row(attackers=(), failed=["Eve"]), True),  # it was away
        (row(backdoor="noise"), False),
        (row(backdoor=None), True),  # nobody has measured it
        (row(images=120), False),  # shares of a third, and not of a quarter
        (older, True),  # nobody has counted
    ):
        assert values["comparable_rows"](there, row()) is same


def test_the_demo_knows_the_files_as_they_came(private_attributes):
    source = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4).cells[-1].source
    read = {path.stem: private_attributes.read_settings(path) for path in sorted((ROOT / "envoy").glob("*.yaml"))}
    written = {name: settings.model_dump(mode="json", exclude={"director"}) for name, settings in read.items()}
    assert f"SHIPPED = {zlib.crc32(repr(written).encode())} " in source


@pytest.mark.parametrize("net", NETS)
def test_with_other_nets(play, net):
    assert "The figures show the demo" not in play(net=NETS[net])[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": 3}, "labels from 0 to 9, but classes = 3"),
        ({"names": ()}, "there are no YAML files"),
        ({"data": {"source": "image_folder", "folder": "/nowhere"}}, "there is no folder /nowhere"),
        ({"net": lambda config: flat(1024, config)}, "the net cannot take a batch (1, 3, 32, 32): RuntimeError"),
    ],
)
def test_where_the_participants_do_not_fit_the_figures_show_the_demo(play, changes, reason):
    _, printed = play(until="## Local training", **changes)
    assert "The figures show the demo" in printed and reason in printed


def test_where_six_cannot_share_the_images_the_figures_show_the_participants_as_they_are(play):
    """Of thirty-six images the three have twelve each, six would have six: one of two attackers lacks the class."""
    values, printed = play(until="## Local training", data={"train_samples": 12}, other={"backdoor_source": 5})
    assert [*values["example"].participants] == ["Ann", "Ben", "Eve"] and "The figures show the demo" not in printed


def test_all_figures_can_be_of_the_demo(play):
    values, _ = play(classes=3)
    assert values["names"] == ["P1", "P2", "P3", "P4", "P5", "P6"] and not values["same_net"]


def test_a_run_that_is_over_before_the_attack_begins_is_told(play):
    assert "The attack begins in round 2, and this run has 1" in play(rounds=1)[1]
    cells = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4).cells
    telling = next(cell for cell in cells if "The attack begins in round" in cell.source)
    assert telling.metadata["tags"] == ["terminal"], "from where on it shows what is printed"
