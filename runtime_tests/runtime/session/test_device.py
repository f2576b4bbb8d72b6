"""Devices: a request for a device is granted, refused, or answered with the CPU and a reason.

CUDA is simulated: a fake onnxruntime behaves as the real one was observed to behave without CUDA's libraries.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from importlib import metadata, util

import numpy as np
import onnxruntime
import pytest

from runtime_tests.committed import GRAPHS
from tp_runtime.errors import DeviceUnavailableError, ModelFormatError, RequestError
from tp_runtime.session import Graph, ModelFolder, require_onnxruntime
from tp_runtime.session import device as device_module
from tp_runtime.session.device import (
    CPU,
    CUDA,
    Device,
    check_cuda_options,
    check_providers,
    create_session,
    cuda_is_expected,
    input_kinds,
    select_device,
)

MISSING = "Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file"


class EPFail(Exception):
    """An error with the name that ONNX Runtime gives to a provider's failure."""


class InvalidProtobuf(Exception):
    """An error with the name that ONNX Runtime gives to an unreadable graph."""


class FakeRuntime(types.SimpleNamespace):
    """A fake GPU build of onnxruntime.

    Args:
        printed: the text that the build prints while it preloads CUDA's libraries.
        given: the providers that a session can get.
        available: the providers that the build lists.
        fault: the error that creating a session with CUDA raises; None if there is none.
    """

    def __init__(self, printed="", given=(CUDA, CPU), available=(CUDA, CPU), fault=None):
        super().__init__(requested=[], printed=printed, given=given, available=available, fault=fault)

    def preload_dlls(self):
        print(self.printed)

    def get_available_providers(self):
        return list(self.available)

    def InferenceSession(self, path, sess_options, providers, enable_fallback):
        assert enable_fallback == 0
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        self.requested.append(names)
        self.options = dict(provider for provider in providers if not isinstance(provider, str))
        if self.fault and CUDA in names:
            raise self.fault
        given = [name for name in names if name in self.given]
        return types.SimpleNamespace(get_providers=lambda: given)


@pytest.fixture
def fake(monkeypatch):
    def install(**how):
        runtime = FakeRuntime(**how)
        monkeypatch.setattr(device_module, "require_onnxruntime", lambda: runtime)
        return runtime

    return install


def _installed(monkeypatch, *names):
    def version(name):
        if name in names:
            return "1.32.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(device_module, "_is_described", lambda name: name in names)


# -- the start-up check --------------------------------------------------------------------------------------


def test_one_installed_build_is_used():
    assert require_onnxruntime() is onnxruntime


def test_no_installed_build_is_an_error_with_the_fix(monkeypatch):
    _installed(monkeypatch)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailableError, match=r"pip install 'tp-runtime\[cpu\]'.*\[gpu\]"):
        require_onnxruntime()


def test_a_folder_left_by_an_uninstall_does_not_count_as_a_build(monkeypatch):
    _installed(monkeypatch)
    monkeypatch.setattr(util, "find_spec", lambda name: types.SimpleNamespace(origin=None))
    with pytest.raises(DeviceUnavailableError, match="is not installed"):
        require_onnxruntime()


def test_descriptions_are_looked_for_on_python_s_path(monkeypatch, tmp_path):
    assert device_module._is_described("onnxruntime") or device_module._is_described("onnxruntime-gpu")
    assert not device_module._is_described("onnxruntime-tpu")
    (tmp_path / "onnxruntime_tpu-1.32.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert device_module._is_described("onnxruntime-tpu")


def test_a_vendor_build_is_accepted(monkeypatch):
    _installed(monkeypatch)
    assert require_onnxruntime() is onnxruntime


@pytest.mark.parametrize("version", [None, KeyError("Version")])
def test_a_description_left_by_an_uninstall_does_not_count_as_a_build(monkeypatch, version):
    def read(name):
        if name == "onnxruntime":
            return "1.32.0"
        if isinstance(version, Exception):
            raise version
        return version

    monkeypatch.setattr(metadata, "version", read)
    monkeypatch.setattr(device_module, "_is_described", lambda name: True)
    assert require_onnxruntime() is onnxruntime


def test_a_build_without_a_distribution_runs_a_model(monkeypatch, tiny_llama_export):
    """A vendor's build may lie in a folder of PYTHONPATH, or be provided by the application itself."""
    _installed(monkeypatch)
    monkeypatch.setattr(onnxruntime, "__spec__", None)
    assert require_onnxruntime() is onnxruntime
    graph = Graph(ModelFolder.open(tiny_llama_export), "auto")
    assert graph.run([1, 2], graph.base).shape == (2, graph.folder.vocab_size)


def test_two_installed_builds_are_an_error_with_the_fix(monkeypatch):
    _installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(DeviceUnavailableError, match="pip uninstall -y onnxruntime onnxruntime-gpu, then"):
        require_onnxruntime()


def test_a_broken_build_is_an_error_with_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceUnavailableError, match=r"cannot be imported.*--force-reinstall onnxruntime"):
        require_onnxruntime()


