"""The text side of the runtime: tokenizer and chat template, requests, streams, and batches of texts.

This room knows nothing of ONNX Runtime, slots, or what a KV cache holds: it hands caches and graphs to `generation`.
"""

from .absorb import absorb_prompt
from .answer import AnswerChunk, AnswerReader
from .batch import Completion, TextBatch
from .beginning import Beginning, beginning_of, beginnings_of, writes_the_date
from .codec import Message, Style, TextCodec
from .detokenize import StopScanner
from .request import EncodedRequest, Request, RequestOptions, SamplingOptions, encode_request
from .result import LikelyToken, Result, Timings, TokenInfo, Usage
from .stream import TextStream
from .tokenizer_files import SPECIAL_TOKENS, TOKENIZER_FILES
from .tool_calls import ToolCall

__all__ = [
    "SPECIAL_TOKENS",
    "TOKENIZER_FILES",
    "AnswerChunk",
    "AnswerReader",
    "Beginning",
    "Completion",
    "EncodedRequest",
    "LikelyToken",
    "Message",
    "Request",
    "RequestOptions",
    "Result",
    "SamplingOptions",
    "StopScanner",
    "Style",
    "TextBatch",
    "TextCodec",
    "TextStream",
    "Timings",
    "TokenInfo",
    "ToolCall",
    "Usage",
    "absorb_prompt",
    "beginning_of",
    "beginnings_of",
    "encode_request",
    "writes_the_date",
]
