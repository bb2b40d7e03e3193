"""Certificates for a federation: a CA of its own, one certificate each for director, experimenter and participants.

    python director/certificates.py --director director.example.org Amsterdam Bangalore Chandler Detroit
    python director/certificates.py --list
    python director/certificates.py --renew Amsterdam

writes `certificates/{ca,director,experimenter,Amsterdam,...}.{crt,key}`. Hand every participant `ca.crt` and its own
two files over a channel you trust; `ca.key` stays here. Participants who come later are added by calling it again.
"""

import argparse
import contextlib
import datetime
import ipaddress
import os
import re
from pathlib import Path

import idna
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCKS_DIFFER = datetime.timedelta(minutes=5)


def write_private(path: Path, key) -> None:
    """The key as PEM, readable by its owner alone."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)  # a file that is there would keep its rights
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    part.replace(path)


def issue(name: str, key, issuer_name, issuer_key, days: int, extensions) -> x509.Certificate:
    """A certificate with the common name `name`, signed by the issuer."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(common_name(name))
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def plain_host(host: str) -> str:
    """An IP address as it is, or a host's name with its umlauts in the ASCII form that DNS has.

    Raises: `ValueError` with one line. (envoy/channel.py has the same function: the two are handed over alone.)
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host))
    try:
        name = host if host.isascii() else idna.encode(host, uts46=True).decode()
    except idna.IDNAError as error:
        raise ValueError(f"{host!r:.80} is no host: {error}") from None
    labels = name.split(".")
    if not all(re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", label) for label in labels):
        raise ValueError(f"{host!r:.80} is no host: between dots stand 1 to 63 letters, digits and hyphens")
    if len(name) > 253 or labels[-1].isdigit():
        raise ValueError(f"{host!r:.80} is no host: it is longer than 253 characters, or a wrong IP address")
    return name


def director_host(text: str) -> str:
    """The host in `--director`; `ValueError` with one line if it is none."""
    if re.fullmatch(r"(\[.*\]|[^:]*):[0-9]*", text):
        raise ValueError(f"{text!r:.80} has a port, which belongs into the participants' YAML: give the host alone")
    return plain_host(text[1:-1] if re.fullmatch(r"\[.*:.*\]", text) else text)


def alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


OURS = ("ca", "director", "experimenter", "aggregator")  # names that no participant may have
CA_DAYS = 3650  # what it signs ends sooner and can be made anew; a new CA means new files for everybody


def certificate_authority(folder: Path):
    """The CA's name and key; made if it is not there yet."""
    name, path = common_name("FederatedCrowdGuard CA"), folder / "ca.key"
    if path.exists():
        if not still_good(folder / "ca.crt", "FederatedCrowdGuard CA"):
            raise SystemExit(f"{folder / 'ca.crt'} is missing or has expired: move {folder} away and make all anew")
        return name, serialization.load_pem_private_key(path.read_bytes(), password=None)
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(False, False, False, False, False, key_cert_sign=True, crl_sign=True, encipher_only=False,
                          decipher_only=False)  # fmt: skip
    extensions = [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (usage, True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
    ]
    certificate = issue("FederatedCrowdGuard CA", key, name, key, CA_DAYS, extensions)
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    write_private(path, key)
    return name, key


def still_good(path: Path, name: str) -> bool:
    """Whether the certificate is there, not about to expire, and has this common name."""
    if not path.exists():
        return False
    subject = x509.load_pem_x509_certificate(path.read_bytes()).subject
    return days_left(path) > 0 and subject == common_name(name)


def fits(certificate: Path, key: Path) -> bool:
    """Whether they are a pair, which an interrupted call may not have left, or the key has been handed out."""
    if not key.exists():
        return True
    private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    return private.public_key() == x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()


def days_left(path: Path) -> int:
    """Whole days until a certificate ends; negative if it has."""
    end = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    return (end - datetime.datetime.now(datetime.UTC)) // datetime.timedelta(days=1)


def director_of(folder: Path) -> str:
    """The host for which the director's certificate is, its first alternative name; localhost if there is none."""
    first = next(iter(alternative_names(folder / "director.crt")), None)
    return str(first.value) if first else "localhost"


def alternative_names(path: Path) -> list[x509.GeneralName]:
    """The hosts in a certificate; none if it is not there."""
    try:
        extensions = x509.load_pem_x509_certificate(path.read_bytes()).extensions
        return list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (FileNotFoundError, x509.ExtensionNotFound):
        return []


def check_name(name: str) -> None:
    """`SystemExit` if no envoy may have the name. (Settings in envoy/private_attributes.py has the same rule.)"""
    if not re.fullmatch(r"[^\W\d_][\w-]*", name) or len(name.encode()) > 64 or name.lower() in OURS:
        ours = ", ".join(OURS)
        raise SystemExit(f"{name!r:.80} cannot be a participant: at most 64 letters, digits, - and _, none of {ours}")


def make_certificates(
    folder: Path, director: str | None, participants: list[str], days: int = 365, renew: tuple[str, ...] = ()
) -> None:
    """Writes what is not there yet or has expired: `director`, `experimenter` and every participant, and a CA if there
    is none.

    Args:
        director: host name or address under which the director is reached; None if that shall stay as it is.
        participants: envoy names, which are the certificates' common names.
        days: how long they are good; no longer than their CA.
        renew: whose key and certificate are made anew though they are good.
    """
    if twice := [name for name in participants if participants.count(name) > 1]:
        raise SystemExit(f"{twice[0]} is there twice: each participant needs a name of its own")
    if missing := [name for name in renew if not (folder / f"{name}.crt").exists()]:
        raise SystemExit(f"--renew {missing[0]}: there is no {folder / missing[0]}.crt; without --renew one is made")
    participants = [*participants, *(name for name in renew if name not in ("director", "experimenter"))]
    for name in participants:
        check_name(name)
    try:
        director = director_of(folder) if director is None else director_host(director)
    except ValueError as error:
        raise SystemExit(f"--director {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    ca_name, ca_key = certificate_authority(folder)
    if days > (left := days_left(folder / "ca.crt")):
        raise SystemExit(f"--days {days}: {folder / 'ca.crt'} ends in {left} days, and what it signs not later")
    client, both = (
        [ExtendedKeyUsageOID.CLIENT_AUTH],
        [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
    )
    hosts = dict.fromkeys([director, "localhost", "127.0.0.1"])
    server = x509.SubjectAlternativeName([alternative_name(host) for host in hosts])
    for file in ("director", "experimenter", *participants):  # the director's host is no common name: those end at 64
        path = folder / f"{file}.crt"
        moved = file == "director" and alternative_names(path) != list(server)
        if file not in renew and still_good(path, file) and not moved and fits(path, folder / f"{file}.key"):
            continue
        key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        usages = x509.ExtendedKeyUsage(both if file == "director" else client)  # no participant passes for a server
        extensions = [(x509.BasicConstraints(ca=False, path_length=None), True), (usages, False), (identifier, False)]
        extensions += [(server, False)] if file == "director" else []
        certificate = issue(file, key, ca_name, ca_key, days, extensions)
        write_private(folder / f"{file}.key", key)
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def show_certificates(folder: Path) -> str:
    """A line for each certificate in the folder: its name, how long it is good, and its fingerprint."""
    lines = []
    for path in sorted(folder.glob("*.crt")):
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        name = certificate.subject.rfc4514_string().removeprefix("CN=")
        end = certificate.not_valid_after_utc
        left = days_left(path)
        word = f"{left} days left" if left >= 0 else "EXPIRED"
        digest = certificate.fingerprint(hashes.SHA256()).hex(":")[:23]
        lines.append(f"{path.name:24} {name:24} until {end:%Y-%m-%d}, {word:14} SHA-256 {digest}...")
    return "\n".join(lines) or f"there are no certificates in {folder}"


def positive(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number from 1 on")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("participants", nargs="*", help="envoy names")
    parser.add_argument("--list", action="store_true", help="show the certificates that are there")
    parser.add_argument("--renew", action="append", default=[], metavar="NAME", help="make key and certificate anew")
    parser.add_argument("--director", help="host name or address of its machine; as before, or localhost")
    parser.add_argument("--folder", type=Path, default=Path("certificates"))
    parser.add_argument("--days", type=positive, default=365, help="how long they are good")
    args = parser.parse_args()
    if args.list:
        print(show_certificates(args.folder))
        return
    if not (args.participants or args.renew):
        parser.error("whose certificates? Name participants, or use --list or --renew NAME")
    make_certificates(args.folder, args.director, args.participants, args.days, tuple(args.renew))
    names = [director_of(args.folder), "experimenter", *args.participants, *args.renew]
    print(f"certificates for {', '.join(names)} are in {args.folder}")


if __name__ == "__main__":
    main()
