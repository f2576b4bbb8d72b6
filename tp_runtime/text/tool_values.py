"""The values of a tool's arguments in notations that are not JSON: what a schema allows, taken apart by kind.

Text stands bare in these notations, so a schema cannot be handed to the grammar library as a whole. What cannot be
taken apart is refused: no part of a schema is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RequestError, shown

_KEYS = "title description default example examples deprecated readOnly writeOnly nullable"
ANNOTATIONS = frozenset((*_KEYS.split(), "$comment", "$schema", "$id", "$defs", "definitions"))
"""The keys of a schema that allow and forbid nothing by themselves."""

_JSON_TYPES = ("integer", "number", "boolean", "null")


@dataclass(frozen=True)
class Value:
    """One kind of value that a schema allows.

    Attributes:
        kind: "text" for any text, "choice" for one of some texts, "json" for a number, a boolean or null, "list", or
            "object".
        schema: the schema of this kind alone.
        choices: the texts of a choice.
    """

    kind: Literal["text", "choice", "json", "list", "object"]
    schema: Mapping[str, Any]
    choices: tuple[str, ...] = ()


def value_kinds(schema: object, field: str) -> list[Value]:
    """Return the kinds of values that a schema allows.

    Args:
        schema: the schema.
        field: its path in the request, for errors.

    Raises:
        RequestError: the schema says something else than a type, a choice, or a union of these.
    """
    if not isinstance(schema, Mapping):
        raise RequestError("the schema is not an object", field=field, got=shown(schema), wanted="a JSON schema")
    for key in ("anyOf", "oneOf"):
        if key in schema:
            refuse_other_keys(schema, (key,), field)
            parts = schema[key] if isinstance(schema[key], Sequence) else ()
            kinds = [kind for i, part in enumerate(parts) for kind in value_kinds(part, f"{field}.{key}[{i}]")]
            if not kinds or (key == "oneOf" and len({kind.kind for kind in kinds}) < len(kinds)):
                raise _cannot(f"{field}.{key}", schema[key])
            return kinds
    if "enum" in schema or "const" in schema:
        return _choices(schema, field)
    types = schema.get("type")
    if types is None:
        refuse_other_keys(schema, ("type",), field)
    names = types if isinstance(types, list) else [types]
    return [_of_type(name, schema, field) for name in names]


def refuse_other_keys(schema: Mapping[str, Any], known: Sequence[str], field: str) -> None:
    """Refuse a schema that says anything beside the known keys and annotations.

    Raises:
        RequestError: the schema has another key. The error names it.
    """
    for key, value in schema.items():
        if key not in known and key not in ANNOTATIONS:
            raise _cannot(f"{field}.{key}", value)


def object_parts(schema: Mapping[str, Any], field: str) -> dict[str, tuple[Any, bool]]:
    """Return the schema of each property of an object, and whether the object must have it.

    Raises:
        RequestError: the schema is malformed, or says something about its keys beside their names.
    """
    refuse_other_keys(schema, ("type", "properties", "required", "additionalProperties"), field)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping):
        raise _cannot(f"{field}.properties", properties)
    if not isinstance(required, list) or not all(name in properties for name in required):
        raise _cannot(f"{field}.required", required)
    return {name: (part, name in required) for name, part in properties.items()}


def _choices(schema: Mapping[str, Any], field: str) -> list[Value]:
    refuse_other_keys(schema, ("enum", "const", "type"), field)
    choices = schema.get("enum", [schema.get("const")])
    if not isinstance(choices, list) or not choices or ("enum" in schema and "const" in schema):
        raise _cannot(field, schema)
    kinds = []
    texts = tuple(choice for choice in choices if isinstance(choice, str))
    others = [choice for choice in choices if not isinstance(choice, str)]
    if any(isinstance(choice, Mapping | list) for choice in others):
        raise _cannot(f"{field}.enum", choices)
    if texts:
        kinds.append(Value("choice", schema, texts))
    if others:
        kinds.append(Value("json", {"enum": others}))
    return kinds


def _of_type(name: object, schema: Mapping[str, Any], field: str) -> Value:
    if name == "string":
        refuse_other_keys(schema, ("type",), field)
        return Value("text", schema)
    if name in _JSON_TYPES:
        return Value("json", {**{key: value for key, value in schema.items() if key not in ANNOTATIONS}, "type": name})
    if name == "array":
        return Value("list", {**schema, "type": name})
    if name == "object":
        return Value("object", {**schema, "type": name})
    raise _cannot(f"{field}.type", name)


def _cannot(field: str, value: object) -> RequestError:
    return RequestError(
        "the notation in which this model writes calls cannot be held to this part of a tool's schema",
        field=field,
        got=shown(value),
        wanted="types, enum, const, anyOf, properties and required",
        fix='leave the part out, or use tool_choice="auto" and check the arguments',
    )
