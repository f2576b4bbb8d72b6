"""Devices: what is asked for is given, or refused, or fallen back from with a reason.

CUDA is simulated: a fake onnxruntime answers as the real one was seen to answer without CUDA's libraries.
"""

from __future__ import annotations

import subprocess
import sys
import types
from importlib import metadata, util

import numpy as np
import onnxruntime
import pytest

from runtime_tests.committed import GRAPHS
from tp_runtime.errors import DeviceUnavailableError, ModelFormatError, RequestError
from tp_runtime.session import device as device_module
from tp_runtime.session import require_onnxruntime
from tp_runtime.session.device import (
    CPU,
    CUDA,
    Device,
    check_cuda_options,
    check_providers,
    create_session,
    input_kinds,
    select_device,
)

MISSING = "Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file"


class EPFail(Exception):
    """Named as ONNX Runtime names a provider's failure."""


class InvalidProtobuf(Exception):
    """Named as ONNX Runtime names an unreadable graph."""


class FakeRuntime(types.SimpleNamespace):
    """A GPU build: `printed` while preloading, `given` to sessions, `fault` while creating them."""

    def __init__(self, printed="", given=(CUDA, CPU), available=(CUDA, CPU), fault=None):
        super().__init__(asked=[], printed=printed, given=given, available=available, fault=fault)

    def preload_dlls(self):
        print(self.printed)

    def get_available_providers(self):
        return list(self.available)

    def InferenceSession(self, path, sess_options, providers, enable_fallback):
        assert enable_fallback == 0
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        self.asked.append(names)
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


# The start-up check.


def test_one_build_installed():
    assert require_onnxruntime() is onnxruntime


def test_no_build_installed(monkeypatch):
    _installed(monkeypatch)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailableError, match=r"pip install 'tp-runtime\[cpu\]'.*\[gpu\]"):
        require_onnxruntime()


def test_folder_left_by_an_uninstall_is_no_build(monkeypatch):
    _installed(monkeypatch)
    monkeypatch.setattr(util, "find_spec", lambda name: types.SimpleNamespace(origin=None))
    with pytest.raises(DeviceUnavailableError, match="is not installed"):
        require_onnxruntime()


def test_vendor_build_is_accepted(monkeypatch):
    _installed(monkeypatch)
    assert require_onnxruntime() is onnxruntime


def test_both_builds_installed(monkeypatch):
    _installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(DeviceUnavailableError, match="pip uninstall -y onnxruntime onnxruntime-gpu, then"):
        require_onnxruntime()


def test_broken_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceUnavailableError, match=r"cannot be imported.*--force-reinstall onnxruntime"):
        require_onnxruntime()


# Asking.


@pytest.mark.parametrize("name", ["gpu", "CUDA", "", "cuda:1"])
def test_unknown_device(name):
    with pytest.raises(DeviceUnavailableError, match="wanted one of auto, cuda, cpu"):
        select_device(name)


def test_cpu_needs_no_reason():
    assert select_device("cpu") == Device("cpu", CPU, None)


def test_cuda_on_the_cpu_build():
    with pytest.raises(DeviceUnavailableError, match=r"has no CUDA provider.*pip uninstall onnxruntime, then"):
        select_device("cuda")


def test_auto_on_the_cpu_build():
    device = select_device("auto")
    assert (device.provider, device.kind) == (CPU, "cpu")
    assert "no CUDA provider" in device.reason


def test_a_cpu_build_is_not_asked_to_load_the_libraries(fake, capsys):
    """Before 1.24 it answers with a warning."""
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


# Getting.


def _create(device):
    return create_session("model.onnx", device, onnxruntime.SessionOptions())[1]


def test_cuda_given(fake):
    runtime = fake()
    device = _create(select_device("cuda"))
    assert device == Device("cuda", CUDA, None)
    assert device.kind == "cuda"
    assert runtime.asked == [[CUDA, CPU]]


def test_options_of_the_provider(fake):
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
    ("options", "said"),
    [
        ({"device_id": 1}, "CUDA_VISIBLE_DEVICES"),
        ({"enable_cuda_graph": "1"}, "cuda_graphs=True"),
        ({"use_tf32": True}, "on and off as 1 and 0"),
        ({"gpu_mem_limit": None}, "whole number"),
        ({3: "1"}, "a name"),
    ],
)
def test_options_that_are_none_or_decided_elsewhere(options, said):
    with pytest.raises(RequestError, match=said) as error:
        check_cuda_options(options)
    assert error.value.field == "cuda_options"


