"""The probe of a patch, measured with transformers.

On the device, `check` compares its own logits with those of the probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tp_runtime.patch import Patch
from tp_runtime.session import measure_probe

from .students import TorchStudent

_TOKENS = 48  # the logits of this many positions tell two patches apart; more would only make the file larger


def torch_probe(model: Any, patch: Patch, ids: Sequence[int]) -> dict[str, list[Any]]:
    """Run the patched model on a few ids and return its probe.

    Args:
        model: the loaded transformers model of the base.
        patch: the patch as it will be stored.
        ids: the token ids of a prompt. If the patch has a KV prefix, they begin with the ids that it replaces.

    Raises:
        RequestError: the ids do not begin with those that the KV prefix replaces.
    """
    first = 0 if patch.prefix is None else len(patch.prefix.replaces)
    used = list(ids)[: first + _TOKENS]
    return measure_probe(used, TorchStudent(model, patch)(used, first).float().cpu().numpy())
