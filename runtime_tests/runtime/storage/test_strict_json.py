"""The JSON reader: what it refuses, and what it accepts from Hugging Face's tools."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_runtime.errors import ModelFormatError
from tp_runtime.storage import StrictJSONError, parse_json, parse_json_object, read_json_object

REFUSED = {
    b"": "is not valid JSON",
    b"{": "is not valid JSON",
    b"\xff": "is not valid JSON",
    b"9" * 5000: "is not valid JSON",
    b"[" * 200_000: "is not valid JSON",
    b'{"a": {"b": 1, "b": 2}}': "holds a duplicate key",
    b'{"a": -Infinity}': "holds a number that JSON does not have",
    b'{"a": 1e400}': "holds a number that is too large",
    b'{"a": "\\ud800"}': "holds half of a surrogate pair",
    b'{"\\uDFFFb": 1}': "holds half of a surrogate pair",
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize("raw", REFUSED)
def test_json_that_readers_could_interpret_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(StrictJSONError) as caught:
        parse_json(raw)
    assert caught.value.problem == REFUSED[raw] and caught.value.wanted


@given(VALUES)
def test_the_reader_accepts_what_the_json_module_writes(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == value and parse_json(text.encode()) == value
    assert parse_json(text, lenient=True) == value


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert parse_json(rb'"\ud83d\ude00 \\ud800"') == "\U0001f600 \\ud800"


def test_lenient_reading_refuses_half_of_a_surrogate_pair() -> None:
    with pytest.raises(StrictJSONError, match=r"surrogate pair; got '\\udbff'"):
        parse_json(rb'["\udbff"]', lenient=True)


def test_lenient_reading_accepts_nan_and_the_last_of_equal_keys() -> None:
    read = parse_json_object(b'{"a": 1, "a": NaN}', lenient=True)
    assert list(read) == ["a"] and math.isnan(read["a"])


def test_json_that_is_not_an_object_is_refused() -> None:
    with pytest.raises(StrictJSONError, match="is not a JSON object; got list"):
        parse_json_object(b"[]")


@pytest.mark.parametrize("content", [None, b"[]", b'{"a": 1, "a": 2}'])
def test_the_error_names_the_refused_file(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelFormatError, match="the file ") as caught:
        read_json_object(file, ModelFormatError, "copy it again")
    assert caught.value.field == str(file) and caught.value.got and caught.value.fix == "copy it again"
