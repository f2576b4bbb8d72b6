"""This module chooses the device of a session and checks that the session really runs there.

If ONNX Runtime cannot meet a request for CUDA, it creates a CPU session and prints a line on stderr. This module raises
an error if an explicit `cuda` is not available. It records the reason if `auto` falls back to the CPU. A session does
not change its device after that.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceUnavailableError, ModelFormatError, RequestError, shown
from .description import GRAPH_FILE

if TYPE_CHECKING:
    import onnxruntime

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
DEVICES = ("auto", "cuda", "cpu")

# An fp32 graph computes in fp32: TF32, on by default on recent GPUs, would move the logits away from the ones
# the patch was probed with.
_CUDA_OPTIONS = {"use_tf32": "0"}

# Options that are set in another place, which is named here; setting them twice could contradict.
_SET_ELSEWHERE = {
    "device_id": "choose the GPU with the environment variable CUDA_VISIBLE_DEVICES",
    "enable_cuda_graph": "use cuda_graphs=True",
    "user_compute_stream": "leave it out: the runtime's buffers belong to the provider's own stream",
    "has_user_compute_stream": "leave it out: the runtime's buffers belong to the provider's own stream",
}

_FIX_LIBRARIES = (
    "install NVIDIA's libraries with pip install 'tp-runtime[gpu]' and check the driver with nvidia-smi, "
    "or use device='auto' or 'cpu'"
)
_FIX_PACKAGE = (
    "pip uninstall onnxruntime, then pip install 'tp-runtime[gpu]' (the two packages cannot share an "
    "environment), or use device='cpu'"
)

# The exceptions that ONNX Runtime raises for a graph it cannot read; the device can cause its other exceptions too.
_GRAPH_FAULTS = frozenset(
    {"InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NoModel", "NoSuchFile", "NotImplemented"}
)

# What NVIDIA's driver makes on Linux: on PCs and servers, and on Jetson boards.
_NVIDIA = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/nvmap")

# ONNX Runtime's names for the memory that CPU kernels read.
_HOST_MEMORY = frozenset({"Cpu", "CudaPinned"})

_SEVERITY_ERROR = 3
_PRELOAD_FAILURE = "Failed to load"

_preload_lock = threading.Lock()


@dataclass(frozen=True)
class Device:
    """Where a session runs.

    Attributes:
        requested: the device that the caller asked for, one of `DEVICES`.
        provider: the ONNX Runtime execution provider in use, `CUDA` or `CPU`.
        reason: why `auto` fell back to the CPU; before the session exists, which of CUDA's libraries could not be
            loaded; None if neither applies.
    """

    requested: str
    provider: str
    reason: str | None = None

    @property
    def kind(self) -> str:
        """The device's name in IO bindings and OrtValues: `cuda` or `cpu`."""
        return "cuda" if self.provider == CUDA else "cpu"


def require_onnxruntime() -> Any:
    """Import ONNX Runtime after checking that exactly one build of it is installed.

    Returns:
        The `onnxruntime` module.

    Raises:
        DeviceUnavailableError: no build is installed, two builds overwrite each other, or the installed build cannot
            be imported.
    """
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(found) == 2:
        raise DeviceUnavailableError(
            "two builds of ONNX Runtime are installed in one folder, and each overwrote parts of the other",
            field="onnxruntime",
            got=" and ".join(found),
            wanted="one of them",
            fix="pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'tp-runtime[cpu]' or 'tp-runtime[gpu]'",
        )
    # A vendor's build (OpenVINO, QNN) or a custom build has another distribution name and serves the CPU equally well.
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
    """Choose the device to request from ONNX Runtime; `check_providers` later finds out whether the session got it.

    Args:
        requested: `auto`, `cuda` or `cpu`.

    Returns:
        The device to create the session with.

    Raises:
        DeviceUnavailableError: the name is unknown, there is no usable ONNX Runtime, or `cuda` is requested and the
            build does not have it.
    """
    if not isinstance(requested, str) or requested not in DEVICES:
        raise DeviceUnavailableError(
            "the device is unknown", field="device", got=shown(requested), wanted="one of " + ", ".join(DEVICES)
        )
    ort = require_onnxruntime()
    if requested == "cpu":
        return Device(requested, CPU)
    # The libraries must load before the check below: newer builds register CUDA as a plugin once they are loaded.
    load_failure = _preload_cuda(ort)
    if CUDA in ort.get_available_providers():
        return Device(requested, CUDA, load_failure)
    reason = load_failure or "the installed build of ONNX Runtime has no CUDA provider"
    return _without_cuda(requested, reason, _FIX_LIBRARIES if load_failure else _FIX_PACKAGE)


