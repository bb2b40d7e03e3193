"""The workspace: what director and envoys receive of the notebook."""

import contextlib
import io
import os
import shutil
import uuid
from pathlib import Path

import nbformat
from openfl.experimental.workflow.notebooktools import NotebookTools

from envoy.channel import PROTOCOL
from experimenter.cells import check_exports

ROOT = Path(__file__).parent.parent
NOTEBOOK = os.environ.get("CROWDGUARD_NOTEBOOK", str(ROOT / "FederatedCrowdGuard.ipynb"))
WORKSPACE = Path(os.environ.get("CROWDGUARD_WORKSPACE", "generated_workspace")).resolve()
AGGREGATOR_PORT = int(os.environ.get("CROWDGUARD_AGGREGATOR_PORT", 50052))


class Workspace(NotebookTools):
    """Plan, code, and the requirements of a participant's machine."""

    def _generate_requirements(self):
        shutil.copy(ROOT / "envoy" / "requirements.txt", self.output_workspace_path / "requirements.txt")

    def _build_plan_config(self, *args):
        plan = super()._build_plan_config(*args)
        plan["network"]["settings"]["agg_port"] = AGGREGATOR_PORT
        # Its own number, since OpenFL knows an aggregator by its plan: who is late must not go on in the next one.
        plan["contract"] = {"protocol": PROTOCOL, "run": self.run, "resume": self.resume, "number": uuid.uuid4().hex}
        return plan


def export_workspace(director: str, run: str, resume: bool = False) -> tuple[Path, str]:
    """Writes the workspace of a run for a director at `host:port`, and an archive; returns that and the flow's name.

    Raises: `ValueError` as by `check_exports`.
    """
    check_exports(nbformat.read(NOTEBOOK, as_version=4))
    with contextlib.redirect_stdout(io.StringIO()):  # OpenFL lists its own template
        workspace = Workspace(NOTEBOOK, WORKSPACE)
        workspace.run, workspace.resume = run, resume
        archive, name = workspace.export(director.rpartition(":")[0], tls=True)
    return Path(archive), name
