"""The QAPI type system on top of pydantic: models of arguments and results, and the error texts clients match on.

A model is written once and serves three purposes: validating what a client sends, validating the text of a key=value
option (:data:`KEYVAL`), and introspection (:mod:`qmpd.control.schema`). The rules are those of QEMU's visitors:

* members are checked in schema order, base members before those of a union's branch; the first fault is reported;
* members the schema does not know are reported when the struct they are in is otherwise fine;
* nothing is coerced, and ``null`` is a type error even for an optional member.

Pydantic collects faults in exactly that order, so the first of its error list is the one to report.

Source: spec/qmp-protocol.md sections 7 and 14.
"""

# Annotations are values here, not texts: pydantic would evaluate those of QapiModel again for each model made from it,
# a sixth of the time until the daemon serves.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, Self, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from qmpd.errors import QmpdError

#: Pydantic's context of one validation.
Info = core_schema.ValidationInfo[Any]


class Source(Enum):
    """Where a value comes from; the validation context. Values made by qmpd itself have no context."""

    WIRE = "wire"  # typed JSON, also JSON on the command line
    KEYVAL = "keyval"  # the tree of texts that k=v,k=v stands for


WIRE: Final = Source.WIRE
KEYVAL: Final = Source.KEYVAL

# --- error texts -----------------------------------------------------------------------------------------------------

_TYPE = "Invalid parameter type for '{path}', expected: %s"
_EXPECTS = "Parameter '{path}' expects %s"
_VALUE = "Parameter '{leaf}' does not accept value '{value}'"
_NESTED = "Parameters '{path}.*' are unexpected"

#: Pydantic's own error types that a QapiModel can produce -> text.
_TEXTS: Mapping[str, str] = {
    "missing": "Parameter '{path}' is missing",
    "extra_forbidden": "Parameter '{path}' is unexpected",
    "model_type": _TYPE % "object",
    "model_attributes_type": _TYPE % "object",
    "list_type": _TYPE % "array",
}


def _refuse(template: str, value: Any = None) -> NoReturn:
    """Fail the member under validation; ``{path}``, ``{leaf}`` and ``{value}`` are filled in by :func:`explain`."""
    raise PydanticCustomError("qapi", "{template}", {"template": template, "value": value})


def explain(error: ValidationError, source: Source = WIRE) -> QmpdError:
    """The one fault of ``error`` that the client is told about, as QEMU words it."""
    details = error.errors(include_url=False)
    first = details[0]
    if first["type"] == "extra_forbidden":
        # Which of several is unspecified. The last agrees with what the peer was seen to do.
        siblings = [d for d in details if d["type"] == "extra_forbidden" and d["loc"][:-1] == first["loc"][:-1]]
        first = siblings[-1]
    template, value = _template(first, source)
    location = first["loc"]
    # Inside a list QEMU has no member name at hand and prints a null pointer.
    leaf = "null" if isinstance(location[-1], int) else str(location[-1])
    return QmpdError(template.format(path=_path(location, source), leaf=leaf, value=value))


def _template(detail: ErrorDetails, source: Source) -> tuple[str, Any]:
    kind = detail["type"]
    if kind == "qapi":
        context = detail["ctx"]
        return context["template"], context["value"]
    if kind == "enum":
        value = detail["input"]
        if isinstance(value, str):
            return _VALUE, value
        return (_NESTED if source is KEYVAL else _TYPE % "string"), value
    return _TEXTS[kind], None


def _path(location: Sequence[int | str], source: Source) -> str:
    """``a.b[0].c``, or ``a.b.0.c`` for what came as key=value text."""
    index = ".%d" if source is KEYVAL else "[%d]"
    text = "".join(index % part if isinstance(part, int) else f".{part}" for part in location)
    return text[1:]


