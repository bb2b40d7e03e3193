"""What a run leaves: files, and what the documentation says of them."""

import errno
import html
import io
import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from experimenter import connect, run
from experimenter.connect import Federation, State, everybody_failed
from experimenter.report import arrange, write_report
from experimenter.results import Results, set_aside, table

ROW = {
    "round": 1, "aggregation": "CrowdGuard", "participants": ["A", "B"], "main_accuracy": 0.5,
    "backdoor_accuracy": None, "backdoor": None, "per_participant": {}, "votes": {}, "accepted": ["A"],
    "excluded": ["B"], "attackers": ["B"], "tpr": 1.0, "tnr": None, "failed": {"B": "disk"},
}  # fmt: skip


@pytest.fixture
def results(tmp_path, experiment):
    shown = []
    kept = Results(tmp_path, experiment.demo, shown.append)
    kept.shown = shown
    return kept


def test_every_round_is_kept_as_it_comes(results, tmp_path):
    for count in (1, 2):
        rows = [ROW | {"round": number} for number in range(1, count + 1)]
        results.keep(run="run-1", federation=rows, traffic=[])
        kept = json.loads((tmp_path / "history.json").read_text())
        assert [row["round"] for row in kept["federation"]] == [*range(1, count + 1)]
    assert len(results.shown) == 2, "shown once for each round"
    assert kept["config"]["seed"] == 10 and kept["versions"]["openfl"] == "1.9"
    results.keep(b"model", undefended=[ROW | {"aggregation": "FedAvg"}])
    lines = pd.read_csv(tmp_path / "history.csv")
    assert lines["history"].tolist() == ["federation", "federation", "plain FedAvg"]
    assert lines["failed"].tolist() == ["B"] * 3 and lines["backdoor_accuracy"].isna().all()
    assert (tmp_path / "global_model.safetensors").read_bytes() == b"model"
    assert len([*(tmp_path / "tensorboard").rglob("events*")]) == 3
    assert not [*tmp_path.glob("*.part")]


def test_a_run_that_never_began_leaves_what_an_earlier_one_has_reached(results, tmp_path):
    results.keep(run="run-1", federation=[ROW], traffic=[])
    before = (tmp_path / "history.json").read_bytes()
    federation = Federation.__new__(Federation)
    federation.run, federation.results = "run-2", results
    federation.keep(State(error="nothing is kept of a run run-2"))
    assert (tmp_path / "history.json").read_bytes() == before
    federation.keep(State(history=[ROW]))
    assert json.loads((tmp_path / "history.json").read_text())["run"] == "run-2"


@pytest.mark.parametrize(("resume", "moved"), [("", True), ("run-2", True), ("run-1", False)])
def test_what_an_earlier_run_has_left_is_set_aside(results, tmp_path, resume, moved):
    results.keep(b"model", run="run-1", federation=[ROW], traffic=[])
    set_aside(tmp_path, resume)
    assert (tmp_path / "run-1" / "global_model.safetensors").exists() is moved
    assert (tmp_path / "history.json").exists() is not moved
    assert len([*(tmp_path / "tensorboard").rglob("events*")]) == 1, "which holds all runs beside each other"
    set_aside(tmp_path, resume)  # nothing is there any more


def test_what_is_set_aside_again_lies_beside_the_first(results, tmp_path):
    for rounds in (2, 1):
        results.keep(run="run-1", federation=[ROW] * rounds, traffic=[])
        (tmp_path / "mine.tex").write_text("of the user")
        set_aside(tmp_path, "")
    kept = [json.loads((tmp_path / name / "history.json").read_text())["federation"] for name in ("run-1", "run-1.2")]
    assert [len(rows) for rows in kept] == [2, 1] and (tmp_path / "mine.tex").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": ""}', '{"run": 5}', '{"run": "../out"}'])
