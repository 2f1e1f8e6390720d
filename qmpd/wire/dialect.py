"""QEMU's JSON dialect: one value from bytes, and one value to bytes.

Input: orjson reads whatever is provably the same to it and to QEMU; everything else goes to a tolerant parser that is
the authority on the dialect and on the texts of complaints. Output: the C encoder of the standard library, with QEMU's
spelling restored where it differs. Source: spec/qmp-protocol.md sections 2 to 4.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum, auto
from typing import Any, Final, NamedTuple

import orjson

from qmpd.wire import grammar

INT64_MIN: Final = -(1 << 63)
UINT64_MAX: Final = (1 << 64) - 1


class DialectError(ValueError):
    """Text that is not a value. ``desc`` is the complete text for the client; the class is always GenericError."""

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc

    @classmethod
    def parse(cls, complaint: str) -> DialectError:
        """A parse error, with QEMU's prefix and within the 1023 bytes it keeps of a complaint."""
        return cls("JSON parse error, " + complaint.encode()[:1023].decode(errors="replace"))

    @classmethod
    def stray(cls, token: bytes) -> DialectError:
        """A lexical error; ``token`` is unfinished and ends with the byte that does not fit."""
        return cls(f"JSON parse error, stray '{text_of(token.partition(b'%c' % 0)[0])}'")


# ---------------------------------------------------------------------------------------------------------------- input


def parse(data: bytes | bytearray) -> Any:
    """The one value that ``data`` holds: dict, list, str, int, float, bool or None.

    Raises DialectError: for a broken value the first mistake from left to right, ``premature EOI`` for one that ends
    early, ``Expecting at most one JSON value`` if more follows.
    """
    if grammar.STRICT.fullmatch(data):
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            pass  # the tolerant parser knows the words for it
        else:
            if not hides_duplicates(data, value):
                return value
    return _Builder(_tokens(data)).build()


def hides_duplicates(data: bytes | bytearray, value: Any) -> bool:
    """Whether ``data`` may have had more members than the ``value`` made of it.

    Every member brings a colon, so as many keys as colons prove that none was lost. Colons inside strings make the
    first count too high; the second takes only those that stand behind a quote.
    """
    keys = _count_keys(value)
    return keys != data.count(b":") and keys != len(_KEY_END.findall(data))


_KEY_END = re.compile(rb'"[ \t\r\n]*+:')


def _count_keys(value: Any) -> int:
    keys = 0
    pending = [value]
    for item in pending:
        if type(item) is dict:
            keys += len(item)
            pending += [child for child in item.values() if type(child) is dict or type(child) is list]
        elif type(item) is list:
            pending += [child for child in item if type(child) is dict or type(child) is list]
    return keys


class _Token(NamedTuple):
    kind: int
    text: bytes


def _tokens(data: bytes | bytearray) -> Iterator[_Token]:
    at = 0
    while match := grammar.TOKEN.match(data, at):
        kind = match.lastindex or 0
        yield _Token(kind, bytes(match[kind]))
        at = match.end()
    at = grammar.end_of(grammar.BLANK, data, at)
    if at < len(data):
        _, bad = grammar.beginning(data, at)
        raise DialectError.stray(bytes(data[at : bad + 1]))


class _State(Enum):
    """What a value under construction waits for."""

    TOP = auto()
    MEMBER_OR_END = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA_OR_BRACE = auto()
    ELEMENT_OR_END = auto()
    ELEMENT = auto()
    COMMA_OR_BRACKET = auto()


_MOVES: Final = {
    (_State.COLON, b":"): _State.VALUE,
    (_State.COMMA_OR_BRACE, b","): _State.KEY,
    (_State.COMMA_OR_BRACKET, b","): _State.ELEMENT,
}

_ENDS: Final = {
    (_State.MEMBER_OR_END, b"}"),
    (_State.COMMA_OR_BRACE, b"}"),
    (_State.ELEMENT_OR_END, b"]"),
    (_State.COMMA_OR_BRACKET, b"]"),
}

#: What a token is told that fits no move. The states not listed take any value.
_COMPLAINTS: Final = {
    _State.COLON: "missing : in object pair",
    _State.COMMA_OR_BRACE: "expected separator in dict",
    _State.COMMA_OR_BRACKET: "expected separator in list",
}


