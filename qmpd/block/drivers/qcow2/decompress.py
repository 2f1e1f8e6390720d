"""Compressed clusters (spec/qcow2.md section 2). Both codecs release the interpreter lock while they work."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Final

import zstandard

from qmpd.errors import Kind, QmpdError
from qmpd.units import MIB

#: The history that a stream may ask to be kept, bytes: what decoders should support by RFC 8878, and more than the
#: largest cluster. Without a limit a few bytes can ask for 128 MiB.
_MAX_WINDOW: Final = 8 * MIB


def _inflate(data: bytes, size: int) -> bytes:
    # Images are written with a 4 KiB window, but any window is legal: only the widest reads them all.
    return zlib.decompressobj(-15).decompress(data, size)


def _unzstd(data: bytes, size: int) -> bytes:
    decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with decoder.stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
        out = bytearray()
        while len(out) < size:
            piece = reader.read(size - len(out))
            if not piece:
                break
            out += piece
        return bytes(out)


_CODECS: Final[dict[int, Callable[[bytes, int], bytes]]] = {0: _inflate, 1: _unzstd}


def decompress(kind: int, data: bytes, cluster_size: int, *, offset: int) -> bytes:
    """One cluster's content; ``kind`` is the header's compression type.

    ``data`` may have rubbish behind the stream. Raises CORRUPT (EIO) unless exactly ``cluster_size`` bytes come out;
    ``offset`` is the guest offset for the message.
    """
    try:
        out = _CODECS[kind](data, cluster_size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise QmpdError(
            f"Compressed cluster at guest offset {offset:#x} is damaged: {error}", Kind.CORRUPT, offset=offset
        ) from error
    if len(out) != cluster_size:
        raise QmpdError(
            f"Compressed cluster at guest offset {offset:#x} is damaged: {len(out)} of {cluster_size} bytes",
            Kind.CORRUPT,
            offset=offset,
        )
    return out
