"""A delta: what a patch adds to one slot, with its arithmetic.

This module does not handle layers, files or descriptions. Callers pass the slot, so that errors can name it.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchShapeError, PatchTargetError, PatchValueError, shown
from .arrays import unchangeable
from .names import DELTA_PARTS, MAX_LAYER, SITES, SlotKey, slot_name

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Delta:
    """The update of one slot: x -> x @ a @ b + bias, for x [..., in]. The arrays become unchangeable float32 copies.

    Attributes:
        a: the first factor [in, rank], its directions in order of energy.
        b: the second factor [rank, out].
        bias: the constant [out].
        mean: the mean of x over the fitted rows [in]; only `truncated` needs it.

    Raises:
        PatchValueError: an array holds something other than numbers.
    """

    a: Array | None = None
    b: Array | None = None
    bias: Array | None = None
    mean: Array | None = None

    def __post_init__(self) -> None:
        for part, values in self.parts().items():
            object.__setattr__(self, part, _frozen(values, part))

    def parts(self) -> dict[str, Array]:
        """Return the arrays that are not None, by part name."""
        return {part: getattr(self, part) for part in DELTA_PARTS if getattr(self, part) is not None}

    @property
    def rank(self) -> int:
        """The number of directions; 0 if the delta has only a bias."""
        return 0 if self.a is None else self.a.shape[1]

    def scaled(self, strength: float) -> Delta:
        """Return the delta times `strength`. Only b and bias are scaled: scaling a as well would scale twice."""

        def times(values: Array | None) -> Array | None:
            return None if values is None else (values * np.float64(strength)).astype(np.float32)  # one rounding

        with np.errstate(over="ignore", under="ignore"):  # `check` reports infinity, with the slot's name
            return replace(self, b=times(self.b), bias=times(self.bias))

    def joined(self, other: Delta, slot: SlotKey) -> Delta:
        """Return the sum: the factors are concatenated along the rank, and the biases are added.

        The sum has no mean, because a sum cannot be truncated.

        Args:
            other: the delta to add.
            slot: the slot of both deltas, for errors.

        Raises:
            PatchShapeError: the two deltas differ in [in] or [out].
        """
        for part, axis in (("a", 0), ("b", 1), ("bias", 0)):
            one, two = getattr(self, part), getattr(other, part)
            if one is not None and two is not None and one.shape[axis] != two.shape[axis]:
                raise _misfit(slot, part, two.shape, f"{one.shape[axis]} in dimension {axis}, as in the other patch")
        with np.errstate(over="ignore"):
            bias = self.bias + other.bias if self.bias is not None and other.bias is not None else None
        if self.a is None or self.b is None or other.a is None or other.b is None:
            pair = self if other.a is None else other
            a, b = pair.a, pair.b
        else:
            a, b = np.concatenate([self.a, other.a], axis=1), np.concatenate([self.b, other.b], axis=0)
        if bias is None:
            bias = other.bias if self.bias is None else self.bias
        return Delta(a, b, bias)

    def truncated(self, rank: int, slot: SlotKey) -> Delta:
        """Return a delta with the first `rank` directions, whose bias includes the mean effect of the others.

        Args:
            rank: the largest rank to keep.
            slot: the slot of the delta, for errors.

        Raises:
            PatchValueError: there are directions to drop, but the delta has no mean.
        """
        if self.a is None or self.b is None or self.rank <= rank:
            return self
        if self.mean is None:
            raise PatchValueError(
                "the slot has directions to drop, but no mean to correct its bias with",
                field=slot_name(*slot, "mean"),
                got="no such tensor",
                wanted=f"the mean input, [{self.a.shape[0]}]",
                fix=f"export the patch at rank {rank}, or keep rank >= {self.rank}",
            )
        # This constant is the average of the dropped part over the fitted rows.
        constant = (self.mean.astype(np.float64) @ self.a[:, rank:]) @ self.b[rank:]
        bias = constant if self.bias is None else self.bias + constant
        return Delta(self.a[:, :rank], self.b[:rank], bias.astype(np.float32), self.mean)

    def check(self, slot: SlotKey) -> None:
        """Check that the parts fit each other and that every value is finite.

        Args:
            slot: the slot of the delta, for errors.

        Raises:
            PatchTargetError: there is a without b or b without a, there is a mean without the pair, or there is nothing
                to add.
            PatchShapeError: the shapes of the parts do not fit each other, or an array is empty.
            PatchValueError: a value is NaN or infinity.
        """
        parts = self.parts()
        half = ("a" in parts) != ("b" in parts)
        if half or not {"b", "bias"} & set(parts) or ("mean" in parts and "a" not in parts):
            raise PatchTargetError(
                "the slot has only half of a pair" if half else "the slot has nothing to add, or a mean without a pair",
                field=slot_name(*slot, "a|b|bias|mean"),
                got=" and ".join(parts) or "no tensor",
                wanted="a with b, or a bias, or both (a mean only together with a pair)",
                fix="export the patch again, without slots to which nothing is added",
            )
        for part, values in parts.items():
            dimensions = 2 if part in ("a", "b") else 1
            if values.ndim != dimensions or values.size == 0:
                raise _misfit(slot, part, values.shape, f"{dimensions} dimension(s), none of size 0")
            if not np.isfinite(values).all():
                raise PatchValueError(
                    "the tensor holds NaN or infinity",
                    field=slot_name(*slot, part),
                    got=f"{np.count_nonzero(~np.isfinite(values))} of {values.size} values",
                    wanted="finite float32 values",
                    fix="fit the patch again with a larger ridge, or use a smaller strength",
                )
        if self.a is None or self.b is None:
            return
        (inputs, rank), out = self.a.shape, self.b.shape[1]
        if self.b.shape[0] != rank:
            raise _misfit(slot, "b", self.b.shape, f"[{rank}, {out}], because a is {[inputs, rank]}")
        if self.bias is not None and self.bias.shape[0] != out:
            raise _misfit(slot, "bias", self.bias.shape, f"[{out}], because b is {[rank, out]}")
        if self.mean is not None and self.mean.shape[0] != inputs:
            raise _misfit(slot, "mean", self.mean.shape, f"[{inputs}], because a is {[inputs, rank]}")


def check_slot(slot: Any) -> None:
    """Check that a key is (layer, site).

    Raises:
        PatchTargetError: the key is not such a pair, or there is no such site.
    """
    if isinstance(slot, tuple) and len(slot) == 2:
        layer, site = slot
        whole = isinstance(layer, numbers.Integral) and not isinstance(layer, bool)
        if whole and 0 <= layer <= MAX_LAYER and isinstance(site, str) and site in SITES:
            return
    raise PatchTargetError(
        "there is no such slot",
        field="deltas",
        got=shown(slot),
        wanted=f"(layer in 0..{MAX_LAYER}, {' | '.join(SITES)})",
        fix="use one of these sites",
    )


def _frozen(values: Any, part: str) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise PatchValueError(
            "the value is not an array of numbers",
            field=part,
            got=f"dtype {array.dtype}",
            wanted="float32",
            fix="convert it to float32",
        )
    return unchangeable(array)


def _misfit(slot: SlotKey, part: str, got: tuple[int, ...], wanted: str) -> PatchShapeError:
    return PatchShapeError(
        "the shape of the tensor does not fit",
        field=slot_name(*slot, part),
        got=list(got),
        wanted=wanted,
        fix="use patches of one base model, and leave out pairs of rank 0",
    )
