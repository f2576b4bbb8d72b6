"""Constraints from JSON schemas, regular expressions and grammars: which ids a completion may continue with.

This room knows nothing of sampling, of generation loops, or of how a prompt is made: it hands out objects that answer
which ids may come next. The parser is the package llguidance, which the extra `grammar` installs.
"""

from .grammars import Grammar, Grammars
from .json_schema import check_schema
from .matcher import GrammarConstraint

__all__ = ["Grammar", "GrammarConstraint", "Grammars", "check_schema"]
