"""The translation of expressions: what it gives matches what Python's `re` matches, and nothing else."""

from __future__ import annotations

import re

import pytest

from runtime_tests.hostile import CountedText
from tp_runtime.errors import RequestError
from tp_runtime.grammar.pattern import translate


@pytest.mark.parametrize(
    ("pattern", "translated"),
    [
        ("abc", "abc"),
        ("a.c", r"a[^\n\r\x{2028}\x{2029}]c"),
        ("[[a]]", r"[\x5ba]\x5d"),
        ("[a&&b~~c+--d]", r"[a\x26\x26b\x7e\x7ec\x2b-\x2dd]"),
        ("[a-c-]", r"[a-c\x2d]"),
        (r"[\w-]", r"[0-9A-Za-z_\x2d]"),
        (r"\d+", "[0-9]+"),
        (r"[^\d]", r"[^\p{Nd}]"),
        ("a{2,3}?b*?", "a{2,3}b*"),
        ("a{x}{,}", r"a\x7bx\x7d\x7b\x2c\x7d"),
        ("(?P<n>a)(?<m>b)(?:c)", "(?:a)(?:b)(?:c)"),
        (r"\u00e9\x41\/\-\0\cJ", r"éA\x2f\x2d\x00\x0a"),
        (r"\ud83d\ude42", "🙂"),
        (r"\p{L}[\P{Lu}]", r"\p{L}[\P{Lu}]"),
        ("^a$|b", "^a$|b"),
    ],
)
def test_expressions_become_the_syntax_of_llguidance(pattern: str, translated: str) -> None:
    assert translate(pattern, "regex") == translated


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{3}",
        r"[^\]a]",
        "[a&&b]",
        "[[a]]",
        r"\.\*",
        "a|b|",
        "(a(b)?)+",
        r"[\d.\-+]",
        "x{0,2}y",
        "[!-/]",
        r"[\^a]",
        "#/~",
    ],
)
def test_the_translation_means_what_python_means_where_their_syntax_is_the_same(pattern: str) -> None:
    """For these expressions Python understands the translation too."""
    theirs, ours = re.compile(translate(pattern, "regex")), re.compile(pattern)
    texts = [a + b + c for a in "ab.]&[^0-/x" for b in ("", "a", "[", "9", "]", "y") for c in ("", "b", "&", "1")]
    assert [bool(theirs.fullmatch(text)) for text in texts] == [bool(ours.fullmatch(text)) for text in texts]


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)", "(?!a)", "(?<=a)b", "(?<!a)b", r"(a)\1", r"\k<n>", r"\b", r"\B", r"\A", r"\Z", "(?i)a", "(?#a)",
        "a++", "a*+", "a**", "(?>a)", "*a", "|*", "(*)", "{2}", "a{2}{3}", "a{,3}", "a{10001}", "(", ")", "(a", "a)",
        "[", "[]", "[]a]",
        "[^]", "[a", "[b-a]", r"[a-\d]", "\\", r"\xg1", r"\u12", r"\u{110000}", r"\ud800", r"\q", r"\_", r"\é",
        r"\p{", r"\pL",
        "(?<1>a)", "((a{100}){100}){100}",
    ],
)  # fmt: skip
def test_what_is_malformed_or_not_supported_is_refused_with_its_place(pattern: str) -> None:
    with pytest.raises(RequestError, match="at character") as refused:
        translate(pattern, "json_schema.pattern")
    assert refused.value.field == "json_schema.pattern" and refused.value.wanted


@pytest.mark.parametrize("part", ["{", "{1,", "(?:a)", "(?<n>a)", r"\p{L}", r"\u{41}"])
def test_a_long_expression_is_read_once(part: str) -> None:
    """No part makes a copy of the rest, here a set of 900,000 characters."""
    pattern = CountedText(part * 6_000 + "[" + "," * 900_000 + "]")
    assert translate(pattern, "regex").endswith(r"\x2c]")
    assert 0 < pattern.copied < 4 * len(pattern)


def test_many_digits_after_a_brace_are_read_once() -> None:
    assert translate("a{" + "1" * 40_000 + "b", "regex").startswith(r"a\x7b1")
