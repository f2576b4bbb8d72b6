"""Files of other tools: LoRA adapters, control vectors and onnxruntime-genai adapters, read and written.

Knows nothing of how a patch is fitted.
"""

from .control_vector import carried, check_lossless, read_control_vector, write_control_vector
from .gguf_lora import write_gguf_lora
from .imported import imported_patch
from .onnx_adapter import write_adapter
from .peft_in import is_adapter, read_peft
from .peft_out import pairs, write_peft

__all__ = [
    "carried",
    "check_lossless",
    "imported_patch",
    "is_adapter",
    "pairs",
    "read_control_vector",
    "read_peft",
    "write_adapter",
    "write_control_vector",
    "write_gguf_lora",
    "write_peft",
]
