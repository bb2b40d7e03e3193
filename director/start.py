"""Starts the director, which holds the federation together and runs the aggregator of every experiment.

    python director/start.py director/director.yaml --certificates certificates

Needs `ca.crt`, `director.crt` and `director.key` in the certificates' folder; every connection is mutual TLS.
"""

import argparse
import logging
import os
from importlib.metadata import version
from pathlib import Path

import yaml

OPENFL = "1.9"  # its last release, which director/ and envoy/ mend
KEYS = {"port": int, "envoy_health_check_period": int}


def read_config(path: Path) -> dict:
    """The director's settings, or `SystemExit` with one line that names file and key."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SystemExit(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"{path}: must hold the keys {', '.join(KEYS)}")
    if odd := sorted(map(str, config.keys() ^ KEYS.keys())):
        raise SystemExit(f"{path}: {odd[0]}: {'missing' if odd[0] in KEYS else 'unknown key'}")
    for key, kind in KEYS.items():
        if type(config[key]) is not kind:
            raise SystemExit(f"{path}: {key}: {config[key]!r} is not of type {kind.__name__}")
    return config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", default=Path(__file__).with_name("director.yaml"))
    parser.add_argument("--certificates", type=Path, default=Path("certificates"))
    args = parser.parse_args()
    if (found := version("openfl")) != OPENFL:
        raise SystemExit(f"OpenFL {found} is installed here, and {OPENFL} is needed: pip install openfl=={OPENFL}")
    config = read_config(args.config)
    files = {part: (args.certificates / part).absolute() for part in ("ca.crt", "director.crt", "director.key")}
    for file in files.values():
        if not file.exists():
            raise SystemExit(f"{file} is missing: python director/certificates.py makes it")
    os.environ.setdefault("METAFLOW_USER", "director")  # metaflow fails without a user name

    from server import check_port, serve

    try:
        check_port(config["port"])
    except OSError as error:
        raise SystemExit(f"{args.config}: port: {error}") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        serve(config, files)
    except KeyboardInterrupt:
        os._exit(130)  # OpenFL's threads would go on


if __name__ == "__main__":
    main()
