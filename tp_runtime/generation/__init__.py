"""Generation on token ids over a graph: the generation loop, sampling, the prefix cache and batches.

This room knows nothing of text, files or the names of patches.
"""

from .batch import PREFILL_TOKENS, Batch
from .engine import check_request, generate, prefill
from .entries import prompt_entries
from .prefix_cache import PrefixCache
from .row import Row
from .sampling import Sampler, Sampling

__all__ = [
    "PREFILL_TOKENS",
    "Batch",
    "PrefixCache",
    "Row",
    "Sampler",
    "Sampling",
    "check_request",
    "generate",
    "prefill",
    "prompt_entries",
]
