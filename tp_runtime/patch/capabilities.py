"""What a patch can do, which differs between weights and entries, in words that are the same everywhere.

Weights (low-rank deltas) are added to the output of layers: they can be scaled, added, and written as other formats.
Entries (the KV prefix) are keys and values of the context in front of the text: they are there or they are not. `Patch.
capabilities`, `tp-runtime inspect`, the documentation and every refusal use the words of this module.
"""

from __future__ import annotations

from dataclasses import dataclass

# A patch fitted on one of these precisions acts on every precision of its base. A patch fitted on a quantised base acts
# only on that precision.
FLOAT_PRECISIONS = ("fp32", "fp16", "bf16")

_IN_HALF = "-fp16"  # ends the name of a quantised precision that computes in float16

ANY_STRENGTH, NO_STRENGTH = "any", "0 or 1"
ADDS_TO_ANYTHING, ADDS_TO_WEIGHTS = "with anything", "with weights only"
ENTRIES_STAND = "the entries stand where a system message or tools would be"
BEFORE_SYSTEM = "the entries stand in front of a system message"
SYSTEM_ALLOWED, NO_SYSTEM, SYSTEM_NEEDED = "allowed", f"none: {ENTRIES_STAND}", f"needed: {BEFORE_SYSTEM}"
ONLY_WEIGHTS_TRAVEL = "only weights travel to other formats"
EXPORTS, NO_EXPORTS = "LoRA, control vector, ONNX adapter, merge", f"none: {ONLY_WEIGHTS_TRAVEL}"
ANY_PRECISION, AT_A_COST, ONE_PRECISION = "any", "any, but int8 and int4 at a cost", "{} only"


def fitted_precision(precision: str) -> str:
    """Return the precision that a patch names if it was fitted for a folder of `precision`.

    A folder of int4-rtn-fp16 has the weights of an int4-rtn folder, but for the rounding of their scales, and computes
    in float16. A patch compensates what the weights lose, so it runs on both, and names int4-rtn. One that names
    int4-rtn-fp16 all the same counts as if it named int4-rtn. Of a calibrated precision the two folders have other
    weights, which the digest of the weights tells apart.
    """
    return precision.removesuffix(_IN_HALF)


@dataclass(frozen=True)
class Capabilities:
    """What a patch can do.

    Attributes:
        form: "weights", "entries", "weights and entries", or "nothing" for strength 0.
        strength: the strengths that it can have, `ANY_STRENGTH` or `NO_STRENGTH`.
        sums: what it can be added to, `ADDS_TO_ANYTHING` or `ADDS_TO_WEIGHTS`.
        system: whether a request may have a system message: `SYSTEM_ALLOWED`, `NO_SYSTEM` or `SYSTEM_NEEDED`.
        exports: what it can be written as, `EXPORTS` or `NO_EXPORTS`. docs/travel.md says which parts each format can
            hold.
        precision: the precisions of its base that it runs on: `ANY_PRECISION`, `AT_A_COST` or `ONE_PRECISION`.
    """

    form: str
    strength: str
    sums: str
    system: str
    exports: str
    precision: str

    @classmethod
    def of(cls, weights: bool, entries: bool, precision: str, before_system: bool = False) -> Capabilities:
        """Return what a patch can do.

        Args:
            weights: whether it has deltas.
            entries: whether it has a KV prefix.
            precision: the precision that it was fitted on.
            before_system: whether its entries stand in front of a system message of the request's own.
        """
        forms = " and ".join(["weights"] * weights + ["entries"] * entries)
        if precision not in FLOAT_PRECISIONS:
            runs_on = ONE_PRECISION.format(precision)
        else:
            runs_on = AT_A_COST if entries else ANY_PRECISION
        if not entries:
            words = ANY_STRENGTH, ADDS_TO_ANYTHING, SYSTEM_ALLOWED, EXPORTS
        else:
            system = SYSTEM_NEEDED if before_system else NO_SYSTEM
            words = NO_STRENGTH, ADDS_TO_WEIGHTS, system, NO_EXPORTS
        return cls(forms or "nothing", *words, runs_on)
