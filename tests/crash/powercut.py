"""What a power cut may leave of a recorded commit.

Before a file's flush returns, any of the writes since its last one may be on the disk, whole or in sectors, in any
combination; flushing one file says nothing about another. So the states at a moment are those of the files, combined.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.crash.contents import Images
from tests.crash.instrument import SECTOR, Event


def load(path: Path) -> list[Event]:
    """The events of a recording, files by their bare names."""
    events = []
    with path.open("rb") as file:
        while file.peek(1):
            event: Event = pickle.load(file)
            events.append(event._replace(name=Path(event.name).name))
    return events


class State(NamedTuple):
    """What a power cut left: words to find it again by, the images, and whether the job was complete for clients."""

    label: str
    images: Images
    told: bool


@dataclass
class Disk:
    """One file: what is on the disk for certain, and what may be."""

    durable: bytes
    pending: list[Event] = field(default_factory=list)

    def see(self, event: Event) -> None:
        if event.kind == "flush":
            self.durable = self.whole()
            self.pending = []
        else:
            self.pending.append(event)

    def whole(self) -> bytes:
        """Everything arrived."""
        content = bytearray(self.durable)
        for event in self.pending:
            apply(content, event)
        return bytes(content)

    def some(self, random: Random) -> bytes:
        """Some of it arrived, in the order of writing."""
        content = bytearray(self.durable)
        odds = random.choice((0.1, 0.5, 0.5, 0.9))
        for event in self.pending:
            for part in torn(event, random) if random.random() < 0.4 else [event]:
                if random.random() < odds:
                    apply(content, part)
        return bytes(content)


def apply(content: bytearray, event: Event) -> None:
    """Change the content of a file as the event did."""
    offset, length = event.offset, event.length
    if event.kind == "truncate":
        del content[offset:]
        content.extend(bytes(offset - len(content)))
        return
    if event.kind == "punch":
        length = max(0, min(length, len(content) - offset))
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + length] = event.data or bytes(length)


def torn(event: Event, random: Random) -> list[Event]:
    """The event in pieces that arrive or not by themselves; they meet at the borders of sectors."""
    if event.kind == "truncate":
        return [event]
    borders = range(event.offset // SECTOR * SECTOR + SECTOR, event.offset + event.length, SECTOR)
    cuts = sorted(random.sample(borders, min(len(borders), random.choice((1, 1, 2, 8)))))
    parts = []
    for start, end in zip([event.offset, *cuts], [*cuts, event.offset + event.length], strict=True):
        data = event.data[start - event.offset : end - event.offset]
        parts.append(event._replace(offset=start, length=end - start, data=data))
    return parts


def states(before: Images, events: list[Event], seed: int, samples: int) -> Iterator[State]:
    """Different states: at every moment what was flushed, everything, and up to
    ``samples`` mixtures."""
    random = Random(seed)
    disks = {name: Disk(content) for name, content in before.items()}
    seen: set[bytes] = set()

    told = False

    def new(images: Images) -> bool:
        digest = blake2b(b"told" if told else b"", digest_size=16)
        for content in images.values():
            digest.update(content)
        known = len(seen)
        seen.add(digest.digest())
        return len(seen) > known

    for number, event in enumerate([*events, None]):
        at = f"seed {seed}, before event {number}"
        for label, images in _mixtures(disks, random, samples):
            if new(images):
                yield State(f"{at}, {label}", images, told)
        if event is not None and event.kind == "told":
            told = True
        elif event is not None:
            disks[event.name].see(event)


def _mixtures(disks: dict[str, Disk], random: Random, samples: int) -> Iterator[tuple[str, Images]]:
    yield "everything", {name: disk.whole() for name, disk in disks.items()}
    if any(disk.pending for disk in disks.values()):
        yield "what was flushed", {name: disk.durable for name, disk in disks.items()}
        for i in range(samples):
            yield f"mixture {i}", {name: disk.some(random) for name, disk in disks.items()}
