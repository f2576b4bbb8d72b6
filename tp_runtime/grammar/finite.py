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
    conditions = _Conditions(definitions)
    holds = conditions.add(root)
    conditions.resolve()
    endless = [name for name, condition in conditions.definitions.items() if not conditions.met(condition)]
    if not endless:
        return  # what excludes every value without a recursion, llguidance finds
    if not conditions.met(holds):
        raise RequestError(
            "no finite value is valid: a part must hold itself, or excludes every value",
            field=paths[endless[0]],
            got="a recursion without an end",
            wanted="a recursion that an optional property, an empty list or another option ends",
        )
    without_end = frozenset(endless)
    for part in (root, *definitions.values()):
        _exclude(part, without_end)
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


class _Conditions:
    """What has to be finite for each part to be finite: all of some other parts, or one of them.

    Each condition is a number, and is visited once when it is met and once for each condition that waits for it. So the
    time is linear, whatever the order of the definitions.

    Args:
        definitions: the definitions by name.

    Attributes:
        definitions: the condition of each definition.
    """

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._missing: list[int] = []  # for each condition how many others it waits for; 0 and less if it is met
        self._waiting: list[list[int]] = []  # for each condition those that wait for it
        self._never = self._new(1)
        self._always = self._new(0)
        self.definitions = {name: self._new(1) for name in definitions}
        for name, part in definitions.items():
            self._waiting[self.add(part)].append(self.definitions[name])

    def add(self, part: Any) -> int:
        """Return the condition of a part."""
        if isinstance(part, bool):
            return self._always if part else self._never
        wanted = [self.definitions[_name(part)]] if "$ref" in part else []
        wanted += [self.add(each) for each in part.get("allOf", ())]
        wanted += [self._after([self.add(each) for each in part[key]], 1) for key in ("anyOf", "oneOf") if key in part]
        types = part.get("type")
        if types in ("object", ["object"]):
            wanted += self._properties(part)
        elif types in ("array", ["array"]):
            placed, least = part.get("prefixItems", []), part.get("minItems", 0)
            wanted += [self.add(each) for each in placed[:least]]
            if least > len(placed):
                wanted.append(self.add(part.get("items", True)))
        return self._after(wanted, len(wanted))

    def _properties(self, part: Mapping[str, Any]) -> list[int]:
        """Return the conditions of the properties that an object must have."""
        required, properties = set(part.get("required", ())), part.get("properties", {})
        wanted = [self.add(properties[name]) for name in properties.keys() & required]
        if required - properties.keys() and not part.get("patternProperties"):
            wanted.append(self.add(part.get("additionalProperties", True)))
        return wanted

    def _new(self, missing: int) -> int:
        self._missing.append(missing)
        self._waiting.append([])
        return len(self._missing) - 1

    def _after(self, wanted: list[int], missing: int) -> int:
        """Return a condition that is met after so many of the wanted ones."""
        made = self._new(missing)
        for each in wanted:
            self._waiting[each].append(made)
        return made

    def resolve(self) -> None:
        """Find out which conditions are met."""
        pending = [each for each, missing in enumerate(self._missing) if not missing]
        while pending:
            for each in self._waiting[pending.pop()]:
                self._missing[each] -= 1
                if self._missing[each] == 0:
                    pending.append(each)

    def met(self, condition: int) -> bool:
        """Return whether a condition is met."""
        return self._missing[condition] <= 0


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
