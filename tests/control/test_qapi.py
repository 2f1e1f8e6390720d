"""The QAPI types: what is accepted, and how each fault is worded (spec/qmp-protocol.md sections 7 and 14)."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from qmpd.control.qapi import (
    KEYVAL,
    NULL,
    WIRE,
    Alternate,
    AnyValue,
    Bool,
    Int,
    NullType,
    Number,
    QapiModel,
    Size,
    Source,
    Str,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    wire_value,
)
from qmpd.errors import QmpdError


class Driver(StrEnum):
    FILE = "file"
    RAW = "raw"
    QCOW2 = "qcow2"
    NULL_CO = "null-co"


class Cache(QapiModel):
    direct: Bool = False
    no_flush: Bool = False


class Options(QapiModel, discriminator="driver"):
    node_name: Str | None = None
    driver: Driver
    cache: Cache | None = None


OptionsRef = Annotated[Options | Str, Alternate("BlockdevRef")]
OptionsRefOrNull = Annotated[Options | Str | NullType, Alternate("BlockdevRefOrNull")]


class FileOptions(Options, branch=Driver.FILE):
    filename: Str


class RawOptions(Options, branch=Driver.RAW):
    file: OptionsRef


class Qcow2Options(Options, branch=Driver.QCOW2):
    file: OptionsRef
    backing: OptionsRefOrNull | None = None


class Sync(StrEnum):
    FULL = "full"
    TOP = "top"


class Everything(QapiModel):
    options: list[Options] | None = None
    int_: Int | None = None
    u64: Uint64 | None = None
    u32: Uint32 | None = None
    u16: Uint16 | None = None
    u8: Uint8 | None = None
    size: Size | None = None
    number: Number | None = None
    flag: Bool | None = None
    text: Str | None = None
    sync: Sync | None = None
    syncs: list[Sync] | None = None
    refs: list[OptionsRef] | None = None
    any_: AnyValue = None
    rd_bytes: Int | None = Field(default=None, alias="rd_bytes")


def fault(model: type[QapiModel], value: Any, source: Source = WIRE) -> str:
    """The text that a client gets for ``value``."""
    with pytest.raises(QmpdError) as caught:
        model.parse(value, source)
    assert caught.value.qmp_class == "GenericError"
    return caught.value.desc


TYPE = "Invalid parameter type for '{}', expected: {}".format

WIRE_FAULTS: list[tuple[type[QapiModel], dict[str, Any], str]] = [
    # flat unions: base members first, in schema order
    (Options, {"node-name": "n"}, "Parameter 'driver' is missing"),
    (Options, {"driver": "nope", "x": 1}, "Parameter 'driver' does not accept value 'nope'"),
    (Options, {"driver": 1}, TYPE("driver", "string")),
    (Options, {"driver": None}, TYPE("driver", "string")),
    (Options, {"driver": "nope", "node-name": 1}, TYPE("node-name", "string")),
    (Options, {"driver": "file", "cache": {"direct": 1}}, TYPE("cache.direct", "boolean")),
    (Options, {"driver": "file"}, "Parameter 'filename' is missing"),
    (Options, {"driver": "null-co", "filename": "x"}, "Parameter 'filename' is unexpected"),
    (Options, {"driver": "file", "filename": "x", "y": 1}, "Parameter 'y' is unexpected"),
    (Options, {"driver": "null-co", "node_name": "x"}, "Parameter 'node_name' is unexpected"),
    # nested structs: what they do not know is reported when they are finished
    (Options, {"driver": "null-co", "cache": 1}, TYPE("cache", "object")),
    (Options, {"driver": "null-co", "cache": None}, TYPE("cache", "object")),
    (Options, {"driver": "file", "cache": {"foo": True}}, "Parameter 'cache.foo' is unexpected"),
    (Options, {"driver": "file", "cache": {"foo": 1, "direct": 1}}, TYPE("cache.direct", "boolean")),
    # alternates
    (Options, {"driver": "raw", "file": 1}, TYPE("file", "BlockdevRef")),
    (Options, {"driver": "raw", "file": None}, TYPE("file", "BlockdevRef")),
    (Options, {"driver": "raw"}, "Parameter 'file' is missing"),
    (Options, {"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
    (Options, {"driver": "raw", "file": {"driver": "x"}}, "Parameter 'driver' does not accept value 'x'"),
    (Options, {"driver": "qcow2", "file": "x", "backing": 1}, TYPE("backing", "BlockdevRefOrNull")),
    (Everything, {"refs": [1]}, TYPE("null", "BlockdevRef")),
    (Everything, {"refs": ["a", {"driver": "file"}]}, "Parameter 'refs[1].filename' is missing"),
    # lists
    (Everything, {"options": {}}, TYPE("options", "array")),
    (Everything, {"options": "x"}, TYPE("options", "array")),
    (Everything, {"options": [1]}, TYPE("options[0]", "object")),
    (Everything, {"options": [{"driver": "null-co", "x": 1}]}, "Parameter 'options[0].x' is unexpected"),
    (
        Everything,
        {"options": [{"driver": "raw", "file": {"driver": "file", "cache": {"direct": 1}}}]},
        TYPE("options[0].file.cache.direct", "boolean"),
    ),
    (Everything, {"syncs": ["full", "nope"]}, "Parameter 'null' does not accept value 'nope'"),
    (Everything, {"syncs": ["full", 1]}, TYPE("syncs[1]", "string")),
    # enums
    (Everything, {"sync": "FULL"}, "Parameter 'sync' does not accept value 'FULL'"),
    (Everything, {"sync": ""}, "Parameter 'sync' does not accept value ''"),
    (Everything, {"sync": "{path}"}, "Parameter 'sync' does not accept value '{path}'"),
    # an explicit null is no absence
    *((Everything, {name: None}, TYPE(name, "integer")) for name in ("int",)),
    (Everything, {"flag": None}, TYPE("flag", "boolean")),
    # scalars
    (Everything, {"text": 1}, TYPE("text", "string")),
    (Everything, {"flag": 0}, TYPE("flag", "boolean")),
    (Everything, {"flag": "on"}, TYPE("flag", "boolean")),
    *((Everything, {"int": value}, TYPE("int", "integer")) for value in ("5", True, 1.0, 1e3, 1 << 63, -(1 << 63) - 1)),
    *((Everything, {"u64": value}, "Parameter 'u64' expects uint64") for value in ("x", 1.5, True, 1 << 64, None)),
    (Everything, {"u32": 1 << 32}, "Parameter 'u32' expects uint32_t"),
    (Everything, {"u32": -1}, "Parameter 'u32' expects uint32_t"),
    (Everything, {"u32": 1.5}, "Parameter 'u32' expects uint64"),
    (Everything, {"u16": 1 << 16}, "Parameter 'u16' expects uint16_t"),
    (Everything, {"u8": 256}, "Parameter 'u8' expects uint8_t"),
    (Everything, {"size": "1k"}, "Parameter 'size' expects uint64"),
    (Everything, {"number": "1"}, TYPE("number", "number")),
    (Everything, {"number": True}, TYPE("number", "number")),
    # which of several unexpected ones is unspecified; a missing or mistyped one comes first
    (Everything, {"x": 1, "y": 2}, "Parameter 'y' is unexpected"),
    (Everything, {"x": 1, "text": 1}, TYPE("text", "string")),
]


@pytest.mark.parametrize(("model", "value", "desc"), WIRE_FAULTS)
def test_the_first_fault_in_schema_order_is_reported(model: type[QapiModel], value: Any, desc: str) -> None:
    """Typed JSON: one fault, QEMU's text."""
    assert fault(model, value) == desc


