"""Starts the director, which holds the federation together and runs the aggregator of every experiment.

    python director/start.py director/director.yaml --certificates certificates

Needs `ca.crt`, `director.crt` and `director.key` in the certificates' folder; every connection is mutual TLS. It works
in a folder of its own in `--runs`.
"""

import argparse
import logging
import os
import re
import shutil
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import grpc
import yaml

# Threads that spin while they wait take the cores from the other processes of a machine; OpenMP reads it at import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
warnings.filterwarnings("ignore", module="(.*/)?(metaflow|_distutils_hack)")  # OpenFL's dependencies on their own age

OPENFL = "1.9"  # its last release, which director/ and envoy/ mend
GRPC = (1, 85)  # refuses a long message before it has come whole
KEYS = ("port", "envoy_health_check_period")  # whole numbers
MOST = 65_535  # the largest port


def read_config(path: Path) -> dict[str, int]:
    """The director's settings, or `SystemExit` with one line that names file and key."""
    try:
        # Not as values, as YAML 1.1 has them: 010 is 8 there, 1:30 is 90, and of two equal keys the second lasts.
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: byte {error.start} is not UTF-8: save the file with that encoding") from None
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise SystemExit(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise SystemExit(f"{path}: must hold the keys {', '.join(KEYS)}")
    config = {}
    for key, value in ((str(key.value), value.value) for key, value in node.value):
        if key not in KEYS or key in config:
            raise SystemExit(f"{path}: {key!r:.80}: {'is there twice' if key in config else 'unknown key'}")
        if not (isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,4}", value) and int(value) <= MOST):
            raise SystemExit(f"{path}: {key}: {value!r:.80} is not a whole number from 1 to {MOST}")
        config[key] = int(value)
    if missing := [key for key in KEYS if key not in config]:
        raise SystemExit(f"{path}: {missing[0]}: missing")
    return config


class Seldom(logging.Filter):
    """Lets each line of code log so many times a minute: what a member causes again and again would fill the disk."""

    def __init__(self, most: int = 200):
        super().__init__()
        self.most, self.minute, self.counts = most, None, Counter()

    def filter(self, record) -> bool:
        if (minute := time.monotonic() // 60) != self.minute:
            self.minute, self.counts = minute, Counter()
        self.counts[place := (record.pathname, record.lineno)] += 1
        if self.counts[place] == self.most:
            record.msg, record.args = (
                f"{record.getMessage()} (what else of this kind comes in this minute is left out)",
                (),
            )
        return self.counts[place] <= self.most


class Refusal(grpc.GenericRpcHandler):
    """Answers every call with the same words."""

    def __init__(self, words: str):
        self.words = words

    def service(self, details):
        def refuse(request, context):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.words)

        return grpc.unary_unary_rpc_method_handler(refuse)


def refuse(port: int, files: dict[str, Path], words: str) -> None:
    """Tells whoever calls that there can be no director, until it is interrupted: the notebook is elsewhere."""
    root, certificate, key = (path.read_bytes() for path in files.values())
    server = grpc.server(ThreadPoolExecutor(4), handlers=[Refusal(words)])
    server.add_secure_port(f"[::]:{port}", grpc.ssl_server_credentials(((key, certificate),), root, True))
    server.start()
    print(words, flush=True)
    server.wait_for_termination()


def work_in(folder: Path) -> None:
    """Makes it the current folder, without what is left of experiments in which this was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / ".metaflow").mkdir(parents=True)  # or metaflow makes one in the first experiment's folder, which stays
    os.chdir(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", default=Path(__file__).with_name("director.yaml"))
    parser.add_argument("--certificates", type=Path, default=Path("certificates"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder in which every round is kept")
    parser.add_argument("--work", type=Path, help="where it makes a folder to work in, and empties it; default: --runs")
    args = parser.parse_args()
    config = read_config(args.config)
    files = {part: (args.certificates / part).absolute() for part in ("ca.crt", "director.crt", "director.key")}
    for file in files.values():
        if not file.exists():
            raise SystemExit(f"{file} is missing: python director/certificates.py makes it")
    if (found := version("openfl")) != OPENFL:
        refuse(
            config["port"], files, f"the director has OpenFL {found} and needs {OPENFL}: pip install openfl=={OPENFL}"
        )
    os.environ.setdefault("METAFLOW_USER", "director")  # metaflow fails without a user name

    from server import check_port, serve, translate_handshakes

    try:
        check_port(config["port"])
    except OSError as error:
        raise SystemExit(f"{args.config}: port: {error}") from None
    args.runs = args.runs.absolute()
    work_in((args.work or args.runs) / f".director-{config['port']}")
    translate_handshakes()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().handlers[0].addFilter(Seldom())
    if tuple(map(int, (found := version("grpcio")).split(".")[:2])) < GRPC:
        logging.warning(
            "grpcio %s holds whatever a member sends in memory: pip install --no-deps -r director/requirements.txt",
            found,
        )
    try:
        serve(config, files, args.runs)
    except KeyboardInterrupt:
        os._exit(130)  # OpenFL's threads would go on


if __name__ == "__main__":
    main()
