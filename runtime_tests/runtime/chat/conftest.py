"""Fixtures: a model that says what a test wants, and what requests without a cache answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tp_runtime.model import PatchedModel

Answers = Callable[..., str]


class Script:
    """Makes a model say given texts, although its graph runs as always, and records the ids of every run.

    A tiny random model writes bytes that are no text, and such an answer has other ids when it is encoded again.

    Attributes:
        ran: the ids of all runs, joined.
    """

    def __init__(self, model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[int] = []
        self._model, self._forward, self._left = model, model.graph.forward, [0][:0]
        monkeypatch.setattr(model.graph, "forward", self._run)

    def says(self, *texts: str) -> None:
        """Let the next answers be these texts, each with an end-of-sequence id."""
        eos = self._model.codec.render("x", add_generation_prompt=False)[-2]  # the template's last id is a line break
        self._model.codec.eos_ids = frozenset({eos})
        self._left = [token for text in texts for token in (*self._model.codec.render(text, raw=True), eos)]

    def _run(self, tokens: Any, *args: Any, **options: Any) -> Any:
        logits = np.array(self._forward(tokens, *args, **options))
        self.ran += tokens
        logits[-1] = 0
        logits[-1, self._left.pop(0)] = 1
        return logits


@pytest.fixture
def script(model: PatchedModel, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(model, monkeypatch)


@pytest.fixture
def answer(model: PatchedModel) -> Answers:
    """A function that answers a dialogue without a cache: what a chat must say too."""

    def answered(messages: list[dict[str, Any]], **options: Any) -> str:
        return model.generate(messages, **{"max_new_tokens": 5, **options})

    return answered
