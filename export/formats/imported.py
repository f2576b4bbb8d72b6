"""A patch made from another tool's adapter. Its description states only what is known; torch measures its probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tp_runtime.patch import Delta, Patch, PatchConfig, SlotKey

from ..measure import torch_probe
from ..queries import load_questions
from ..source import Source


def imported_patch(source: Source, model: Any, deltas: Mapping[SlotKey, Delta], name: str) -> Patch:
    """Make a patch from deltas that were read from another tool's file.

    Nothing is known about how the deltas were made, so the patch has no context, calibration or fidelity. The probe is
    measured on built-in questions, with the transformers model patched by hooks.

    Args:
        source: the base model.
        model: the same base model, loaded.
        deltas: a mapping from (layer, site) to delta.
        name: the name of the patch.

    Returns:
        The patch with its probe.

    Raises:
        PatchTargetError, PatchShapeError, PatchValueError: the deltas are not valid (see `Patch`).
    """
    config = PatchConfig(
        name=name,
        method="imported",
        base_model=source.name,
        base_digest=source.digest,
        architecture=source.architecture,
        precision="fp32",
        context_digest="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    patch = Patch(deltas, config)
    ids = source.codec.render(" ".join(load_questions(None)[:8]))
    return Patch(patch.deltas, replace(config, probe=torch_probe(model, patch, ids)))
