"""docs/your-own.md: every piece of code and every YAML file on the page is run as it stands there."""

import contextlib
import functools
import importlib
import io
import re
import sys
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_module
from PIL import Image

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "your-own.md").read_text()
BLOCKS = {(kind, name): code for kind, name, code in re.findall(r"```(python|yaml) (\w+)\n(.*?)```", PAGE, re.DOTALL)}
NAMES = ["Amsterdam", "Bangalore", "Chandler", "Detroit"]


@pytest.fixture
def animals(tmp_path):
    """Folders of three colours at four owners, one of whom lacks a class in training."""
    rng = np.random.default_rng(0)
    for owner in NAMES:
        for part, count in (("train", 40), ("test", 10)):
            for number, name in enumerate(("ant", "bee", "cat")):
                folder = tmp_path / owner / part / name
                folder.mkdir(parents=True)
                for index in range(0 if (owner, part, name) == ("Bangalore", "train", "cat") else count):
                    pixels = rng.integers(0, 120, (20, 24, 3))
                    pixels[..., number] += 130
                    Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
    return tmp_path


@pytest.fixture
def own(experiment, monkeypatch):
    """The participant's side as a module of its own, and the experiment, with a recipe's code in them."""
    monkeypatch.syspath_prepend(str(ROOT / "envoy"))
    for name in ("private_attributes", "attacks", "sources", "strict_yaml"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    private_attributes, attacks = (importlib.import_module(name) for name in ("private_attributes", "attacks"))

    def add(code, module):
        names = dict(vars(module))
        exec(code, names)
        for name in names.keys() - vars(module).keys() | {"initial_model", "make_optimizer"} & names.keys():
            if not name.startswith("__"):
                monkeypatch.setattr(module, name, names[name], raising=False)

    for name in ("trigger", "attack"):
        add(BLOCKS["python", name], attacks)
    return private_attributes, lambda name: add(BLOCKS["python", name], experiment)


@pytest.fixture
def with_choice(tmp_path):
    """The experiment of a notebook with a recipe's cell before `Config`."""

    def load(name):
        from openfl.experimental.workflow.notebooktools import CodeAnalyzer

        notebook = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4)
        choices = next(i for i, cell in enumerate(notebook.cells) if "AGGREGATIONS = {" in cell.source)
        notebook.cells.insert(choices + 1, nbformat.v4.new_code_cell(BLOCKS["python", name]))
        nbformat.write(notebook, tmp_path / "choice.ipynb")
        return load_module(f"experiment_{name}", CodeAnalyzer(tmp_path / "choice.ipynb", tmp_path).script_path)

    return load


@pytest.fixture
def run(experiment, own, tmp_path, monkeypatch):
    from openfl.experimental.workflow.interface import Aggregator, Collaborator
    from openfl.experimental.workflow.runtime import LocalRuntime

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAFLOW_USER", "tests")
    private_attributes, _ = own

    def attributes(name, settings):
        data = {"train_samples": 60, "test_samples": 30, "participants": 4, "index": NAMES.index(name)}
        mine = {"name": name, "director": "localhost:1"} | settings | {"data": data | settings.get("data", {})}
        mine = yaml.safe_load(yaml.safe_dump(mine).replace("FOLDER", str(tmp_path / name)))
        if name == "Detroit":
            mine["attack"] = {"first_round": 2, "scale": 4, "accomplices": ["Detroit"]} | mine.get("attack", {})
        elif "attack" in mine:
            del mine["attack"]
        read = private_attributes.Settings.model_validate(mine)
        return private_attributes.participant(**read.model_dump(exclude={"director"}))

    def go(settings=None, experiment=experiment, **config):
        people = [
            Collaborator(name=n, private_attributes_callable=functools.partial(attributes, n, settings or {}))
            for n in NAMES
        ]
        small = {"rounds": 2, "local_epochs": 1, "hidden": 16, "width": 8}
        flow = experiment.FederatedCrowdGuard(replace(experiment.demo, **(small | config)))
        flow.runtime = LocalRuntime(Aggregator(name="aggregator"), people, backend="single_process")
        with contextlib.redirect_stdout(io.StringIO()):
            flow.run()
        assert [row["failed"] for row in flow.history] == [{}] * flow.config.rounds
        if flow.config.aggregation == "CrowdGuard":
            assert all(row["votes"].keys() == set(NAMES) for row in flow.history)
        return flow

    return go


def yaml_of(name):
    return yaml.safe_load(BLOCKS["yaml", name])


