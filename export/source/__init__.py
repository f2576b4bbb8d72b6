"""Opening a base model: a Hugging Face folder or a hub id, its text side, its digest and its loaded weights.

This room knows nothing of patches or exports.
"""

from .loading import load_model
from .offload import resident
from .source import Source, open_source

__all__ = ["Source", "load_model", "open_source", "resident"]
