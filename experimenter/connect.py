"""The federation behind a director, as a runtime for the notebook's flow."""

import json
import logging
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from openfl.experimental.workflow.protocols import director_pb2, director_pb2_grpc
from openfl.experimental.workflow.runtime import FederatedRuntime
from openfl.experimental.workflow.transport.grpc.director_client import RuntimeDirectorClient

from envoy.channel import Identity, greet, handshake, open_channel
from experimenter.export import export_workspace
from experimenter.heartbeat import heartbeat, log

DIRECTOR = os.environ.get("CROWDGUARD_DIRECTOR", "localhost:50051")
CERTIFICATES = Path(os.environ.get("CROWDGUARD_CERTIFICATES", "certificates"))
HOW = (
    "For a federation on this machine use `make run`; for a real one start director/start.py there, and set "
    "CROWDGUARD_DIRECTOR to its address and CROWDGUARD_CERTIFICATES to the folder of your certificate"
)


def identity() -> Identity:
    """The experimenter's certificates.

    Raises: `ConnectionError` with one line.
    """
    try:
        return Identity.of("experimenter", CERTIFICATES)
    except ValueError as error:
        raise ConnectionError(f"{error}. {HOW}") from None


def assert_director() -> None:
    """`ConnectionError` with one line if there is no director that would talk to us."""
    try:
        handshake(DIRECTOR, identity())
        greet(DIRECTOR, identity())
    except ConnectionError as error:
        raise ConnectionError(str(error) if HOW in str(error) else f"no director: {error}. {HOW}") from None


@dataclass
class State:
    """What comes back from the director; the notebook's flow takes it over."""

    history: list = field(default_factory=list)
    traffic: list = field(default_factory=list)
    error: str | None = None
    global_model: bytes = b""
    _foreach_methods: list = field(default_factory=list)  # OpenFL asks for it


class DirectorClient(RuntimeDirectorClient):
    """What the experimenter asks the director."""

    def __init__(self, identity: Identity):
        self.identity = identity
        self.stub = director_pb2_grpc.DirectorStub(open_channel(DIRECTOR, identity))

    def get_envoys(self):
        return self.stub.GetEnvoys(director_pb2.GetEnvoysRequest())

    def get_flow_state(self, name: str) -> State:
        """What came of the experiment: a message of JSON, then the model in pieces."""
        metadata = (("experiment", name),)
        head, *model = self.stub.GetFlowState(director_pb2.GetFlowStateRequest(), metadata=metadata)
        facts = json.loads(head.npbytes)
        packed = b"".join(part.npbytes for part in model)
        if len(packed) != facts["model"]:
            raise ConnectionError(f"only {len(packed)} of the model's {facts['model']} bytes have arrived")
        return State(facts["history"], facts["traffic"], facts["error"], packed)


def everybody_failed(history: list[dict]) -> str | None:
    """What to say if everybody failed in every round; None if not."""
    if any(row["failed"].keys() != set(row["participants"]) for row in history):
        return None
    return f"everybody failed in every round, in the last one: {history[-1]['failed'] if history else 'there is none'}"


class Federation(FederatedRuntime):
    """A FederatedRuntime that sends what the notebook holds, shows progress, and raises what went wrong."""

    def __init__(self):
        self._runtime_dir_client = DirectorClient(identity())
        super().__init__(tls=True)
        self.collaborators, self.final_state = self.get_envoys(), State()

    def get_envoys(self) -> list[str]:
        """Names of the participants that are online, sorted; says which were refused, and why."""
        try:
            known = self._runtime_dir_client.get_envoys().envoy_infos
        except grpc.RpcError as error:
            raise ConnectionError(f"the director at {DIRECTOR} refuses: {error.details()}") from None
        for envoy in known:
            if not envoy.is_online:
                words = "is not online" if envoy.last_updated.seconds else f"was refused: {envoy.experiment_name}"
                log.warning("%s %s", envoy.envoy_name, words)
        return sorted(envoy.envoy_name for envoy in known if envoy.is_online)

    def prepare_workspace_archive(self):
        archive, name = export_workspace(DIRECTOR)
        return archive, f"{name}-{uuid.uuid4().hex[:8]}"  # the director knows experiments by their names

    def submit_experiment(self, archive, name):
        self.name = name
        try:
            self._runtime_dir_client.set_new_experiment(name, self.collaborators, archive)
        finally:
            archive.unlink()

    def get_flow_state(self):
        with heartbeat("waiting for the director"):
            for line in self._runtime_dir_client.stream_experiment_stdout(self.name):
                log.info(line["stdout_value"])
            state = self.final_state = self._runtime_dir_client.get_flow_state(self.name)
        if error := state.error or everybody_failed(state.history):
            raise RuntimeError(f"{error}; what was reached is in history.json and federation.final_state")
        return True, state


def connect() -> Federation:
    """The federation behind `CROWDGUARD_DIRECTOR`, with all participants that are online.

    Raises: `ConnectionError` with one line if there is no director, or nobody is online.
    """
    logging.getLogger("openfl").setLevel(logging.WARNING)
    assert_director()
    federation = Federation()
    if not federation.collaborators:
        raise ConnectionError("no envoy is online: start envoy/start.py at the participants")
    return federation
