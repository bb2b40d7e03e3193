"""OpenFL's aggregator for flows whose participants send data, never code.

**The contract between director and flow**, the experiment's own class, which comes with its code. It has the number
`PROTOCOL`, which stands in every plan; a director or an envoy with another one refuses.

| the director reads from the flow | |
|---|---|
| `after(step)` | the aggregator's step that takes the answers to a participant's one; no participant chooses it |
| `round` | for what is said |
| `config.participant_timeout` | seconds without a heartbeat after which a participant is missing |
| `config.answer_timeout` | seconds after which nobody's answer is waited for any longer |
| `config.min_participants` | without so many the run ends; None: more than half |
| `largest_report(step)` | bytes that an answer to a participant's step may have |
| `pack_task(model)` of a participant's clone | what it is sent, as bytes; with the model if it was started anew |
| `current` | the packed global model |
| `history`, `global_model` or `current` | what the notebook gets in the end, and what is kept after every round |
| `settings()` | what a run that goes on must have in common with the one that it continues |

| the director puts on | |
|---|---|
| `report` of a participant's clone | its answer as it came, bytes; or a text that says why there is none |
| `history`, `current` of the flow before its first step | those of the run that it continues |
| the state that the notebook gets | `history`, `traffic`, `error` (None if all went well), and the model's bytes |

Of a participant's `memory`, one of its private attributes, `past`, arrays by name, is what must outlive its process:
the envoy keeps it on its own disk when a step has put another there, by the `round` of the flow's `task`, and brings
back that of the round before. The flow logs to `LOGGER`; the director shows the notebook what is logged there. At the
envoy `take_task(message)` of the flow reads what `pack_task` has written, and the flow's step leaves its answer in
`report`.
"""

import asyncio
import contextlib
import logging
import time
import traceback
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from openfl.experimental.workflow.component.aggregator import aggregator
from openfl.experimental.workflow.interface import FLSpec
from openfl.experimental.workflow.protocols import aggregator_pb2, aggregator_pb2_grpc
from openfl.experimental.workflow.transport import AggregatorGRPCServer
from openfl.protocols import base_pb2

PROTOCOL = 6  # 1 was OpenFL's own: pickles
LOGGER = "FederatedCrowdGuard"
LONGEST_REASON = 300  # characters of what a participant says went wrong
WAIT = 5  # seconds a participant's question for a task may wait for one; it asks again
NEWS = 10  # seconds without a word
REPEATS = 5  # as often a task that is asked for again is counted
SLOWEST = 10  # times as long as three quarters of the others one may work

log = logging.getLogger(LOGGER)


@dataclass
class Assignment:
    """A step that a participant has been asked to take."""

    number: int
    step: str
    clone: Any
    anew: bool = False  # whether the participant has been started anew and lacks what it was sent before
    traffic: list = field(default_factory=list)  # a row for each time it has been sent


@dataclass
class State:
    """What the notebook gets in the end."""

    history: list = field(default_factory=list)
    traffic: list = field(default_factory=list)
    error: str | None = None
    model: bytes = b""


