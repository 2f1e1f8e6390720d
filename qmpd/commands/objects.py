"""object-add, object-del and the qom-* commands, for the object types that qmpd has.

An iothread's settings are kept and reported and have no effect: qmpd runs I/O on threads of its own. A secret is never
given out, unlike the peer's. Source: spec/toolbox.md section 11.
"""

import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from qmpd.commands import throttle_groups
from qmpd.commands.throttle_groups import ThrottleGroupObject, ThrottleLimits, Unstable
from qmpd.control.bridge import to_worker
from qmpd.control.objects import Container, ObjectStore, Property, Thing, UserObject, describe
from qmpd.control.qapi import AnyValue, Bool, Int, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.errors import Kind, QmpdError, strerror

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/=\n]*", re.ASCII)
_INT64_MAX = (1 << 63) - 1


class ObjectType(StrEnum):
    """Types of objects that can be added."""

    AUTHZ_SIMPLE = "authz-simple"
    IOTHREAD = "iothread"
    SECRET = "secret"
    THROTTLE_GROUP = "throttle-group"
    TLS_CREDS_ANON = "tls-creds-anon"
    TLS_CREDS_X509 = "tls-creds-x509"


class ObjectOptions(QapiModel, discriminator="qom_type"):
    """Arguments of object-add and of --object."""

    qom_type: ObjectType
    id: Str


class IothreadProperties(ObjectOptions, branch=ObjectType.IOTHREAD):
    """Settings of an iothread; times in nanoseconds."""

    aio_max_batch: Int | None = None
    thread_pool_min: Int | None = None
    thread_pool_max: Int | None = None
    poll_max_ns: Int | None = None
    poll_grow: Int | None = None
    poll_shrink: Int | None = None


class QCryptoSecretFormat(StrEnum):
    """How a secret is spelled."""

    RAW = "raw"
    BASE64 = "base64"


class SecretProperties(ObjectOptions, branch=ObjectType.SECRET):
    """A secret, from the command itself or from a file."""

    format: QCryptoSecretFormat | None = None
    keyid: Str | None = None
    iv: Str | None = None
    data: Str | None = None
    file: Str | None = None


class ThrottleGroupProperties(ObjectOptions, branch=ObjectType.THROTTLE_GROUP):
    """A throttle group; the limits one by one are for old clients."""

    limits: ThrottleLimits | None = None
    x_iops_total: Unstable | None = None
    x_iops_total_max: Unstable | None = None
    x_iops_total_max_length: Unstable | None = None
    x_iops_read: Unstable | None = None
    x_iops_read_max: Unstable | None = None
    x_iops_read_max_length: Unstable | None = None
    x_iops_write: Unstable | None = None
    x_iops_write_max: Unstable | None = None
    x_iops_write_max_length: Unstable | None = None
    x_bps_total: Unstable | None = None
    x_bps_total_max: Unstable | None = None
    x_bps_total_max_length: Unstable | None = None
    x_bps_read: Unstable | None = None
    x_bps_read_max: Unstable | None = None
    x_bps_read_max_length: Unstable | None = None
    x_bps_write: Unstable | None = None
    x_bps_write_max: Unstable | None = None
    x_bps_write_max_length: Unstable | None = None
    x_iops_size: Unstable | None = None


# --- the objects -----------------------------------------------------------------------------------------------------


class Iothread(UserObject):
    """Stands for one of the peer's I/O threads."""

    type_name = "iothread"
    DEFAULTS = {
        "thread-pool-min": 0,
        "aio-max-batch": 0,
        "thread-pool-max": 64,
        "poll-max-ns": 32768,
        "poll-grow": 0,
        "poll-shrink": 0,
    }

    def __init__(self, object_id: str, settings: dict[str, int]) -> None:
        super().__init__(object_id)
        self.settings = dict(self.DEFAULTS)
        #: Each tells whether somebody still runs in the thread.
        self.tenants: list[Callable[[], bool]] = []
        self.change(settings)

    def retire(self) -> bool:
        self.tenants = [is_there for is_there in self.tenants if is_there()]
        return not self.tenants and super().retire()

    def change(self, settings: dict[str, int]) -> None:
        """Take over all of ``settings`` or raise QmpdError."""
        for name, value in settings.items():
            if value < 0:
                raise QmpdError(f"{name} value must be in range [0, {_INT64_MAX}]")
        changed = self.settings | settings
        least, most = changed["thread-pool-min"], changed["thread-pool-max"]
        if not least <= most or not 0 < most < 1 << 31:
            raise QmpdError("bad thread-pool-min/thread-pool-max values")
        self.settings = changed


