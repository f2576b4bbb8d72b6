"""The queries a patch is fitted and measured on: reading them, and keeping the measured ones out of the fit.

Knows nothing of models or tokens: a query is one line of text that a user might send.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tp_runtime.errors import CalibrationError
from tp_runtime.storage import parse_json

_SHOWN = 5


def load_questions(path: Path | None) -> list[str]:
    """Reads queries, one each: stripped, in the file's order, without blanks and repetitions.

    Args:
        path: a text file with one query a line, where a line that starts with `#` is a comment; or a `.json`
            list of strings; or a `.jsonl` file with one JSON string a line, or {"query": text, ...}. None for the
            built-in questions.

    Returns:
        At least one query.

    Raises:
        CalibrationError: when the file holds no query, or is not the JSON or UTF-8 its name promises.
        OSError: when the file cannot be read.
    """
    where = "built-in questions" if path is None else str(path)
    entries = [_query(entry) for entry in _entries(path).values()]
    if not all(isinstance(query, str) for query in entries):
        raise CalibrationError("the file holds something else than text", field=where, wanted="a list of strings")
    # The first of equal queries counts: a query twice in the list could land on both sides of the split.
    queries = list({query_key(query): query.strip() for query in reversed(entries) if query.strip()}.values())[::-1]
    if not queries:
        raise CalibrationError("the file holds no query", field=where, fix="write one query a line")
    return queries


def load_answers(path: Path) -> dict[str, str]:
    """Read the expected answers of a `.jsonl` file whose lines are {"query": text, "answer": text}.

    Returns:
        Query to expected answer. Lines without an answer are left out, and so are all lines of other kinds of files.

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
                got=str(entry)[:60],
                wanted='{"query": text, "answer": text}',
            )
        answers[entry["query"].strip()] = entry["answer"]
    return answers


def _entries(path: Path | None) -> dict[int, Any]:
    """The entries of a query file by their line (in a `.json` list: by their place), parsed but not checked."""
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
    except ValueError as error:  # JSON and UTF-8 errors both
        raise CalibrationError(f"the file cannot be read: {error}", field=str(path)) from error
    return {number: line for number, line in lines if not line.lstrip().startswith("#")}


def _query(entry: Any) -> Any:
    return entry.get("query") if isinstance(entry, dict) else entry


def split_holdout(queries: Sequence[str], holdout: int, seed: int) -> tuple[list[str], list[str]]:
    """Splits queries into those a patch is fitted on and those it is measured on.

    A query's rank depends on its text and the seed alone: adding one to the file, or moving one, does not
    reshuffle the rest.

    Args:
        queries: the queries, without repetitions.
        holdout: how many to hold out; 0 for none.
        seed: another seed, another choice.

    Returns:
        The queries to fit and the held-out ones, both in their old order.

    Raises:
        CalibrationError: when nothing would be left to fit, or a query is in the list twice.
    """
    if not 0 <= holdout < len(queries):
        raise CalibrationError(
            "cannot hold out that many queries",
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
    """Refuses held-out queries that were fitted: fidelity measured on them would be flattery.

    Args:
        fit: the queries a patch is fitted on.
        held: the queries it is measured on.

    Raises:
        CalibrationError: naming the queries in both, compared without regard to case and spacing.
    """
    fitted = {query_key(query) for query in fit}
    both = [query for query in held if query_key(query) in fitted]
    if both:
        named = ", ".join(repr(query) for query in both[:_SHOWN])
        more = f" and {len(both) - _SHOWN} more" if len(both) > _SHOWN else ""
        raise CalibrationError(
            "held-out queries equal fitted ones",
            field="held-out queries",
            got=named + more,
            wanted="queries that the patch was not fitted on",
        )


def query_digest(query: str) -> str:
    """Eight hex digits of a query, without regard to case and spacing: what a patch remembers of each fitted one."""
    return hashlib.sha256(query_key(query).encode()).hexdigest()[:8]


def check_unfitted(queries: Iterable[str], fitted_digests: Iterable[str]) -> None:
    """Refuses to measure a patch on queries that it remembers being fitted on.

    Raises:
        CalibrationError: naming those queries.
    """
    digests, queries = set(fitted_digests), list(queries)
    check_disjoint([query for query in queries if query_digest(query) in digests], queries)


def query_key(query: str) -> str:
    """A query without regard to case and spacing: two with one key are the same query."""
    return " ".join(query.casefold().split())
