"""The summary of a report, put into the patch file's description. The tensors stay what they are, dtype included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from tp_runtime.patch import Patch

from .figures import PatchReport, summary

_DTYPES = {"F16": "f16", "BF16": "bf16", "F32": "f32"}


def store(file: Path, patch: Patch, report: PatchReport) -> None:
    """Write `file` again, whole or not at all, with the summary as the description's `report`.

    Args:
        file: the patch file, `patch` as loaded from it.
        report: what was measured of it.

    Raises:
        OSError: the operating system's error; the old file is still there.
    """
    with safe_open(file, framework="np") as opened:
        found = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - no mapping
    # A file of several dtypes: float32 holds every value of the others.
    dtype = _DTYPES[found.pop()] if len(found) == 1 else "f32"
    replace(patch, config=replace(patch.config, report=summary(report))).save(file, dtype)
