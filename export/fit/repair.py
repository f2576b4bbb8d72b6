"""This module fits a patch that makes a quantised model answer as the float32 model does.

There is no prompt: the patch compensates only the rounding of the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tp_runtime.patch import Patch
from tp_runtime.session import Slot

from ..decoder import blocks_of
from ..quantise import QuantisedStudent
from ..queries import load_questions, split_holdout
from ..source import Source
from .forms import Settings
from .make import make_patch
from .recipe import Recipe

# The effect of a prompt lies in few directions, but rounding errors do not, so a higher rank still helps here
# (docs/precision.md).
_RANK = 32
_QUESTIONS, _HELD_OUT = 80, 16


def repair_patch(source: Source, model: Any, student: QuantisedStudent, slots: Collection[Slot]) -> Patch:
    """Fit the repair of the quantised `student` on the base's own answers to the built-in questions.

    If the export has slots on the linear layers that read z, the fit uses them: `matrix` repairs more than `output`.
    """
    fitted, held_out = split_holdout(load_questions(None)[:_QUESTIONS], _HELD_OUT, seed=0)
    sites = {slot.site for slot in slots}
    gated = all(set(block.mlps[0].reads_z) <= sites and block.router is None for block in blocks_of(model))
    recipe = Recipe("matrix" if gated else "output", Settings(_RANK), student_precision=student.precision)
    return make_patch(
        source, model, None, fitted, held_out, recipe, name=f"repair-{student.precision}", student=student
    )
