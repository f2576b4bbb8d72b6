"""How close a student comes to its teacher: divergence at every token, fidelity over many queries, right answers.

This room knows nothing of how a patch was made.
"""

from .accuracy import Accuracy, measure_accuracy
from .answers import Answers, Completion, runtime_answers, torch_answers
from .divergence import Arm, Divergence, diverge, gap_closed, require_effect, with_prompt, without_prompt
from .fidelity import Fidelity, measure_fidelity
from .probe import torch_probe
from .students import RuntimeStudent, Student, TorchStudent

__all__ = [
    "Accuracy",
    "Answers",
    "Arm",
    "Completion",
    "Divergence",
    "Fidelity",
    "RuntimeStudent",
    "Student",
    "TorchStudent",
    "diverge",
    "gap_closed",
    "measure_accuracy",
    "measure_fidelity",
    "require_effect",
    "runtime_answers",
    "torch_answers",
    "torch_probe",
    "with_prompt",
    "without_prompt",
]
