"""The opening of a session: its threads, its device, its graph, its default patch, and whether steps are captured.

Everything here is decided once, before the first run. This module runs no ids: it knows nothing of caches, of the
patches of requests, or of what a caller does with the open session. `Graph` does that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..patch import KV_PARTS, Patch
from .cuda_graphs import CapturedDecode, check_capturable
from .description import past_name
from .device import (
    Device,
    avoid_float16_crash,
    check_cuda_options,
    create_session,
    input_kinds,
    require_onnxruntime,
    select_device,
)
from .device_copies import DeviceCopies
from .graph_file import graph_file
from .huge_pages import Range, mapped, without
from .interface import check_interface
from .kv_buffers import ConcatenatedBuffers, InPlaceBuffers
from .model_folder import ModelFolder
from .patch_binder import PatchBinder
from .prepared import prepared_graph
from .run_io import RunIO
from .settings import SessionSettings
from .threads import set_threads

log = logging.getLogger("tp_runtime")


@dataclass(frozen=True, eq=False)
class OpenSession:
    """A session that has run nothing yet, and what belongs to it.

    Attributes:
        ort: the onnxruntime module.
        session: ONNX Runtime's session.
        device: the device that the session really runs on.
        binder: puts patches on that device.
        kv: the object that manages the key/value buffers of single sequences.
        run_io: binds the inputs and outputs of runs of any shape.
        for_huge_pages: the memory to move to huge pages after the first run.
        captured: the captured decode buffers; None if nothing is captured.
        capture_failure: why nothing is captured although `cuda_graphs` asked for it; None otherwise.
    """

    ort: Any
    session: Any
    device: Device
    binder: PatchBinder
    kv: InPlaceBuffers | ConcatenatedBuffers
    run_io: RunIO
    for_huge_pages: list[Range]
    captured: CapturedDecode | None = None
    capture_failure: str | None = None


def open_session(folder: ModelFolder, device: str, defaults: Patch | None, settings: SessionSettings) -> OpenSession:
    """Open a session over a model folder's graph.

    Args:
        folder: the opened model folder.
        device: `auto`, `cuda` or `cpu`.
        defaults: a patch whose tensors become the session's defaults; None takes the folder's default patch, if it has
            one.
        settings: the settings of the session.

    Raises:
        DeviceUnavailableError: the device is not available (see device.py), or `cuda_graphs` is set on the CPU.
        ModelFormatError: ONNX Runtime cannot load the graph, the graph contradicts the folder's description or has
            changed since the folder was opened, or the folder's default patch is missing or is another patch.
        UnsafePathError: the graph refers to a file that the folder does not list.
        PatchError: `defaults` or the folder's default patch does not fit the graph, or the latter's file is damaged.
        RequestError: `threads` is not a positive integer, `cuda_options` is not a mapping of valid options, `threads`
            or `spin` is set although all sessions share a pool, or `cuda_graphs` is set for a graph of the `optimum`
            route.
    """
    cuda_options = check_cuda_options(settings.cuda_options)
    if settings.cuda_graphs:
        check_capturable(folder, device)
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    set_threads(options, settings.threads, settings.spin)
    if folder.kv.numpy_dtype == np.float16:
        avoid_float16_crash(ort, options)
    chosen = select_device("cuda" if settings.cuda_graphs and device == "auto" else device)
    on_host = options if chosen.kind == "cpu" else None
    binder = PatchBinder(ort, folder, defaults, settings.bound_patch_bytes, on_host)
    attempt = partial(_open, ort, folder, chosen, binder, options, cuda_options, settings)
    opened = _with_captured_steps(attempt, folder) if settings.cuda_graphs else attempt(cuda_graphs=False)
    binder.place(opened.device.kind)
    return opened


def _with_captured_steps(attempt: Callable[..., OpenSession], folder: ModelFolder) -> OpenSession:
    """Open a session with captured steps; if that fails, an ordinary one that tells the reason."""
    try:
        opened = attempt(cuda_graphs=True)
        captured = start_captured(folder, opened.session, opened.ort, opened.device.kind, opened.run_io, opened.kv)
        return replace(opened, captured=captured)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
        failure = " ".join(str(error.__cause__ or error).split())
        log.warning("decode steps are not captured: %s", failure)
    return replace(attempt(cuda_graphs=False), capture_failure=failure)


def start_captured(
    folder: ModelFolder, session: Any, ort: Any, kind: str, run_io: RunIO, kv: InPlaceBuffers | ConcatenatedBuffers
) -> CapturedDecode:
    """Capture the decode steps of an open session that has run nothing yet.

    Args:
        folder: the model folder of the graph; its route is `fused`.
        session: ONNX Runtime's session, which was created for captures.
        ort: the onnxruntime module.
        kind: the device of the session, `cuda`, or `cpu` in tests.
        run_io: the inputs and outputs of the session's other runs.
        kv: the object that manages the key/value buffers of the graph's caches.

    Returns:
        The captured decode buffers.

    Raises:
        Exception: ONNX Runtime raises its own exception; the session cannot be used any more.
    """
    assert isinstance(kv, InPlaceBuffers)
    dtypes = folder.kv.numpy_dtype, run_io.dtype
    captured = CapturedDecode(folder, session, ort, kind, dtypes, run_io.first_logit(-1), kv)
    captured.capture()
    return captured


def _open(
    ort: Any,
    folder: ModelFolder,
    device: Device,
    binder: PatchBinder,
    options: Any,
    cuda_options: Mapping[str, str],
    settings: SessionSettings,
    *,
    cuda_graphs: bool,
) -> OpenSession:
    """Open a session; on the CPU, over the graph that was prepared for this processor, if there is one."""
    prepared = prepared_graph(folder) if device.kind == "cpu" else None
    model = (prepared or graph_file(folder)).model(options)
    before = mapped()
    session, on = create_session(model, device, options, cuda_graphs, cuda_options)
    check_interface(session, folder)
    for_huge_pages = without(mapped(), before) if settings.huge_pages and on.kind == "cpu" else []
    kinds = {value.name: value.type for value in session.get_outputs()}
    logits_dtype = np.dtype(np.float16 if kinds["logits"] == "tensor(float16)" else np.float32)
    dtype = folder.kv.numpy_dtype
    kv_device = input_kinds(session, on)[past_name(0, KV_PARTS[0])]
    if kv_device != on.kind:
        log.warning(
            "attention runs on the CPU: the CUDA provider has no attention kernel for %s; export with fp16 or "
            "int4-fp16",
            dtype,
        )
    buffers = InPlaceBuffers if folder.route == "fused" else ConcatenatedBuffers
    kv = buffers(folder, session, ort, kv_device, dtype, settings.window_cache)
    if isinstance(kv, InPlaceBuffers) and kv_device != "cpu":
        kv.copies = DeviceCopies(ort, on, dtype)
    return OpenSession(ort, session, on, binder, kv, RunIO(ort, folder.vocab_size, logits_dtype), for_huge_pages)
