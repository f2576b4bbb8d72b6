"""A patch as a LoRA for llama.cpp: one GGUF file with the low-rank pairs of the MLP's linear layers.

The tensors are `blk.N.ffn_down.weight.lora_a` [rank, in] and `.lora_b` [out, rank], as llama.cpp's own converter names
them from a PEFT folder; the scaling is alpha / rank = 1. llama.cpp's LoRA has no bias. Biases go into a control vector,
as far as one can represent them (control_vector.control_vector_parts).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from tp_runtime.errors import ModelFormatError, PatchTargetError
from tp_runtime.storage import atomic_file

from .gguf_kinds import GGUF_LORA
from .peft_out import Pair

# transformers' model type -> llama.cpp's name, if the two differ. All other names are the same.
_RENAMED = {"mistral": "llama", "gemma3_text": "gemma3"}
# The conversion to GGUF permutes or fuses the attention's linear layers, so those are left to llama.cpp's converter.
_MLP = ("ffn_gate", "ffn_up", "ffn_down")


def write_gguf_lora(pairs: Mapping[str, Pair], architecture: str, layers: int, out: Path) -> None:
    """Write the pairs, without their biases, to one file, completely or not at all.

    Args:
        pairs: a mapping from module name to pair, all of one rank (peft_out.pairs).
        architecture: the base's model type.
        layers: the base's number of layers.
        out: the path of the .gguf file. An existing file is replaced if this function wrote it.

    Raises:
        ModelFormatError: llama.cpp has no architecture of that name.
        PatchTargetError: all pairs are zero, or a pair is for a layer that is not one of the MLP's linear layers.
        OutputError: `out` holds something that is not replaced.
        OSError: the operating system reports an error. No file is left behind.
    """
    name = _RENAMED.get(architecture, architecture)
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    if name not in known:
        raise ModelFormatError(
            "the gguf package has no such architecture",
            field="config.model_type",
            got=architecture,
            wanted="one that llama.cpp runs",
            fix="write the PEFT folder and use llama.cpp's convert_lora_to_gguf.py",
        )
    names = gguf.get_tensor_name_map(known[name], layers)
    nonzero = {module: pair for module, pair in pairs.items() if pair.a.any()}
    if not nonzero:
        raise PatchTargetError(
            "the patch has no low-rank pair, only biases",
            field="PATCH",
            got=0,
            wanted="pairs",
            fix="run tp-export control-vector",
        )
    rank = next(iter(nonzero.values())).a.shape[0]
    with atomic_file(out, GGUF_LORA) as temporary:
        writer = gguf.GGUFWriter(temporary, name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for module, pair in nonzero.items():
            tensor = names.get_name(module)
            if tensor is None or tensor.rpartition(".")[2] not in _MLP:
                raise PatchTargetError(
                    "only pairs of the MLP's linear layers can be written as GGUF",
                    field=module,
                    got=tensor or "no tensor of that name",
                    wanted=" | ".join(_MLP),
                    fix="write the PEFT folder and use llama.cpp's convert_lora_to_gguf.py",
                )
            writer.add_tensor(f"{tensor}.weight.lora_a", np.ascontiguousarray(pair.a))
            writer.add_tensor(f"{tensor}.weight.lora_b", np.ascontiguousarray(pair.b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
