"""A connection to the director or the aggregator: mutual TLS, with certificates that are looked at before."""

import contextlib
import datetime
import functools
import ipaddress
import os
import re
import socket
import ssl
import uuid
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import grpc
import idna
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

PROTOCOL = 6  # of the contract between director and flow, see director/aggregator.py
OURS = (("protocol", str(PROTOCOL)), ("openfl", version("openfl")))  # what every call says of this machine
INSTANCE = ("instance", uuid.uuid4().hex)  # and of this process: of two with one name the newer counts
CHANNEL = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),  # a link that is cut is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new attempt, and does not wait as the last one did
]


@dataclass(frozen=True)
class Identity:
    """The three files by which one is known: the CA's certificate, one's own, and its key."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> "Identity":
        """That of `name` in a folder, as the operator hands it out.

        Raises: `ValueError` with one line if a file is missing or does not fit.
        """
        identity = cls(*((folder / file).absolute() for file in ("ca.crt", f"{name}.crt", f"{name}.key")))
        identity.check(name)
        return identity

    def check(self, name: str) -> None:
        authorities = self.read(self.ca, x509.load_pem_x509_certificates)
        mine, *between = self.read(self.certificate, x509.load_pem_x509_certificates)  # with those of one's own PKI
        key = self.read(self.key, lambda pem: load_pem_private_key(pem, None))
        found = ", ".join(str(part.value) for part in mine.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
        if found != name:
            raise ValueError(f"{self.certificate}: is the certificate of {found or 'nobody'}, not of {name}")
        now = datetime.datetime.now(datetime.UTC)
        for path, certificate in ((self.ca, authorities[0]), (self.certificate, mine)):
            begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            if not begin <= now <= end:
                raise ValueError(f"{path}: is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d} only: have it renewed")
        if key.public_key() != mine.public_key():
            raise ValueError(f"{self.key}: is not the key of {self.certificate.name}")
        issuers = [*([certificate] for certificate in between), authorities]
        if not all(any(map(functools.partial(signed, c), of)) for c, of in zip([mine, *between], issuers, strict=True)):
            raise ValueError(f"{self.certificate}: is not signed by {self.ca.name} beside it")

    @staticmethod
    def read(path: Path, parse):
        try:
            return parse(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path}: is missing; the operator of the director makes it") from None
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def signed(certificate, issuer) -> bool:
    """Whether the issuer has signed the certificate."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def plain_host(host: str) -> str:
    """An IP address as it is, or a host's name with its umlauts in the ASCII form that DNS has.

    Raises: `ValueError` with one line. (director/certificates.py has the same function: the two are handed over alone.)
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


def plain_address(address: str) -> str:
    """`host:port` as gRPC takes it, IPv6 in brackets.

    Raises: `ValueError` with one line.
    """
    host, _, port = address.rpartition(":")
    if not (host and re.fullmatch(r"[1-9][0-9]{0,4}", port) and int(port) < 65536):
        raise ValueError(f"{address!r:.80} is not host:port, as in director.example.org:50051 or [::1]:50051")
    brackets = host.startswith("[") and host.endswith("]")
    plain = plain_host(host[1:-1] if brackets else host)
    if brackets != (":" in plain):
        raise ValueError(f"{address!r:.80}: brackets belong around IPv6 addresses alone, as in [::1]:50051")
    return f"[{plain}]:{port}" if brackets else f"{plain}:{port}"


OTHER_HOST = (62, 64)  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order, which knows them in lower case alone


def around(address: str) -> str:
    """What to add when an address cannot be reached and gRPC is told to go through a proxy; else nothing."""
    for variable in filter(os.environ.get, PROXIES):
        host = address.rpartition(":")[0].strip("[]")
        return f"; gRPC goes through the proxy that {variable} names, unless no_proxy={host} is set"
    return ""


def handshake(address: str, identity: Identity) -> None:
    """Connects once and hears what the other side thinks of this certificate, which gRPC does not tell.

    Raises: `ConnectionError` with one line.
    """
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=identity.ca)
    context.load_cert_chain(identity.certificate, identity.key)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host.strip("[]")) as secure,
        ):
            if not secure.recv(1):  # the verdict comes after the handshake, in TLS 1.3
                raise ConnectionError(f"{address} hangs up: it knows another CA than the one of {identity.certificate}")
    except ssl.SSLCertVerificationError as error:
        words = f"{address} has no certificate that {identity.ca} vouches for: {error.verify_message}"
        if error.verify_code in OTHER_HOST:
            another = f"director/certificates.py --renew director --director {host.strip('[]')}"
            words += f" The operator makes another ({another}) and starts the director anew"
        raise ConnectionError(words) from None
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise ConnectionError(f"{address} does not accept {identity.certificate}, or speaks no TLS: {reason}") from None
    except (OSError, ValueError, OverflowError) as error:
        if isinstance(error, ConnectionError) and address in str(error):
            raise
        raise ConnectionError(f"nobody answers at {address} ({error}); is it started?{around(address)}") from None


class Announce(grpc.AuthMetadataPlugin):
    """Says with every call what this machine has, and further facts."""

    def __init__(self, **facts: str):
        self.metadata = (*OURS, INSTANCE, *facts.items())

    def __call__(self, context, callback):
        callback(self.metadata, None)


def open_channel(address: str, identity: Identity, **facts: str) -> grpc.Channel:
    """A gRPC channel to `host:port`."""
    root, certificate, key = (path.read_bytes() for path in (identity.ca, identity.certificate, identity.key))
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(root, key, certificate), grpc.metadata_call_credentials(Announce(**facts))
    )
    return grpc.secure_channel(address, credentials, options=CHANNEL)


GREETING = "/openfl.experimental.workflow.director.Director/EnvoyConnectionRequest"


def greet(address: str, identity: Identity) -> None:
    """Tells the director what this machine has, and hears what the director has. Needs nothing of OpenFL.

    Raises: `ConnectionError` with one line if the two do not go together.
    """
    with open_channel(address, identity) as channel:
        call = channel.unary_unary(GREETING).future(b"", timeout=20)  # in nobody's name
        said, code, words = dict(call.initial_metadata() or ()), call.code(), call.details()
    if code is not grpc.StatusCode.PERMISSION_DENIED:
        lost = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        raise ConnectionError(f"the director at {address} refuses: {words}{around(address) if lost else ''}")
    if odd := [f"{key} {said.get(key, 'unknown')}, not {ours}" for key, ours in OURS if said.get(key) != ours]:
        raise ConnectionError(f"the director at {address} has {' and '.join(odd)}: update the older of the two")
