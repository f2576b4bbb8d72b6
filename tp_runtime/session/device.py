"""Which device a session gets, and proof that it got it.

ONNX Runtime answers a request for CUDA that it cannot meet with a CPU session and a line on stderr. Here an
explicit `cuda` that is not given raises, `auto` says why it fell back, and nothing changes device after that.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceUnavailableError, ModelFormatError, RequestError

if TYPE_CHECKING:
    import onnxruntime

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
DEVICES = ("auto", "cuda", "cpu")

# An fp32 graph computes in fp32: TF32, on by default on recent GPUs, would move the logits away from the ones
# the patch was probed with.
_CUDA_OPTIONS = {"use_tf32": "0"}

# What is decided elsewhere, and where: an option would contradict it.
_DECIDED = {
    "device_id": "choose the GPU with the environment variable CUDA_VISIBLE_DEVICES",
    "enable_cuda_graph": "use cuda_graphs=True",
    "user_compute_stream": "the runtime's buffers belong to the provider's own stream",
    "has_user_compute_stream": "the runtime's buffers belong to the provider's own stream",
}

_FIX_LIBRARIES = (
    "install NVIDIA's libraries with pip install 'tp-runtime[gpu]' and check the driver with nvidia-smi, "
    "or use device='auto' or 'cpu'"
)
_FIX_PACKAGE = (
    "pip uninstall onnxruntime, then pip install 'tp-runtime[gpu]' (the two packages cannot share an "
    "environment), or use device='cpu'"
)

# ONNX Runtime's words for a graph it cannot read; its other exceptions can be the device's fault as well.
_GRAPH_FAULTS = frozenset(
    {"InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NoModel", "NoSuchFile", "NotImplemented"}
)

# ONNX Runtime's names of memory that the CPU's kernels read.
_HOST_MEMORY = frozenset({"Cpu", "CudaPinned"})

_SEVERITY_ERROR = 3
_PRELOAD_FAILURE = "Failed to load"

_preload_lock = threading.Lock()


@dataclass(frozen=True)
class Device:
    """Where a session runs.

    Attributes:
        requested: what the caller asked for, one of `DEVICES`.
        provider: the ONNX Runtime execution provider in use, `CUDA` or `CPU`.
        reason: why CUDA was not given to `auto`; before the session exists, what loading CUDA's libraries
            complained about; None where there is nothing to say.
    """

    requested: str
    provider: str
    reason: str | None = None

    @property
    def kind(self) -> str:
        """`cuda` or `cpu`, as IO binding and `OrtValue` name it."""
        return "cuda" if self.provider == CUDA else "cpu"


def require_onnxruntime() -> Any:
    """Imports ONNX Runtime once it is clear that exactly one build of it is installed.

    Returns:
        The `onnxruntime` module.

    Raises:
        DeviceUnavailableError: no build is installed, two overwrite each other, or the one there cannot be
            imported.
    """
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(found) == 2:
        raise DeviceUnavailableError(
            "two builds of ONNX Runtime share one folder, each overwrote parts of the other",
            field="onnxruntime",
            got=" and ".join(found),
            wanted="one of them",
            fix="pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'tp-runtime[cpu]' or 'tp-runtime[gpu]'",
        )
    # A vendor's build (OpenVINO, QNN, one's own) has another distribution name and is as good for the CPU.
    if not found and not _is_importable("onnxruntime"):
        raise DeviceUnavailableError(
            "ONNX Runtime is not installed",
            field="onnxruntime",
            wanted="onnxruntime or onnxruntime-gpu",
            fix="pip install 'tp-runtime[cpu]', or pip install 'tp-runtime[gpu]' for CUDA",
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceUnavailableError(
            f"ONNX Runtime is installed but cannot be imported: {error}",
            field="onnxruntime",
            fix="pip install --force-reinstall " + (found[0] if found else "the build you use"),
        ) from error


def select_device(requested: str) -> Device:
    """Chooses the device to ask ONNX Runtime for; only `check_providers` knows whether it was given.

    Args:
        requested: `auto`, `cuda` or `cpu`.

    Returns:
        The device to create the session with.

    Raises:
        DeviceUnavailableError: an unknown name, no usable ONNX Runtime, or `cuda` on a build without it.
    """
    if requested not in DEVICES:
        raise DeviceUnavailableError(
            "unknown device", field="device", got=repr(requested), wanted="one of " + ", ".join(DEVICES)
        )
    ort = require_onnxruntime()
    if requested == "cpu":
        return Device(requested, CPU)
    # Before the question below: newer builds register CUDA as a plugin once its libraries are loaded.
    complaint = _preload_cuda(ort)
    if CUDA in ort.get_available_providers():
        return Device(requested, CUDA, complaint)
    reason = complaint or "the installed build of ONNX Runtime has no CUDA provider"
    return _without_cuda(requested, reason, _FIX_LIBRARIES if complaint else _FIX_PACKAGE)


def check_providers(session_providers: list[str], device: Device) -> Device:
    """Compares what a session runs on with what it was asked to run on.

    Args:
        session_providers: `session.get_providers()`.
        device: the device the session was created for.

    Returns:
        The device the session is on, with the reason where `auto` fell back to the CPU.

    Raises:
        DeviceUnavailableError: `cuda` was asked for explicitly and the session has no CUDA provider.
    """
    if device.provider == CPU:
        return device
    if CUDA in session_providers:
        return replace(device, reason=None)
    reason = device.reason or "the CUDA provider did not start; ONNX Runtime's lines on stderr say why"
    return _without_cuda(device.requested, reason, _FIX_LIBRARIES)


def check_cuda_options(options: Mapping[str, object] | None) -> dict[str, str]:
    """Options of the CUDA provider as it takes them: text.

    Raises:
        RequestError: no mapping from names to texts or numbers, or one that is decided elsewhere.
    """
    checked = {}
    for name, value in (options or {}).items():
        if name in _DECIDED:
            raise RequestError("not an option of a session", field="cuda_options", got=name, fix=_DECIDED[name])
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, str | int):
            raise RequestError(
                "not an option of the CUDA provider",
                field="cuda_options",
                got=f"{name!r}: {value!r}",
                wanted="a name with a text or a whole number",
                fix="write on and off as 1 and 0; ONNX Runtime's documentation has the names",
            )
        checked[name] = str(value)
    return checked


def create_session(
    model_path: str | Path,
    device: Device,
    session_options: onnxruntime.SessionOptions,
    cuda_graphs: bool = False,
    cuda_options: Mapping[str, str] | None = None,
) -> tuple[onnxruntime.InferenceSession, Device]:
    """Creates a session on a device and checks that it is there.

    Warnings of this session are dropped unless `session_options.log_severity_level` was set.

    Args:
        model_path: the ONNX file.
        device: what `select_device` returned.
        session_options: left as they were found.
        cuda_graphs: on CUDA, a session whose runs can be captured (cuda_graphs.py says what that asks of every run).
        cuda_options: of the CUDA provider, as `check_cuda_options` returns them; without CUDA they mean nothing.

    Returns:
        The session and the device it is on.

    Raises:
        DeviceUnavailableError: `cuda` was asked for explicitly and not given.
        ModelFormatError: ONNX Runtime cannot read the graph.
    """
    ort = require_onnxruntime()
    if device.provider == CUDA:
        cuda = {**_CUDA_OPTIONS, **(cuda_options or {}), **({"enable_cuda_graph": "1"} if cuda_graphs else {})}
        try:
            session = _new_session(ort, model_path, [(CUDA, cuda), CPU], session_options)
        except Exception as error:
            if type(error).__name__ in _GRAPH_FAULTS:
                raise _unreadable_graph(model_path, error) from error
            device = _without_cuda(device.requested, _one_line(error), _FIX_LIBRARIES, cause=error)
        else:
            return session, check_providers(session.get_providers(), device)
    try:
        return _new_session(ort, model_path, [CPU], session_options), device
    except Exception as error:
        if type(error).__name__ in _GRAPH_FAULTS | {"Fail"}:
            raise _unreadable_graph(model_path, error) from error
        raise


def input_kinds(session: Any, device: Device) -> dict[str, str]:
    """Where the nodes that read them want the graph's inputs: `cpu` or `cuda`, by name.

    A provider runs the nodes it has kernels for, and what is bound anywhere else is copied when it is bound, once: a
    buffer that later runs write to would be read as it was then.
    """
    names = [value.name for value in session.get_inputs()]
    if device.kind == "cpu":
        return dict.fromkeys(names, "cpu")
    kinds = ("cpu" if info.name in _HOST_MEMORY else "cuda" for info in session.get_input_memory_infos())
    return dict(zip(names, kinds, strict=True))


def _new_session(ort: Any, model_path: str | Path, providers: list[Any], options: Any) -> Any:
    # ONNX Runtime warns, once per initializer, that one which is also a graph input will not be folded: one
    # long line per tensor and slot, all of them meant to be overridden. To silence that line alone, tried
    # with 1.23 and 1.32:
    #   - the severity has no filter by message, and RunOptions cannot lower it again for a run;
    #   - set_default_logger_callback (not in 1.31, in 1.32) could filter, but it is process-wide and has no
    #     getter: it would throw away the application's own callback and default severity, for good;
    #   - redirecting file descriptor 2 delays other threads' stderr, and a crash while loading loses it.
    # So: warnings only, of this session only. Errors, and what CUDA says when it fails to start (through the
    # process's logger), still reach stderr. Whoever sets a severity gets that one, and the warning with it.
    severity = options.log_severity_level
    if severity < 0:
        options.log_severity_level = _SEVERITY_ERROR
    try:
        # Fallback off: with it, a failing CUDA session prints a banner and becomes a CPU one, even in run().
        return ort.InferenceSession(str(model_path), sess_options=options, providers=providers, enable_fallback=0)
    finally:
        options.log_severity_level = severity


def _preload_cuda(ort: Any) -> str | None:
    """Loads CUDA's and cuDNN's libraries from NVIDIA's wheels; returns what could not be loaded, or None."""
    if not hasattr(ort, "preload_dlls"):
        return None
    said = io.StringIO()
    # It prints its failures and raises nothing. sys.stdout belongs to the process: one thread at a time.
    with _preload_lock, contextlib.redirect_stdout(said):
        ort.preload_dlls()
    lines = said.getvalue().splitlines()
    for line in lines:
        if not line.startswith(_PRELOAD_FAILURE):
            print(line, file=sys.stderr)
    return "; ".join(line for line in lines if line.startswith(_PRELOAD_FAILURE)) or None


def _without_cuda(requested: str, reason: str, fix: str, cause: Exception | None = None) -> Device:
    if requested == "cuda":
        raise DeviceUnavailableError(
            f"CUDA was asked for and not given: {reason}", field="device", got=CPU, wanted=CUDA, fix=fix
        ) from cause
    return Device(requested, CPU, reason)


def _unreadable_graph(model_path: str | Path, error: Exception) -> ModelFormatError:
    return ModelFormatError(
        "ONNX Runtime cannot load this graph",
        field=Path(model_path).name,
        got=_one_line(error),
        fix="export the model again with tp-export, or update ONNX Runtime if the graph is newer than it",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _is_importable(module: str) -> bool:
    # A folder left behind by an uninstall imports as an empty namespace package: it has no origin.
    spec = util.find_spec(module)
    return spec is not None and spec.origin is not None
