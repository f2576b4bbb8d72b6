"""What llguidance says when it cannot compile a constraint, as errors that name the part and say what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import RequestError


class _Kind(NamedTuple):
    """A kind of problem: what llguidance says, the keywords that can be at fault, the problem, and what to do."""

    said: str
    keywords: tuple[str, ...]
    problem: str
    fix: str


_KINDS = (
    _Kind(
        "oneOf constraints are not supported",
        ("oneOf",),
        "the options of oneOf could overlap",
        "give each option a required property with a const of its own, or use anyOf",
    ),
    _Kind(
        "are not disjoint",
        ("patternProperties",),
        "the patterns of patternProperties could match one name",
        "use patterns of which at most one matches, such as different beginnings",
    ),
    _Kind(
        "are disjoint",
        ("patternProperties",),
        "it cannot be found out whether the patterns of patternProperties overlap",
        "use simpler patterns",
    ),
    _Kind(
        "circular references with sibling keys",
        ("$ref",),
        "a reference to a part that holds it has other keywords beside it",
        "write $ref alone",
    ),
    _Kind(
        "min/maxProperties only supported",
        ("minProperties", "maxProperties"),
        "minProperties and maxProperties need all properties to be required",
        "make the properties required, or leave the bounds out",
    ),
    _Kind(
        "Unsatisfiable schema",
        (),
        "no value satisfies this part",
        "correct the bounds, or the parts that exclude each other",
    ),
    _Kind("no text satisfies", (), "no text satisfies this part", "give the recursion an end"),
    _Kind("schema too large", (), "the schema is too large", "use fewer alternatives inside allOf"),
    _Kind("stack level exceeded", (), "the schema is nested too deep", "use fewer references inside allOf"),
    _Kind("recursion limit exceeded", (), "the schema is nested too deep", "move inner parts to $defs"),
    _Kind(
        "Unable to determine if regex is empty",
        ("pattern", "format"),
        "the pattern is too complex",
        "use a simpler pattern, or no length beside it",
    ),
    _Kind(
        "lookarounds not supported",
        ("pattern", "patternProperties"),
        "the pattern has an anchor in its middle",
        "use ^ and $ only at the ends",
    ),
)

_OF_THE_WHOLE = ("schema too large", "stack level exceeded", "recursion limit exceeded")


def has_a_place(problem: str) -> bool:
    """Return whether a part of the schema is at fault, and not its size."""
    return not any(text in problem for text in _OF_THE_WHOLE)


def same_kind(problem: str, other: str) -> bool:
    """Return whether llguidance states the same kind of problem twice."""
    return (_kind(problem) or problem) == (_kind(other) or other)


def refused(problem: str, field: str, part: Mapping[str, Any] | None = None) -> RequestError:
    """Return the error for what llguidance said about a part of a constraint, with the keywords `part`."""
    lines = [line.strip() for line in problem.strip().splitlines() if line.strip()]
    kind = _kind(problem)
    if kind is None:
        text = " ".join(lines[:4])
        return RequestError("llguidance cannot compile this part", field=field, got=text, wanted="a supported part")
    at_fault = next((f".{keyword}" for keyword in kind.keywords if keyword in (part or ())), "")
    wanted = "a supported part"
    return RequestError(kind.problem, field=field + at_fault, got=lines[0], wanted=wanted, fix=kind.fix)


def _kind(problem: str) -> _Kind | None:
    """Return the kind of a problem that llguidance stated; None for another one."""
    return next((kind for kind in _KINDS if kind.said in problem), None)