def _setting(name: str) -> Property:
    def put(thing: Iothread, value: Any) -> None:
        if type(value) is not int or not -_INT64_MAX - 1 <= value <= _INT64_MAX:
            raise QmpdError(f"Invalid parameter type for '{name}', expected: integer")
        thing.change({name: value})

    return Property(name, "int", lambda thing: thing.settings[name], put)


Iothread.properties = tuple(_setting(name) for name in Iothread.DEFAULTS)


class Secret(UserObject):
    """Bytes that only qmpd itself may read, as :attr:`value`."""

    type_name = "secret"

    def __init__(self, options: SecretProperties, value: bytes) -> None:
        super().__init__(options.id)
        self.value = value
        self.shown = {
            "iv": options.iv or "",
            "keyid": options.keyid or "",
            "format": (options.format or QCryptoSecretFormat.RAW).value,
            "file": options.file or "",
        }


def _shown(name: str, kind: str) -> Property:
    def put(thing: Secret, value: Any) -> None:
        """The value was read when the object was made; what is set later describes it and changes nothing."""
        if not isinstance(value, str):
            raise QmpdError(f"Invalid parameter type for '{name}', expected: string")
        if name == "format" and value not in list(QCryptoSecretFormat):
            raise QmpdError(f"Parameter 'format' does not accept value '{value}'")
        if name in thing.shown:
            thing.shown[name] = value

    return Property(name, kind, None if name == "data" else lambda thing: thing.shown[name], put)


Secret.properties = (
    _shown("iv", "string"),
    _shown("keyid", "string"),
    _shown("format", "QCryptoSecretFormat"),
    _shown("file", "string"),
    _shown("data", "string"),
)


def _make_iothread(_store: ObjectStore, options: ObjectOptions) -> UserObject:
    settings = {name: value for name, value in options.to_wire().items() if name in Iothread.DEFAULTS}
    return Iothread(options.id, settings)


def _make_secret(store: ObjectStore, options: ObjectOptions) -> UserObject:
    assert isinstance(options, SecretProperties)
    if options.data is not None and options.file is not None:
        raise QmpdError("'file' and 'data' are mutually exclusive")
    if options.file is not None:
        raw = _read(options.file)
    elif options.data is not None:
        raw = options.data.encode("utf-8", "surrogatepass")
    else:
        raise QmpdError("Either 'file' or 'data' must be provided")
    if options.keyid is not None:
        if not isinstance(store.find(options.keyid), Secret):
            raise QmpdError(f"No secret with id '{options.keyid}'")
        raise QmpdError("Encrypted secrets are not supported", Kind.UNSUPPORTED)
    if options.format is QCryptoSecretFormat.BASE64:
        raw = _decode(raw)
    return Secret(options, raw)


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        reason = strerror(error.errno or 0)
        raise QmpdError(f"Unable to read {name}: Failed to open file “{name}”: {reason}", Kind.IO) from None


def _decode(raw: bytes) -> bytes:
    text = raw.decode("utf-8", "replace")
    if not _BASE64.fullmatch(text):
        raise QmpdError("Base64 data contains invalid characters")
    digits = text.replace("\n", "").rstrip("=")
    digits = digits[:-1] if len(digits) % 4 == 1 else digits  # one digit alone is no byte; the peer ignores it as well
    return binascii.a2b_base64(digits + "=" * (-len(digits) % 4))


def _make_throttle_group(_store: ObjectStore, options: ObjectOptions) -> UserObject:
    assert isinstance(options, ThrottleGroupProperties)
    single = {name: value for name, value in options.to_wire().items() if name.startswith("x-")}
    return throttle_groups.make(options.id, single, options.limits.to_wire() if options.limits else {})


Maker = Callable[[ObjectStore, ObjectOptions], UserObject]

MAKERS: dict[ObjectType, Maker] = {
    ObjectType.IOTHREAD: _make_iothread,
    ObjectType.SECRET: _make_secret,
    ObjectType.THROTTLE_GROUP: _make_throttle_group,
}
"""Type -> what makes one; called in a worker thread. Raises QmpdError. Other families add theirs."""