class Aggregator(aggregator.Aggregator):
    """Runs a flow: its own steps here, the others at the participants, of whom it takes bytes."""

    def __init__(self, flow, participants: list[str], plan, silence, tell, keep):
        """
        Args:
            silence: says how many seconds ago a participant's last heartbeat was.
            tell: tells the notebook a text, or a row of history.
            keep: is called after every round with history and model.
        """
        super().__init__(plan.aggregator_uuid, plan.federation_uuid, participants, flow, private_attributes={})
        self.open, self.count, self.traffic = {}, 0, []  # `open`: participant → the assignment it has not answered yet
        self.changed, self.answered = asyncio.Condition(), asyncio.Event()
        self.silence, self.tell, self.keep, self.stopped, self.state = silence, tell, keep, None, None
        self.largest_answer, self.served, self.warned = 0, {}, set()  # `served`: participant → its process
        self.late = set()  # (participant, step) whose last answer was not waited for any longer
        self.packing = weakref.WeakValueDictionary()  # (number, anew) of an assignment → what makes its part

    async def run_flow(self) -> None:
        """Runs the flow to its end, or to its first error, and leaves in `state` what came of it."""
        handler = ToNotebook(self.tell)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        error = None
        try:
            await self.run_steps()
        except (Exception, SystemExit) as failure:  # its code may call exit
            log.exception("the flow failed")
            place = traceback.extract_tb(failure.__traceback__)[-1]  # which says more than our own words do
            where = "" if place.filename == __file__ else f" ({Path(place.filename).name}:{place.lineno}, {place.name})"
            error = f"{type(failure).__name__}: {failure}{where}"
        finally:
            log.removeHandler(handler)
            self.open, self.time_to_quit = {}, True
            await self.announce()
        known = self.known
        model = getattr(known, "global_model", None) or getattr(known, "current", None) or b""
        self.state = State(getattr(known, "history", []), self.traffic, error, model)
        self.flow, self.clones_dict, self.instance_snapshot = None, {}, None  # the state is all that is asked for now
        FLSpec._reset_clones()

    @property
    def known(self):
        """The flow with all its attributes; while participants work OpenFL leaves it those that it sends them."""
        return next(iter(getattr(self, "instance_snapshot", None) or ()), self.flow)

    async def run_steps(self):
        FLSpec._reset_clones()
        FLSpec._create_clones(self.flow, self.authorized_cols)
        step = await asyncio.to_thread(self.do_task, "start")
        rounds = len(self.known.history)
        while not self.time_to_quit:
            await self.ask(step)
            await self.answers(step)
            self.flow.restore_instance_snapshot(self.flow, list(self.instance_snapshot or ()))
            self.instance_snapshot = None
            step = await asyncio.to_thread(self.do_task, self.flow.after(step).__name__)
            if len(self.known.history) > rounds:
                rounds = len(self.known.history)
                await asyncio.to_thread(self.finish_round)

    def finish_round(self):
        """Tells the notebook of the round and keeps what it has led to; without that the run goes on all the same."""
        known = self.known
        self.tell(known.history[-1])
        try:
            self.keep(known.history, getattr(known, "global_model", None) or known.current)
        except OSError as error:
            log.warning("round %d cannot be kept at the director: %s", len(known.history), error)

    def stop(self, reason: str) -> None:
        """Ends the run."""
        self.stopped = reason
        self.answered.set()

    def do_task(self, name):
        row = {"round": getattr(self.flow, "round", 1), "step": name, "participant": "aggregator", "given": time.time()}
        self.traffic.append(row)
        following = super().do_task(name)
        row["taken"] = time.time()
        return following

    def call_checkpoint(self, name, ctx, f, stream_buffer=None):
        """No checkpoints: OpenFL's are pickles."""

    # --- What the participants are asked ---

    async def ask(self, step: str) -> None:
        """Gives the step to the participants that the flow has selected."""
        self.largest_answer = max(self.largest_answer, self.known.largest_report(step))  # the last one's may come late
        for name in self.selected_collaborators:
            self.count += 1
            self.open[name] = Assignment(self.count, step, self.clones_dict[name])
        await self.announce()

    async def announce(self) -> None:
        """Wakes the participants that wait for a task."""
        async with self.changed:
            self.changed.notify_all()

    async def answers(self, step: str) -> None:
        """Waits until everybody has answered or is given up.

        Raises: `ConnectionError` if too few participants are left, `InterruptedError` if the run has been stopped.
        """
        started, usual = time.monotonic(), None
        words, spoken = f"round {self.known.round}, {step}", started
        everybody = {*self.selected_collaborators}
        punctual = {name for name in everybody if (name, step) not in self.late} or everybody
        while missing := list(self.open):
            now = time.monotonic()
            # Of three quarters half are honest, however quick colluders are: fewer than half of all.
            if usual is None and 4 * len(punctual.intersection(missing)) <= len(punctual):
                usual = now - started
            for name in missing:
                if reason := self.given_up(name, step, now - started, usual):
                    self.take(name, self.open.get(name), f"{step}: {reason}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.answered.wait(), 1)
            self.answered.clear()
            if self.stopped:
                raise InterruptedError(f"{words}: {self.stopped}")
            if self.open and time.monotonic() - spoken >= NEWS:
                spoken, late = time.monotonic(), ", ".join(self.open)
                log.info("%s: waiting for %s (%.0f s)", words, late, spoken - started)
        self.check_presence(words)

    def given_up(self, name: str, step: str, waited: float, usual: float | None) -> str | None:
        """Why the participant is waited for no longer; None if it is. `usual`: what three quarters needed, if known."""
        timeout, most = self.known.config.participant_timeout, self.known.config.answer_timeout
        if (silence := self.silence(name)) > timeout:
            return f"no heartbeat for {silence:.0f} s"
        if usual is not None:
            most = min(most, max(timeout, SLOWEST * usual))
        if waited <= most:
            return None
        self.late.add((name, step))
        others = "" if usual is None else f", three quarters of the others needed {usual:.0f} s"
        return f"no answer within {most:.0f} s{others}"

    def check_presence(self, words: str) -> None:
        """`ConnectionError` if fewer participants than `min_participants` are left."""
        config, everybody = self.known.config, self.authorized_cols
        missing = [name for name in everybody if self.silence(name) > config.participant_timeout]
        least = config.min_participants or len(everybody) // 2 + 1
        if (left := len(everybody) - len(missing)) < least:
            names = ", ".join(f"{name} (no heartbeat for {self.silence(name):.0f} s)" for name in missing)
            raise ConnectionError(
                f"{words}: {left} of {len(everybody)} participants are left, {least} must be (min_participants); "
                f"missing: {names or 'nobody'}"
            )

    def take(self, name: str, assignment: Assignment | None, report: bytes | str) -> bool:
        """Puts the report on the participant's clone, unless it has one already."""
        if assignment is None or self.open.get(name) is not assignment:
            return False
        for attribute in self.kwargs["include"]:
            vars(assignment.clone).pop(attribute, None)
        assignment.clone.report = report
        del self.open[name]
        self.answered.set()
        return True

    # --- What the participants ask ---

    async def get_tasks(self, name: str, process: str = "") -> tuple:
        """Number and step of the participant's task, again if it has not answered; what makes its `part`, or None; and
        whether it is over."""
        with contextlib.suppress(TimeoutError):
            async with self.changed, asyncio.timeout(WAIT):
                await self.changed.wait_for(lambda: name in self.open or self.time_to_quit)
        assignment = self.open.get(name)
        if assignment is None:
            self.quit_job_sent_to += [name] if self.time_to_quit else []
            return 0, "", None, self.time_to_quit
        assignment.anew |= self.served.get(name, process) != process
        self.served[name] = process
        key = assignment.number, assignment.anew
        if (part := self.packing.get(key)) is None:  # however often it is asked for, it is in memory once
            part = self.packing[key] = asyncio.ensure_future(asyncio.to_thread(self.part, assignment))
        row = {"round": self.known.round, "step": assignment.step, "participant": name}
        if len(assignment.traffic) < REPEATS:  # a row for everything that somebody asks would fill the memory
            row |= {"down": len(await asyncio.shield(part)), "given": time.time()}
            assignment.traffic.append(row)
            self.traffic.append(row)
        return assignment.number, assignment.step, part, False

    def part(self, assignment: Assignment) -> bytes:
        """The part of the answer that is long, serialised."""
        message = assignment.clone.pack_task(self.known.current if assignment.anew else None)
        return aggregator_pb2.GetTasksResponse(execution_environment=message).SerializeToString()

    def send_task_results(self, name: str, number: int, message: bytes, failure: str) -> None:
        """Takes one answer to the task of this number, and leaves out any other."""
        assignment = self.open.get(name)
        if assignment is None or assignment.number != number or not assignment.traffic:
            self.warn_once(name, "has answered what it was not asked")
            return
        report = failure[:LONGEST_REASON] if failure else message
        if not failure and len(message) > (most := self.known.largest_report(assignment.step)):
            report = f"{assignment.step}: more than {most} bytes"
        if self.take(name, assignment, report):
            self.late.discard((name, assignment.step))
            assignment.traffic[-1].update(up=len(message), taken=time.time())

    def warn_once(self, name: str, words: str) -> None:
        """Logs it for the first time alone: who is to be warned of may go on for ever."""
        if (name, words) not in self.warned:
            self.warned.add((name, words))
            log.warning("%s %s", name, words)


class ToNotebook(logging.Handler):
    """Tells the notebook what is logged."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def emit(self, record):
        self.tell(record.getMessage())


# --- The server ---------------------------------------------------------------------------------------------------

CHUNK = 4 << 20  # bytes of one gRPC message; both sides send longer ones in pieces of 2 MB
ENVELOPE = 1 << 16  # bytes of what OpenFL puts around an answer
AT_ONCE = 8  # calls of one certificate at the same time
AT_ONCE_LONG = 3  # of those that may hold a model; one is all that is needed, but for one that was cut off
CHANNEL = [
    ("grpc.keepalive_time_ms", 10_000),  # a link that is cut is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 2 * AT_ONCE),  # of one connection
    ("grpc.max_receive_message_length", CHUNK),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 1 << 14),
    ("grpc.so_reuseport", 0),  # a taken port is an error
]


def instance_of(context) -> str:
    """Which process calls; every one says something else."""
    return dict(context.invocation_metadata() or ()).get("instance", "")


def common_name(context) -> str:
    """The name in the caller's certificate."""
    return next(iter(context.auth_context().get("x509_common_name", [b""]))).decode(errors="replace")


class Callers:
    """How many calls each certificate has open: one member's cannot keep the others' from being answered."""

    def __init__(self, most: int = AT_ONCE):
        self.open, self.most = Counter(), most

    @contextlib.asynccontextmanager
    async def admit(self, name: str, context):
        """The time of a call; ends it at once if there are too many of this certificate."""
        if self.open[name] >= self.most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{name} has {self.most} calls open")
        self.open[name] += 1
        try:
            yield name
        finally:
            self.open[name] -= 1


class Server(AggregatorGRPCServer):
    """The aggregator's server. It knows by the certificate who calls before it reads what is said, and how much."""

    def __init__(self, aggregator: Aggregator, port: int, certificates: dict, instances: dict):
        """`instances`: participant → the process that has joined as it last."""
        super().__init__(aggregator, port, **certificates)
        self.instances, self.callers = instances, Callers(AT_ONCE_LONG)

    @contextlib.asynccontextmanager
    async def caller(self, context):
        """Who calls; ends the call if it is nobody of this experiment, or calls too often at once."""
        name = common_name(context)
        if name not in self.aggregator.authorized_cols:
            words = (
                f"at {unquote(context.peer()).rpartition(':')[0]} calls the aggregator and is not in this experiment"
            )
            self.aggregator.warn_once(name or "somebody", words)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{name} is not in this experiment")
        if self.instances.get(name, instance_of(context)) != instance_of(context):
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"another machine has joined as {name} since")
        async with self.callers.admit(name, context):
            yield name

    async def check(self, header, name: str, context) -> None:
        """Ends the call if the message is not from its sender, or not for this aggregator."""
        if (header.sender, header.receiver) != (name, self.aggregator.uuid):
            words = f"{name} speaks for {header.sender[:50]}, or elsewhere"
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, words)

    async def GetTasks(self, request, context):  # noqa: N802
        async with self.caller(context) as name:
            await self.check(request.header, name, context)
            number, step, part, over = await self.aggregator.get_tasks(name, instance_of(context))
            answer = {"round_number": number, "function_name": step, "quit": over}
            head = aggregator_pb2.GetTasksResponse(header=self.get_header(name), **answer).SerializeToString()
            yield base_pb2.DataStream(npbytes=head)
            task = await asyncio.shield(part) if part else b""  # serialised messages, one behind the other, are one
            for begin in range(0, len(task), CHUNK // 2):
                yield base_pb2.DataStream(npbytes=task[begin : begin + CHUNK // 2])

    async def SendTaskResults(self, stream, context):  # noqa: N802
        async with self.caller(context) as name:
            message, request = await self.collect(stream, name, context), aggregator_pb2.TaskResultsRequest()
            try:
                request.ParseFromString(message)
            except DecodeError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not an answer: {error}")
            await self.check(request.header, name, context)
            answer = request.round_number, request.execution_environment, request.next_step
            self.aggregator.send_task_results(name, *answer)
            return aggregator_pb2.TaskResultsResponse(header=self.get_header(name))

    async def collect(self, stream, name: str, context) -> bytes:
        """The stream's bytes; as soon as they are too many the sender is out of the round."""
        assignment, most = self.aggregator.open.get(name), self.aggregator.largest_answer
        collected = bytearray()
        async for part in stream:
            collected += part.npbytes
            if len(collected) > most + ENVELOPE:
                reason = f"{assignment.step if assignment else 'answer'}: more than {most} bytes"
                self.aggregator.take(name, assignment, reason)
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        return bytes(collected)

    async def CallCheckpoint(self, stream, context):  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there are no checkpoints: they would be pickles")

    def bind(self) -> None:
        files = (self.private_key, self.certificate, self.root_certificate)
        key, certificate, root = (file.read_bytes() for file in files)
        self.server = aio.server(options=CHANNEL)  # no threads: who says nothing for long occupies nobody
        aggregator_pb2_grpc.add_AggregatorServicer_to_server(self, self.server)
        credentials = grpc.ssl_server_credentials(((key, certificate),), root, require_client_auth=True)
        self.server.add_secure_port(self.uri, credentials)
