"""Edge runtime: one ONNX graph, many thought patches. Needs onnxruntime and numpy; never torch, never onnx."""
