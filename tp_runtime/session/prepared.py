"""A graph baked for one machine: optimised, its weights already packed the way this processor's kernels read them.

ONNX Runtime packs weights anew at every load, into memory of the process's own. Packed once and written to disk they
are mapped instead: a load takes less time, and processes that run the same model share the pages. What comes out
depends on the processor and on ONNX Runtime's version, so the folder says what it was made on, and is used nowhere
else.

    MODEL/prepared/model.onnx, weights      the graph
    MODEL/prepared/prepared.json            what it was made from and on, and the size of its files
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

from ..errors import TPError
from ..storage import atomic_folder, checked_file, parse_json_object
from .device import CPU, Device, create_session, require_onnxruntime
from .model_folder import PREPARED, ModelFolder

log = logging.getLogger("tp_runtime")

_GRAPH, _WEIGHTS, _RECORD = "model.onnx", "weights", "prepared.json"
_RECORD_CAP = 2**16
_BAKE = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


def prepare(folder: ModelFolder, *, again: bool = False) -> bool:
    """Bake a folder's graph for this machine, if that was not done yet or was done for another.

    Args:
        folder: the opened folder; it must be writable.
        again: even if what is there fits.

    Returns:
        Whether anything had to be done.

    Raises:
        ModelFormatError: ONNX Runtime cannot load the graph.
        DeviceUnavailableError: there is no ONNX Runtime.
        OSError: the disk is full or the folder cannot be written; what was there is left as it was.
    """
    if not again and prepared_graph(folder) is not None:
        return False
    ort = require_onnxruntime()
    with atomic_folder(folder.path / PREPARED, overwrite=True) as out:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(out / _GRAPH)
        for name, value in _BAKE.items():
            options.add_session_config_entry(name, value)
        create_session(folder.path / _GRAPH, Device("cpu", CPU), options)
        sizes = {name: (out / name).stat().st_size for name in (_GRAPH, _WEIGHTS) if (out / name).exists()}
        record = {**_machine(), "graph_digest": folder.graph_digest, "files": sizes}
        (out / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return True


def prepared_graph(folder: ModelFolder) -> Path | None:
    """The graph baked for this machine, or None: there is none, or it fits another machine, which is logged."""
    if not (folder.path / PREPARED).is_dir():
        return None
    if (reason := _misfit(folder)) is None:
        return folder.path / PREPARED / _GRAPH
    log.warning("the prepared graph is not used: %s; run `tp-runtime prepare` again", reason)
    return None


def _misfit(folder: ModelFolder) -> str | None:
    """Why what is there cannot be used."""
    root = folder.path / PREPARED
    try:
        record = checked_file(root, _RECORD)
        if record.stat().st_size > _RECORD_CAP:
            return f"{_RECORD} is too large"
        found = parse_json_object(record.read_bytes())
        wanted = {**_machine(), "graph_digest": folder.graph_digest}
        for key, value in wanted.items():
            if found.get(key) != value:
                return f"made for {key} {found.get(key)!a:.80}, and this is {value}"
        if not {_GRAPH} <= found["files"].keys() <= {_GRAPH, _WEIGHTS}:
            return f"{_RECORD} lists other files"
        for name, size in found["files"].items():
            if checked_file(root, name).stat().st_size != size:
                return f"{name} has another size than it had"
    except (TPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def _machine() -> dict[str, Any]:
    """What packed weights depend on."""
    return {"onnxruntime": require_onnxruntime().__version__, "system": platform.system(), "processor": _processor()}


def _processor() -> str:
    """Name of the processor, and a digest of what it can do: a virtual machine may hide some of it."""
    name, features = platform.processor() or platform.machine(), ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in fields.items()}
        name = known.get("model name", name)
        features = known.get("flags", known.get("Features", ""))
    return f"{name} {hashlib.sha256(features.encode()).hexdigest()[:16]}"
