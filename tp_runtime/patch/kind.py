"""This module tells whether a file is a patch file by its header, before the file is replaced by another one."""

from __future__ import annotations

from pathlib import Path

from ..storage import Kind, safetensors_metadata

FORMAT = "tp-patch"


def _no_patch(file: Path) -> str | None:
    """Return what a file is if its header does not say that it is a patch; its tensors are not read."""
    metadata = safetensors_metadata(file)
    if isinstance(metadata, dict) and metadata.get("format") == FORMAT:
        return None
    return "a safetensors file that is not a patch"


PATCH_FILE = Kind("a patch file", _no_patch)
