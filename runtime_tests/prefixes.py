"""This module makes random KV prefixes for tests."""

from __future__ import annotations

import numpy as np

from tp_runtime.patch import KV_PARTS, KVPrefix, Patch
from tp_runtime.session import Lengths, ModelFolder


def with_prefix(
    patch: Patch, folder: ModelFolder, replaces: list[int], entries: int | Lengths = 5, position: int = 9
) -> Patch:
    """Return `patch` with a KV prefix of random entries.

    Args:
        patch: the patch; it keeps its deltas and its config.
        folder: the exported model.
        replaces: the ids that the entries replace.
        entries: the number of entries in every layer, or in the layers of each kind.
        position: the position of the text.
    """
    counts = entries if isinstance(entries, Lengths) else Lengths(entries, entries)
    windowed = () if folder.windowed is None else folder.windowed.layers
    rng = np.random.default_rng(counts.full)
    stored = {}
    for layer in range(folder.layers):
        count = counts.windowed if layer in windowed else counts.full
        for part in KV_PARTS:
            shape = count, folder.kv.heads, folder.kv.head_dim
            stored[layer, part] = rng.standard_normal(shape).astype(np.float32)
    return Patch(patch.deltas, patch.config, KVPrefix(stored, tuple(replaces), position))
