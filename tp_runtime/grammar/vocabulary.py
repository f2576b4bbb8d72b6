"""The vocabulary of one model as llguidance needs it: the bytes of every id in a prefix tree, and the ids that end."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelFormatError, library_errors
from .library import llguidance


class TokenizerSource(Protocol):
    """A tokenizer of the tokenizers library, or what has these two methods of it."""

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return the ids of all tokens."""

    def to_str(self) -> str:
        """Return the tokenizer as JSON text."""


class Vocabulary:
    """The ids of one model. The prefix tree is built when the first constraint is compiled, and only once.

    Building it takes 1 s at 49,152 ids and 8 s at 262,144, most of which is the reading of the tokenizer's text. All
    threads share one object.

    Attributes:
        width: the number of logits; ids from there on do not exist for the model, whatever the tokenizer says.
        eos_ids: the ids that end a completion, in ascending order.
    """

    def __init__(self, tokenizer: TokenizerSource, eos_ids: Iterable[int], width: int) -> None:
        self.width = width
        self.eos_ids = tuple(sorted(eos for eos in eos_ids if 0 <= eos < width))
        self._source = tokenizer
        self._lock = threading.Lock()
        self._tree: Any = None

    def tree(self, field: str) -> Any:
        """Return the `LLTokenizer` of the model, which threads share.

        Args:
            field: the argument that needs it, for the error.

        Raises:
            RequestError: llguidance is not installed.
            ModelFormatError: llguidance cannot read the tokenizer, or no id ends a completion.
        """
        with self._lock:
            if self._tree is None:
                self._tree = self._build(field)
            return self._tree

    def _build(self, field: str) -> Any:
        library = llguidance(field)
        if not self.eos_ids:
            raise ModelFormatError(
                "no id ends a completion, so a constraint cannot say where it ends",
                field="eos_token_id",
                got="none below the number of logits",
                wanted=f"an id below {self.width}",
            )
        with library_errors(
            ModelFormatError,
            "llguidance cannot read the tokenizer",
            field="tokenizer.json",
            wanted="a tokenizer whose tokens stand for bytes (byte-level or with byte fallback)",
            fix=f"leave {field} out",
        ):
            # Gemma's tokenizer has more ids than the model has logits, and other models have more logits than ids. The
            # tree is made for the larger number: ids without bytes are never allowed, and `cut` removes the others.
            ids = max(self._source.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            return library.LLTokenizer(
                self._source.to_str(),
                n_vocab=max(self.width, ids),
                eos_token=list(self.eos_ids),
                slices=library.LLTokenizer.json_slices(),
            )

    def cut(self, mask: bytes) -> NDArray[np.uint32]:
        """Return a mask over the ids of the tree as bits [ceil(width / 32)] over the logits."""
        bits = np.frombuffer(mask, dtype="<u4")[: -(-self.width // 32)]
        if self.width % 32:
            bits = bits.copy()
            bits[-1] &= np.uint32((1 << self.width % 32) - 1)
        return bits