class _Builder:
    """Puts tokens together, without recursion: the dialect nests deeper than Python's stack."""

    def __init__(self, tokens: Iterator[_Token]) -> None:
        self._tokens = tokens
        self._outer: list[tuple[Any, _State, str]] = []
        self._container: Any = None
        self._state = _State.TOP
        self._key = ""

    def build(self) -> Any:
        for kind, text in self._tokens:
            state = self._state
            if kind == grammar.PUNCTUATION and (move := _MOVES.get((state, text))):
                self._state = move
                continue
            if kind == grammar.PUNCTUATION and (state, text) in _ENDS:
                value = self._container
                self._container, self._state, self._key = self._outer.pop()
            elif state in _COMPLAINTS:
                raise DialectError.parse(_COMPLAINTS[state])
            elif text == b"{":
                self._open({}, _State.MEMBER_OR_END)
                continue
            elif text == b"[":
                self._open([], _State.ELEMENT_OR_END)
                continue
            else:
                value = _SCALARS[kind](text)
            if self._state is _State.TOP:
                return self._alone(value)
            self._take(value)
        raise DialectError.parse("premature EOI")

    def _open(self, container: Any, state: _State) -> None:
        self._outer.append((self._container, self._state, self._key))
        self._container, self._state = container, state

    def _take(self, value: Any) -> None:
        """A value is complete: it is a key, a member or an element of what is open."""
        match self._state:
            case _State.VALUE:
                if self._key in self._container:
                    raise DialectError.parse("duplicate key")
                self._container[self._key] = value
                self._state = _State.COMMA_OR_BRACE
            case _State.MEMBER_OR_END | _State.KEY:
                if not isinstance(value, str):
                    raise DialectError.parse("key is not a string in object")
                self._key = value
                self._state = _State.COLON
            case _:
                self._container.append(value)
                self._state = _State.COMMA_OR_BRACKET

    def _alone(self, value: Any) -> Any:
        with suppress(DialectError):  # what exactly follows does not matter
            if next(self._tokens, None) is None:
                return value
        raise DialectError("Expecting at most one JSON value")


def _string(token: bytes) -> str:
    content = token[1:-1]
    good = grammar.end_of(grammar.CONTENT, content, 0)
    if good < len(content):
        raise _string_error(token, 1 + good)
    if b"\xc0" in content:
        content = content.replace(b"\xc0\x80", rb"\u0000")
    if b"\\" not in content:
        return content.decode()
    return orjson.loads(b'"%b"' % _to_double_quotes(content))  # type: ignore[no-any-return]


def _to_double_quotes(content: bytes) -> bytes:
    """Spell acceptable content as strict JSON does. 0xFF, which no string contains, stands for an escaped backslash."""
    content = content.replace(rb"\\", b"\xff").replace(rb"\'", b"'")
    return content.replace(rb"\"", b'"').replace(b'"', rb"\"").replace(b"\xff", rb"\\")


def _string_error(token: bytes, at: int) -> DialectError:
    """The complaint about the first thing in a string that is not acceptable, at offset ``at``."""
    if token[at : at + 1] != b"\\":
        return DialectError.parse("invalid UTF-8 sequence in string")
    if token[at + 1 : at + 2] != b"u":
        return DialectError.parse("invalid escape sequence in string")
    quoted = token[at : grammar.end_of(grammar.BAD_ESCAPE, token, at)]
    return DialectError.parse(f"{text_of(quoted)} is not a valid Unicode character")


def _integer(token: bytes) -> int | float:
    """Exact within int64 and uint64, a double beyond."""
    if len(token) <= 20 and INT64_MIN <= (number := int(token)) <= UINT64_MAX:
        return number
    return float(token)


def _word(token: bytes) -> bool | None:
    try:
        return _WORDS[token]
    except KeyError:
        raise DialectError.parse(f"invalid keyword '{token.decode()}'") from None


def _punctuation(_token: bytes) -> Any:
    raise DialectError.parse("expecting value")


_WORDS: Final = {b"true": True, b"false": False, b"null": None}