# -- selecting a device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "CUDA", "", "cuda:1"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(DeviceUnavailableError, match="wanted one of auto, cuda, cpu"):
        select_device(name)


def test_a_requested_cpu_has_no_reason():
    assert select_device("cpu") == Device("cpu", CPU, None)


def test_cuda_on_the_cpu_build_is_refused():
    with pytest.raises(DeviceUnavailableError, match=r"has no CUDA provider.*pip uninstall onnxruntime, then"):
        select_device("cuda")


@pytest.mark.parametrize(
    ("build", "driver", "tool", "expected"),
    [("", False, False, False), ("12.8", False, False, True), ("", True, False, True), ("", False, True, True)],
)
def test_cuda_is_expected_with_a_cuda_build_or_a_gpu(monkeypatch, tmp_path, build, driver, tool, expected):
    """A machine with a GPU and the CPU build has most likely the wrong package."""
    monkeypatch.setattr(device_module, "require_onnxruntime", lambda: types.SimpleNamespace(cuda_version=build))
    monkeypatch.setattr(device_module, "_NVIDIA", (str(tmp_path if driver else tmp_path / "none"),))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if tool else None)
    assert cuda_is_expected() is expected


def test_auto_on_the_cpu_build_is_the_cpu_with_a_reason():
    device = select_device("auto")
    assert (device.provider, device.kind) == (CPU, "cpu")
    assert "no CUDA provider" in device.reason


def test_a_cpu_build_is_not_asked_to_load_the_libraries(fake, capsys):
    """ONNX Runtime before 1.24 would print a warning."""
    fake(printed="WARNING: onnxruntime is not built with CUDA 12.x support.", available=(CPU,)).cuda_version = ""
    assert "no CUDA provider" in select_device("auto").reason
    assert capsys.readouterr().err == ""


def test_library_failures_become_the_reason(fake, capsys):
    fake(printed=f"{MISSING}\nPlease follow the guide.", available=(CPU,))
    assert select_device("auto") == Device("auto", CPU, MISSING)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Please follow the guide.\n")
    with pytest.raises(DeviceUnavailableError, match=r"libcublasLt.*nvidia-smi"):
        select_device("cuda")


# -- creating a session --------------------------------------------------------------------------------------


def _create(device):
    return create_session("model.onnx", device, onnxruntime.SessionOptions())[1]


def test_requested_cuda_is_granted(fake):
    runtime = fake()
    device = _create(select_device("cuda"))
    assert device == Device("cuda", CUDA, None)
    assert device.kind == "cuda"
    assert runtime.requested == [[CUDA, CPU]]


def test_cuda_options_reach_the_provider(fake):
    runtime = fake()
    options = check_cuda_options({"gpu_mem_limit": 2**31, "arena_extend_strategy": "kSameAsRequested"})
    create_session("model.onnx", select_device("cuda"), onnxruntime.SessionOptions(), False, options)
    assert runtime.options[CUDA] == {
        "use_tf32": "0",
        "gpu_mem_limit": "2147483648",
        "arena_extend_strategy": "kSameAsRequested",
    }
    assert check_cuda_options(None) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_id": 1}, "CUDA_VISIBLE_DEVICES"),
        ({"enable_cuda_graph": "1"}, "cuda_graphs=True"),
        ({"use_tf32": True}, "on and off as 1 and 0"),
        ({"gpu_mem_limit": None}, "whole number"),
        ({3: "1"}, "a name"),
    ],
)
def test_cuda_options_that_are_invalid_or_set_elsewhere_are_refused(options, message):
    with pytest.raises(RequestError, match=message) as error:
        check_cuda_options(options)
    assert error.value.field == "cuda_options"


