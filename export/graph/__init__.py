"""From a torch model to an exported folder: tracing, passes over the graph, slots, precisions, and a last check.

Knows nothing of prompts or queries.
"""

from .export import export_model

__all__ = ["export_model"]
