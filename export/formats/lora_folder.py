"""This module recognises the folders that `tp-export lora` writes, before one is replaced."""

from __future__ import annotations

from pathlib import Path

from tp_runtime.storage import Kind, foreign_entries, parse_json_object

from .gguf_kinds import CONTROL_VECTOR, GGUF_LORA
from .peft_out import CONFIG_FILE, WEIGHTS_FILE, is_written_here

# The two files of the form for llama.cpp; the second one is left out for a patch without biases.
LORA_FILE, BIASES_FILE = "lora.gguf", "control-vector.gguf"


def _no_lora_folder(path: Path) -> str | None:
    """Return what a folder is if it is not a LoRA that this project wrote, in the form of PEFT or of llama.cpp."""
    if not (path / LORA_FILE).is_file():
        if (found := foreign_entries(path, (CONFIG_FILE, WEIGHTS_FILE))) is not None:
            return found
        config = parse_json_object((path / CONFIG_FILE).read_bytes())
        return None if is_written_here(config) else "a LoRA folder that another tool wrote"
    if (found := foreign_entries(path, (LORA_FILE, BIASES_FILE))) is not None:
        return found
    biases = path / BIASES_FILE
    return GGUF_LORA.mismatch(path / LORA_FILE) or (CONTROL_VECTOR.mismatch(biases) if biases.exists() else None)


LORA_FOLDER = Kind("a folder that tp-export lora wrote", _no_lora_folder)
