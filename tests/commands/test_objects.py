"""Objects and the qom-* commands, with the texts of the peer (spec/toolbox.md section 11)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmpd.commands.objects import Secret
from qmpd.control.objects import Container, ObjectStore
from qmpd.errors import QmpdError
from tests.inprocess import CommandError, InProcess, running

INT64_MAX = (1 << 63) - 1


async def fault(core: InProcess, name: str, /, **arguments: Any) -> str:
    """The error text of a command."""
    client = await core.client()
    with pytest.raises(CommandError) as caught:
        await client.execute(name, **arguments)
    return caught.value.desc


async def test_an_iothread_keeps_and_reports_its_settings() -> None:
    """Defaults, values given, values changed."""
    async with running() as core:
        client = await core.client()
        await client.execute("object-add", qom_type="iothread", id="t0", poll_max_ns=0)
        await client.execute("qom-set", path="/objects/t0", property="poll-grow", value=5)

        listing = await client.execute("qom-list", path="t0")
        values = {
            entry["name"]: await client.execute("qom-get", path="t0", property=entry["name"]) for entry in listing
        }
        assert values == {
            "type": "iothread",
            "thread-pool-min": 0,
            "aio-max-batch": 0,
            "thread-pool-max": 64,
            "poll-max-ns": 0,
            "poll-grow": 5,
            "poll-shrink": 0,
        }
        assert [entry["type"] for entry in listing] == ["string"] + ["int"] * 6


@pytest.mark.parametrize(
    ("settings", "desc"),
    [
        ({"poll_max_ns": -1}, f"poll-max-ns value must be in range [0, {INT64_MAX}]"),
        ({"thread_pool_max": 0}, "bad thread-pool-min/thread-pool-max values"),
        ({"thread_pool_min": 65}, "bad thread-pool-min/thread-pool-max values"),
        ({"poll_max_ns": "5"}, "Invalid parameter type for 'poll-max-ns', expected: integer"),
        ({"data": "x"}, "Parameter 'data' is unexpected"),
    ],
)
async def test_bad_iothread_settings(settings: dict[str, Any], desc: str) -> None:
    """Nothing is added."""
    async with running() as core:
        assert await fault(core, "object-add", qom_type="iothread", id="t0", **settings) == desc
        assert core.ctx.objects.objects == {}


@pytest.mark.parametrize(
    ("settings", "desc"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "a", "file": "b"}, "'file' and 'data' are mutually exclusive"),
        ({"file": "/nope"}, "Unable to read /nope: Failed to open file “/nope”: No such file or directory"),
        ({"data": "!!", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "a b", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "a", "format": "x"}, "Parameter 'format' does not accept value 'x'"),
        ({"data": "a", "keyid": "k"}, "No secret with id 'k'"),
    ],
)
async def test_bad_secrets(settings: dict[str, Any], desc: str) -> None:
    """The peer's texts."""
    async with running() as core:
        assert await fault(core, "object-add", qom_type="secret", id="s0", **settings) == desc


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"data": "hällo"}, "hällo".encode()),
        ({"data": "aGVsbG8=", "format": "base64"}, b"hello"),
        ({"data": "aGVsbG8", "format": "base64"}, b"hello"),
        ({"data": "aGVs\nbG8=\n", "format": "base64"}, b"hello"),
        ({"file": "key"}, b"from a file\n"),
    ],
)
async def test_a_secret_is_read_when_added(
    options: dict[str, Any], value: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is there for qmpd itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("from a file\n")
    async with running() as core:
        client = await core.client()
        await client.execute("object-add", qom_type="secret", id="s0", **options)
        secret = core.ctx.objects.find("s0")

        assert isinstance(secret, Secret)
        assert secret.value == value


async def test_a_secret_is_never_given_out() -> None:
    """The peer hands it to whoever asks."""
    async with running() as core:
        client = await core.client()
        await client.execute("object-add", qom_type="secret", id="s0", data="hidden")

        assert await fault(core, "qom-get", path="s0", property="data") == "Property 'secret.data' is not readable"
        assert await client.execute("qom-get", path="s0", property="format") == "raw"
        assert await client.execute("qom-set", path="s0", property="data", value="x") == {}


async def test_ids() -> None:
    """Identifiers only, each once, and gone after object-del."""
    async with running() as core:
        client = await core.client()
        for bad in ("0io", "", "a b", "ä"):
            text = "Parameter 'id' expects an identifier"
            assert await fault(core, "object-add", qom_type="iothread", id=bad) == text
        await client.execute("object-add", qom_type="iothread", id="a.b-c_1")
        duplicate = "attempt to add duplicate property 'a.b-c_1' to object (type 'container')"
        assert await fault(core, "object-add", qom_type="iothread", id="a.b-c_1") == duplicate
        await client.execute("object-del", id="a.b-c_1")
        assert await fault(core, "object-del", id="a.b-c_1") == "object 'a.b-c_1' not found"


async def test_an_object_in_use_stays() -> None:
    """The peer deletes an iothread under its users, and crashes."""
    async with running() as core:
        client = await core.client()
        await client.execute("object-add", qom_type="iothread", id="t0")
        core.ctx.objects.objects["t0"].users += 1

        assert await fault(core, "object-del", id="t0") == "object 't0' is in use, can not be deleted"


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/", ["type", "backend", "objects", "chardevs"]),
        ("/objects", ["type", "t0"]),
        ("/objects/", ["type", "t0"]),
        ("objects", ["type", "t0"]),
        ("/backend", ["type"]),
    ],
)
async def test_the_tree(path: str, names: list[str]) -> None:
    """Containers list their content; a path may begin anywhere."""
    async with running() as core:
        client = await core.client()
        await client.execute("object-add", qom_type="iothread", id="t0")

        assert [entry["name"] for entry in await client.execute("qom-list", path=path)] == names


