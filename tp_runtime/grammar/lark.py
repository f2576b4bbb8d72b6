"""Grammars in llguidance's variant of Lark: what would not be enforced is refused, and JSON schemas inside are lowered.

The rules themselves are llguidance's to read. This pass only finds what it would read and then not do: options that
belong to sampling, texts that it would hide by taking ids back, and schemas whose keywords it would drop.
"""

from __future__ import annotations

import json
import re

from ..errors import RequestError, shown
from .budget import Budget
from .json_schema import lower_schema

# A string, a comment, a regular expression (which can span lines), what opens one and does not close it, a special
# token, a directive, an option of a rule, or any other text. These are llguidance's own pieces: what is a string here
# and not there would hide rules and schemas from the checks. No piece is tried twice, so the pass takes linear time.
_PIECES = re.compile(
    r"""
      (?P<string>"(?:\\.|[^"\\\n])*+")
    | (?P<comment>//[^\n]*|\#[^\n]*)
    | (?P<regex>/(?:\\.|[^/\\])++/)
    | (?P<open>["/])
    | (?P<special><[^<>\s]++>)
    | (?P<json>%json\b\s*+)
    | (?P<setting>%llguidance\b)
    | (?P<option>(?<![\w-])(?:temperature|max_tokens|stop|stop_capture)(?=\s*+=))
    | (?P<other>[\w-]++|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_NO_SETTINGS = re.compile(r"\s*+\{\s*+\}")

_MOST_RULES = 500  # llguidance recurses from rule to rule, and 10,000 overflow the stack
_DEEPEST = 100  # brackets inside brackets; llguidance recurses, and 300,000 names with braces overflow the stack
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")

_REFUSED_OPTIONS = {
    "temperature": "set the temperature of the request",
    "max_tokens": "bound the expression, such as /.{1,80}/, or use max_new_tokens",
    "stop": 'use suffix="..."',
    "stop_capture": "leave it out",
}


def check_lark(text: str, path: str) -> str:
    """Return a grammar for llguidance.

    Args:
        text: the grammar.
        path: the name of the argument, for errors.

    Raises:
        RequestError: the grammar has a part that would not be enforced, or holds a schema that is refused.
    """
    if text.lstrip().startswith("{"):  # llguidance would read a list of grammars with settings of their own
        got, wanted = "a text that begins with a brace", "rules, such as start: /[0-9]+/"
        raise RequestError("the grammar is not Lark", field=path, got=got, wanted=wanted)
    out: list[str] = []
    at = schemas = rules = depth = 0
    budget = Budget()  # one for all schemas: each of them may be small, and the grammar large
    while piece := _PIECES.match(text, at):
        at = piece.end()
        kind, found = piece.lastgroup, piece.group()
        if kind == "open":
            got, wanted = shown(text[piece.start() : at + 40]), f"a closing {found}"
            raise RequestError("a text or an expression is not closed", field=path, got=got, wanted=wanted)
        if kind == "option":
            wanted, fix = "capture, lazy or suffix", _REFUSED_OPTIONS[found]
            raise RequestError("the option of a rule is not supported", field=path, got=found, wanted=wanted, fix=fix)
        if kind == "setting":
            _check_settings(text, at, path)
        elif kind == "json":
            schemas += 1
            schema, at = _inline_schema(text, at, f"{path}.%json[{schemas}]", budget)
            found += schema
        depth = max(0, depth + (found in _OPENING) - (found in _CLOSING))
        if depth > _DEEPEST:
            wanted = f"at most {_DEEPEST} brackets inside each other"
            raise RequestError("the grammar is nested too deep", field=path, got=f"{depth} levels", wanted=wanted)
        rules += found == ":"
        if rules > _MOST_RULES:
            raise RequestError(
                "the grammar is too large", field=path, got=f"{rules} rules", wanted=f"at most {_MOST_RULES}"
            )
        out.append(found)
    return "".join(out)


def _check_settings(text: str, at: int, path: str) -> None:
    """Check the object after %llguidance: some of its settings switch checks off."""
    if not _NO_SETTINGS.match(text, at):
        got, wanted = shown(text[at : at + 80].strip().partition("\n")[0]), "%llguidance {}"
        raise RequestError("the settings of llguidance are the runtime's", field=path, got=got, wanted=wanted)


def _inline_schema(text: str, at: int, path: str, budget: Budget) -> tuple[str, int]:
    """Return the lowered text of the schema that begins at a position, and the position after it."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        wanted = "a JSON object after %json"
        raise RequestError("the schema is not JSON", field=path, got=str(error), wanted=wanted) from None
    return lower_schema(text[at:end], path, budget).text(), end
