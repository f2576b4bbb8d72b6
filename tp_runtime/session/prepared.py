"""A graph prepared for one machine: it is optimised, and its weights are packed as this processor's kernels read them.

ONNX Runtime packs the weights again at every load, into the process's own memory. Weights that were packed once and
written to disk are mapped instead. A load takes less time, and processes that run the same model share the pages. The
result depends on the processor and on ONNX Runtime's version. So the folder records the machine that it was made on,
and no other machine uses it.

    MODEL/prepared/model.onnx, weights      the graph
    MODEL/prepared/prepared.json            which graph it was made from, for which machine, and the files' sizes
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError, TPError
from ..storage import atomic_folder, check_writable, checked_file, parse_json_object
from .device import CPU, Device, create_session, require_onnxruntime
from .model_folder import PREPARED, ModelFolder
from .replaceable import PREPARED_FILES, PREPARED_FOLDER

log = logging.getLogger("tp_runtime")

_GRAPH, _WEIGHTS, _RECORD = PREPARED_FILES
_RECORD_CAP = 2**16
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
        OutputError: the folder `prepared` holds other files than those that this function writes.
        DeviceUnavailableError: there is no ONNX Runtime.
        OSError: the disk is full or the folder cannot be written; an earlier prepared graph stays as it was.
    """
    if not again and prepared_graph(folder) is not None:
        return False
    ort = require_onnxruntime()
    with atomic_folder(folder.path / PREPARED, replaces=PREPARED_FOLDER) as out:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(out / _GRAPH)
        for name, value in _SESSION_CONFIG.items():
            options.add_session_config_entry(name, value)
        try:
            create_session(folder.path / _GRAPH, Device("cpu", CPU), options)
        except ModelFormatError:
            # ONNX Runtime reports a full disk like a damaged graph, without the system's error.
            check_writable(*(out / name for name in (_GRAPH, _WEIGHTS)))
            raise
        sizes = {name: (out / name).stat().st_size for name in (_GRAPH, _WEIGHTS) if (out / name).exists()}
        record = {**_machine(), "graph_digest": folder.graph_digest, "files": sizes}
        (out / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return True


def prepared_graph(folder: ModelFolder) -> Path | None:
    """Return the graph prepared for this machine, or None; a prepared graph that does not fit is logged."""
    if not (folder.path / PREPARED).is_dir():
        return None
    if (reason := _why_unusable(folder)) is None:
        return folder.path / PREPARED / _GRAPH
    log.warning("the prepared graph is not used: %s; run `tp-runtime prepare` again", reason)
    return None


def _why_unusable(folder: ModelFolder) -> str | None:
    """Return the reason why the prepared graph cannot be used here; None if it can."""
    root = folder.path / PREPARED
    try:
        record = checked_file(root, _RECORD)
        if record.stat().st_size > _RECORD_CAP:
            return f"{_RECORD} is too large"
        found = parse_json_object(record.read_bytes())
        wanted = {**_machine(), "graph_digest": folder.graph_digest}
        for key, value in wanted.items():
            if found.get(key) != value:
                return f"it was made for {key} {found.get(key)!a:.80}, but this is {value}"
        if not {_GRAPH} <= found["files"].keys() <= {_GRAPH, _WEIGHTS}:
            return f"{_RECORD} lists missing or unknown files"
        for name, size in found["files"].items():
            if checked_file(root, name).stat().st_size != size:
                return f"the size of {name} differs from the recorded size"
    except (TPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


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
