"""Errors of the operating system that libraries report in their own way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tp_runtime.storage import check_writable, system_errors


def test_a_number_in_the_text_of_an_error_becomes_the_systems_error() -> None:
    with pytest.raises(OSError, match="No space left") as caught, system_errors():
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC


def test_a_system_error_that_another_error_hides_is_raised() -> None:
    full = OSError(errno.EFBIG, os.strerror(errno.EFBIG), "model.onnx")
    with pytest.raises(OSError, match=r"File too large: 'model\.onnx'"), system_errors():
        try:
            raise full
        except OSError as error:
            raise ValueError("cannot be exported") from error


def test_other_errors_are_raised_unchanged() -> None:
    for error in (ValueError("no"), RuntimeError("(os error 2)"), FileNotFoundError(errno.ENOENT, "no"), OSError("no")):
        with pytest.raises(type(error)) as caught, system_errors():
            raise error
        assert caught.value is error


def test_a_file_that_takes_a_block_is_not_at_fault(tmp_path: Path) -> None:
    check_writable(tmp_path / "weights")
    with pytest.raises(FileNotFoundError):
        check_writable(tmp_path / "no" / "weights")
