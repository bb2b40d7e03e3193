"""The federation behind a director, as a runtime for the notebook's flow."""

import json
import logging
import os
import re
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from openfl.experimental.workflow.protocols import director_pb2, director_pb2_grpc
from openfl.experimental.workflow.runtime import FederatedRuntime
from openfl.experimental.workflow.transport.grpc.director_client import RuntimeDirectorClient

from envoy.channel import Identity, around, greet, handshake, open_channel, plain_address
from experimenter.export import export_workspace
from experimenter.heartbeat import heartbeat, log
from experimenter.results import Results

DIRECTOR = os.environ.get("CROWDGUARD_DIRECTOR", "localhost:50051")
CERTIFICATES = Path(os.environ.get("CROWDGUARD_CERTIFICATES", "certificates"))
LOST = 600  # seconds without an answer
CONNECTED = 60  # a call that has lasted so many seconds had been answered until then; others are cut off before
RETRY = 2  # seconds
SENT = (bool, int, float, str, type(None))  # settings that can be refused at once; others when the run begins
HOW = (
    "(for a federation on this machine use `make run`; for a real one start director/start.py there, and set "
    "CROWDGUARD_DIRECTOR to its address and CROWDGUARD_CERTIFICATES to the folder of your certificate)"
)


def goes_on(run: str) -> str:
    """How a run goes on, in words; `make run` and experimenter/run.py know what they were called with."""
    return f"go on with: {os.environ.get('CROWDGUARD_AGAIN', 'CROWDGUARD_RESUME=')}{run}"


def identity() -> Identity:
    """The experimenter's certificates.

    Raises: `ConnectionError` with one line.
    """
    try:
        return Identity.of("experimenter", CERTIFICATES)
    except ValueError as error:
        raise ConnectionError(f"{error} {HOW}") from None


def assert_director(resume: str = "", config=None) -> None:
    """`ConnectionError` with one line if there is no director that would talk to us, run an experiment with these
    settings, a dataclass, or go on with the run `resume`."""
    if not re.fullmatch(r"[\w-]*", resume, re.ASCII):
        raise ConnectionError(f"RESUME={resume}: a run's name has letters, digits, - and _ alone")
    try:
        if (plain := plain_address(DIRECTOR)) != DIRECTOR:
            raise ConnectionError(f"CROWDGUARD_DIRECTOR: {DIRECTOR} must be written as {plain}")
        handshake(DIRECTOR, identity())
        greet(DIRECTOR, identity())
        if resume or config:
            DirectorClient(identity()).get_envoys(resume, vars(config) if config else {})
    except grpc.RpcError as error:
        raise refusal(error) from None
    except ValueError as error:
        raise ConnectionError(f"CROWDGUARD_DIRECTOR: {error}") from None
    except ConnectionError as error:
        raise ConnectionError(str(error) if HOW in str(error) else f"no director: {error} {HOW}") from None


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
        self.connect()

    def connect(self) -> None:
        self.stub = director_pb2_grpc.DirectorStub(open_channel(DIRECTOR, self.identity))

    def get_envoys(self, resume: str = "", settings=()):
        """Who is there; refused if the director would not run these settings, or not go on with the run by them."""
        plain = {name: value for name, value in dict(settings).items() if isinstance(value, SENT)}
        wish = {"settings": json.dumps(plain)} | ({"resume": resume} if resume else {})
        return self.stub.GetEnvoys(director_pb2.GetEnvoysRequest(), metadata=tuple(wish.items()))

    def lines(self, name: str, told: int):
        """What the director tells of the experiment, from a line on."""
        request = director_pb2.GetExperimentStdoutRequest(experiment_name=name)
        return self.stub.GetExperimentStdout(request, metadata=(("from", str(told)),))

    def get_flow_state(self, name: str, stop: bool = False) -> State:
        """What came of the experiment: a message of JSON, then the model in pieces."""
        metadata = (("experiment", name), *((("stop", "1"),) if stop else ()))
        head, *model = self.stub.GetFlowState(director_pb2.GetFlowStateRequest(), metadata=metadata)
        facts = json.loads(head.npbytes)
        packed = b"".join(part.npbytes for part in model)
        if len(packed) != facts["model"]:
            raise ConnectionError(f"only {len(packed)} of the model's {facts['model']} bytes have arrived")
        return State(facts["history"], facts["traffic"], facts["error"], packed)


def refusal(error: grpc.RpcError) -> ConnectionError:
    """What the director has against a call, in one line."""
    lost = error.code() is grpc.StatusCode.UNAVAILABLE
    words = " ".join((error.details() or error.code().name).split())
    return ConnectionError(f"the director at {DIRECTOR} refuses: {words}{around(DIRECTOR) if lost else ''}")


def everybody_failed(history: list[dict]) -> str | None:
    """What to say if everybody failed in the last round, or there is none; None if not."""
    if not history:
        return "there is no round"
    failed, everybody = history[-1]["failed"], history[-1]["participants"]
    return f"everybody failed in the last round: {failed}" if failed.keys() == {*everybody} else None


