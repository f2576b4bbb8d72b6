"""A delta: what a patch adds to one slot, with its arithmetic.

This module does not handle layers, files or descriptions. Callers pass the slot, so that errors can name it.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PatchShapeError, PatchTargetError, PatchValueError, shown
from .names import DELTA_PARTS, MAX_LAYER, SITES, SlotKey, slot_name
from .tensors import JoinedTensor, ScaledTensor, SummedTensor, Tensor, tensor_of

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False, init=False)
class Delta:
    """The update of one slot: x -> x @ a @ b + bias, for x [..., in].

    The parts are held as tensors, whose memory is that of the patch file. Each read of `a`, `b`, `bias` or `mean` gives
    float32 values, which are made for it if the file stores another dtype.

    Args:
        a: the first factor [in, rank], its directions in order of energy; a tensor, or an array, which is copied.
        b: the second factor [rank, out].
        bias: the constant [out].
        mean: the mean of x over the fitted rows [in]; only `truncated` needs it.

    Attributes:
        tensors: the parts that there are, by name.

    Raises:
        PatchValueError: an array holds something other than numbers.
    """

    __slots__ = ("tensors",)
    tensors: Mapping[str, Tensor]

    def __init__(
        self,
        a: NDArray[Any] | Tensor | None = None,
        b: NDArray[Any] | Tensor | None = None,
        bias: NDArray[Any] | Tensor | None = None,
        mean: NDArray[Any] | Tensor | None = None,
    ) -> None:
        parts = zip(DELTA_PARTS, (a, b, bias, mean), strict=True)
        held = {part: _held(values, part) for part, values in parts if values is not None}
        object.__setattr__(self, "tensors", MappingProxyType(held))

    @property
    def a(self) -> Array | None:
        """The first factor [in, rank], read-only; None if there is none."""
        return self._values("a")

    @property
    def b(self) -> Array | None:
        """The second factor [rank, out], read-only; None if there is none."""
        return self._values("b")

    @property
    def bias(self) -> Array | None:
        """The constant [out], read-only; None if there is none."""
        return self._values("bias")

    @property
    def mean(self) -> Array | None:
        """The mean of x over the fitted rows [in], read-only; None if there is none."""
        return self._values("mean")

    def _values(self, part: str) -> Array | None:
        tensor = self.tensors.get(part)
        return None if tensor is None else tensor.float32()

    def parts(self) -> dict[str, Array]:
        """Return the float32 arrays of all parts that there are, by part name."""
        return {part: tensor.float32() for part, tensor in self.tensors.items()}

    @property
    def rank(self) -> int:
        """The number of directions; 0 if the delta has only a bias."""
        return self.tensors["a"].shape[1] if "a" in self.tensors else 0

    def scaled(self, strength: float) -> Delta:
        """Return the delta times `strength`. Only b and bias are scaled: scaling a as well would scale twice."""
        return Delta(
            **{
                part: ScaledTensor(tensor, strength) if part in ("b", "bias") else tensor
                for part, tensor in self.tensors.items()
            }
        )

    def joined(self, other: Delta, slot: SlotKey) -> Delta:
        """Return the sum: the factors are concatenated along the rank, and the biases are added.

        The sum has no mean, because a sum cannot be truncated.

        Args:
            other: the delta to add.
            slot: the slot of both deltas, for errors.

        Raises:
            PatchShapeError: the two deltas differ in [in] or [out].
        """
        one, two = self.tensors, other.tensors
        for part, axis in (("a", 0), ("b", 1), ("bias", 0)):
            if part in one and part in two and one[part].shape[axis] != two[part].shape[axis]:
                wanted = f"{one[part].shape[axis]} in dimension {axis}, as in the other patch"
                raise _misfit(slot, part, two[part].shape, wanted)
        parts = {part: tensor for part, tensor in {**two, **one}.items() if part != "mean"}
        for part, axis in (("a", 1), ("b", 0)):
            if part in one and part in two:
                parts[part] = JoinedTensor((one[part], two[part]), axis)
        if "bias" in one and "bias" in two:
            parts["bias"] = SummedTensor(one["bias"], two["bias"])
        return Delta(**parts)

    def truncated(self, rank: int, slot: SlotKey) -> Delta:
        """Return a delta with the first `rank` directions, whose bias includes the mean effect of the others.

        Args:
            rank: the largest rank to keep.
            slot: the slot of the delta, for errors.

        Raises:
            PatchValueError: there are directions to drop, but the delta has no mean.
        """
        a, b, bias, mean = self.a, self.b, self.bias, self.mean
        if a is None or b is None or self.rank <= rank:
            return self
        if mean is None:
            raise PatchValueError(
                "the slot has directions to drop, but no mean to correct its bias with",
                field=slot_name(*slot, "mean"),
                got="no such tensor",
                wanted=f"the mean input, [{a.shape[0]}]",
                fix=f"export the patch at rank {rank}, or keep rank >= {self.rank}",
            )
        # This constant is the average of the dropped part over the fitted rows.
        constant = (mean.astype(np.float64) @ a[:, rank:]) @ b[rank:]
        corrected = constant if bias is None else bias + constant
        return Delta(a[:, :rank], b[:rank], corrected.astype(np.float32), self.tensors["mean"])

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
        parts = self.tensors
        half = ("a" in parts) != ("b" in parts)
        if half or not {"b", "bias"} & set(parts) or ("mean" in parts and "a" not in parts):
            raise PatchTargetError(
                "the slot has only half of a pair" if half else "the slot has nothing to add, or a mean without a pair",
                field=slot_name(*slot, "a|b|bias|mean"),
                got=" and ".join(parts) or "no tensor",
                wanted="a with b, or a bias, or both (a mean only together with a pair)",
                fix="export the patch again, without slots to which nothing is added",
            )
        for part, tensor in parts.items():
            dimensions = 2 if part in ("a", "b") else 1
            if len(tensor.shape) != dimensions or tensor.size == 0:
                raise _misfit(slot, part, tensor.shape, f"{dimensions} dimension(s), none of size 0")
            finite = np.isfinite(tensor.native())
            if not finite.all():
                raise PatchValueError(
                    "the tensor holds NaN or infinity",
                    field=slot_name(*slot, part),
                    got=f"{np.count_nonzero(~finite)} of {tensor.size} values",
                    wanted="finite float32 values",
                    fix="fit the patch again with a larger ridge, or use a smaller strength",
                )
        if "a" not in parts:
            return
        (inputs, rank), out = parts["a"].shape, parts["b"].shape[1]
        if parts["b"].shape[0] != rank:
            raise _misfit(slot, "b", parts["b"].shape, f"[{rank}, {out}], because a is {[inputs, rank]}")
        if "bias" in parts and parts["bias"].shape[0] != out:
            raise _misfit(slot, "bias", parts["bias"].shape, f"[{out}], because b is {[rank, out]}")
        if "mean" in parts and parts["mean"].shape[0] != inputs:
            raise _misfit(slot, "mean", parts["mean"].shape, f"[{inputs}], because a is {[inputs, rank]}")


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


def _held(values: Any, part: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise PatchValueError(
            "the value is not an array of numbers",
            field=part,
            got=f"dtype {array.dtype}",
            wanted="float32",
            fix="convert it to float32",
        )
    return tensor_of(array)


def _misfit(slot: SlotKey, part: str, got: tuple[int, ...], wanted: str) -> PatchShapeError:
    return PatchShapeError(
        "the shape of the tensor does not fit",
        field=slot_name(*slot, part),
        got=list(got),
        wanted=wanted,
        fix="use patches of one base model, and leave out pairs of rank 0",
    )
