"""Fixtures and helpers of the tests of captured decode: a graph with ordinary steps and one with captured steps.

On the CPU captured decode has the same buffers, switches and changes of sequence as on CUDA, but nothing is captured.
The tests in runtime_tests/gpu need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runtime_tests.logits import token_ids
from runtime_tests.patches import patch_for
from tp_runtime.patch import Patch
from tp_runtime.session import Graph, ModelFolder, open_session

CLOSE = 1e-5
IDS = token_ids(40)
STEPS = (9, *(1,) * 31)  # a prefill, then decode steps


@pytest.fixture(scope="module", params=["llama", "gemma"])
def plain(request: pytest.FixtureRequest) -> Graph:
    return Graph(ModelFolder.open(request.getfixturevalue(f"tiny_{request.param}_export")), "cpu")


@pytest.fixture(scope="module")
def capturing(plain: Graph) -> Graph:
    return with_captured_decode(plain.folder)


def with_captured_decode(folder: ModelFolder) -> Graph:
    """Open a graph on the CPU whose decode steps use the captured decode buffers."""
    graph = Graph(folder, "cpu")
    start_captured(graph)
    graph._steps_in_place = False  # as on CUDA
    return graph


def start_captured(graph: Graph) -> None:
    graph.captured = open_session.start_captured(
        graph.folder, graph.session, graph.ort, graph.device.kind, graph._run_io, graph.kv
    )


def rank_patches(graph: Graph, *ranks: int) -> list[Patch]:
    return [patch_for(graph.folder, seed=rank, rank=rank, scale=0.2) for rank in ranks]


def before_each_run(graph: Graph, monkeypatch: pytest.MonkeyPatch, act: Callable[[Any], object]) -> None:
    """Call `act` with the options of each run of the captured decode, on the thread that then runs the session."""
    session = graph.session

    class Session:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            act(options)
            session.run_with_iobinding(binding, options)

    assert graph.captured is not None
    monkeypatch.setattr(graph.captured, "session", Session())


class Counted:
    """A replacement for a method that counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls, self._real = 0, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._real(*args, **kwargs)
