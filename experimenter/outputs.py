"""Puts the outputs of an executed notebook into FederatedCrowdGuard.ipynb, without what changes from run to run.

    python experimenter/outputs.py results/FederatedCrowdGuard.ipynb

`make notebook` calls it. The notebook then knows of which code they are (`outputs_of` in its metadata), so that a test
can tell outputs that are older than the cells.
"""

import hashlib
import re
import sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).parent.parent))

from experimenter.run import NOTEBOOK, without_noise

# Lines that differ from run to run, or speak of this machine.
FLEETING = re.compile(r".*\(\d+ s\)$|run run-\w+ at |no director|/")


def code_hash(notebook) -> str:
    sources = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(sources.encode()).hexdigest()


def lasting(output):
    """The output as it is kept; None if nothing is left of it."""
    if output.output_type == "stream":
        lines = without_noise(output.text).splitlines()
        output.text = "".join(f"{line}\n" for line in lines if not FLEETING.match(line))
        return output if output.text and output.name == "stdout" else None
    if output.output_type == "execute_result":
        output.execution_count = None
    if len(output.get("data", {})) > 1:  # what is a picture or a table needs no words for it
        output.data.pop("text/plain", None)
    return output


def transplant(executed, notebook):
    """The notebook with the outputs of the executed one, cell by cell.

    Raises: `SystemExit` if their cells are not the same.
    """
    if code_hash(executed) != code_hash(notebook):
        raise SystemExit("the executed notebook has other cells: run it as it is, without --set")
    for cell, run in zip(notebook.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = [kept for output in run.outputs if (kept := lasting(output))]
            cell.execution_count = None
    notebook.metadata["outputs_of"] = code_hash(notebook)
    return notebook


def main():
    executed, notebook = (nbformat.read(path, as_version=4) for path in (sys.argv[1], NOTEBOOK))
    text = nbformat.writes(transplant(executed, notebook), version=4, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text.rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
