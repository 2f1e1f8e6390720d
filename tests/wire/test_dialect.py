"""One value at a time: what the dialect takes, what it refuses and in which words, and how values are spelled."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmpd.wire import dialect
from qmpd.wire.dialect import DialectError, dumps, parse, text_of
from tests.wire.strategies import is_allowed, texts, values


def refusal(text: bytes) -> str:
    with pytest.raises(DialectError) as caught:
        parse(text)
    return caught.value.desc


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b" [ ] ", []),
        (b"'it\\'s \"so\"'", 'it\'s "so"'),
        (b'"it\\\'s"', "it's"),
        (b"'\\\\\\''", "\\'"),
        (b"'\"\\\"'", '""'),
        (b'"a\xc0\x80b"', "a\0b"),
        (b'"\\\\\xc0\x80"', "\\\0"),
        (b'"\x7f"', "\x7f"),
        (b'"\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041"', '"\\/\b\f\n\r\tA'),
        (b'"\\uD83D\\ude00"', "😀"),
        ("'\U0010fffd'".encode(), "\U0010fffd"),
        (b"-0", 0),
        (b"-9223372036854775808", -(1 << 63)),
        (b"18446744073709551615", (1 << 64) - 1),
        (b"18446744073709551616", 18446744073709551616.0),
        (b"-9223372036854775809", -9223372036854775809.0),
        (b"1e999", math.inf),
        (b"0.0e1", 0.0),
        (b"{'a':{'a':':'},'b':':'}", {"a": {"a": ":"}, "b": ":"}),
        (b"{'':1}", {"": 1}),
    ],
)
def test_takes_what_the_peer_takes(text: bytes, value: object) -> None:
    """Both quotes, every escape, integers exact while 64 bits hold them."""
    result = parse(text)

    assert value == result
    assert type(value) is type(result)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"{,", "expecting value"),
        (b"[1,]", "expecting value"),
        (b'{"a"::1}', "expecting value"),
        (b"{]", "expecting value"),
        (b"{1:2}", "key is not a string in object"),
        (b"{[]:1}", "key is not a string in object"),
        (b"{[nil]:1}", "invalid keyword 'nil'"),
        (b"{[1 2]:1}", "expected separator in list"),
        (b"{a:1}", "invalid keyword 'a'"),
        (b'{"a"}', "missing : in object pair"),
        (b'{"a":1 "b":2}', "expected separator in dict"),
        (b"[1 2]", "expected separator in list"),
        (b"[0e1]", "expected separator in list"),
        (b'{"a":1,"a":2}', "duplicate key"),
        (b'{"a":1,"\\u0061":2}', "duplicate key"),
        (b'{"b":{"a" :1, "a"\n:2}}', "duplicate key"),
        (b'{"a":1,"a":nil}', "invalid keyword 'nil'"),
        (b'{"a":1,"a":2 3}', "duplicate key"),
        (b'"\\x"', "invalid escape sequence in string"),
        (b'"\\\xc0\x80"', "invalid escape sequence in string"),
        (b'"\\u12"', '\\u12" is not a valid Unicode character'),
        (b"'\\u12'", "\\u12' is not a valid Unicode character"),
        (b'"\\u"', '\\u" is not a valid Unicode character'),
        (b'"\\u 123"', "\\u 123 is not a valid Unicode character"),
        (b'"\\u\xc3\xa9\xc3\xa9"', "\\uéé is not a valid Unicode character"),
        (b'"\\u0\xc3\xa9\xc3\xa9"', "\\u0é\ufffd is not a valid Unicode character"),
        (b'"\\ufdd0"', "\\ufdd0 is not a valid Unicode character"),
        (b'"\\uD83D\\u0041"', "\\uD83D is not a valid Unicode character"),
        (b'"\\uD83D\\uDE"', "\\uD83D is not a valid Unicode character"),
        (b'"\\uD83F\\uDFFF"', "\\uD83F\\uDFFF is not a valid Unicode character"),
        (b'"\\q\x80"', "invalid escape sequence in string"),
        (b'"\x80\\q"', "invalid UTF-8 sequence in string"),
        (b'"\xc0\xaf"', "invalid UTF-8 sequence in string"),
        ("'\U0010ffff'".encode(), "invalid UTF-8 sequence in string"),
        (b"nil", "invalid keyword 'nil'"),
        (b"n" * 2000, "invalid keyword '" + "n" * 1006),
        (b"{", "premature EOI"),
        (b'{"a":', "premature EOI"),
        (b"", "premature EOI"),
        (b"[$", "stray '$'"),
        (b"[01]", "stray '01'"),
        (b"[-]", "stray '-]'"),
        (b"[1.5.5]", "stray '.'"),
        (b'["a\x00b"]', "stray '\"a'"),
        (b'"\\\n"', "stray '\"\\\n'"),
    ],
)
def test_refuses_in_the_words_of_the_peer(text: bytes, complaint: str) -> None:
    """The first mistake from left to right decides."""
    assert f"JSON parse error, {complaint}" == refusal(text)


@pytest.mark.parametrize("more", [b"{}", b" x", b"}", b'"', b"$"])
def test_takes_one_value_only(more: bytes) -> None:
    """Whatever follows a value, well-formed or not, draws the same complaint."""
    assert refusal(b"{}" + more) == "Expecting at most one JSON value"


def test_quotes_at_most_64_kib_of_an_unfinished_token() -> None:
    """A complaint does not send megabytes back."""
    assert len(refusal(b'"' + b"x" * (1 << 20) + b"\n")) < dialect.MAX_STRAY + 100


@given(st.characters())
def test_takes_every_code_point_but_surrogates_and_noncharacters(character: str) -> None:
    """Raw and as escapes alike."""
    escaped = json.dumps(character).encode()
    raw = json.dumps(character, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for spelling in (escaped, raw, b"'%b'" % raw[1:-1].replace(b"'", b"\\'")):
        if is_allowed(character):
            assert character == parse(spelling)
        else:
            assert "Unicode character" in refusal(spelling) or "UTF-8" in refusal(spelling)


@given(st.text(), st.integers(0, 3))
def test_agrees_with_utf8(text: str, cut: int) -> None:
    """Content is accepted if and only if it is UTF-8 of allowed code points."""
    content = text.encode("utf-8", "surrogatepass").replace(b"\0", b"")
    content = bytes(byte for byte in content[cut:] if byte >= 0x20 and byte not in b"\"\\'")
    try:
        expected = content.decode()
    except UnicodeDecodeError:
        expected = None
    if expected is not None and all(map(is_allowed, expected)):
        assert expected == parse(b'"%b"' % content)
    else:
        assert refusal(b'"%b"' % content) == "JSON parse error, invalid UTF-8 sequence in string"


@given(values())
@example({"a": [{}, [], {"b": -0.0}]})
@example([1e17, 1e-5, 0.1, math.inf, -math.inf])
def test_reads_back_what_it_writes(value: Any) -> None:
    """Both spellings mean the value itself."""
    assert value == parse(dumps(value))
    assert value == parse(dumps(value, pretty=True))


@given(values(), st.booleans())
def test_agrees_with_the_standard_library_on_strict_json(value: Any, ascii_only: bool) -> None:
    """Strict JSON means the same to both, on the fast path and off it."""
    strict = json.dumps(value, ensure_ascii=ascii_only).replace("Infinity", "1e999")
    expected = json.loads(strict)

    assert expected == parse(strict.encode())
    assert expected == dialect._build(dialect._tokens(strict.encode()))


@given(st.dictionaries(texts, st.integers(0, 9), min_size=1, max_size=3))
def test_never_loses_a_duplicate_key(members: dict[str, int]) -> None:
    """However the strings are filled with colons and quotes."""
    pairs = [*members.items(), *members.items()][: len(members) + 1]
    text = "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}"

    assert refusal(text.encode()) == "JSON parse error, duplicate key"
    assert members == parse(json.dumps(members).encode())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, b"0.10000000000000001"),
        (1.0, b"1"),
        (-0.0, b"-0"),
        (1e17, b"1e+17"),
        (1e-5, b"1.0000000000000001e-05"),
        (math.inf, b"1e999"),
        (-math.inf, b"-1e999"),
        (math.nan, b"null"),
        ([1.5], b"[1.5]"),
        ("1.5 and 1e5", b'"1.5 and 1e5"'),
        ("/'<>&", b'"/\'<>&"'),
        ('"\\\b\f\n\r\t', b'"\\"\\\\\\b\\f\\n\\r\\t"'),
        ("\x01\x1f\x7f\x80é€😀", b'"\\u0001\\u001F\\u007F\\u0080\\u00E9\\u20AC\\uD83D\\uDE00"'),
        ("\\u00e9", b'"\\\\u00e9"'),
        ("\ud800", b'"\\uFFFD"'),
        (b"a\xc0\xaf\xe9z".decode("utf-8", "surrogateescape"), b'"a\\uFFFD\\uFFFDz"'),
        ({"é": (1, 2), "b": True}, b'{"\\u00E9": [1, 2], "b": true}'),
    ],
)
def test_spells_as_the_peer_does(value: Any, text: bytes) -> None:
    """ASCII, upper-case escapes, 17 digits; what is no text or no number turns into something legal."""
    assert text == dumps(value)


def test_breaks_lines_in_empty_containers_too() -> None:
    """The pretty form has four blanks a level and CR LF."""
    expected = b'{\r\n    "a": [\r\n        1,\r\n        {\r\n        }\r\n    ],\r\n    "b": [\r\n    ]\r\n}'

    assert expected == dumps({"a": [1, {}], "b": []}, pretty=True)
    assert dumps({}, pretty=True) == b"{\r\n}"
    assert dumps("x", pretty=True) == b'"x"'


def test_nests_deeper_than_the_stack() -> None:
    """A value as deep as the dialect allows can be read and written."""
    text = b"[" * 1024 + b"1.5" + b"]" * 1024

    assert text == dumps(parse(text))
    assert text == dumps(dialect._build(dialect._tokens(text)))


def test_marks_each_bad_sequence_once() -> None:
    """A lead byte takes the continuation bytes it claims down with it."""
    bad = b"\xc0\xaf \xe9 \xf8\x88\x80\x80\x80 \x80 \xc1 \xed\xa0\x80 \xef\xbf\xbe \xf4\x90\x80\x80 \xe2\x82 \xff"

    assert text_of(bad) == " ".join("\ufffd" * 10)
    assert text_of(bad.replace(b" ", b"")) == "\ufffd" * 10
    assert text_of(b"a\xc0\x80\xc3\xa9") == "a\0é"
