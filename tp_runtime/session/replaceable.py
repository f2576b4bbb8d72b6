"""The two kinds of folder that this half writes and may replace: an exported model folder and its `prepared` folder.

Both are known by what they hold. A folder that holds anything else as well is somebody's own and is not replaced.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..storage import Kind, foreign_entries, is_temporary_name, parse_json_object
from .description import FORMAT, GRAPH_FILE, LARGEST_DESCRIPTION, SLOTS_FILE
from .model_folder import PREPARED

PREPARED_FILES = (GRAPH_FILE, "weights", "prepared.json")  # the graph, its weights, and the digests of both


def _no_model_folder(path: Path) -> str | None:
    """Return why a folder is no export: it has no patch_slots.json of ours, or entries that this file does not list."""
    if not (path / SLOTS_FILE).is_file():
        return f"a folder without {SLOTS_FILE}"
    with (path / SLOTS_FILE).open("rb") as file:
        description = parse_json_object(file.read(LARGEST_DESCRIPTION))
    if description.get("format") != FORMAT:
        return f"a folder whose {SLOTS_FILE} has another format"
    # An interrupted `prepare` that could not clean up leaves its hidden folder.
    ours = [name for name in os.listdir(path) if name == PREPARED or is_temporary_name(name, PREPARED)]
    for name in ours:
        if (found := _no_prepared_folder(path / name)) is not None:
            return f"{name}: {found}"
    return foreign_entries(path, [SLOTS_FILE, *description["files"]], ours)


def _no_prepared_folder(path: Path) -> str | None:
    return foreign_entries(path, PREPARED_FILES)


MODEL_FOLDER = Kind("a folder that tp-export model wrote", _no_model_folder)
PREPARED_FOLDER = Kind("a folder that tp-runtime prepare wrote", _no_prepared_folder)