KEYVAL_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"flag": "1"}, "Parameter 'flag' expects 'on' or 'off'"),
    ({"flag": "ON"}, "Parameter 'flag' expects 'on' or 'off'"),
    *(({"int": text}, "Parameter 'int' expects integer") for text in ("", "5k", "x", "1_0", "5 ", "09", "0x", "--5")),
    ({"int": str(1 << 63)}, "Parameter 'int' expects integer"),
    ({"u64": str(1 << 64)}, "Parameter 'u64' expects integer"),
    ({"u32": str(1 << 32)}, "Parameter 'u32' expects uint32_t"),
    *(({"size": text}, "Parameter 'size' expects a size value") for text in ("", "k", "1x", "1.5", "-1", "16E")),
    ({"number": "x"}, "Parameter 'number' expects number"),
    ({"text": {"a": "1"}}, "Parameters 'text.*' are unexpected"),
    ({"flag": ["on"]}, "Parameters 'flag.*' are unexpected"),
    ({"sync": {"a": "1"}}, "Parameters 'sync.*' are unexpected"),
    ({"sync": "x"}, "Parameter 'sync' does not accept value 'x'"),
    ({"options": "x"}, TYPE("options", "array")),
    ({"options": ["x"]}, TYPE("options.0", "object")),
    ({"options": [{"driver": "file"}]}, "Parameter 'options.0.filename' is missing"),
    ({"options": [{"driver": "null-co", "cache": "x"}]}, TYPE("options.0.cache", "object")),
    ({"refs": ["a", {"driver": "file"}]}, "Parameter 'refs.1.filename' is missing"),
]


