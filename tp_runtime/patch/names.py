"""The tensors of a patch file by name: which slot or which entries of the KV prefix a name addresses."""

from __future__ import annotations

import re

from ..errors import PatchTargetError

SlotKey = tuple[int, str]
"""(layer, site): which slot a delta belongs to."""
EntryKey = tuple[int, str]
"""(layer, "key" | "value"): one tensor of the KV prefix."""

SITES = ("mlp_out", "gate", "up", "gate_up", "q", "k", "v", "qkv", "o", "down")
DELTA_PARTS = ("a", "b", "bias", "mean")
KV_PARTS = ("key", "value")
SCALED_PARTS = ("a", "b", "key", "value")
"""The parts that a file may store as whole numbers, each with a tensor of scales beside it."""
COMPANIONS = ("scale", "zero")
"""What stands beside such a tensor; zero points stand beside tensors of four bits only."""
MAX_LAYER = 99_999

_LAYER = r"(0|[1-9][0-9]{0,4})"  # 0..MAX_LAYER
_NAME = re.compile(rf"layers\.{_LAYER}\.([a-z_]+)\.({'|'.join(DELTA_PARTS)})")
_ENTRY = re.compile(rf"prefix\.{_LAYER}\.({'|'.join(KV_PARTS)})")
_COMPANION = re.compile(rf"(.*\.({'|'.join(SCALED_PARTS)}))_({'|'.join(COMPANIONS)})", re.DOTALL)


def slot_name(layer: int, site: str, part: str) -> str:
    """Return the tensor name of one part of one slot, e.g. "layers.3.mlp_out.a"."""
    return f"layers.{layer}.{site}.{part}"


def entry_name(layer: int, part: str) -> str:
    """Return the tensor name of one layer's keys or values in the KV prefix, e.g. "prefix.3.key"."""
    return f"prefix.{layer}.{part}"


def scale_name(name: str) -> str:
    """Return the name of the tensor with the scales of a quantised tensor, e.g. "prefix.3.key_scale"."""
    return f"{name}_scale"


def zero_name(name: str) -> str:
    """Return the name of the tensor with the zero points of a tensor of four bits, e.g. "prefix.3.key_zero"."""
    return f"{name}_zero"


def parse_companion_name(name: str) -> tuple[str, str] | None:
    """Return which tensor a companion stands beside, and which of the `COMPANIONS` it is; None for other names."""
    match = _COMPANION.fullmatch(name)
    return None if match is None else (match[1], match[3])


def part_of(name: str) -> str:
    """Return the part at the end of a tensor's name, e.g. "a" of "layers.3.mlp_out.a"."""
    return name.rpartition(".")[2]


def parse_entry_name(name: str) -> EntryKey | None:
    """Return which tensor of the KV prefix a name addresses; None if it addresses none."""
    match = _ENTRY.fullmatch(name)
    return None if match is None else (int(match[1]), match[2])


def parse_slot_name(name: str) -> tuple[SlotKey, str]:
    """Return the slot and the part of its delta that a name addresses.

    Raises:
        PatchTargetError: the name addresses no slot.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in SITES:
        raise PatchTargetError(
            "the tensor's name does not address a slot or the KV prefix",
            field=repr(name),
            got="an unknown name" if match is None else f"site {match[2]!r}",
            wanted=f"layers.<i>.<site>.a|b|bias|mean with site {' | '.join(SITES)}, or prefix.<i>.key|value",
            fix="export the patch with tp-export, or rename the tensor",
        )
    return (int(match[1]), match[2]), match[3]
