"""blkdebug: which requests fail, and when."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Perm
from qmpd.block.debug import Event, Rules, SetState, announcer, silence
from qmpd.block.drivers.raw import Raw
from qmpd.block.filters.blkdebug import Blkdebug
from qmpd.block.storage.file import FileStorage
from qmpd.errors import Kind, QmpdError
from qmpd.units import KIB, MIB
from tests.block.conformance import checked, noise, read
from tests.block.filters.rig import filter_over, new_file, new_qcow2


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FileStorage]:
    file = new_file(tmp_path / "disk", MIB)
    yield file
    file.close()


def blkdebug(file: FileStorage, *rules: dict[str, Any], **options: Any) -> Blkdebug:
    driver = filter_over("blkdebug", checked(file), inject_error=list(rules), **options)
    assert isinstance(driver, Blkdebug)
    return driver


def failure(request: Any) -> int:
    """The errno that a request fails with, 0 if it does not."""
    try:
        request()
    except QmpdError as error:
        return error.errno
    return 0


# -- rules -------------------------------------------------------------------------------------------------------------


def test_without_rules_everything_passes(file: FileStorage) -> None:
    """But no file is offered to go around, and no place to fill."""
    debug = blkdebug(file)
    debug.write(0, b"data")
    assert read(file, 0, 4) == b"data"
    assert debug.direct(0, 4) is None
    assert debug.placement_unit is None
    assert [(run.offset, run.host) for run in debug.map(0, 4)] == [(0, -1)]


def test_a_rule_comes_into_force_with_its_event(file: FileStorage) -> None:
    """Not before; and stays until another event brings others."""
    debug = blkdebug(
        file, {"event": "read_aio", "errno": errno.EPERM}, {"event": "l2_load", "errno": errno.ENXIO, "iotype": "read"}
    )
    assert failure(lambda: read(debug, 0, 1)) == 0
    debug.debug_events(Event.READ_AIO)
    assert failure(lambda: read(debug, 0, 1)) == errno.EPERM
    debug.debug_events(Event.WRITE_AIO)
    assert failure(lambda: debug.discard(0, 512)) == errno.EPERM
    debug.debug_events(Event.L2_LOAD)
    assert failure(lambda: read(debug, 0, 1)) == errno.ENXIO
    assert failure(lambda: debug.discard(0, 512)) == 0


def test_none_is_from_the_beginning(file: FileStorage) -> None:
    """The event of being opened."""
    assert failure(lambda: read(blkdebug(file, {"event": "none"}), 0, 1)) == errno.EIO


@pytest.mark.parametrize(
    ("offset", "length", "number"),
    [(0, 1024, errno.EIO), (512, 1, errno.EIO), (0, 512, 0), (513, 511, 0), (1024, 9, 0)],
)
def test_a_sector_is_hit_by_what_touches_its_first_byte(
    file: FileStorage, offset: int, length: int, number: int
) -> None:
    """As the peer counts: what begins further inside does not count."""
    debug = blkdebug(file, {"event": "none", "sector": 1})
    assert failure(lambda: read(debug, offset, length)) == number


def test_once_is_once(file: FileStorage) -> None:
    """Even if the event comes again."""
    debug = blkdebug(file, {"event": "pwritev", "errno": errno.ENOSPC, "once": True})
    with pytest.raises(QmpdError) as caught:
        debug.write(0, b"lost")
    assert (caught.value.kind, caught.value.desc) == (Kind.NO_SPACE, "No space left on device")
    assert read(file, 0, 4) == bytes(4)
    debug.write(0, b"kept")
    assert read(file, 0, 4) == b"kept"


def test_the_first_rule_in_force_counts(file: FileStorage) -> None:
    """In the order given; an errno of 0 shields from those behind it."""
    rules = [
        {"event": "none", "errno": 0, "sector": 0},
        {"event": "none", "errno": errno.EPERM},
        {"event": "none", "errno": errno.EIO},
    ]
    debug = blkdebug(file, *rules)
    assert failure(lambda: read(debug, 0, 1)) == 0
    assert failure(lambda: read(debug, 512, 1)) == errno.EPERM


@pytest.mark.parametrize("iotype", ["read", "write", "write-zeroes", "discard", "flush", "block-status", None])
def test_a_rule_is_about_one_type_of_request_or_all_but_questions(file: FileStorage, iotype: str | None) -> None:
    """block-status fails only where it is named."""
    debug = blkdebug(file, {"event": "none"} | ({"iotype": iotype} if iotype else {}))
    requests = {
        "read": lambda: read(debug, 0, 1),
        "write": lambda: debug.write(0, b"x"),
        "write-zeroes": lambda: debug.write_zeroes(0, 512),
        "discard": lambda: debug.discard(0, 512),
        "flush": debug.flush,
        "block-status": lambda: debug.map(0, 512),
    }
    failing = {name for name, request in requests.items() if failure(request)}
    assert failing == ({iotype} if iotype else set(requests) - {"block-status"})


def test_states_lead_from_one_rule_to_the_next(file: FileStorage) -> None:
    """The third flush fails: each flush is one state further."""
    debug = blkdebug(
        file,
        {"event": "flush_to_disk", "state": 3},
        set_state=[{"event": "flush_to_os", "state": state, "new_state": state + 1} for state in (1, 2)],
    )
    assert [failure(debug.flush) for _ in range(3)] == [0, errno.EIO, errno.EIO]


def test_all_changes_of_state_see_the_old_one() -> None:
    """One event makes one step, and the last rule wins."""
    states = [SetState(Event.READ_AIO, 2, 1), SetState(Event.READ_AIO, 3, 2), SetState(Event.READ_AIO, 7, 1)]
    rules = Rules(states=states)
    rules.announce(Event.READ_AIO)
    assert rules.state == 7


# -- events of an image above ------------------------------------------------------------------------------------------


def test_an_image_announces_what_it_does(tmp_path: Path) -> None:
    """Through raw as well; in the order in which it happens."""
    file = new_file(tmp_path / "disk")
    debug = blkdebug(file)
    image = new_qcow2(tmp_path / "disk", 4 * MIB, checked(Raw.open({"file": checked(debug)}, {}, read_only=False)))
    heard: list[Event] = []
    listen = debug._rules.announce
    debug._rules.announce = lambda event: heard.append(event) or listen(event)  # type: ignore[func-returns-value,method-assign]
    image.write(0, b"data")
    assert heard.index(Event.CLUSTER_ALLOC) < heard.index(Event.L2_ALLOC_WRITE) < heard.index(Event.WRITE_AIO)
    heard.clear()
    image.flush()
    order = [Event.REFBLOCK_UPDATE_PART, Event.L2_UPDATE, Event.L1_UPDATE]
    assert [event for event in heard if event in order] == order
    heard.clear()
    read(image, 0, 4)
    assert heard == [Event.READ_AIO]
    image.close()
    file.close()


def test_a_failing_l2_update_leaves_the_data_readable(tmp_path: Path) -> None:
    """A flush fails once; nothing is forgotten, and the next one makes it durable."""
    file = new_file(tmp_path / "disk")
    debug = blkdebug(file, {"event": "l2_update", "once": True, "iotype": "write"})
    image = new_qcow2(tmp_path / "disk", 4 * MIB, checked(debug))
    data = noise(100 * KIB, 1)
    image.write(12345, data)
    with pytest.raises(QmpdError, match="Input/output error"):
        image.flush()
    assert read(image, 12345, len(data)) == data
    image.close()
    file.close()


def test_nobody_listens_below_a_plain_file(file: FileStorage) -> None:
    """Announcing is a call of nothing then."""
    assert announcer(checked(file)) is silence
    assert announcer(checked(Raw.open({"file": checked(file)}, {}, read_only=False))) is silence


# -- breakpoints -------------------------------------------------------------------------------------------------------


def test_a_breakpoint_holds_one_thread_until_it_is_removed(file: FileStorage) -> None:
    """Others pass, and the write happens afterwards."""
    debug = blkdebug(file)
    debug.breakpoints.set(Event.PWRITEV, "A")
    writer = threading.Thread(target=debug.write, args=(0, b"held"))
    writer.start()
    assert debug.breakpoints.wait("A")
    debug.write(512, b"free")
    assert read(file, 0, 4) == bytes(4)
    debug.breakpoints.remove("A")
    writer.join()
    assert read(file, 0, 4) + read(file, 512, 4) == b"heldfree"


def test_closing_frees_who_is_held(file: FileStorage) -> None:
    """No thread is lost."""
    debug = blkdebug(file)
    debug.breakpoints.set(Event.FLUSH_TO_DISK, "A")
    flusher = threading.Thread(target=debug.flush)
    flusher.start()
    assert debug.breakpoints.wait("A")
    debug.close()
    flusher.join()


# -- the form of requests ----------------------------------------------------------------------------------------------


class Recorder:
    """A device that notes what it is asked."""

    length = MIB
    placement_unit = None

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.seen.append(("read", offset, len(buffer)))

    def write(self, offset: int, data: memoryview) -> None:
        self.seen.append(("write", offset, len(data)))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.seen.append(("zero", offset, length))

    def discard(self, offset: int, length: int) -> None:
        self.seen.append(("discard", offset, length))


@pytest.mark.parametrize(
    ("options", "request_", "seen"),
    [
        ({"align": 4096}, ("readinto", 100, memoryview(bytearray(5000))), [("read", 0, 8192)]),
        ({"align": 4096}, ("write", 4096, bytes(4096)), [("write", 4096, 4096)]),
        (
            {"align": 4096},
            ("write", 100, bytes(8192)),
            [("read", 0, 4096), ("read", 8192, 4096), ("write", 0, 12288)],
        ),
        (
            {"max_transfer": 1000},
            ("write", 5, bytes(2500)),
            [("write", 5, 1000), ("write", 1005, 1000), ("write", 2005, 500)],
        ),
        (
            {"opt_write_zero": 4096},
            ("write_zeroes", 100, 8192),
            [("write", 100, 3996), ("write", 8192, 100), ("zero", 4096, 4096)],
        ),
        ({"max_write_zero": 8192}, ("write_zeroes", 0, 12288), [("zero", 0, 8192), ("zero", 8192, 4096)]),
        (
            {"opt_discard": 4096, "max_discard": 4096},
            ("discard", 100, 16384),
            [("discard", n, 4096) for n in (4096, 8192, 12288)],
        ),
        ({"opt_discard": 4096}, ("discard", 100, 200), []),
    ],
)
def test_requests_are_given_the_form_asked_for(
    options: dict[str, int], request_: tuple[Any, ...], seen: list[tuple[str, int, int]]
) -> None:
    """Unaligned ones are completed, large ones cut, small discards dropped."""
    recorder = Recorder()
    debug = filter_over("blkdebug", recorder, **options)  # type: ignore[arg-type]
    getattr(debug, request_[0])(*request_[1:])
    assert recorder.seen == seen


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"align": -1}, "Value '-1' is out of range for parameter 'align'"),
        ({"align": 1000}, "Cannot meet constraints with align 1000"),
        ({"align": 1 << 31}, "Cannot meet constraints with align 2147483648"),
        ({"max_transfer": 1 << 31}, "Parameter 'max-transfer' expects int32_t"),
        ({"align": 4096, "max_transfer": 512}, "Cannot meet constraints with max-transfer 512"),
        ({"opt_write_zero": 4096, "max_write_zero": 512}, "Cannot meet constraints with max-write-zero 512"),
        ({"opt_discard": 4096, "max_discard": 512}, "Cannot meet constraints with max-discard 512"),
    ],
)
def test_contradicting_options(file: FileStorage, options: dict[str, int], text: str) -> None:
    """With the peer's texts."""
    with pytest.raises(QmpdError) as caught:
        blkdebug(file, **options)
    assert caught.value.desc == text


def test_permissions_taken_on_demand(file: FileStorage) -> None:
    """What the graph asks of the child on its behalf."""
    debug = blkdebug(file, take_child_perms=["write", "resize"], unshare_child_perms=["consistent-read"])
    assert debug.take_child_perms == Perm.WRITE | Perm.RESIZE
    assert debug.unshare_child_perms == Perm.CONSISTENT_READ


def test_its_options_are_for_life(file: FileStorage) -> None:
    """Repeating them is fine."""
    debug = blkdebug(file, {"event": "none"})
    debug.reopen_prepare(read_only=True, options={"inject-error": [{"event": "none"}], "set-state": None})
    debug.reopen_commit()
    assert debug.read_only
    with pytest.raises(QmpdError, match="Cannot change the option 'inject-error'"):
        debug.reopen_prepare(read_only=True, options={})
