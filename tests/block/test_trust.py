"""Which files may be opened: rules, hostile names, and directories that change under the check."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block import trust
from qmpd.block.storage.create import create_file
from qmpd.block.storage.file import FileStorage
from qmpd.block.trust import Trust, identity
from qmpd.errors import QmpdError

RDONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory ``in`` with a ``good`` file, a ``secret`` beside it; nothing stays open."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good").write_bytes(b"good")
    (tmp_path / "secret").write_bytes(b"secret")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def content(opening: Callable[[str, int], int], path: str) -> bytes:
    fd = opening(path, RDONLY)
    try:
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "path", ["in/good", "in/../in/./good", "in//good", "in/link", "in/round", "way/good", "/proc/self/cwd/in/good"]
)
def test_what_is_inside_may_be_opened_by_any_way(place: Path, path: str) -> None:
    """What counts is where the file is, links resolved."""
    (place / "in" / "link").symlink_to("good")
    (place / "in" / "round").symlink_to(place / "in" / "good")
    (place / "way").symlink_to("in")
    assert content(Trust.make(["in"]).open, path) == b"good"
    assert content(Trust.make(["in"]).open_from_image, path) == b"good"


@pytest.mark.parametrize("path", ["secret", "in/../secret", "in/out", "in/up/secret", "/etc/hostname"])
def test_what_is_outside_may_not(place: Path, path: str) -> None:
    """Neither by dots nor by links."""
    (place / "in" / "out").symlink_to("../secret")
    (place / "in" / "up").symlink_to("..")
    policy = Trust.make(["in"])
    before = descriptors()
    for opening in (policy.open, policy.open_from_image):
        with pytest.raises(QmpdError, match=r"is outside the directories allowed \(in\)"):
            opening(path, RDONLY)
    with pytest.raises(QmpdError, match="outside"):
        create_file(path.replace("secret", "new"), 512, open_file=policy.open)
    assert not (place / "new").exists()
    assert descriptors() == before


def test_files_are_made_inside_only(place: Path) -> None:
    """Also at the end of a link that leads nowhere yet."""
    policy = Trust.make(["in"])
    create_file("in/new", 512, open_file=policy.open)
    assert (place / "in" / "new").stat().st_size == 512
    (place / "in" / "nowhere").symlink_to("../elsewhere")
    with pytest.raises(QmpdError, match="outside"):
        create_file("in/nowhere", 512, open_file=policy.open)
    assert not (place / "elsewhere").exists()


def test_an_allowed_directory_is_the_one_from_the_start(place: Path) -> None:
    """It may be moved; another one in its place is not allowed."""
    policy = Trust.make(["in"])
    (place / "in").rename(place / "moved")
    (place / "in").mkdir()
    (place / "in" / "good").write_bytes(b"other")
    assert content(policy.open, "moved/good") == b"good"
    with pytest.raises(QmpdError, match="outside"):
        policy.open("in/good", RDONLY)


def test_what_is_no_directory_cannot_be_allowed(place: Path) -> None:
    """At the start, before anything is opened."""
    for name, text in {"secret": "Not a directory", "none": "No such file", "a\0b": "Invalid argument"}.items():
        with pytest.raises(QmpdError, match=text):
            Trust.make([name])


# -- names in images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/dev/null", "/dev/zero", "pipe", ".", "/", "in/", "/proc/self/environ", "/proc/kcore"]
)
def test_images_name_plain_files_only(place: Path, path: str) -> None:
    """No devices, pipes, directories, nor views of the kernel; and no waiting for the other end of a pipe."""
    os.mkfifo("pipe")
    with pytest.raises((QmpdError, FileNotFoundError)) as caught:
        Trust().open_from_image(path, RDONLY)
    if isinstance(caught.value, QmpdError):
        assert caught.value.desc.startswith("a name found in an image must ")


def test_descriptors_of_the_daemon_cannot_be_named(place: Path) -> None:
    """A file that has no name any more is not reached by its number."""
    with open("secret", "rb") as file:
        os.unlink("secret")
        with pytest.raises(FileNotFoundError):
            Trust().open_from_image(f"/proc/self/fd/{file.fileno()}", RDONLY)


def test_loops_of_links_end(place: Path) -> None:
    """With the kernel's error."""
    os.symlink("loop", "loop")
    with pytest.raises(OSError, match="Too many levels"):
        Trust().open_from_image("loop", RDONLY)


