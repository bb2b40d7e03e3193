"""Whatever takes long says how far it is."""

import contextlib
import logging
import sys
import threading
import time

log = logging.getLogger("FederatedCrowdGuard")


class Console(logging.StreamHandler):
    """Shows log records and knows when it last did."""

    last = 0.0

    def emit(self, record):
        super().emit(record)
        self.last = time.monotonic()


console = Console(sys.stdout)


def show_log() -> None:
    """Shows in the notebook what is logged."""
    console.setStream(sys.stdout)  # the kernel's, if this was imported before
    if console not in log.handlers:
        log.addHandler(console)
    log.setLevel(logging.INFO)


@contextlib.contextmanager
def heartbeat(what: str, every: float = 10):
    """While the block runs, `what` is said whenever nothing else has been for so many seconds."""
    done, console.last, started = threading.Event(), time.monotonic(), time.monotonic()

    def watch():
        while not done.wait(1):
            if time.monotonic() - console.last > every:
                log.info("%s (%.0f s)", what, time.monotonic() - started)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
