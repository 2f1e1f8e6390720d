"""Streams of bytes: where values end, what rubbish costs, what is too much, and that the cuts do not matter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.wire import grammar
from qmpd.wire.dialect import DialectError
from qmpd.wire.stream import Framer, parse_only
from tests.wire.feeding import bytewise, chunks, every_split, frame
from tests.wire.strategies import any_bytes, dialect_bytes, values


def parse_error(complaint: str) -> tuple[str, str]:
    return "error", f"JSON parse error, {complaint}"


VALUE = parse_error("expecting value")
DEPTH = ("error", "JSON nesting depth limit exceeded")
COUNT = ("error", "JSON token count limit exceeded")
SIZE = ("error", "JSON token size limit exceeded")


@pytest.mark.parametrize(
    ("data", "items"),
    [
        (b"", []),
        (b" \r\n\t", []),
        (b'{"a":1}{"a":2} {"a":3}\r\n', [{"a": 1}, {"a": 2}, {"a": 3}]),
        (b'{"a":1},{"a":2}', [{"a": 1}, VALUE, {"a": 2}]),
        (b'{"a"', []),
        (b'{"a"\n:\n1\n}', [{"a": 1}]),
        (b"42", []),
        (b"42 ", [42]),
        (b"null{}", [None, {}]),
        (b'"x"', ["x"]),
        (b'1"x"null"y"', [1, "x", None, "y"]),
        (b"1.5 -2e3 0.5e1\n", [1.5, -2000.0, 5.0]),
        (b'{"a":{"b":{"c":{"d":{"e":{}}}}}}', [{"a": {"b": {"c": {"d": {"e": {}}}}}}]),
        (b"{]{}", [VALUE, {}]),
        (b"[}{}", [VALUE, {}]),
        (b'{"a":[}]}{}', [VALUE, VALUE, {}]),
        (b"}]:,", [VALUE] * 4),
        (b'{"a":1,"a":2}{}', [parse_error("duplicate key"), {}]),
        (b'{"a":$ x "y" 12 true\n{}', [parse_error("stray '$'"), {}]),
        (b'{"a":$}{}', [parse_error("stray '$'"), VALUE, {}]),
        (b"$\t\v\n{}", [parse_error("stray '$'"), parse_error("stray '\v'"), {}]),
        (b"\xff\xff{}", [parse_error("stray '\ufffd'")] * 2 + [{}]),
        (b'{"a\xff{}', [parse_error("stray '\"a\ufffd'"), {}]),
        (b'"a\nb"{}', [parse_error("stray '\"a\n'"), {}]),
        (b"\0[]", [parse_error("stray ''"), []]),
        (b"[-}\n{}", [parse_error("stray '-}'"), {}]),
        (b"[1e+]{}", [parse_error("stray '1e+]'"), {}]),
        (b"[0e1]", [parse_error("expected separator in list")]),
        (b"1_000 {}", [1, parse_error("stray '_'"), {}]),
    ],
)
def test_cuts_by_value(data: bytes, items: list[object]) -> None:
    """Whole, byte by byte and cut anywhere, a stream means the same."""
    assert items == frame([data])
    assert items == frame(bytewise(data))
    for pieces in every_split(data):
        assert items == frame(pieces)


@given(any_bytes | st.lists(dialect_bytes, max_size=4).map(b"\n".join), st.data())
def test_does_not_care_about_cuts(data: bytes, draw: st.DataObject) -> None:
    """Nothing raises, and byte by byte, in odd pieces and whole give the same items."""
    whole = frame([data])

    assert whole == frame(bytewise(data))
    assert whole == frame(chunks(data, draw.draw(st.integers(2, 9))))


@given(any_bytes)
def test_knows_a_value_again_after_any_rubbish(data: bytes) -> None:
    """0xFF and a line end put the framer right, whatever came before."""
    assert frame([data + b'\xff\n{"id": 7}'])[-1] == {"id": 7}


@given(st.lists(values().filter(lambda value: not isinstance(value, int | float)), max_size=4), st.booleans())
def test_agrees_with_the_standard_library(expected: list[Any], ascii_only: bool) -> None:
    """Strict JSON comes out as it went in, separated or not."""
    spelled = [json.dumps(value, ensure_ascii=ascii_only).replace("Infinity", "1e999") for value in expected]

    assert expected == frame(["\n".join([*spelled, ""]).encode()])


@pytest.mark.parametrize("pieces", [lambda data: [data], bytewise])
class TestLimits:
    """Beyond a limit there is one complaint, and the connection is good for the next command."""

    @pytest.mark.parametrize("opening", [b"[", b'{"a":', b"{'\\'':"])
    def test_nesting(self, pieces: Any, opening: bytes) -> None:
        """1024 levels pass and 1025 do not; a value that never closes ends where a line starts with a brace."""
        closing = b"]" if opening == b"[" else b"}"
        deep, deeper = (opening * levels + b"1" + closing * levels for levels in (1024, 1025))
        (value,) = frame(pieces(deep))

        assert not isinstance(value, tuple)
        assert frame(pieces(deeper + b"{}")) == [DEPTH, {}]
        assert frame(pieces(opening * 1025 + b'"x\n [ {} \n {"no":1}\n{"a":1}')) == [DEPTH, {"a": 1}]
        assert frame(pieces(opening * 2000 + b"1" + closing * 2000 + b"{}")) == [DEPTH, {}]

    def test_what_is_thrown_away_can_be_broken(self, pieces: Any) -> None:
        """Rubbish inside draws no second complaint, except for a byte that always resets the tokeniser."""
        rest = b'\'\\\'}\' $ 01 nil "\\"]\\\\" {} "x\ny' + b"]" * 1025

        assert frame(pieces(b"[" * 1025 + rest + b"{}")) == [DEPTH, {}]
        assert frame(pieces(b"[" * 1025 + b"1, \xff{}")) == [DEPTH, parse_error("stray '\ufffd'"), {}]
        assert frame(pieces(b"[" * 1025 + b'"a\xff{}')) == [DEPTH, parse_error("stray '\ufffd'"), {}]

    def test_tokens(self, pieces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A value may have that many tokens, and not one more."""
        monkeypatch.setattr(grammar, "MAX_TOKENS", 7)

        assert frame(pieces(b"[1,2,'3'][4,5,6]")) == [[1, 2, "3"], [4, 5, 6]]
        assert frame(pieces(b"[1,2,3,'4,5',6][]")) == [COUNT, []]

    def test_text(self, pieces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tokens may be that long together; blanks do not count."""
        monkeypatch.setattr(grammar, "MAX_TOKEN_TEXT", 200)
        fits = b'["%b",   \n "%b"]' % (b"a" * 150, b"b" * 43)

        assert frame(pieces(fits)) == [["a" * 150, "b" * 43]]
        assert frame(pieces(fits.replace(b"a]", b"a]]").replace(b"b", b"bb", 1) + b"{}")) == [SIZE, {}]
        assert frame(pieces(b"'%b\\\\\\''{}" % (b"x" * 300))) == [SIZE, {}]
        assert frame(pieces(b"'%b\\'}" % (b"x" * 198) + b"'{}")) == [SIZE, {}]
        assert frame(pieces(b"{'a':'%b\n{}" % (b"x" * 300))) == [SIZE, {}]
        assert frame(pieces(b"[%b,1.5e1]{}" % (b"1" * 300))) == [SIZE, {}]
        assert frame(pieces(b"[%b]{}" % (b"n" * 300))) == [SIZE, {}]

    def test_blanks(self, pieces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blanks inside a value are kept and so cannot go on for ever; those between values can."""
        monkeypatch.setattr(grammar, "MAX_TEXT", 100)

        assert frame([*pieces(b" " * 300 + b"[" + b" " * 200), b"1]{}"]) == [SIZE, {}]


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":"' + b"x" * 100_000 + b'"}',
        b"['" + b"\\\\\\'" * 25_000 + b"']",
        b"[" + b"1" * 100_000 + b".5e7]",
        b"[" + b"a" * 100_000 + b"]",
        b"[" + b"'a'," * 25_000 + b"1]",
        b"[" + b" " * 100_000 + b"]",
        b"$" + b"x" * 100_000 + b"[]",
        b"[" * 1025 + b"'a'" * 30_000 + b"\n{}",
        b'["' + b"\\" * 100_001 + b"\n[]",
    ],
)
@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_looks_at_no_byte_more_than_a_few_times(data: bytes, size: int) -> None:
    """The cost is linear: a long token that arrives in pieces is not scanned again from its start."""
    framer = Framer()
    items = [item for piece in chunks(data, size) for item in framer.feed(piece)]

    assert 1 <= len(items) <= 2
    assert framer.scanned <= 6 * len(data)


