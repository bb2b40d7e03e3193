"""The aggregator's server, with an aggregator that is in the middle of a step, and callers who mean no good."""

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import psutil
import pytest
from conftest import ROOT, load_module
from openfl.experimental.workflow.protocols import aggregator_pb2, aggregator_pb2_grpc
from openfl.protocols import base_pb2
from openfl.protocols.utils import datastream_to_proto, proto_to_datastream
from test_door import free_port

from envoy import channel

sys.path.append(str(ROOT / "director"))

import certificates  # noqa: E402

pytestmark = pytest.mark.slow

CODE = grpc.StatusCode
SERVICE = aggregator_pb2.DESCRIPTOR.services_by_name["Aggregator"].full_name
MEMBERS = ["Amsterdam", "Bangalore"]


class Steps:
    """What the server asks of an aggregator; everybody has task 7, to train."""

    uuid, federation_uuid, single_col_cert_common_name, authorized_cols = "aggregator", "federation", "", MEMBERS

    def __init__(self):
        self.open = {name: SimpleNamespace(step="train") for name in MEMBERS}
        self.instances, self.taken, self.answers, self.hurry = {}, [], [], threading.Event()
        self.hurry.set()

    async def get_tasks(self, name, process):
        while not self.hurry.is_set():
            await asyncio.sleep(0.05)
        part = aggregator_pb2.GetTasksResponse(execution_environment=b"task of " + name.encode()).SerializeToString()
        return 7, "train", asyncio.ensure_future(asyncio.sleep(0, part)), False

    largest_answer = 1000

    def warn_once(self, name, words):
        pass

    def take(self, name, assignment, report):
        self.taken.append((name, report))

    def send_task_results(self, *answer):
        self.answers.append(answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    certificates.make_certificates(folder, "localhost", [*MEMBERS, "Mallory"])
    return folder


@pytest.fixture
def steps(folder):
    module, steps = load_module("aggregator", ROOT / "director" / "aggregator.py"), Steps()
    files = {"root_certificate": "ca.crt", "certificate": "director.crt", "private_key": "director.key"}
    steps.port = free_port()
    ready, over = threading.Event(), threading.Event()

    async def serve():
        server = module.Server(steps, steps.port, {k: folder / file for k, file in files.items()}, steps.instances)
        server.bind()
        await server.server.start()
        ready.set()
        while not over.is_set():
            await asyncio.sleep(0.05)
        await server.server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    yield steps
    over.set()
    thread.join()


@pytest.fixture
def stub(steps, folder):
    def of(name):
        opened = channel.open_channel(f"localhost:{steps.port}", channel.Identity.of(name, folder))
        return aggregator_pb2_grpc.AggregatorStub(opened)

    return of


def header(sender, receiver="aggregator"):
    return aggregator_pb2.MessageHeader(sender=sender, receiver=receiver, federation_uuid="federation")


def answer(sender, **fields):
    fields = {"round_number": 7, "execution_environment": b"report"} | fields
    return proto_to_datastream(aggregator_pb2.TaskResultsRequest(header=header(sender), **fields))


def refused(call, code):
    with pytest.raises(grpc.RpcError) as said:
        answer = call()
        list(answer) if hasattr(answer, "__next__") else answer
    assert said.value.code() is code, said.value.details()
    return said.value.details()


def test_a_member_gets_its_task_and_is_heard(steps, stub):
    amsterdam = stub("Amsterdam")
    stream = amsterdam.GetTasks(aggregator_pb2.GetTasksRequest(header=header("Amsterdam")))
    task = datastream_to_proto(aggregator_pb2.GetTasksResponse(), stream)
    assert (task.round_number, task.execution_environment, task.quit) == (7, b"task of Amsterdam", False)
    amsterdam.SendTaskResults(answer("Amsterdam", next_step="why not"))
    assert steps.answers == [("Amsterdam", 7, b"report", "why not")]


def endless(counted, size=1 << 20, most=2000):
    """A stream of up to two gigabytes that knows how much of it was wanted."""
    for _ in range(most):
        counted.append(size)
        yield base_pb2.DataStream(npbytes=bytes(size))


LONG_MESSAGE = """
import sys, grpc
port, folder, method = sys.argv[1:]
key, certificate, ca = (open(f"{folder}/{file}", "rb").read() for file in ("Mallory.key", "Mallory.crt", "ca.crt"))
credentials = grpc.ssl_channel_credentials(ca, key, certificate)
with grpc.secure_channel(f"localhost:{port}", credentials, [("grpc.max_send_message_length", -1)]) as channel:
    try:
        list(channel.unary_stream(method)(bytes(400 << 20), timeout=60))
    except grpc.RpcError as error:
        print(error.code().name)
"""


def test_a_long_message_is_refused_before_it_has_come_whole(steps, folder):
    """Of 400 MB, sent by a process of its own, as `director/requirements.txt` says."""
    me, most = psutil.Process(), 0
    before = me.memory_info().rss
    command = [sys.executable, "-c", LONG_MESSAGE, str(steps.port), str(folder), f"/{SERVICE}/GetTasks"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
        while sender.poll() is None:
            most = max(most, me.memory_info().rss)
            time.sleep(0.005)
        assert sender.stdout.read().strip() == "RESOURCE_EXHAUSTED"
    assert most - before < 100 << 20


def test_a_certificate_that_is_not_in_the_experiment_gets_nothing_and_nothing_of_it_is_collected(steps, stub):
    mallory, sent = stub("Mallory"), []
    for name in ("Mallory", "Amsterdam"):
        request = aggregator_pb2.GetTasksRequest(header=header(name))
        assert refused(lambda request=request: mallory.GetTasks(request), CODE.PERMISSION_DENIED)
        refused(lambda name=name: mallory.SendTaskResults(answer(name)), CODE.PERMISSION_DENIED)
    refused(lambda: mallory.SendTaskResults(endless(sent)), CODE.PERMISSION_DENIED)
    assert sum(sent) < 50 << 20, "what gRPC has taken before it was told"
    assert steps.answers == [] and steps.taken == []


def test_who_sends_too_much_is_stopped_at_once_and_out_of_the_step(steps, stub):
    sent = []
    words = refused(lambda: stub("Amsterdam").SendTaskResults(endless(sent)), CODE.RESOURCE_EXHAUSTED)
    assert words == "train: more than 1000 bytes" and sum(sent) < 50 << 20
    assert steps.taken == [("Amsterdam", words)] and steps.answers == []
    one = iter([base_pb2.DataStream(npbytes=bytes(5 << 20))])
    refused(lambda: stub("Amsterdam").SendTaskResults(one), CODE.RESOURCE_EXHAUSTED)


def test_nobody_speaks_for_another_or_for_another_federation(steps, stub):
    amsterdam = stub("Amsterdam")
    refused(lambda: amsterdam.SendTaskResults(answer("Bangalore")), CODE.PERMISSION_DENIED)
    refused(
        lambda: amsterdam.GetTasks(aggregator_pb2.GetTasksRequest(header=header("Bangalore"))), CODE.PERMISSION_DENIED
    )
    elsewhere = aggregator_pb2.TaskResultsRequest(header=header("Amsterdam", "another"))
    refused(lambda: amsterdam.SendTaskResults(proto_to_datastream(elsewhere)), CODE.PERMISSION_DENIED)
    assert steps.answers == []


@pytest.mark.parametrize("data", [b"\xff" * 100, b"\x0a\x05"])
def test_what_is_no_answer_is_refused(steps, stub, data):
    stream = iter([base_pb2.DataStream(npbytes=data)])
    refused(lambda: stub("Amsterdam").SendTaskResults(stream), CODE.INVALID_ARGUMENT)
    assert steps.answers == []


def test_of_two_machines_with_one_name_the_newer_counts(steps, stub):
    steps.instances["Amsterdam"] = "another process"
    request = aggregator_pb2.GetTasksRequest(header=header("Amsterdam"))
    words = refused(lambda: stub("Amsterdam").GetTasks(request), CODE.ALREADY_EXISTS)
    assert words == "another machine has joined as Amsterdam since"
    steps.instances["Amsterdam"] = channel.INSTANCE[1]
    list(stub("Amsterdam").GetTasks(request))


def test_there_are_no_checkpoints(steps, stub):
    request = aggregator_pb2.CheckpointRequest(header=header("Amsterdam"), execution_environment=b"a pickle")
    refused(lambda: stub("Amsterdam").CallCheckpoint(proto_to_datastream(request)), CODE.UNIMPLEMENTED)


def test_one_member_s_many_calls_do_not_keep_another_from_the_server(steps, stub):
    steps.hurry.clear()  # tasks are not there yet: who asks waits
    request, amsterdam = aggregator_pb2.GetTasksRequest(header=header("Amsterdam")), stub("Amsterdam")

    def ask(_):
        try:
            return list(amsterdam.GetTasks(request, timeout=30))
        except grpc.RpcError as error:
            return error.code()

    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(ask, number) for number in range(40)]
        deadline = time.monotonic() + 20
        while sum(call.done() for call in asked) < 37 and time.monotonic() < deadline:
            time.sleep(0.1)
        stub("Bangalore").SendTaskResults(answer("Bangalore"), timeout=10)
        steps.hurry.set()
        outcomes = [call.result() for call in asked]
    refusals = (CODE.RESOURCE_EXHAUSTED, CODE.UNAVAILABLE)  # ours, or gRPC's own
    refused = sum(not isinstance(outcome, list) and outcome in refusals for outcome in outcomes)
    assert refused == 37, "three of them wait"
    assert steps.answers == [("Bangalore", 7, b"report", "")]


def test_a_call_that_has_ended_makes_room_for_another(steps, stub):
    amsterdam = stub("Amsterdam")
    for _ in range(30):
        amsterdam.SendTaskResults(answer("Amsterdam"), timeout=10)
        refused(lambda: amsterdam.SendTaskResults(answer("Bangalore"), timeout=10), CODE.PERMISSION_DENIED)
    assert len(steps.answers) == 30


def test_calls_that_say_nothing_keep_nobody_from_the_server(steps, stub, folder):
    """Opened, and then neither continued nor ended, with and without a place in the experiment."""
    over = threading.Event()

    def nothing():
        over.wait(30)
        yield from ()

    calls = []
    for name in ("Mallory", "Amsterdam"):
        for _ in range(5):
            opened = channel.open_channel(f"localhost:{steps.port}", channel.Identity.of(name, folder))
            calls += [aggregator_pb2_grpc.AggregatorStub(opened).SendTaskResults.future(nothing()) for _ in range(8)]
            calls += [opened.stream_stream(f"/{SERVICE}/GetTasks")(nothing()) for _ in range(8)]
    time.sleep(1)
    stub("Bangalore").SendTaskResults(answer("Bangalore"), timeout=10)
    stream = stub("Bangalore").GetTasks(aggregator_pb2.GetTasksRequest(header=header("Bangalore")), timeout=10)
    assert datastream_to_proto(aggregator_pb2.GetTasksResponse(), stream).round_number == 7
    over.set()
    for call in calls:
        call.cancel()


def test_every_call_of_the_aggregator_is_tried_above():
    calls = {name for name in vars(aggregator_pb2_grpc.AggregatorServicer) if name[0].isupper()}
    assert calls == {"GetTasks", "SendTaskResults", "CallCheckpoint"}
