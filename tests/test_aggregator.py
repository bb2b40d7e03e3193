"""The director's aggregator by itself: what it asks, what it takes, and what it leaves out."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_module

NAMES = ["Amsterdam", "Bangalore"]


class Flow:
    """What the contract asks of a flow."""

    def __init__(self, patience=60):
        self.round, self.config = 1, SimpleNamespace(patience=patience)

    def largest_report(self, step):
        return 100


@pytest.fixture
def module():
    return load_module("aggregator", ROOT / "director" / "aggregator.py")


@pytest.fixture
def aggregator(module):
    """One in the middle of a flow, without OpenFL's part of it."""
    made = object.__new__(module.Aggregator)
    made.flow, made.kwargs, made.time_to_quit, made.quit_job_sent_to = Flow(), {"include": ["task"]}, False, []
    made.open, made.count, made.traffic = {}, 0, []
    made.changed, made.answered = threading.Condition(), asyncio.Event()
    made.loop = SimpleNamespace(call_soon_threadsafe=lambda function: function())
    made.selected_collaborators = NAMES
    made.clones_dict = {n: SimpleNamespace(task=n, pack_task=lambda n=n: f"task of {n}".encode()) for n in NAMES}
    return made


def test_a_task_is_given_again_until_it_is_answered(aggregator, module, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0)
    aggregator.ask("train")
    first, again = (aggregator.get_tasks("Amsterdam") for _ in range(2))
    assert first == again == (1, "train", b"task of Amsterdam", False)
    aggregator.send_task_results("Amsterdam", 1, b"update", "")
    assert aggregator.get_tasks("Amsterdam") == (0, "", b"", False), "there is nothing to do for it"
    assert [row["step"] for row in aggregator.traffic] == ["train", "train"], "both have travelled"
    assert vars(aggregator.clones_dict["Amsterdam"]).keys() == {"pack_task", "report"}


def test_only_the_first_answer_to_the_task_itself_counts(aggregator):
    aggregator.ask("train")
    aggregator.send_task_results("Amsterdam", 1, b"before it was asked", "")
    for name in NAMES:
        aggregator.get_tasks(name)
    aggregator.send_task_results("Amsterdam", 2, b"to Bangalore's task", "")
    aggregator.send_task_results("Amsterdam", 1, b"first", "")
    aggregator.send_task_results("Amsterdam", 1, b"second", "")
    aggregator.send_task_results("Espoo", 1, b"a stranger", "")
    assert aggregator.clones_dict["Amsterdam"].report == b"first"
    assert list(aggregator.open) == ["Bangalore"] and not hasattr(aggregator.clones_dict["Bangalore"], "report")
    aggregator.open.clear()
    aggregator.ask("evaluate")
    aggregator.get_tasks("Amsterdam")
    aggregator.send_task_results("Amsterdam", 1, b"late", "")
    assert "Amsterdam" in aggregator.open


def test_a_reason_instead_of_a_report_is_kept_short(aggregator, module):
    aggregator.ask("train")
    aggregator.get_tasks("Amsterdam")
    aggregator.send_task_results("Amsterdam", 1, b"whatever", "no disk " * 10**6)
    assert aggregator.clones_dict["Amsterdam"].report == ("no disk " * 100)[: module.LONGEST_REASON]


def test_nobody_may_send_anything_unasked(aggregator):
    assert aggregator.largest_answer("Amsterdam") == 0
    aggregator.ask("train")
    assert aggregator.largest_answer("Amsterdam") == 100
    assert aggregator.largest_answer("Espoo") == 0


def asked(aggregator, meanwhile=None):
    """Asks everybody and waits for the answers, while something goes on."""
    aggregator.answered = asyncio.Event()

    async def both():
        aggregator.loop = asyncio.get_running_loop()
        aggregator.ask("train")
        await asyncio.gather(aggregator.answers("train"), *([meanwhile()] if meanwhile else []))

    asyncio.run(both())


def test_who_does_not_answer_is_left_out_and_named(aggregator):
    aggregator.flow = Flow(patience=1)

    async def answer():
        await asyncio.sleep(0.2)
        aggregator.get_tasks("Amsterdam")
        aggregator.send_task_results("Amsterdam", 1, b"update", "")

    asked(aggregator, answer)
    assert aggregator.clones_dict["Amsterdam"].report == b"update"
    assert aggregator.clones_dict["Bangalore"].report == "train: no answer within 1 s"


def test_if_nobody_answers_everybody_is_named(aggregator):
    aggregator.flow = Flow(patience=1)

    async def only_ask():
        for _ in range(20):
            aggregator.get_tasks("Amsterdam")
            await asyncio.sleep(0.05)

    with pytest.raises(
        TimeoutError, match="round 1, train: nobody has answered for 1 s, asked were Amsterdam, Bangalore"
    ):
        asked(aggregator, only_ask)


def test_patience_begins_anew_with_every_answer(aggregator):
    aggregator.flow = Flow(patience=1)

    async def take_turns():
        for number, name in enumerate(NAMES, start=1):
            await asyncio.sleep(0.8)
            aggregator.get_tasks(name)
            aggregator.send_task_results(name, number, b"update", "")

    asked(aggregator, take_turns)
    assert [aggregator.clones_dict[name].report for name in NAMES] == [b"update"] * 2


def test_who_waits_for_a_task_gets_it_when_it_is_there(aggregator, module):
    got = []
    thread = threading.Thread(target=lambda: got.append(aggregator.get_tasks("Amsterdam")))
    thread.start()
    aggregator.ask("train")
    thread.join(timeout=module.WAIT - 1)
    assert got and got[0][1] == "train"


def test_the_contract_is_what_flow_director_and_envoys_keep(module, experiment):
    """Protocol numbers and logger agree, and the flow has what the director and the envoys ask for."""
    from envoy import channel

    assert module.PROTOCOL == channel.PROTOCOL
    assert experiment.log.name == module.LOGGER
    flow = experiment.FederatedCrowdGuard()
    flow.round, flow.current, flow.task = 1, b"model", experiment.Task(1)
    assert flow.after("train") == flow.collect_models
    assert flow.largest_report("train") > flow.largest_report("evaluate") > 0
    assert flow.config.patience and flow.history == []
    flow.take_task(flow.pack_task())
    with pytest.raises(LookupError):
        flow.after("start")
