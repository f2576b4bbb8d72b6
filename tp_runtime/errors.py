"""Every error that this project raises on bad input. Each class has a row in docs/errors.md and a test that raises it.

An error names the field at fault and, where it applies, the value found there, the accepted values, and what to do.
After an error the state is the same as before the call.
"""

from __future__ import annotations


class TPError(Exception):
    """The base class of every error raised on bad input.

    Args:
        problem: one line that states what is wrong.
        field: the argument, file or tensor at fault.
        got: the value found there.
        wanted: the values that would have been accepted.
        fix: an instruction that tells the user what to do.
    """

    def __init__(
        self, problem: str, *, field: str = "", got: object = None, wanted: object = None, fix: str = ""
    ) -> None:
        self.problem, self.field, self.got, self.wanted, self.fix = problem, field, got, wanted, fix
        text = f"{field}: {problem}" if field else problem
        if got is not None:
            text += f"; got {got}"
        if wanted is not None:
            text += f"; wanted {wanted}"
        if fix:
            text += f". Fix: {fix}"
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


class BusyError(TPError):
    """A KV cache or a stream is being used by another request or thread."""


class CalibrationError(TPError):
    """The queries cannot be used to fit or to measure a patch."""


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


def shown(value: object) -> str:
    """Return a value's repr for an error, cut to 80 characters.

    Python refuses to write out integers of thousands of digits, and the repr of a foreign object may fail in any way.
    """
    try:
        text = repr(value)
    except Exception:
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."
