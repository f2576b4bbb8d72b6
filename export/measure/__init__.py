"""How close a student comes to its teacher: divergence at every token, fidelity over many queries, right answers.

This room knows nothing of how a patch was made.
"""

from .accuracy import Accuracy, Right, measure_accuracy, right_answers, share_kept
from .answers import Answers, Completion, Prompts, recorded_answers, runtime_answers, torch_answers, within_stop
from .bootstrap import ratio_error
from .closeness import Closeness, measure_closeness, require_effect
from .divergence import Arm, Divergence, diverge, with_prompt, without_prompt
from .fidelity import Fidelity, error_text, fidelity_line, measure_fidelity
from .probe import torch_probe
from .students import RuntimeStudent, Student, TorchStudent
from .teacher import cached_teacher

__all__ = [
    "Accuracy",
    "Answers",
    "Arm",
    "Closeness",
    "Completion",
    "Divergence",
    "Fidelity",
    "Prompts",
    "Right",
    "RuntimeStudent",
    "Student",
    "TorchStudent",
    "cached_teacher",
    "diverge",
    "error_text",
    "fidelity_line",
    "measure_accuracy",
    "measure_closeness",
    "measure_fidelity",
    "ratio_error",
    "recorded_answers",
    "require_effect",
    "right_answers",
    "runtime_answers",
    "share_kept",
    "torch_answers",
    "torch_probe",
    "with_prompt",
    "within_stop",
    "without_prompt",
]
