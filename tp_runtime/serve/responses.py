"""From results to bodies and chunks in the form of OpenAI's API."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..text import AnswerChunk, LikelyToken, Result, TokenInfo, ToolCall

_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "closed": "stop"}
_NO_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI's API says it like this


@dataclass(frozen=True)
class Answering:
    """What all bodies and chunks of one response share.

    Attributes:
        id: the id of the response.
        model: the name that the request gave.
        fingerprint: says which graph and which patch made the answer.
        created: the time, in seconds since 1970.
        chat: whether the response is a chat completion.
    """

    id: str
    model: str
    fingerprint: str
    created: int
    chat: bool

    @classmethod
    def begin(cls, model: str, fingerprint: str, chat: bool) -> Answering:
        """Return the part for a new response."""
        kind = "chatcmpl" if chat else "cmpl"
        return cls(f"{kind}-{uuid.uuid4().hex}", model, fingerprint, int(time.time()), chat)

    def _head(self, chunk: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    # -- whole bodies -----------------------------------------------------------------------------------------------

    def body(self, results: Sequence[Result], prompts: int, before: Sequence[str]) -> dict[str, Any]:
        """Return the body of a response.

        Args:
            results: the answers.
            prompts: the number of prompts, whose tokens are counted once for all answers to each.
            before: for each answer the text to put in front of it.
        """
        choose = self._chat_choice if self.chat else self._text_choice
        choices = [choose(at, result, text) for at, (result, text) in enumerate(zip(results, before, strict=True))]
        return {**self._head(False), "choices": choices, "usage": usage(results, prompts), "timings": timings(results)}

    def _chat_choice(self, index: int, result: Result, before: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": before + result.text, "refusal": None}
        if result.reasoning is not None:
            message["reasoning_content"] = result.reasoning
        if result.tool_calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_call(call) for call in result.tool_calls]
        logprobs = None if result.logprobs is None else {"content": _chat_logprobs(result.logprobs), "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason(result)}

    def _text_choice(self, index: int, result: Result, before: str) -> dict[str, Any]:
        logprobs = None if result.logprobs is None else _text_logprobs(result.logprobs, len(before))
        text = before + result.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason(result)}

    # -- chunks of a stream -------------------------------------------------------------------------------------------

    def first(self, index: int, before: str) -> str:
        """Return the chunk that begins an answer."""
        if self.chat:
            return self._chunk(index, {"role": "assistant", "content": before}, None)
        return self._chunk(index, before, None)

    def grown(self, index: int, chunk: AnswerChunk, infos: Sequence[TokenInfo]) -> str:
        """Return the chunk for what an answer has grown by."""
        if not self.chat:
            return self._chunk(index, chunk.text, None, _text_logprobs(infos, 0) if infos else None)
        delta: dict[str, Any] = {}
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if chunk.tool_calls:
            delta["tool_calls"] = [{"index": at, **_call(call)} for at, call in enumerate(chunk.tool_calls)]
        return self._chunk(index, delta, None, {"content": _chat_logprobs(infos), "refusal": None} if infos else None)

    def last(self, index: int, result: Result) -> str:
        """Return the chunk that ends an answer; it says how long the answer took."""
        return self._chunk(index, {} if self.chat else "", reason(result), None, timings([result]))

    def end(self, results: Sequence[Result], prompts: int, with_usage: bool) -> str:
        """Return what ends a stream."""
        counted = {**self._head(True), "choices": [], "usage": usage(results, prompts)}
        return (event(counted) if with_usage else "") + "data: [DONE]\n\n"

    def _chunk(
        self, index: int, grown: Any, finish: str | None, logprobs: Any = None, timed: dict[str, Any] | None = None
    ) -> str:
        choice = {"index": index, ("delta" if self.chat else "text"): grown, "logprobs": logprobs}
        body = {**self._head(True), "choices": [{**choice, "finish_reason": finish}]}
        return event(body if timed is None else {**body, "timings": timed})


def event(body: object) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(results: Sequence[Result], prompts: int) -> dict[str, int]:
    """Return the numbers of tokens of a response; the answers to one prompt share its tokens."""
    share = max(1, len(results) // max(1, prompts))
    asked = sum(result.usage.prompt_tokens for result in results[::share])
    made = sum(result.usage.completion_tokens for result in results)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def timings(results: Sequence[Result]) -> dict[str, float | None]:
    """Return how long the first answer took: milliseconds to the first token, and per token after it."""
    first, pace = results[0].timings.first_token, results[0].timings.ms_per_token
    return {
        "first_token_ms": None if first is None else round(1000 * first, 3),
        "ms_per_token": None if pace is None else round(pace, 3),
    }


def reason(result: Result) -> str:
    """Return OpenAI's word for why an answer ended."""
    return "tool_calls" if result.tool_calls else _REASONS[result.finish_reason]


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _logprob(value: float) -> float:
    return value if math.isfinite(value) else _NO_LOGPROB


def _likely(token: LikelyToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": _logprob(token.logprob), "bytes": list(token.text.encode())}


def _chat_logprobs(infos: Sequence[TokenInfo]) -> list[dict[str, Any]]:
    return [{**_likely(info), "top_logprobs": [_likely(one) for one in info.top]} for info in infos]


def _text_logprobs(infos: Sequence[TokenInfo], offset: int) -> dict[str, Any]:
    offsets = []
    for info in infos:
        offsets.append(offset)
        offset += len(info.text)
    return {
        "tokens": [info.text for info in infos],
        "token_logprobs": [_logprob(info.logprob) for info in infos],
        "top_logprobs": [{one.text: _logprob(one.logprob) for one in info.top} for info in infos],
        "text_offset": offsets,
    }
