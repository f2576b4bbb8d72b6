"""A request for captured decode: where it is refused, and what replaces it if CUDA cannot capture the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.logits import furthest, graph_logits
from tp_runtime.errors import DeviceUnavailableError, RequestError
from tp_runtime.session import Graph, open_session
from tp_runtime.session import cuda_graphs as cuda_graphs
from tp_runtime.session.device import CUDA, Device

from .conftest import CLOSE, IDS, STEPS


def test_captured_graphs_on_the_cpu_are_refused(plain: Graph) -> None:
    with pytest.raises(DeviceUnavailableError, match=r"cuda_graphs.*Fix: leave cuda_graphs out"):
        Graph(plain.folder, "cpu", cuda_graphs=True)
    # The request needs CUDA, so it does not fall back.
    with pytest.raises(DeviceUnavailableError, match="has no CUDA provider"):
        Graph(plain.folder, "auto", cuda_graphs=True)
    with pytest.raises(DeviceUnavailableError, match="the device is unknown"):
        Graph(plain.folder, "tpu", cuda_graphs=True)


def test_captured_graphs_of_a_graph_that_concatenates_are_refused(plain: Graph) -> None:
    with pytest.raises(RequestError, match="optimum route"):
        Graph(replace(plain.folder, route="optimum"), "auto", cuda_graphs=True)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[bool]]:
    """A function that makes CUDA available, with a CPU session underneath.

    Its argument is the exception that refuses a session with captured steps, or None. It returns the list of the
    `cuda_graphs` flags that sessions were requested with.
    """

    def install(refusal: Exception | None) -> list[bool]:
        requested: list[bool] = []
        real = open_session.create_session

        def create(path: Path, device: Device, options: Any, cuda_graphs: bool, _cuda_options: Any) -> Any:
            requested.append(cuda_graphs)
            if cuda_graphs and refusal is not None:
                raise DeviceUnavailableError("CUDA was asked for but is not available", field="device") from refusal
            session, _ = real(path, Device("cpu", "CPUExecutionProvider"), options)
            return session, Device("cpu", "CPUExecutionProvider")

        monkeypatch.setattr(open_session, "select_device", lambda name: Device(name, CUDA))
        monkeypatch.setattr(open_session, "create_session", create)
        return requested

    return install


def test_captured_graphs_are_used_on_cuda(plain: Graph, on_cuda: Callable[[Exception | None], list[bool]]) -> None:
    requested = on_cuda(None)
    graph = Graph(plain.folder, "auto", cuda_graphs=True)
    assert requested == [True] and graph.captured is not None and graph.capture_failure is None
    assert furthest(graph_logits(graph, IDS, chunks=STEPS), graph_logits(plain, IDS, chunks=STEPS)) < CLOSE


def test_a_refused_session_is_reported_once_and_replaced_by_an_ordinary_one(
    plain: Graph, on_cuda: Callable[[Exception | None], list[bool]], caplog: pytest.LogCaptureFixture
) -> None:
    requested = on_cuda(RuntimeError("all compute graph nodes have not been\n partitioned to the CUDA provider"))
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        graph = Graph(plain.folder, "cuda", cuda_graphs=True)
        assert furthest(graph_logits(graph, IDS, chunks=STEPS), graph_logits(plain, IDS, chunks=STEPS)) < CLOSE
    assert requested == [True, False] and graph.captured is None
    assert graph.capture_failure == "all compute graph nodes have not been partitioned to the CUDA provider"
    assert [record.message for record in caplog.records] == [f"decode steps are not captured: {graph.capture_failure}"]


@pytest.mark.parametrize("failing", [1, 2], ids=["session's thread", "opening thread"])
def test_a_failed_capture_is_reported_and_replaced_by_an_ordinary_session(
    plain: Graph, on_cuda: Callable[[Exception | None], list[bool]], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    requested, captures = on_cuda(None), []
    capture = cuda_graphs.CapturedDecode._capture_buckets

    def fail(self: cuda_graphs.CapturedDecode) -> None:
        captures.append(self)
        if len(captures) == failing:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        capture(self)

    monkeypatch.setattr(cuda_graphs.CapturedDecode, "_capture_buckets", fail)
    graph = Graph(plain.folder, "cuda", cuda_graphs=True)
    assert requested == [True, False] and graph.captured is None and "CUDA failure 900" in str(graph.capture_failure)
    assert furthest(graph_logits(graph, IDS, chunks=STEPS), graph_logits(plain, IDS, chunks=STEPS)) < CLOSE


def test_attention_that_runs_on_the_cpu_is_reported(
    plain: Graph,
    on_cuda: Callable[[Exception | None], list[bool]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_cuda(None)
    monkeypatch.setattr(open_session, "input_kinds", lambda *_: {"past_key_values.0.key": "cpu"})
    create = open_session.create_session
    monkeypatch.setattr(open_session, "create_session", lambda *args: (create(*args)[0], Device("cuda", CUDA)))
    # The folder has no slots, because no CUDA device can hold their tensors. So the graph has some that it does not.
    monkeypatch.setattr(open_session, "check_interface", lambda *_: None)
    folder = replace(plain.folder, slots={})
    with caplog.at_level(logging.WARNING, "tp_runtime"):
        graph = Graph(folder, "cuda")
    assert graph.kv.device == "cpu" and "attention runs on the CPU" in caplog.text
