"""Executes the notebook and keeps what comes of it in `results/`.

    python experimenter/run.py --config published --set rounds=2

`make run` calls this beside a local federation. With `--export` it only writes `generated_workspace/`, with `--check`
it only says whether the settings are right and the results can be written.
"""

import argparse
import itertools
import json
import keyword
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import nbformat
import papermill
from filelock import FileLock, Timeout
from nbclient.exceptions import DeadKernelError

NOTEBOOK = Path(__file__).parent.parent / "FederatedCrowdGuard.ipynb"
sys.path.insert(0, str(NOTEBOOK.parent))  # for the package that this file is in

from experimenter.cells import check_exports, exported  # noqa: E402

NOISE = re.compile(r"\s*$|(Aggregator|Collaborator) step .* registered|.*: \S+ has trained, ")
OPENFL = re.compile(r"Exception: FederatedRuntime: Experiment \S+ failed to run due to error: ")  # before our words
WHERE = "(SET=…, --set)"  # from where a setting comes
INSPECTION = {"rule", "validation_samples", "validators_per_round", "message_mb"}  # settings that need it
TELL = 20  # seconds between signs of life while the notebook explains
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def without_noise(text: str) -> str:
    """Printed text without colours, empty lines and what OpenFL says at every step."""
    lines = ANSI.sub("", text).splitlines()
    return "".join(f"{line}\n" for line in lines if not NOISE.match(line))


def tagged(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def with_settings(notebook, name: str, changes: list[str]):
    """The notebook with one more exported cell, after the one tagged `settings`, that chooses another config."""
    if name == "demo" and not changes:
        return notebook
    source = f"#| export\nimport dataclasses\n\nconfig = dataclasses.replace({name}, {', '.join(changes)})"
    position = next(i for i, cell in enumerate(notebook.cells) if tagged(cell, "settings"))
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(source))
    return notebook


def parse_change(text: str) -> str:
    """`rounds=2` as it is, `rule=paper` as `rule='paper'`."""
    key, equals, value = text.partition("=")
    if "." in key:
        raise SystemExit(f"{text} {WHERE}: has a dot, so it is a setting of the participants: ENVOY=…")
    if not (equals and key.isidentifier()) or keyword.iskeyword(key):
        raise SystemExit(f"{text} {WHERE}: must be name=value without blanks, as in rounds=2")
    try:
        return f"{key}={json.loads(value, parse_constant=int)!r}"  # NaN is a text, which no setting is
    except ValueError:
        return f"{key}={value!r}"


