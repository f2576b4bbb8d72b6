"""A patch that makes a quantised model answer as the float32 one does: no prompt, only what rounding weights cost."""

from __future__ import annotations

from typing import Any

from tp_runtime.patch import Patch

from .forms import Settings
from .patching import Recipe, make_patch
from .questions import load_questions, split_holdout
from .source import Source

_RANK = 32  # rounding errors have no few directions, as a prompt has: here rank still pays (docs/precision.md)
_HELD_OUT = 16


def repair_patch(source: Source, model: Any, precision: str) -> Patch:
    """Fit the repair of `precision`, a quantised one, on the base's own answers to the built-in questions."""
    fitted, held_out = split_holdout(load_questions(None), _HELD_OUT, seed=0)
    recipe = Recipe(settings=Settings(_RANK), student_precision=precision)
    return make_patch(source, model, None, fitted, held_out, recipe, name=f"repair-{precision}")
