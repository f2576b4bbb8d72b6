"""Files on disk: atomic writes and what they may replace, checked paths, files opened once, digests, JSON, safetensors.

This room knows nothing of what a patch, a graph or a model folder contains.
"""

from .atomic import atomic_file, atomic_folder, is_temporary_name, temporary_folder
from .destination import ANY_FILE, Kind, check_output_file, check_output_folder, foreign_entries
from .digests import SHA256, sha256_file
from .home import user_folder
from .regular_file import NO_FILE, UnreadableFileError, open_regular, read_regular
from .safe_path import REEXPORT, check_name, checked_file
from .safetensors_file import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    SafetensorsError,
    StoredRange,
    parse_safetensors,
    safetensors_header,
    safetensors_metadata,
    write_safetensors,
)
from .strict_json import MAX_JSON_BYTES, StrictJSONError, parse_json, parse_json_object, read_json_object
from .write_errors import check_writable, system_errors

__all__ = [
    "ANY_FILE",
    "MAX_FILE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_JSON_BYTES",
    "NO_FILE",
    "REEXPORT",
    "SHA256",
    "Kind",
    "SafetensorsError",
    "StoredRange",
    "StrictJSONError",
    "UnreadableFileError",
    "atomic_file",
    "atomic_folder",
    "check_name",
    "check_output_file",
    "check_output_folder",
    "check_writable",
    "checked_file",
    "foreign_entries",
    "is_temporary_name",
    "open_regular",
    "parse_json",
    "parse_json_object",
    "parse_safetensors",
    "read_json_object",
    "read_regular",
    "safetensors_header",
    "safetensors_metadata",
    "sha256_file",
    "system_errors",
    "temporary_folder",
    "user_folder",
    "write_safetensors",
]