def test_complaint_about_an_unneeded_library_is_dropped_once_cuda_runs(fake):
    fake(printed=MISSING)
    assert _create(select_device("auto")) == Device("auto", CUDA, None)


def test_cuda_asked_for_and_not_given(fake):
    fake(printed=MISSING, given=(CPU,))
    with pytest.raises(DeviceUnavailableError, match="libcublasLt") as caught:
        _create(select_device("cuda"))
    assert caught.value.got == CPU and caught.value.wanted == CUDA and caught.value.fix


def test_auto_falls_back_with_the_reason(fake):
    fake(printed=MISSING, given=(CPU,))
    assert _create(select_device("auto")) == Device("auto", CPU, MISSING)


def test_auto_falls_back_when_nothing_was_said():
    device = check_providers([CPU], Device("auto", CUDA))
    assert device.provider == CPU and "stderr" in device.reason


def test_cuda_that_fails_while_creating(fake):
    fake(fault=EPFail("CUDA failure 35:\n driver too old"))
    with pytest.raises(DeviceUnavailableError, match="CUDA failure 35: driver too old"):
        _create(select_device("cuda"))


def test_auto_creates_again_on_the_cpu(fake):
    runtime = fake(fault=EPFail("CUDA failure 35"))
    assert _create(select_device("auto")) == Device("auto", CPU, "CUDA failure 35")
    assert runtime.asked == [[CUDA, CPU], [CPU]]


def test_unreadable_graph_is_not_the_devices_fault(fake):
    runtime = fake(fault=InvalidProtobuf("Protobuf parsing failed."))
    with pytest.raises(ModelFormatError, match="Protobuf parsing failed"):
        _create(select_device("auto"))
    assert runtime.asked == [[CUDA, CPU]]


def test_inputs_are_wanted_where_their_nodes_run():
    """Attention in float32 falls to the CPU while the rest of the graph is on CUDA."""
    wanted = {"input_ids": "Cuda", "past_key_values.0.key": "Cpu", "mask": "CudaPinned", "x": "a later provider's"}
    session = types.SimpleNamespace(
        get_inputs=lambda: [types.SimpleNamespace(name=name) for name in wanted],
        get_input_memory_infos=lambda: [types.SimpleNamespace(name=name) for name in wanted.values()],
    )
    kinds = {"input_ids": "cuda", "past_key_values.0.key": "cpu", "mask": "cpu", "x": "cuda"}
    assert input_kinds(session, Device("cuda", CUDA)) == kinds


# The real ONNX Runtime.


@pytest.fixture
def graph():
    """x + x @ a @ b with overridable rank-0 a and b, and an unused initializer to be warned of."""
    return GRAPHS / "slots.onnx"


def test_slot_warning_is_silent_and_options_are_left_alone(graph, capfd):
    options = onnxruntime.SessionOptions()
    before = options.log_severity_level
    session, device = create_session(graph, select_device("cpu"), options)
    x = np.ones((1, 2, 4), np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], x)
    assert device == Device("cpu", CPU)
    assert set(input_kinds(session, device).values()) == {"cpu"}
    assert options.log_severity_level == before
    assert "appears in graph inputs" not in capfd.readouterr().err


def test_a_severity_that_was_set_is_kept(graph, capfd):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    create_session(graph, select_device("cpu"), options)
    said = capfd.readouterr().err
    assert said.count("appears in graph inputs") == 2
    assert "Removing initializer 'unused'" in said


def test_errors_of_the_session_still_reach_stderr(capfd):
    """A node that fails while running is logged at ERROR, which stays on."""
    session, _ = create_session(GRAPHS / "breaks.onnx", select_device("cpu"), onnxruntime.SessionOptions())
    with pytest.raises(Exception, match="reshape"):
        session.run(None, {"x": np.ones(3, np.float32), "shape": np.array([2])})
    assert "breaks" in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"", b"hello world"], ids=["empty", "junk"])
def test_broken_graph(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"^model.onnx: ONNX Runtime cannot load this graph"):
        create_session(tmp_path / "model.onnx", select_device("cpu"), onnxruntime.SessionOptions())


def test_importing_the_module_imports_no_runtime():
    """The start-up check can only name the fix if nothing imports ONNX Runtime before it."""
    code = "import sys, tp_runtime.session; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