_SCALARS: Final = {
    grammar.PUNCTUATION: _punctuation,
    grammar.STRING: _string,
    grammar.INTEGER: _integer,
    grammar.FLOAT: float,
    grammar.WORD: _word,
}


def text_of(data: bytes) -> str:
    """Text from bytes of any origin: U+FFFD for each sequence that is not valid in the dialect."""
    if data.isascii():
        return data.decode()
    parts, at = [], 0
    for match in grammar.SEQUENCE.finditer(data):
        parts += [data[at : match.start()].decode(), _sequence(match[0])]
        at = match.end()
    return "".join([*parts, data[at:].decode()])


def _sequence(data: bytes) -> str:
    if data == b"\xc0\x80":
        return "\0"
    return data.decode() if grammar.CONTENT.fullmatch(data) else "\ufffd"


# --------------------------------------------------------------------------------------------------------------- output


def dumps(value: Any, pretty: bool = False) -> bytes:
    """``value`` in QEMU's spelling, without a line end: ASCII, upper-case escapes, floats like ``%.17g``.

    ``pretty`` indents by 4 spaces and breaks lines with CR LF. Takes what :func:`parse` gives, and text with
    surrogate escapes (file names), which prints as U+FFFD. An infinity prints as a number too large for a double,
    not-a-number as null, since JSON has neither.
    """
    if not pretty:
        try:
            text = _encode(value)
        except RecursionError:
            pass  # nested deeper than the C encoder likes
        else:
            if not _FLOAT_SUSPECT.search(text):
                return _respell(text).encode("ascii")
    return _respell("".join(_pieces(value, pretty))).encode("ascii")


_encode = json.JSONEncoder(separators=(", ", ": "), check_circular=False).encode

#: A float looks like this, as does now and then a part of a string; a false alarm costs time only.
_FLOAT_SUSPECT: Final = re.compile(r"(?:^|[ \[])-?(?:[0-9]+(?:\.|e)|Infinity|NaN)")

_SURROGATES: Final = re.compile(
    r"(?P<pair>\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2})|(?P<bytes>(?:\\udc[89a-f][0-9a-f])+)"
    r"|(?P<lone>\\ud[89a-f][0-9a-f]{2})|(?P<plain>\\u[0-9a-f]{4})|\\."
)


def _respell(text: str) -> str:
    """Upper-case hex in escapes; U+FFFD for what is not text."""
    return _SURROGATES.sub(_respell_escape, text) if "\\u" in text else text


def _respell_escape(match: re.Match[str]) -> str:
    escape = match[0]
    match match.lastgroup:
        case "pair":
            return rf"\u{escape[2:6].upper()}\u{escape[8:].upper()}"
        case "plain":
            return rf"\u{escape[2:].upper()}"
        case "lone":
            return r"\uFFFD"
        case "bytes":
            raw = bytes(int(escape[i + 4 : i + 6], 16) for i in range(0, len(escape), 6))
            return _respell(_encode(text_of(raw))[1:-1])
        case _:
            return escape


def _float(number: float) -> str:
    if math.isfinite(number):
        return f"{number:.17g}"
    return "null" if math.isnan(number) else f"{math.copysign(1, number):.0f}e999"


def _pieces(value: Any, pretty: bool) -> Iterator[str]:
    """The text of ``value`` bit by bit, without recursion."""

    def line() -> str:
        return "\r\n" + "    " * (len(stack) - 1) if pretty else ""

    comma = "," if pretty else ", "
    lead = ""
    stack: list[tuple[Iterator[tuple[str, Any]], str]] = [(iter([("", value)]), "")]
    while stack:
        items, closing = stack[-1]
        for label, item in items:
            yield lead + label
            if isinstance(item, dict):
                stack.append((_members(item), "}"))
                yield "{"
            elif isinstance(item, list | tuple):
                stack.append((_elements(item), "]"))
                yield "["
            else:
                yield _float(item) if isinstance(item, float) else _encode(item)
                lead = comma + line()
                continue
            lead = line()
            break
        else:
            stack.pop()
            if stack:
                yield line() + closing
                lead = comma + line()


def _members(item: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{_encode(key)}: ", child) for key, child in item.items())


def _elements(item: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    return (("", child) for child in item)
