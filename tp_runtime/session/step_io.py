"""The inputs and outputs of a decode step other than the KV cache, which are bound once for all steps of a sequence.

Creating an OrtValue takes microseconds. Most of that time is cache misses, because a run evicts the contents of the
processor's caches. A step differs from the previous one in an id and a position. On the CPU, ONNX Runtime reads numpy's
own memory, so each step writes these in place. (CUDA copies an input when it is bound, so there every step binds its
inputs again.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class StepIO:
    """The ids, the position and the logits of one row, bound to `binding`.

    Args:
        ort: the onnxruntime module.
        binding: a binding of the session. If other values are bound to these names later, this object must not be used
            any more.
        vocab_size: the size of the model's vocabulary.
        dtype: the dtype of the graph's logits.
        first_logit: the name and the value of the input that limits the logits to the last position.
    """

    def __init__(self, ort: Any, binding: Any, vocab_size: int, dtype: DTypeLike, first_logit: tuple[str, Any]) -> None:
        self.binding = binding
        self._ids, self._position = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)
        self._logits = np.empty((1, 1, vocab_size), dtype)
        from_numpy = ort.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input("input_ids", from_numpy(self._ids))
        binding.bind_ortvalue_input("position_ids", from_numpy(self._position))
        binding.bind_ortvalue_input(*first_logit)
        binding.bind_ortvalue_output("logits", from_numpy(self._logits))

    def run(self, session: Any, token: int, position: int, mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one decode step.

        Args:
            session: the session to run.
            token: the id to run.
            position: the token's position.
            mask: the attention mask [1, n], which covers the cached entries and this token.

        Returns:
            Logits [1, vocab], float32. If the graph's logits are float32, this is a view that the next step overwrites.
        """
        self._ids[0, 0], self._position[0, 0] = token, position
        self.binding.bind_cpu_input("attention_mask", mask)  # its length changes with every step
        session.run_with_iobinding(self.binding)
        return self._logits[0].astype(np.float32, copy=False)
