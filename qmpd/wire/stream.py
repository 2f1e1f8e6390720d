"""Cuts a byte stream into values, wherever the pieces break and whatever rubbish lies between.

A value ends with the token that brings its braces and brackets back to zero, never at a line end. A byte that fits no
token is reported, the value it broke is dropped, and tokenising starts again at the next bracket, comma, colon or line
end. Source: spec/qmp-protocol.md sections 1, 4 and 5.

Beyond a limit the peer drops what it has and takes the rest for new values, which can mean a thousand complaints about
one mistake. Here the rest of such a value is thrown away quietly: up to the bracket that closes it, or to a line that
starts with an opening brace, as the next command of a client does that never closes what it opened.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

from qmpd.wire import grammar
from qmpd.wire.dialect import DialectError, hides_duplicates, parse
from qmpd.wire.grammar import beginning, end_of

#: What punctuation adds to the open braces and to the open brackets.
_NESTING: Final = {
    ord("{"): (1, 0),
    ord("}"): (-1, 0),
    ord("["): (0, 1),
    ord("]"): (0, -1),
    ord(":"): (0, 0),
    ord(","): (0, 0),
}
_NEWLINE: Final = ord("\n")
_BRACE: Final = ord("{")

#: An unfinished token longer than this is not looked at again from its start before it ends, so that the cost stays
#: linear for a client that sends byte by byte.
_SHORT: Final = 64


class Framer:
    """Bytes in, values out. The cost is linear in the number of bytes, however they are cut.

    ``scanned`` counts the bytes looked at, each pass over them anew; tests hold it against the number of bytes fed.
    """

    def __init__(self) -> None:
        self.scanned = 0
        self._text = bytearray()  # the value under way, from _start on
        self._start = 0
        self._at = 0  # everything before has been dealt with
        self._token = 0  # where the unfinished token begins
        self._rest = grammar.NOTHING  # how the unfinished token goes on
        self._items: list[Any] = []
        self._restart(0)
        self._step = self._between  # does what is next; False if that needs more data

    def feed(self, data: bytes) -> list[Any]:
        """What ``data`` completes, in order: values, and a DialectError in the place of each broken one.

        Raises nothing. An incomplete value waits for ever.
        """
        self._text += data
        self._items = []
        while self._step():
            pass
        if self._start:
            del self._text[: self._start]
            self._at -= self._start
            self._token -= self._start
            self._start = 0
        return self._items

    def finish(self) -> list[Any]:
        """What the end of the input makes of an incomplete value: one item, or none if nothing is under way."""
        text = bytes(self._text)
        if self._token < len(text) and not grammar.TOKEN.match(text, self._token):
            return [DialectError.stray(text[self._token :])]
        return [_parsed(text)] if text else []

    # ------------------------------------------------------------------------------------------------- between values

    def _restart(self, at: int) -> None:
        """Forget the current value; the next one begins at ``at`` or later."""
        self._start = self._at = self._token = at
        self._tokens = self._size = self._braces = self._brackets = 0
        self._step = self._between

    def _between(self) -> bool:
        """Let small plain commands pass, each in a single match, which covers nothing behind the command."""
        text, at = self._text, self._at
        express = grammar.express()
        while match := express.match(text, at):
            plain = match[1]
            value = orjson.loads(plain)
            self._items.append(_parsed(plain) if hides_duplicates(plain, value) else value)
            self.scanned += match.end() - at
            at = match.end()
        self._start = self._at = self._token = at
        self._step = self._inside
        return True

    def _skip(self) -> bool:
        """After a lexical error: pass over everything up to a byte to start again from."""
        match = grammar.RESYNC.search(self._text, self._at)
        at = match.start() if match else len(self._text)
        self.scanned += at - self._at
        self._start = self._at = self._token = at
        if match:
            self._step = self._between
        return match is not None

    # --------------------------------------------------------------------------------------------------- in a value

    def _inside(self) -> bool:
        """Count tokens until the value is complete, broken or too big, or the data ends."""
        text, at, end = self._text, self._at, len(self._text)
        tokens, size, braces, brackets = self._tokens, self._size, self._braces, self._brackets
        complete = too_big = False
        while match := grammar.TOKEN.match(text, at):
            kind = match.lastindex or 0
            begin, stop = match.span(kind)
            if stop == end and kind > grammar.STRING:
                break  # a number or a word may go on
            if not tokens:
                self._start = begin
            at = stop
            tokens += 1
            size += stop - begin
            if kind == grammar.PUNCTUATION:
                brace, bracket = _NESTING[text[begin]]
                braces += brace
                brackets += bracket
            too_big = size > grammar.MAX_TOKEN_TEXT or tokens > grammar.MAX_TOKENS
            too_big = too_big or braces + brackets > grammar.MAX_NESTING
            complete = braces < 0 or brackets < 0 or not (braces or brackets)
            if too_big or complete:
                break
        self.scanned += at - self._at
        self._tokens, self._size, self._braces, self._brackets = tokens, size, braces, brackets
        self._at = at
        if too_big:
            return self._give_up(at)
        return self._deliver() if complete else self._unfinished()

    def _deliver(self) -> bool:
        self._items.append(_parsed(self._text[self._start : self._at]))
        self._restart(self._at)
        return True

    def _unfinished(self) -> bool:
        """No token here: the data ends, in a token or before it, or a byte does not fit."""
        text = self._text
        token = end_of(grammar.BLANK, text, self._at)
        self._token = token
        if token == len(text):
            self._at = token
            if not self._tokens:
                self._restart(token)
            return token - self._start > grammar.MAX_TEXT and self._give_up(token)
        sure, bad = beginning(text, token)
        self.scanned += bad - token
        if self._size + sure - token > grammar.MAX_TOKEN_TEXT:
            return self._give_up(sure, _rest(text[token]))
        if bad < len(text):
            return self._stray(bad)
        if not self._tokens:
            self._start = token
        self._at = token
        if sure - token > _SHORT:
            self._at = sure
            self._rest = _rest(text[token])
            self._step = self._long_token
        return False

    def _stray(self, bad: int) -> bool:
        self._items.append(DialectError.stray(bytes(self._text[self._token : bad + 1])))
        self._restart(bad + 1)
        self._step = self._skip
        return True

    def _long_token(self) -> bool:
        """In an unfinished token: look at what is new, and once it ends, at the whole."""
        text = self._text
        at = end_of(self._rest, text, self._at)
        self.scanned += at - self._at
        self._at = at
        if self._size + at - self._token > grammar.MAX_TOKEN_TEXT:
            return self._give_up(at, self._rest)
        if at == len(text) or text[at:] == b"\\":
            return False
        self._at = self._token
        self._step = self._inside
        return True

    # ----------------------------------------------------------------------------------------------- beyond a limit

    def _give_up(self, at: int, rest: re.Pattern[bytes] = grammar.NOTHING) -> bool:
        """The value is too big: complain once, then throw away what is left of it, from ``at`` on.

        ``rest`` tells how the token goes on that ``at`` is in.
        """
        if self._braces + self._brackets > grammar.MAX_NESTING:
            limit = "nesting depth"
        else:
            limit = "token count" if self._tokens > grammar.MAX_TOKENS else "token size"
        self._items.append(DialectError(f"JSON {limit} limit exceeded"))
        self._discard(at)
        self._rest = rest
        self._step = self._drain_token
        return True

    def _discard(self, at: int) -> None:
        self.scanned += at - self._at
        self._start = self._at = self._token = at

    def _drain_token(self) -> bool:
        text = self._text
        at = end_of(self._rest, text, self._at)
        self._discard(at)
        if at == len(text) or text[at:] == b"\\":
            return False
        if self._rest in _STRINGS:
            # behind the closing quote; at the control byte that broke the string; behind a broken escape
            self._discard(at + (text[at] in b"\"'\\"))
        self._step = self._drain
        return True

    def _drain(self) -> bool:
        """Follow the brackets of a value that is too big until it ends."""
        text = self._text
        while self._braces > 0 or self._brackets > 0:
            match = grammar.LANDMARK.match(text, self._at)
            if match is None:
                self._discard(len(text))
                return False
            at, mark = match.start(1), match[1][0]
            if mark in _NESTING:
                brace, bracket = _NESTING[mark]
                self._braces += brace
                self._brackets += bracket
            elif mark in grammar.STRING_REST:
                self._rest = grammar.STRING_REST[mark]
                self._discard(at + 1)
                self._step = self._drain_token
                return True
            elif mark == _NEWLINE and at + 1 == len(text):
                self._discard(at)
                return False
            elif mark != _NEWLINE or text[at + 1] == _BRACE:
                self._discard(at)
                break  # a new command, or a byte that always resets: tokenising goes on with it
            self._discard(at + 1)
        self._restart(self._at)
        return True


_STRINGS: Final = frozenset(grammar.STRING_REST.values())


def _rest(first: int) -> re.Pattern[bytes]:
    """What a token that began with ``first`` may go on with, once it is long."""
    default = grammar.LETTERS if ord("a") <= first <= ord("z") else grammar.DIGITS
    return grammar.STRING_REST.get(first, default)


def _parsed(text: bytes | bytearray) -> Any:
    try:
        return parse(text)
    except DialectError as error:
        return error.with_traceback(None)  # a value now; frames would only keep the text alive


def parse_only(text: bytes) -> Any:
    """The single value in ``text``, as the command line takes it. Raises DialectError.

    What follows the value is not looked at, but must be blank.
    """
    framer = Framer()
    items = framer.feed(text)
    items += framer.finish()
    if not items:
        raise DialectError.parse("premature EOI")
    if isinstance(items[0], DialectError):
        raise items[0]
    if len(items) > 1:
        raise DialectError("Expecting at most one JSON value")
    return items[0]
