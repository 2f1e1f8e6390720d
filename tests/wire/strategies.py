"""Hypothesis strategies for values and for text in the dialect."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from qmpd.wire.dialect import INT64_MIN, UINT64_MAX


def is_allowed(character: str) -> bool:
    """Neither a surrogate nor a noncharacter."""
    code = ord(character)
    return not (0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)


texts = st.text(st.characters(exclude_categories=["Cs"]).filter(is_allowed), max_size=8)
integers = st.integers(INT64_MIN, UINT64_MAX)
scalars = st.none() | st.booleans() | integers | st.floats(allow_nan=False) | texts


def values() -> st.SearchStrategy[Any]:
    """Whatever the dialect can say."""
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
    )


#: Pieces of JSON whose order makes sense now and then: more of the grammar is met this way than by random bytes.
FRAGMENTS = [
    *(
        bytes([byte])
        for byte in b"{}[]:,\"' \t\r\n\\-+.eE0123nul$\x00\x01\x7f\x80\xbf\xc0\xc3\xe2\xed\xef\xf0\xf4\xfe\xff"
    ),
    *[b'"a"', b"'b'", b'"a":', b'{"a":', b'{"execute":"x"}', b"true", b"false", b"null", b"nul", b"-0", b"01", b"0e1"],
    *[b"1.5", b"1e5", b"-", b"18446744073709551616", b"1e999", b"\\u0041", b"\\uD83D", b"\\uDE00", b"\\uFFFE", b"\\'"],
    *[b"\xc0\x80", "é".encode(), "€".encode(), "😀".encode(), b"\xef\xbf\xbf", b"\xed\xa0\x80", b"a" * 70, b"7" * 70],
]
dialect_bytes = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map(b"".join)
any_bytes = st.binary(max_size=64) | dialect_bytes
