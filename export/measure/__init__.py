"""How close a student comes to its teacher: divergence token by token, fidelity, and answers that are right or wrong.

Knows nothing of how a patch was made.
"""

from .accuracy import measure_accuracy, runtime_answers, torch_answers
from .divergence import Arm, Divergence, diverge, with_prompt, without_prompt
from .fidelity import Student, measure_fidelity, runtime_student, torch_student

__all__ = [
    "Arm",
    "Divergence",
    "Student",
    "diverge",
    "measure_accuracy",
    "measure_fidelity",
    "runtime_answers",
    "runtime_student",
    "torch_answers",
    "torch_student",
    "with_prompt",
    "without_prompt",
]
