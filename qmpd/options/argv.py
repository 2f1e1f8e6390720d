"""The words of the command line, as GNU getopt_long takes them. Source: spec/qmp-protocol.md section 14."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qmpd import QMP_LEVEL, __version__
from qmpd.errors import QmpdError

#: Long options -> whether they take an argument.
LONG: Final = {
    "allow-path": True,
    "blockdev": True,
    "checkpoint-seconds": True,
    "chardev": True,
    "daemonize": False,
    "export": True,
    "help": False,
    "image-dir": True,
    "jobs-at-start": True,
    "max-jobs": True,
    "monitor": True,
    "nbd-server": True,
    "object": True,
    "pidfile": True,
    "siblings": True,
    "state-dir": True,
    "trace": True,
    "trust-image-names": True,
    "version": False,
}

#: Options that the peer does not have; they do not stand in the way of its own, shortened.
_OWN: Final = frozenset(
    {"allow-path", "checkpoint-seconds", "image-dir", "jobs-at-start", "max-jobs"}
    | {"siblings", "state-dir", "trust-image-names"}
)

SHORT: Final = {"h": "help", "T": "trace", "V": "version"}

VERSION: Final = f"qmpd version {__version__} (QMP {'.'.join(map(str, QMP_LEVEL))})\n"

HELP: Final = """\
Usage: {program} [options]
Look after disk images of virtual machines, under the control of QMP clients.

  -h, --help             print this and exit
  -V, --version          print the version and exit
  -T, --trace PATTERN    accepted for compatibility; there are no trace events

