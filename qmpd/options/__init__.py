"""The command line of qemu-storage-daemon, into plain values; nothing is opened, bound or started here.

``argv`` splits the command line (:func:`scan`), ``keyval`` reads key=value text, ``chardev`` the older notation of
character devices, and ``interpret`` gives each option its meaning, one at a time: the peer carries out an option before
it looks into the next, so the first mistake that a user is told about is the leftmost.

Mistakes are :class:`qmpd.errors.QmpdError`; a second line of the text is a hint. :func:`complaint` spells them.
Source: spec/qmp-protocol.md sections 14 and 15.
"""

from qmpd.options.argv import CommandLine, Option, complaint, scan
from qmpd.options.chardev import Chardev, FdAddress, InetAddress, NullChardev, SocketChardev, StdioChardev, UnixAddress
from qmpd.options.interpret import Arguments, Monitor, MonitorMode, Show, Trace, interpret
from qmpd.options.keyval import parse_keyval

__all__ = [
    "Arguments",
    "Chardev",
    "CommandLine",
    "FdAddress",
    "InetAddress",
    "Monitor",
    "MonitorMode",
    "NullChardev",
    "Option",
    "Show",
    "SocketChardev",
    "StdioChardev",
    "Trace",
    "UnixAddress",
    "complaint",
    "interpret",
    "parse_keyval",
    "scan",
]
