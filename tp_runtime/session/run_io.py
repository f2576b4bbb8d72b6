"""The inputs and outputs of a run of any shape, other than caches and patches, which are bound for that run alone.

A decode step has inputs and outputs that are bound once for all steps of a sequence (step_io.py, device_step.py). Any
other run, such as that of a prompt, binds arrays of its own, with a shape of its own. This module knows nothing of the
keys, values and patches that a binding holds besides, or of which session and thread run it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .interface import FIRST_LOGIT


class RunIO:
    """Binds the ids, the mask, the positions and the logits of runs of one session.

    Args:
        ort: the onnxruntime module.
        vocab_size: the number of logits of one position.
        dtype: the dtype of the graph's logits.

    Attributes:
        dtype: the dtype of the graph's logits.
    """

    def __init__(self, ort: Any, vocab_size: int, dtype: np.dtype[Any]) -> None:
        self._from_numpy = ort.OrtValue.ortvalue_from_numpy
        self._vocab_size, self.dtype = vocab_size, dtype
        self._first_logits: dict[int, Any] = {}  # the values of FIRST_LOGIT that were used so far

    def first_logit(self, first: int) -> tuple[str, Any]:
        """Return the name and the value of the input that says from which position of a run logits are computed.

        The graph counts a negative position from the end of the run.
        """
        if first not in self._first_logits:
            self._first_logits[first] = self._from_numpy(np.array([first], np.int64))
        return FIRST_LOGIT, self._first_logits[first]

    def bind(
        self, binding: Any, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64], last: int
    ) -> NDArray[Any]:
        """Bind what one run reads and writes; the arrays must outlive the run.

        Args:
            binding: a binding of the session.
            ids: token ids [B, T].
            mask: the attention mask [B, longest past + T], 1 on each row's tokens and 0 on the padding at its right. It
                counts the positions of full layers; `shift_values` are those of windowed layers, in the binding.
            positions: the ids' positions [B, T].
            last: the number of positions at the end whose logits are computed, from 1 to T.

        Returns:
            The array [B, last, vocab] of the graph's dtype that the run writes its logits to.
        """
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input("position_ids", positions)
        rows, steps = ids.shape
        binding.bind_ortvalue_input(*self.first_logit(0 if last == steps else -last))
        # The logits get an array of their own, because asking the binding for its outputs takes time for each of them,
        # and there are two for every layer.
        logits = np.empty((rows, last, self._vocab_size), self.dtype)
        binding.bind_ortvalue_output("logits", self._from_numpy(logits))
        return logits
