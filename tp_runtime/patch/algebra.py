"""The rules of the algebra that need no tensors: which strengths there are, and the description of a sum."""

from __future__ import annotations

import numbers
from typing import Any

from ..errors import BaseMismatchError, PatchValueError
from .capabilities import FLOAT_PRECISIONS, fitted_precision
from .config import PatchConfig


def valid_strength(value: Any) -> float:
    """Return a strength as a float.

    Raises:
        PatchValueError: the value is not a finite number that float32 deltas can be scaled by.
    """
    got = type(value).__name__
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            got = str(strength := float(value))
            # Beyond these bounds float32 deltas become zero or infinite, which the terms would not show.
            if strength == 0.0 or 1e-30 <= abs(strength) <= 1e30:
                return strength
        except OverflowError:
            got = "an integer too large for a float"
    raise PatchValueError(
        "the value is not a valid strength",
        field="strength",
        got=got,
        wanted="a finite number: 0, or of magnitude 1e-30 to 1e30",
        fix="use a moderate factor, such as 0.5 or -1",
    )


def sum_config(p: PatchConfig, q: PatchConfig, sign: str) -> PatchConfig:
    """Return the description of a sum, without everything that belongs to a single fit.

    Args:
        p: the description of the first patch.
        q: the description of the second patch, of the same base.
        sign: "+" or "-", for the name.

    Raises:
        BaseMismatchError: the patches were fitted behind two quantised bases.
    """
    quantised = {
        (fitted_precision(c.precision), c.weights_digest) for c in (p, q) if c.precision not in FLOAT_PRECISIONS
    }
    if len(quantised) > 1:
        raise BaseMismatchError(
            "the patches repair different quantised bases",
            field="precision" if p.precision != q.precision else "weights_digest",
            got=repr(q.precision if p.precision != q.precision else q.weights_digest),
            wanted=repr(p.precision if p.precision != q.precision else p.weights_digest),
            fix="add patches fitted behind one quantised base",
        )
    precision, weights_digest = quantised.pop() if quantised else (p.precision, None)
    if p.licence is None or q.licence is None:
        licence = None  # if the licence of one patch is unknown, that of the sum is unknown too
    else:
        licence = p.licence if p.licence == q.licence else f"({p.licence}) AND ({q.licence})"
    return PatchConfig(
        name=f"{p.name}{sign}{q.name}",
        method="composed",
        base_model=p.base_model,
        base_digest=p.base_digest,
        architecture=p.architecture,
        precision=precision,
        context_digest=p.context_digest if p.context_digest == q.context_digest else "",
        licence=licence,
        stop=_sum_stop(p.stop, q.stop),
        weights_digest=weights_digest,
    )


def _sum_stop(p: tuple[str, ...], q: tuple[str, ...]) -> tuple[str, ...]:
    """Return the stop strings of a sum: those of both if they agree or one has none, and otherwise none."""
    return tuple(dict.fromkeys(p + q)) if not p or not q or set(p) == set(q) else ()
