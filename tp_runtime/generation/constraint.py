"""A constraint says which ids a completion may continue with; the sampler asks it and knows nothing of its rules.

Most of what a model picks is allowed already, and the bits of a whole vocabulary are dear: at 262,144 ids a mask takes
longer than the question whether one id is allowed. So a pick is checked with `allows` first, and only if that fails,
the logits are masked and the pick is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """What one completion may be. The object holds the state of that one completion, so requests do not share it.

    Every question is about the id that comes after the ids of the last `follow`. The object is not used by two threads
    at once.
    """

    def follow(self, completion: Sequence[int]) -> None:
        """Bring the state to the one after a completion: consume the new ids, and take back what is no longer there.

        So a step that failed can be repeated.

        Args:
            completion: all ids of the completion so far, without the prompt.

        Raises:
            RequestError: an id is not allowed at its place. The state is then the one after the ids before it.
        """
        ...

    def allows(self, token: int) -> bool:
        """Return whether the completion may continue with this id. It is cheap: no mask is computed."""
        ...

    def allowed(self) -> NDArray[np.uint32]:
        """Return the ids that may come next as bits [ceil(vocab / 32)]: bit i % 32 of word i // 32 stands for id i.

        At least one bit is set: where nothing else may come, an id that ends the completion may.
        """
        ...

    def forced(self) -> list[int]:
        """Return the ids that must come next, one after the other, as far as that is known; the list may be empty.

        Where the completion must end, it is one id that ends it.
        """
        ...


def _limits() -> NDArray[np.float32]:
    """Return for each byte of a mask the limits of its eight logits [256, 8]: +inf where the bit is set, else -inf."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, np.inf, -np.inf).astype(np.float32)


# A table lookup takes 50 to 70 microseconds at 262,144 ids, whatever the mask. `np.where` with the unpacked bits takes
# 160 microseconds for a mask with long runs, and 1,000 for an irregular one: its branches are mispredicted.
_LIMITS = _limits()


def masked(logits: NDArray[np.floating], bits: NDArray[np.uint32]) -> NDArray[np.floating]:
    """Return logits with -inf for every id that the mask does not allow.

    Args:
        logits: the logits [vocab]; they are not changed.
        bits: the mask [ceil(vocab / 32) or more], as `Constraint.allowed` returns it.

    Returns:
        The logits [vocab], in float32 or the wider type of `logits`. A NaN stays NaN, allowed or not: the sampler
        counts it as -inf.
    """
    in_bytes = np.ascontiguousarray(bits, dtype="<u4").view(np.uint8)[: -(-len(logits) // 8)]
    limits = _LIMITS.take(in_bytes, axis=0).reshape(-1)[: len(logits)]
    if logits.dtype == np.float32:
        return np.minimum(logits, limits, out=limits)
    return np.minimum(logits, limits)
