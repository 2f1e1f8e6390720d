"""What becomes of an image when it is written to, found out on an image whose writes go nowhere. Worker thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.rehearsal import Shadow
from qmpd.units import ceil_div

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.driver import Qcow2


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an image's file consists of: clusters by use, but for ``length`` (bytes). Differences are as meaningful."""

    length: int
    file_clusters: int
    l1_clusters: int
    l2_tables: int
    refcount_blocks: int
    refcount_table_clusters: int
    #: Clusters taken and not given back since the image was opened.
    taken: int

    def since(self, before: Inventory) -> Inventory:
        """What has been added."""
        names = self.__dataclass_fields__
        return Inventory(*(getattr(self, name) - getattr(before, name) for name in names))

    @property
    def data_clusters(self) -> int:
        """Of a difference: clusters for the guest's data."""
        tables = self.l1_clusters + self.l2_tables + self.refcount_blocks + self.refcount_table_clusters
        return self.taken - tables


class Rehearsal:
    """An image like ``model``, to be written to without consequences. ``model`` must not change meanwhile."""

    def __init__(self, model: Qcow2, end: int | None = None) -> None:
        """``end``: the file's exact length in bytes, where it is known. Raises what making ``model`` writable would."""
        model.flush()
        file = model._image.file
        self.file = Shadow(file, file.length if end is None else end)
        external = model._image.geometry.external
        #: The data file, if there is one.
        self.data = Shadow(model._image.data, model._image.data.length) if external else None
        self._data_end = 0 if self.data is None else self.data.end
        children = {"file": self.file, "data-file": self.data, "backing": model._reader.backing}
        present = {name: child for name, child in children.items() if child is not None}
        self.driver = type(model).open(present, model._options, read_only=False)
        self._image: Image = self.driver._image
        # Evicted, a table would be read from the real file again.
        self._image.meta.l2.keeps_all = self._image.meta.refcount_blocks.keeps_all = True

    @property
    def data_growth(self) -> int:
        """Bytes that the data file has become longer."""
        return 0 if self.data is None else self.data.end - self._data_end

    def inventory(self) -> Inventory:
        """As of now."""
        image, size = self._image, self._image.geometry.cluster_size
        return Inventory(
            self.file.end,
            ceil_div(self.file.end, size),
            ceil_div(image.header.l1_size * 8, size),
            int(np.count_nonzero(image.meta.l1.entries)),
            int(np.count_nonzero(image.meta.refcount_table.entries)),
            image.header.refcount_table_clusters,
            image.alloc.balance,
        )
