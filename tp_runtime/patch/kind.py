"""This module tells whether a file is a patch file by its header, before the file is replaced by another one."""

from __future__ import annotations

from pathlib import Path

from ..storage import MAX_HEADER_BYTES, Kind, parse_json_object

FORMAT = "tp-patch"


def _no_patch(file: Path) -> str | None:
    """Return what a file is if its header does not say that it is a patch; its tensors are not read."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = parse_json_object(handle.read(min(length, MAX_HEADER_BYTES)))
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and metadata.get("format") == FORMAT:
        return None
    return "a safetensors file that is not a patch"


PATCH_FILE = Kind("a patch file", _no_patch)