def test_a_missing_library_is_not_reported_if_cuda_works_without_it(fake):
    fake(printed=MISSING)
    assert _create(select_device("auto")) == Device("auto", CUDA, None)


def test_requested_cuda_that_is_not_granted_is_an_error(fake):
    fake(printed=MISSING, given=(CPU,))
    with pytest.raises(DeviceUnavailableError, match="libcublasLt") as caught:
        _create(select_device("cuda"))
    assert caught.value.got == CPU and caught.value.wanted == CUDA and caught.value.fix


def test_auto_falls_back_with_the_reason(fake):
    fake(printed=MISSING, given=(CPU,))
    assert _create(select_device("auto")) == Device("auto", CPU, MISSING)


def test_auto_falls_back_without_a_printed_reason():
    device = check_providers([CPU], Device("auto", CUDA))
    assert device.provider == CPU and "stderr" in device.reason


def test_cuda_that_fails_while_a_session_is_created_is_an_error(fake):
    fake(fault=EPFail("CUDA failure 35:\n driver too old"))
    with pytest.raises(DeviceUnavailableError, match="CUDA failure 35: driver too old"):
        _create(select_device("cuda"))


def test_auto_creates_the_session_again_on_the_cpu(fake):
    runtime = fake(fault=EPFail("CUDA failure 35"))
    assert _create(select_device("auto")) == Device("auto", CPU, "CUDA failure 35")
    assert runtime.requested == [[CUDA, CPU], [CPU]]


def test_an_unreadable_graph_is_not_blamed_on_the_device(fake):
    runtime = fake(fault=InvalidProtobuf("Protobuf parsing failed."))
    with pytest.raises(ModelFormatError, match="Protobuf parsing failed"):
        _create(select_device("auto"))
    assert runtime.requested == [[CUDA, CPU]]


def test_inputs_belong_on_the_device_that_reads_them():
    """Attention in float32 runs on the CPU while the rest of the graph runs on CUDA."""
    wanted = {"input_ids": "Cuda", "past_key_values.0.key": "Cpu", "mask": "CudaPinned", "x": "a later provider's"}
    session = types.SimpleNamespace(
        get_inputs=lambda: [types.SimpleNamespace(name=name) for name in wanted],
        get_input_memory_infos=lambda: [types.SimpleNamespace(name=name) for name in wanted.values()],
    )
    kinds = {"input_ids": "cuda", "past_key_values.0.key": "cpu", "mask": "cpu", "x": "cuda"}
    assert input_kinds(session, Device("cuda", CUDA)) == kinds


# -- the real ONNX Runtime -----------------------------------------------------------------------------------


@pytest.fixture
def graph():
    """The graph x + x @ a @ b with overridable rank-0 a and b, and an unused initializer that causes a warning."""
    return GRAPHS / "slots.onnx"


def test_the_slot_warning_is_silenced_and_the_options_are_not_changed(graph, capfd):
    options = onnxruntime.SessionOptions()
    before = options.log_severity_level
    session, device = create_session(graph, select_device("cpu"), options)
    x = np.ones((1, 2, 4), np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], x)
    assert device == Device("cpu", CPU)
    assert set(input_kinds(session, device).values()) == {"cpu"}
    assert options.log_severity_level == before
    assert "appears in graph inputs" not in capfd.readouterr().err


def test_a_log_severity_of_the_caller_is_kept(graph, capfd):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    create_session(graph, select_device("cpu"), options)
    printed = capfd.readouterr().err
    assert printed.count("appears in graph inputs") == 2
    assert "Removing initializer 'unused'" in printed


def test_errors_of_the_session_still_reach_stderr(capfd):
    """A node that fails while it runs is logged at the level ERROR, which is not silenced."""
    session, _ = create_session(GRAPHS / "breaks.onnx", select_device("cpu"), onnxruntime.SessionOptions())
    with pytest.raises(Exception, match="reshape"):
        session.run(None, {"x": np.ones(3, np.float32), "shape": np.array([2])})
    assert "breaks" in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"", b"hello world"], ids=["empty", "junk"])
def test_a_broken_graph_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"^model.onnx: ONNX Runtime cannot load this graph"):
        create_session(tmp_path / "model.onnx", select_device("cpu"), onnxruntime.SessionOptions())


def test_importing_the_package_does_not_import_onnxruntime():
    """The start-up check can only name the fix if nothing imports ONNX Runtime before it."""
    code = "import sys, tp_runtime.session; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
