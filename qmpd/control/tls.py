"""TLS for servers, with the standard library's ssl: credentials as contexts, clients' names, connections.

Source: spec/nbd-export.md section 11.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from qmpd.errors import Kind, QmpdError, strerror

_CA, _CRL, _CERT, _KEY, _DH = "ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem", "dh-params.pem"

#: The group of RFC 7919 that clients expect of a server without parameters of its own.
_FFDHE2048: Final = b"""-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a server shows and asks for. Stays usable when the object it came from is deleted."""

    context: ssl.SSLContext
    #: Only clients with a certificate of the CA are let in.
    verify_peer: bool


class TlsSocket(ssl.SSLSocket):
    """A connection that another thread may shut down without what follows being sent in the clear."""

    def shutdown(self, how: int) -> None:
        """Cut the connection below TLS, which stays on."""
        socket.socket.shutdown(self, how)


def load_server(directory: str, *, verify_peer: bool, password: bytes | None = None) -> Credentials:
    """The credentials of a server from the files that QEMU keeps them in. Worker thread. Raises QmpdError."""
    ca, cert, key = (_accessible(directory, name) for name in (_CA, _CERT, _KEY))
    context = _server_context()
    _load(ca, lambda: context.load_verify_locations(ca))
    _load(cert, lambda: context.load_cert_chain(cert, key, password if password is not None else _no_password))
    if os.path.exists(crl := os.path.join(directory, _CRL)):
        _load(crl, lambda: context.load_verify_locations(crl))
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    if verify_peer:
        context.verify_mode = ssl.CERT_REQUIRED
    return Credentials(context, verify_peer)


def load_anonymous(directory: str | None) -> Credentials:
    """Encryption with nobody: keys are agreed on without certificates. Worker thread. Raises QmpdError."""
    context = _server_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # later versions have no such thing
    context.set_ciphers("ADH+AESGCM:ADH+AES:AECDH+AES:@SECLEVEL=0")
    given = os.path.join(directory, _DH) if directory is not None else ""
    if directory is not None and os.path.exists(given):
        _load(given, lambda: context.load_dh_params(given))
    else:
        with _as_file(_FFDHE2048) as path:
            context.load_dh_params(path)
    return Credentials(context, verify_peer=False)


@contextlib.contextmanager
def _as_file(text: bytes) -> Iterator[str]:
    fd = os.memfd_create("dh-params.pem")
    try:
        os.write(fd, text)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def check_client(directory: str) -> None:
    """A client's files are there. Raises QmpdError."""
    _accessible(directory, _CA)


def distinguished_name(certificate: Any) -> str:
    """The subject of ``getpeercert()``'s result in the order of the certificate, e.g. ``O=lab,CN=good``."""
    return ",".join(
        "+".join(f"{_SHORT.get(name, name)}={_escaped(value)}" for name, value in relative)
        for relative in certificate["subject"]
    )


def reason(error: OSError) -> str:
    """Why a TLS operation failed, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return strerror(error.errno) if error.errno else str(error)


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.sslsocket_class = TlsSocket
    return context


def _accessible(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    try:
        os.stat(path)
    except OSError as error:
        text = f"Unable to access credentials {path}: {strerror(error.errno or 0)}"
        raise QmpdError(text, Kind.IO, path=path, errno=error.errno) from None
    return path


def _load(path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:
        text = reason(error) if isinstance(error, OSError) else str(error)
        raise QmpdError(f"Unable to load credentials {path}: {text}", Kind.IO, path=path) from None


def _no_password() -> bytes:
    """Instead of a question on the terminal."""
    raise ValueError("the key is encrypted and no passwordid was given")


_SHORT: Final = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}

_SPECIAL: Final = re.compile(r'[,+"\\<>;=]|^[ #]| $')


def _escaped(value: str) -> str:
    """As RFC 4514 has it: a name cannot be made to look like another one."""
    return _SPECIAL.sub(lambda match: "\\" + match.group(), value)
