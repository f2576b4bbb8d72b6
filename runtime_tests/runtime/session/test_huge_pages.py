"""Weights on huge pages: which memory is advised, and that its content does not change."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_runtime.session import Graph, ModelFolder, huge_pages
from tp_runtime.session import graph as graph_module
from tp_runtime.session.huge_pages import (
    Range,
    aligned,
    empty_on_huge_pages,
    mapped,
    mappings,
    use_huge_pages,
    use_huge_pages_soon,
    within,
    without,
    written,
)

MAPS = """\
00400000-00500000 r-xp 00000000 fe:00 131 /usr/bin/python with a space
01000000-02000000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0001000000-7f0001800000 rw-p 00000000 00:00 0
7f0002000000-7f0002800000 rw-p 00000000 fe:00 17 /models/model.onnx_data
7f0003000000-7f0003800000 ---p 00000000 00:00 0
"""
RESIDENT = {"00400000": 1024, "01000000": 16384, "7f0000000000": 4096, "7f0001000000": 64, "7f0002000000": 8192}
SMAPS = "".join(
    f"{line}\nSize: 1 kB\nRss: {RESIDENT.get(line.split('-')[0], 0):>10} kB\nVmFlags: rd wr\n"
    for line in MAPS.splitlines()
)
ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], sum(pair))), max_size=6)


def covered(found: list[Range]) -> set[int]:
    """Return the addresses in the ranges."""
    return {address for first, end in found for address in range(first, end)}


def test_only_written_anonymous_memory_is_found() -> None:
    assert written(SMAPS) == [(0x1000000, 0x2000000), (0x7F0000000000, 0x7F0000800000)]
    assert len(mappings(MAPS)) == 6


@given(ours=ranges, others=ranges)
def test_memory_that_existed_before_is_excluded(ours: list[Range], others: list[Range]) -> None:
    assert covered(without(ours, others)) == covered(ours) - covered(others)


@given(ours=ranges, others=ranges)
def test_memory_that_the_session_did_not_allocate_is_excluded(ours: list[Range], others: list[Range]) -> None:
    assert covered(within(ours, others)) == covered(ours) & covered(others)


@given(ours=ranges, size=st.integers(1, 8))
def test_only_whole_pages_inside_a_range_are_used(ours: list[Range], size: int) -> None:
    found = aligned(ours, size)
    assert covered(found) <= covered(ours)
    assert all(first % size == 0 and end % size == 0 and first < end for first, end in found)


def test_the_content_of_the_memory_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[Range] = []
    real = huge_pages._advise

    def advise(address: int, length: int, advice: int) -> None:
        advised.append((address, address + length))
        real(address, length, advice)

    monkeypatch.setattr(huge_pages, "_advise", advise)
    before = mapped()
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        array = np.frombuffer(memory, np.float32)
        values = np.random.default_rng(0).standard_normal(len(array), np.float32)
        array[:] = values
        address = array.ctypes.data
        advised_bytes = use_huge_pages(without(mapped(), before))
        assert (array == values).all()
        del array
    if huge_pages.page_size() is None:
        assert advised_bytes == 0 and not advised
    else:
        assert advised_bytes >= 60 << 20
        assert any(first >= address and end <= address + (64 << 20) for first, end in advised)


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_nothing_is_advised_if_huge_pages_are_switched_off_or_unknown(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "_advise", lambda *_: pytest.fail("advice is not wanted here"))
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert use_huge_pages([(0, 1 << 47)]) == 0


@pytest.mark.parametrize("first_run", [[1], [1, 2, 3]], ids=["a token", "a prompt"])
def test_a_session_requests_huge_pages_once_after_its_first_run(
    tiny_llama_export: Path, monkeypatch: pytest.MonkeyPatch, first_run: list[int]
) -> None:
    requested: list[object] = []
    monkeypatch.setattr(graph_module, "use_huge_pages_soon", requested.append)
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu", threads=1)
    cache = graph.new_cache(graph.base)
    assert not requested  # the caller waits for the first token
    graph.forward(first_run, cache, graph.base)
    graph.forward([4], cache, graph.base)
    assert len(requested) == 1


def test_a_session_with_huge_pages_off_does_not_request_them(
    tiny_llama_export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_module, "use_huge_pages_soon", lambda taken: pytest.fail("requested"))
    graph = Graph(ModelFolder.open(tiny_llama_export), "cpu", threads=1, huge_pages=False)
    graph.forward([1, 2, 3], graph.new_cache(graph.base), graph.base)


def test_the_background_thread_advises_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[object] = []
    monkeypatch.setattr(huge_pages, "use_huge_pages", requested.append)
    use_huge_pages_soon([(0, 1)]).join(60)
    assert requested == [[(0, 1)]]


@pytest.mark.parametrize("shape", [(1, 1, 320), (1, 1, 262_144), (3, 500_001)])
def test_an_array_on_huge_pages_is_an_array_like_any_other(shape: tuple[int, ...]) -> None:
    arrays = [empty_on_huge_pages(shape, np.float32) for _ in range(3)]
    for value, array in enumerate(arrays):
        array[...] = value
    for value, array in enumerate(arrays):
        assert array.shape == shape and array.dtype == np.float32 and array.flags.c_contiguous
        assert (array == value).all()


def test_only_an_array_that_fills_half_a_huge_page_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "page_size", lambda: 2**21)
    monkeypatch.setattr(huge_pages, "_advise", lambda address, length, _advice: asked.append((address, length)))
    empty_on_huge_pages((2**18 - 1,), np.float32)
    assert not asked
    array = empty_on_huge_pages((2**18,), np.float32)
    assert asked == [(array.ctypes.data, 2**21)] and array.ctypes.data % 2**21 == 0


def test_without_huge_pages_an_array_is_numpys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "page_size", lambda: None)
    assert empty_on_huge_pages((2**20,), np.float32).base is None
