"""The grammar of an answer that has to call a tool: the notation of the model's family around the tool's schema.

The grammar is text in llguidance's Lark notation. It asks for what a template shows, down to the spaces, because the
model was trained to write that. Nothing of a schema is dropped: what a notation cannot be held to is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError, shown
from .reasoning import PromptTail, ReasoningTags
from .tool_calls import ToolFormat
from .tool_families import Braces, Layout, Tags
from .tool_values import Value, object_parts, refuse_other_keys, value_kinds

# Beside these keys, additionalProperties would not mean what it means beside properties alone.
_COMBINED = frozenset(("additionalProperties", "$ref", "allOf", "anyOf", "oneOf", "patternProperties", "if"))
_MOST_CALLS = 4  # of one answer: a small model that repeats its call would go on until its tokens are used up
_DEFINITIONS = ("$defs", "definitions")
_PLAIN_NAME = re.compile(r"[\w./:-]+")


def tool_constraint(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any],
    form: ToolFormat,
    tags: ReasoningTags | None = None,
    tail: PromptTail = "none",
) -> str | None:
    """Return a grammar in llguidance's Lark notation that keeps the answer to calls of the tools.

    Reasoning may come before the calls unless the prompt closes it.

    Args:
        tools: the tools of the request, as `checked_tools` returns them.
        tool_choice: the choice, as `checked_tool_choice` returns it: "required" means one call to four of any tools, an
            object means one call of that tool; "auto" and "none" constrain nothing.
        form: the notation of the model (`TextCodec.tool_format`).
        tags: the tags around reasoning (`TextCodec.reasoning_tags`).
        tail: how the prompt ends (`TextCodec.prompt_tail`).

    Returns:
        The grammar; None if the choice constrains nothing.

    Raises:
        RequestError: a tool's schema is not that of an object, or says what the notation cannot be held to.
    """
    if tool_choice in ("auto", "none") or not tools:
        return None
    chosen = None if isinstance(tool_choice, str) else tool_choice["function"]["name"]
    special = {**form.special_ids, **({} if tags is None else tags.special_ids)}
    writer = _Writer(special)
    layout, calls = form.notation.layout, []
    for i, tool in enumerate(tools):
        if chosen in (None, tool["function"]["name"]):
            calls.append(writer.rule(writer.call(layout, tool["function"], f"tools[{i}].function.parameters")))
    call = writer.rule(" | ".join(calls))
    section, separator, end = "", "", ""
    if isinstance(layout, Layout):
        section, separator, end = layout.section, layout.separator, layout.section_end
    elif isinstance(layout, Tags):
        separator = "\n"
    more = "" if chosen else f"({writer.text(separator)} {call}){{0,{_MOST_CALLS - 1}}}"
    return writer.grammar(f"{writer.reasoning(tags, tail)} {writer.text(section)} {call} {more} {writer.text(end)}")


class _Writer:
    """One grammar in progress.

    Args:
        special_ids: the ids of markers that are special tokens, by their text. A grammar names those by their ids; all
            other text it spells.
    """

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._ids = special_ids
        names = sorted(special_ids, key=len, reverse=True)
        self._markers = re.compile("|".join(map(re.escape, names))) if names else None
        self._rules: list[str] = []

    def grammar(self, start: str) -> str:
        """Return the whole grammar."""
        return "\n".join((f"start: {start}", *self._rules, r"TEXT: /(?s:.*)/", ""))

    def rule(self, body: str, attributes: str = "") -> str:
        """Add a rule and return its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def text(self, text: str) -> str:
        """Return the expression of a fixed text."""
        parts, at = [], 0
        for marker in self._markers.finditer(text) if self._markers else ():
            parts += [_quoted(text[at : marker.start()]), f"<[{self._ids[marker[0]]}]>"]
            at = marker.end()
        return " ".join(part for part in (*parts, _quoted(text[at:])) if part)

    def until(self, closing: str) -> str:
        """Return the expression of any text up to and with a closing text."""
        marker = self._markers.match(closing.lstrip()) if self._markers else None
        if marker is not None:  # no text can hold a special token, and TEXT takes the spaces in front of it
            return f"TEXT {self.text(closing.lstrip())}"
        return self.rule("TEXT", f"[suffix={_quoted(closing)}]")

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return the expression of a value of JSON, with the spaces of json.dumps, as the room grammar compiles it."""
        return self.rule(f"%json {json.dumps(schema)}")

    def reasoning(self, tags: ReasoningTags | None, tail: PromptTail) -> str:
        """Return the expression of what may come before the calls."""
        if tags is None or tail == "closed":
            return ""
        thought = rf"{self.until(tags.closing)} /\n{{0,2}}/"
        return thought if tail == "open" else f"({self.text(tags.opening)} {thought})?"

    def call(self, layout: Layout | Braces | Tags, function: Mapping[str, Any], field: str) -> str:
        """Return the expression of a call of one function, whose schema is at the path `field`."""
        schema, name = _arguments_schema(function, field), function["name"]
        in_json = isinstance(layout, Layout) and layout.opening.endswith('"')
        if not in_json and not _PLAIN_NAME.fullmatch(name):
            problem = "the notation in which this model writes calls cannot hold this name of a tool"
            wanted = "letters, digits and the characters _ - . / :"
            raise RequestError(problem, field=field.removesuffix("parameters") + "name", got=shown(name), wanted=wanted)
        if isinstance(layout, Layout):
            before = layout.opening + (json.dumps(name, ensure_ascii=False)[1:-1] if in_json else name) + layout.middle
            return f"{self.text(before)} {self.json(schema)} {self.text(layout.closing)}"
        if isinstance(layout, Braces):
            arguments = self._braces(schema, layout.quote, field)
            return f"{self.text(layout.opening + name)} {arguments} {self.text(layout.closing)}"
        return f"{self.text(layout.opening + name + layout.middle)} {self._tags(schema, layout, field)}"

    def _tags(self, schema: Mapping[str, Any], layout: Tags, field: str) -> str:
        """Return the expression of arguments as text between tags, and of the end of the call."""
        definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
        items = []
        for key, (part, required) in object_parts(schema, field).items():
            kinds = value_kinds(part, f"{field}.properties.{key}")
            if any(kind.kind == "text" for kind in kinds):
                value = self.until(layout.value_end)  # text can be anything, so also the other kinds
            else:
                values = " | ".join(self._tagged(kind, definitions) for kind in kinds)
                value = f"({values}) {self.text(layout.value_end)}"
            items.append(f"({self.text(layout.key + key + layout.value)} {value})" + ("" if required else "?"))
        return " ".join((*items, self.text(layout.closing)))

    def _tagged(self, value: Value, definitions: Mapping[str, Any]) -> str:
        if value.kind == "choice":
            return " | ".join(map(_quoted, value.choices))
        return self.json({**definitions, **value.schema})

    def _braces(self, schema: Mapping[str, Any], quote: str, field: str) -> str:
        """Return the expression of an object in braces. Keys are sorted, as templates of this family sort them."""
        parts = sorted(object_parts(schema, field).items(), key=lambda part: part[0].lower())
        # From the last key to the first: what follows a key, if a key comes before it and if none does.
        after, first = "", ""
        for key, _part in parts:
            if not _PLAIN_NAME.fullmatch(key) or ":" in key:
                problem, wanted = "the notation in which this model writes calls cannot hold this key", "a plain name"
                raise RequestError(problem, field=f"{field}.properties", got=shown(key), wanted=wanted)
        for key, (part, required) in reversed(parts):
            kinds = value_kinds(part, f"{field}.properties.{key}")
            values = " | ".join(self._braced(kind, quote, f"{field}.properties.{key}") for kind in kinds)
            item = self.rule(f"{_quoted(key + ':')} ({values})")
            with_item, rest = f"{item} {after}", after
            if required:
                after, first = self.rule(f'"," {with_item}'), self.rule(with_item)
            else:
                first = self.rule(f"{with_item} | {first}") if first else self.rule(f"({with_item})?")
                after = self.rule(f'"," {with_item} | {rest}') if rest else self.rule(f'("," {with_item})?')
        return f'"{{" {first} "}}"'

    def _braced(self, value: Value, quote: str, field: str) -> str:
        if value.kind == "text":
            return f"({self.text(quote)} {self.until(quote)})"
        if value.kind == "choice":
            return " | ".join(self.text(f"{quote}{choice}{quote}") for choice in value.choices)
        if value.kind == "object":
            return self._braces(value.schema, quote, field)
        if value.kind == "json":
            return self.json(value.schema)
        refuse_other_keys(value.schema, ("type", "items"), field)
        kinds = value_kinds(value.schema.get("items"), f"{field}.items")
        item = self.rule(" | ".join(self._braced(kind, quote, f"{field}.items") for kind in kinds))
        return f'("[" ({item} ("," {item})*)? "]")'


def _quoted(text: str) -> str:
    """Return a fixed text in Lark's notation; nothing for an empty text, which Lark does not have."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _arguments_schema(function: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return the schema of a function's arguments, which an object fits.

    Unless the schema speaks of other arguments than its properties, there are none: a function would not take them.

    Raises:
        RequestError: no object fits the schema.
    """
    schema = dict(function.get("parameters") or {})
    if schema.setdefault("type", "object") != "object":
        problem = "the arguments of a tool are an object"
        raise RequestError(problem, field=f"{field}.type", got=shown(schema["type"]), wanted='"object"')
    if not _COMBINED & schema.keys():
        schema.setdefault("properties", {})
        schema["additionalProperties"] = False
    return schema
