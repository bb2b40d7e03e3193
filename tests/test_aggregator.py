"""The director's aggregator by itself: what it asks, what it takes, and what it leaves out."""

import asyncio
import gc
import json
import re
import weakref
from types import SimpleNamespace

import pytest
from conftest import ROOT, load_module
from openfl.experimental.workflow.protocols import aggregator_pb2

NAMES = ["Amsterdam", "Bangalore"]


class Flow:
    """What the contract asks of a flow."""

    def __init__(self, timeout=60, least=None, longest=3600):
        settings = {"participant_timeout": timeout, "min_participants": least, "answer_timeout": longest}
        self.round, self.config = 1, SimpleNamespace(**settings)

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
    made.open, made.count, made.traffic, made.largest_answer, made.served, made.warned = {}, 0, [], 0, {}, set()
    made.changed, made.answered = asyncio.Condition(), asyncio.Event()
    made.late, made.packing = set(), weakref.WeakValueDictionary()
    made.selected_collaborators = made.authorized_cols = NAMES
    made.silent = dict.fromkeys(NAMES, 0)
    made.silence, made.stopped = made.silent.get, None
    made.clones_dict = {
        n: SimpleNamespace(task=n, pack_task=lambda model, n=n: f"task of {n}".encode() + (model or b"")) for n in NAMES
    }
    return made


async def task_of(aggregator, name, process=""):
    """Number, step and message of what the participant is given, and whether it is over."""
    number, step, part, over = await aggregator.get_tasks(name, process)
    message = aggregator_pb2.GetTasksResponse.FromString(await part).execution_environment if part else b""
    return number, step, message, over


def test_a_task_is_given_again_until_it_is_answered(aggregator, module, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.01)

    async def play():
        await aggregator.ask("train")
        first, again = [await task_of(aggregator, "Amsterdam") for _ in range(2)]
        assert first == again == (1, "train", b"task of Amsterdam", False)
        aggregator.send_task_results("Amsterdam", 1, b"update", "")
        assert await task_of(aggregator, "Amsterdam") == (0, "", b"", False), "there is nothing to do for it"

    asyncio.run(play())
    assert [row["step"] for row in aggregator.traffic] == ["train", "train"], "both have travelled"
    assert vars(aggregator.clones_dict["Amsterdam"]).keys() == {"pack_task", "report"}


def test_who_is_started_anew_gets_the_global_model_until_it_has_answered(aggregator, module, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.01)
    aggregator.flow.current = b" and the model"

    async def play():
        async def asked_by(process):
            return (await task_of(aggregator, "Amsterdam", process))[2]

        await aggregator.ask("train")
        assert await asked_by("first") == await asked_by("first") == b"task of Amsterdam"
        assert await asked_by("second") == await asked_by("second") == b"task of Amsterdam and the model"
        aggregator.send_task_results("Amsterdam", 1, b"update", "")
        await aggregator.ask("evaluate")
        assert await asked_by("second") == b"task of Amsterdam", "it holds it now"

    asyncio.run(play())


def test_only_the_first_answer_to_the_task_itself_counts(aggregator):
    async def play():
        await aggregator.ask("train")
        aggregator.send_task_results("Amsterdam", 1, b"before it was asked", "")
        for name in NAMES:
            await aggregator.get_tasks(name)
        aggregator.send_task_results("Amsterdam", 2, b"to Bangalore's task", "")
        aggregator.send_task_results("Amsterdam", 1, b"first", "")
        aggregator.send_task_results("Amsterdam", 1, b"second", "")
        aggregator.send_task_results("Espoo", 1, b"a stranger", "")
        assert aggregator.clones_dict["Amsterdam"].report == b"first"
        assert list(aggregator.open) == ["Bangalore"] and not hasattr(aggregator.clones_dict["Bangalore"], "report")
        aggregator.open.clear()
        await aggregator.ask("evaluate")
        await aggregator.get_tasks("Amsterdam")
        aggregator.send_task_results("Amsterdam", 1, b"late", "")
        assert "Amsterdam" in aggregator.open

    asyncio.run(play())


def test_a_reason_instead_of_a_report_is_kept_short(aggregator, module):
    async def play():
        await aggregator.ask("train")
        await aggregator.get_tasks("Amsterdam")

    asyncio.run(play())
    aggregator.send_task_results("Amsterdam", 1, b"whatever", "no disk " * 10**6)
    assert aggregator.clones_dict["Amsterdam"].report == ("no disk " * 100)[: module.LONGEST_REASON]


