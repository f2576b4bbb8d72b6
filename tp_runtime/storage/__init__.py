"""Files on disk: atomic writes, checked paths of a folder's files, files opened once, digests, and JSON.

This room knows nothing of what a patch, a graph or a model folder contains.
"""

from .atomic import atomic_file, atomic_folder
from .digests import SHA256, sha256_file
from .home import user_folder
from .regular_file import UnreadableFileError, open_regular, read_regular
from .safe_path import REEXPORT, check_name, checked_file
from .strict_json import StrictJSONError, parse_json, parse_json_object, read_json_object

__all__ = [
    "REEXPORT",
    "SHA256",
    "StrictJSONError",
    "UnreadableFileError",
    "atomic_file",
    "atomic_folder",
    "check_name",
    "checked_file",
    "open_regular",
    "parse_json",
    "parse_json_object",
    "read_json_object",
    "read_regular",
    "sha256_file",
    "user_folder",
]
