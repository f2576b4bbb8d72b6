"""Every error this project raises on bad input: one class per row of docs/errors.md, one named test per row.

An error names the field at fault, what it got, what it wanted and the way out, and the state it leaves is the state
from before the call.
"""

from __future__ import annotations


class TPError(Exception):
    """Base of every error raised for bad input.

    Args:
        problem: one line saying what went wrong.
        field: the argument, file or tensor at fault.
        got: the value found there.
        wanted: what would have been accepted.
        fix: what the user can do about it.
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
    """Base of the errors about a patch."""


class PatchFormatError(PatchError):
    """The patch file is not a well-formed patch: container, header, dtype or kind of file."""


class PatchVersionError(PatchError):
    """The patch file uses a version, method or config key that this reader does not know."""


class PatchValueError(PatchError):
    """A tensor or a strength holds NaN or infinity, or a value that does not fit the slot's precision."""


class PatchTargetError(PatchError):
    """The patch addresses a slot the graph does not have, or half of a pair, or nothing at all."""


class PatchShapeError(PatchError):
    """A tensor's shape, or the number of layers, does not fit the slot."""


class BaseMismatchError(PatchError):
    """The patch was fitted on another base model."""


class PatchInUseError(PatchError):
    """A patch name is taken, or the patch is still in use."""


class StaleCacheError(PatchError):
    """A KV cache made under one patch was about to be used under another."""


class ModelError(TPError):
    """Base of the errors about a model folder."""


class ModelFormatError(ModelError):
    """The model folder is incomplete, truncated or altered, or its description cannot be read."""


class UnsafePathError(ModelError):
    """A file of the model folder lies, or is said to lie, where it must not."""


class UnsafeGraphError(ModelError):
    """The ONNX graph asks for something outside what an exported folder contains."""


class DeviceUnavailableError(ModelError):
    """The device asked for was not given, or ONNX Runtime is missing or installed twice."""


class RequestError(TPError):
    """A prompt, message or sampling value cannot be served."""


class CalibrationError(TPError):
    """The queries cannot calibrate or measure a patch."""