def test_a_history_that_is_none_is_left_alone(tmp_path, content):
    (tmp_path / "history.json").write_text(content)
    set_aside(tmp_path, "")
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_results_that_cannot_be_written_are_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match="file: .*choose another folder"):
        run.claim(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_one_run_s_as_long_as_it_goes_on(tmp_path):
    lock = run.claim(tmp_path)
    with pytest.raises(SystemExit, match="is another run's"):
        run.claim(tmp_path)
    lock.release()
    run.claim(tmp_path).release()


@pytest.mark.parametrize(
    ("failed", "words"), [([], "there is no round"), ([0, 2], "last round"), ([2, 0], None), ([1, 1], None)]
)
def test_a_run_in_whose_last_round_everybody_failed_is_no_success(failed, words):
    rows = [{"participants": ["A", "B"], "failed": dict.fromkeys("AB"[:count], "size mismatch")} for count in failed]
    said = everybody_failed(rows)
    assert words in said if words else said is None


def test_the_terminal_shows_what_the_federation_says(tmp_path):
    stream = io.StringIO()
    console = run.Console(stream, cells=2)
    console.told -= 2 * run.TELL  # so long nothing was shown
    method, federation, later = (nbformat.v4.new_code_cell() for _ in range(3))
    federation.metadata["tags"] = ["terminal"]
    for cell, text in ((method, "Linear: (2, 10)\n"), (federation, "run run-1 at\n\n"), (later, "round 1 done\n")):
        console.begin(cell, cell_index=0)
        console.write(text)
        console.write("" if console.shown else "half a line")
    console.write("round 2: Amsterdam has trained, loss 0.1\n")
    assert stream.getvalue() == "explaining, cell 1 of 2\nrun run-1 at\nround 1 done\n"


def test_event_files_hold_each_round_once(results, tmp_path):
    for count in (1, 2, 2):
        results.keep(run="run-1", federation=[ROW | {"round": n + 1} for n in range(count)])
    files = sorted((tmp_path / "tensorboard").rglob("events*"), key=lambda path: path.name[-4:])
    assert [path.name[-4:] for path in files] == ["0001", "0002"]
    assert [path.read_bytes().count(b"main_accuracy") for path in files] == [1, 1]


def test_a_run_that_goes_on_writes_the_rounds_that_are_new(results, tmp_path, experiment):
    results.keep(run="run-1", federation=[ROW])
    Results(tmp_path, experiment.demo).keep(run="run-1", federation=[ROW, ROW | {"round": 2}])
    files = sorted((tmp_path / "tensorboard").rglob("events*"), key=lambda path: path.name[-4:])
    assert [path.name[-4:] for path in files] == ["0001", "0002"]


def test_results_are_written_without_a_thread(results, monkeypatch):
    """Whose queue's lock Ctrl-C could leave taken, so that the run would hang instead of being stopped."""
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread} was started"))
    results.keep(b"model", run="run-1", federation=[ROW])


def test_a_disk_that_is_full_costs_neither_the_run_nor_what_was_there(results, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CROWDGUARD_AGAIN", "make run RESUME=")
    federation = Federation.__new__(Federation)
    federation.run, federation.results = "run-1", results
    federation.keep(State(history=[ROW]))
    before = (tmp_path / "history.json").read_bytes()

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as change:
        change.setattr(Path, "write_bytes", full)
        federation.keep(State(history=[ROW] * 2))
    assert "No space left" in caplog.text and "go on with: make run RESUME=run-1" in caplog.text
    assert (tmp_path / "history.json").read_bytes() == before and not [*tmp_path.glob("*.part")]
    federation.keep(State(history=[ROW] * 2))
    assert len(json.loads((tmp_path / "history.json").read_text())["federation"]) == 2


def test_a_run_that_goes_on_keeps_the_curve_of_before(results, tmp_path, experiment):
    results.keep(run="run-1", federation=[ROW])
    results.keep(undefended=[ROW])
    curve = next((tmp_path / "tensorboard" / "run-1 plain FedAvg").iterdir())
    for name, kept in (("run-1", 1), ("run-2", 0)):
        Results(tmp_path, experiment.demo).keep(run=name, federation=[ROW] * 2)
        reached = json.loads((tmp_path / "history.json").read_text())
        assert len(reached["undefended"]) == kept
        assert [*curve.parent.iterdir()] == [curve], "which is in TensorBoard's files already"


def test_who_was_not_there_is_not_excluded():
    row = ROW | {"participants": ["A", "B", "C"], "failed": {"C": "no heartbeat for 60 s"}}
    assert table([row, row | {"accepted": ["A", "B", "C"], "excluded": []}])["excluded"].tolist() == [
        "B, C (no model)", "–",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("online", "at_least", "words"),
    [([], None, "no envoy is online"), (["A", "B"], 3, "min_participants is 3, and 2 are online: A, B")],
)
def test_too_few_to_begin_with_are_told_at_once(monkeypatch, online, at_least, words):
    monkeypatch.setattr(connect, "assert_director", lambda resume, config: None)
    monkeypatch.setattr(connect, "Federation", lambda resume, results: SimpleNamespace(collaborators=online))
    config = SimpleNamespace(min_participants=at_least)
    with pytest.raises(ConnectionError, match=words):
        connect.connect(config=config)
    with pytest.raises(SystemExit, match=words):
        run.assert_federation("", config)
    online += ["C", "D"]
    assert connect.connect(config=config).collaborators == online


def test_a_run_that_is_stopped_is_told_how_it_goes_on(results, tmp_path, monkeypatch):
    assert run.how_it_goes_on(tmp_path) == "stopped before the first round"
    results.keep(run="run-1", federation=[ROW])
    monkeypatch.setattr(run.sys, "argv", ["experimenter/run.py"])
    args = SimpleNamespace(config="demo", set=["rounds=3"], results=tmp_path)
    monkeypatch.setenv("CROWDGUARD_AGAIN", run.again(args))
    options = f"--config demo --set rounds=3 --results {tmp_path} --resume run-1"
    assert (
        run.how_it_goes_on(tmp_path)
        == f"stopped after round 1, go on with: {sys.executable} experimenter/run.py {options}"
    )


def test_the_table_has_a_line_for_each_round():
    shown = table([ROW, ROW | {"round": 2, "accepted": ["A", "B"], "excluded": []}])
    assert shown["excluded"].tolist() == ["B", "–"] and shown.index.tolist() == [1, 2]


def test_the_documentation_names_every_key(results, experiment):
    text = (ROOT / "docs" / "history.md").read_text()
    top, row = text.split("## history.json")[1].split("A row:")
    keys = lambda part: set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (.+?) \|", part))))  # noqa: E731
    assert keys(top) == set(results.reached)
    assert keys(row) == set(ROW)


def notebook(*sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source) for source in sources])


