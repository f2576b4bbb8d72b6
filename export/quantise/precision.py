"""The precisions of an export, and which quantiser serves a model best."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources

from tqdm import tqdm

from tp_runtime.errors import ModelFormatError
from tp_runtime.patch import FLOAT_PRECISIONS

from .blocks import Blocks, FloatArray, k_quant, round_to_nearest

Quantiser = Callable[[FloatArray], Blocks]

_INT8: Quantiser = partial(round_to_nearest, bits=8, symmetric=True)
_INT4: Quantiser = partial(round_to_nearest, bits=4, symmetric=True)
_RTN: Quantiser = partial(round_to_nearest, bits=4, symmetric=False)


@dataclass(frozen=True)
class Precision:
    """A quantised precision.

    Attributes:
        name: as in patch_slots.json and in the patches fitted for it.
        linear: quantiser of the linear layers.
        head: of the head and the table of tokens, symmetric. Eight bits lose next to nothing there, four a third of
            what the layers lose; but in a small model the head is up to two thirds of the bytes of a token.
    """

    name: str
    linear: Quantiser
    head: Quantiser

    def quantise(self, weight: FloatArray, *, is_head: bool) -> Blocks:
        """Blocks of a weight [K, N]."""
        return (self.head if is_head else self.linear)(weight)


_QUANTISED: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("int8", _INT8, _INT8),
        Precision("int4-symmetric", _INT4, _INT8),
        Precision("int4-rtn", _RTN, _INT8),
        Precision("int4-k-quant", partial(k_quant, bits=4), _INT8),
        Precision("int4-symmetric-head4", _INT4, _INT4),
        Precision("int4-rtn-head4", _RTN, _INT4),
    )
}
MEASURED = "int4"  # stands for whichever of these loses least on the model at hand
INT4 = ("int4-symmetric", "int4-rtn", "int4-k-quant")
PRECISIONS = (*FLOAT_PRECISIONS, MEASURED, *_QUANTISED)


def quantised(name: str) -> Precision:
    """The quantised precision of that name."""
    return _QUANTISED[name]


def check_precision(name: str) -> None:
    """Raise ModelFormatError unless it is one of PRECISIONS."""
    if name not in PRECISIONS:
        raise ModelFormatError("unknown precision", field="precision", got=name, wanted=" | ".join(PRECISIONS))


def resolve(name: str, measure: Callable[[Precision], float]) -> str:
    """`int4` becomes the quantiser with the least loss; other names stay what they are.

    Args:
        name: one of PRECISIONS.
        measure: KL to float32 on held-out text of the model in a precision.
    """
    check_precision(name)
    if name != MEASURED:
        return name
    losses = {}
    for candidate in INT4:
        losses[candidate] = measure(quantised(candidate))
        tqdm.write(f"{candidate}: KL to float32 {losses[candidate]:.4f} nats a token", file=sys.stderr)
    return min(losses, key=losses.__getitem__)


def held_out_text() -> str:
    """Prose, instructions and code that no patch is fitted on."""
    return (resources.files("tp_export.data") / "held_out_text.txt").read_text(encoding="utf-8")
