"""QMP without I/O: bytes in, requests out; results in, bytes out.

No socket, no clock, no thread. ``grammar`` holds the rules of QEMU's JSON dialect, ``dialect`` turns one value into
Python and back, ``stream`` cuts a byte stream into values, ``messages`` spells what is sent, and ``session`` is one
client's state; imports run in that order. Any thread may use an object of this room, one thread at a time.
"""
