"""From a torch model to an exported folder: trace it, simplify the graph, add slots, lower the precision, check it.

This room knows nothing of prompts or queries.
"""

from .export import export_model
from .recheck import check_against_source, check_token_ids
from .stored import stored_student

__all__ = ["check_against_source", "check_token_ids", "export_model", "stored_student"]
