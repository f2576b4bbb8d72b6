"""The graph that copies buffers on a device, which the edge writes as bytes, read with the package `onnx`."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tp_runtime.session.device_copies import copy_graph


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_graph_that_copies_is_one_valid_pad(dtype: type[np.generic]) -> None:
    model = onnx.load_model_from_string(copy_graph(np.dtype(dtype)))
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Pad", ["source", "pads"], ["target"])
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert kinds == {"source": kind, "pads": onnx.TensorProto.INT64, "target": kind}
