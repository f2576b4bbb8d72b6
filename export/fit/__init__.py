"""From dialogues to a patch: the lock-step fit, closed forms, KV entries, repairs, and the theorem's exact patches.

This room knows nothing of ONNX or of other tools' files.
"""

from .baselines import fit_steering, steering_candidates
from .calibration import LONG_CONTEXT, Calibration, restate
from .choice import Target, default_entries
from .closed_form import fit_patch
from .exact import verify
from .forms import Settings
from .lockstep import fit_lockstep
from .make import assemble, make_patch
from .recipe import ALL, Recipe
from .repair import repair_patch
from .student import calibration_texts, student_for

__all__ = [
    "ALL",
    "LONG_CONTEXT",
    "Calibration",
    "Recipe",
    "Settings",
    "Target",
    "assemble",
    "calibration_texts",
    "default_entries",
    "fit_lockstep",
    "fit_patch",
    "fit_steering",
    "make_patch",
    "repair_patch",
    "restate",
    "steering_candidates",
    "student_for",
    "verify",
]
