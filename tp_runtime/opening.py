"""The opening of a model folder: the session and the text side over the same files, at the same time.

ONNX Runtime opens a session without Python's lock. Meanwhile this module hashes the folder's files and reads its
tokenizer and chat template. It knows nothing of requests, and of no patch but the one that a session is opened with.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, Unpack

from .errors import ModelFormatError, TPError, require_flag, shown
from .loaded_patches import Active
from .patch import Patch
from .session import Graph, ModelFolder, SessionOptions, cuda_is_expected, not_a_patch
from .text import TextCodec

log = logging.getLogger("tp_runtime")

_T = TypeVar("_T")


def open_folder(
    path: str | Path,
    device: str,
    patch: Patch | str | Path | Active | None,
    verify: bool,
    **options: Unpack[SessionOptions],
) -> tuple[Graph, TextCodec]:
    """Open an exported folder, and log why it runs on the CPU if `auto` does.

    Args:
        path: the folder.
        device: `cuda`, `cpu` or `auto`.
        patch: the patch that becomes part of the session, or its file. None and ACTIVE leave the folder's own in place.
        verify: whether to check the digest of every file before the session is opened.
        options: the settings of the session; see SessionSettings.

    Returns:
        The session, and the tokenizer and the chat template of the same folder.

    Raises:
        ModelFormatError, UnsafePathError: `path` is not a path, or the folder is not as it was exported.
        DeviceUnavailableError: `device` is unknown, or is `cuda` and CUDA is not available; `cuda_graphs` is set on the
            CPU; or ONNX Runtime is missing or installed twice.
        PatchError: the patch is damaged or does not fit.
        RequestError: `threads` is not a positive integer, another option is not valid, or `cuda_graphs` is set for a
            graph of the `optimum` route.
    """
    if not isinstance(path, str | os.PathLike):
        raise ModelFormatError(
            "the value is not a path", field="path", got=shown(path), wanted="a folder written by tp-export"
        )
    require_flag("verify", verify)
    folder = ModelFolder.open(path, verify, digests=verify)

    def read_text_side() -> TextCodec:
        if not verify:
            folder.check_digests()
        return TextCodec.from_model_folder(folder)

    codec = _beside(read_text_side)  # the graph itself is hashed before it is opened
    try:
        if isinstance(patch, str | os.PathLike):
            patch = Patch.load(patch)
        if not isinstance(patch, Patch | Active | None):
            raise not_a_patch(patch, "a Patch, its file, or None")
        graph = Graph(folder, device, defaults=patch if isinstance(patch, Patch) else None, **options)
    except TPError:
        codec()  # a damaged file is the cause of what the session says about it
        raise
    if graph.device.requested == "auto" and graph.device.reason:
        level = logging.WARNING if cuda_is_expected() else logging.INFO
        log.log(level, "running on the CPU: %s", graph.device.reason)
    return graph, codec()


def _beside(work: Callable[[], _T]) -> Callable[[], _T]:
    """Begin `work` in a thread of its own; return a function that waits for it, and returns or raises as it did."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    # It does not outlive the process: an interrupt while the session is opened ends both.
    thread = threading.Thread(target=run, name="tp-beside", daemon=True)
    thread.start()

    def result() -> _T:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return result
