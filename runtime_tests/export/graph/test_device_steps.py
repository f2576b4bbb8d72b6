"""The largest logits that a graph for CUDA returns, on the CPU provider."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tp_export.graph.device_steps import add_best

BEST = 16


def session(vocab: int, part: int, dtype: ir.DataType = ir.DataType.FLOAT) -> onnxruntime.InferenceSession:
    """Return a graph whose logits are its input, with the outputs for the largest ones."""
    given = ir.Value(name="given", shape=ir.Shape(["rows", "steps", vocab]), type=ir.TensorType(dtype))
    same = ir.node("Identity", [given])
    logits = same.outputs[0]
    logits.name, logits.shape, logits.dtype = "logits", given.shape, dtype
    model = ir.Model(ir.Graph([given], [logits], nodes=[same], opset_imports={"": 20}), ir_version=10)
    add_best(model, vocab, BEST, part)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("vocab", "part"), [(300, 400), (300, 60), (301, 60), (64, 16)])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_the_largest_logits_are_returned_with_their_ids(vocab: int, part: int, dtype: ir.DataType) -> None:
    """In one part, in parts that divide the vocabulary, and in parts of which the last is filled up."""
    logits = np.round(np.random.default_rng(0).standard_normal((2, 3, vocab)) * 4).astype(dtype.numpy())  # many ties
    logits[0, 0, :50], logits[1, 2, 7] = -np.inf, np.inf
    values, ids = session(vocab, part, dtype).run(["tp.best_values", "tp.best_ids"], {"given": logits})
    for row, value, token in zip(logits.reshape(6, vocab), values, ids, strict=True):
        assert np.array_equal(np.sort(value), np.sort(row)[-BEST:])
        assert np.array_equal(row[token], value) and len(set(token.tolist())) == BEST


@pytest.mark.parametrize("part", [400, 60])
def test_nan_counts_as_minus_infinity(part: int) -> None:
    logits = np.random.default_rng(1).standard_normal((1, 1, 300)).astype(np.float32)
    logits[0, 0, ::2] = np.nan
    values, ids = session(300, part).run(["tp.best_values", "tp.best_ids"], {"given": logits})
    assert np.array_equal(np.sort(values[0]), np.sort(logits[0, 0, 1::2])[-BEST:]) and np.all(ids % 2 == 1)
