"""Readers of calls whose arguments are not JSON: Gemma's braces, Python's notation, and text between tags.

They keep to the contract of the readers in tool_json.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from .tool_json import (
    DEEPEST,
    MALFORMED,
    FoundCall,
    Parameters,
    Reader,
    call_of,
    calls_of,
    check_json,
    json_at,
    past,
    past_spaces,
    whole_answer,
    whole_json,
)

_WORD = re.compile(r"[^,{}\[\]\s]+")
_KEY = re.compile(r"[^,:{}\[\]]*")
# JSON's names and Python's: some templates print values as Python does, so models learn either.
_NAMES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


# -- Gemma: call:name{key:<escape>text<escape>,other:1} ------------------------------------------------------


def braces(opening: str, closing: str, quote: str) -> Reader:
    """Return the reader of calls such as call:name{key:<escape>text<escape>,other:1}.

    Args:
        opening: the marker in front of a name.
        closing: the marker after the arguments.
        quote: the marker on both sides of text.
    """

    def read(text: str, at: int, parameters: Parameters) -> tuple[list[FoundCall], int]:
        brace = text.index("{", at)
        arguments, end = _Braces(text, quote).value(brace, 0)
        return [call_of({"name": text[at + len(opening) : brace], "arguments": arguments})], past(text, end, closing)

    return read


class _Braces:
    """One text in Gemma's notation."""

    def __init__(self, text: str, quote: str) -> None:
        self._text, self._quote = text, quote

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        """Return the value that begins at an index, and the index of its end."""
        at = past_spaces(self._text, at)
        if depth > DEEPEST:
            raise ValueError("the arguments are nested too deep")
        if self._text.startswith(self._quote, at):
            return self._quoted(at)
        if self._text.startswith("{", at):
            return self._items(at, "}", depth)
        if self._text.startswith("[", at):
            return self._items(at, "]", depth)
        word = _WORD.match(self._text, at)
        if word is None:
            raise ValueError("a value is missing")
        return (_NAMES[word[0]] if word[0] in _NAMES else whole_json(word[0])), word.end()

    def _quoted(self, at: int) -> tuple[str, int]:
        start = at + len(self._quote)
        end = self._text.index(self._quote, start)
        return self._text[start:end], end + len(self._quote)

    def _items(self, at: int, closing: str, depth: int) -> tuple[Any, int]:
        """Return the object or list that begins at an index, and the index of its end."""
        items: dict[str, Any] = {}
        end = past_spaces(self._text, at + 1)
        while not self._text.startswith(closing, end):
            if items:
                if not self._text.startswith(",", end):
                    raise ValueError("a comma is missing")
                end += 1
            key, end = self._key(end) if closing == "}" else (str(len(items)), end)
            items[key], end = self.value(end, depth + 1)
            end = past_spaces(self._text, end)
        return (items if closing == "}" else list(items.values())), end + 1

    def _key(self, at: int) -> tuple[str, int]:
        at = past_spaces(self._text, at)
        if self._text.startswith(self._quote, at):
            key, end = self._quoted(at)
            end = past_spaces(self._text, end)
        else:
            word = _KEY.match(self._text, at)
            key, end = ("", at) if word is None else (word[0].strip(), word.end())
        if not self._text.startswith(":", end):
            raise ValueError("a colon is missing")
        return key, end + 1


# -- Python: [name(key="text", other=1)] ---------------------------------------------------------------------


def python_list(opening: str, closing: str) -> Reader:
    """Return the reader of a list of calls in Python's notation, or of the same as JSON, between two markers."""

    def read(text: str, at: int, parameters: Parameters) -> tuple[list[FoundCall], int]:
        start, end = at + len(opening), text.find(closing, at)
        inner = text[start:end].strip() if end >= 0 else text[start:].strip()
        try:
            calls = calls_of(whole_json(inner))
        except ValueError:
            calls = _python_calls(inner)
        return calls, (len(text) if end < 0 else end + len(closing))

    return read


