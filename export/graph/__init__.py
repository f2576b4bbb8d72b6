"""From a torch model to an exported folder: trace it, simplify the graph, add slots, lower the precision, check it.

This room knows nothing of prompts or queries.
"""

from .export import export_model

__all__ = ["export_model"]
