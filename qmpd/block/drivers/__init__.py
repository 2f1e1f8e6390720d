"""The drivers a node can be made of, by QEMU's name.

A driver's module is imported when it is first asked for, so that knowing the names costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from qmpd.block.api import Driver


class DriverTable(Mapping[str, type[Driver]]):
    """Name -> class, importing on first use. Any thread."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._loaded: dict[str, type[Driver]] = {}

    def __getitem__(self, name: str) -> type[Driver]:
        if name not in self._loaded:
            module, _, cls = self._places[name].partition(":")
            self._loaded[name] = getattr(import_module(module), cls)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


DRIVERS = DriverTable(
    {
        "blkdebug": "qmpd.block.filters.blkdebug:Blkdebug",
        "copy-on-read": "qmpd.block.filters.copy_on_read:CopyOnRead",
        "file": "qmpd.block.storage.file:FileStorage",
        "host_device": "qmpd.block.storage.file:HostDevice",
        "null-aio": "qmpd.block.storage.null:NullAio",
        "null-co": "qmpd.block.storage.null:NullStorage",
        "preallocate": "qmpd.block.filters.preallocate:Preallocate",
        "qcow2": "qmpd.block.drivers.qcow2:Qcow2",
        "raw": "qmpd.block.drivers.raw:Raw",
        "throttle": "qmpd.block.filters.throttle:Throttle",
    }
)