def test_the_report_has_the_results_after_the_introduction():
    made = notebook("# Title", "## One", "first", "## Results", "figure", "## Two")
    made.cells.insert(1, nbformat.v4.new_code_cell("import numpy"))
    order = [cell.source.splitlines()[0] for cell in arrange(made).cells]
    expected = ["# Title", "## Results", "figure", "import numpy", "## One", "first", "## Two"]
    assert order == expected


def test_the_report_needs_no_network(tmp_path):
    path = tmp_path / "n.ipynb"
    nbformat.write(notebook("# Title", "## One", "with $x_s$ and\n\n$$D = \\frac{a}{b}$$", "costs $5"), path)
    page = write_report(path).read_text()
    assert "<math" in page and "<mfrac>" in page and "$x_s$" not in page and "costs $5" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=.https?:", page)


def test_the_report_has_no_noise():
    started = '\x1b[94mAggregator step "start" registered\x1b[0m\n\n'
    outputs = [nbformat.v4.new_output("stream", text=said) for said in (started + "round 1 done\n", started)]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("run()", outputs=outputs)])
    assert [output.text for output in arrange(made).cells[0].outputs] == ["round 1 done\n"]


def test_every_formula_and_link_of_the_notebook_works_in_the_report(tmp_path):
    made = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4)
    made.cells = [cell for cell in made.cells if cell.cell_type == "markdown"]
    nbformat.write(made, tmp_path / "n.ipynb")
    page = write_report(tmp_path / "n.ipynb").read_text()
    formulas = re.findall(r"<math.*?</math>", page)
    assert len(formulas) > 100 and not [formula for formula in formulas if "\\" in html.unescape(formula)]
    assert "$" not in re.sub(r"(?s)<(script|style|pre|math)\b.*?</\1>", "", page), "a formula that none was made of"
    links = re.findall(r'<a href="file://([^"#]+)(?:#([^"]+))?"', page)
    assert len(links) >= 4
    for file, anchor in links:
        headings = re.findall(r"(?m)^#+ (.+)", Path(file).read_text())
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]


def test_every_picture_has_its_text(tmp_path):
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    figure = nbformat.v4.new_output("display_data", data={"image/png": dot}, metadata={"image/png": {"alt": 'a "dot"'}})
    shown = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[figure])])
    nbformat.write(shown, tmp_path / "n.ipynb")
    assert 'alt="a &quot;dot&quot;"' in write_report(tmp_path / "n.ipynb").read_text()
