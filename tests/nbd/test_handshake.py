"""The handshake, byte by byte: recordings of the peer, every cut, rubbish."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.nbd.handshake import Action, Close, Enter, ExportInfo, Handshake, Negotiated, Send, StartTls, Tls

RECORDINGS = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "data" / "nbd-handshake.jsonl").read_text().splitlines()
]

#: Recordings of what must not be copied.
DEFECTS = {
    "peer-crash-set-meta-trailing-option",
    "peer-crash-list-meta-trailing-option",
    "set-meta-trailing-bytes",
}


@dataclass
class Shelf:
    """A directory of fixed exports."""

    all: Sequence[ExportInfo]

    def exports(self) -> Sequence[ExportInfo]:
        return self.all

    def find(self, name: str) -> ExportInfo | None:
        return next((export for export in self.all if export.name == name), None)


def described(export: dict[str, Any], server: dict[str, Any]) -> ExportInfo:
    """What a recording's arguments of block-export-add make."""
    contexts = ["base:allocation"]
    if export.get("allocation-depth"):
        contexts.append("qemu:allocation-depth")
    contexts += [f"qemu:dirty-bitmap:{name}" for name in export.get("bitmaps", ())]
    return ExportInfo(
        name=export.get("name", export["node-name"]),
        size=(export["image"] or {}).get("size", 1048576),
        writable=export.get("writable", False),
        description=export.get("description", ""),
        multi_conn=server.get("max-connections") != 1,
        minimum=4096 if "align 4096" in str(export["image"]) else 1,
        contexts=tuple(contexts),
    )


def recorded(case: dict[str, Any]) -> Handshake:
    server = case.get("server", {})
    export = case.get("export") or {"all": []}
    exports = [described({"image": export.get("image"), **one}, server) for one in export.get("all", [export])]
    tls = Tls.REQUIRED if "tls-creds" in server else Tls.OFF
    return Handshake(Shelf(exports), tls=tls)


@pytest.mark.parametrize("case", [c for c in RECORDINGS if c["case"] not in DEFECTS], ids=lambda c: c["case"])
def test_answers_as_recorded(case: dict[str, Any]) -> None:
    handshake = recorded(case)
    exchange = case["exchange"]
    assert handshake.greeting().hex() == exchange[0]["recv_hex"]
    got, expected, reason = b"", b"", None
    for step in exchange[1:]:
        if "recv_hex" in step:
            expected += bytes.fromhex(step["recv_hex"])
        for action in handshake.receive(bytes.fromhex(step.get("send_hex", ""))):
            if isinstance(action, Send):
                got += action.data
            elif isinstance(action, Enter | StartTls):
                # What follows is another phase: the recording of this one is a prefix of all that was received.
                rest = b"".join(bytes.fromhex(s.get("recv_hex", "")) for s in exchange)
                assert rest[18:].startswith(got)
                return
            else:
                reason = action.reason
                assert case["closed"]
                if reason:
                    assert case["stderr"] == [f"qemu-storage-daemon: option negotiation failed: {reason}"]
    assert got == expected


