"""What onnxruntime-genai needs beside the graph: genai_config.json in the folder, and a patch as an `.onnx_adapter`.

The graph needs no change: its inputs and outputs are named in the config, slots and `tp.first_logit` have defaults, and
genai's adapters are values for overridable initializers, which slots are.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from tp_runtime.atomic import atomic_file
from tp_runtime.device import require_onnxruntime
from tp_runtime.errors import PatchFormatError
from tp_runtime.folder import ModelFolder
from tp_runtime.patch import Patch
from tp_runtime.slots import check_base, fit_slots, slot_arrays

from .adapters import kv_shape
from .weights_only import refuse_prefix

CONFIG = "genai_config.json"


def genai_config(config: Any, eos_ids: Collection[int]) -> dict[str, Any]:
    """The config of one exported graph, for onnxruntime-genai's plain decoder.

    Args:
        config: the transformers text config.
        eos_ids: token ids that end an answer.

    Returns:
        Greedy search by default, and a cache of its own for each step's output, which both export routes have.
    """
    kv_heads, head_size = kv_shape(config)
    eos = sorted(eos_ids)
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": eos[0] if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": eos[0] if config.pad_token_id is None else config.pad_token_id,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": "model.onnx",
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }


def write_genai_config(config: Any, eos_ids: Collection[int], folder: Path) -> str:
    """Write it into `folder`; returns the file's name."""
    (folder / CONFIG).write_text(json.dumps(genai_config(config, eos_ids), indent=2) + "\n", encoding="utf-8")
    return CONFIG


def write_adapter(patch: Patch, folder: ModelFolder, out: Path) -> None:
    """Write a patch as an `.onnx_adapter` for the slots of one exported folder, whole or not at all.

    Args:
        patch: the patch.
        folder: the export.
        out: ends in .onnx_adapter; a file there is replaced.

    Raises:
        PatchFormatError: another suffix.
        BaseMismatchError, PatchTargetError, PatchShapeError, PatchValueError: the patch does not fit the folder.
        DeviceUnavailableError: no ONNX Runtime.
        OSError: the operating system's error; no file is left behind.
    """
    if out.suffix != ".onnx_adapter":
        raise PatchFormatError("the name of an adapter", field="OUT", got=out.name, wanted="*.onnx_adapter")
    refuse_prefix(patch, "onnxruntime-genai adapter")
    check_base(patch, folder.base_model, folder.base_digest, folder.precision)
    deltas = fit_slots(patch, folder.slots)
    ort = require_onnxruntime()
    dtype = np.float16 if folder.kv.dtype == "f16" else np.float32
    values = {}
    for key, slot in folder.slots.items():
        # A slot that is left alone keeps its default, which is the base unless the folder has a patch as its default.
        if key in deltas or folder.default_patch is not None:
            for name, array in slot_arrays(deltas.get(key), slot, dtype).items():
                values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    with atomic_file(out) as temporary:
        adapter.export_adapter(str(temporary))
