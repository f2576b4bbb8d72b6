"""Random dialogues for chat templates: tools, calls and their answers, documents, parts, and keys of all kinds."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

_PLAIN = "the a token Why? é 漢字 👩‍👩‍👧 e\u0301 <|im_end|> <bos> <think> </think> <tool_call> [INST] {{x}} {%%}"
_ODD = """"quoted" it's \\n {"a":1} & <b> 3.5 -7 \u2028 None /think /no_think ```json"""
_WORDS = [*_PLAIN.split(" "), *_ODD.split(" ")]
_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"thinking": True},
    {"date_string": "1 Jan 2030", "tools_in_user_message": False, "functions": "f", "datetime": "noon"},
    {"reasoning_effort": "high", "model_identity": "x", "preserve_thinking": True},
    {"controls": {"length": "short"}, "enable_citations": True},
)


@dataclass(frozen=True)
class Dialogue:
    """What a request passes to a template.

    Attributes:
        messages: the messages.
        options: tools, documents and further variables, as far as there are any.
        add_generation_prompt: whether the assistant's turn is begun.
    """

    messages: list[dict[str, Any]]
    options: dict[str, Any]
    add_generation_prompt: bool


def dialogue(seed: int) -> Dialogue:
    """Return the random dialogue of a seed. Most begin with the user and alternate, as most templates want."""
    return _Maker(random.Random(seed)).dialogue()


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        # Whether a whole dialogue has something: a template that refuses it refuses only a part of all dialogues.
        self._parts = self._often(0.15)
        self._text_arguments = self._often(0.25)
        self._calls = self._often(0.6)
        self._text_beside_calls = rng.choice((None, "", "text", "absent"))

    def dialogue(self) -> Dialogue:
        rng = self._rng
        tools = [self._tool(name) for name in rng.sample(("get_weather", "now", "search"), rng.randint(1, 3))]
        messages = [{"role": "system", "content": self._content()}] if self._often(0.4) else []
        for turn in range(rng.randint(1, 3)):
            if turn:
                messages += self._assistant()
            messages.append({"role": "user", "content": self._content(), **self._extra()})
            if self._calls and self._often(0.6):
                messages += self._call(tools)
        begun = self._often(0.8)
        if not begun or self._often(0.1):
            messages += self._assistant()
        options: dict[str, Any] = {}
        if self._calls or self._often(0.3):
            options["tools"] = tools
        elif self._often(0.1):
            options["tools"] = []
        if self._often(0.25):
            documents = [{"doc_id": i, "title": self._text(), "text": self._text()} for i in range(rng.randint(0, 2))]
            options["documents"] = documents
        return Dialogue(messages, options | dict(rng.choice(_ARGUMENTS)), begun)

    def _often(self, share: float) -> bool:
        return self._rng.random() < share

    def _text(self) -> str:
        rng = self._rng
        space = rng.choice((" ", "\n", "  "))
        text = space.join(rng.choices(_WORDS, k=rng.randint(1, 9)))
        return rng.choice(("", " ", "\n")) + text + rng.choice(("", "", " \n"))

    def _content(self) -> Any:
        if self._parts and self._often(0.7):
            return [{"type": "text", "text": self._text()} for _ in range(self._rng.randint(1, 2))]
        return self._text()

    def _extra(self) -> dict[str, Any]:
        return {"name": "Ann"} if self._often(0.1) else {}

    def _assistant(self) -> list[dict[str, Any]]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content()}
        if self._often(0.3):
            message["reasoning_content"] = self._text()
        if self._often(0.1):
            message["content"] = f"<think>\n{self._text()}\n</think>\n\n{self._text()}"
        return [message]

    def _call(self, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return an assistant's calls and the tools' answers."""
        calls = []
        for _ in range(self._rng.choice((1, 1, 1, 2))):
            arguments: Any = {key: self._value(1) for key in self._rng.sample(("city", "n", "é"), 2)}
            if self._text_arguments:
                arguments = json.dumps(arguments)
            name = self._rng.choice(tools)["function"]["name"]
            identity = "".join(self._rng.choices("abcXYZ019", k=9))
            calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}})
        message: dict[str, Any] = {"role": "assistant", "content": self._text_beside_calls, "tool_calls": calls}
        if self._text_beside_calls == "absent":
            del message["content"]
        elif self._text_beside_calls == "text":
            message["content"] = self._content()
        if self._often(0.2):
            message["reasoning_content"] = self._text()
        return [message, *map(self._answer, calls)]

    def _answer(self, call: dict[str, Any]) -> dict[str, Any]:
        content = self._rng.choice((self._text(), json.dumps(self._value(2)), ""))
        name = call["function"]["name"]
        return {"role": "tool", "content": content, "tool_call_id": call["id"], "name": name}

    def _value(self, depth: int) -> Any:
        kind = self._rng.randint(0, 7 if depth else 4)
        if kind > 4:
            values = [self._value(depth - 1) for _ in range(self._rng.randint(0, 3))]
            return values if kind == 5 else {f"k{i}": value for i, value in enumerate(values)}
        return (None, self._often(0.5), self._rng.randint(-9, 99), self._rng.random(), self._text())[kind]

    def _tool(self, name: str) -> dict[str, Any]:
        properties = {
            "city": {"type": "string", "description": self._text()},
            "n": {"type": "integer", "description": "how many", "enum": [1, 2]},
            "é": {"type": "array", "description": "list", "items": {"type": "number"}},
        }
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": ["city"]}
        return {"type": "function", "function": {"name": name, "description": self._text(), "parameters": schema}}