def header(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def answer(number: int, reply: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x0003E889045565A9, number, reply, len(data)) + data


SHELF = Shelf([ExportInfo("d", 1 << 20, True, "a disk"), ExportInfo("e", 512)])
FLAGS = b"\0\0\0\3"
INVALID = 0x80000003


def run(data: bytes, cuts: Sequence[int] = (), tls: Tls = Tls.OFF) -> list[Action]:
    """All actions, with neighbouring Sends made one."""
    handshake = Handshake(SHELF, tls=tls)
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    actions: list[Action] = []
    leftover = b""
    for piece in pieces:
        if actions and isinstance(actions[-1], Enter):
            leftover += piece
        for action in handshake.receive(piece):
            if isinstance(action, Send) and actions and isinstance(actions[-1], Send):
                action = Send(actions.pop().data + action.data)  # type: ignore[union-attr]
            actions.append(action)
    if actions and isinstance(actions[-1], Enter):
        actions[-1] = Enter(actions[-1].negotiated, actions[-1].leftover + leftover)
    return actions


GO_D = header(7, struct.pack(">I", 1) + b"d" + struct.pack(">HH", 1, 1))
META_D = header(10, struct.pack(">I", 1) + b"d" + struct.pack(">II", 1, 15) + b"base:allocation")
LONG = FLAGS + header(3) + header(99, b"junk") + header(8) + META_D + GO_D + b"first request"


def test_every_cut_gives_the_same_answers() -> None:
    whole = run(LONG)
    assert whole[-1] == Enter(Negotiated("d", True, False, ((0, "base:allocation"),)), b"first request")
    for cut in range(1, len(LONG)):
        assert run(LONG, [cut]) == whole
    assert run(LONG, range(1, len(LONG))) == whole


@pytest.mark.parametrize("number", [9, 10])
def test_bytes_behind_the_queries_are_refused_and_dropped(number: int) -> None:
    hidden = header(3)
    data = struct.pack(">I", 1) + b"d" + struct.pack(">I", 0) + hidden
    text = f"option '{'list' if number == 9 else 'set'} meta context' has unexpected length".encode()
    got = run(FLAGS + header(8) + header(number, data) + header(2))
    ends = answer(8, 1) + answer(number, INVALID, text) + answer(2, 1)
    assert got == [Send(ends), Close(None)]


def test_options_too_long_to_be_read_are_answered_and_skipped() -> None:
    got = run(FLAGS + header(7, bytes(2 << 20)) + header(2))
    assert isinstance(got[0], Send)
    assert got[0].data[:20] == answer(7, 0x80000009)[:16] + struct.pack(">I", len(got[0].data) - 20 - 20)
    assert got[0].data.endswith(answer(2, 1))


def test_skipped_data_takes_no_memory() -> None:
    handshake = Handshake(SHELF)
    assert list(handshake.receive(FLAGS + b"IHAVEOPT" + struct.pack(">II", 99, 32 << 20))) == []
    for _ in range(31):
        assert list(handshake.receive(bytes(1 << 20))) == []
        assert len(handshake._buffer) == 0
    refused, *end = handshake.receive(bytes(1 << 20) + header(2))
    assert refused == Send(answer(99, 0x80000001, b"Unsupported option 99 (<unknown>)"))
    assert end == [Send(answer(2, 1)), Close(None)]


def test_plain_bytes_do_not_survive_into_tls() -> None:
    assert run(FLAGS + header(5), tls=Tls.REQUIRED) == [Send(answer(5, 1)), StartTls()]
    early = run(FLAGS + header(5) + header(2), tls=Tls.REQUIRED)
    assert early == [Close("TLS handshake failed: data received before the answer to STARTTLS")]


def test_inside_tls_the_options_start_anew() -> None:
    handshake = Handshake(SHELF, tls=Tls.REQUIRED)
    list(handshake.receive(FLAGS + header(5)))
    again = answer(5, INVALID, b"TLS already enabled")
    assert list(handshake.receive(header(5) + header(2))) == [Send(again), Send(answer(2, 1)), Close(None)]


def test_nothing_is_accepted_after_the_end() -> None:
    handshake = Handshake(SHELF)
    list(handshake.receive(FLAGS + header(2)))
    assert list(handshake.receive(header(3))) == []
    assert handshake.lost() is None


def test_leaving_between_options_is_abnormal_but_not_before_the_flags() -> None:
    handshake = Handshake(SHELF)
    assert handshake.lost() is None
    list(handshake.receive(FLAGS))
    expected = "Failed to read opts magic: Unexpected end-of-file before all data were read"
    assert handshake.lost() == expected


def options() -> st.SearchStrategy[bytes]:
    number = st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1))
    return st.builds(header, number, st.binary(max_size=40))


@given(st.lists(st.one_of(options(), st.binary(max_size=20), st.sampled_from([GO_D, META_D])), max_size=8), st.data())
def test_rubbish_is_answered_the_same_however_it_is_cut(pieces: list[bytes], data: st.DataObject) -> None:
    stream = FLAGS + b"".join(pieces)
    tls = data.draw(st.sampled_from([Tls.OFF, Tls.ACTIVE]))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream)), max_size=5)))
    assert run(stream, cuts, tls) == run(stream, (), tls)


def test_answers_are_made_one_at_a_time() -> None:
    handshake = Handshake(Shelf([ExportInfo("x" * 4096, 0)] * 50))
    actions: Iterator[Action] = handshake.receive(FLAGS + header(3) * 1000)
    assert isinstance(next(actions), Send)
