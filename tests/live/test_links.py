"""Machines of their own, as network namespaces, whose links are cut. Skipped where these may not be made.

    pytest tests/live/test_links.py

`FAULTS_LOG` names a file to which each test writes what was seen and how long it took.
"""

import time

import pytest
from cluster import Cluster, Link, note

SHORT, LONG = 20, 300  # seconds


def interruptions(*seconds):
    """Each way of interrupting a link, for so many seconds."""
    ways = [(how, length) for length in seconds for how in ("cut", "blackhole")]
    return pytest.mark.parametrize("interrupted", ways, indirect=True, ids="{0[0]}-{0[1]}".format)


@pytest.fixture(scope="module")
def link():
    try:
        with Link() as made:
            yield made
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cluster(link, tmp_path_factory):
    """Chandler and the notebooks are on the other machine, the director and the others on this one."""
    with Cluster(tmp_path_factory.mktemp("links"), link.here, within={"Chandler": link.within}) as started:
        yield started


@pytest.fixture
def interrupted(request, link):
    """Interrupts the link; returns what it did."""
    how, seconds = request.param

    def interrupt() -> str:
        with getattr(link, how)():
            time.sleep(seconds)
        return f"{how} of {seconds} s"

    return interrupt


@interruptions(SHORT, LONG)
def test_an_envoy_whose_link_is_cut_is_missed_and_comes_back(cluster, interrupted):
    running = cluster.notebook(["rounds=100000", "local_epochs=20", "participant_timeout=8"]).reached(2)
    how, repaired, before = interrupted(), time.monotonic(), len(running.rows())
    running.until(lambda: "Chandler" in running.rows()[-1]["votes"] and len(running.rows()) > before, 120)
    waited = time.monotonic() - repaired
    running.interrupted()
    rows = running.rows()
    reasons = [row["failed"]["Chandler"] for row in rows if row["failed"]]
    assert all(row["failed"].keys() <= {"Chandler"} for row in rows)
    assert all(set(row["votes"]) >= {"Amsterdam", "Bangalore", "Detroit"} for row in rows)
    assert any("no heartbeat for" in reason for reason in reasons)
    note(f"an envoy's link, {how}", f"missed in {len(reasons)} of {len(rows)} rounds, back after", waited)


@interruptions(SHORT)
def test_a_link_that_is_cut_while_all_are_idle_costs_nothing(cluster, interrupted):
    how, repaired = interrupted(), time.monotonic()
    cluster.wait_for("Chandler", lambda: "Chandler" in cluster.online())
    waited = time.monotonic() - repaired
    assert cluster.notebook(["rounds=1"]).well(1).rows()[0]["failed"] == {}
    note(f"an idle envoy's link, {how}", "back after", waited)


@interruptions(SHORT, LONG)
def test_a_notebook_whose_link_is_cut_gets_its_result(cluster, link, interrupted):
    running = cluster.notebook(["rounds=30", "local_epochs=20"], within=link.within).reached(2)
    how, repaired = interrupted(), time.monotonic()
    assert running.well(30, 300).model()
    note(f"the notebook's link, {how}", "it has its result after", time.monotonic() - repaired)
