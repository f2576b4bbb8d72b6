"""From the body of a request to the prompt and the options that an open model takes."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError
from .schema import ChatBody, CompletionBody, JsonObjectFormat, JsonSchemaFormat, Sampled

# Fields of a body that are settings of the same meaning, and their names in a request to the model.
_SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "logit_bias": "logit_bias",
    "min_tokens": "min_new_tokens",
    "seed": "seed",
    "regex": "regex",
    "grammar": "grammar",
}


def chat_options(body: ChatBody, most_tokens: int) -> dict[str, Any]:
    """Return the options of a chat completion.

    Args:
        body: the body.
        most_tokens: the largest number of new tokens that the server allows.

    Raises:
        RequestError: two fields contradict each other, or ask for more than the server allows.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError(
            "the request states two limits",
            field="max_tokens",
            got="max_tokens and max_completion_tokens",
            wanted="one",
        )
    options = _options(body, body.max_completion_tokens or body.max_tokens, most_tokens)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(
            "top_logprobs needs logprobs",
            field="top_logprobs",
            got=body.top_logprobs,
            wanted='null, or "logprobs": true',
        )
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    form = body.response_format
    if isinstance(form, JsonObjectFormat):
        options["json_schema"] = {"type": "object"}
    elif isinstance(form, JsonSchemaFormat):
        options["json_schema"] = form.json_schema.json_schema
    if body.tools is not None:
        options["tools"] = body.tools
    if body.tool_choice is not None:
        options["tool_choice"] = body.tool_choice
    if body.documents is not None:
        options["documents"] = body.documents
    if body.chat_template_kwargs is not None:
        options["template_args"] = body.chat_template_kwargs
    return options


def completion_options(body: CompletionBody, most_tokens: int) -> dict[str, Any]:
    """Return the options of a completion; see `chat_options`."""
    options = {**_options(body, body.max_tokens, most_tokens), "raw": True}
    if body.logprobs is not None:
        options["logprobs"] = body.logprobs
    return options


def answer_options(options: dict[str, Any], answer: int) -> dict[str, Any]:
    """Return the options of one of several answers: each has a seed of its own."""
    seed = options.get("seed")
    return options if seed is None else {**options, "seed": seed + answer}


def _options(body: Sampled, tokens: int | None, most_tokens: int) -> dict[str, Any]:
    if tokens is not None and tokens > most_tokens:
        raise RequestError(
            "the request asks for more tokens than the server allows",
            field="max_tokens",
            got=tokens,
            wanted=f"at most {most_tokens}",
            fix="ask for fewer, or start the server with a larger --max-tokens",
        )
    options: dict[str, Any] = {"sampling": "model", "max_new_tokens": tokens or most_tokens}
    for field, name in _SETTINGS.items():
        value = getattr(body, field)
        if value is not None:
            options[name] = value
    if body.stop is not None:
        options["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    return options