def llama(opening: str) -> Reader:
    """Return the reader of what follows Llama's marker: calls as JSON, or of built-in tools, as f.call(q="x")."""

    def read(text: str, at: int, parameters: Parameters) -> tuple[list[FoundCall], int]:
        try:
            return whole_answer(text, at + len(opening), parameters)
        except ValueError:
            calls = _python_calls(text[at + len(opening) :].strip())
        if not all(call.name.endswith(".call") for call in calls):
            raise ValueError("the text is code, and no call of a tool")
        return [FoundCall(call.name.removesuffix(".call"), call.arguments) for call in calls], len(text)

    return read


def _python_calls(text: str) -> list[FoundCall]:
    """Return the calls of a list in Python's notation, or of a single call.

    Raises:
        ValueError, SyntaxError, TypeError, RecursionError, MemoryError: the text is something else.
    """
    tree = ast.parse(text, mode="eval").body
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    calls = []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args or any(item.arg is None for item in node.keywords):
            raise ValueError("the text is no call with named arguments")
        arguments = {str(item.arg): _python_value(item.value) for item in node.keywords}
        check_json(arguments)
        calls.append(call_of({"name": ast.unparse(node.func), "arguments": arguments}))
    if not calls:
        raise ValueError("the list has no calls")
    return calls


def _python_value(node: ast.expr) -> Any:
    """Return the value of a literal, in which true, false and null mean what they do in JSON."""
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_python_value(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key is not text")
        return dict(zip(keys, map(_python_value, node.values), strict=True))
    # A sum states a complex number and no other, and a set can hold what makes literal_eval raise.
    if not isinstance(node, ast.Constant | ast.UnaryOp):
        raise ValueError("the value is no literal")
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | None):
        raise ValueError("the value is not one of JSON")
    return value


# -- text between tags: <function=name><parameter=key>text</parameter></function> -----------------------------


def tagged(opening: str, head: str, argument: str, tail: str) -> Reader:
    """Return the reader of calls whose arguments are text between tags.

    Args:
        opening: the marker in front of a call.
        head: the pattern of what stands in front of the arguments, with the tool's name as its group.
        argument: the pattern of an argument, with its name and its value as groups.
        tail: the pattern of what stands after the arguments.
    """
    first, item, last = (re.compile(pattern, re.DOTALL) for pattern in (head, argument, tail))

    def read(text: str, at: int, parameters: Parameters) -> tuple[list[FoundCall], int]:
        found = first.match(text, at + len(opening))
        if found is None:
            raise ValueError("the call has no name")
        name, end = found[1].strip(), found.end()
        properties = parameters.get(name, {}).get("properties")
        arguments: dict[str, Any] = {}
        while part := item.match(text, end):
            key, end = part[1].strip(), part.end()
            schema = properties.get(key) if isinstance(properties, Mapping) else None
            arguments[key] = _tagged_value(part[2], schema)
        closed = last.match(text, end)
        if closed is None and text[end:].strip():
            raise ValueError("the call has no end")
        calls = [call_of({"name": name, "arguments": arguments})]
        return calls, (len(text) if closed is None else closed.end())

    return read


def _tagged_value(text: str, schema: object) -> Any:
    """Return the value that a text between tags stands for: the schema tells the text "5" from the number 5."""
    types = types_of(schema)
    is_text = "string" in types and not ("null" in types and text.strip() == "null")
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    if is_text and (not isinstance(choices, list) or text in choices):
        return text
    try:
        value, end = json_at(text, 0)
    except MALFORMED:
        return _python_literal(text) if types else text
    # Without a schema, JSON text is the text as it stands, quotation marks and all.
    return text if text[end:].strip() or (isinstance(value, str) and not types) else value


def _python_literal(text: str) -> Any:
    """Return the value that a text states in Python's notation, or the text if it is something else.

    What JSON cannot state stays text too: a number that is not finite or has thousands of digits, and text that is not
    valid Unicode. No message of a chat could hold it.
    """
    try:
        value = _python_value(ast.parse(text.strip(), mode="eval").body)
        check_json(value)
    except MALFORMED:
        return text
    return value


def types_of(schema: object) -> set[str]:
    """Return the types that a JSON schema names for a value; none if it names none that this can see."""
    if not isinstance(schema, Mapping):
        return set()
    kinds = schema.get("type")
    types = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    choices = schema.get("enum", [schema.get("const")])
    if not types and isinstance(choices, list) and any(isinstance(choice, str) for choice in choices):
        types.add("string")
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list) else ():
            types |= types_of(part)
    return types
