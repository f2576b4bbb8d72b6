"""The precisions of an export: weights in blocks of few bits, and the base model as a quantised export computes it.

This room knows nothing of graphs or patches.
"""

from .blocks import BLOCK, Blocks, FloatArray
from .precision import INT4, MEASURED, Precision, check_precision, computes_in_float16, held_out_text, quantised
from .student import QuantisedStudent, as_student, float_weights, log_probabilities, token_kl

__all__ = [
    "BLOCK",
    "INT4",
    "MEASURED",
    "Blocks",
    "FloatArray",
    "Precision",
    "QuantisedStudent",
    "as_student",
    "check_precision",
    "computes_in_float16",
    "float_weights",
    "held_out_text",
    "log_probabilities",
    "quantised",
    "token_kl",
]
