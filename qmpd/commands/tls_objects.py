"""Objects for encrypted servers: credentials, and who is let in. Source: spec/nbd-export.md section 11.

Deviations: priority strings are those of another library and refused; certificates are checked when clients connect,
not when the object is made; with an authorisation but without verification of certificates nobody is let in.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from qmpd.commands.objects import MAKERS, TYPES, ObjectOptions, ObjectType, Secret, TypeRow
from qmpd.control import tls
from qmpd.control.objects import ObjectStore, Property, Thing, UserObject
from qmpd.control.qapi import Bool, Str
from qmpd.errors import Kind, QmpdError

# -- credentials -------------------------------------------------------------------------------------------------------


class QCryptoTLSCredsEndpoint(StrEnum):
    """Which end the credentials are for."""

    CLIENT = "client"
    SERVER = "server"


class TlsCredsAnonProperties(ObjectOptions, branch=ObjectType.TLS_CREDS_ANON):
    """Encryption without certificates; ``dir`` may have Diffie-Hellman parameters."""

    verify_peer: Bool | None = None
    dir: Str | None = None
    endpoint: QCryptoTLSCredsEndpoint | None = None
    priority: Str | None = None


class TlsCredsX509Properties(ObjectOptions, branch=ObjectType.TLS_CREDS_X509):
    """Certificates in the files of ``dir``."""

    verify_peer: Bool | None = None
    dir: Str | None = None
    endpoint: QCryptoTLSCredsEndpoint | None = None
    priority: Str | None = None
    sanity_check: Bool | None = None
    passwordid: Str | None = None


class TlsCredentials(UserObject):
    """Credentials. ``server`` is None for a client's. A server that uses them keeps them when the object is deleted."""

    type_name = "tls-creds-x509"

    def __init__(self, object_id: str, shown: dict[str, Any], server: tls.Credentials | None) -> None:
        super().__init__(object_id)
        self.shown = shown
        self.server = server


class AnonymousCredentials(TlsCredentials):
    """Encryption only."""

    type_name = "tls-creds-anon"


def _fixed(name: str, kind: str) -> Property:
    """The files were read when the object was made."""
    return Property(name, kind, lambda thing: thing.shown[name])


AnonymousCredentials.properties = (
    _fixed("endpoint", "QCryptoTLSCredsEndpoint"),
    _fixed("dir", "string"),
    _fixed("verify-peer", "bool"),
    _fixed("priority", "string"),
)
TlsCredentials.properties = (
    *AnonymousCredentials.properties,
    _fixed("sanity-check", "bool"),
    _fixed("passwordid", "string"),
)


def _common(options: TlsCredsAnonProperties | TlsCredsX509Properties) -> dict[str, Any]:
    if options.priority is not None:
        raise QmpdError("TLS priority strings are not supported", Kind.UNSUPPORTED)
    endpoint = options.endpoint or QCryptoTLSCredsEndpoint.CLIENT
    verifies = options.verify_peer is not False
    return {"endpoint": endpoint.value, "dir": options.dir or "", "verify-peer": verifies, "priority": ""}


def _make_anonymous(_store: ObjectStore, options: ObjectOptions) -> UserObject:
    assert isinstance(options, TlsCredsAnonProperties)
    shown = _common(options)
    is_server = shown["endpoint"] == QCryptoTLSCredsEndpoint.SERVER
    return AnonymousCredentials(options.id, shown, tls.load_anonymous(options.dir) if is_server else None)


def _make_x509(store: ObjectStore, options: ObjectOptions) -> UserObject:
    assert isinstance(options, TlsCredsX509Properties)
    shown = _common(options) | {
        "sanity-check": options.sanity_check is not False,
        "passwordid": options.passwordid or "",
    }
    if options.dir is None:
        raise QmpdError("Missing 'dir' property value")
    if shown["endpoint"] == QCryptoTLSCredsEndpoint.CLIENT:
        tls.check_client(options.dir)
        return TlsCredentials(options.id, shown, None)
    password = None if options.passwordid is None else _password(store, options.passwordid)
    server = tls.load_server(options.dir, verify_peer=shown["verify-peer"], password=password)
    return TlsCredentials(options.id, shown, server)


def _password(store: ObjectStore, name: str) -> bytes:
    secret = store.find(name)
    if not isinstance(secret, Secret):
        raise QmpdError(f"No secret with id '{name}'")
    return secret.value


def server_credentials(store: ObjectStore, name: str) -> tls.Credentials:
    """What a server uses. Raises QmpdError."""
    found = store.find(name)
    if found is None:
        raise QmpdError(f"No TLS credentials with id '{name}'")
    if not isinstance(found, TlsCredentials):
        raise QmpdError(f"Object with id '{name}' is not TLS credentials")
    if found.server is None:
        raise QmpdError("Expected TLS credentials for a server endpoint")
    return found.server


# -- who is let in -----------------------------------------------------------------------------------------------------


class AuthZSimpleProperties(ObjectOptions, branch=ObjectType.AUTHZ_SIMPLE):
    """The one name that is let in."""

    identity: Str


class SimpleAuthorization(UserObject):
    """Lets one name in."""

    type_name = "authz-simple"

    def __init__(self, object_id: str, identity: str) -> None:
        super().__init__(object_id)
        self.identity = identity


def _set_identity(thing: SimpleAuthorization, value: Any) -> None:
    if not isinstance(value, str):
        raise QmpdError("Invalid parameter type for 'identity', expected: string")
    thing.identity = value


SimpleAuthorization.properties = (Property("identity", "string", lambda thing: thing.identity, _set_identity),)


def _make_simple(_store: ObjectStore, options: ObjectOptions) -> UserObject:
    assert isinstance(options, AuthZSimpleProperties)
    return SimpleAuthorization(options.id, options.identity)


def admission(store: ObjectStore, name: str) -> Callable[[str], None]:
    """What raises QmpdError unless a certificate's name is let in. The object is looked up each time."""

    def admit(identity: str) -> None:
        rule = store.find(name)
        if rule is None:
            raise QmpdError(f"Cannot find QAuthZ object ID {name}")
        if not isinstance(rule, SimpleAuthorization):
            raise QmpdError(f"Object '{name}' is not a QAuthZ subclass")
        if rule.identity != identity:
            raise QmpdError(f"TLS x509 authz check for {identity} is denied")

    return admit


MAKERS[ObjectType.TLS_CREDS_ANON] = _make_anonymous
MAKERS[ObjectType.TLS_CREDS_X509] = _make_x509
MAKERS[ObjectType.AUTHZ_SIMPLE] = _make_simple

TYPES["tls-creds"] = TypeRow("object", Thing, abstract=True, user_creatable=True)
TYPES["tls-creds-anon"] = TypeRow("tls-creds", AnonymousCredentials, user_creatable=True)
TYPES["tls-creds-x509"] = TypeRow("tls-creds", TlsCredentials, user_creatable=True)
TYPES["authz"] = TypeRow("object", Thing, abstract=True)
TYPES["authz-simple"] = TypeRow("authz", SimpleAuthorization, user_creatable=True)