@command("object-add")
async def object_add(ctx: Context, args: ObjectOptions) -> None:
    """Make an object. Its id becomes visible when it is complete."""
    if not _IDENTIFIER.fullmatch(args.id):
        raise QmpdError("Parameter 'id' expects an identifier")
    store: ObjectStore = ctx.objects
    store.check_id(args.id)
    store.add(await to_worker(MAKERS[args.qom_type], store, args))


class ObjectId(QapiModel):
    """Arguments of object-del."""

    id: Str


@command("object-del")
def object_del(ctx: Context, args: ObjectId) -> None:
    """Forget an object that nothing uses."""
    ctx.objects.remove(args.id)


# --- looking at objects ----------------------------------------------------------------------------------------------


class ObjectPropertyInfo(QapiModel):
    """One property."""

    name: Str
    type: Str
    description: Str | None = None
    default_value: AnyValue = None


class ObjectTypeInfo(QapiModel):
    """One type."""

    name: Str
    abstract: Bool | None = None
    parent: Str | None = None


class QomPath(QapiModel):
    """Arguments of qom-list."""

    path: Str


class QomProperty(QapiModel):
    """Arguments of qom-get."""

    path: Str
    property: Str


class QomAssignment(QapiModel):
    """Arguments of qom-set."""

    path: Str
    property: Str
    value: AnyValue


@command("qom-list", returns=list[ObjectPropertyInfo])
def qom_list(ctx: Context, args: QomPath) -> list[dict[str, str]]:
    """The properties and children of what is at a path."""
    thing, _path = ctx.objects.resolve(args.path)
    return thing.listing()


@command("qom-get", returns=AnyValue)
def qom_get(ctx: Context, args: QomProperty) -> Any:
    """The value of a property."""
    thing, path = ctx.objects.resolve(args.path)
    return thing.get(args.property, path)


@command("qom-set")
def qom_set(ctx: Context, args: QomAssignment) -> None:
    """Change a property."""
    thing, _path = ctx.objects.resolve(args.path)
    thing.set(args.property, args.value)


@dataclass(frozen=True)
class TypeRow:
    """A type in the eyes of qom-list-types; ``thing`` is None for one that cannot be asked for its properties."""

    parent: str | None
    thing: type[Thing] | None
    abstract: bool = False
    user_creatable: bool = False


TYPES = {
    "container": TypeRow("object", Container),
    "iothread": TypeRow("event-loop-base", Iothread, user_creatable=True),
    "secret": TypeRow("secret_common", Secret, user_creatable=True),
    "secret_common": TypeRow("object", Thing, abstract=True, user_creatable=True),
    "interface": TypeRow(None, None, abstract=True),
    "throttle-group": TypeRow("object", ThrottleGroupObject, user_creatable=True),
    "event-loop-base": TypeRow("object", Thing, abstract=True, user_creatable=True),
    "user-creatable": TypeRow("interface", None, abstract=True, user_creatable=True),
    "object": TypeRow(None, Thing, abstract=True),
}
"""Name -> what is told about it. Other families add theirs."""


class QomTypes(QapiModel):
    """Arguments of qom-list-types."""

    implements: Str | None = None
    abstract: Bool | None = None


class QomTypeName(QapiModel):
    """Arguments of qom-list-properties."""

    typename: Str


@command("qom-list-types", returns=list[ObjectTypeInfo])
def qom_list_types(_ctx: Context, args: QomTypes) -> list[ObjectTypeInfo]:
    """Types, the abstract ones if asked for."""
    return [
        ObjectTypeInfo(name=name, abstract=kind.abstract or None, parent=kind.parent)
        for name, kind in TYPES.items()
        if (args.abstract or not kind.abstract) and (args.implements is None or _implements(name, args.implements))
    ]


def _implements(name: str | None, wanted: str) -> bool:
    while name is not None:
        if name == wanted or (wanted == "user-creatable" and TYPES[name].user_creatable):
            return True
        name = TYPES[name].parent
    return False


@command("qom-list-properties", returns=list[ObjectPropertyInfo])
def qom_list_properties(_ctx: Context, args: QomTypeName) -> list[dict[str, str]]:
    """The properties of a type."""
    if args.typename not in TYPES:
        raise QmpdError(f"Class '{args.typename}' not found", Kind.DEVICE_NOT_FOUND)
    thing = TYPES[args.typename].thing
    if thing is None:
        raise QmpdError("Parameter 'typename' expects a QOM type")
    return describe(thing)
