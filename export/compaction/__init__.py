"""Compaction: a few key/value entries for each head that stand in for those of a long context, in closed form.

The steps are functions of arrays (selection, mass, values, joint values, rounding); `compact` puts them together for
one layer. This room knows nothing of prompts, of patches, or of the order in which layers are fitted.
"""

from .budget import split_budget
from .layer import Ridges, Target, compact
from .rounding import Rounding, round_entry, unrounded
from .rows import QueryRows, text_part

__all__ = [
    "QueryRows",
    "Ridges",
    "Rounding",
    "Target",
    "compact",
    "round_entry",
    "split_budget",
    "text_part",
    "unrounded",
]
