"""A patch that makes a quantised model answer as the float32 one does: no prompt, only what rounding weights cost."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tp_runtime.patch import Patch
from tp_runtime.session import Slot

from ..decoder import blocks_of
from ..queries import load_questions, split_holdout
from ..source import Source
from .forms import Settings
from .recipe import Recipe, make_patch

_RANK = 32  # rounding errors have no few directions, as a prompt has: here rank still pays (docs/precision.md)
_QUESTIONS, _HELD_OUT = 80, 16


def repair_patch(source: Source, model: Any, precision: str, slots: Collection[Slot]) -> Patch:
    """Fit the repair of `precision`, a quantised one, on the base's own answers to the built-in questions.

    Where the export has slots beside the linears that read z, those are used: `matrix` repairs more than `output`.
    """
    fitted, held_out = split_holdout(load_questions(None)[:_QUESTIONS], _HELD_OUT, seed=0)
    sites = {slot.site for slot in slots}
    gated = all(set(block.mlps[0].reads_z) <= sites and block.router is None for block in blocks_of(model))
    recipe = Recipe("matrix" if gated else "output", Settings(_RANK), student_precision=precision)
    return make_patch(source, model, None, fitted, held_out, recipe, name=f"repair-{precision}")