class Federation(FederatedRuntime):
    """A FederatedRuntime that sends what the notebook holds, shows progress, and raises what went wrong.

    Args:
        resume: name of a run that shall go on where it ended.
        results: where the history, which grows with every round, and the model are kept.
    """

    def __init__(self, resume: str = "", results: Results | None = None):
        self._runtime_dir_client = DirectorClient(identity())
        super().__init__(tls=True)
        self.collaborators, self.final_state = self.get_envoys(), State()
        self.run, self.resume, self.results = resume or f"run-{uuid.uuid4().hex[:8]}", bool(resume), results

    def get_envoys(self) -> list[str]:
        """Names of the participants that are online, sorted; says which were refused, and why."""
        try:
            known = self._runtime_dir_client.get_envoys().envoy_infos
        except grpc.RpcError as error:
            raise refusal(error) from None
        for envoy in known:
            if not envoy.is_online:
                words = "is not online" if envoy.last_updated.seconds else f"was refused: {envoy.experiment_name}"
                log.warning("%s %s", envoy.envoy_name, words)
        return sorted(envoy.envoy_name for envoy in known if envoy.is_online)

    def prepare_workspace_archive(self):
        archive, _ = export_workspace(DIRECTOR, self.run, self.resume)
        return archive, f"{self.run}-{uuid.uuid4().hex[:8]}"  # the director knows experiments by their names

    def submit_experiment(self, archive, name):
        self.name = name
        try:
            self._runtime_dir_client.set_new_experiment(name, self.collaborators, archive)
        except grpc.RpcError as error:
            raise refusal(error) from None
        finally:
            archive.unlink()

    def get_flow_state(self):
        try:
            with heartbeat("waiting for the director", every=15):  # it says every ten for whom it waits itself
                self.follow()
                self.final_state = self.insist(lambda: self._runtime_dir_client.get_flow_state(self.name))
        except KeyboardInterrupt:
            log.warning("stopping the run")
            # Ctrl-C can leave a lock of the interrupted call taken for ever, on which all calls of its channel wait.
            self._runtime_dir_client.connect()
            try:
                self.final_state = self._runtime_dir_client.get_flow_state(self.name, stop=True)
            except (grpc.RpcError, ConnectionError):
                log.warning("the director does not answer; the run goes on there")
            raise
        self.keep(self.final_state)
        if error := self.final_state.error or everybody_failed(self.final_state.history):
            kept = len(self.final_state.history)
            raise RuntimeError(f"{error}; {kept} rounds are kept, {goes_on(self.run)}" if kept else error)
        return True, self.final_state

    def follow(self) -> None:
        """Shows what the director tells, and keeps every round, until the experiment is over."""
        told = 0

        def more():
            nonlocal told
            for said in self._runtime_dir_client.lines(self.name, told):
                told += 1
                if said.task_name == "row":
                    self.final_state.history.append(json.loads(said.stdout_value))
                    self.keep(self.final_state)
                else:
                    log.info(said.stdout_value)

        self.insist(more)

    def insist(self, call):
        """Calls until the director answers.

        Raises: `ConnectionError` if it does not for `LOST` seconds, or has been restarted.
        """
        since = None
        while True:
            called = time.monotonic()
            try:
                return call()
            except grpc.RpcError as error:
                if since is None or time.monotonic() - called > CONNECTED:
                    since = time.monotonic()
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise ConnectionError(f"{error.details()} {goes_on(self.run)}") from None
                if time.monotonic() - since > LOST:
                    words = f"no answer from {DIRECTOR} for {LOST} s ({error.details()}){around(DIRECTOR)}"
                    raise ConnectionError(f"{words}: attach({self.name!r}) asks again") from None
                log.warning("no answer from the director, trying again: %s", error.details())
                time.sleep(RETRY)
                self._runtime_dir_client.connect()

    def attach(self, name: str) -> State:
        """What comes of an experiment that was submitted before, by a notebook that is gone."""
        self.name, self.run, self.final_state = name, name.rpartition("-")[0], State()
        return self.get_flow_state()[1]

    def keep(self, state: State) -> None:
        """Keeps what is known so far; whatever cannot be written now may be later, so the run goes on."""
        if self.results and state.history:  # or what an earlier run has left would be lost for nothing
            try:
                self.results.keep(state.global_model, run=self.run, federation=[*state.history], traffic=state.traffic)
            except OSError as error:
                log.warning("the results cannot be written: %s; the director keeps them, %s", error, goes_on(self.run))


def connect(resume: str = "", results: Results | None = None, config=None) -> Federation:
    """The federation behind `CROWDGUARD_DIRECTOR`, with all participants that are online; arguments as `Federation`.

    Raises: `ConnectionError` with one line if there is no director, it would not go on with the run by the settings
    in `config`, or fewer are online than its `min_participants` (or 1).
    """
    logging.getLogger("openfl").setLevel(logging.WARNING)
    assert_director(resume, config)
    federation = Federation(resume, results)
    if not federation.collaborators:
        raise ConnectionError("no envoy is online: start envoy/start.py at the participants")
    at_least = config and config.min_participants
    if (online := len(federation.collaborators)) < (at_least or 1):
        names = ", ".join(federation.collaborators)
        raise ConnectionError(f"min_participants is {at_least}, and {online} are online: {names}; lower it or wait")
    return federation
