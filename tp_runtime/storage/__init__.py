"""Bytes on disk: files and folders that appear whole or not at all, and paths that are checked before they are opened.

Knows nothing of patches, models or sessions.
"""

from .atomic import atomic_file, atomic_folder
from .safe_path import REEXPORT, check_name, checked_file
from .strict_json import StrictJSONError, parse_json, parse_json_object, read_json_object

__all__ = [
    "REEXPORT",
    "StrictJSONError",
    "atomic_file",
    "atomic_folder",
    "check_name",
    "checked_file",
    "parse_json",
    "parse_json_object",
    "read_json_object",
]
