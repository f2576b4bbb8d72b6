"""Recursion in a schema: whether every part that must come has a finite value.

A part that must hold itself has none. llguidance would let a completion into it, and then end the text unfinished.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import RequestError

_JOINED = ("allOf", "anyOf", "oneOf")


def check_finite(root: Any, definitions: dict[str, Any], paths: Mapping[str, str]) -> None:
    """Check a lowered schema, and replace references to definitions without a finite value by false: they exclude all.

    Args:
        root: the schema, in the words of llguidance; it is changed.
        definitions: its definitions by name; they are changed.
        paths: the path of each definition, for errors.

    Raises:
        RequestError: a definition refers to itself without a value between, or no finite value is valid.
    """
    _check_circles(definitions, paths)
    finite: set[str] = set()
    while more := {name for name, part in definitions.items() if name not in finite and _is_finite(part, finite)}:
        finite |= more
    endless = [name for name in definitions if name not in finite]
    if not endless:
        return  # what excludes every value without a recursion, llguidance finds
    if not _is_finite(root, finite):
        raise RequestError(
            "no finite value is valid: a part must hold itself, or excludes every value",
            field=paths[endless[0]],
            got="a recursion without an end",
            wanted="a recursion that an optional property, an empty list or another option ends",
        )
    for part in (root, *definitions.values()):
        _exclude(part, endless)
    for name in endless:
        definitions[name] = False


def _check_circles(definitions: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    """Check that no definition refers to itself without a property or an item between."""
    following = {name: list(_same_value(part)) for name, part in definitions.items()}
    done: set[str] = set()
    for start in definitions:
        trail: dict[str, Iterator[str]] = {}
        pending = [start]
        while pending:
            name = pending[-1]
            if name in done:
                pending.pop()
                continue
            ways = trail.setdefault(name, iter(following[name]))
            following_name = next(ways, None)
            if following_name is None:
                done.add(name)
                del trail[name]
                pending.pop()
            elif following_name in trail:
                raise RequestError(
                    "the part refers to itself without a property or an item between",
                    field=paths[following_name],
                    got="a circle of references",
                    wanted="references that lead to a value",
                )
            elif following_name not in done:
                pending.append(following_name)


def _same_value(part: Any) -> Iterator[str]:
    """Yield the names of the definitions that say something about the same value as a part."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield _name(part)
        for key in _JOINED:
            for each in part.get(key, ()):
                yield from _same_value(each)


def _is_finite(part: Any, finite: set[str]) -> bool:
    """Return whether a part has a finite value, given the definitions that are known to have one."""
    if isinstance(part, bool):
        return part
    if "$ref" in part and _name(part) not in finite:
        return False
    if not all(_is_finite(each, finite) for each in part.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if key in part and not any(_is_finite(each, finite) for each in part[key]):
            return False
    types = part.get("type")
    if types in ("object", ["object"]):
        properties, other = part.get("properties", {}), part.get("additionalProperties", True)
        others = True if part.get("patternProperties") else other
        return all(_is_finite(properties.get(name, others), finite) for name in part.get("required", ()))
    if types in ("array", ["array"]):
        placed = part.get("prefixItems", [])
        least = part.get("minItems", 0)
        rest = least <= len(placed) or _is_finite(part.get("items", True), finite)
        return rest and all(_is_finite(each, finite) for each in placed[:least])
    return True


def _exclude(part: Any, endless: Collection[str]) -> None:
    """Replace the parts inside a part that refer to an endless definition by false."""
    if isinstance(part, bool):
        return
    inside: list[tuple[Any, Any]] = [(part, key) for key in ("items", "additionalProperties") if key in part]
    for key in (*_JOINED, "prefixItems"):
        inside += [(part[key], at) for at in range(len(part.get(key, ())))]
    for key in ("properties", "patternProperties"):
        inside += [(part[key], name) for name in part.get(key, ())]
    for container, at in inside:
        each = container[at]
        if isinstance(each, dict) and "$ref" in each and _name(each) in endless:
            container[at] = False
        else:
            _exclude(each, endless)


def _name(part: Mapping[str, Any]) -> str:
    return str(part["$ref"]).rsplit("/", 1)[1]
