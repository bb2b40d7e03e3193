"""Starts one participant's envoy, which waits for experiments and takes part in them with the participant's own data.

    python envoy/start.py envoy/Amsterdam.yaml --certificates certificates

Needs `ca.crt`, `<name>.crt` and `<name>.key` in the certificates' folder; every connection is mutual TLS. The settings
and the data are looked at before the envoy joins. It works in the current folder.
"""

import argparse
import logging
import os
import socket
import sys
from pathlib import Path

import yaml


def openfl_config(settings) -> dict:
    """The envoy config that OpenFL reads at every experiment."""
    attributes = settings.model_dump(mode="json", exclude={"director"})
    if settings.data.folder:
        # OpenFL takes a string with a dot in its last part for the name of something to import.
        attributes["data"]["folder"] = f"{settings.data.folder.expanduser().absolute()}/"
    return {settings.name: {"callable_func": {"template": "private_attributes.participant", "settings": attributes}}}


def director_answers(path: Path, address: str) -> tuple[str, int]:
    """Host and port of a director that is there, or `SystemExit` with one line."""
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise SystemExit(f"{path}: director: nobody answers at {address} ({error}); is it started?") from None
    return host, int(port)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="the participant's YAML file")
    parser.add_argument("--certificates", type=Path, default=Path("certificates"))
    args = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).parent.absolute()))
    import private_attributes

    settings = private_attributes.read_settings(args.settings)
    config = openfl_config(settings)
    try:
        private_attributes.participant(**config[settings.name]["callable_func"]["settings"])
    except ValueError as error:
        raise SystemExit(f"{args.settings}: {error}") from None
    names = ("ca.crt", f"{settings.name}.crt", f"{settings.name}.key")
    root, certificate, key = ((args.certificates / name).absolute() for name in names)
    for file in (root, certificate, key):
        if not file.exists():
            raise SystemExit(f"{file} is missing: the operator of the director makes it")
    host, port = director_answers(args.settings, settings.director)

    from openfl.experimental.workflow.component.envoy import Envoy, envoy

    class Client(envoy.EnvoyDirectorClient):
        """Takes the whole experiment at once, where OpenFL tries again after an error; later it would end the envoy."""

        def get_experiment_data(self, name):
            return list(super().get_experiment_data(name))

    class Participant(Envoy):
        """Imports every experiment's own `src`: each is in another folder."""

        def _run_collaborator(self):
            for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
                del sys.modules[name]
            super()._run_collaborator()

    envoy.EnvoyDirectorClient = Client
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("METAFLOW_USER", settings.name)  # metaflow fails without a user name
    written = Path(f"{settings.name}.openfl.yaml").absolute()
    written.write_text(yaml.safe_dump(config))
    participant = Participant(
        envoy_name=settings.name,
        director_host=host,
        director_port=port,
        envoy_config=written,
        root_certificate=root,
        certificate=certificate,
        private_key=key,
        install_requirements=False,  # an experiment does not change this machine's packages
    )
    try:
        participant.start()
    except KeyboardInterrupt:
        os._exit(130)  # OpenFL's health check would go on, and the director count on this envoy


if __name__ == "__main__":
    main()
