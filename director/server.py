"""OpenFL's director, which knows certificates by name and goes on after an experiment that it cannot run."""

import asyncio
import contextlib
import functools
import importlib
import json
import logging
import os
import socket
import sys
import threading
import time
import zipfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

import checkpoints
import grpc
import yaml
from aggregator import CHANNEL, CHUNK, PROTOCOL, Aggregator, Callers, Server, State, common_name, instance_of
from grpc import aio
from openfl.experimental.workflow.component.director import director, experiment
from openfl.experimental.workflow.federated import Plan
from openfl.experimental.workflow.protocols import director_pb2, director_pb2_grpc
from openfl.experimental.workflow.transport import DirectorGRPCServer
from openfl.protocols import base_pb2

log = logging.getLogger(__name__)

POLL = 0.2  # seconds
GOODBYE = 30  # seconds in which participants may ask whether it is over, before the next experiment starts without it
KEPT = 4  # results of so many experiments can still be fetched
RESERVED = ("ca", "director", "experimenter", "aggregator")  # certificates of these names take no part
OURS = {"protocol": str(PROTOCOL), "openfl": version("openfl")}  # what everybody who calls says of itself


async def until(condition, seconds: float = float("inf")) -> bool:
    """Waits until the condition holds; returns whether it does when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(POLL)
    return condition()


# --- The door -----------------------------------------------------------------------------------------------------


class Door(DirectorGRPCServer):
    """The director's server: whoever calls is known by the certificate and answered in that name alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.callers, self.impostors = Callers(), set()

    @contextlib.asynccontextmanager
    async def require(self, name: str, context, joins: bool = False):
        """The time of a call; ends it unless it comes from software that fits, and with this name's certificate."""
        caller, place = self.get_caller(context), unquote(context.peer())
        await context.send_initial_metadata(tuple(OURS.items()))
        said = {key: value for key, value in context.invocation_metadata() or () if key in OURS}
        if said != OURS:
            words = misfit(said)
            self.director.refused[caller] = words
            log.warning("%s at %s is refused: %s", caller or "somebody", place, words)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, words)
        self.director.refused.pop(caller, None)
        if caller != name or not caller:  # a certificate may lack a common name
            if name and caller not in self.impostors:  # not just a greeting, nor again and again
                self.impostors.add(caller)
                log.warning("%s at %s has called in the name of %r", caller or "somebody", place, name[:50])
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"this is for the certificate of {name[:50]} alone")
        instances = self.director.instances
        if joins:  # the newest wins
            instances[name] = instance_of(context)
        if instances.get(name, instance_of(context)) != instance_of(context):
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"another machine has joined as {name} since")
        async with self.callers.admit(caller, context):
            yield

    def get_caller(self, context) -> str:
        return common_name(context)

    async def EnvoyConnectionRequest(self, request, context):  # noqa: N802
        if request.envoy_name.lower() in RESERVED:
            words = f"{request.envoy_name} is no participant's name: an envoy needs a certificate of its own"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, words)
        async with self.require(request.envoy_name, context, joins=True):
            return super().EnvoyConnectionRequest(request, context)

    async def UpdateEnvoyStatus(self, request, context):  # noqa: N802
        async with self.require(request.name, context):
            return await super().UpdateEnvoyStatus(request, context)

    async def WaitExperiment(self, request, context):  # noqa: N802
        async with self.require(request.collaborator_name, context):
            return await super().WaitExperiment(request, context)

    async def GetExperimentData(self, request, context):  # noqa: N802
        async with self.require(request.collaborator_name, context):
            known = self.director.experiments_registry.get(request.experiment_name)
            if known is None or request.collaborator_name not in known.collaborators or not known.archive_path.exists():
                await context.abort(grpc.StatusCode.NOT_FOUND, "no such experiment, or not yours, or it is over")
            async for part in super().GetExperimentData(request, context):
                yield part

    async def GetEnvoys(self, request, context):  # noqa: N802
        async with self.require("experimenter", context):
            await self.check_wish(dict(context.invocation_metadata()), context)
            answer = await super().GetEnvoys(request, context)
            refused = self.director.refused.items()
            answer.envoy_infos.extend(
                director_pb2.EnvoyInfo(envoy_name=n, experiment_name=words) for n, words in refused
            )
            return answer

    async def check_wish(self, asked: dict, context) -> None:
        """Ends the call if the settings do not do, or nothing is kept by them of the run that shall go on."""
        try:
            now = dict(json.loads(asked.get("settings", "{}")))
            if "participant_timeout" in now:
                check_heartbeats(float(now["participant_timeout"]), self.director.envoy_health_check_period)
            if run := asked.get("resume"):
                state, _ = await asyncio.to_thread(checkpoints.load, checkpoints.folder_of(self.director.runs, run))
                kept = state.get("settings", {})
                check_settings(kept, {name: value for name, value in now.items() if name in kept})
        except (OSError, RecursionError, TypeError, ValueError) as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))

    async def SetNewExperiment(self, stream, context):  # noqa: N802
        async with self.require("experimenter", context):
            return await super().SetNewExperiment(stream, context)

    async def GetExperimentStdout(self, request, context):  # noqa: N802
        """What the notebook is told, from the line on that the metadata names: it may have lost us before."""
        async with self.require("experimenter", context):
            known = await self.find(request.experiment_name, context)
            told = int(dict(context.invocation_metadata()).get("from", 0))
            while await until(functools.partial(known.has_news, told)) and len(known.said) > told:
                yield director_pb2.GetExperimentStdoutResponse(**known.said[told])
                told += 1

    async def GetFlowState(self, request, context):  # noqa: N802
        """The state of the experiment that the metadata names: first a message of JSON, then the model's bytes.

        The metadata may also ask for the experiment's end.
        """
        async with self.require("experimenter", context):
            wish = dict(context.invocation_metadata())
            known = await self.find(wish.get("experiment", ""), context)
            if "stop" in wish:
                known.stop("stopped by the experimenter")
            await until(lambda: known.state)
            model, head = known.state.model, asdict(known.state) | {"model": len(known.state.model)}
            await context.write(base_pb2.DataStream(npbytes=json.dumps(head).encode()))
            for begin in range(0, len(model), CHUNK // 2):
                await context.write(base_pb2.DataStream(npbytes=model[begin : begin + CHUNK // 2]))

    async def find(self, name: str, context):
        if known := self.director.experiments_registry.get(name):
            return known
        return await context.abort(
            grpc.StatusCode.NOT_FOUND, f"there is no experiment {name}: was the director restarted?"
        )

    async def _run_server(self):
        key, certificate, root = (f.read_bytes() for f in (self.private_key, self.certificate, self.root_certificate))
        self.server = aio.server(options=CHANNEL)
        director_pb2_grpc.add_DirectorServicer_to_server(self, self.server)
        credentials = grpc.ssl_server_credentials(((key, certificate),), root, require_client_auth=True)
        self.server.add_secure_port(self.listen_uri, credentials)
        await self.server.start()
        log.info("Listening on %s", self.listen_uri)
        await self.server.wait_for_termination()


def misfit(said: dict) -> str:
    """Why software that says this of itself does not fit."""
    theirs = {key: said.get(key, "unknown")[:20] for key in OURS}
    differing = [f"{key} {theirs[key]}, not {ours}" for key, ours in OURS.items() if said.get(key) != ours]
    return f"it has {' and '.join(differing)}, which the director has: update the older of the two and restart it"


# --- Experiments --------------------------------------------------------------------------------------------------


class Clock:
    """Seconds in which this process could hear somebody. It stands still while the process does, be it stopped, asleep
    with its machine, or busy with the import of an experiment: in that time nobody else is silent."""

    LAP = 1  # seconds, the most that one lap counts

    def __init__(self):
        self.seconds = 0.0

    async def run(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(POLL)
            now = time.monotonic()
            self.seconds, last = self.seconds + min(now - last, self.LAP), now


class Director(director.Director):
    """Runs one experiment after the other and keeps what came of the last ones."""

    def __init__(self, runs: Path, **kwargs):
        super().__init__(**kwargs)
        self.refused = {}  # certificate's name → why; who comes again with the right software is not in it any more
        self.instances = {}  # participant → the process that has joined as it last
        self.runs, self.clock, self.heard = runs, Clock(), {}  # `heard`: participant → when its last heartbeat came

    async def set_new_experiment(self, experiment_name, sender_name, collaborator_names, experiment_archive_path):
        added = Experiment(
            name=experiment_name, archive_path=experiment_archive_path, collaborators=list(collaborator_names),
            users=[sender_name], sender=sender_name, director=self,
        )  # fmt: skip
        registry = self.experiments_registry
        if before := len(registry.pending) + (registry.active is not None):
            added.tell(f"{before} experiment(s) before this one; it waits for its turn")
        registry.add(added)
        return True

    async def start_experiment_execution_loop(self):
        await asyncio.gather(self.clock.run(), self.run_experiments())

    async def run_experiments(self) -> None:
        registry, ended = self.experiments_registry, []
        while True:
            await until(lambda: registry.pending)
            async with registry.get_next_experiment() as current:
                files = (self.root_certificate, self.certificate, self.private_key)
                await current.start(**dict(zip(("root_certificate", "certificate", "private_key"), files, strict=True)))
                ended.append(current.name)
            for name in ended[:-KEPT]:
                registry.remove(name)
            ended = ended[-KEPT:]

    async def wait_experiment(self, envoy_name):
        """The name of the experiment that runs with this envoy, as soon as there is one; also if it has left it."""
        await until(lambda: (active := self.experiments_registry.active) and active.wants(envoy_name))
        name = self.col_exp[envoy_name] = self.experiments_registry.active.name
        return name

    def ack_envoy_connection_request(self, envoy_name):
        self.heard[envoy_name] = self.clock.seconds
        return super().ack_envoy_connection_request(envoy_name)

    def update_envoy_status(self, *, envoy_name, is_experiment_running):
        period = super().update_envoy_status(envoy_name=envoy_name, is_experiment_running=is_experiment_running)
        self.heard[envoy_name] = self.clock.seconds
        return period

    def silence(self, participant: str) -> float:
        """Seconds since the participant's last heartbeat, or since the director has been started."""
        return self.clock.seconds - self.heard.get(participant, 0)


class Experiment(experiment.Experiment):
    """One that cannot be run ends with a state that says why. OpenFL's ends the director's loop, and the notebook waits
    for ever."""

    def __init__(self, director: Director, **kwargs):
        super().__init__(**kwargs)
        self.director, self.said, self.failed, self.stopped = director, [], None, None

    @property
    def state(self) -> State | None:
        """What came of it; None as long as it is not over."""
        return self.failed or (self.aggregator and self.aggregator.state)

    def has_news(self, told: int) -> bool:
        """Whether it is over, or there is more to tell than so many lines."""
        return self.state is not None or len(self.said) > told

    def tell(self, what: str | dict) -> None:
        """Tells the notebook a text, or a row of history."""
        kind, text = ("", what) if isinstance(what, str) else ("row", json.dumps(what))
        self.said.append({"stdout_origin": "aggregator", "task_name": kind, "stdout_value": text})

    def stop(self, reason: str) -> None:
        """Ends it, or does not begin it."""
        self.stopped = reason
        if self.aggregator:
            self.aggregator.stop(reason)
        else:
            self.failed = State(error=f"InterruptedError: {reason}")

    def wants(self, participant: str) -> bool:
        """Whether the participant should come: it is one, and has not been told that it is over."""
        return participant in self.collaborators and self.aggregator is not None and not self.aggregator.time_to_quit

    async def start(self, **certificates) -> None:
        try:
            if self.stopped:
                raise InterruptedError(self.stopped)
            plan = self.plan()
            check_protocol(plan)
            await until_free(plan["network"]["settings"]["agg_port"])
            if self.stopped:
                raise InterruptedError(self.stopped)
            await super().start(**certificates, install_requirements=False)  # nor are this machine's packages changed
        except (Exception, SystemExit) as error:  # its code may call exit
            self.status = experiment.Status.FAILED
            self.archive_path.unlink(missing_ok=True)
            if self.state is None:
                log.exception("%s could not be run", self.name)
                words = f"the director could not run the experiment: {type(error).__name__}: {error}"
                self.failed = State(error=words)

    def plan(self) -> dict:
        with zipfile.ZipFile(self.archive_path) as archive:
            return yaml.safe_load(archive.read(str(self.plan_path)))

    def _create_aggregator_grpc_server(self, *, tls, director_config, **certificates):
        plan = Plan.parse(plan_config_path=self.plan_path)
        flow, wish = load_flow(plan), plan.config["contract"]
        folder = checkpoints.folder_of(self.director.runs, wish["run"])
        if wish.get("resume"):
            state, flow.current = checkpoints.load(folder)
            flow.history = resumed(state, flow)
            self.tell(f"{len(flow.history)} rounds of {wish['run']} are done")
            if new := sorted({*self.collaborators} - {*state["participants"]}):
                self.tell(f"it goes on with {', '.join(new)}, who was not in it before")
            if away := sorted({*state["participants"]} - {*self.collaborators}):
                self.tell(f"it goes on without {', '.join(away)}, until they are there")
            # Who is not back yet comes later.
            self.collaborators = sorted({*self.collaborators, *state["participants"]})
        check_heartbeats(flow.config.participant_timeout, self.director.envoy_health_check_period)
        settings = {"settings": flow.settings(), "participants": self.collaborators}

        def keep(history, model):
            checkpoints.save(folder, len(history), settings | {"history": history}, model)

        self.aggregator = Aggregator(flow, self.collaborators, plan, self.director.silence, self.tell, keep)
        for row in flow.history:
            self.tell(row)
        port = plan.config["network"]["settings"]["agg_port"]
        server = Server(self.aggregator, port, certificates, self.director.instances)
        server.bind()  # before the flow begins: a port that is taken is an error of its own
        return server

    async def _run_aggregator_grpc_server(self, server):
        aggregator = server.aggregator
        await server.server.start()
        try:
            await until(lambda: aggregator.state)
            if await until(lambda: all(self.knows(name) for name in self.collaborators), GOODBYE):
                await asyncio.sleep(1)  # the last one is just being told
        finally:
            await server.server.stop(0)
        if aggregator.state.error:
            raise RuntimeError(aggregator.state.error)  # or OpenFL would log a success

    def knows(self, participant: str) -> bool:
        """Whether the participant has been told that it is over, or is not there."""
        silent = self.director.silence(participant) > 2 * self.director.envoy_health_check_period
        return silent or participant in self.aggregator.quit_job_sent_to


def resumed(state: dict, flow) -> list:
    """The history of a run that is kept; `ValueError` if the flow's settings are not those that it was made with."""
    check_settings(state["settings"], json.loads(json.dumps(flow.settings())))
    return state["history"]


def check_settings(kept: dict, now: dict) -> None:
    """`ValueError` if a setting, name → value, is not what it was in the run that shall go on."""
    for name, value in now.items():
        if name not in kept:
            raise ValueError(f"the run that shall go on was kept by a version that knows no {name}: start a new one")
        if kept[name] != value:
            words = f"{name} {kept[name]!r}, not {value!r}"
            raise ValueError(f"the run that shall go on has {words}: choose the same settings")


def check_protocol(plan: dict) -> None:
    """`ValueError` if the experiment was made for another protocol than this director's."""
    number = (plan.get("contract") or {}).get("protocol")
    if number != PROTOCOL:
        raise ValueError(f"the notebook speaks protocol {number}, the director {PROTOCOL}: update the older of the two")


def check_heartbeats(timeout: float, period: float) -> None:
    """`ValueError` if participants would be given up between two heartbeats."""
    if not timeout >= 2 * period:  # nor if it is no number
        words = f"heartbeats come every {period} s (envoy_health_check_period in the director's YAML)"
        raise ValueError(f"participant_timeout is {timeout:g} s, and {words}: it must be at least twice that")


def load_flow(plan):
    """The flow of the experiment whose workspace is the current folder, from its own `src`: each has another one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    module, _, name = plan.config["federated_flow"]["template"].rpartition(".")
    return getattr(importlib.import_module(module), name)()


# --- What gRPC's core says ----------------------------------------------------------------------------------------

HANDSHAKES = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate has expired or is not signed by our CA",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it has no certificate",
    "WRONG_VERSION_NUMBER": "it speaks no TLS",
    "HTTP_REQUEST": "it speaks no TLS",
}


def translate_handshakes() -> None:
    """From now on says in our words what gRPC's core writes to standard error when a handshake fails.

    Whose it was gRPC tells nobody.
    """
    ours, (reading, writing) = os.fdopen(os.dup(2), "w", buffering=1), os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = ours

    def read():
        for line in os.fdopen(reading, errors="replace"):
            if "Handshake failed" in line:
                code = line.rpartition("OPENSSL_internal:")[2].strip(" .\n").partition(":")[0]  # newer ones say more
                log.warning("somebody was refused at the door: %s", HANDSHAKES.get(code, f"{code} in the handshake"))
            else:
                ours.write(line)

    threading.Thread(target=read, daemon=True).start()


# --- Ports --------------------------------------------------------------------------------------------------------


def check_port(port: int) -> None:
    """Raises `OSError` if the port is in use."""
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
        await asyncio.sleep(POLL)


def serve(config: dict, files: dict[str, Path], runs: Path) -> None:
    """Runs until it is interrupted. `files` is part → certificate or key; what runs lead to is kept in `runs`."""
    server = Door(
        director_cls=Director,
        root_certificate=files["ca.crt"],
        certificate=files["director.crt"],
        private_key=files["director.key"],
        listen_host="[::]" if socket.has_dualstack_ipv6() else "0.0.0.0",
        listen_port=config["port"],
        envoy_health_check_period=config["envoy_health_check_period"],
        runs=runs,
    )
    server.start()