@pytest.mark.parametrize(("value", "desc"), KEYVAL_FAULTS)
def test_faults_of_key_value_text(value: Any, desc: str) -> None:
    """The command line has its own texts and writes list elements with a dot."""
    assert fault(Everything, value, KEYVAL) == desc


@pytest.mark.parametrize(
    ("member", "text", "value"),
    [
        *(("flag", text, True) for text in ("on", "yes", "true", "y")),
        *(("flag", text, False) for text in ("off", "no", "false", "n")),
        ("int_", "-5", -5),
        ("int_", " +0x1F", 31),
        ("int_", "010", 8),
        ("int_", "0", 0),
        ("u64", "-1", (1 << 64) - 1),
        ("u64", "18446744073709551615", (1 << 64) - 1),
        ("size", "1.5k", 1536),
        ("size", "2M", 2 << 20),
        ("size", "0x10", 16),
        ("size", "7", 7),
        ("size", "7b", 7),
        ("number", "1.5", 1.5),
        ("text", "1", "1"),
        ("sync", "top", Sync.TOP),
        ("any_", "x", "x"),
    ],
)
def test_text_is_converted_by_the_schema(member: str, text: str, value: Any) -> None:
    """What a key=value text means depends on the member's type alone."""
    alias = Everything.model_fields[member].alias or member

    assert getattr(Everything.parse({alias: text}, KEYVAL), member) == value


def test_a_value_of_the_wire_arrives_as_it_was_sent() -> None:
    """Aliases, branches, alternates, defaults and the set of given members."""
    options = Options.parse(
        {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "f"}, "backing": None}
    )

    assert isinstance(options, Qcow2Options)
    assert isinstance(options.file, FileOptions)
    assert options.node_name == "n"
    assert options.cache is None
    assert options.backing is NULL
    assert options.given == {"driver", "node-name", "file", "backing"}


def test_a_negative_number_wraps_where_an_unsigned_one_is_wanted() -> None:
    """QEMU accepts int64 for uint64 and takes it modulo 2^64."""
    assert Everything.parse({"u64": -1}).u64 == (1 << 64) - 1


def test_an_integer_is_taken_for_a_number() -> None:
    """The one conversion there is over QMP."""
    assert Everything.parse({"number": 1}).number == 1.0


def test_results_are_built_by_python_name_and_sent_by_wire_name() -> None:
    """None is left out; enums are their text; an explicit alias is kept."""
    made = Everything(
        sync=Sync.TOP, int_=3, text=None, rd_bytes=5, options=[FileOptions(driver=Driver.FILE, filename="f")]
    )

    assert made.to_wire() == {
        "sync": "top",
        "int": 3,
        "rd_bytes": 5,
        "options": [{"driver": "file", "filename": "f"}],
    }
    assert wire_value([Sync.FULL, NULL, {"a": Sync.TOP}]) == ["full", None, {"a": "top"}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["driver", "file", "backing", "cache", "direct", "options", "refs", "x", "filename"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*Everything.model_fields, "driver", "file"]) | st.text(max_size=3), JSON))
def test_any_json_is_taken_or_refused_with_a_text(value: dict[str, Any]) -> None:
    """No value that JSON can express gets another exception out of the models."""
    for model in (Everything, Options):
        for source in Source:
            with suppress(QmpdError):
                model.parse(value, source)
