"""The summary of a report, stored in the patch file's description.

The tensors and their dtype stay unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from tp_runtime.errors import PatchFormatError, library_errors
from tp_runtime.patch import DTYPES, Patch

from .figures import PatchReport, summary

_NAMES = {stored: name for name, stored in DTYPES.items()}


def store_summary(file: Path, patch: Patch, report: PatchReport) -> None:
    """Replace `file` by a copy whose description has the summary under `report`.

    The file is replaced only once the copy is written whole.

    Args:
        file: the patch file.
        patch: the patch as loaded from `file`.
        report: the figures measured on the patch.

    Raises:
        PatchFormatError: the file changed since it was loaded, and is no patch file any more.
        OSError: the file cannot be read or written; the old file is still there.
    """
    with (
        library_errors(PatchFormatError, "the file changed since it was loaded", field=str(file)),
        safe_open(file, framework="np") as opened,
    ):
        found = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - no mapping
    # If the file has several dtypes, float32 represents every value of the others exactly.
    dtype = _NAMES[found.pop()] if len(found) == 1 else "f32"
    replace(patch, config=replace(patch.config, report=summary(report))).save(file, dtype)
