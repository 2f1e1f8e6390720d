"""The lexical rules of QEMU's JSON dialect, as byte patterns, and its limits.

Two stages, as in QEMU. A token is recognised by its outline alone (:data:`TOKEN`): inside a string any byte passes
that is no control byte, 0xFE or 0xFF. Whether the content of a string is acceptable is asked later (:data:`CONTENT`),
when the value it belongs to is complete. Source: spec/qmp-protocol.md sections 3 to 5.

The patterns are possessive or atomic wherever they repeat, so that none of them backtracks over what it has matched.
The body of a possessive repeat is an atomic group of its own, since CPython before 3.11.5 mismatches any other body
with a choice in it (its issue 106052). An atomic group around a plain repeat would be right too, but it keeps a record
for each repetition: more than 100 bytes for each escape of a string.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final

MAX_NESTING: Final = 1024
"""Open braces plus open brackets."""

MAX_TOKENS: Final = 1 << 21
"""Tokens of one value."""

MAX_TOKEN_TEXT: Final = (64 << 20) - 1
"""Sum of the token texts of one value, in bytes."""

MAX_TEXT: Final = 128 << 20
"""One value together with the blanks between its tokens, in bytes. (The peer forgets blanks, a framer keeps them.)"""

# The groups of TOKEN.
PUNCTUATION: Final = 1
STRING: Final = 2
INTEGER: Final = 3
FLOAT: Final = 4
WORD: Final = 5

_DOUBLE_QUOTED = rb'(?> [^"\\\x00-\x1f\xfe\xff]++ | \\[^\x00-\x1f\xfe\xff] )*+'
_SINGLE_QUOTED = rb"(?> [^'\\\x00-\x1f\xfe\xff]++ | \\[^\x00-\x1f\xfe\xff] )*+"

# No exponent follows a bare leading zero: 0e1 is the three tokens 0, e and 1.
_EXPONENT = rb"[eE][+-]?+[0-9]++"
_INTEGER = rb"-?+(?: 0(?![0-9.]) | [1-9][0-9]*+(?![.eE]) )"
_FLOAT = rb"-?+(?: (?:0|[1-9][0-9]*+)\.[0-9]++(?: EXPONENT | (?![eE]) ) | [1-9][0-9]*+ EXPONENT )".replace(
    b"EXPONENT", _EXPONENT
)

# Escapes and UTF-8 of code points that are neither surrogates nor noncharacters. U+0000 is C0 80 when written raw.
_ESCAPES = rb"""
    u(?! [dD][89a-fA-F] | [fF]{3}[eEfF] | [fF][dD][dDeE] )[0-9a-fA-F]{4}
  | u(?! ..[37bBfF][fF]\\u[dD][fF]{2}[eEfF] )[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}
  | ["\\/bfnrt]
"""
_UTF8 = rb"""
    [\xc2-\xdf][\x80-\xbf]
  | (?: \xe0[\xa0-\xbf] | [\xe1-\xec\xee][\x80-\xbf] | \xed[\x80-\x9f] | \xef[\x80-\xb6\xb8-\xbe] )[\x80-\xbf]
  | \xef\xb7[\x80-\x8f\xb0-\xbf] | \xef\xbf[\x80-\xbd]
  | (?! .[\x8f\x9f\xaf\xbf]\xbf[\xbe\xbf] )
    (?: \xf0[\x90-\xbf] | [\xf1-\xf3][\x80-\xbf] | \xf4[\x80-\x8f] )[\x80-\xbf][\x80-\xbf]
"""


def _compile(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.VERBOSE | re.DOTALL)


NOTHING: Final = _compile(rb"")
BLANK: Final = _compile(rb"[ \t\r\n]*+")

#: One complete token behind any blanks; the group tells its kind. A number or a word that reaches the end of the data
#: may still go on.
TOKEN: Final = _compile(
    rb"""[ \t\r\n]*+ (?: ([{}\[\]:,]) | ("%b"|'%b') | (%b) | (%b) | ([a-z]++) )"""
    % (_DOUBLE_QUOTED, _SINGLE_QUOTED, _INTEGER, _FLOAT)
)

#: By opening quote: a string up to its closing quote, to a byte that does not fit, or to a backslash at the end.
STRING_REST: Final = {ord('"'): _compile(_DOUBLE_QUOTED), ord("'"): _compile(_SINGLE_QUOTED)}

_EXPONENT_BEGIN = rb"(?> [eE][+-]?+[0-9]*+ )?+"

#: The longest beginning of a number where TOKEN finds none: the byte behind it does not fit.
NUMBER_BEGIN: Final = _compile(
    rb"-?+(?> 0(?> \.(?> [0-9]++ %b )?+ )?+ | [1-9][0-9]*+(?: \.(?> [0-9]++ %b )?+ | %b ) )?+"
    % (_EXPONENT_BEGIN, _EXPONENT_BEGIN, _EXPONENT_BEGIN)
)

DIGITS: Final = _compile(rb"[0-9]*+")
LETTERS: Final = _compile(rb"[a-z]*+")

#: Where tokenising starts again after a lexical error. The byte found is a token, a blank, or an error of its own.
RESYNC: Final = _compile(rb"[\[\]{}:,\x00-\x08\x0a-\x1f\xfe\xff]")

#: The next thing that counts in a value that is being thrown away (group 1): a bracket, the quote of a string that is
#: not complete, a line end, or a byte that always resets the tokeniser.
LANDMARK: Final = _compile(
    rb"""(?> [^\[\]{}"'\n\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff]++ | "%b" | '%b' )*+ (.)"""
    % (_DOUBLE_QUOTED, _SINGLE_QUOTED)
)

#: As much of a string's content as is acceptable.
CONTENT: Final = _compile(rb"""(?> [\x20-\x5b\x5d-\x7f]++ | \\(?:%b|') | %b | \xc0\x80 )*+""" % (_ESCAPES, _UTF8))

#: A \\u escape that is not acceptable, as a complaint quotes it: both halves of a pair, else six bytes.
BAD_ESCAPE: Final = _compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2} | \\u.{0,4}")

#: Bytes of any origin: a run of valid text (group 1), a modified U+0000 (group 2), or a sequence that is not valid,
#: which is a lead byte with the continuation bytes it may claim.
RUN: Final = _compile(
    rb"""((?> [\x00-\x7f]++ | %b )++) | (\xc0\x80)
    | [\xc0-\xdf][\x80-\xbf]? | [\xe0-\xef][\x80-\xbf]{0,2} | [\xf0-\xf7][\x80-\xbf]{0,3}
    | [\xf8-\xfb][\x80-\xbf]{0,4} | [\xfc\xfd][\x80-\xbf]{0,5} | [\x80-\xbf\xfe\xff]"""
    % _UTF8
)

#: Text all of whose tokens mean the same to a strict JSON parser. It says nothing about their order.
STRICT: Final = _compile(
    rb"""(?> [ \t\r\n{}\[\]:,]++ | "(?> [ !\x23-\[\]-\x7f]++ | \\(?:%b) | %b )*+"
    | %b(?![eE]) | %b | true | false | null )*+"""
    % (_ESCAPES, _UTF8, _INTEGER, _FLOAT)
)


def _express(depth: int) -> bytes:
    """The pattern of a container of plain strict JSON that nests at most ``depth`` more levels.

    Plain: strings are ASCII without escapes, integers have at most 18 digits, there are no floats.
    """
    string = rb'"[ !\x23-\[\]-\x7f]*+"'
    integer = rb"(?: 0 | -?[1-9][0-9]{0,17} )(?= [ \t\r\n,}\]] )"
    deeper = [_express(depth - 1)] if depth else []
    value = b"(?:" + b"|".join([string, integer, b"true|false|null", *deeper]) + b")"
    members = rb"(?> %b S : S %b S (?: , S (?!\}) | (?=\}) ) )*+" % (string, value)
    elements = rb"(?> %b S (?: , S (?!\]) | (?=\]) ) )*+" % value
    return rb"\{ S %b \} | \[ S %b \]" % (members, elements)


@cache
def express() -> re.Pattern[bytes]:
    """A whole small command in one step (group 1), which a strict parser may be trusted with.

    Compiling takes 11 ms: not before a client has something to say, so that the daemon is there sooner.
    """
    return _compile(rb"S (?=\{)(%b)".replace(b"%b", _express(3)).replace(b"S", rb"[ \t\r\n]*+"))


def end_of(pattern: re.Pattern[bytes], data: bytes | bytearray, at: int) -> int:
    """Where the match of ``pattern`` at ``at`` ends; ``at`` if there is none."""
    match = pattern.match(data, at)
    return match.end() if match else at


def beginning(data: bytes | bytearray, token: int) -> tuple[int, int]:
    """How far the unfinished token at ``token`` goes, and where the byte stands that does not fit it.

    Both are the end of the data if the token may go on, except that a backslash in last place is not yet part of a
    string. To be asked where TOKEN finds nothing, or a number or word that reaches the end of the data.
    """
    first = data[token]
    if rest := STRING_REST.get(first):
        sure = end_of(rest, data, token + 1)
        return sure, sure + (data[sure : sure + 1] == b"\\")
    if ord("a") <= first <= ord("z"):
        sure = end_of(LETTERS, data, token)
    else:
        sure = end_of(NUMBER_BEGIN, data, token)
    return sure, sure
