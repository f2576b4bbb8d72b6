"""A patch made from another tool's adapter: an honest description and a probe measured with torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tp_runtime.patch import Delta, Patch, PatchConfig
from tp_runtime.session import measure_probe

from ..measure import torch_student
from ..queries import load_questions
from ..source import Source

_PROBE_TOKENS = 48


def imported_patch(source: Source, model: Any, deltas: Mapping[tuple[int, str], Delta], name: str) -> Patch:
    """The patch of `deltas`.

    Nothing is known of how they were made, so there is no context, calibration or fidelity. The probe is measured with
    transformers, patched by hooks, on built-in questions.

    Args:
        source: the base model.
        model: the same, loaded.
        deltas: (layer, site) to delta.
        name: what the patch is called.

    Raises:
        PatchTargetError, PatchShapeError, PatchValueError: deltas that are none (see `Patch`).
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
    ids = source.codec.render(" ".join(load_questions(None)[:8]))[:_PROBE_TOKENS]
    logits = torch_student(model, patch)(ids, 0)
    return Patch(patch.deltas, replace(config, probe=measure_probe(ids, logits.float().cpu().numpy())))
