"""Every error that this project raises on bad input. Each class has rows in docs/errors.md and a test that raises it.

An error names the field at fault and, where it applies, the value found there, the accepted values, and what to do.
After an error the state is the same as before the call.

What an error quotes may come from an attacker's file. So the text of every error is bounded, and holds no character
that a terminal or a log acts on. `library_errors` is the one place that turns what a library raises into these classes.
"""

from __future__ import annotations

import unicodedata
from collections import abc
from contextlib import contextmanager

_LONGEST_PART = 500  # characters of the field, of the value found, of the accepted values and of the fix
_LONGEST_PROBLEM = 4000  # a problem may end with the last lines that a failed program printed
_LONGEST_LIBRARY_TEXT = 300


class TPError(Exception):
    """The base class of every error raised on bad input.

    The text holds all five parts, cut to a length that can be read. Characters that are not printable are written as
    escape codes; only the problem keeps its line breaks. The attributes hold the values as they were passed.

    Args:
        problem: a clause that states what is wrong.
        field: the argument, file or tensor at fault.
        got: the value found there.
        wanted: the values that would have been accepted.
        fix: an instruction that tells the user what to do.
    """

    def __init__(
        self, problem: str, *, field: str = "", got: object = None, wanted: object = None, fix: str = ""
    ) -> None:
        self.problem, self.field, self.got, self.wanted, self.fix = problem, field, got, wanted, fix
        text = "\n".join(map(printable, _cut(problem, _LONGEST_PROBLEM).split("\n")))
        if field:
            text = f"{_part(field)}: {text}"
        if got is not None:
            text += f"; got {_part(got)}"
        if wanted is not None:
            text += f"; wanted {_part(wanted)}"
        if fix:
            text += f". Fix: {_part(fix)}"
        super().__init__(text)


class PatchError(TPError):
    """The base class of errors about a patch."""


class PatchFormatError(PatchError):
    """The patch file is not well formed: its container, header, dtype or file type is wrong."""


class PatchVersionError(PatchError):
    """The patch file uses a version, method or config key that this version of tp-runtime does not know."""


class PatchValueError(PatchError):
    """A tensor or a strength holds NaN or infinity, or a value that the slot's precision cannot represent."""


class PatchTargetError(PatchError):
    """The patch, or what it addresses, does not exist: a slot, a loaded name, a factor, a place in another format."""


class PatchShapeError(PatchError):
    """The shape of a tensor does not fit the slot, or the number of layers does not fit the model."""


class BaseMismatchError(PatchError):
    """The patch was fitted on another base model or another precision."""


class PatchInUseError(PatchError):
    """The name of a patch is taken, or the patch is still in use."""


class StaleCacheError(PatchError):
    """A KV cache was passed to a run under another patch or in another session than it was made for."""


class ModelError(TPError):
    """The base class of errors about a model folder."""


class ModelFormatError(ModelError):
    """A file of the model folder is missing, truncated or altered, or the folder's description cannot be read."""


class UnsafePathError(ModelError):
    """A file of the model folder has an unsafe name, or its path leads outside the folder."""


class UnsafeGraphError(ModelError):
    """The ONNX graph refers to operators or data that no exported folder contains."""


class DeviceUnavailableError(ModelError):
    """The requested device is not available, or ONNX Runtime is missing or installed twice."""


class OutputError(TPError):
    """The path to write holds something that is not replaced, or is, holds or lies in an input of the command."""


class RequestError(TPError):
    """A prompt, a message, a sampling value or another setting of a call is not valid."""


class ChatFormatError(TPError):
    """The file of a saved chat is damaged, has another version, or belongs to another base model."""


class CacheFormatError(TPError):
    """A file of keys and values, such as one of a prefix cache, is not well formed or does not fit the model."""


class BusyError(TPError):
    """A KV cache, a stream or a chat is being used by another request or thread."""


class CalibrationError(TPError):
    """The queries cannot be used to fit or to measure a patch."""


