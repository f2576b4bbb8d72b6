"""This room measures what patches cost. It prints nothing; cli/bench.py reads the command line and prints.

This room knows nothing of the command line, of reports, or of other runtimes, which benchmarks/ compares with.
"""

from .arms import RANK, Arm, base_arm, patch_arm, random_patch
from .memory import memory_bytes
from .steps import Times, compare, interleaved, one_round, python_seconds
from .switching import first_step_seconds, load_seconds, resident, switch_seconds

__all__ = [
    "RANK",
    "Arm",
    "Times",
    "base_arm",
    "compare",
    "first_step_seconds",
    "interleaved",
    "load_seconds",
    "memory_bytes",
    "one_round",
    "patch_arm",
    "python_seconds",
    "random_patch",
    "resident",
    "switch_seconds",
]