Options that set things up, carried out from left to right:

  --blockdev [driver=]DRIVER[,node-name=NAME][,read-only=on|off][,OPTION...]
                         add a block node, as blockdev-add does
  --chardev socket,id=ID,path=PATH[,server=on|off][,wait=on|off]
  --chardev socket,id=ID,port=PORT[,host=HOST][,server=on|off][,wait=on|off]
  --chardev socket,id=ID,fd=NUMBER[,server=on|off][,wait=on|off]
  --chardev stdio,id=ID
  --chardev null,id=ID
                         add a character device; `--chardev help' lists them
  --export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off]
                         export a block node, as block-export-add does
  --monitor [chardev=]ID[,mode=control][,pretty=on|off]
                         talk QMP on a character device
  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N]
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,max-connections=N]
                         start the NBD server, as nbd-server-start does
  --object [qom-type=]TYPE,id=ID[,PROPERTY=VALUE...]
                         add an object; `--object help' lists the types and
                         `--object TYPE,help' the properties of one

Which files are opened:

  --allow-path DIRECTORY open and create images in and below this directory only,
                         wherever they are named; may be given several times
  --trust-image-names none|all
                         what a backing file name found inside an image may be:
                         none (default): a plain path of a regular file, raw or
                         qcow2 as the image says; all: whatever can be opened,
                         json: included, with its format guessed if not stated

What a commit may do to other images:

  --siblings refuse|warn|allow
                         what becomes of a commit that would change what other
                         images show: it does not begin (default), it begins
                         with a warning, or nobody looks
  --image-dir DIRECTORY  look for such images in and below this directory too;
                         may be given several times

How many jobs run:

  --max-jobs N           jobs that may wait (x-qmpd-queue) do so while N run

What outlives the daemon:

  --state-dir DIRECTORY  keep nodes, exports, jobs, results and events here, and
                         come back with them at the next start
  --jobs-at-start resume|wait
                         whether jobs that were not over go on by themselves
                         (default) or wait for job-resume
  --checkpoint-seconds N least time between two checkpoints of a job (default 5)

About the process:

  --daemonize            go into the background once all is set up
  --pidfile PATH         write the process id to PATH once all is set up

--blockdev, --export, --monitor, --nbd-server and --object take a JSON object
as well. Long options may be shortened as long as they stay unique.
"""


@dataclass(frozen=True, slots=True)
class Option:
    """One option to carry out, or an operand (``name`` is empty). ``typed`` is how it was written, for messages."""

    name: str
    value: str
    typed: str


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A whole command line. If ``show`` is set it is to be printed, and nothing else done."""

    options: tuple[Option, ...] = ()
    daemonize: bool = False
    pidfile: str | None = None
    #: Directories that images must be in; none for anywhere.
    allow_paths: tuple[str, ...] = ()
    trust_image_names: bool = False
    #: So many jobs run before one waits that may; 0 for any number.
    max_jobs: int = 0
    #: What becomes of a commit that would change other images.
    siblings: str = "refuse"
    #: Directories where such images may be, absolute.
    image_dirs: tuple[str, ...] = ()
    #: Where the state is; none for a daemon without.
    state_dir: str | None = None
    jobs_wait: bool = False
    checkpoint_seconds: float = 5.0
    show: str | None = None


def scan(words: Sequence[str], program: str = "qmpd") -> CommandLine:
    """Split the command line, without the program's own name in front. Raises QmpdError for what cannot be split.

    ``--help`` and ``--version`` count before any mistake behind them.
    """
    options = []
    found: dict[str, Any] = {}
    allowed: list[str] = []
    image_dirs: list[str] = []
    for option in _split(words):
        match option.name:
            case "help":
                return CommandLine(show=HELP.format(program=program))
            case "version":
                return CommandLine(show=VERSION)
            case "daemonize":
                found["daemonize"] = True
            case "pidfile":
                found["pidfile"] = option.value
            case "allow-path":
                allowed.append(option.value)
            case "trust-image-names":
                found["trust_image_names"] = _choice(option, "none", "all") == "all"
            case "siblings":
                found["siblings"] = _choice(option, "refuse", "warn", "allow")
            case "max-jobs":
                found["max_jobs"] = _count(option)
            case "image-dir":
                image_dirs.append(_directory(option))
            case "state-dir":
                found["state_dir"] = option.value
            case "jobs-at-start":
                found["jobs_wait"] = _choice(option, "resume", "wait") == "wait"
            case "checkpoint-seconds":
                found["checkpoint_seconds"] = _seconds(option)
            case _:
                options.append(option)
    return CommandLine(tuple(options), allow_paths=tuple(allowed), image_dirs=tuple(image_dirs), **found)


def _choice(option: Option, *words: str) -> str:
    if option.value not in words:
        expected = ", ".join(f"'{word}'" for word in words[:-1]) + f" or '{words[-1]}'"
        raise QmpdError(f"option '--{option.name}' expects {expected}, not '{option.value}'")
    return option.value


def _directory(option: Option) -> str:
    """Absolute: the daemon may change its working directory."""
    if not os.path.isdir(option.value):
        raise QmpdError(f"option '--{option.name}' expects a directory, not '{option.value}'")
    return os.path.abspath(option.value)


def _count(option: Option) -> int:
    if not (option.value.isascii() and option.value.isdigit()):
        raise QmpdError(f"option '--{option.name}' expects a number, not '{option.value}'")
    return int(option.value)


def _seconds(option: Option) -> float:
    try:
        seconds = float(option.value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise QmpdError(f"option '--{option.name}' expects a number of seconds, not '{option.value}'")
    return seconds


def complaint(program: str, text: str, option: Option | None = None) -> str:
    """What standard error is told about a mistake in ``option``, or in the command line; it ends with a newline."""
    return f"{program}: {option.typed}: {text}\n" if option else f"{program}: {text}\n"


def _split(words: Sequence[str]) -> Iterator[Option]:
    rest = iter(words)
    for word in rest:
        if word == "--":
            return  # what follows is ignored, as the peer does
        if word.startswith("--"):
            yield _long(word, rest)
        elif word.startswith("-") and word != "-":
            yield from _short(word, rest)
        else:
            yield Option("", word, word)


def _long(word: str, rest: Iterator[str]) -> Option:
    typed, equals, value = word[2:].partition("=")
    possible = [typed] if typed in LONG else [name for name in LONG if name.startswith(typed)]
    candidates = [name for name in possible if name not in _OWN] or possible
    if not candidates:
        raise QmpdError(f"unrecognized option '{word}'")
    if len(candidates) > 1:
        possibilities = " ".join(f"'--{name}'" for name in candidates)
        raise QmpdError(f"option '{word}' is ambiguous; possibilities: {possibilities}")
    (name,) = candidates
    if equals:
        if not LONG[name]:
            raise QmpdError(f"option '--{name}' doesn't allow an argument")
        return Option(name, value, word)
    if not LONG[name]:
        return Option(name, "", word)
    argument = next(rest, None)
    if argument is None:
        raise QmpdError(f"option '--{name}' requires an argument")
    return Option(name, argument, f"{word} {argument}")


def _short(word: str, rest: Iterator[str]) -> Iterator[Option]:
    """The options of a cluster such as ``-hV``; one that takes an argument takes the rest of the word or the next."""
    for index, letter in enumerate(word[1:], 2):
        if letter not in SHORT:
            raise QmpdError(f"invalid option -- '{letter}'")
        name = SHORT[letter]
        if not LONG[name]:
            yield Option(name, "", word)
        elif index < len(word):
            yield Option(name, word[index:], word)
            return
        else:
            argument = next(rest, None)
            if argument is None:
                raise QmpdError(f"option requires an argument -- '{letter}'")
            yield Option(name, argument, f"{word} {argument}")
