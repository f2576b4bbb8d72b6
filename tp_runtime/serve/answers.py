"""The bodies of answers, for the OpenAPI document. responses.py makes them, and a test compares the two."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A body without other fields than these."""

    model_config = ConfigDict(extra="forbid")


class Usage(Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TimingsPart(Answer):
    """How long the first answer took, in milliseconds."""

    first_token_ms: float | None
    ms_per_token: float | None


class LikelyTokenPart(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenPart(LikelyTokenPart):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[LikelyTokenPart]


class ChatLogprobs(Answer):
    """The log-probabilities of an answer."""

    content: list[TokenPart]
    refusal: None


class FunctionPart(Answer):
    """The function of a call; `arguments` is JSON text."""

    name: str
    arguments: str


class CallPart(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionPart


class AnswerMessage(Answer):
    """The message of an answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[CallPart] | None = None


class ChatChoice(Answer):
    """One answer of a chat completion."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class TextLogprobs(Answer):
    """The log-probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Answer):
    """One answer of a completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class _Completion(Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    timings: TimingsPart


class ChatCompletion(_Completion):
    """The body of a chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completion):
    """The body of a completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class CapabilitiesPart(Answer):
    """What a patch can do, in the words of `tp-runtime inspect`."""

    form: str
    strength: str
    sums: str
    system: str
    precision: str


class EntriesPart(Answer):
    """The entries of a patch: their mean number over the layers, and how many first ids of a prompt they replace."""

    mean: float
    replaces: int


class PatchPart(Answer):
    """A patch: what it is, can do and keeps."""

    name: str
    identity: str
    bytes: int
    method: str
    fidelity: dict[str, Any] | None
    stop: list[str]
    capabilities: CapabilitiesPart
    context_digest: str | None
    report: dict[str, Any] | None
    entries: EntriesPart | None


class ModelPart(Answer):
    """The model itself: how it is asked, and what a token costs; see cards.py."""

    style: Literal["chat", "completion"]
    precision: str
    context_window: int
    max_tokens: int
    kv_bytes_per_token: int
    keeps_prompts: bool


class ModelCard(Answer):
    """What a request can name as its model: the model itself, or a patch."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    model: ModelPart | None = None
    patch: PatchPart | None = None


class ModelList(Answer):
    """All that a request can name."""

    object: Literal["list"]
    data: list[ModelCard]


class State(Answer):
    """The state of the server."""

    status: str
