"""An ONNX file on its way to a session: read once, checked, and loaded from the bytes that were hashed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage import checked_file
from .description import GRAPH_FILE
from .external_data import check_external_files
from .model_folder import ModelFolder

LARGEST_GRAPH = 2**31 - 1  # the limit of protobuf; the weights are in files of their own

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_FORMAT = "session.load_model_format"


@dataclass(frozen=True)
class GraphFile:
    """A checked ONNX file.

    Attributes:
        folder: the folder that it is in, and in which ONNX Runtime finds its data files.
        content: its bytes.
        data: the names of its data files, each of which the folder lists.
    """

    folder: Path
    content: bytes
    data: frozenset[str]

    def model(self, session_options: Any) -> bytes | Path:
        """Return what a session is to be created from; `session_options` get the settings that this needs.

        These are the bytes. So a file that takes the graph's place after it was hashed is not run. The exception is a
        folder whose data files are links, as in the hub's cache: ONNX Runtime follows links only next to a graph that
        it opens by its path.
        """
        _configure(session_options, _FORMAT, "ONNX")  # the bytes of another format were not checked
        _configure(session_options, _DATA_FOLDER, str(self.folder))
        if any((self.folder / name).is_symlink() for name in self.data):
            return self.folder / GRAPH_FILE
        return self.content


def graph_file(folder: ModelFolder) -> GraphFile:
    """Read and check a model folder's graph.

    Raises:
        ModelFormatError: the file has changed since the folder was opened, or is not an ONNX graph.
        UnsafePathError: the graph refers to a file that the folder does not list, or such a file was replaced.
        OSError: the file cannot be read.
    """
    content = folder.read(GRAPH_FILE, LARGEST_GRAPH)
    data = check_external_files(content, frozenset(folder.files), GRAPH_FILE)
    for name in data:  # once more, because the folder may have been opened long before the session
        checked_file(folder.path, name)
    return GraphFile(folder.path, content, data)


def _configure(session_options: Any, key: str, value: str) -> None:
    """Set a session's setting, unless it has this value: ONNX Runtime would print a warning."""
    try:
        if session_options.get_session_config_entry(key) == value:
            return
    except RuntimeError:  # it is not set
        pass
    session_options.add_session_config_entry(key, value)
