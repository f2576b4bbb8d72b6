"""A warning about patches that run on another precision than the one that they were fitted on."""

from __future__ import annotations

import logging
from weakref import WeakSet

from ..patch import FLOAT_PRECISIONS, KVPrefix, Patch, fitted_precision

log = logging.getLogger("tp_runtime")


class PrecisionNotes:
    """Says once for each loaded patch what this precision costs it, and which command fits it.

    Entries are keys and values of the base that they were fitted on. A quantised base computes other queries, so it
    attends to them less exactly than the patch's figures say. Weights that were fitted in float32 act on every
    precision, but on int4 their figures leave out what the quantised base loses, which a fit behind it makes up for.
    On int8 that is too little to say. `check_base` refuses the reverse: a patch fitted on a quantised base runs on that
    precision only.

    Args:
        precision: the precision of the graph.
    """

    def __init__(self, precision: str) -> None:
        self._precision = fitted_precision(precision)
        self._noted: WeakSet[KVPrefix] = WeakSet()  # a sum holds the entries of its summand, so it is not noted again
        self._noted_weights: set[str] = set()  # the identities of patches of weights, as strengths and sums name them

    def note(self, patch: Patch) -> None:
        """Log the warning if the patch needs one and has not had it."""
        fitted, runs = fitted_precision(patch.config.precision), self._precision
        if runs in FLOAT_PRECISIONS or fitted == runs:
            return
        if patch.prefix is not None:
            self._note_entries(patch, patch.prefix)
        elif runs.startswith("int4"):
            self._note_weights(patch)

    def _note_entries(self, patch: Patch, prefix: KVPrefix) -> None:
        if prefix in self._noted:
            return
        self._noted.add(prefix)
        log.warning(
            "the entries of the patch %r were fitted on %s and run on %s at a cost: its answers are further from those "
            "of the prompted model than its figures say; `tp-export patch ... --student-precision %s` fits it for this "
            "folder",
            patch.name,
            patch.config.precision,
            self._precision,
            self._precision,
        )

    def _note_weights(self, patch: Patch) -> None:
        new = {identity for identity, _strength in patch.terms} - self._noted_weights
        if not new:
            return
        self._noted_weights |= new
        log.warning(
            "the patch %r was fitted on %s and runs on %s: its figures leave out what this precision loses; `tp-export "
            "patch ... --student-precision %s` fits it for this folder, and makes up for a part of the loss",
            patch.name,
            patch.config.precision,
            self._precision,
            self._precision,
        )
