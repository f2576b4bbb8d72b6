"""A file of completions, so that an interrupted rollout continues where it stopped.

Each line is a JSON object. `asked` is a digest of the base, the prompt's ids and the sampling settings; `answer` holds
the ids of the completion. Lines are only appended. An interruption can leave half a line at the end, which is cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tp_runtime.errors import CalibrationError, shown
from tp_runtime.storage import parse_json_object

_BEGINNING = b'{"asked": "'


class RolloutStore:
    """The completions in a file, to which further ones can be added.

    Args:
        path: the file; it is created with the first completion.
        base_digest: the base digest of the model that answers.

    Raises:
        CalibrationError: a line of the file is not a stored completion.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, base_digest: str) -> None:
        self._path, self._base = path, base_digest
        self._answers: dict[str, tuple[int, ...]] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        half = content[len(whole) :]
        # Half a line is cut off below. If it is not the beginning of a line that this class writes, it is refused here.
        lines = [*whole.splitlines(), *([] if _BEGINNING.startswith(half[: len(_BEGINNING)]) else [half])]
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json_object(line)
                self._answers[_text(entry["asked"])] = tuple(_token(token) for token in entry["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise CalibrationError(
                    "the line is not a stored completion",
                    field=f"{path}, line {number}",
                    got=shown(line),
                    wanted='{"asked": digest, "answer": [ids]}',
                    fix="pass another file to --rollouts",
                ) from error
        if half:
            with path.open("r+b") as handle:
                handle.truncate(len(whole))

    def __len__(self) -> int:
        return len(self._answers)

    def key(self, prompt: Sequence[int], settings: Mapping[str, float]) -> str:
        """Return the digest of the base, a prompt and the sampling settings."""
        asked = json.dumps([self._base, list(prompt), dict(settings)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def get(self, key: str) -> tuple[int, ...] | None:
        """Return the completion stored under `key`, or None if there is none."""
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Sequence[int]]) -> None:
        """Store completions by key and append them to the file."""
        lines = [json.dumps({"asked": key, "answer": list(answer)}) + "\n" for key, answer in answers.items()]
        with self._path.open("a", encoding="utf-8") as handle:
            handle.writelines(lines)
        self._answers |= {key: tuple(answer) for key, answer in answers.items()}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("the digest is not text")
    return value


def _token(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError("the value is not a token id")
    return value
