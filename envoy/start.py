"""Starts one participant's envoy, which waits for experiments and takes part in them with the participant's own data.

    python envoy/start.py envoy/Amsterdam.yaml --certificates certificates

Needs `ca.crt`, `<name>.crt` and `<name>.key` in the certificates' folder; every connection is mutual TLS. Settings,
data, certificates and the director are looked at before the envoy joins. It works in `--runs`, in a folder of its name.
"""

import argparse
import functools
import logging
import os
import shutil
import warnings
from pathlib import Path

# Threads that spin while they wait take the cores from the other processes of a machine; OpenMP reads it at import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
warnings.filterwarnings("ignore", module="(.*/)?(metaflow|_distutils_hack)")  # OpenFL's dependencies on their own age


def work_in(folder: Path) -> None:
    """Makes it the current folder, without what is left of experiments in which this was killed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="the participant's YAML file")
    parser.add_argument("--certificates", type=Path, default=Path("certificates"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for what it remembers over the rounds")
    parser.add_argument("--work", type=Path, help="where it works, in a folder that it empties; default: --runs")
    args = parser.parse_args()

    import channel
    import private_attributes

    settings = private_attributes.read_settings(args.settings)
    mine = settings.model_dump(exclude={"director"})
    if folder := settings.data.folder:  # the current folder is another one in every experiment
        mine["data"]["folder"] = folder.expanduser().absolute()
    bring = functools.partial(private_attributes.participant, **mine)
    try:
        director = channel.plain_address(settings.director)
    except ValueError as error:
        raise SystemExit(f"{args.settings}: director: {error}") from None
    try:
        own = bring()
        classes, images = own["classes"], [len(own[f"{part}_loader"].dataset) for part in ("train", "test")]
        del own
        identity = channel.Identity.of(settings.name, args.certificates)
        channel.handshake(director, identity)
        channel.greet(director, identity)
    except ConnectionError as error:
        raise SystemExit(f"{args.settings}: director: {error}") from None
    except ValueError as error:
        raise SystemExit(f"{args.settings}: {error}") from None

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("METAFLOW_USER", settings.name)  # metaflow fails without a user name
    from collaborator import Participant

    share = f"share {settings.data.index} of data.participants: {settings.data.participants}"
    logging.info("%d training and %d test images, %s", *images, share)
    if classes:
        logging.info("classes: %s", ", ".join(f"{number} {name}" for number, name in enumerate(classes)))
    lasting = settings.model_dump(mode="json", exclude={"director": True, "device": True, "data": {"folder"}})
    participant = Participant(settings.name, director, identity, bring, args.runs, lasting)
    work_in((args.work or args.runs / settings.name) / f".{settings.name}-{director.replace(':', '-')}")
    try:
        participant.start()
    except ConnectionError as error:
        raise SystemExit(f"{args.settings}: director: {error}") from None
    except KeyboardInterrupt:
        os._exit(130)  # the heartbeat's thread would go on, and the director count on this envoy
    except BaseException:
        logging.exception("%s ends", settings.name)
        os._exit(1)


if __name__ == "__main__":
    main()
