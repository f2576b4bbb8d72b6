"""The queries that a patch is fitted and measured on.

This module reads queries from files and keeps the held-out ones separate from the fitted ones. A query is one line of
text that a user might send; the module does not depend on models or tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError, shown
from tp_runtime.storage import atomic_file, parse_json

_SHOWN = 5


def load_questions(path: Path | None) -> list[str]:
    """Read queries from a file, stripped of white space, in the file's order, without blank lines and repetitions.

    Args:
        path: a text file with one query per line, in which a line that starts with `#` is a comment; or a `.json` file
            with a list of strings; or a `.jsonl` file whose lines are JSON strings or {"query": text, ...}. None for
            the built-in questions.

    Returns:
        At least one query.

    Raises:
        CalibrationError: the file holds no query or an entry that is not text, or it is not valid UTF-8. Also if a
            `.json` or `.jsonl` file is not valid JSON.
        OSError: the file cannot be read.
    """
    name = "built-in questions" if path is None else str(path)
    entries = [_query(entry) for entry in _entries(path).values()]
    if not all(isinstance(query, str) for query in entries):
        lines = name.lower().endswith(".jsonl")
        wanted = 'lines with a JSON string or {"query": text}' if lines else "a list of strings"
        raise CalibrationError("the file holds an entry that is not text", field=name, wanted=wanted)
    # Only the first of equal queries is kept: a query that is in the list twice could land on both sides of the split.
    queries = list({query_key(query): query.strip() for query in reversed(entries) if query.strip()}.values())[::-1]
    if not queries:
        raise CalibrationError("the file holds no query", field=name, fix="write one query per line")
    return queries


def save_questions(path: Path, queries: Iterable[str]) -> None:
    """Write queries to a `.jsonl` file, one JSON string per line, from which `load_questions` reads the same queries.

    Raises:
        OutputError: `path` is a folder or a device.
        OSError: the file cannot be written; an existing one stays as it is.
    """
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(query)}\n" for query in queries), encoding="utf-8")


def load_answers(path: Path) -> dict[str, str]:
    """Read the expected answers of a `.jsonl` file whose lines are {"query": text, "answer": text}.

    Returns:
        The expected answer to each query. Lines without an answer are left out. Other kinds of files give no answers.

    Raises:
        CalibrationError: the file is not valid JSON or UTF-8, or an entry with an answer lacks its query.
        OSError: the file cannot be read.
    """
    if path.suffix.lower() != ".jsonl":
        return {}
    answers = {}
    for number, entry in _entries(path).items():
        if not isinstance(entry, dict) or "answer" not in entry:
            continue
        if not all(isinstance(entry.get(key), str) and entry[key].strip() for key in ("query", "answer")):
            raise CalibrationError(
                "the entry is not a query with its answer",
                field=f"{path}, line {number}",
                got=shown(entry),
                wanted='{"query": text, "answer": text}',
            )
        answers[entry["query"].strip()] = entry["answer"]
    return answers


def _entries(path: Path | None) -> dict[int, Any]:
    """Return the entries, parsed but not checked, by their line number (in a `.json` list, by their place from 1)."""
    source = files("tp_export.data") / "questions.txt" if path is None else path
    suffix = "" if path is None else path.suffix.lower()
    try:
        text = source.read_text(encoding="utf-8-sig")
        if suffix == ".json":
            found = parse_json(text)
            return dict(enumerate(found if isinstance(found, list) else [found], 1))
        lines = enumerate(text.splitlines(), 1)
        if suffix == ".jsonl":
            return {number: parse_json(line) for number, line in lines if line.strip()}
    except ValueError as error:  # both JSON and UTF-8 errors are ValueErrors
        raise CalibrationError(f"the file cannot be read: {error}", field=str(path)) from error
    return {number: line for number, line in lines if not line.lstrip().startswith("#")}


def _query(entry: Any) -> Any:
    return entry.get("query") if isinstance(entry, dict) else entry


def split_holdout(queries: Sequence[str], holdout: int, seed: int) -> tuple[list[str], list[str]]:
    """Split queries into those that a patch is fitted on and those that it is measured on.

    A query's rank depends only on its text and the seed. Adding a query to the file, or moving one, therefore does not
    reshuffle the others.

    Args:
        queries: the queries, without repetitions.
        holdout: the number of queries to hold out; it can be 0.
        seed: the seed of the choice.

    Returns:
        The queries to fit and the held-out ones, both in their old order.

    Raises:
        CalibrationError: `holdout` is negative, no query would be left to fit, or a query is in the list twice.
    """
    if not 0 <= holdout < len(queries):
        raise CalibrationError(
            "more queries are to be held out than there are",
            field="holdout",
            got=holdout,
            wanted=f"0 to {len(queries) - 1}",
        )
    ranked = sorted(queries, key=lambda query: hashlib.sha256(f"{seed}\n{query_key(query)}".encode()).digest())
    chosen = set(ranked[:holdout])
    held = [query for query in queries if query in chosen]
    fit = [query for query in queries if query not in chosen]
    check_disjoint(fit, held)
    return fit, held


def check_disjoint(fit: Iterable[str], held: Iterable[str]) -> None:
    """Check that no held-out query is also fitted on, since fidelity measured on it would look too good.

    Args:
        fit: the queries that a patch is fitted on.
        held: the queries that the patch is measured on.

    Raises:
        CalibrationError: a query is in both lists, compared without regard to case and spacing. The message names such
            queries.
    """
    fitted = {query_key(query) for query in fit}
    both = [query for query in held if query_key(query) in fitted]
    if both:
        named = ", ".join(repr(query) for query in both[:_SHOWN])
        more = f" and {len(both) - _SHOWN} more" if len(both) > _SHOWN else ""
        raise CalibrationError(
            "held-out queries are also among the fitted ones",
            field="held-out queries",
            got=named + more,
            wanted="queries that the patch was not fitted on",
        )


def query_digest(query: str) -> str:
    """Return eight hex digits of a query, without regard to case and spacing.

    A patch stores these digits for each query that it was fitted on.
    """
    return hashlib.sha256(query_key(query).encode()).hexdigest()[:8]


def check_unfitted(queries: Iterable[str], fitted_digests: Iterable[str]) -> None:
    """Check that a patch was not fitted on any of `queries`.

    Args:
        queries: the held-out queries.
        fitted_digests: the `query_digest` of each query that the patch was fitted on.

    Raises:
        CalibrationError: the patch was fitted on some of the queries. The message names them.
    """
    digests, queries = set(fitted_digests), list(queries)
    check_disjoint([query for query in queries if query_digest(query) in digests], queries)


def unlike(queries: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return those of `queries` that are none of `others` (see `query_key`)."""
    taken = {query_key(other) for other in others}
    return [query for query in queries if query_key(query) not in taken]


def query_key(query: str) -> str:
    """Return a query without regard to case and spacing; two queries with the same key count as the same query."""
    return " ".join(query.casefold().split())
