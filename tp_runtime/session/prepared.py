"""A graph prepared for one machine: it is optimised, and its weights are packed as this processor's kernels read them.

ONNX Runtime packs the weights again at every load, into the process's own memory. Weights that were packed once and
written to disk are mapped instead. A load takes less time, and processes that run the same model share the pages. The
result depends on the processor and on ONNX Runtime's version. So the folder records the machine that it was made on,
and no other machine uses it.

    MODEL/prepared/model.onnx, weights      the graph
    MODEL/prepared/prepared.json            which graph it was made from, for which machine, and the files' digests

A model folder may come from anywhere, with a `prepared/` that computes something else. So `prepare` also writes a
record outside the folder (prepared_record.py), and without that record a prepared graph is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from typing import Any

from ..errors import ModelFormatError, TPError, UnsafePathError
from ..storage import atomic_folder, check_writable, checked_file, parse_json_object, read_regular
from .description import FileRecord, parse_files
from .device import CPU, Device, avoid_float16_crash, create_session, require_onnxruntime
from .external_data import check_external_files
from .graph_file import LARGEST_GRAPH, GraphFile, graph_file
from .model_folder import PREPARED, ModelFolder, check_content, describe_files, read_content
from .prepared_record import require_writable, why_not_made_here, write_record
from .replaceable import PREPARED_FILES, PREPARED_FOLDER

log = logging.getLogger("tp_runtime")

_NOT_USED = "the prepared graph is not used"
_PREPARE = "run `tp-runtime prepare` again"
_GRAPH, _WEIGHTS, _MANIFEST = PREPARED_FILES
_LARGEST_MANIFEST = 2**16
_SESSION_CONFIG = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


def prepare(folder: ModelFolder, *, again: bool = False) -> bool:
    """Prepare a folder's graph for this machine, unless a prepared graph that fits is already there.

    Args:
        folder: the opened folder; it must be writable.
        again: whether to prepare the graph even if one that fits is there.

    Returns:
        Whether a graph was prepared.

    Raises:
        ModelFormatError: ONNX Runtime cannot load the graph.
        UnsafePathError: `prepared` is a link, or the graph refers to a file that the folder does not list.
        OutputError: the folder `prepared` holds other files than those that this function writes.
        DeviceUnavailableError: there is no ONNX Runtime.
        OSError: the disk is full, or the folder or the record outside it cannot be written; an earlier prepared graph
            stays as it was.
    """
    target = folder.path / PREPARED
    if target.is_symlink():  # what the link points to would be replaced
        raise UnsafePathError(
            "the folder for the prepared graph is a link",
            field=PREPARED,
            got=os.readlink(target),
            wanted="a folder in the model folder, or nothing",
            fix="remove the link",
        )
    if not again and prepared_graph(folder) is not None:
        return False
    ort = require_onnxruntime()
    graph = graph_file(folder)
    require_writable()  # packing the weights takes long, so this is found out first
    with atomic_folder(target, replaces=PREPARED_FOLDER) as out:
        options = ort.SessionOptions()
        if folder.kv.dtype == "f16":
            avoid_float16_crash(ort, options)
        options.optimized_model_filepath = str(out / _GRAPH)
        for name, value in _SESSION_CONFIG.items():
            options.add_session_config_entry(name, value)
        try:
            create_session(graph.model(options), Device("cpu", CPU), options)
        except ModelFormatError:
            # ONNX Runtime reports a full disk like a damaged graph, without the system's error.
            check_writable(*(out / name for name in (_GRAPH, _WEIGHTS)))
            raise
        files = describe_files(out, [name for name in (_GRAPH, _WEIGHTS) if (out / name).exists()])
        manifest = {
            **_machine(),
            "graph_digest": folder.graph_digest,
            "files": {name: {"sha256": record.sha256, "bytes": record.bytes} for name, record in files.items()},
        }
        content = (json.dumps(manifest, indent=1) + "\n").encode()
        (out / _MANIFEST).write_bytes(content)
        write_record(content)
    return True


def prepared_graph(folder: ModelFolder) -> GraphFile | None:
    """Return the graph prepared for this machine, or None; the reason why one that is there is not used is logged.

    The graph itself is hashed in any case. The packed weights are hashed if the folder was opened with `verify`;
    otherwise only their size is checked.
    """
    if not has_prepared(folder):
        return None
    try:
        return _read(folder, _listed_files(folder))
    except _NotMadeHereError as reason:  # usual for a folder that was copied
        log.info("%s: %s; %s", _NOT_USED, reason, _PREPARE)
    except (_UnusableError, TPError, OSError) as reason:
        log.warning("%s: %s; %s", _NOT_USED, reason, _PREPARE)
    return None


def has_prepared(folder: ModelFolder) -> bool:
    """Return whether the folder has something at the place of the prepared graph."""
    return os.path.lexists(folder.path / PREPARED)


def check_prepared(folder: ModelFolder) -> str | None:
    """Check the files of a prepared graph, if it is one that is used on this machine.

    Returns:
        Why it is not used; None if it is.

    Raises:
        ModelFormatError: it was prepared here, and a file of it has changed since. Packed weights of the same size are
            hashed only if the folder was opened with `verify`.
        OSError: a file cannot be read.
    """
    try:
        files = _listed_files(folder)
    except _UnusableError as reason:
        return str(reason)
    try:
        _read(folder, files)
    except TPError as error:
        raise ModelFormatError(
            f"the prepared graph has changed since it was made: {error.problem}",
            field=f"{PREPARED}/{error.field}",
            got=error.got,
            wanted=error.wanted,
            fix=_PREPARE,
        ) from error
    return None


class _UnusableError(Exception):
    """The prepared graph is none for this machine and this model."""


class _NotMadeHereError(_UnusableError):
    """The prepared graph was not made here."""


def _listed_files(folder: ModelFolder) -> dict[str, FileRecord]:
    """Return the files of a graph that was prepared here for this machine and this model, as prepared.json lists them.

    Raises:
        _UnusableError: there is no such graph.
    """
    root = folder.path / PREPARED
    try:
        if root.is_symlink():
            raise _UnusableError("its folder is a link")
        manifest = read_regular(checked_file(root, _MANIFEST), _LARGEST_MANIFEST)
        if (reason := why_not_made_here(manifest)) is not None:
            raise _NotMadeHereError(reason)
        found = parse_json_object(manifest)
        for key, value in {**_machine(), "graph_digest": folder.graph_digest}.items():
            if found.get(key) != value:
                raise _UnusableError(f"it was made for {key} {found.get(key)!a:.80}, but this is {value}")
        files = parse_files(found.get("files"), _MANIFEST)
    except (TPError, OSError, ValueError) as error:
        raise _UnusableError(f"it cannot be read ({error})") from error
    if not {_GRAPH} <= files.keys() <= {_GRAPH, _WEIGHTS}:
        raise _UnusableError(f"{_MANIFEST} lists missing or unknown files")
    return files


def _read(folder: ModelFolder, files: Mapping[str, FileRecord]) -> GraphFile:
    root = folder.path / PREPARED
    for name, record in files.items():
        check_content(root, name, record, hash_large=folder.verified)
    content = read_content(root, _GRAPH, files[_GRAPH], LARGEST_GRAPH)
    return GraphFile(root, content, check_external_files(content, frozenset(files), _GRAPH))


def _machine() -> dict[str, Any]:
    """Return the properties of this machine that packed weights depend on."""
    return {"onnxruntime": require_onnxruntime().__version__, "system": platform.system(), "processor": _processor()}


def _processor() -> str:
    """Return the processor's name and a digest of its features, because a virtual machine may hide some features."""
    name, features = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in fields.items()}
        name = known.get("model name", name)
        features = known.get("flags", known.get("Features", ""))
    return f"{name} {hashlib.sha256(features.encode()).hexdigest()[:16]}"
