"""Bytes on disk: files and folders that appear whole or not at all, and paths that are checked before they are opened.

Knows nothing of patches, models or sessions.
"""

from .atomic import atomic_file, atomic_folder
from .safe_path import REEXPORT, check_name, checked_file

__all__ = ["REEXPORT", "atomic_file", "atomic_folder", "check_name", "checked_file"]