def cuda_is_expected() -> bool:
    """Return whether this machine is set up for CUDA: it has a CUDA build of ONNX Runtime, or a GPU of NVIDIA's."""
    build = getattr(require_onnxruntime(), "cuda_version", "") or ""
    return bool(build) or any(os.path.exists(path) for path in _NVIDIA) or shutil.which("nvidia-smi") is not None


def check_providers(session_providers: list[str], device: Device) -> Device:
    """Compare the providers of a session with the device it was created for.

    Args:
        session_providers: the result of `session.get_providers()`.
        device: the device the session was created for.

    Returns:
        The device the session is on, with the reason if `auto` fell back to the CPU.

    Raises:
        DeviceUnavailableError: `cuda` was requested explicitly, and the session has no CUDA provider.
    """
    if device.provider == CPU:
        return device
    if CUDA in session_providers:
        return replace(device, reason=None)
    reason = device.reason or "the CUDA provider did not start; ONNX Runtime printed the reason on stderr"
    return _without_cuda(device.requested, reason, _FIX_LIBRARIES)


def check_cuda_options(options: Mapping[str, object] | None) -> dict[str, str]:
    """Return the options of the CUDA provider in the form that it accepts: names and values are strings.

    Raises:
        RequestError: `options` is not a mapping, a name is not a string, a value is not a string or a whole number, or
            an option must be set in another place.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise RequestError(
            "the value is not a mapping of options", field="cuda_options", got=shown(options), wanted="a dict, or None"
        )
    checked = {}
    for name, value in options.items():
        if name in _SET_ELSEWHERE:
            raise RequestError(
                "this option cannot be set here", field="cuda_options", got=name, fix=_SET_ELSEWHERE[name]
            )
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, str | int):
            raise RequestError(
                "the name or the value of an option has the wrong type",
                field="cuda_options",
                got=f"{shown(name)}: {shown(value)}",
                wanted="a name with a string or a whole number",
                fix="write on and off as 1 and 0, and look up the names in ONNX Runtime's documentation",
            )
        checked[name] = str(value)
    return checked


def create_session(
    model: bytes | str | Path,
    device: Device,
    session_options: onnxruntime.SessionOptions,
    cuda_graphs: bool = False,
    cuda_options: Mapping[str, str] | None = None,
) -> tuple[onnxruntime.InferenceSession, Device]:
    """Create a session on a device and check that the session runs there.

    The session's warnings are not printed unless the caller set `session_options.log_severity_level`.

    Args:
        model: the ONNX file's path, or its bytes; see GraphFile.model.
        device: the result of `select_device`.
        session_options: the session's options; they are the same after the call.
        cuda_graphs: on CUDA, create a session whose runs can be captured; cuda_graphs.py describes what every run of
            such a session has to do.
        cuda_options: the options of the CUDA provider, as `check_cuda_options` returns them; ignored without CUDA.

    Returns:
        The session and the device it is on.

    Raises:
        DeviceUnavailableError: `cuda` was requested explicitly and is not available.
        ModelFormatError: ONNX Runtime cannot read the graph.
    """
    ort = require_onnxruntime()
    if device.provider == CUDA:
        cuda = {**_CUDA_OPTIONS, **(cuda_options or {}), **({"enable_cuda_graph": "1"} if cuda_graphs else {})}
        try:
            session = _new_session(ort, model, [(CUDA, cuda), CPU], session_options)
        except Exception as error:
            if type(error).__name__ in _GRAPH_FAULTS:
                raise _unreadable_graph(model, error) from error
            device = _without_cuda(device.requested, _one_line(error), _FIX_LIBRARIES, cause=error)
        else:
            return session, check_providers(session.get_providers(), device)
    try:
        return _new_session(ort, model, [CPU], session_options), device
    except Exception as error:
        if type(error).__name__ in _GRAPH_FAULTS | {"Fail"}:
            raise _unreadable_graph(model, error) from error
        raise


def avoid_float16_crash(ort: Any, session_options: onnxruntime.SessionOptions) -> None:
    """Change the options of a session over a float16 graph so that ONNX Runtime before 1.30 can open it on the CPU.

    These versions crash where they replace a float16 initializer that is also a graph input by a float32 one (1.24.1 to
    1.29.0 were tried). Without the replacement they convert the weights in every run instead.
    """
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < (1, 30):
        session_options.add_session_config_entry(
            "optimization.disable_specified_optimizers", "FuseFp16InitializerToFp32NodeTransformer"
        )


def input_kinds(session: Any, device: Device) -> dict[str, str]:
    """Return for each graph input the device on which the nodes that read it run: `cpu` or `cuda`, by input name.

    A provider runs only the nodes it has kernels for. A value that is bound on another device is copied once, when it
    is bound. If later runs write to such a buffer, the nodes would still read the old copy.
    """
    names = [value.name for value in session.get_inputs()]
    if device.kind == "cpu":
        return dict.fromkeys(names, "cpu")
    kinds = ("cpu" if info.name in _HOST_MEMORY else "cuda" for info in session.get_input_memory_infos())
    return dict(zip(names, kinds, strict=True))


def _new_session(ort: Any, model: bytes | str | Path, providers: list[Any], options: Any) -> Any:
    # ONNX Runtime warns once per initializer that an initializer which is also a graph input will not be folded. That
    # is one long line per tensor and slot, and all of these tensors are meant to be overridden. These methods of
    # silencing only that line were tried with 1.23 and 1.32:
    #   - the severity has no filter by message, and RunOptions cannot lower it again for a run;
    #   - set_default_logger_callback (not in 1.31, in 1.32) could filter, but it is process-wide and has no
    #     getter: it would discard the application's own callback and default severity permanently;
    #   - redirecting file descriptor 2 delays other threads' stderr, and a crash while loading loses it.
    # So this function drops all warnings of this session, and nothing else. Errors still reach stderr, and so do the
    # messages of CUDA when it fails to start, which go through the process's logger. A caller that sets a severity gets
    # that severity, and with it the warning.
    severity = options.log_severity_level
    if severity < 0:
        options.log_severity_level = _SEVERITY_ERROR
    try:
        # The fallback is off: with it, a failing CUDA session prints a banner and becomes a CPU session, even in run().
        source = model if isinstance(model, bytes) else str(model)
        return ort.InferenceSession(source, sess_options=options, providers=providers, enable_fallback=0)
    finally:
        options.log_severity_level = severity


def _preload_cuda(ort: Any) -> str | None:
    """Load CUDA's and cuDNN's libraries from NVIDIA's wheels; return the failures as one line, or None."""
    # A CPU build has nothing to load, and before 1.24 its preload_dlls prints a warning about that.
    if not hasattr(ort, "preload_dlls") or getattr(ort, "cuda_version", None) == "":
        return None
    printed = io.StringIO()
    # preload_dlls prints its failures and raises nothing. The lock is needed because all threads share sys.stdout.
    with _preload_lock, contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    lines = printed.getvalue().splitlines()
    for line in lines:
        if not line.startswith(_PRELOAD_FAILURE):
            print(line, file=sys.stderr)
    return "; ".join(line for line in lines if line.startswith(_PRELOAD_FAILURE)) or None


def _without_cuda(requested: str, reason: str, fix: str, cause: Exception | None = None) -> Device:
    if requested == "cuda":
        raise DeviceUnavailableError(
            f"CUDA was asked for but is not available: {reason}", field="device", got=CPU, wanted=CUDA, fix=fix
        ) from cause
    return Device(requested, CPU, reason)


def _unreadable_graph(model: bytes | str | Path, error: Exception) -> ModelFormatError:
    return ModelFormatError(
        "ONNX Runtime cannot load this graph",
        field=GRAPH_FILE if isinstance(model, bytes) else Path(model).name,
        got=_one_line(error),
        fix="export the model again with tp-export, or update ONNX Runtime if the graph is newer than it",
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_installed(distribution: str) -> bool:
    try:
        # An uninstall can leave an empty description behind, which has no version.
        return bool(metadata.version(distribution))
    except (metadata.PackageNotFoundError, KeyError):
        return False


def _is_importable(module: str) -> bool:
    try:
        spec = util.find_spec(module)
    except ValueError:  # it is imported, but not from a file: an application provides it
        return True
    # A folder that an uninstall left behind imports as an empty namespace package, which has no origin.
    return spec is not None and spec.origin is not None
