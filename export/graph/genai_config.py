"""Write genai_config.json, which onnxruntime-genai needs next to the graph.

The graph itself needs no change: the config names its inputs and outputs, and the slots, `tp.first_logit` and the
lengths of windowed layers have defaults.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tp_runtime.session import past_name, present_name

from ..decoder import kv_shape

CONFIG = "genai_config.json"


def genai_config(config: Any, window: int, eos_ids: Collection[int]) -> dict[str, Any]:
    """Return the config of one exported graph, for onnxruntime-genai's plain decoder.

    Args:
        config: the transformers text config.
        window: the number of tokens that the graph can process; it can be less than what the config says.
        eos_ids: the token ids that end an answer.

    Returns:
        A config with greedy search as the default. Past and present cache share no buffer, because only the graphs
        of the fused route could share one.
    """
    kv_heads, head_size = kv_shape(config)
    eos = sorted(eos_ids)
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": eos[0] if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": eos[0] if config.pad_token_id is None else config.pad_token_id,
            "context_length": window,
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
                    "past_key_names": past_name("%d", "key"),
                    "past_value_names": past_name("%d", "value"),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": present_name("%d", "key"),
                    "present_value_names": present_name("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": window,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }


def write_genai_config(config: Any, window: int, eos_ids: Collection[int], folder: Path) -> str:
    """Write the config into `folder` and return the file's name; the arguments are those of `genai_config`."""
    text = json.dumps(genai_config(config, window, eos_ids), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return CONFIG
