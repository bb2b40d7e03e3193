"""Ends processes when the one that started this ends, however it ends.

Reads one process id a line from standard input. At its end, which comes even if the writer is killed, it ends all of
them with their descendants, and removes the folder named as its argument (throw-away certificates).
"""

import contextlib
import os
import shutil
import signal
import sys

import psutil

GRACE = 5  # seconds between asking and forcing


def end_trees(pids: list[int]) -> None:
    """Ends the processes with their groups and all their descendants."""
    doomed = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            doomed += [*process.children(recursive=True), process]
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(doomed, GRACE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for pid in pids:  # each leads a group of its own, in which there may be some whose parent has ended
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_trees([int(line) for line in sys.stdin])
    shutil.rmtree(sys.argv[1], ignore_errors=True)
