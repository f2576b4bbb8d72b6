"""The edge runtime: it runs one ONNX graph under many thought patches.

It needs onnxruntime, numpy, tokenizers and jinja2, and it never imports torch or onnx.

from tp_runtime import PatchedModel

model = PatchedModel.from_pretrained("build/demo/gemma-3-270m/model")
model.load_patch("build/demo/gemma-3-270m/patch.safetensors", "notes")
print(model.generate("lunch with Ada on Monday at 12:30 in the park ->", patch="notes"))
"""

from .model import ACTIVE, PatchedModel
from .patch import Delta, Patch
from .session import share_threads
from .text import Completion, Result, TextBatch, TextStream, ToolCall

__all__ = [
    "ACTIVE",
    "Completion",
    "Delta",
    "Patch",
    "PatchedModel",
    "Result",
    "TextBatch",
    "TextStream",
    "ToolCall",
    "share_threads",
]
