"""What a completion gives at its end: its text in parts, its ids, why it ended, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..generation import TokenLogprobs
from .answer import AnswerChunk
from .codec import TextCodec
from .encoder import EncodedRequest
from .tool_calls import ToolCall


@dataclass(frozen=True)
class Usage:
    """The number of tokens of a request.

    Attributes:
        prompt_tokens: the tokens of the prompt.
        completion_tokens: the tokens of the completion, including the end-of-sequence id.
        copied_tokens: those of them that lookup decoding copied from the request's own text.
    """

    prompt_tokens: int
    completion_tokens: int
    copied_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """The tokens of prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """How long a completion took.

    Attributes:
        first_token: the seconds to the first token, in a batch including the time spent waiting; None if there is none.
        total: the seconds to the last token.
        tokens: the number of tokens.
    """

    first_token: float | None
    total: float
    tokens: int

    @property
    def ms_per_token(self) -> float | None:
        """The milliseconds per token after the first one; None if there is only one."""
        if self.first_token is None or self.tokens < 2:
            return None
        return 1000 * (self.total - self.first_token) / (self.tokens - 1)


@dataclass(frozen=True)
class LikelyToken:
    """A token that was likely at some place.

    Attributes:
        token: its id.
        text: its text; a token that holds a part of a character has the replacement character.
        logprob: its log-probability in nats.
    """

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenInfo(LikelyToken):
    """A token of a completion.

    Attributes:
        top: the likeliest tokens at its place, the likeliest first; as many as the request asked for.
    """

    top: tuple[LikelyToken, ...] = ()


@dataclass(frozen=True)
class Result:
    """A completion that has ended.

    Attributes:
        text: the text, without what `reasoning` and `tool_calls` hold.
        token_ids: the ids, including the end-of-sequence id.
        finish_reason: "eos", "stop", "length" or "closed". After the last two the completion was cut, and what a
            constraint asks for may be incomplete.
        usage: the numbers of tokens.
        timings: how long it took.
        logprobs: the log-probabilities of each token of `token_ids`; None unless the request asked for them.
        tool_calls: the calls of the request's tools that the model wrote; empty if there are none.
        reasoning: the text between the model's thinking tags; None if the model's template has no such tags or the text
            has none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenInfo, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None


def result_of(
    request: EncodedRequest,
    codec: TextCodec,
    text: str,
    token_ids: Sequence[int],
    finish_reason: str,
    usage: Usage,
    timings: Timings,
) -> Result:
    """Return the result of a completion.

    Args:
        request: the request.
        codec: the tokenizer of the model.
        text: the text of the completion.
        token_ids: its ids, including the end-of-sequence id.
        finish_reason: why it ended.
        usage: the numbers of tokens.
        timings: how long it took.
    """
    records = request.sampler.logprobs[: len(token_ids)]
    infos = token_infos(records, codec) if request.sampler.records else None
    answer = AnswerChunk(text)
    if request.reader is not None:
        reader = request.reader.copy()
        begun, rest = reader.push(text), reader.end()
        answer = AnswerChunk(begun.text + rest.text, begun.reasoning + rest.reasoning, rest.tool_calls)
    reasoning = answer.reasoning or None
    return Result(answer.text, tuple(token_ids), finish_reason, usage, timings, infos, answer.tool_calls, reasoning)


def token_infos(records: Sequence[TokenLogprobs], codec: TextCodec) -> tuple[TokenInfo, ...]:
    """Return the records of a sampler with the text of each token."""
    texts: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in texts:
            texts[token] = codec.decode([token], skip_special_tokens=False)
        return texts[token]

    return tuple(
        TokenInfo(
            one.token,
            text(one.token),
            one.logprob,
            tuple(LikelyToken(token, text(token), logprob) for token, logprob in one.top),
        )
        for one in records
    )
