"""This module recognises the GGUF files that this project writes, by the settings in them, before one is replaced."""

from __future__ import annotations

from pathlib import Path

import gguf

from tp_runtime.storage import Kind

CONTROL_VECTOR_ARCHITECTURE = "controlvector"
# Other tools write further settings, such as llama.cpp's converter the name of the base.
_CONTROL_VECTOR = {
    gguf.Keys.General.ARCHITECTURE,
    f"{CONTROL_VECTOR_ARCHITECTURE}.model_hint",
    f"{CONTROL_VECTOR_ARCHITECTURE}.layer_count",
}
_LORA = {
    gguf.Keys.General.ARCHITECTURE,
    gguf.Keys.General.TYPE,
    gguf.Keys.Adapter.TYPE,
    gguf.Keys.Adapter.LORA_ALPHA,
}


def _no_control_vector(file: Path) -> str | None:
    return None if _settings(file) == _CONTROL_VECTOR else "another GGUF file"


def _no_lora(file: Path) -> str | None:
    return None if _settings(file) == _LORA else "another GGUF file"


def _settings(file: Path) -> set[str]:
    return {name for name in gguf.GGUFReader(file).fields if not name.startswith("GGUF.")}


CONTROL_VECTOR = Kind("a control vector", _no_control_vector)
GGUF_LORA = Kind("a LoRA that tp-export lora --gguf wrote", _no_lora)
