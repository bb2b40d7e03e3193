"""OpenFL's director, which knows certificates by name and goes on after an experiment that it cannot run."""

import asyncio
import logging
import queue
import socket
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import grpc
import yaml
from openfl.experimental.workflow.component.director import director, experiment
from openfl.experimental.workflow.transport import DirectorGRPCServer

log = logging.getLogger(__name__)


class Gate(DirectorGRPCServer):
    """The director's server, which lets nobody pass for somebody else: OpenFL looks at no certificate's name."""

    async def require(self, name, context):
        if self.get_caller(context) != name:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"this is for the certificate of {name} alone")

    async def EnvoyConnectionRequest(self, request, context):
        await self.require(request.envoy_name, context)
        return super().EnvoyConnectionRequest(request, context)

    async def SetNewExperiment(self, stream, context):
        await self.require("experimenter", context)
        return await super().SetNewExperiment(stream, context)

    async def GetFlowState(self, request, context):
        await self.require("experimenter", context)
        return await super().GetFlowState(request, context)


class Experiment(experiment.Experiment):
    """One that cannot be run ends with a flow state that says why. OpenFL's ends the director's loop, and the notebook
    waits for ever."""

    async def start(self, **kwargs):
        ticket = None
        try:
            forget_last_code()
            plan = self.plan()
            ticket = plan["federated_flow"]["settings"]["ticket"]  # by which the notebook knows its own experiment
            await until_free(plan["network"]["settings"]["agg_port"])
            return await super().start(**kwargs)
        except (Exception, SystemExit) as error:  # its code may call exit
            log.exception("%s could not be run", self.name)
            self.status, self.aggregator = experiment.Status.FAILED, NoAggregator()
            words = f"the director could not run the experiment: {type(error).__name__}: {error}"
            return False, SimpleNamespace(ticket=ticket, history=[], error=words)

    def plan(self) -> dict:
        with zipfile.ZipFile(self.archive_path) as archive:
            return yaml.safe_load(archive.read(str(self.plan_path)))


def forget_last_code() -> None:
    """The package `src` is another one in every experiment, in another folder."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


class NoAggregator:
    """What the notebook reads from when there is nothing to read, and envoys ask whether they are late."""

    current_round = rounds_to_train = 0

    def __init__(self):
        self.stdout_queue = queue.Queue()

    def all_quit_jobs_sent(self):
        return True


class Director(director.Director):
    """Tells envoys of an experiment when it runs, and not of those that could not be run or are over."""

    async def wait_experiment(self, envoy_name):
        while True:
            name = await super().wait_experiment(envoy_name)
            known = self.experiments_registry[name]
            while not known.aggregator:
                await asyncio.sleep(0.1)
            if known.status is experiment.Status.IN_PROGRESS:
                return name


class ShortNaps:
    """asyncio for OpenFL's director, which looks every ten seconds whether an experiment has come or ended."""

    def __getattr__(self, name):
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds):
        await asyncio.sleep(min(seconds, 1))


def check_port(port: int) -> None:
    """Raises `OSError` if the port is in use: gRPC would share it with its owner."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise OSError(f"port {port} cannot be used: {error}") from None


async def until_free(port: int, patience: float = 5) -> None:
    """`check_port`, with time for the last experiment's aggregator to let it go."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return check_port(port)
        except OSError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)


def serve(path: Path, config: dict, files: dict[str, Path]) -> None:
    """Runs until it is interrupted. `path` is the file that holds the config, `files` part → certificate or key."""
    # It says every second what it waits for; the experiment itself says so every ten.
    logging.getLogger("openfl.experimental.workflow.component.aggregator").setLevel(logging.WARNING)
    director.asyncio = experiment.asyncio = ShortNaps()
    director.Experiment = Experiment
    server = Gate(
        director_cls=Director,
        director_config=path.absolute(),
        root_certificate=files["ca.crt"],
        certificate=files["director.crt"],
        private_key=files["director.key"],
        listen_host="[::]" if socket.has_dualstack_ipv6() else "0.0.0.0",
        listen_port=config["port"],
        envoy_health_check_period=config["envoy_health_check_period"],
        install_requirements=False,  # an experiment does not change this machine's packages
    )
    server.start()