@pytest.mark.parametrize(
    ("name", "arguments", "desc"),
    [
        ("qom-list", {"path": "/nope"}, "Device '/nope' not found"),
        ("qom-list", {"path": ""}, "Path '' is ambiguous"),
        ("qom-get", {"path": "/objects", "property": "x"}, "Property 'container.x' not found"),
        ("qom-get", {"path": "t0", "property": "x"}, "Property 'iothread.x' not found"),
        ("qom-set", {"path": "t0", "property": "x", "value": 1}, "Property 'iothread.x' not found"),
        ("qom-set", {"path": "t0", "property": "type", "value": "x"}, "Property 'iothread.type' is not writable"),
        ("qom-set", {"path": "/objects", "property": "t0", "value": 1}, "Property 'container.t0' is not writable"),
        (
            "qom-set",
            {"path": "t0", "property": "poll-grow", "value": 1 << 70},
            "Invalid parameter type for 'poll-grow', expected: integer",
        ),
        ("qom-set", {"path": "t0", "property": "x"}, "Parameter 'value' is missing"),
        ("qom-list-properties", {"typename": "nope"}, "Class 'nope' not found"),
        ("qom-list-properties", {"typename": "user-creatable"}, "Parameter 'typename' expects a QOM type"),
    ],
)
async def test_what_is_not_there(name: str, arguments: dict[str, Any], desc: str) -> None:
    """The peer's texts."""
    async with running() as core:
        client = await core.client()
        await client.execute("object-add", qom_type="iothread", id="t0")

        assert await fault(core, name, **arguments) == desc


async def test_children_are_properties_too() -> None:
    """Their value is their path."""
    async with running() as core:
        client = await core.client()
        await client.execute("object-add", qom_type="iothread", id="t0")

        assert await client.execute("qom-get", path="/", property="objects") == "/objects"
        assert await client.execute("qom-get", path="/objects", property="t0") == "/objects/t0"
        assert await client.execute("qom-get", path="/", property="type") == "container"


async def test_types() -> None:
    """Concrete ones unless abstract ones are asked for, those of one ancestor if wanted."""
    async with running() as core:
        client = await core.client()
        creatable = await client.execute("qom-list-types", implements="user-creatable")
        everything = await client.execute("qom-list-types", abstract=True)

        assert {"name": "iothread", "parent": "event-loop-base"} in creatable
        assert {"name": "secret", "parent": "secret_common"} in creatable
        assert not any("abstract" in entry for entry in creatable)
        assert {"name": "object", "abstract": True} in everything
        assert await client.execute("qom-list-types", implements="nope") == []
        described = await client.execute("qom-list-properties", typename="secret")
        assert [entry["name"] for entry in described] == ["type", "iv", "keyid", "format", "file", "data"]


def test_the_same_name_in_two_places_is_ambiguous() -> None:
    """A full path still tells them apart."""
    store = ObjectStore()
    store.chardevs.content["backend"] = Container()

    with pytest.raises(QmpdError, match=r"^Path 'backend' is ambiguous$"):
        store.resolve("backend")
    assert store.resolve("/chardevs/backend")[1] == "/chardevs/backend"