def test_nobody_may_send_anything_before_it_was_asked_and_never_more_than_a_step_s_answer(aggregator):
    assert aggregator.largest_answer == 0
    aggregator.flow.largest_report = {"train": 100, "evaluate": 10}.get

    async def play():
        await aggregator.ask("train")
        aggregator.open.clear()
        await aggregator.ask("evaluate")
        await aggregator.get_tasks("Amsterdam")

    asyncio.run(play())
    assert aggregator.largest_answer == 100, "a late answer to train is read, and costs nobody its task"
    aggregator.send_task_results("Amsterdam", 1, bytes(50), "")
    assert "Amsterdam" in aggregator.open
    aggregator.send_task_results("Amsterdam", 3, bytes(50), "")
    assert aggregator.clones_dict["Amsterdam"].report == "evaluate: more than 10 bytes"


def test_who_repeats_itself_fills_no_memory(aggregator, module, caplog):
    async def play():
        await aggregator.ask("train")
        for _ in range(100):
            await aggregator.get_tasks("Amsterdam")

    asyncio.run(play())
    for _ in range(100):
        aggregator.send_task_results("Amsterdam", 99, b"", "")
    assert len(aggregator.traffic) == module.REPEATS
    assert len([record for record in caplog.records if "was not asked" in record.getMessage()]) == 1


def test_a_task_that_is_asked_for_at_once_is_packed_once_and_not_kept(aggregator):
    packed = []
    clone = aggregator.clones_dict["Amsterdam"]
    clone.pack_task = lambda model: packed.append(model) or bytes(10**6)

    async def play():
        await aggregator.ask("train")
        parts = [part for _, _, part, _ in [await aggregator.get_tasks("Amsterdam") for _ in range(8)]]
        assert len({id(await part) for part in parts}) == len(packed) == 1
        del parts
        gc.collect()
        assert not aggregator.packing

    asyncio.run(play())


def asked(aggregator, meanwhile=None, step="train"):
    """Asks everybody and waits for the answers, while something goes on."""
    aggregator.changed, aggregator.answered = asyncio.Condition(), asyncio.Event()  # of this loop

    async def both():
        await aggregator.ask(step)
        await asyncio.gather(aggregator.answers(step), *([meanwhile()] if meanwhile else []))

    asyncio.run(both())


def answers_of(aggregator, *names, after=0.0):
    """What these participants do: they answer after so many seconds."""

    async def answer():
        await asyncio.sleep(after)
        for name in names:
            number = (await aggregator.get_tasks(name))[0]
            aggregator.send_task_results(name, number, b"update", "")

    return answer


THREE = [*NAMES, "Chandler"]


@pytest.fixture
def of_three(aggregator):
    aggregator.selected_collaborators = aggregator.authorized_cols = THREE
    aggregator.silent.update(Chandler=0)
    aggregator.clones_dict["Chandler"] = SimpleNamespace(task="", pack_task=lambda model: b"task")
    return aggregator


def test_the_round_goes_on_without_who_has_no_heartbeat(of_three):
    of_three.flow = Flow(timeout=60)
    of_three.silent["Chandler"] = 61
    asked(of_three, answers_of(of_three, *NAMES))
    assert of_three.clones_dict["Chandler"].report == "train: no heartbeat for 61 s"
    assert all(of_three.clones_dict[name].report == b"update" for name in NAMES)
    asked(of_three, answers_of(of_three, *NAMES))  # nor is it waited for in the next step
    of_three.silent["Chandler"] = 1
    asked(of_three, answers_of(of_three, *THREE))
    assert of_three.clones_dict["Chandler"].report == b"update", "it is back"


@pytest.mark.slow
def test_slow_is_not_dead(of_three):
    """All of them work long, with heartbeats."""
    of_three.flow = Flow(timeout=1)
    asked(of_three, answers_of(of_three, *THREE, after=1.5))
    assert all(of_three.clones_dict[name].report == b"update" for name in THREE)


