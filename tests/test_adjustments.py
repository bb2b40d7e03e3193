"""Broken connections and results that nobody asked for, at an aggregator of OpenFL's own."""

import asyncio
import queue
from types import SimpleNamespace

import dill
import pytest

NAMES = ["Amsterdam", "Bangalore"]


@pytest.fixture
def aggregator(experiment):
    """OpenFL's aggregator with our adjustments, in the middle of a step that both participants take."""
    made = object.__new__(experiment.Aggregator)
    made.clones_dict = {name: SimpleNamespace(input=name, _foreach_methods=[], execute_task_args=()) for name in NAMES}
    made._Aggregator__collaborator_tasks_queue = {name: queue.Queue() for name in NAMES}
    for name in NAMES:
        made._Aggregator__collaborator_tasks_queue[name].put(("train", made.clones_dict[name]))
    made.flow, made.connected_collaborators, made.selected_collaborators = SimpleNamespace(round=1), [], list(NAMES)
    made.current_round, made.time_to_quit, made.next_step = 1, False, None
    made.collaborators_counter, made.tasks_sent_to_collaborators = 0, 0
    made.collaborator_task_results, made.quit_job_sent_to = asyncio.Event(), []
    return made


def answer(aggregator, name, signed=None):
    following = getattr(aggregator.flow, "execute_task_args", ())
    result = SimpleNamespace(input=signed or name, _foreach_methods=[], execute_task_args=following, report=name)
    aggregator.send_task_results(name, 1, ["collect_models"], dill.dumps(result))


def test_a_task_is_given_again_until_it_is_answered(aggregator):
    first, again = (aggregator.get_tasks("Amsterdam") for _ in range(2))
    assert first[:3] == again[:3]
    answer(aggregator, "Amsterdam")
    aggregator.time_to_quit = True
    assert aggregator.get_tasks("Amsterdam")[2] is None
    assert [row["step"] for row in aggregator.traffic] == ["train", "train"], "both have travelled"


def test_a_result_counts_once(aggregator):
    for name in NAMES:
        aggregator.get_tasks(name)
    for _ in range(3):
        answer(aggregator, "Amsterdam")
    assert aggregator.collaborators_counter == 1 and not aggregator.collaborator_task_results.is_set()
    answer(aggregator, "Bangalore")
    assert aggregator.collaborators_counter == 0 and aggregator.collaborator_task_results.is_set()


def test_a_result_that_nobody_asked_for_is_left_out(aggregator):
    before = aggregator.clones_dict["Bangalore"]
    answer(aggregator, "Bangalore")
    assert aggregator.clones_dict["Bangalore"] is before and aggregator.collaborators_counter == 0


def test_nobody_answers_in_the_name_of_another(aggregator):
    for name in NAMES:
        aggregator.get_tasks(name)
    answer(aggregator, "Amsterdam")
    answer(aggregator, "Bangalore", signed="Amsterdam")
    assert aggregator.clones_dict["Amsterdam"].report == "Amsterdam"
    assert not hasattr(aggregator.clones_dict["Bangalore"], "report"), "which is a failure of its own"


def test_more_participants_than_small_integers(aggregator):
    """Above 256 OpenFL never sees that all have answered."""
    aggregator.selected_collaborators = [f"P{i}" for i in range(300)]
    aggregator.collaborators_counter = 299
    aggregator.get_tasks("Amsterdam")
    answer(aggregator, "Amsterdam")
    assert aggregator.collaborators_counter == 0 and aggregator.collaborator_task_results.is_set()


def waiting(experiment, aggregator, patience, meanwhile, seconds):
    """Watches a flow that takes so long, while something goes on."""

    async def both():
        flow = asyncio.ensure_future(asyncio.sleep(seconds, "done"))
        return (await asyncio.gather(experiment.watch(aggregator, flow, patience, every=0.1), meanwhile(flow)))[0]

    async def step():
        pass

    step.collaborator_step = True
    aggregator.flow.execute_task_args = (None, step, step)
    return asyncio.run(both())


async def nothing(flow):
    pass


def test_patience_ends_when_nobody_answers_even_if_somebody_keeps_asking(experiment, aggregator):
    async def ask(flow):
        while not flow.done():
            aggregator.get_tasks("Amsterdam")
            await asyncio.sleep(0.05)

    for meanwhile in (nothing, ask):
        with pytest.raises(TimeoutError, match="step: 0 of 2 participants"):
            waiting(experiment, aggregator, 0.5, meanwhile, seconds=5)


def test_patience_lasts_while_answers_come(experiment, aggregator):
    async def take_turns(flow):
        while not flow.done():
            for name in NAMES:
                aggregator._Aggregator__collaborator_tasks_queue[name].put(("train", aggregator.clones_dict[name]))
                aggregator.get_tasks(name)
                answer(aggregator, name)
                await asyncio.sleep(0.1)

    assert waiting(experiment, aggregator, 0.5, take_turns, seconds=2) == "done"


def test_short_outages_do_not_add_up(experiment, monkeypatch):
    """The client gives up after 30 attempts in a row, not after 30 in all."""
    kind = experiment.aggregator_client.AggregatorGRPCClient
    client = object.__new__(kind)
    policy = experiment.aggregator_client.ConstantBackoff(0, SimpleNamespace(info=lambda *_: None), "localhost:1")
    client.interceptors = [SimpleNamespace(sleeping_policy=policy)]
    monkeypatch.setattr(kind.validate_response, "__wrapped__", lambda *_: None)
    for _ in range(3):
        for _ in range(experiment.TRIES):
            policy.sleep()
        client.validate_response(None, "Amsterdam")
    for _ in range(experiment.TRIES):
        policy.sleep()
    with pytest.raises(ConnectionError, match="no aggregator"):
        policy.sleep()
