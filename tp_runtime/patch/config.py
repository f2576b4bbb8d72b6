"""The description in a patch file: what the patch was fitted on, how it was fitted, and how well.

This module does not handle tensors. Keys and types must match exactly: a key that this version does not know may change
the meaning of the patch, so the reader refuses the file instead of skipping the key. The tensors, and not the
description, define which patch it is (see `Patch.identity`).
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import PatchFormatError, PatchVersionError, shown
from ..storage import SHA256

METHODS = ("vector", "output", "matrix", "lora", "prefix", "isotropic", "steering", "imported", "composed")
# All methods but `prefix` make deltas; a sum has some too, because it has at most one KV prefix. All methods but the
# second ones can be used together with a KV prefix; a steering direction and another tool's adapter have none.
WITHOUT_DELTAS = ("prefix",)
WITHOUT_PREFIX = ("steering", "imported")
CALIBRATION_KEYS = ("queries", "rows", "max_new_tokens", "holdout")
MAX_REPORT = 64
MAX_STOP = 16
PROBE_KEYS = ("token_ids", "top1", "top1_logits", "logsumexp")

_SHORT_DIGEST = re.compile(r"[0-9a-f]{8}")
_REFIT = "export the patch again with this version of tp-export"


@dataclass(frozen=True)
class PatchConfig:
    """The description of a patch.

    Attributes:
        name: the patch's name for people, printable; it is never used as a key.
        method: one of `METHODS`; "composed" for a sum of patches, "imported" for another tool's adapter.
        base_model: the base model's public name.
        base_digest: the SHA-256 of the base model (64 hex digits). A patch acts on no other base.
        architecture: the base's model type, e.g. "llama", as in `patch_slots.json`.
        precision: the precision of the base that the patch was fitted on: "fp32", "fp16", "int8", ...
        context_digest: the SHA-256 of the context text (64 hex digits), or "" if the patch has no single context.
        context: the text itself, if the exporter was asked to store it; otherwise None.
        ridge: the relative ridge of the fit.
        calibration: the counts `queries`, `rows` (fitted token positions), `max_new_tokens` and `holdout` (queries).
            Optional are `samples`, the number of answers fitted for each query, and `query_digests`, eight hex digits
            for each fitted query, which keep later measurements from using a fitted query.
        fidelity: the held-out figures, name to number.
        licence: the licence of the patch, an SPDX expression.
        created: the ISO 8601 time of the fit in UTC.
        probe: `token_ids`, and three lists with a value for each of the last positions of `token_ids`, under the patch
            at strength 1: `top1` (token id), `top1_logits` and `logsumexp` of the logits (nats).
        report: a summary of the last report on the patch, name to number, with at most `MAX_REPORT` entries.
        stop: the strings before which completions under the patch end, unless a request names its own; at most
            `MAX_STOP`. A list becomes a tuple.
        weights_digest: the SHA-256 of the quantised weights that the patch was fitted behind (64 hex digits), if they
            were calibrated, so that two exports of one precision can differ; None for all other precisions.
    """

    name: str
    method: str
    base_model: str
    base_digest: str
    architecture: str
    precision: str
    context_digest: str
    context: str | None = None
    ridge: float | None = None
    calibration: dict[str, Any] | None = None
    fidelity: dict[str, float] | None = None
    licence: str | None = None
    created: str | None = None
    probe: dict[str, list[Any]] | None = None
    report: dict[str, float] | None = None
    stop: tuple[str, ...] = ()
    weights_digest: str | None = None

    def __post_init__(self) -> None:
        for key in ("name", "base_model", "architecture", "precision"):
            text = _text(key, getattr(self, key))
            # These texts go to terminals and logs, so control characters and invisible characters are refused.
            if not text or not text.isprintable():
                raise _bad(key, shown(text), "printable text, not empty")
        if _text("method", self.method) not in METHODS:
            raise PatchVersionError(
                "the method is unknown",
                field="config.method",
                got=shown(self.method),
                wanted=" | ".join(METHODS),
                fix="update tp-runtime, or export the patch with a known method",
            )
        if not SHA256.fullmatch(_text("base_digest", self.base_digest)):
            raise _bad("base_digest", shown(self.base_digest), "64 lower-case hex digits")
        if self.context_digest != "" and not SHA256.fullmatch(_text("context_digest", self.context_digest)):
            raise _bad("context_digest", shown(self.context_digest), "64 lower-case hex digits, or an empty string")
        if self.weights_digest is not None and not SHA256.fullmatch(_text("weights_digest", self.weights_digest)):
            raise _bad("weights_digest", shown(self.weights_digest), "64 lower-case hex digits")
        for key in ("context", "licence"):
            if getattr(self, key) is not None:
                _text(key, getattr(self, key))
        if self.ridge is not None and _number("ridge", self.ridge) < 0:
            raise _bad("ridge", shown(self.ridge), "a number >= 0")
        if self.created is not None:
            _utc("created", self.created)
        if self.calibration is not None:
            _keys("calibration", self.calibration, (*CALIBRATION_KEYS, "samples", "query_digests"), CALIBRATION_KEYS)
            _check_query_digests(self.calibration.get("query_digests", []))
            for key in self.calibration.keys() - {"query_digests"}:
                _count(f"calibration.{key}", self.calibration[key])
        for figures in ("fidelity", "report"):
            if getattr(self, figures) is not None:
                for key, value in _mapping(figures, getattr(self, figures)).items():
                    _number(f"{figures}.{_text(figures, key)}", value)
        if self.report is not None and len(self.report) > MAX_REPORT:
            raise _bad("report", f"{len(self.report)} figures", f"at most {MAX_REPORT}")
        if self.probe is not None:
            _check_probe(self.probe)
        object.__setattr__(self, "stop", _stop(self.stop))
        # These are copies, because the caller may change its own objects later.
        for key in ("calibration", "fidelity", "probe", "report"):
            object.__setattr__(self, key, copy.deepcopy(getattr(self, key)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PatchConfig:
        """Build a description from the JSON object of a patch file. Optional keys may be absent or null.

        Args:
            data: the parsed JSON object.

        Raises:
            PatchVersionError: `data` has a key or a method that this version does not know.
            PatchFormatError: a key is missing, or a value has the wrong type or form.
        """
        known = [field.name for field in fields(cls)]
        required = known[: known.index("context")]
        _keys("", data, known, required)
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object for the file: the keys whose values are not None or (), in declaration order."""
        values = {field.name: copy.deepcopy(getattr(self, field.name)) for field in fields(self)}
        values["stop"] = list(self.stop) or None
        return {key: value for key, value in values.items() if value is not None}

    def check_contents(self, deltas: int, prefix: bool) -> None:
        """Check that a patch holds what its method makes.

        Args:
            deltas: the number of its deltas.
            prefix: whether it has a KV prefix.

        Raises:
            PatchFormatError: it holds something else.
        """
        wanted = ["no delta, only a KV prefix"] if self.method in WITHOUT_DELTAS else ["deltas"]
        wanted += ["no KV prefix"] if self.method in WITHOUT_PREFIX else []
        if bool(deltas) != (self.method not in WITHOUT_DELTAS) or (prefix and self.method in WITHOUT_PREFIX):
            raise PatchFormatError(
                "the patch holds something else than its method makes",
                field="config.method",
                got=f"{self.method!r} with {deltas} deltas and {'a' if prefix else 'no'} KV prefix",
                wanted=" and ".join(wanted),
                fix="export the patch again with this version of tp-export",
            )


