"""Completions kept in a file as they come, so that a rollout that was interrupted goes on where it stopped.

One JSON object a line: what was asked (a digest over base, prompt ids and sampling) and the ids of the answer. Lines
are only ever appended; half a line at the end, left by an interruption, is cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tp_runtime.errors import CalibrationError
from tp_runtime.storage import parse_json_object

_BEGINNING = b'{"asked": "'


class RolloutStore:
    """The answers in a file, and a place to put further ones.

    Args:
        path: the file; made with the first answer.
        base_digest: of the model that answers.

    Raises:
        CalibrationError: a line is something else.
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
        # Cut off below; anything else than the beginning of a line of ours is refused here instead.
        lines = [*whole.splitlines(), *([] if _BEGINNING.startswith(half[: len(_BEGINNING)]) else [half])]
        for number, line in enumerate(lines, 1):
            try:
                entry = parse_json_object(line)
                self._answers[entry["asked"]] = tuple(int(token) for token in entry["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise CalibrationError(
                    "not a file of completions",
                    field=f"{path}, line {number}",
                    got=ascii(line[:40]),
                    wanted='{"asked": digest, "answer": [ids]}',
                    fix="pass another file to --rollouts",
                ) from error
        if half:
            with path.open("r+b") as handle:
                handle.truncate(len(whole))

    def __len__(self) -> int:
        return len(self._answers)

    def key(self, prompt: Sequence[int], settings: Mapping[str, float]) -> str:
        """Digest of a prompt and how it is to be completed."""
        asked = json.dumps([self._base, list(prompt), dict(settings)], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def get(self, key: str) -> tuple[int, ...] | None:
        """The answer, if there is one."""
        return self._answers.get(key)

    def put(self, answers: Mapping[str, Sequence[int]]) -> None:
        """Keep answers, by key, and write them out."""
        lines = [json.dumps({"asked": key, "answer": list(answer)}) + "\n" for key, answer in answers.items()]
        with self._path.open("a", encoding="utf-8") as handle:
            handle.writelines(lines)
        self._answers |= {key: tuple(answer) for key, answer in answers.items()}
