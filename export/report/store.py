"""The summary of a report, stored in the patch file's description.

The tensors and their dtype stay unchanged, int8 with its scales included.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tp_runtime.patch import Patch

from .figures import PatchReport, summary


def store_summary(file: Path, patch: Patch, report: PatchReport) -> None:
    """Replace `file` by a copy whose description has the summary under `report`.

    The file is replaced only once the copy is written whole.

    Args:
        file: the patch file.
        patch: the patch as loaded from `file`.
        report: the figures measured on the patch.

    Raises:
        OutputError: the file changed since it was loaded, and is no patch file any more.
        OSError: the file cannot be written; the old file is still there.
    """
    replace(patch, config=replace(patch.config, report=summary(report))).save(file)
