"""Opening a base model: a Hugging Face folder or a hub id, its text side, its digest and its loaded weights.

This room knows nothing of patches or exports.
"""

from .offload import load_offloaded, resident
from .source import Source, load_model, open_source
from .token_ids import Difference, compare_ids
from .tokenizer import EffectiveTokenizer

__all__ = [
    "Difference",
    "EffectiveTokenizer",
    "Source",
    "compare_ids",
    "load_model",
    "load_offloaded",
    "open_source",
    "resident",
]
