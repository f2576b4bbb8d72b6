"""The text side of the runtime: tokenizer and chat template, requests, streams, and batches of texts.

This room knows nothing of ONNX Runtime, slots, or what a KV cache holds: it hands caches and graphs to `generation`.
"""

from .absorb import absorb_prompt
from .answer import AnswerChunk, AnswerReader
from .batch import Completion, TextBatch
from .beginning import Beginning, beginning_of, beginnings_of, in_front_of, writes_the_date
from .codec import Message, Style, TextCodec
from .detokenize import StopScanner
from .encoder import EncodedRequest, RequestEncoder
from .messages import checked_messages
from .plain_values import plain_objects
from .request import Request, RequestOptions, SamplingOptions
from .result import LikelyToken, Result, Timings, TokenInfo, Usage
from .several import is_several, run_answers, run_prompts
from .stream import TextStream, start_stream
from .table_tokenizer import TableTokenizer
from .tables import build_tables, read_tables
from .tokenizer_files import SPECIAL_TOKENS, TABLES, TOKENIZER_FILES, TOOL_TEMPLATE
from .tool_calls import ToolCall

__all__ = [
    "SPECIAL_TOKENS",
    "TABLES",
    "TOKENIZER_FILES",
    "TOOL_TEMPLATE",
    "AnswerChunk",
    "AnswerReader",
    "Beginning",
    "Completion",
    "EncodedRequest",
    "LikelyToken",
    "Message",
    "Request",
    "RequestEncoder",
    "RequestOptions",
    "Result",
    "SamplingOptions",
    "StopScanner",
    "Style",
    "TableTokenizer",
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
    "build_tables",
    "checked_messages",
    "in_front_of",
    "is_several",
    "plain_objects",
    "read_tables",
    "run_answers",
    "run_prompts",
    "start_stream",
    "writes_the_date",
]
