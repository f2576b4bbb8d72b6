"""Opening a base model: a Hugging Face folder or a hub id, its text side, its digest and its loaded weights.

This room knows nothing of patches or exports.
"""

from .files import read_file
from .licences import licence_files
from .loading import load_model
from .offload import resident
from .source import Source, open_source
from .tables import tokenizer_tables
from .token_ids import Difference, compare_ids
from .tokenizer import EffectiveTokenizer

__all__ = [
    "Difference",
    "EffectiveTokenizer",
    "Source",
    "compare_ids",
    "licence_files",
    "load_model",
    "open_source",
    "read_file",
    "resident",
    "tokenizer_tables",
]
