"""The precisions of an export, and which quantiser serves a model best."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources

from tqdm import tqdm

from tp_runtime.errors import ModelFormatError

from .quantise import Blocks, FloatArray, k_quant, round_to_nearest

Quantiser = Callable[[FloatArray], Blocks]

# int8, symmetric: half a thousandth of the KL that four bits cost there, and the head is a large part of a small model.
_HEAD: Quantiser = partial(round_to_nearest, bits=8, symmetric=True)
_QUANTISERS: Mapping[str, Quantiser] = {
    "int8": _HEAD,
    "int4-symmetric": partial(round_to_nearest, bits=4, symmetric=True),
    "int4-rtn": partial(round_to_nearest, bits=4, symmetric=False),
    "int4-k-quant": partial(k_quant, bits=4),
}
FLOATS = ("fp32", "fp16", "bf16")
MEASURED = "int4"  # stands for whichever of these loses least on the model at hand
INT4 = tuple(name for name in _QUANTISERS if name.startswith("int4"))
PRECISIONS = (*FLOATS, "int8", MEASURED, *INT4)


@dataclass(frozen=True)
class Precision:
    """A quantised precision.

    Attributes:
        name: as in patch_slots.json and in the patches fitted for it.
        linear: quantiser of the linear layers.
    """

    name: str
    linear: Quantiser

    def quantise(self, weight: FloatArray, *, is_head: bool) -> Blocks:
        """Blocks of a weight [K, N]; the head and the table of tokens have eight bits in every precision."""
        return (_HEAD if is_head else self.linear)(weight)


def quantised(name: str) -> Precision:
    """The quantised precision of that name."""
    return Precision(name, _QUANTISERS[name])


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
