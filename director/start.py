"""Starts the director, which holds the federation together and runs the aggregator of every experiment.

    python director/start.py director/director.yaml --certificates certificates

Needs `ca.crt`, `director.crt` and `director.key` in the certificates' folder; every connection is mutual TLS.
"""

import argparse
import asyncio
import logging
import os
import socket
from pathlib import Path

import yaml

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


def check_port(path: Path, port: int) -> None:
    """gRPC would share a port that is in use with its owner; here it is an error."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise SystemExit(f"{path}: port: {port} cannot be used: {error}") from None


class ShortNaps:
    """asyncio for OpenFL's director, which looks every ten seconds whether an experiment has come or ended."""

    def __getattr__(self, name):
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds):
        await asyncio.sleep(min(seconds, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", default=Path(__file__).with_name("director.yaml"))
    parser.add_argument("--certificates", type=Path, default=Path("certificates"))
    args = parser.parse_args()
    config = read_config(args.config)
    check_port(args.config, config["port"])
    files = {part: (args.certificates / part).absolute() for part in ("ca.crt", "director.crt", "director.key")}
    for file in files.values():
        if not file.exists():
            raise SystemExit(f"{file} is missing: python director/certificates.py makes it")
    os.environ.setdefault("METAFLOW_USER", "director")  # metaflow fails without a user name

    import grpc
    from openfl.experimental.workflow.component.director import Director, director, experiment
    from openfl.experimental.workflow.transport import DirectorGRPCServer

    class Gate(DirectorGRPCServer):
        """The director's server, which lets nobody pass for somebody else: OpenFL looks at no certificate's name."""

        async def require(self, name, context):
            if self.get_caller(context) != name:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"this is for the certificate of {name} alone")

        async def EnvoyConnectionRequest(self, request, context):
            await self.require(request.envoy_name, context)
            return super().EnvoyConnectionRequest(request, context)

        async def SetNewExperiment(self, stream, context):
            await self.require("experimenter", context)
            return await super().SetNewExperiment(stream, context)

        async def GetFlowState(self, request, context):
            await self.require("experimenter", context)
            return await super().GetFlowState(request, context)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # It says every second what it waits for; the experiment itself says so every ten.
    logging.getLogger("openfl.experimental.workflow.component.aggregator").setLevel(logging.WARNING)
    director.asyncio = experiment.asyncio = ShortNaps()
    server = Gate(
        director_cls=Director,
        director_config=args.config.absolute(),
        root_certificate=files["ca.crt"],
        certificate=files["director.crt"],
        private_key=files["director.key"],
        listen_host="[::]" if socket.has_dualstack_ipv6() else "0.0.0.0",
        listen_port=config["port"],
        envoy_health_check_period=config["envoy_health_check_period"],
        install_requirements=False,  # an experiment does not change this machine's packages
    )
    try:
        server.start()
    except KeyboardInterrupt:
        os._exit(130)  # OpenFL's threads would go on


if __name__ == "__main__":
    main()
