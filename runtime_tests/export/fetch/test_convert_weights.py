"""The conversion of a GGUF file's weights, on a tiny random Llama."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from tp_export.fetch.from_gguf import convert_weights, write_sampling
from tp_runtime.errors import ModelFormatError

BLOCK = {
    **{f"attn_{name}": (32, 32) for name in ("q", "output")},
    **{f"attn_{name}": (16, 32) for name in ("k", "v")},
    **{f"ffn_{name}": (48, 32) for name in ("gate", "up")},
    "ffn_down": (32, 48),
    **{f"{name}_norm": (32,) for name in ("attn", "ffn")},
}
SHAPES = {"token_embd": (40, 32), "output_norm": (32,)} | {
    f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in BLOCK.items()
}


def write_gguf(path: Path, missing: str | None = None) -> Path:
    """Write a GGUF file with two layers and a tied head, without the tensor `missing`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(40)
    writer.add_token_list([f"t{i}" for i in range(40)])
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        if name != missing:
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_weight_is_converted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_weights(write_gguf(tmp_path / "model.gguf"), out)
    assert len(load_file(out / "model.safetensors")) == len(SHAPES)


def test_the_publishers_sampling_settings_are_added(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": 1}')
    write_sampling({"temperature": 0.2, "top_k": 5}, tmp_path)
    assert json.loads(path.read_text()) == {"eos_token_id": 1, "do_sample": True, "temperature": 0.2, "top_k": 5}


@pytest.mark.parametrize("missing", ["blk.1.attn_q", "token_embd", "output_norm"])
def test_a_weight_that_the_file_lacks_is_not_drawn_at_random(missing: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ModelFormatError, match="weights of the model are missing from the GGUF file"):
        convert_weights(write_gguf(tmp_path / "model.gguf", missing), out)
    assert not out.exists()
