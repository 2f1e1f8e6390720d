"""Image access: drivers, extent maps, the copy engine, file locks.

Synchronous and thread-safe: I/O methods run on any worker thread. Knows no graph, no event loop and no socket; may
import the ground floor (errors, units, steps), numpy and zstandard. Start reading at :mod:`qmpd.block.api`.
"""
