"""This module computes logits of a graph, through the runtime and without it, and compares logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tp_runtime.session import BoundPatch, Graph, ModelFolder

Logits = NDArray[np.float32]


def token_ids(count: int, seed: int = 0, below: int = 320) -> list[int]:
    """Return `count` random token ids from 0 to `below` - 1; equal seeds give equal ids."""
    return np.random.default_rng(seed).integers(0, below, count).tolist()


def graph_logits(
    graph: Graph, ids: Sequence[int], bound: BoundPatch | None = None, chunks: Sequence[int] = ()
) -> Logits:
    """Return logits [T, vocab] of a graph on a new cache, in one run or in chunks of the lengths `chunks`."""
    bound = bound or graph.base
    cache = graph.new_cache(bound)
    cuts = np.cumsum(chunks or [len(ids)]).tolist()
    assert cuts[-1] == len(ids)
    ranges = zip([0, *cuts], cuts, strict=False)
    return np.concatenate([graph.forward(ids[i:j], cache, bound, all_logits=True) for i, j in ranges])


def plain_session_logits(path: Any, ids: Any, **feeds: Any) -> Logits:
    """Return logits [batch, T, vocab] that ONNX Runtime computes without tp_runtime, so the slots keep their defaults.

    Args:
        path: the model folder.
        ids: the token ids, [T] or [batch, T].
        feeds: further inputs of the graph, by name.
    """
    import onnxruntime

    folder = ModelFolder.open(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder.path / "model.onnx"), options, ["CPUExecutionProvider"])
    ids = np.atleast_2d(np.array(ids, np.int64))
    empty = np.zeros((len(ids), folder.kv.heads, 0, folder.kv.head_dim), np.float32)
    past = {f"past_key_values.{i}.{kind}": empty for i in range(folder.layers) for kind in ("key", "value")}
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions, **past, **feeds}
    return session.run(["logits"], given)[0]


def furthest(one: Logits, other: Logits) -> float:
    """Return the largest absolute difference."""
    assert one.shape == other.shape
    return float(np.abs(one - other).max())
