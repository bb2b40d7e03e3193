"""An envoy with a valid certificate that sends something else in every round. Started like envoy/start.py.

`PAYLOADS` are what it does: round, beginning with 1, → (step, what the history says of it or None if it is not a
failure, how it is sent). A sender gets the client, the number of the task, and the honest report.
"""

import contextlib
import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load, save

sys.path[:0] = [str(Path(__file__).parents[2] / "envoy")]


def message(head, *parts):
    """A report with this head, JSON text or whatever can be written as such."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return sys.modules["src.experiment"].pack(text, *(parts or (b"",)))


def instead(make):
    """Sends what is made of the honest report."""
    return lambda client, number, report: client.answer(number, make(report))


def tampered(change):
    """Sends the honest update with its tensors changed."""

    def make(report):
        experiment = sys.modules["src.experiment"]
        honest = experiment.unpack_report(report)
        return experiment.pack_report(replace(honest, update=save(change(load(honest.update)))))

    return instead(make)


def head(**fields):
    return instead(lambda report: message(fields))


SAME = "trigger red_square, target 2, source None"  # what the others' backdoor test measures


class Exploit:
    """Leaves a file behind wherever it is unpickled."""

    def __reduce__(self):
        return eval, (f"open({os.environ['HOSTILE_MARK']!r}, 'w').close()",)


class Forged:
    """Mimics a flow of OpenFL's."""

    input, execute_task_args, _foreach_methods = "Detroit", None, []


def forged_next_step(client, number, report):
    client.answer(number, report, "fed_avg_aggregation")  # OpenFL's field of that name


def in_another_name(client, number, report):
    honest, client.header.sender = client.header.sender, "Amsterdam"
    with contextlib.suppress(ConnectionError):
        client.answer(number, message({"failure": "said Amsterdam"}))
    client.header.sender = honest
    client.answer(number, report)


def to_other_tasks(client, number, report):
    for other in (number - 1, number + 1, 0, -1, 2**31 - 1):
        client.answer(other, message({"failure": "to another task"}))
    client.answer(number, report)


def twice(client, number, report):
    client.answer(number, report)
    client.answer(number, message({"failure": "the second answer"}))


def too_much(client, number, report):
    try:
        client.answer(number, report + bytes(200_000_000))
    except ConnectionError as error:
        print(f"refused: {error}")


def checkpoint(client, number, report):
    from openfl.experimental.workflow.protocols import aggregator_pb2
    from openfl.protocols.utils import proto_to_datastream

    bomb = pickle.dumps(Exploit())
    request = aggregator_pb2.CheckpointRequest(
        header=client.header, execution_environment=bomb, function=bomb, stream_buffer=bomb
    )
    try:
        client.insist(lambda: client.stub.CallCheckpoint(proto_to_datastream(request)))
    except ConnectionError as error:
        print(f"refused: {error}")
    client.answer(number, report)


def no_protobuf(client, number, report):
    from openfl.protocols import base_pb2

    for data in (b"\xff" * 1000, b""):
        try:
            client.insist(lambda data=data: client.stub.SendTaskResults(iter([base_pb2.DataStream(npbytes=data)])))
        except ConnectionError as error:
            print(f"refused: {error}")
    client.answer(number, report)


PARTS, VOTES, MEASURES = "the lengths of its parts", "not a report: votes", "not a report"
MANY = {f"t{i}": torch.zeros(1) for i in range(2000)}
PAYLOADS = [
    # FAULTS: what was harmless before
    ("train", "is not finite", tampered(lambda u: {n: v * torch.nan for n, v in u.items()})),
    ("train", "has shape", tampered(lambda u: {n: v[:1] for n, v in u.items()})),
    ("train", "train: more than", too_much),
    ("train", "not safetensors", head(update="a string")),
    ("train", "header for more", instead(lambda report: message({}, save(MANY)))),
    ("train", "not a report", instead(lambda report: message(b'"a string"'))),
    ("train", "not a report", instead(lambda report: message(b"null"))),
    ("train", None, tampered(lambda u: {n: torch.full_like(v, 1e30) for n, v in u.items()})),
    ("local_validation", "votes: not one for each", head(votes={"nobody": 1})),
    ("local_validation", VOTES, head(votes={"Amsterdam": "1"})),
    ("local_validation", "votes: not one for each", head(votes={"Amsterdam": 0, "Bangalore": 0})),
    ("local_validation", "not a report", head(votes={"Amsterdam": 10**400})),
    ("train", "not a report: seconds", instead(lambda report: message(b'{"seconds": 1e999}'))),
    # what cost others something before
    ("train", "not a report", instead(lambda report: message(b'{"failure": 1' + b"0" * 5000 + b"}"))),
    ("train", "fed_avg_aggregation", forged_next_step),
    ("train", PARTS, instead(lambda report: pickle.dumps({"execute_task_args": None}))),
    ("train", PARTS, instead(lambda report: b"\x00garbage\xff" * 99)),
    (
        "evaluate",
        None,
        head(images=10**9, main_accuracy=1.0, backdoor_images=10**9, backdoor_accuracy=0.0, backdoor=SAME),
    ),
    ("evaluate", "not a report: images", head(images=10**10, main_accuracy=1.0)),
    ("train", "train: more than", instead(lambda report: report + bytes(30_000_000))),
    ("train", PARTS, instead(lambda report: pickle.dumps(Exploit()))),
    # the kinds around it
    ("train", "not a report", instead(lambda report: message(b"[" * 500_000))),
    ("train", PARTS, instead(lambda report: bytes(8 * 100_000))),
    ("train", "not a report: loss", head(loss="0.1")),
    ("train", "not a report: attacks", head(attacks="yes")),
    ("evaluate", "an accuracy for no images", head(main_accuracy=1.0)),
    ("evaluate", "not a report: main_accuracy", head(main_accuracy=2.0, images=5)),
    ("train", "not a report", instead(lambda report: message(b'{"failure": "\\ud800"}'))),
    ("local_validation", VOTES, head(votes={str(i): 2 for i in range(20_000)})),
    ("train", None, in_another_name),
    ("train", None, to_other_tasks),
    ("train", None, twice),
    ("evaluate", "no answer within", lambda client, number, report: None),
    ("train", None, checkpoint),
    ("train", None, no_protobuf),
    (
        "evaluate",
        r"measures another backdoor \(x forged row \) than",
        head(main_accuracy=1.0, images=5, backdoor="x\nforged row\n"),
    ),
]


def main():
    import collaborator
    import start

    def run(self):
        while not (task := self.client.get_task()).quit:
            if not task.function_name or (task.round_number, task.function_name) == getattr(self, "ignored", None):
                continue
            flow = self.read(task)
            round = flow.task.round
            getattr(flow, task.function_name)()
            step, _, send = PAYLOADS[round - 1] if round <= len(PAYLOADS) else (None, None, None)
            if step != task.function_name:
                self.client.answer(task.round_number, flow.report)
                continue
            print(f"round {round}: payload in {step}", flush=True)
            self.ignored = task.round_number, task.function_name  # what has been answered, or not, is over
            send(self.client, task.round_number, flow.report)

    collaborator.Collaborator.run = run
    start.main()


if __name__ == "__main__":
    main()
