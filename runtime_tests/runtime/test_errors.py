"""The text of an error is bounded and printable, and what a library raises becomes an error of this project."""

from __future__ import annotations

import pytest

from tp_runtime.errors import (
    ModelFormatError,
    RequestError,
    TPError,
    is_library_panic,
    library_errors,
    library_text,
    printable,
    require_positive,
    shown,
)

PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
"""The class that PyO3 makes for a library in Rust."""


class _Unprintable:
    def __repr__(self) -> str:
        raise ZeroDivisionError


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


# -- the text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown_text"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"),
        ("\x9b\x00", r"\x9b\x00"),
        ("é 日本\u3000ein\xa0Wort", "é 日本\u3000ein\xa0Wort"),
    ],
)
def test_every_part_of_an_error_is_printable_and_letters_stay_as_they_are(text: str, shown_text: str) -> None:
    assert printable(text) == shown_text
    error = TPError("the value is bad", field=text, got=text, wanted=text, fix=text)
    assert str(error) == f"{shown_text}: the value is bad; got {shown_text}; wanted {shown_text}. Fix: {shown_text}"
    assert error.got == text  # the attributes are the values as they were passed
    str(error).encode()


def test_a_problem_keeps_its_line_breaks_and_loses_control_characters() -> None:
    assert str(TPError("pip printed\none\n\x1b[31mtwo")) == "pip printed\none\n\\x1b[31mtwo"


@pytest.mark.parametrize("part", ["field", "got", "wanted", "fix"])
def test_a_long_part_of_an_error_is_cut_in_its_middle(part: str) -> None:
    text = str(TPError("the value is bad", **{part: "a" * 2**24 + "the end"}))  # type: ignore[arg-type]
    assert len(text) < 600 and "aaa..." in text and "the end" in text


def test_a_long_problem_is_cut() -> None:
    assert len(str(TPError("x" * 2**24))) < 5000


@pytest.mark.parametrize(
    "value", [10**5000, nested(100_000), _Unprintable()], ids=["digits", "nesting", "its own repr"]
)
def test_a_value_that_python_cannot_print_still_makes_an_error(value: object) -> None:
    named = f"a value of type {type(value).__name__} that cannot be printed"
    assert shown(value) == named
    assert named in str(TPError("the value is bad", got=value))


def test_a_negative_number_of_5000_digits_is_refused_with_a_request_error() -> None:
    with pytest.raises(RequestError, match="cannot be printed"):
        require_positive("threads", -(10**5000))


# -- libraries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [ValueError("no"), RecursionError("no"), PanicException("no"), StopIteration("no")])
def test_what_a_library_raises_becomes_an_error_with_its_text(raised: BaseException) -> None:
    with pytest.raises(ModelFormatError) as caught, library_errors(ModelFormatError, "it fails", field="f", fix="copy"):
        raise raised
    assert str(caught.value) == f"f: it fails; got {type(raised).__name__}: no. Fix: copy"
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize(
    "raised",
    [KeyboardInterrupt(), SystemExit(), GeneratorExit(), OSError(28, "full"), MemoryError(), RequestError("x")],
)
def test_interruptions_system_errors_and_own_errors_pass_unchanged(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, library_errors(ModelFormatError, "it fails"):
        raise raised
    assert caught.value is raised


def test_an_exception_that_would_pass_is_turned_on_request() -> None:
    with pytest.raises(ModelFormatError), library_errors(ModelFormatError, "it fails", also=(MemoryError,)):
        raise MemoryError


def test_the_text_of_a_library_is_one_bounded_printable_line() -> None:
    assert library_text(ValueError("a\n  b\x1b[2J")) == r"ValueError: a b\x1b[2J"
    assert library_text(ValueError()) == "ValueError"
    assert len(library_text(ValueError("x" * 10**6))) < 400
    assert "cannot be printed" in library_text(ValueError(_Unprintable()))


def test_only_the_panic_of_a_library_counts_as_one() -> None:
    assert is_library_panic(PanicException())
    assert not is_library_panic(KeyboardInterrupt()) and not is_library_panic(ValueError())