@pytest.mark.parametrize("net", ["resnet", "vit"])
def test_a_net(own, run, net):
    own[1](net)
    at_once = {"attack": {"first_round": 1}}
    flow = run(at_once, rounds=1, validation_samples=16)  # a large net takes its time
    assert flow.history[0]["attackers"] == ["Detroit"]
    assert flow.history[0]["excluded"] == ["Detroit"]


def test_an_image_folder(run, animals):
    flow = run(yaml_of("folder"), classes=3, rounds=3, local_epochs=4)
    assert flow.history[-1]["main_accuracy"] > 0.8, "also of whoever lacks a class"


def test_grey_images(own, run):
    own[1]("grey")
    assert run(yaml_of("grey")).history[1]["excluded"] == ["Detroit"]


def test_a_table(own, run):
    own[1]("table")
    flow = run(yaml_of("table"), classes=2, rounds=4, local_epochs=8)
    assert flow.history[-1]["main_accuracy"] > 0.85
    assert all(row["excluded"] == ["Detroit"] for row in flow.history[1:])


def test_a_trigger_and_an_attack(run):
    flow = run({"trigger": "stripes", "attack": {"kind": "noisy"}})
    assert flow.history[1]["excluded"] == ["Detroit"]


def test_labels_flipped(run):
    flow = run({"trigger": "none", "backdoor_source": 3, "backdoor_target": 5})
    assert 0 <= flow.history[-1]["backdoor_accuracy"] <= 1


def test_an_aggregation(with_choice, run):
    flow = run(experiment=with_choice("krum"), aggregation="Krum")
    assert all(len(row["accepted"]) == 3 and row["votes"] == {} for row in flow.history)
    assert flow.history[1]["excluded"] == ["Detroit"]


def test_an_aggregation_that_accepts_all(with_choice, run):
    experiment = with_choice("median")
    flow = run(experiment=experiment, aggregation="Median")
    assert all(row["accepted"] == NAMES and row["excluded"] == [] for row in flow.history)
    untrained, trained = experiment.initial_model(flow.config).state_dict(), experiment.load(flow.global_model)
    assert not any(trained[name].equal(untrained[name]) for name in untrained)


@pytest.mark.parametrize(("name", "accepted"), [("krum", "ABC"), ("median", "ABCD")])
def test_aggregations_of_nets_with_masks(with_choice, name, accepted):
    """Buffers that are not finite, or not numbers."""
    experiment = with_choice(name)
    reference = {"w": torch.zeros(8), "mask": torch.full((2,), -torch.inf), "on": torch.tensor([True, False])}
    states = {name: reference | {"w": torch.full((8,), 0.01 * number)} for number, name in enumerate("ABCD")}
    states["D"] = reference | {"w": torch.full((8,), 100.0)}
    aggregate = experiment.AGGREGATIONS[name.capitalize()]
    names, state = aggregate(states, reference)
    assert names == [*accepted] and state["w"].max() < 0.02 and torch.equal(state["mask"], reference["mask"])
    assert aggregate({"A": states["A"]}, reference)[0] == ["A"]


def test_a_rule(with_choice, run):
    flow = run(experiment=with_choice("rule"), rule="farthest")
    assert [row["excluded"] for row in flow.history] == [[], ["Detroit"]]


def test_a_choice_that_nobody_has_made_is_told_at_once(experiment):
    with pytest.raises(ValueError, match="'CrowdGuard' or 'FedAvg'"):
        replace(experiment.demo, aggregation="Krum")
    with pytest.raises(ValueError, match="'crowd' or 'paper'"):
        replace(experiment.demo, rule="farthest")


def test_an_optimiser(own, experiment, run, monkeypatch):
    own[1]("optimiser")
    rates, make = [], experiment.make_optimizer
    monkeypatch.setattr(experiment, "make_optimizer", lambda *args: rates.append(made := make(*args)) or made)
    run(learning_rate=0.001)
    assert {type(made) for made in rates} == {torch.optim.AdamW}
    assert [made.param_groups[0]["lr"] for made in rates] == pytest.approx([0.001] * 8 + [0.0009] * 4), (
        "the first round tries it"
    )


def test_no_recipe_is_longer_than_ten_lines_and_none_is_left_out():
    used = {"resnet", "vit", "folder", "grey", "table", "trigger", "attack", "krum", "median", "rule", "optimiser"}
    assert {name for _, name in BLOCKS} == used
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 10 for code in BLOCKS.values())
