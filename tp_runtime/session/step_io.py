"""The inputs and outputs of a decode step other than the KV cache, which are bound once for all steps of a sequence.

A step differs from the previous one in an id, a position and one more place of the mask. On the CPU, ONNX Runtime reads
numpy's own memory, so each step writes these in place and binds nothing. This matters because a run evicts the contents
of the processor's caches: every line of Python and every call into a library that follows waits for memory, and takes
five times as long as it would on its own. (CUDA copies an input when it is bound, so there every step binds its inputs
again.)

The mask has a place for every position that the cache has room for. The places behind the last token hold zeros, and
the attention operator takes the number of tokens from the sum of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UNKNOWN = -1


class StepIO:
    """The id, the position, the mask and the logits of one row, bound to `binding`.

    Args:
        ort: the onnxruntime module.
        binding: a binding of the session. If other values are bound to these names later, this object must not be used
            any more.
        lead: how many positions of full layers the row's cache holds more than tokens, and by how much a token's
            position is larger than the number of tokens before it. Neither changes while the row is in the cache.
        capacity: the number of positions of full layers that the buffers bound to `binding` have room for.
        shown: the numbers of filled positions from which a step may go on with what is bound of windowed layers.
        window: the number of positions that the graph can process.
        logits: the array [1, 1, vocab] of the graph's dtype that every step writes its logits to.
        first_logit: the name and the value of the input that limits the logits to the last position.
    """

    def __init__(
        self,
        ort: Any,
        binding: Any,
        lead: tuple[int, int],
        capacity: int,
        shown: range,
        window: int,
        logits: NDArray[Any],
        first_logit: tuple[str, Any],
    ) -> None:
        self.binding = binding
        self._entries, self._skipped = lead
        self._vocab_size, self._least = logits.shape[2], shown.start - self._entries
        self._room = min(min(capacity, shown.stop) - self._entries, window - self._skipped)
        self._id, self._position = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._mask, self._filled = np.zeros(capacity, np.int64), _UNKNOWN  # the ones at the front of the mask
        from_numpy = ort.OrtValue.ortvalue_from_numpy
        for name, array in (("input_ids", self._id), ("position_ids", self._position), ("attention_mask", self._mask)):
            binding.bind_ortvalue_input(name, from_numpy(array[None]))
        binding.bind_ortvalue_input(*first_logit)
        binding.bind_ortvalue_output("logits", from_numpy(logits))
        self._row = logits[0]
        self._converts = self._row.dtype != np.float32

    def serves(self, binding: Any, run: Sequence[int], tokens: int) -> bool:
        """Whether `run` is one id of the vocabulary that can be run after `tokens` others with what is bound.

        Args:
            binding: the binding of the row's cache, which is another one once the buffers have grown.
            run: the ids to run.
            tokens: the number of tokens that the cache holds.
        """
        if len(run) != 1 or binding is not self.binding or not self._least <= tokens < self._room:
            return False
        return type(run[0]) is int and 0 <= run[0] < self._vocab_size

    def run(self, session: Any, token: int, tokens: int) -> NDArray[np.float32]:
        """Run one decode step.

        Args:
            session: the session to run.
            token: the id to run.
            tokens: the number of tokens that the cache holds, without this one.

        Returns:
            Logits [1, vocab], float32. If the graph's logits are float32, this is a view that the next step overwrites.
        """
        filled = tokens + self._entries
        self._id[0], self._position[0] = token, tokens + self._skipped
        if filled != self._filled:  # the first step, or the cache was rewound, or a run failed
            self._filled = _UNKNOWN  # an interrupt between the next two lines leaves a mask that must not be added to
            self._mask[:filled], self._mask[filled:] = 1, 0
        self._mask[filled] = 1
        self._filled = filled + 1
        session.run_with_iobinding(self.binding)
        return self._row.astype(np.float32) if self._converts else self._row
