"""What goes wrong on ordinary days: processes end, disks are full, links are cut. The round goes on, nothing is lost.

    pytest tests/live/test_faults.py

starts a federation of its own. `FAULTS_LOG` names a file to which each test writes what was seen and how long it took.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from cluster import NAMES, ROOT, Cluster, heeds_ctrl_c, note

ENDLESS = ["rounds=100000", "local_epochs=30"]  # for runs that are ended when all has been seen
FIVE = ["rounds=5", "participant_timeout=40"]  # for runs that are compared bit by bit: nobody may be missed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


def failures(rows: list[dict]) -> dict:
    return {row["round"]: row["failed"] for row in rows if row["failed"]}


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """Model and history of five rounds without any fault: a function of the aggregation."""

    @functools.cache
    def of(aggregation):
        run = cluster.notebook([*FIVE, f"aggregation={aggregation!r}"]).well(5)
        return run.model(), run.rows()

    return of


@pytest.mark.parametrize("seed", [1, 2])
def test_an_envoy_that_is_killed_and_started_again_is_missed_and_comes_back(cluster, seed):
    rng = random.Random(seed)
    victim, after = rng.choice(NAMES), rng.uniform(0, 4)
    running = cluster.notebook(ENDLESS).reached(2)
    time.sleep(after)
    cluster.kill(victim)
    started = time.monotonic()
    time.sleep(8)  # participant_timeout is 6
    cluster.restart(victim)
    rows = running.until_back(victim)
    seen = failures(rows)
    assert all(set(failed) == {victim} for failed in seen.values()), seen
    assert all(set(row["votes"]) >= set(NAMES) - {victim} for row in rows), [(r["round"], [*r["votes"]]) for r in rows]
    fault = f"kill -9 of an envoy {after:.1f} s after round 2, restarted after 8 s"
    note(fault, f"missed in {len(seen)} of {len(rows)} rounds, then back", time.monotonic() - started)


@pytest.mark.parametrize(("seed", "points", "rounds"), [(1, 1, 3), (1, 6, 10), (2, 6, 10), (3, 6, 10)])
def test_envoys_that_are_killed_at_many_points_are_back_in_the_end(cluster, seed, points, rounds):
    """Each one is drawn, like the point, and connected again before the next is killed.

    Back within `participant_timeout` it is asked again and gets the whole model. What it loses is at most a vote: that
    needs the update which it has sent before.
    """
    rng = random.Random(seed)
    running = cluster.notebook([f"rounds={rounds}", "local_epochs=60", "participant_timeout=30"])
    running.submitted()
    killed, seconds = [], []
    for round in sorted(rng.sample(range(rounds - 2), points)):
        running.reached(round)
        victim, after, dead = rng.choice(NAMES), rng.uniform(0, 3), rng.uniform(0, 3)
        time.sleep(after)
        killed.append((len(running.rows()) + 1, victim))
        begun = time.monotonic()
        cluster.kill(victim)
        time.sleep(dead)
        cluster.back(victim)
        seconds.append(time.monotonic() - begun)
    rows = running.well(rounds, 300).rows()
    assert [row["round"] for row in rows] == list(range(1, rounds + 1))
    assert rows[-1]["failed"] == {} and set(rows[-1]["votes"]) == set(NAMES), "all are back"
    for row in rows:
        assert row["failed"].keys() <= {victim for at, victim in killed if at <= row["round"]}, row["failed"]
        assert all("no update of its own to compare with" in reason for reason in row["failed"].values()), row["failed"]
        assert row["accepted"] == NAMES, "everybody's update has come"
    seen = f"(round, victim): {killed}; missed: {failures(rows)}"
    note(f"kill -9 of envoys at {points} points of {rounds} rounds, seed {seed}", seen, max(seconds))


def test_an_envoy_that_stays_away_is_named_and_the_round_goes_on(cluster):
    running = cluster.notebook(["rounds=6"]).reached(2)
    started, before = time.monotonic(), len(running.rows())
    cluster.kill("Bangalore")
    running.reached(before + 2)
    waited = time.monotonic() - started
    rows = running.well(6).rows()
    cluster.back("Bangalore")
    missed = failures(rows)
    assert all("Bangalore" in failed for failed in missed.values()), missed
    reasons = {failed["Bangalore"] for failed in missed.values()}
    assert any("no heartbeat for" in reason for reason in reasons), missed
    assert rows[-1]["failed"].keys() == {"Bangalore"}
    assert waited < 6 + 15, "participant_timeout is 6 s here"
    note("kill -9 of an envoy, for good (participant_timeout=6)", min(reasons), waited)


def test_an_envoy_that_hangs_is_named_and_comes_back_when_it_goes_on(cluster):
    running = cluster.notebook(ENDLESS).reached(2)
    started, before = time.monotonic(), len(running.rows())
    cluster.kill("Chandler", signal.SIGSTOP)
    running.reached(before + 2)
    waited = time.monotonic() - started
    cluster.kill("Chandler", signal.SIGCONT)
    reasons = {failed["Chandler"] for failed in failures(running.until_back("Chandler")).values()}
    assert any("no heartbeat for" in reason for reason in reasons)
    note("SIGSTOP of an envoy, SIGCONT two rounds later", min(reasons), waited)


def test_with_too_few_participants_the_run_ends_names_them_and_can_go_on(cluster):
    running = cluster.notebook(["rounds=5"]).reached(2)
    (run, experiment), started = running.submitted(), time.monotonic()
    for name in ("Amsterdam", "Bangalore"):
        cluster.kill(name)
    log = running.ended()
    waited = time.monotonic() - started
    assert running.process.returncode == 1
    assert "2 of 4 participants are left, 3 must be (min_participants); missing: Amsterdam (no heartbeat for" in log
    assert f"go on with: CROWDGUARD_RESUME={run}" in log and len(running.rows()) >= 2
    assert f"{experiment} was finished successfully" not in cluster.log("director").read_text()
    cluster.back("Amsterdam", "Bangalore")
    cluster.notebook(["rounds=5"], "resume", run).well(5)
    note("two of four envoys killed", log.strip().splitlines()[-1][:200], waited)


@pytest.mark.parametrize("aggregation", ["CrowdGuard", "FedAvg"])
def test_a_director_that_is_killed_and_started_again_goes_on_and_ends_with_the_same_model(
    cluster, undisturbed, aggregation
):
    settings = [*FIVE, f"aggregation={aggregation!r}"]
    running = cluster.notebook(settings).reached(2)
    run, started = running.submitted()[0], time.monotonic()
    cluster.kill("director")
    cluster.restart("director")
    log = running.ended()
    cluster.all_are_there()
    assert running.process.returncode == 1 and "was the director restarted? RESUME=" in log, log[-2000:]
    resumed = cluster.notebook(settings, "resume", run).well(5)
    model, rows = undisturbed(aggregation)
    assert resumed.model() == model, "bit by bit"
    assert [row["main_accuracy"] for row in resumed.rows()] == [row["main_accuracy"] for row in rows]
    assert [row["votes"] for row in resumed.rows()] == [row["votes"] for row in rows]
    note(f"kill -9 of the director, restart, resume ({aggregation})", "same model", time.monotonic() - started)


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_is_used(cluster, undisturbed):
    running = cluster.notebook(FIVE).reached(3)
    run = running.submitted()[0]
    cluster.kill("director")
    kept = sorted((cluster.place / "runs" / "director" / run).glob("round-*"))
    with (kept[-1] / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    cluster.restart("director")
    running.ended()
    cluster.all_are_there()
    resumed = cluster.notebook(FIVE, "resume", run).well(5)
    assert resumed.model() == undisturbed("CrowdGuard")[0]
    assert "the round before is used" in cluster.log("director").read_text()


def test_other_settings_are_refused_when_a_run_goes_on(cluster):
    running = cluster.notebook(["rounds=2"]).well(2)
    refused = cluster.notebook(["rounds=3", "learning_rate=0.1"], "resume", running.submitted()[0])
    assert "has learning_rate 0.0005, not 0.1: choose the same settings" in refused.ended()
    nothing = cluster.notebook(["rounds=3"], "resume", "run-of-nobody")
    assert "nothing is kept of a run run-of-nobody" in nothing.ended()


def test_ctrl_c_stops_the_run_and_neither_the_next_nor_itself_is_lost(cluster, undisturbed):
    running = cluster.notebook(FIVE).reached(2)
    run, started = running.submitted()[0], time.monotonic()
    running.interrupted()
    waited = time.monotonic() - started
    cluster.notebook(["rounds=1"]).well(1)
    assert cluster.notebook(FIVE, "resume", run).well(5).model() == undisturbed("CrowdGuard")[0]
    note("Ctrl-C in the notebook", "stopped; the next run is well; it goes on with the same model", waited)


def test_a_run_that_goes_on_without_somebody_has_it_back_as_soon_as_it_comes(cluster):
    running = cluster.notebook(ENDLESS).reached(2)
    run, _ = running.submitted()
    running.interrupted()
    cluster.kill("Bangalore")
    time.sleep(5)  # until it is known to be away
    started = time.monotonic()
    again = cluster.notebook(ENDLESS, "resume", run).reached(4)
    cluster.back("Bangalore")
    rows = again.until_back("Bangalore")
    assert all(row["participants"] == NAMES for row in rows)
    seen = failures(rows)
    assert seen and all(failed.keys() == {"Bangalore"} for failed in seen.values()), seen
    note("a run goes on (RESUME) while an envoy is away", "named; back at once", time.monotonic() - started)


def test_a_notebook_that_is_killed_can_be_attached_again_and_the_next_waits_its_turn(cluster):
    running = cluster.notebook(["rounds=30", "local_epochs=60"])
    run, name = running.submitted()
    second = cluster.notebook(["rounds=1"])
    running.reached(1).process.kill()
    attached = cluster.notebook(wish="attach", name=name)
    assert [row["round"] for row in attached.well(30).rows()] == list(range(1, 31)) and attached.model()
    assert json.loads((attached.folder / "history.json").read_text())["run"] == run
    assert "1 experiment(s) before this one; it waits for its turn" in second.well(1).log.read_text()


def test_a_director_that_is_restarted_while_all_are_idle_has_its_envoys_back(cluster):
    cluster.kill("director")
    started = time.monotonic()
    cluster.restart("director")
    cluster.all_are_there()
    waited = time.monotonic() - started
    assert waited < 30
    assert cluster.notebook(["rounds=1"]).well(1).rows()[0]["participants"] == NAMES
    note("director restarted while all are idle", "all envoys are back", waited)


def test_of_two_machines_with_one_name_the_newer_stays(cluster):
    older = cluster.processes["Detroit"]
    cluster.back("Detroit")
    assert older.wait(timeout=20) == 1
    rows = cluster.notebook(["rounds=1"]).well(1).rows()
    assert rows[0]["failed"] == {} and "Detroit" in rows[0]["votes"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_an_envoy_whose_disk_is_full_ends_and_is_back_when_there_is_space(cluster, small_disk):
    cluster.kill("Amsterdam")
    runs = cluster.place / "runs" / "Amsterdam"
    runs.rename(runs.with_name("aside"))
    runs.symlink_to(small_disk)
    cluster.back("Amsterdam")
    (small_disk / "filler").write_bytes(bytes(1 << 20))
    process, started = cluster.processes["Amsterdam"], time.monotonic()
    rows = cluster.notebook(["rounds=2"]).well(2).rows()
    waited = time.monotonic() - started
    assert process.wait(timeout=20) == 1 and "No space left" in cluster.log("Amsterdam").read_text()
    assert rows[-1]["failed"].keys() == {"Amsterdam"}
    (small_disk / "filler").unlink()
    cluster.back("Amsterdam")
    assert cluster.notebook(["rounds=1", "participant_timeout=40"]).well(1).rows()[0]["failed"] == {}
    cluster.kill("Amsterdam")
    runs.unlink()
    runs.with_name("aside").rename(runs)
    cluster.back("Amsterdam")
    note("an envoy's disk full", "it ends with code 1; the round goes on", waited)


def test_a_director_whose_disk_is_full_goes_on_without_keeping(cluster, small_disk):
    running = cluster.notebook(["rounds=8"]).reached(1)
    folder = cluster.place / "runs" / "director" / running.submitted()[0]
    subprocess.run(["mount", "--bind", small_disk, folder], check=True)
    try:
        (small_disk / "filler").write_bytes(bytes((1 << 20) - 8192))
        running.well(8)
        assert "cannot be kept at the director: [Errno 28] No space left" in running.log.read_text()
    finally:
        subprocess.run(["umount", folder], check=True)


def test_make_run_is_interrupted_by_ctrl_c_and_goes_on_with_resume(tmp_path):
    results = tmp_path / "results"

    def make(*variables):
        settings = [f"BIN={Path(sys.executable).parent}", f"RESULTS={results}", "SET=rounds=5 hidden=16 width=16"]
        return subprocess.Popen(
            ["make", "--assume-old=.venv/ready", "run", *settings, *variables], cwd=ROOT, start_new_session=True,
            stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"CROWDGUARD_RUNS": str(tmp_path / "runs")}, preexec_fn=heeds_ctrl_c,
        )  # fmt: skip

    def reached():
        return json.loads((results / "history.json").read_text()) if (results / "history.json").exists() else {}

    interrupted, deadline = make(), time.monotonic() + 400
    while len(reached().get("federation", [])) < 2:
        assert interrupted.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.2)
    descendants, started = psutil.Process(interrupted.pid).children(recursive=True), time.monotonic()
    os.killpg(interrupted.pid, signal.SIGINT)
    assert interrupted.wait(timeout=60) != 0
    waited, before = time.monotonic() - started, reached()
    assert psutil.wait_procs(descendants, timeout=10)[1] == [], "nothing is left running"
    told = (tmp_path / "log").read_text().splitlines()
    assert any(
        " go on with: make run SET='rounds=5 " in line and line.endswith(f" RESUME={before['run']}") for line in told
    )
    assert make(f"RESUME={before['run']}").wait(timeout=500) == 0, (tmp_path / "log").read_text()[-3000:]
    rows = reached()["federation"]
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5] and rows[:2] == before["federation"][:2]
    note("Ctrl-C in make run, then make run RESUME", f"went on after round {len(before['federation'])}", waited)
