"""A graph's inputs and outputs must be those that the folder's description states.

The rest of the runtime relies on the description: it binds inputs by name and reads outputs of known shapes. ONNX
Runtime would report a contradiction only in the middle of a run, or never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ModelFormatError
from ..patch import KV_PARTS
from ..storage import REEXPORT
from .description import GRAPH_FILE, past_name, present_name
from .model_folder import ModelFolder

FIRST_LOGIT = "tp.first_logit"
# What is added to the lengths that attention_mask gives, in windowed layers of a graph that has full layers too: to the
# length of each row, [rows or 1] int32, and to the longest of these lengths, [1] int32. The second one is an input of
# its own because the operator reads it on the host, and a value that is computed on a device cannot be captured there.
WINDOWED_SHIFT, WINDOWED_TOTAL = "tp.windowed_shift", "tp.windowed_total"
# What a graph for decode steps on a device has besides: what is added to the length of each row that attention_mask
# gives, [rows or 1] int32, so that one mask of ones serves all lengths; and the largest logits of each position, in no
# order.
LENGTH_SHIFT, BEST_VALUES, BEST_IDS = "tp.length_shift", "tp.best_values", "tp.best_ids"

_INTEGERS, _LENGTHS = ("tensor(int64)",), ("tensor(int32)",)
_FLOATS = {"f32": ("tensor(float)",), "f16": ("tensor(float16)",)}
_SHOWN = 3  # differences in the message

# The types that are accepted, and the shape; None is a dimension that differs from run to run.
_Wanted = tuple[tuple[str, ...], tuple[int | None, ...]]


def check_interface(session: Any, folder: ModelFolder) -> None:
    """Compare the inputs, the inputs with defaults, and the outputs of a session with the folder's description.

    Raises:
        ModelFormatError: a name is missing or unknown, or has another type or shape; the first differences are named.
    """
    kv = folder.kv
    entries = (_FLOATS[kv.dtype], (None, kv.heads, None, kv.head_dim))
    parts = [(layer, part) for layer in range(folder.layers) for part in KV_PARTS]
    inputs: dict[str, _Wanted] = dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids"), (_INTEGERS, (None, None))
    )
    inputs |= {past_name(*part): entries for part in parts}
    outputs: dict[str, _Wanted] = {present_name(*part): entries for part in parts}
    # The logits of a float32 graph are float32; those of a float16 graph may be either.
    outputs["logits"] = (("tensor(float)", "tensor(float16)"), (None, None, folder.vocab_size))
    defaults: dict[str, _Wanted] = {FIRST_LOGIT: (_INTEGERS, (1,))}
    if folder.windowed is not None:
        defaults |= {WINDOWED_SHIFT: (_LENGTHS, (None,)), WINDOWED_TOTAL: (_LENGTHS, (1,))}
    if folder.best is not None:
        defaults[LENGTH_SHIFT] = _LENGTHS, (None,)
        outputs |= {
            BEST_VALUES: (outputs["logits"][0], (None, folder.best)),
            BEST_IDS: (_INTEGERS, (None, folder.best)),
        }
    for slot in folder.slots.values():
        shapes = (None, slot.inputs, None), (None, None, slot.outputs), (None, 1, slot.outputs)
        defaults |= {name: (_FLOATS[kv.dtype], shape) for name, shape in zip(slot.tensors, shapes, strict=True)}
    differences = [
        *_differences("input", inputs, session.get_inputs()),
        *_differences("output", outputs, session.get_outputs()),
        *_differences("input with a default", defaults, session.get_overridable_initializers()),
    ]
    if differences:
        more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
        raise ModelFormatError(
            "the graph's inputs and outputs contradict patch_slots.json",
            field=GRAPH_FILE,
            got="; ".join([*differences[:_SHOWN], *more]),
            wanted="the inputs, outputs and slots that patch_slots.json describes",
            fix=REEXPORT,
        )


def _differences(what: str, wanted: dict[str, _Wanted], found: Sequence[Any]) -> list[str]:
    """Return a clause for each difference; `what` names the kind of value."""
    known = {value.name: value for value in found}
    clauses = [f"no {what} {name}" for name in wanted if name not in known]
    clauses += [f"an unknown {what} {name!a:.60}" for name in known if name not in wanted]
    for name, (types, shape) in wanted.items():
        if name in known and not _fits(known[name], types, shape):
            got = known[name]
            clauses.append(f"{what} {name} is {got.type} {_text(got.shape)} and not {types[0]} {_text(shape)}")
    return clauses


def _fits(value: Any, types: tuple[str, ...], shape: tuple[int | None, ...]) -> bool:
    # A dimension of a graph is a number, or a name (or None) if it is free or not known.
    dims = list(value.shape or ())
    if value.type not in types or len(dims) != len(shape):
        return False
    return all(type(got) is not int or got == size for got, size in zip(dims, shape, strict=True))


def _text(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(size) if type(size) is int else "?" for size in shape or ()) + "]"
