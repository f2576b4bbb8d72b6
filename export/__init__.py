"""The host side: it computes thought patches with torch and exports base models to ONNX with patch slots."""
