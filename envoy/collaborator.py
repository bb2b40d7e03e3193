"""OpenFL's envoy, and the collaborator that it runs in every experiment, for flows that send data and never code.

What comes from the aggregator is read by the flow itself (`take_task`), whose code came with the experiment; what goes
back are the bytes that its step has left in `report`. The contract is written down in director/aggregator.py.
"""

import importlib
import logging
import os
import re
import sys
import time
from pathlib import Path

import grpc
from channel import PROTOCOL, Identity, open_channel
from memory import check_settings, keep, recall
from openfl.experimental.workflow.component.envoy import envoy
from openfl.experimental.workflow.federated import Plan
from openfl.experimental.workflow.protocols import aggregator_pb2, aggregator_pb2_grpc, director_pb2, director_pb2_grpc
from openfl.experimental.workflow.runtime import FederatedRuntime
from openfl.experimental.workflow.transport.grpc.director_client import EnvoyDirectorClient
from openfl.protocols.utils import datastream_to_proto, proto_to_datastream
from openfl.utilities.workspace import ExperimentWorkspace

log = logging.getLogger(__name__)

TRIES = 30  # in a row to reach the aggregator, a second apart
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
PAUSE = 5  # seconds, after something has gone wrong


class AggregatorClient:
    """What a participant asks the aggregator of an experiment."""

    def __init__(self, name: str, plan, identity: Identity):
        network = plan.config["network"]["settings"]
        self.address = f"{network['agg_addr']}:{network['agg_port']}"
        self.identity = identity
        self.connect()
        self.header = aggregator_pb2.MessageHeader(
            sender=name, receiver=plan.aggregator_uuid, federation_uuid=plan.federation_uuid
        )

    def connect(self) -> None:
        self.stub = aggregator_pb2_grpc.AggregatorStub(open_channel(self.address, self.identity))

    def get_task(self):
        """The next task, or the same again if it has not been answered."""
        request = aggregator_pb2.GetTasksRequest(header=self.header)
        return self.insist(lambda: datastream_to_proto(aggregator_pb2.GetTasksResponse(), self.stub.GetTasks(request)))

    def answer(self, number: int, report: bytes, failure: str = "") -> None:
        """Answers the task of this number; OpenFL's field for the next step says why there is no report."""
        request = aggregator_pb2.TaskResultsRequest(
            header=self.header, round_number=number, execution_environment=report, next_step=failure
        )
        self.insist(lambda: self.stub.SendTaskResults(proto_to_datastream(request)))

    def insist(self, call):
        """Calls until the aggregator answers.

        Raises: `ConnectionError` if it does not, or does not want to.
        """
        for _ in range(TRIES):
            try:
                return call()
            except grpc.RpcError as error:
                give_way(error)
                if error.code() not in PASSING:
                    raise ConnectionError(f"the aggregator at {self.address} refuses: {error.details()}") from None
                log.info("no answer from the aggregator at %s: %s", self.address, error.details())
                time.sleep(1)
                self.connect()
        raise ConnectionError(f"no aggregator at {self.address}")


def give_way(error: grpc.RpcError) -> None:
    """Ends this process if another machine has joined under its name."""
    if error.code() is grpc.StatusCode.ALREADY_EXISTS:
        log.error("%s: this one ends", error.details())
        os._exit(1)


class Collaborator:
    """Takes the steps of an experiment's flow that are its participants'.

    Args:
        new_flow: makes a flow.
        private: the participant's private attributes, which a flow finds on itself; or a text that says why there are
            none, which is then the answer to every task.
        folder: where it keeps what it remembers over the rounds, `memory["past"]`.
    """

    def __init__(self, name: str, client: AggregatorClient, new_flow, private: dict | str, folder: Path):
        self.name, self.client, self.new_flow, self.private, self.folder = name, client, new_flow, private, folder
        self.recalled = None

    def run(self) -> None:
        """Asks for tasks and answers them until the experiment is over."""
        while not (task := self.client.get_task()).quit:
            number, step = task.round_number, task.function_name
            if not step:
                continue  # the aggregator has made us wait already
            log.info("task: %s", step)
            try:
                flow = self.read(task)
                del task  # up to all the others' models
                self.take(flow, step)
                report, failure = flow.report, ""
            except Exception as error:
                log.exception("%s failed", step)
                report, failure = b"", f"{step}: {type(error).__name__}: {error}"
            self.client.answer(number, report, failure)
        log.info("The experiment is over.")

    def read(self, task):
        """The flow that is ready for the task's step."""
        if isinstance(self.private, str):
            raise RuntimeError(self.private)
        flow = self.new_flow()
        flow.after(task.function_name)  # or it is no step of a participant
        flow.take_task(task.execution_environment)
        flow.input, flow.runtime = self.name, FederatedRuntime()
        vars(flow).update(self.private)
        return flow

    def take(self, flow, step: str) -> None:
        """Takes a step; what is remembered since is on the disk before it is answered."""
        memory, round = self.private["memory"], flow.task.round
        if memory.get("past") is self.recalled:  # nothing of its own since it was started
            memory["past"] = self.recalled = recall(self.folder, round)
        before = memory["past"]
        getattr(flow, step)()
        if memory["past"] is not before:
            keep(self.folder, memory["past"], round)


