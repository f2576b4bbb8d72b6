"""Makes the files that llama-cpp-python's server is measured on: the float32 weights, and an adapter.

    python -m benchmarks.serve.rival_files PUBLISHED.gguf OUT

PUBLISHED.gguf is the file that the manifest's weights come from (benchmarks/gguf_files.py downloads it), so both
servers compute with the same values at the same bits. The adapter is a random LoRA of rank 4 on every layer's output
of the MLP, which is where and how large the random patches of the load test are.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

RANK = 4


def float32(source: Path, target: Path) -> None:
    """Write the weights in float32, with llama.cpp's own tool."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    code = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params))
    if code:
        raise SystemExit(f"{target.name}: llama.cpp's quantiser failed with code {code}")


def adapter(base: Path, target: Path) -> None:
    """Write a random LoRA for the model in `base`."""
    import gguf

    reader = gguf.GGUFReader(base)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    rng = np.random.default_rng(0)
    for tensor in reader.tensors:
        if tensor.name.endswith("ffn_down.weight"):
            inputs, outputs = (int(size) for size in tensor.shape)
            a = rng.standard_normal((RANK, inputs)).astype(np.float32) / RANK
            b = 0.02 * rng.standard_normal((outputs, RANK)).astype(np.float32)
            writer.add_tensor(f"{tensor.name}.lora_a", a)
            writer.add_tensor(f"{tensor.name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    published, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    float32(published, out / "f32.gguf")
    adapter(out / "f32.gguf", out / "lora.gguf")
