"""QEMU's JSON dialect: one value from bytes, and one value to bytes.

Input: orjson reads whatever is provably the same to it and to QEMU; everything else goes to a tolerant parser that is
the authority on the dialect and on the texts of complaints. Output: the C encoder of the standard library, with QEMU's
spelling restored where it differs. Source: spec/qmp-protocol.md sections 2 to 4.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from qmpd.wire import grammar

MAX_STRAY: Final = 64 << 10
"""Bytes of an unfinished token that its complaint quotes. The peer sends back all of it, many megabytes if need be."""

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
        return cls(f"JSON parse error, stray '{text_of(token[:MAX_STRAY].partition(bytes(1))[0])}'")


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
    tokens = _tokens(data)
    value = _build(tokens)
    with suppress(DialectError):  # what exactly follows does not matter
        if next(tokens, None) is None:
            return value
    raise DialectError("Expecting at most one JSON value")


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


def _tokens(data: bytes | bytearray) -> Iterator[tuple[int, bytes]]:
    """The kinds and texts of the tokens. Raises DialectError at the first byte that fits none."""
    at = 0
    while match := grammar.TOKEN.match(data, at):
        kind = match.lastindex or 0
        yield kind, bytes(match[kind])
        at = match.end()
    at = grammar.end_of(grammar.BLANK, data, at)
    if at < len(data):
        _, bad = grammar.beginning(data, at)
        raise DialectError.stray(bytes(data[at : bad + 1]))


@dataclass(eq=False, slots=True)
class _State:
    """What comes next in a value under construction.

    A token that is neither in ``moves`` nor ``end`` (of the container) must be a value, or draws the complaint if there
    is one; ``then`` is the state behind a value.
    """

    complaint: str = ""
    moves: dict[bytes, _State] = field(default_factory=dict)
    end: bytes = b""
    then: _State | None = None


_COMMA_OR_BRACE: Final = _State("expected separator in dict", end=b"}")
_MEMBER: Final = _State(then=_COMMA_OR_BRACE)
_COLON: Final = _State("missing : in object pair", {b":": _MEMBER})
_KEY: Final = _State(then=_COLON)
_KEY_OR_BRACE: Final = _State(end=b"}", then=_COLON)
_COMMA_OR_BRACE.moves[b","] = _KEY

_COMMA_OR_BRACKET: Final = _State("expected separator in list", end=b"]")
_ELEMENT: Final = _State(then=_COMMA_OR_BRACKET)
_ELEMENT_OR_BRACKET: Final = _State(end=b"]", then=_COMMA_OR_BRACKET)
_COMMA_OR_BRACKET.moves[b","] = _ELEMENT

_TOP: Final = _State()


def _build(tokens: Iterator[tuple[int, bytes]]) -> Any:
    """Put tokens together, without recursion: the dialect nests deeper than Python's stack."""
    outer: list[tuple[Any, _State, str]] = []
    container: Any = None
    state, key = _TOP, ""
    for kind, text in tokens:
        if kind == grammar.PUNCTUATION:
            if move := state.moves.get(text):
                state = move
                continue
            if text == state.end:
                value = container
                container, state, key = outer.pop()
            elif text in b"{[" and not state.complaint:
                outer.append((container, state, key))
                container, state = ({}, _KEY_OR_BRACE) if text == b"{" else ([], _ELEMENT_OR_BRACKET)
                continue
            else:
                raise DialectError.parse(state.complaint or "expecting value")
        elif state.complaint:
            raise DialectError.parse(state.complaint)
        else:
            value = _SCALARS[kind](text)
        if state.then is None:
            return value
        if state.then is _COMMA_OR_BRACKET:
            container.append(value)
        elif state.then is _COLON:
            key = _checked_key(value)
        elif key in container:
            raise DialectError.parse("duplicate key")
        else:
            container[key] = value
        state = state.then
    raise DialectError.parse("premature EOI")


def _checked_key(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise DialectError.parse("key is not a string in object")


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


_WORDS: Final = {b"true": True, b"false": False, b"null": None}

_SCALARS: Final[dict[int, Callable[[bytes], Any]]] = {
    grammar.STRING: _string,
    grammar.INTEGER: _integer,
    grammar.FLOAT: float,
    grammar.WORD: _word,
}


def text_of(data: bytes) -> str:
    """Text from bytes of any origin: U+FFFD for each sequence that is not valid in the dialect."""
    parts = []
    for run in grammar.RUN.finditer(data):
        valid, null = run.groups()
        parts.append(valid.decode() if valid else "\0" if null else "\ufffd")
    return "".join(parts)


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
