"""A warning about entries that run on another precision than the one that they were fitted on."""

from __future__ import annotations

import logging
from weakref import WeakSet

from ..patch import FLOAT_PRECISIONS, KVPrefix, Patch, fitted_precision

log = logging.getLogger("tp_runtime")


class PrecisionNotes:
    """Says once for each loaded patch what its entries cost on this precision, and which command fits it.

    Entries are keys and values of the base that they were fitted on. A quantised base computes other queries, so it
    attends to them less exactly than the patch's figures say. Weights that were fitted in float32 have no such note.
    `check_base` refuses the reverse: a patch fitted on a quantised base runs on that precision only.

    Args:
        precision: the precision of the graph.
    """

    def __init__(self, precision: str) -> None:
        self._precision = fitted_precision(precision)
        self._noted: WeakSet[KVPrefix] = WeakSet()  # a sum holds the entries of its summand, so it is not noted again

    def note(self, patch: Patch) -> None:
        """Log the warning if the patch needs one and has not had it."""
        fitted, runs = fitted_precision(patch.config.precision), self._precision
        if patch.prefix is None or runs in FLOAT_PRECISIONS or fitted == runs or patch.prefix in self._noted:
            return
        self._noted.add(patch.prefix)
        log.warning(
            "the entries of the patch %r were fitted on %s and run on %s at a cost: its answers are further from those "
            "of the prompted model than its figures say; `tp-export patch ... --student-precision %s` fits it for this "
            "folder",
            patch.name,
            fitted,
            runs,
            runs,
        )