class DirectorClient(EnvoyDirectorClient):
    """Speaks to the director as one that says what it is, and takes the whole experiment at once: OpenFL tries again
    after an error, which later would end the envoy."""

    def __init__(self, address: str, name: str, identity: Identity):
        self.envoy_name, self.address, self.identity = name, address, identity
        self.period = PAUSE  # seconds from one heartbeat to the next; the director says how many
        self.connect()

    def connect(self) -> None:
        """Opens a new channel: the one that was broken may sit in gRPC's back-off for minutes."""
        self.stub = director_pb2_grpc.DirectorStub(open_channel(self.address, self.identity))

    def connect_envoy(self, envoy_name):
        request = director_pb2.SendConnectionRequest(envoy_name=envoy_name)
        try:
            return self.stub.EnvoyConnectionRequest(request).accepted
        except grpc.RpcError as error:
            raise ConnectionError(error.details()) from None

    def get_experiment_data(self, experiment_name):
        return list(super().get_experiment_data(experiment_name))

    def send_health_check(self, envoy_name, is_experiment_running):
        """A heartbeat; returns the seconds to the next one, half as many if this one is lost: two periods without any
        may be too long, see `check_heartbeats` at the director."""
        status = director_pb2.UpdateEnvoyStatusRequest(name=envoy_name, is_experiment_running=is_experiment_running)
        half = self.period / 2
        try:
            answer = self.stub.UpdateEnvoyStatus(status, timeout=max(1, half))
            self.period = answer.health_check_period.seconds
            return self.period
        except grpc.RpcError as error:
            give_way(error)
            try:
                if error.code() is grpc.StatusCode.NOT_FOUND:  # the director has been restarted
                    self.connect_envoy(envoy_name)
                    return 0  # it waits for a heartbeat already
                self.connect()
            except OSError as trouble:  # it does not want us, or our certificates are not there: not the end
                log.warning("no heartbeat: %s", trouble)
            return half


class Participant(envoy.Envoy):
    """An envoy that takes part with what `bring()` returns: the participant's private attributes.

    Args:
        runs: folder in which it keeps, under its name, what it remembers over the rounds.
        settings: what must be the same when a run goes on, name → value or section.
    """

    def __init__(self, name: str, address: str, identity: Identity, bring, runs: Path, settings: dict):
        self.address, self.identity, self.bring, self.runs = address, identity, bring, runs.absolute()
        self.settings = settings
        host, _, port = address.rpartition(":")
        super().__init__(
            envoy_name=name, director_host=host, director_port=int(port), root_certificate=identity.ca,
            certificate=identity.certificate, private_key=identity.key,
            install_requirements=False,  # an experiment does not change this machine's packages
        )  # fmt: skip

    def _create_envoy_dir_client(self, director_host, director_port):
        return DirectorClient(self.address, self.name, self.identity)

    def start(self):
        """Joins the federation and takes part in its experiments, for ever.

        Raises: `ConnectionError` with one line if the director does not want it.
        """
        self._envoy_dir_client.connect_envoy(self.name)
        log.info("%s is connected to the director", self.name)
        self._health_check_future = self.executor.submit(self._send_health_check)
        self._run()

    def _run(self):
        """Waits for experiments and takes part in them. What it cannot come back from ends the process: a heartbeat
        without anybody behind it would be waited for."""
        while True:
            try:
                name = self._envoy_dir_client.wait_experiment()
                archive = self._save_data_stream_to_file(self._envoy_dir_client.get_experiment_data(name))
                with ExperimentWorkspace(f"{self.name}_{name}", archive):
                    self.is_experiment_running = True
                    self._run_collaborator()
            except (grpc.RpcError, ConnectionError) as error:
                if isinstance(error, grpc.RpcError):
                    give_way(error)
                log.warning("not connected: %s", error.details() if isinstance(error, grpc.RpcError) else error)
                time.sleep(PAUSE)
            finally:
                self.is_experiment_running = False

    def _run_collaborator(self):
        plan = Plan.parse(plan_config_path=Path(self.plan))
        client = AggregatorClient(self.name, plan, self.identity)
        Collaborator(self.name, client, *self.prepare(plan)).run()

    def prepare(self, plan):
        """The flow's class, the private attributes, or why they are not there, and the folder of what it remembers."""
        try:
            contract = plan.config.get("contract") or {}
            if (number := contract.get("protocol")) != PROTOCOL:
                raise ValueError(f"the experiment speaks protocol {number} and envoy/ {PROTOCOL}: update the older one")
            if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,99}", run := str(contract.get("run") or "")):
                raise ValueError(f"a run cannot be called {run[:100]!r}: letters, digits, - and _, at most 100")
            check_settings(folder := self.runs / self.name / run, self.settings)
            return load_flow(plan), {"memory": {}} | self.bring(), folder
        except (Exception, SystemExit) as error:  # a setting that does not fit, or code that calls exit
            log.exception("cannot take part")
            return None, f"cannot take part: {type(error).__name__}: {error}", self.runs


def load_flow(plan):
    """The class of the flow of the experiment whose workspace is the current folder; each has another `src`."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    module, _, name = plan.config["federated_flow"]["template"].rpartition(".")
    return getattr(importlib.import_module(module), name)
