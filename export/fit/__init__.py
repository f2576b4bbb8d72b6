"""From dialogues to a patch: the lock-step fit, closed forms, KV entries, repairs, and the theorem's exact patches.

This room knows nothing of ONNX or of other tools' files.
"""

from .baselines import fit_steering, steering_candidates
from .exact import verify
from .forms import Settings
from .lockstep import fit_lockstep
from .recipe import ALL, Recipe, fit_patch, make_patch, to_half
from .repair import repair_patch

__all__ = [
    "ALL",
    "Recipe",
    "Settings",
    "fit_lockstep",
    "fit_patch",
    "fit_steering",
    "make_patch",
    "repair_patch",
    "steering_candidates",
    "to_half",
    "verify",
]
