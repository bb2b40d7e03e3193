"""Machines of their own, as network namespaces, whose links are cut. Skipped where these may not be made.

pytest tests/live/test_links.py
"""

import os
import subprocess
import time

import pytest
from cluster import Cluster

HERE, THERE = "10.231.7.1", "10.231.7.2"
SECONDS = float(os.environ.get("LINK_CUT", 20))


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def link():
    """A namespace that is reached through `fcg-here`; cutting that link cuts it off."""
    try:
        ip("netns", "add", "fcg")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    try:
        ip("link", "add", "fcg-here", "type", "veth", "peer", "name", "fcg-there")
        ip("link", "set", "fcg-there", "netns", "fcg")
        ip("addr", "add", f"{HERE}/24", "dev", "fcg-here")
        ip("link", "set", "fcg-here", "up")
        for words in (("addr", "add", f"{THERE}/24", "dev", "fcg-there"), ("link", "set", "fcg-there", "up")):
            ip("-n", "fcg", *words)
        yield "fcg-here"
    finally:
        ip("netns", "del", "fcg")


class Apart(Cluster):
    """Chandler and the notebooks are on the other machine, the director and the others on this one."""

    def __init__(self, folder):
        super().__init__(folder, host=HERE)

    def spawn(self, name, command):
        super().spawn(name, command, within=("ip", "netns", "exec", "fcg") if name == "Chandler" else ())


@pytest.fixture(scope="module")
def cluster(link, tmp_path_factory):
    with Apart(tmp_path_factory.mktemp("links")) as started:
        yield started


@pytest.fixture
def cut(link):
    """Cuts the link for so many seconds."""

    def cut(seconds):
        ip("link", "set", link, "down")
        time.sleep(seconds)
        ip("link", "set", link, "up")

    yield cut
    ip("link", "set", link, "up")


def test_a_link_that_is_cut_for_a_while_costs_at_most_some_rounds(cluster, cut):
    running = cluster.notebook(["rounds=60", "local_epochs=20", "participant_timeout=8"]).reached(2)
    cut(SECONDS)
    rows = running.well(60, 300).rows()
    missed = [row["round"] for row in rows if row["failed"]]
    assert all(row["failed"].keys() <= {"Chandler"} for row in rows)
    assert rows[-1]["failed"] == {} and "Chandler" in rows[-1]["votes"], (missed, rows[-1]["failed"])


def test_a_link_that_is_cut_while_all_are_idle_costs_nothing(cluster, cut):
    cut(SECONDS)
    time.sleep(20)
    assert cluster.notebook(["rounds=1"]).well(1).rows()[0]["failed"] == {}


def test_a_notebook_whose_link_is_cut_gets_its_result(cluster, cut):
    running = cluster.notebook(["rounds=30", "local_epochs=20"], within=("ip", "netns", "exec", "fcg")).reached(2)
    cut(SECONDS)
    assert running.well(30, 300).model()
