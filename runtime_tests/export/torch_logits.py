"""This module computes logits with transformers, for tests that compare a graph or a hook with them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from runtime_tests.logits import Logits
from tp_export.decoder import patched
from tp_runtime.patch import Patch


def torch_logits(model: Any, ids: Sequence[int], patch: Patch | None = None) -> Logits:
    """Return logits [T, vocab] of transformers, with `patch` applied by hooks."""
    with torch.no_grad(), patched(model, patch) if patch else contextlib.nullcontext():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
