"""What `tp-runtime chat` does with a completion-style model: it continues each line separately, and remembers none."""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import RequestError
from ..model import ACTIVE, PatchChoice, PatchedModel, TextStream


class Continuations:
    """Takes lines as ChatSession takes messages, and refuses what needs a memory.

    Args:
        model: the open model.
        system: the text in front of each line.
        patch: the patch of every line.
        strength: the factor on the patch.
        options: the sampling options of every line.

    Raises:
        PatchError: the patch does not fit the model.
    """

    def __init__(
        self,
        model: PatchedModel,
        system: str | None = None,
        patch: PatchChoice = ACTIVE,
        strength: float = 1.0,
        **options: Any,
    ) -> None:
        self._model, self._options = model, options
        self.system = system
        self.runs_again = False
        self.switch(patch, strength)

    def stream(self, text: str) -> TextStream:
        """Start the continuation of a line."""
        return self._model.stream(
            text, system=self.system, patch=self._patch, strength=self._strength, cache=self._cache, **self._options
        )

    def switch(self, patch: PatchChoice, strength: float = 1.0) -> None:
        """Continue further lines under another patch.

        Raises:
            PatchError: the patch does not fit the model.
        """
        cache = self._model.new_cache(patch, strength)
        self._patch, self._strength, self._cache = patch, strength, cache

    def set_system(self, system: str | None) -> None:
        """Put another text in front of each line."""
        self.system = system

    def clear(self) -> None:
        """Forget the keys and values of the last line."""
        self.switch(self._patch, self._strength)

    def stream_retry(self) -> NoReturn:
        """Refuse: there is no message to answer again."""
        self._refuse("/retry")

    def undo(self) -> NoReturn:
        """Refuse: there is no turn to take back."""
        self._refuse("/undo")

    def save(self, _path: str) -> NoReturn:
        """Refuse: there is no conversation to save."""
        self._refuse("/save")

    def load(self, _path: str) -> NoReturn:
        """Refuse: a conversation cannot go on."""
        self._refuse("/load")

    def _refuse(self, command: str) -> NoReturn:
        raise RequestError(
            "a completion-style model continues each line separately and remembers none",
            field="command",
            got=command,
            wanted="a model with a chat template",
        )
