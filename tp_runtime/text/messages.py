"""The messages of a chat: this module checks them and copies them, before any template sees them.

What transformers accepts is accepted: content as text or as parts of text, an assistant's tool calls, a tool's answers,
and further keys, such as name, tool_call_id and reasoning_content, which reach the template as they are. Parts that are
not text are refused, because the models are text models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError, shown
from .plain_values import check_unicode, plain_objects

_FORM = '{"role": str, "content": str}'
_PARTS = '[{"type": "text", "text": str}, ...]'
_CALL = '{"type": "function", "function": {"name": str, "arguments": {...}}}'


def checked_messages(messages: object, system: str | None = None) -> list[dict[str, Any]]:
    """Check the messages of a chat and return copies of them, with `system` in front.

    Args:
        messages: a string, which is one user message, or a list of messages.
        system: the text of a system message; None if there is none, or if `messages` has it.

    Raises:
        RequestError: the prompt is empty or malformed, a value is not one of JSON, or there are two system messages.
            The error names the path, e.g. messages[2].tool_calls[0].function.name.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": check_unicode(messages, "messages")}]
    elif not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray):
        got = type(messages).__name__
        raise RequestError("the value is not a prompt", field="messages", got=got, wanted="str or a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise _malformed(f"messages[{i}].role", message, _FORM)
    chat = plain_objects(messages, "messages", _FORM)
    for i, message in enumerate(chat):
        _check(message, f"messages[{i}]")
    if not chat:
        raise empty_prompt("messages", "no messages")
    _check_last(chat[-1])
    if system is None:
        return chat
    if chat[0]["role"] == "system":
        problem, fix = "the messages already begin with a system message", "give the system prompt once"
        raise RequestError(problem, field="system", got=shown(system), wanted="None", fix=fix)
    return [{"role": "system", "content": check_unicode(system, "system")}, *chat]


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a checked message: its content, or the texts of its parts after each other."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def empty_prompt(field: str, got: str, fix: str = "pass some text") -> RequestError:
    """Return the error that says that a prompt has no text."""
    return RequestError("the prompt is empty", field=field, got=got, wanted="text that is not blank", fix=fix)


def _check(message: dict[str, Any], path: str) -> None:
    """Check the keys that templates use of one message.

    Raises:
        RequestError: a key is missing or malformed.
    """
    if not isinstance(message.get("role"), str):
        raise _malformed(f"{path}.role", message, _FORM)
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None:
        _check_calls(calls, f"{path}.tool_calls")
    if isinstance(content, list):
        _check_parts(content, f"{path}.content")
    elif not isinstance(content, str) and (content is not None or not calls):
        raise _malformed(f"{path}.content", message, f"{_FORM}; content may be absent beside tool_calls")


def _check_parts(parts: list[Any], path: str) -> None:
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise RequestError(
                f"the part is not text but {kind}, and the model takes text alone",
                field=f"{path}[{i}].type",
                got=shown(kind),
                wanted='"text"',
                fix="leave the part out, or say in words what it shows",
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise _malformed(f"{path}[{i}]", part, _PARTS)


def _check_calls(calls: Any, path: str) -> None:
    """Check tool calls in OpenAI's form, or with name and arguments in the call itself, as some templates take them."""
    if not isinstance(calls, list):
        raise _malformed(path, calls, f"a list of {_CALL}")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise _malformed(f"{path}[{i}]", call, _CALL)
        inner = f"{path}[{i}].function" if "function" in call else f"{path}[{i}]"
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise _malformed(f"{inner}.name", function, _CALL)
        if not isinstance(function.get("arguments", {}), dict | str | None):
            raise _malformed(f"{inner}.arguments", function["arguments"], "an object, or its JSON text")


def _check_last(message: dict[str, Any]) -> None:
    """Check that the last message says something. The answer of a tool and tool calls may come without text."""
    if message["role"] != "tool" and not message.get("tool_calls") and not text_of(message).strip():
        raise empty_prompt("messages", f"last content {shown(message['content'])}")


def _malformed(path: str, value: object, wanted: str) -> RequestError:
    return RequestError("the message is malformed", field=path, got=shown(value), wanted=wanted)
