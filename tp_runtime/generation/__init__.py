"""Generation on token ids over a graph: the generation loop, sampling, the prefix cache and batches.

This room knows nothing of text or the names of patches, and of no file but that of a prefix cache.
"""

from .batch import PREFILL_TOKENS, Batch
from .constraint import Constraint, masked
from .engine import check_request, generate, prefill
from .entries import prompt_entries
from .logprobs import LogprobsMode, TokenLogprobs, WantedLogprobs
from .lookup import LookupStats, check_lookup
from .prefix_cache import PrefixCache, require_prefix_cache
from .row import Row
from .sampler import Sampler
from .sampling import Sampling

__all__ = [
    "PREFILL_TOKENS",
    "Batch",
    "Constraint",
    "LogprobsMode",
    "LookupStats",
    "PrefixCache",
    "Row",
    "Sampler",
    "Sampling",
    "TokenLogprobs",
    "WantedLogprobs",
    "check_lookup",
    "check_request",
    "generate",
    "masked",
    "prefill",
    "prompt_entries",
    "require_prefix_cache",
]