# --- scalars ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scalar:
    """Annotation of a built-in QAPI type.

    ``name`` is the type's name in introspection, ``check`` takes a JSON value, ``parse`` a key=value text; both return
    the Python value or call :func:`_refuse`. ``json`` is the JSON Schema.
    """

    name: Literal["str", "int", "number", "bool", "any"]
    check: Callable[[Any], Any]
    parse: Callable[[str], Any] | None = None
    json: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self._validate)

    def _validate(self, value: Any, info: Info) -> Any:
        if info.context is KEYVAL and self.parse is not None:
            if type(value) is not str:
                _refuse(_NESTED)
            return self.parse(value)
        return self.check(value)


def _check_str(value: Any) -> str:
    if not isinstance(value, str):
        _refuse(_TYPE % "string")
    return value


def _check_bool(value: Any) -> bool:
    if type(value) is not bool:
        _refuse(_TYPE % "boolean")
    return value


_BOOL_TEXTS = dict.fromkeys(("on", "yes", "true", "y"), True) | dict.fromkeys(("off", "no", "false", "n"), False)


def _parse_bool(text: str) -> bool:
    if text not in _BOOL_TEXTS:
        _refuse(_EXPECTS % "'on' or 'off'")
    return _BOOL_TEXTS[text]


def _check_int(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        _refuse(_TYPE % "integer")
    return value


def _parse_integer(text: str) -> int:
    """C's strtoll with base 0 over the whole text: leading blanks, a sign, 0x hex, leading-0 octal."""
    digits = text.lstrip(" \t\n\v\f\r")
    negative = digits.startswith("-")
    digits = digits[1:] if digits[:1] in ("-", "+") else digits
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[:1] == "0" else 10
    body = digits[2:] if base == 16 else digits
    if not (body.isascii() and body.isalnum()):  # int() itself would take underscores and blanks
        _refuse(_EXPECTS % "integer")
    try:
        number = int(body, base)
    except ValueError:
        _refuse(_EXPECTS % "integer")
    return -number if negative else number


def _parse_int(text: str) -> int:
    value = _parse_integer(text)
    if not -(1 << 63) <= value < 1 << 63:
        _refuse(_EXPECTS % "integer")
    return value


def _check_uint64(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
        _refuse(_EXPECTS % "uint64")
    return value % (1 << 64)  # a negative value wraps, as it does for QEMU


def _parse_uint64(text: str) -> int:
    value = _parse_integer(text)
    if not -(1 << 64) < value < 1 << 64:
        _refuse(_EXPECTS % "integer")
    return value % (1 << 64)


_SHIFTS = {suffix: 10 * power for power, suffix in enumerate("bkmgtpe")}


def _parse_size(text: str) -> int:
    """Bytes: a decimal number, with a fraction if a suffix follows, or hex; the suffixes are b k m g t p e."""
    digits = text.lstrip(" \t\n\v\f\r").removeprefix("+")
    base = 16 if digits[:2] in ("0x", "0X") else 10
    shift = 0
    if base == 10 and digits[-1:].lower() in _SHIFTS:
        shift, digits = _SHIFTS[digits[-1:].lower()], digits[:-1]
    whole, dot, fraction = digits.partition(".")
    if not (whole + fraction).isascii() or not (whole + fraction).isalnum() or (dot and not shift):
        _refuse(_EXPECTS % "a size value")
    try:
        value = int(whole, base) << shift
        value += (int(fraction) << shift) // 10 ** len(fraction) if fraction else 0
    except ValueError:
        _refuse(_EXPECTS % "a size value")
    if value >= 1 << 64:
        _refuse(_EXPECTS % "a size value")
    return value


def _narrow(bits: int, wide: Callable[[Any], int]) -> Callable[[Any], int]:
    """``wide`` with a range check to an unsigned integer of ``bits`` bits behind it."""
    text = _EXPECTS % f"uint{bits}_t"

    def check(value: Any) -> int:
        number = wide(value)
        if number >> bits:
            _refuse(text)
        return number

    return check


def _check_number(value: Any) -> float:
    if type(value) not in (int, float):
        _refuse(_TYPE % "number")
    return float(value)


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        _refuse(_EXPECTS % "number")


def _unsigned(bits: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": (1 << bits) - 1}


_INT64: Final = {"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}

Str = Annotated[str, Scalar("str", _check_str, _check_str, {"type": "string"})]
Bool = Annotated[bool, Scalar("bool", _check_bool, _parse_bool, {"type": "boolean"})]
Int = Annotated[int, Scalar("int", _check_int, _parse_int, _INT64)]
Uint64 = Annotated[int, Scalar("int", _check_uint64, _parse_uint64, _unsigned(64))]
Uint32 = Annotated[int, Scalar("int", _narrow(32, _check_uint64), _narrow(32, _parse_uint64), _unsigned(32))]
Uint16 = Annotated[int, Scalar("int", _narrow(16, _check_uint64), _narrow(16, _parse_uint64), _unsigned(16))]
Uint8 = Annotated[int, Scalar("int", _narrow(8, _check_uint64), _narrow(8, _parse_uint64), _unsigned(8))]
Size = Annotated[int, Scalar("int", _check_uint64, _parse_size, _unsigned(64))]
"""Bytes; the only type whose text takes suffixes (k, M, G, ...)."""
Number = Annotated[float, Scalar("number", _check_number, _parse_number, {"type": "number"})]
AnyValue = Annotated[Any, Scalar("any", lambda value: value, None, {})]


class NullType(Enum):
    """The type of :data:`NULL`."""

    NULL = "null"

    def __repr__(self) -> str:
        return "NULL"


NULL: Final = NullType.NULL
"""JSON's ``null`` where an alternate takes it; ``None`` always means "not given"."""

# --- structs, unions, alternates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Annotation of a member: its special features, e.g. ``Annotated[Int, Features(("deprecated",))]``."""

    names: tuple[str, ...]


def qapi_name(name: str) -> str:
    """The member name on the wire of a Python attribute: ``node_name`` -> ``node-name``, ``copy_`` -> ``copy``."""
    return name.rstrip("_").replace("_", "-")


class QapiModel(BaseModel):
    """A QAPI struct, or a flat union and its branches.

    A struct declares its members with the types of this module, ``X | None = None`` for an optional one. Names get
    dashes for underscores; another spelling needs ``Field(alias=...)``. Construct instances by Python name.

    A flat union is a base class with the base members, naming the member that selects the branch, and a subclass for
    every branch that has members of its own::

        class BlockdevOptions(QapiModel, discriminator="driver"):
            driver: BlockdevDriver
            read_only: Bool = False

        class BlockdevOptionsFile(BlockdevOptions, branch=BlockdevDriver.FILE):
            filename: Str

    A member annotated with the base takes every branch. ``branch`` may be a tuple. A value of the discriminator without
    a branch adds no members.
    """

    model_config = ConfigDict(
        extra="forbid",
        alias_generator=qapi_name,
        validate_by_name=True,
        validate_by_alias=True,
        defer_build=True,  # most of the models are never used in the life of a daemon
        protected_namespaces=(),
    )

    #: Attribute that selects the branch; set on a union's base only.
    discriminator: ClassVar[str | None] = None
    #: Tag -> branch; set on a union's base only.
    branches: ClassVar[dict[str, "type[QapiModel]"]] = {}
    #: Special features of the type in introspection.
    type_features: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls, *, discriminator: str | None = None, branch: str | tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if discriminator is not None:
            cls.discriminator, cls.branches = discriminator, {}
        for tag in (branch,) if isinstance(branch, str) else branch:
            cls.branches[str(tag)] = cls

    @classmethod
    def is_union(cls) -> bool:
        """Whether this class is the base of a flat union."""
        return "discriminator" in cls.__dict__

    @classmethod
    def tag_name(cls) -> str:
        """Wire name of the discriminator."""
        assert cls.discriminator is not None
        return cls.model_fields[cls.discriminator].alias or cls.discriminator

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _refuse_null(handler.resolve_ref_schema(schema))
        if cls.is_union():
            return core_schema.with_info_wrap_validator_function(cls._choose_branch, schema)
        return schema

    @classmethod
    def _choose_branch(cls, value: Any, base: core_schema.ValidatorFunctionWrapHandler, info: Info) -> Any:
        """Validate with the branch that ``value`` names; with the base alone, to find its fault, when it names none."""
        tag = value.get(cls.tag_name()) if isinstance(value, dict) else None
        branch = cls.branches.get(tag) if isinstance(tag, str) else None
        if branch is None or info.context is None:
            return base(value)
        return branch.model_validate(value, context=info.context, by_alias=True, by_name=False)

    @classmethod
    def parse(cls, value: Any, source: Source = WIRE) -> Self:
        """Validate the decoded JSON (or key=value tree) of a client. Raises QmpdError with QEMU's text."""
        try:
            return cls.model_validate(value, context=source, by_alias=True, by_name=False)
        except ValidationError as error:
            raise explain(error, source) from None

    def to_wire(self) -> dict[str, Any]:
        """JSON members by wire name, without those that are ``None``."""
        return {
            member.alias or name: wire_value(value)
            for name, member in type(self).model_fields.items()
            if (value := getattr(self, name)) is not None
        }

    @property
    def given(self) -> frozenset[str]:
        """Wire names of the members that the client sent."""
        fields = type(self).model_fields
        return frozenset(fields[name].alias or name for name in self.model_fields_set)


def wire_value(value: Any) -> Any:
    """A result as plain JSON values: models become objects, enums their text."""
    if isinstance(value, QapiModel):
        return value.to_wire()
    if isinstance(value, list):
        return [wire_value(item) for item in value]
    if isinstance(value, dict):
        return {key: wire_value(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return None if value is NULL else value.value
    return value


def _refuse_null(schema: Any) -> None:
    """Make every ``X | None`` member of a model refuse the ``null`` of a client; in place."""
    while schema["type"] != "model-fields":
        schema = schema["schema"]
    for member in schema["fields"].values():
        outer = member["schema"]
        if outer["type"] == "default" and outer["schema"]["type"] == "nullable":
            inner = outer["schema"]["schema"]
            outer["schema"] = core_schema.with_info_wrap_validator_function(_none_is_ours, inner)


def _none_is_ours(value: Any, inner: core_schema.ValidatorFunctionWrapHandler, info: Info) -> Any:
    if value is None and info.context is None:
        return None
    return inner(value)


_JSON_TYPES: Mapping[type, str] = {
    str: "string",
    dict: "object",
    list: "array",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}


@dataclass(frozen=True)
class Alternate:
    """Annotation of a union whose member is chosen by JSON type: ``Annotated[Opts | Str, Alternate("OptsRef")]``.

    ``name`` is what the error for a type that is not taken calls it. ``null`` is written :class:`NullType`.
    """

    name: str

    def __get_pydantic_core_schema__(self, source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(_Choice(self.name, get_args(source)).validate)


@dataclass(eq=False)
class _Choice:
    """The validator of one alternate."""

    name: str
    members: tuple[Any, ...]

    @cached_property
    def _adapters(self) -> dict[str, TypeAdapter[Any]]:
        return {json_type(member): TypeAdapter(member) for member in self.members}

    def validate(self, value: Any, info: Info) -> Any:
        """Hand ``value`` to the member that takes its JSON type."""
        if info.context is None:
            return value
        adapter = self._adapters.get(_JSON_TYPES[type(value)])
        if adapter is None:
            _refuse("Invalid parameter type for '{leaf}', expected: " + self.name)
        if value is None:
            return NULL
        return adapter.validate_python(value, context=info.context, by_alias=True, by_name=False)


def json_type(annotation: Any) -> str:
    """The JSON type that values of a QAPI type have on the wire."""
    for marker in getattr(annotation, "__metadata__", ()):
        if isinstance(marker, Scalar):
            return str(marker.json["type"]).replace("integer", "number")
    if annotation is NullType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, QapiModel):
        return "object"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "string"
    return "array"