def context_digest(context: str) -> str:
    """Return the SHA-256 of the text of a context, 64 hex digits."""
    return hashlib.sha256(context.encode()).hexdigest()


def _bad(key: str, got: object, wanted: str) -> PatchFormatError:
    return PatchFormatError(
        "the patch description has a value that is not valid", field=f"config.{key}", got=got, wanted=wanted, fix=_REFIT
    )


def _keys(key: str, value: Any, known: Any, required: Any = None) -> None:
    """Check the keys of an object: a newer version wrote an unknown key, and a missing key means damage."""
    path = f"config.{key}".rstrip(".")
    unknown = sorted(str(name) for name in set(_mapping(key, value)) - set(known))
    if unknown:
        raise PatchVersionError(
            "the patch description has an unknown key",
            field=path,
            got=", ".join(map(repr, unknown[:5])),
            wanted=", ".join(known),
            fix="update tp-runtime: a newer version may have written this patch",
        )
    missing = [name for name in (known if required is None else required) if name not in value]
    if missing:
        raise PatchFormatError(
            "the patch description lacks a key",
            field=path,
            got=", ".join(sorted(value)) or "no keys",
            wanted=", ".join(missing),
            fix=_REFIT,
        )


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _bad(key, type(value).__name__, "an object")
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad(key, type(value).__name__, "text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair, which cannot be printed
        raise _bad(key, shown(value), "text that is valid Unicode") from None
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # a bool is an int in Python, but not in JSON
        raise _bad(key, type(value).__name__, "a number")
    if not abs(value) <= sys.float_info.max:  # the comparison is false for NaN; an int may be too large for a float
        raise _bad(key, "NaN, infinity or a number too large", "a finite number")
    return float(value)


def _count(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _bad(key, shown(value), "a whole number >= 0")
    return value


def _utc(key: str, value: Any) -> None:
    try:
        offset = datetime.datetime.fromisoformat(_text(key, value)).utcoffset()
    except ValueError:
        offset = None
    if offset != datetime.timedelta(0):
        raise _bad(key, shown(value), "an ISO 8601 time in UTC, such as 2025-01-31T12:00:00+00:00")


def _stop(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise _bad("stop", type(value).__name__, "a list of strings that are not empty")
    if len(value) > MAX_STOP:
        raise _bad("stop", f"{len(value)} strings", f"at most {MAX_STOP}")
    for number, text in enumerate(value):
        if not _text(f"stop[{number}]", text):
            raise _bad(f"stop[{number}]", "an empty string", "a string that is not empty")
    return tuple(value)


def _check_query_digests(digests: Any) -> None:
    if not isinstance(digests, list) or not all(
        isinstance(digest, str) and _SHORT_DIGEST.fullmatch(digest) for digest in digests
    ):
        raise _bad("calibration.query_digests", type(digests).__name__, "a list of digests of 8 lower-case hex digits")


def _check_probe(probe: Any) -> None:
    _keys("probe", probe, PROBE_KEYS)
    for key in PROBE_KEYS:
        if not isinstance(probe[key], list):
            raise _bad(f"probe.{key}", type(probe[key]).__name__, "a list")
        for value in probe[key]:
            if key in ("token_ids", "top1"):
                _count(f"probe.{key}", value)
            else:
                _number(f"probe.{key}", value)
    lengths = [len(probe[key]) for key in PROBE_KEYS]
    # The ids that a KV prefix replaces have no logits, so the other lists may be shorter than token_ids.
    if not 0 < lengths[1] <= lengths[0] or len(set(lengths[1:])) != 1:
        raise _bad(
            "probe",
            f"lists of {lengths} entries",
            "one value for each position in every list but token_ids, at least one",
        )
