"""This module makes random KV prefixes for tests."""

from __future__ import annotations

import numpy as np

from tp_runtime.patch import KV_PARTS, KVPrefix, Patch
from tp_runtime.session import ModelFolder


def with_prefix(patch: Patch, folder: ModelFolder, replaces: list[int], entries: int = 5, position: int = 9) -> Patch:
    """Return `patch` with a KV prefix of random entries, which replaces the ids `replaces`."""
    rng = np.random.default_rng(entries)
    shape = (entries, folder.kv.heads, folder.kv.head_dim)
    stored = {
        (i, part): rng.standard_normal(shape).astype(np.float32) for i in range(folder.layers) for part in KV_PARTS
    }
    return Patch(patch.deltas, patch.config, KVPrefix(stored, tuple(replaces), position))