def printable(text: str) -> str:
    """Return the text on one line, with the characters that are not printable as escape codes, such as "\\x1b".

    A terminal acts on control characters, and characters that change the direction of text hide what a line says. Half
    a surrogate pair cannot be printed at all. Letters of every script and all spaces stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shown(value: object) -> str:
    """Return `repr(value)` for an error, cut to a length that can be read. It never raises.

    Python refuses to print an integer of more than 4,300 digits and a list that is nested too deep for the stack, and
    an object's own `__repr__` can raise anything.
    """
    return _line(_text(value, repr), _LONGEST_PART)


def shortened(names: abc.Sequence[str], most: int = 4) -> str:
    """Return the first names of a list on one line, and how many more there are, for an error."""
    first = ", ".join(map(printable, names[:most]))
    return f"{first} and {len(names) - most} more" if len(names) > most else first


def library_text(error: BaseException) -> str:
    """Return the type and the message of an exception that a library raised, on one line of bounded length."""
    text = " ".join(_text(error).split())
    name = type(error).__name__
    return _line(f"{name}: {text}" if text else name, _LONGEST_LIBRARY_TEXT)


def is_library_panic(error: BaseException) -> bool:
    """Return whether the exception is the panic of a library that is written in Rust, such as tokenizers.

    PyO3 derives it from BaseException. Each library has its own class, which cannot be imported.
    """
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"


@contextmanager
def library_errors(
    kind: type[TPError],
    problem: str,
    *,
    field: str = "",
    wanted: object = None,
    fix: str = "",
    also: tuple[type[BaseException], ...] = (),
) -> abc.Iterator[None]:
    """Turn what a library raises within the context into an error of this project.

    These exceptions pass unchanged: errors of this project, OSError (the operating system's own report), MemoryError,
    and what ends a program or a generator (KeyboardInterrupt, SystemExit, GeneratorExit, signals). A panic of a library
    in Rust is turned, although it is no subclass of Exception.

    Args:
        kind: the class of the error.
        problem: a clause that states what is wrong.
        field: the argument, file or tensor at fault.
        wanted: the values that would have been accepted.
        fix: an instruction that tells the user what to do.
        also: exceptions to turn that would otherwise pass, e.g. MemoryError where a file's numbers can cause it.

    Raises:
        TPError: the library raised an exception; the class is `kind`, and the value found is the exception's text.
    """
    try:
        yield
    except BaseException as error:
        passing = isinstance(error, TPError | OSError | MemoryError) or not isinstance(error, Exception)
        if passing and not isinstance(error, also) and not is_library_panic(error):
            raise
        raise kind(problem, field=field, got=library_text(error), wanted=wanted, fix=fix) from error


def _text(value: object, convert: abc.Callable[[object], str] = str) -> str:
    """Return `convert(value)`, or a text that names the type if that raises."""
    try:
        return convert(value)
    except Exception:  # an integer of 5,000 digits, a list nested too deep, or any fault of another's __str__
        return f"a value of type {type(value).__name__} that cannot be printed"


def _part(value: object) -> str:
    return _line(_text(value), _LONGEST_PART)


def _line(text: str, longest: int) -> str:
    return printable(_cut(text, longest))


def _cut(text: str, longest: int) -> str:
    """Return the text, or its beginning and its end: the end of a path says more than its middle."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end]}...{text[-end:]}"


def require_positive(field: str, value: object, most: int | None = None) -> None:
    """Raise RequestError unless the value of the argument `field` is a positive integer, and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(
            "the value is not a positive integer", field=field, got=shown(value), wanted="a whole number >= 1"
        )
    if most is not None and value > most:
        raise RequestError("the value is too large", field=field, got=shown(value), wanted=f"at most {most}")


def require_flag(field: str, value: object) -> None:
    """Raise RequestError unless the value of the argument `field` is a boolean."""
    if not isinstance(value, bool):
        raise RequestError("the value is not a boolean", field=field, got=shown(value), wanted="True or False")
