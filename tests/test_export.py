"""What director and envoys receive."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import load_module

from envoy.channel import PROTOCOL
from experimenter.cells import check_exports

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_the_exported_module_imports_without_network_and_writes_nothing(exported, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(exported, alone)
    code = "import socket\ndef no(*a, **k): raise OSError('network')\nsocket.socket.connect = no\nimport experiment\n"
    code += "assert experiment.FederatedCrowdGuard and experiment.Config().rounds"
    environment = {"PYTHONPATH": str(alone), "HOME": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-B", "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    assert [file.name for file in tmp_path.rglob("*")] == ["alone", "experiment.py"]


def test_export_writes_plan_code_and_requirements(tmp_path, monkeypatch):
    workspace = tmp_path / "generated_workspace"
    monkeypatch.setenv("CROWDGUARD_WORKSPACE", str(workspace))
    command = [
        sys.executable,
        ROOT / "experimenter" / "run.py",
        "--export",
        "--config",
        "published",
        "--set",
        "rounds=3",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    plan = yaml.safe_load((workspace / "plan" / "plan.yaml").read_text())
    assert plan["federated_flow"] == {"template": "src.experiment.FederatedCrowdGuard", "settings": {}}
    assert plan["contract"]["protocol"] == PROTOCOL
    assert plan["network"]["settings"]["tls"] is True
    assert plan["network"]["settings"]["agg_addr"] == "localhost"
    assert (workspace / "requirements.txt").read_text() == (ROOT / "envoy" / "requirements.txt").read_text()
    code = (workspace / "src" / "experiment.py").read_text()
    assert "config = dataclasses.replace(published, rounds=3)" in code
    assert "matplotlib" not in code


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("rule=foo", "rule=foo (SET=…, --set): Input should be 'crowd' or 'paper'; one of your own is"),
        ("rounds=0", "rounds=0 (SET=…, --set): "),
        ("round=3", "round=3 (SET=…, --set): there is no such setting; there are aggregation, rule, rounds, "),
        ("learning_rate=NaN", "learning_rate=NaN (SET=…, --set): "),
        ("patience=60", "(SET=…, --set): patience is participant_timeout now"),
        ("stamped_images=0", "(SET=…, --set): stamped_images is no setting any more"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_started(change, told):
    run = load_module("run", ROOT / "experimenter" / "run.py")
    notebook = run.with_settings(nbformat.read(run.NOTEBOOK, as_version=4), "demo", [run.parse_change(change)])
    with pytest.raises(SystemExit, match=re.escape(told)):
        run.check(notebook)


@pytest.mark.parametrize("code", ["import byzfll", "def f(:", "AGGREGATION['Mine'] = None"])
def test_a_cell_of_ones_own_that_fails_is_named(code):
    run = load_module("run", ROOT / "experimenter" / "run.py")
    notebook = nbformat.read(run.NOTEBOOK, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "class Config" in cell.source)
    notebook.cells.insert(place, nbformat.v4.new_code_cell(f"#| export\n{code}"))
    with pytest.raises(SystemExit, match=rf"^{run.NOTEBOOK.name}, cell {place + 1}: \w+Error: "):
        run.check(notebook)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["rounds=3", "rounds=4"], "rounds (SET=…, --set): is given twice"),
        (["class=2"], "class=2 (SET=…, --set): must be name=value without blanks"),
        (["data.alpha=1.0"], "data.alpha=1.0 (SET=…, --set): has a dot, so it is a setting of the participants"),
        (["aggregation=FedAvg", "rule=paper"], "rule (SET=…, --set): does nothing with aggregation=FedAvg"),
    ],
)
def test_what_is_no_setting_is_told_in_one_line(tmp_path, changes, told):
    options = itertools.chain.from_iterable(("--set", change) for change in changes)
    command = [sys.executable, ROOT / "experimenter" / "run.py", "--check", "--results", tmp_path, *options]
    assert subprocess.run(command, capture_output=True, text=True).stderr.startswith(told)


def test_a_function_replaced_without_export_is_told(tmp_path):
    """Participants would run the one before, while the notebook shows the new one."""
    cells = [
        "#| export\ndef net():\n    return 1\n\n\nlimit = 3",
        "%matplotlib inline",
        "limit = 4\nshown = net()",
        "x = 1",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    check_exports(notebook)
    for again in ("def net():\n    return 2", "class net:\n    pass", "net, other = print, 1"):
        notebook.cells[3].source = again
        with pytest.raises(ValueError, match="cell 4 defines net again without `#| export`; .* that of cell 1"):
            check_exports(notebook)
    notebook.cells[3].source = "#| export\ndef net():\n    return 2"
    check_exports(notebook)
