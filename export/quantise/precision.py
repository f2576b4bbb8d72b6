"""The precisions of an export, and the choice of the quantiser that loses least on a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources

from torch import Tensor

from tp_runtime.errors import ModelFormatError
from tp_runtime.patch import FLOAT_PRECISIONS

from .blocks import WIDE, Blocks, FloatArray, k_quant, round_to_nearest
from .calibrated import Calibrated
from .gptq import gptq
from .hqq import hqq

Quantiser = Callable[[FloatArray], Blocks]

_INT8: Quantiser = partial(round_to_nearest, bits=8, symmetric=True, widest=WIDE)
_INT8_NARROW: Quantiser = partial(round_to_nearest, bits=8, symmetric=True)
_INT4: Quantiser = partial(round_to_nearest, bits=4, symmetric=True)
_RTN: Quantiser = partial(round_to_nearest, bits=4, symmetric=False)
_GPTQ: Calibrated = partial(gptq, symmetric=False)
_GPTQ_SYMMETRIC: Calibrated = partial(gptq, symmetric=True)
# The damping counts errors in all directions alike, as they matter where a tied table looks up a token.
_GPTQ_HEAD: Calibrated = partial(gptq, symmetric=True, damping=1.0)


@dataclass(frozen=True)
class Precision:
    """A quantised precision.

    Attributes:
        name: the name in patch_slots.json and in the patches that are fitted for this precision.
        linear: the quantiser of the linear layers.
        head: the quantiser of the head and the embedding table, symmetric. With eight bits they lose next to nothing,
            with four a third of what the layers lose. But in a small model the head is up to two thirds of the bytes
            that a decode step reads.
        calibrated: the quantiser of the linear layers of blocks by their rows in calibration texts; None for a
            precision that needs no texts. `linear` then quantises only what lies outside of blocks.
        calibrated_head: the quantiser of the head by its rows in calibration texts; None if `head` quantises it. A tied
            embedding table is the same weight.
        half: whether the graph computes in float16, scales included.
    """

    name: str
    linear: Quantiser
    head: Quantiser
    calibrated: Calibrated | None = None
    calibrated_head: Calibrated | None = None
    half: bool = False

    def quantise(self, weight: FloatArray, *, is_head: bool) -> Blocks:
        """Quantise a weight [K, N] into blocks."""
        return self._stored((self.head if is_head else self.linear)(weight))

    def calibrate(self, weight: FloatArray, hessian: Tensor) -> Blocks:
        """Quantise a weight [K, N] of a block's linear layer by the Hessian [K, K] of its rows; see `calibrated`."""
        assert self.calibrated is not None
        return self._stored(self.calibrated(weight, hessian))

    def calibrate_head(self, weight: FloatArray, hessian: Tensor) -> Blocks:
        """Quantise the head [K, N] by the Hessian [K, K] of its rows; see `calibrated_head`."""
        assert self.calibrated_head is not None
        return self._stored(self.calibrated_head(weight, hessian))

    def with_narrow_blocks(self) -> Precision:
        """Return the precision with blocks of 32 values at eight bits too, as earlier exports have them."""
        narrow = {_INT8: _INT8_NARROW}
        return replace(self, linear=narrow.get(self.linear, self.linear), head=narrow.get(self.head, self.head))

    def _stored(self, blocks: Blocks) -> Blocks:
        return blocks.with_half_scales() if self.half else blocks


_QUANTISED: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("int8", _INT8, _INT8),
        Precision("int4-symmetric", _INT4, _INT8),
        Precision("int4-rtn", _RTN, _INT8),
        Precision("int4-k-quant", partial(k_quant, bits=4), _INT8),
        Precision("int4-hqq", hqq, _INT8),
        Precision("int4-gptq-symmetric", _INT4, _INT8, _GPTQ_SYMMETRIC),
        Precision("int4-gptq", _RTN, _INT8, _GPTQ),
        Precision("int4-symmetric-head4", _INT4, _INT4),
        Precision("int4-rtn-head4", _RTN, _INT4),
        Precision("int4-gptq-symmetric-head4", _INT4, _INT4, _GPTQ_SYMMETRIC, _GPTQ_HEAD),
        Precision("int4-gptq-head4", _RTN, _INT4, _GPTQ, _GPTQ_HEAD),
    )
}
_HALF = "-fp16"  # ends the name of a precision with the weights of another one that computes in float16
_HALVES: Mapping[str, Precision] = {
    # Blocks of 32 have run on a GPU.
    name + _HALF: replace(precision.with_narrow_blocks(), name=name + _HALF, half=True)
    for name, precision in _QUANTISED.items()
    if name.startswith("int4")
}
MEASURED = ("int4", f"int4{_HALF}")  # each stands for the one of INT4 that loses least on the model
INT4 = ("int4-symmetric", "int4-rtn", "int4-k-quant", "int4-hqq", "int4-gptq-symmetric", "int4-gptq")
PRECISIONS = (*FLOAT_PRECISIONS, *MEASURED, *_QUANTISED, *_HALVES)


def quantised(name: str) -> Precision:
    """Return the quantised precision named `name`."""
    return _HALVES[name] if name in _HALVES else _QUANTISED[name]


def computes_in_float16(name: str) -> bool:
    """Return whether activations, slots, keys and values of the precision named `name` are float16."""
    return name == "fp16" or name.endswith(_HALF)


def check_precision(name: str) -> None:
    """Check that `name` is a known precision.

    Raises:
        ModelFormatError: `name` is not one of PRECISIONS.
    """
    if name not in PRECISIONS:
        raise ModelFormatError("the precision is unknown", field="precision", got=name, wanted=" | ".join(PRECISIONS))


def held_out_text() -> str:
    """Return prose, instructions and code that no patch is fitted on."""
    return (resources.files("tp_export.data") / "held_out_text.txt").read_text(encoding="utf-8")