def test_files_to_avoid_are_known_by_any_name(place: Path) -> None:
    """By device and inode."""
    os.link("secret", "twin")
    with open("secret", "rb") as file, pytest.raises(QmpdError, match="in this backing chain already"):
        Trust().open_from_image("twin", RDONLY, frozenset({identity(file.fileno())}))


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            ["..", ".", "", "in", "good", "secret", "out", "loop", "pipe", "/etc", "/dev/zero", "\0", "json:{}"]
        ),
        st.sampled_from(
            ["nbd:x", "proc/self/fd/0", "/proc/self/root", "x" * 300, "y/" * 3000, "\ud800", "\udcff", "\n"]
        ),
        st.text(max_size=8),
    ),
    max_size=8,
).map("/".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=HOSTILE)
def test_no_name_leads_outside(place: Path, path: str) -> None:
    """Whatever is opened is the one file inside; everything else is an error of the two kinds, and leaks nothing."""
    if not (place / "in" / "out").is_symlink():
        (place / "in" / "out").symlink_to("../secret")
        (place / "in" / "loop").symlink_to("loop")
        os.mkfifo(place / "in" / "pipe")
    policy = Trust.make(["in"])
    before = descriptors()
    try:
        fd = policy.open_from_image(path, RDONLY)
    except (OSError, QmpdError):
        pass
    else:
        try:
            assert os.path.samestat(os.fstat(fd), os.stat("in/good"))
        finally:
            os.close(fd)
    assert descriptors() == before


# -- races -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_open(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """Last component as passed to open(2) -> what somebody else does just before; "then" is before the one for I/O."""
    acts: dict[str, Callable[[], None]] = {}
    real = os.open

    def hooked(path: Any, flags: int, *args: Any, **more: Any) -> int:
        name = "then" if str(path).startswith("/proc/self/fd/") else str(path)
        acts.pop(name, lambda: None)()
        return real(path, flags, *args, **more)

    monkeypatch.setattr(trust.os, "open", hooked)
    return acts


def swap(name: str, target: str) -> Callable[[], None]:
    """Put a symbolic link where a file or directory is."""

    def act() -> None:
        os.rename(name, f"{name}.old")
        os.symlink(target, name)

    return act


def test_a_link_put_in_place_after_the_check_changes_nothing(place: Path, at_open: dict[str, Any]) -> None:
    """What was checked is what is opened, though its name leads elsewhere by then."""
    at_open["then"] = swap("in/good", "../secret")
    file = FileStorage.open({}, {"filename": "in/good", "open-file": Trust.make(["in"]).open}, read_only=True)
    assert not at_open, "the swap did not happen"
    assert os.pread(file.fd, 4, 0) == b"good"
    assert file.filename == "in/good"
    file.close()


@pytest.mark.parametrize(("moment", "name", "target"), [("good", "in/good", "../secret"), ("sub", "in/sub", "..")])
def test_a_link_put_in_place_before_the_check_is_seen(
    place: Path, at_open: dict[str, Any], moment: str, name: str, target: str
) -> None:
    """Of the file, or of a directory on the way."""
    (place / "in" / "sub").mkdir()
    (place / "in" / "sub" / "secret").touch()
    policy = Trust.make(["in"])
    at_open[moment] = swap(name, target)
    with pytest.raises(QmpdError, match="outside"):
        policy.open("in/good" if moment == "good" else "in/sub/secret", RDONLY)
    assert not at_open


def test_a_directory_that_leaves_while_it_is_walked_does_not_take_the_walk_along(
    place: Path, at_open: dict[str, Any]
) -> None:
    """``..`` is the directory that one came through, not the one that it has become."""
    (place / "in" / "sub").mkdir()
    (place / "far").mkdir()
    (place / "far" / "good").write_bytes(b"far")
    policy = Trust.make(["in"])
    at_open["good"] = lambda: os.rename("in/sub", "far/sub")
    assert content(policy.open, "in/sub/../good") == b"good"


def test_a_link_in_place_of_a_new_file_is_not_followed(place: Path, at_open: dict[str, Any]) -> None:
    """Made by somebody between the look and the creation."""
    policy = Trust.make(["in"])
    looks = iter([lambda: at_open.update(new=lambda: os.symlink("../made", "in/new"))])
    at_open["new"] = lambda: next(looks)()
    with pytest.raises(FileExistsError):
        policy.open("in/new", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    assert not (place / "made").exists()