def check(notebook):
    """The notebook's config; `SystemExit` with one line if it is not right. Runs the cells of the settings alone."""
    first, last = ([i for i, c in enumerate(notebook.cells) if tagged(c, tag)] for tag in ("imports", "settings"))
    chosen = last[0] + (2 if "dataclasses.replace(" in notebook.cells[last[0] + 1].source else 1)
    names = {"__name__": "settings"}
    try:
        for number, cell in enumerate(notebook.cells[first[0] : chosen], first[0] + 1):
            if exported(cell):
                exec(compile(cell.source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)  # noqa: S102
    except Exception as error:
        if not hasattr(error, "errors"):  # a cell of one's own
            raise SystemExit(f"{NOTEBOOK.name}, cell {number}: {type(error).__name__}: {error}") from None
        problem = error.errors()[0]
        if problem["type"] == "unexpected_keyword_argument":
            problem["msg"] = f"there is no such setting; there are {', '.join(names['Config'].__dataclass_fields__)}"
        where = ".".join(str(part) for part in problem["loc"])
        where += f"={problem['input']}" if where and "input" in problem else ""
        reason = problem.get("ctx", {}).get("error", problem["msg"])  # ours without what pydantic says before it
        if problem["type"] == "literal_error" and where.partition("=")[0] in ("aggregation", "rule"):
            reason += "; one of your own is entered by an exported cell before Config, see docs/your-own.md"
        raise SystemExit(f"{where} {WHERE}: {reason}".strip()) from None
    return names["config"]


class Console:
    """Shows what the notebook prints from its cell tagged `terminal` on, without blank lines and OpenFL's own words."""

    def __init__(self, stream, shown: bool = False, cells: int = 0):
        self.stream, self.open, self.shown, self.cells = stream, "", shown, cells
        self.told = time.monotonic()

    def write(self, text: str) -> None:
        *lines, self.open = (self.open + text).split("\n")
        for line in lines if self.shown else ():
            if not NOISE.match(plain := ANSI.sub("", line)):
                self.stream.write(f"{plain}\n")

    def begin(self, cell, cell_index, **_) -> None:
        """Called before each cell. What the explaining ones before show is for who reads the notebook."""
        if not self.shown and tagged(cell, "terminal"):
            self.shown, self.open = True, ""
        elif self.cells and not self.shown and time.monotonic() - self.told > TELL:
            self.stream.write(f"explaining, cell {cell_index + 1} of {self.cells}\n")
            self.stream.flush()
            self.told = time.monotonic()

    def flush(self) -> None:
        self.stream.flush()


def execute(notebook, output: Path | None) -> None:
    """Runs a copy of the notebook, with what it prints shown as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / NOTEBOOK.name
        nbformat.write(notebook, copy)
        os.environ["CROWDGUARD_NOTEBOOK"] = str(copy)  # so that the copy's settings reach the envoys
        if not output:  # an export leaves the results of earlier runs where they are
            os.environ["CROWDGUARD_RESULTS"] = folder
        if output:  # two of these at once must not share a workspace
            os.environ.setdefault("CROWDGUARD_WORKSPACE", str(Path(folder) / "workspace" / "generated_workspace"))
        try:
            running = output and output.with_suffix(".failed.ipynb")  # an earlier result stays until there is a new one
            first = next((i for i, cell in enumerate(notebook.cells) if tagged(cell, "terminal")), 0)
            console = Console(sys.stdout, cells=first)
            shown = {
                "stdout_file": console,
                "stderr_file": Console(sys.stderr, shown=True),
                "on_cell_start": console.begin,
            }
            quiet = {"progress_bar": False, "extra_arguments": ["--log-level=CRITICAL"]}  # of the kernel
            whole = {"coalesce_streams": True}  # or chance decides which lines of a cell are one output
            papermill.execute_notebook(copy, running, cwd=NOTEBOOK.parent, **shown, **quiet, **whole)
        except papermill.PapermillExecutionError as error:
            words = OPENFL.sub("", f"{error.ename}: {error.evalue}")
            raise SystemExit(f"{words}\nsee In [{error.exec_count}] of {running or NOTEBOOK}") from None
        except (KeyboardInterrupt, DeadKernelError):  # on Ctrl-C nbclient ends the kernel, which stops the run
            words = "the notebook's kernel has ended, by Ctrl-C or for want of memory"
            raise SystemExit(f"{words}: {how_it_goes_on(output.parent)}" if output else words) from None
        except OSError as error:  # of papermill, which saves after every cell
            raise SystemExit(f"{error}: {how_it_goes_on(output.parent)}" if output else str(error)) from None
    if running:
        running.replace(output)


def assert_federation(resume: str, config) -> None:
    """`SystemExit` with one line if the run could not begin, which is told before the minute of explanations."""
    from experimenter.connect import connect

    try:
        connect(resume, config=config)
    except ConnectionError as error:
        raise SystemExit(str(error)) from None


def again(args) -> str:
    """The command with which this run goes on, but for the run's name at its end."""
    changes = itertools.chain.from_iterable(("--set", change) for change in args.set)
    options = "--config", args.config, *changes, "--results", str(args.results), "--resume"
    return shlex.join([sys.executable, sys.argv[0], *options]) + " "


def how_it_goes_on(results: Path) -> str:
    """What to say of a run that was stopped."""
    from experimenter.connect import goes_on

    history = results / "history.json"
    reached = json.loads(history.read_text()) if history.exists() else {"federation": []}
    rounds = len(reached["federation"])
    return f"stopped after round {rounds}, {goes_on(reached['run'])}" if rounds else "stopped before the first round"


def claim(results: Path) -> FileLock:
    """Keeps the folder for this run; `SystemExit` if it is another one's."""
    lock = FileLock(results / ".lock")
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise SystemExit(f"{results} is another run's, which goes on: choose another (RESULTS=…, --results)") from None
    except OSError as error:
        raise SystemExit(f"{results}: {error.strerror}: choose another folder (RESULTS=…, --results)") from None
    return lock


def show(history: Path) -> None:
    from experimenter.results import table

    rows = table(json.loads(history.read_text())["federation"])
    print(rows.round(3).to_string(na_rep="-"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=("demo", "published"), default="demo", help="the notebook's named settings")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one field of them")
    parser.add_argument("--results", type=Path, default=Path(os.environ.get("CROWDGUARD_RESULTS", "results")))
    parser.add_argument(
        "--resume", default=os.environ.get("CROWDGUARD_RESUME", ""), metavar="RUN", help="go on with it"
    )
    parser.add_argument("--export", action="store_true", help="only write generated_workspace/")
    parser.add_argument("--check", action="store_true", help="only look whether a run could begin")
    args = parser.parse_args()
    os.environ["CROWDGUARD_RESUME"] = args.resume
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the cores from other processes
    warnings.filterwarnings("ignore", module="(.*/)?metaflow")  # OpenFL's dependencies on their own age, here
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:metaflow.metaflow_config")  # and in the kernel
    for place in ("CROWDGUARD_CERTIFICATES", "CROWDGUARD_ENVOYS", "CROWDGUARD_WORKSPACE"):
        if place in os.environ:  # the notebook runs in its own folder, not in the caller's
            os.environ[place] = str(Path(os.environ[place]).resolve())
    if twice := [name for name, count in Counter(text.partition("=")[0] for text in args.set).items() if count > 1]:
        raise SystemExit(f"{twice[0]} {WHERE}: is given twice")
    notebook = with_settings(nbformat.read(NOTEBOOK, as_version=4), args.config, [parse_change(t) for t in args.set])
    config = check(notebook)
    given = {text.partition("=")[0] for text in args.set}
    if config.aggregation != "CrowdGuard" and (idle := given & INSPECTION):
        raise SystemExit(f"{min(idle)} {WHERE}: does nothing with aggregation={config.aggregation}: nobody inspects")
    try:
        check_exports(notebook)
    except ValueError as error:
        raise SystemExit(f"{NOTEBOOK.name}: {error}") from None
    if args.export:
        notebook.cells = [cell for cell in notebook.cells if exported(cell) or tagged(cell, "workspace")]
        execute(notebook, None)
        from experimenter.export import WORKSPACE

        print(f"written to {WORKSPACE}")
        return
    args.results = args.results.resolve()
    lock = claim(args.results)  # noqa: F841 (as long as this process lives)
    if args.check:
        return
    assert_federation(args.resume, config)
    os.environ.setdefault("CROWDGUARD_AGAIN", again(args))
    from experimenter.results import set_aside  # late, as all that takes seconds: a wrong setting is told at once

    set_aside(args.results, args.resume)
    os.environ["CROWDGUARD_RESULTS"] = str(args.results)
    output = args.results / NOTEBOOK.name
    print("the notebook explains and tries its functions first, which takes a minute", flush=True)
    execute(notebook, output)
    from experimenter.report import write_report

    show(args.results / "history.json")
    try:
        report = write_report(output)
    except OSError as error:
        raise SystemExit(f"there is no report: {error}") from None
    print(f"Report: {report}; model, history and figures are beside it")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
