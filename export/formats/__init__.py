"""Files of other tools, read and written: LoRA adapters, control vectors and onnxruntime-genai adapters.

This room knows nothing of how a patch is fitted.
"""

from .control_vector import (
    blocks_without_direction,
    check_lossless,
    control_vector_parts,
    read_control_vector,
    write_control_vector,
)
from .gguf_kinds import CONTROL_VECTOR
from .gguf_lora import write_gguf_lora
from .imported import imported_patch
from .lora_folder import BIASES_FILE, LORA_FILE, LORA_FOLDER
from .onnx_adapter import ONNX_ADAPTER, write_onnx_adapter
from .peft_in import Adapter, is_lora_folder, read_peft
from .peft_out import pairs, write_peft

__all__ = [
    "BIASES_FILE",
    "CONTROL_VECTOR",
    "LORA_FILE",
    "LORA_FOLDER",
    "ONNX_ADAPTER",
    "Adapter",
    "blocks_without_direction",
    "check_lossless",
    "control_vector_parts",
    "imported_patch",
    "is_lora_folder",
    "pairs",
    "read_control_vector",
    "read_peft",
    "write_control_vector",
    "write_gguf_lora",
    "write_onnx_adapter",
    "write_peft",
]
