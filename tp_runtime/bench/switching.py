"""Times of loading patches and of switching between them, and the memory of many loaded patches."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..model import PatchedModel
from ..session import BoundPatch, Graph
from ..storage import temporary_folder
from .arms import RANK, random_patch
from .memory import give_back_free_memory, memory_bytes

_SWITCHES = 200


def load_seconds(model: PatchedModel, file: Path) -> float:
    """Measure the seconds from the file to a patch that requests can select: it is read, checked and on the device."""
    start = time.perf_counter()
    name = model.load_patch(file, "bench")
    seconds = time.perf_counter() - start
    model.unload_patch(name)
    return seconds


def switch_seconds(model: PatchedModel, names: Sequence[str], token: int = 0, *, converted: bool = True) -> list[float]:
    """Measure switches between loaded patches: from the request for another patch until its tensors are bound.

    The loop over bind_ortvalue_input is the one that the first step of a new cache runs.

    Args:
        model: the model.
        names: the names of the loaded patches to switch between, one after the other.
        token: the id that is run once before the switches.
        converted: whether every patch is converted to the slots' dtype before the switch to it, as one that ran lately
            is. If not, the switch converts it.

    Returns:
        The seconds of each switch.
    """
    graph, patches = model.graph, model.patches
    bounds = [graph.bind(patches[name]) for name in names]
    cache = graph.new_cache(bounds[0])
    graph.forward([token], cache, bounds[0])
    cache.values = None  # it runs no more, so its patch needs no tensors
    values: Mapping[str, Any] | None
    seconds = []
    for number in range(1, _SWITCHES + 1):
        target = number % len(names)
        values = None  # the patch before is let go, so that with one name there is something to convert
        kept = bounds[target].values if converted else None  # it stays converted, however small the store is
        if not converted:
            graph.release(bounds[target])
        start = time.perf_counter()
        model.new_cache(names[target])
        values = bounds[target].values
        for name, value in values.items():
            cache.binding.bind_ortvalue_input(name, value)
        seconds.append(time.perf_counter() - start)
    del kept
    return seconds


def first_step_seconds(graph: Graph, token: int, bounds: tuple[BoundPatch, BoundPatch]) -> float:
    """Measure one token under the second patch, directly after one under the first.

    The seconds include the switch, the buffers of a new cache, and the step.
    """
    before, after = bounds
    graph.forward([token], graph.new_cache(before), before)
    start = time.perf_counter()
    graph.forward([token], graph.new_cache(after), after)
    return time.perf_counter() - start


def resident(model: PatchedModel, counts: Sequence[int], rank: int = RANK) -> list[dict[str, Any]]:
    """Measure what many loaded patches cost: their memory, and the switch from one to the next.

    Args:
        model: the model. Afterwards it has the same loaded patches as before.
        counts: the numbers of patches to load, each at least 1.
        rank: the rank of the patches, which are random and all different, in files of half precision.

    Returns:
        A row for each count in ascending order, with `patches` (the count), `rank`, `patch_bytes` (the size of one
        file), `files_bytes` (that of all files), `converted_bytes` (the bytes of converted patches that the session
        keeps), `switch_ms` (to a patch that is converted), `convert_ms` (to one that is not), and `anonymous_bytes`:
        the growth of the process's own memory, or None if the system does not report it.
    """
    names: list[str] = []
    rows: list[dict[str, Any]] = []
    files_bytes = 0
    gc.collect()
    give_back_free_memory()
    before = memory_bytes("RssAnon")
    try:
        for count in sorted(set(counts)):
            while len(names) < count:
                with temporary_folder(prefix="tp-bench-") as folder:
                    file = folder / "random.safetensors"
                    random_patch(model.graph.folder, rank, seed=len(names)).save(file)
                    files_bytes += file.stat().st_size
                    names.append(model.load_patch(file, f"bench-{len(names)}"))
            gc.collect()
            give_back_free_memory()
            now = memory_bytes("RssAnon")
            row: dict[str, Any] = {
                "patches": count,
                "rank": rank,
                "patch_bytes": files_bytes // count,
                "files_bytes": files_bytes,
                "converted_bytes": model.graph.bound_values.nbytes,
                "anonymous_bytes": None if before is None or now is None else now - before,
            }
            rows.append(row)
        # The switches come after all memory readings, because measuring them needs memory too. With a count of 1 the
        # patch is switched to itself.
        for row in rows:
            switched = names[: row["patches"]]
            row["convert_ms"] = 1e3 * median(switch_seconds(model, switched, converted=False))
            row["switch_ms"] = 1e3 * median(switch_seconds(model, switched))
    finally:
        for name in names:
            model.unload_patch(name)
    return rows
