"""Regular expressions from files of other people, matched within a time limit.

Python's `re` can take exponential time, as for `(a+)+$`, and cannot be stopped from inside. So the patterns are matched
in a process of their own, which is killed when its time is up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence

from tp_runtime.errors import PatchFormatError

LIMIT_S = 20.0  # matching a pattern against the module names of a model takes milliseconds

# The child prints a list for each field: None where a text does not match, else the number that the pattern captured as
# `idx`, or "". It prints a text instead if the pattern is not valid.
_CHILD = """
import json, re, sys

def found(pattern, texts, match):
    try:
        matches = [match(pattern, text) for text in texts]
    except (re.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        return type(error).__name__ + ": " + str(error)
    return [match and match.groupdict().get("idx", "") for match in matches]

given = json.load(sys.stdin)
how = {field: re.fullmatch if field in given["whole"] else re.match for field in given["patterns"]}
print(json.dumps({field: found(pattern, given["texts"], how[field]) for field, pattern in given["patterns"].items()}))
"""


def match_all(
    patterns: Mapping[str, str], texts: Sequence[str], whole: Collection[str] = ()
) -> dict[str, list[str | None]]:
    """Match every text from its start with every pattern.

    Args:
        patterns: a mapping from the field that holds a pattern, for errors, to the pattern.
        texts: the texts.
        whole: the fields whose patterns must match to the end of the text.

    Returns:
        For each field and text: None if the pattern does not match, else what its group `idx` matched, or "" without
        such a group.

    Raises:
        PatchFormatError: a pattern is not a regular expression, or takes longer than `LIMIT_S` seconds.
    """
    if not patterns:
        return {}
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps({"patterns": dict(patterns), "texts": list(texts), "whole": list(whole)}),
            capture_output=True,
            encoding="ascii",
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise _bad(", ".join(patterns), f"no match after {LIMIT_S:g} seconds") from None
    if child.returncode:  # the regular expression engine itself gave up
        raise _bad(", ".join(patterns), f"an engine that ended with {child.returncode}")
    found: dict[str, list[str | None] | str] = json.loads(child.stdout)
    matched = {}
    for field, result in found.items():
        if isinstance(result, str):
            raise _bad(field, result)
        matched[field] = result
    return matched


def _bad(field: str, got: str) -> PatchFormatError:
    return PatchFormatError(
        "a regular expression of the adapter cannot be used",
        field=field,
        got=f"{got:.200}",
        wanted="a regular expression of Python that matches quickly",
        fix="replace it in adapter_config.json by a list of module names",
    )