def test_keeps_nothing_of_what_is_done() -> None:
    """Memory holds the value under way, not the stream."""
    framer = Framer()
    for piece in chunks(b'{"execute": "x"}\r\n' * 100 + b"$" + b"x" * 1000 + b"[" * 1025 + b"1" * 1000, 100):
        framer.feed(piece)

    assert not framer._text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"{", "JSON parse error, premature EOI"),
        (b'{"a":1', "JSON parse error, premature EOI"),
        (b'{"a', "JSON parse error, stray '\"a'"),
        (b'{"a" 1 "x', "JSON parse error, stray '\"x'"),
        (b'{"a":-', "JSON parse error, stray '-'"),
        (b'{"a":"' + b"x" * 100, "JSON parse error, stray '\"" + "x" * 100 + "'"),
        (b'{"a":tru', "JSON parse error, invalid keyword 'tru'"),
        (b'{"a":$} {}', "JSON parse error, stray '$'"),
        (b"{} x", "Expecting at most one JSON value"),
        (b"{}}", "Expecting at most one JSON value"),
        (b'{} "', "Expecting at most one JSON value"),
        (b"", "JSON parse error, premature EOI"),
    ],
)
def test_a_text_must_be_one_value(text: bytes, complaint: str) -> None:
    """What the end of the input means, in the peer's words for its command line."""
    with pytest.raises(DialectError) as caught:
        parse_only(text)

    assert complaint == str(caught.value)
    assert parse_only(b'{"a": 1} \n') == {"a": 1}
    assert parse_only(b"12") == 12
