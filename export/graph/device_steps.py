"""Complete a graph for decode steps on a device: let the host send and fetch little.

A step of a small model takes less time than copying a vocabulary of logits to the host and picking from them there. So
a graph that computes in float16, which is one for CUDA, also returns the largest logits with their ids, which suffice
for greedy choice and for top_k. And it takes the lengths of the caches as numbers: a mask on the device is then written
once, and not with every step.

Graphs for the CPU get none of this: there the logits are in the host's memory, and an output that nobody reads is
computed all the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tp_runtime.session import BEST_IDS, BEST_VALUES, LENGTH_SHIFT, WINDOWED_SHIFT

from .edit import add_initializer

BEST = 128  # the number of the largest logits, with at most 10 bytes each
_LENGTHS = 5  # the input of the attention operator
# One kernel block selects from one row of numbers, so a vocabulary in one row would keep a GPU waiting for a single
# block. Parts of about this many numbers are selected from at the same time, and then from what they yield.
_PART = 4096


def add_device_steps(model: ir.Model, vocab_size: int) -> int:
    """Add the outputs `tp.best_values` and `tp.best_ids`, and the overridable input `tp.length_shift`.

    Args:
        model: a graph of the route `fused` in its final precision, changed in place.
        vocab_size: the number of logits.

    Returns:
        The number of the largest logits that the graph returns.
    """
    _add_length_shift(model)
    best = min(BEST, vocab_size)
    add_best(model, vocab_size, best)
    return best


def _add_length_shift(model: ir.Model) -> None:
    """Add `tp.length_shift` [rows or 1] int32 to the lengths that `attention_mask` gives; its default is zero."""
    shift = add_initializer(model, LENGTH_SHIFT, np.zeros(1, np.int32))
    shift.shape = ir.Shape([f"{LENGTH_SHIFT}.rows"])
    model.graph.inputs.append(shift)
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    lengths = next(iter({_of_full_layers(node.inputs[_LENGTHS]) for node in nodes}))
    producer = lengths.producer()
    assert producer is not None
    add = ir.node("Add", [lengths, shift], name=f"{LENGTH_SHIFT}.Add")
    add.outputs[0].dtype, add.outputs[0].shape = ir.DataType.INT32, lengths.shape
    ir.convenience.replace_all_uses_with(lengths, add.outputs[0])
    add.replace_input_with(0, lengths)
    model.graph.insert_after(producer, add)


def _of_full_layers(lengths: ir.Value | None) -> ir.Value:
    """Return the lengths that `attention_mask` gives, which all layers share: in front of what windowed layers add."""
    assert lengths is not None
    producer = lengths.producer()
    assert producer is not None
    others = [value for value in producer.inputs if value is not None and value.name != WINDOWED_SHIFT]
    return others[0] if len(others) < len(producer.inputs) else lengths


def add_best(model: ir.Model, vocab_size: int, best: int, part: int = _PART) -> None:
    """Return the `best` largest logits of every position in two more outputs; NaN counts as -inf.

    The outputs are `tp.best_values` and `tp.best_ids`, [batch * logits length, best], in no order. Which of several
    equal logits are among them is not specified, because ONNX Runtime's CUDA kernel specifies it neither.

    Args:
        model: the graph, changed in place.
        vocab_size: the number of logits.
        best: the number of the largest logits, at most `vocab_size`.
        part: about how many logits are selected from at a time.
    """
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    dtype = logits.dtype
    assert dtype is not None
    width = _part_width(vocab_size, max(part, best))
    parts = -(-vocab_size // width)
    least = np.array(-np.inf, dtype.numpy())
    steps = _Steps(model)
    is_nan = steps.add("IsNaN", [logits], dtype=ir.DataType.BOOL)
    found = steps.add("Where", [is_nan, steps.constant("least", least), logits], dtype=dtype)
    if parts * width > vocab_size:
        pads = steps.constant("pads", np.array([0, 0, 0, 0, 0, parts * width - vocab_size], np.int64))
        found = steps.add("Pad", [found, pads, steps.constant("padding", least)], dtype=dtype)
    shape = [-1, vocab_size] if parts == 1 else [-1, parts, width]
    found = steps.add("Reshape", [found, steps.constant("parts", np.array(shape, np.int64))], dtype=dtype)
    values, ids = steps.largest(found, best)
    if parts > 1:
        firsts = np.arange(parts, dtype=np.int64)[:, None] * width
        ids = steps.add("Add", [ids, steps.constant("firsts", firsts)], dtype=ir.DataType.INT64)
        joined = steps.constant("joined", np.array([-1, parts * best], np.int64))
        values = steps.add("Reshape", [values, joined], dtype=dtype)
        ids = steps.add("Reshape", [ids, joined], dtype=ir.DataType.INT64)
        values, places = steps.largest(values, best)
        ids = steps.add("GatherElements", [ids, places], {"axis": 1}, dtype=ir.DataType.INT64)
    for value, name in ((values, BEST_VALUES), (ids, BEST_IDS)):
        value.name, value.shape = name, ir.Shape(["best_rows", best])
        model.graph.outputs.append(value)


def _part_width(vocab_size: int, part: int) -> int:
    """Return a number of logits near `part` that divides the vocabulary, or `part` if there is none."""
    if vocab_size <= 2 * part:
        return vocab_size
    near = [width for width in range(part // 2, 2 * part + 1) if vocab_size % width == 0]
    return min(near, key=lambda width: abs(width - part), default=part)


class _Steps:
    """The nodes behind the logits, at the end of a graph."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._number = model, 0

    def constant(self, name: str, content: np.ndarray) -> ir.Value:
        return add_initializer(self._model, f"tp.best.{name}", content)

    def node(self, op_type: str, inputs: list[ir.Value], attributes: dict[str, int], outputs: int = 1) -> ir.Node:
        self._number += 1
        name = f"tp.best.{self._number}.{op_type}"
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
        self._model.graph.append(node)
        return node

    def add(
        self, op_type: str, inputs: list[ir.Value], attributes: dict[str, int] | None = None, *, dtype: ir.DataType
    ) -> ir.Value:
        (out,) = self.node(op_type, inputs, attributes or {}).outputs
        out.dtype = dtype
        return out

    def largest(self, values: ir.Value, number: int) -> tuple[ir.Value, ir.Value]:
        """Return the largest numbers of the last axis and their places."""
        # Sorting costs the kernel more than selecting, and the host sorts the few that it needs.
        wanted = self.constant(f"number.{self._number}", np.array([number], np.int64))
        assert values.dtype is not None
        found, places = self.node("TopK", [values, wanted], {"axis": -1, "largest": 1, "sorted": 0}, 2).outputs
        found.dtype, places.dtype = values.dtype, ir.DataType.INT64
        return found, places