@pytest.mark.slow
def test_who_never_answers_is_left_out_and_the_next_time_when_the_others_have_answered(of_three, module, monkeypatch):
    """Though it has answered another step in time: its silence costs the others the long wait once for each step."""
    monkeypatch.setattr(module, "SLOWEST", 2)
    of_three.flow = Flow(timeout=1, longest=2)
    asked(of_three, answers_of(of_three, *NAMES, after=0.1))
    assert of_three.clones_dict["Chandler"].report == "train: no answer within 2 s"
    asked(of_three, answers_of(of_three, *THREE), step="evaluate")
    asked(of_three, answers_of(of_three, *NAMES, after=0.1))
    assert "train: no answer within 1 s, three quarters of the others" in of_three.clones_dict["Chandler"].report
    asked(of_three, answers_of(of_three, *THREE, after=0.1))
    assert not of_three.late, "it has answered"


@pytest.mark.slow
@pytest.mark.parametrize("names", [["Amsterdam"], NAMES])
def test_one_or_two_are_not_waited_for_for_ever(aggregator, names):
    aggregator.selected_collaborators, aggregator.flow = names, Flow(timeout=0.5, longest=1)
    asked(aggregator, answers_of(aggregator, *names[1:]))
    assert aggregator.clones_dict["Amsterdam"].report == "train: no answer within 1 s"


@pytest.mark.slow
def test_quick_colluders_do_not_choose_who_is_waited_for(aggregator, module, monkeypatch):
    """Two of five answer at once, one honest participant soon, the others need far longer than ten times that."""
    monkeypatch.setattr(module, "SLOWEST", 2)
    five = [*THREE, "Detroit", "Espoo"]
    aggregator.selected_collaborators = aggregator.authorized_cols = five
    aggregator.silent.update(dict.fromkeys(five, 0))
    aggregator.clones_dict = {n: SimpleNamespace(task="", pack_task=lambda model: b"task") for n in five}
    aggregator.flow = Flow(timeout=0.5)

    async def meanwhile():
        await asyncio.gather(
            answers_of(aggregator, "Detroit", "Espoo")(),
            answers_of(aggregator, "Amsterdam", after=0.1)(),
            answers_of(aggregator, "Bangalore", "Chandler", after=2)(),
        )

    asked(aggregator, meanwhile)
    assert all(aggregator.clones_dict[name].report == b"update" for name in five)


def test_too_few_are_the_end_and_the_missing_are_named(of_three):
    of_three.silent.update(Bangalore=70, Chandler=80)
    words = "train: 1 of 3 participants are left, 2 must be (min_participants); missing: Bangalore (no heartbeat for 70"
    with pytest.raises(ConnectionError, match=re.escape(words)):
        asked(of_three, answers_of(of_three, "Amsterdam"))
    of_three.flow = Flow(least=1)
    of_three.open.clear()
    asked(of_three, answers_of(of_three, "Amsterdam"))


def test_a_run_can_be_stopped(of_three):
    async def stop():
        of_three.stop("stopped by the experimenter")

    with pytest.raises(InterruptedError, match="round 1, train: stopped by the experimenter"):
        asked(of_three, stop)


def test_who_waits_for_a_task_gets_it_when_it_is_there(aggregator):
    async def play():
        waiting = asyncio.ensure_future(aggregator.get_tasks("Amsterdam"))
        await asyncio.sleep(0.1)
        await aggregator.ask("train")
        return await asyncio.wait_for(waiting, timeout=1)

    assert asyncio.run(play())[1] == "train"


def test_the_contract_is_what_flow_director_and_envoys_keep(module, experiment):
    """Protocol numbers and logger agree, and the flow has what the director and the envoys ask for."""
    from envoy import channel

    assert module.PROTOCOL == channel.PROTOCOL
    assert experiment.log.name == module.LOGGER
    flow = experiment.FederatedCrowdGuard()
    assert flow.history == [] and flow.current is None
    assert json.loads(json.dumps(flow.settings())).keys() < {*vars(flow.config), "middle layers"}
    flow.round, flow.current, flow.task = 1, b"model", experiment.Task(1)
    assert flow.after("train") == flow.collect_models
    assert flow.largest_report("train") > flow.largest_report("evaluate") > 0
    assert (
        flow.config.participant_timeout == 60
        and flow.config.answer_timeout == 3600
        and flow.config.min_participants is None
    )
    flow.take_task(flow.pack_task())
    with pytest.raises(LookupError):
        flow.after("start")
