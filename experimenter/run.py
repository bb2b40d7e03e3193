"""Executes the notebook and keeps what comes of it in `results/`.

    python experimenter/run.py --config published --set rounds=2

`make run` calls this beside a local federation. With `--export` it only writes `generated_workspace/`.
"""

import argparse
import json
import logging
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pandas as pd
import papermill
from nbconvert import HTMLExporter

NOTEBOOK = Path(__file__).parent.parent / "FederatedCrowdGuard.ipynb"


def tagged(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def exported(cell) -> bool:
    return cell.cell_type == "code" and re.match(r"#\s*\|\s*(default_exp|export)", cell.source) is not None


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
    if not (equals and key.isidentifier()):
        raise SystemExit(f"--set {text}: must be name=value, as in rounds=2")
    try:
        return f"{key}={json.loads(value)!r}"
    except json.JSONDecodeError:
        return f"{key}={value!r}"


def worth_showing(record) -> bool:
    """What the notebook printed, without papermill's own words on every cell."""
    message = record.getMessage()
    return bool(message.strip()) and not re.match(r"(Executing|Ending) Cell|<Figure|(In|Out)put Notebook:", message)


def execute(notebook, output: Path | None) -> None:
    """Runs a copy of the notebook, with what it prints shown as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / NOTEBOOK.name
        nbformat.write(notebook, copy)
        os.environ["CROWDGUARD_NOTEBOOK"] = str(copy)  # so that the copy's settings reach the envoys
        if output:  # two of these at once must not share a workspace
            os.environ.setdefault("CROWDGUARD_WORKSPACE", str(Path(folder) / "workspace" / "generated_workspace"))
        try:
            running = output and output.with_suffix(".failed.ipynb")  # an earlier result stays until there is a new one
            papermill.execute_notebook(copy, running, cwd=NOTEBOOK.parent, log_output=True, progress_bar=False)
        except papermill.PapermillExecutionError as error:
            raise SystemExit(
                f"cell {error.cell_index}: {error.ename}: {error.evalue}\nsee {running or NOTEBOOK}"
            ) from None
    if running:
        running.replace(output)


def show(history: Path) -> None:
    rows = pd.DataFrame(json.loads(history.read_text())["federation"]).set_index("round")
    rows["excluded"] = rows["excluded"].map(lambda names: ", ".join(names) or "-")
    print(rows[["main_accuracy", "backdoor_accuracy", "excluded", "tpr", "tnr"]].round(3).to_string(na_rep="-"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=("demo", "published"), default="demo", help="the notebook's named settings")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one field of them")
    parser.add_argument("--results", type=Path, default=Path(os.environ.get("CROWDGUARD_RESULTS", "results")))
    parser.add_argument("--resume", default="", metavar="RUN", help="go on with a run that did not come to its end")
    parser.add_argument("--export", action="store_true", help="only write generated_workspace/")
    args = parser.parse_args()
    os.environ["CROWDGUARD_RESUME"] = args.resume
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").addFilter(worth_showing)
    for place in ("CROWDGUARD_CERTIFICATES", "CROWDGUARD_ENVOYS", "CROWDGUARD_WORKSPACE"):
        if place in os.environ:  # the notebook runs in its own folder, not in the caller's
            os.environ[place] = str(Path(os.environ[place]).resolve())
    notebook = with_settings(nbformat.read(NOTEBOOK, as_version=4), args.config, [parse_change(t) for t in args.set])
    if args.export:
        notebook.cells = [cell for cell in notebook.cells if exported(cell) or tagged(cell, "workspace")]
        execute(notebook, None)
        return
    args.results = args.results.resolve()
    args.results.mkdir(parents=True, exist_ok=True)
    os.environ["CROWDGUARD_RESULTS"] = str(args.results)
    output = args.results / NOTEBOOK.name
    execute(notebook, output)
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(output, as_version=4))
    output.with_suffix(".html").write_text(html)
    show(args.results / "history.json")
    print(
        f"results: {output}, {output.with_suffix('.html')}, {args.results / 'history.json'} and the figures beside them"
    )


if __name__ == "__main__":
    main()
