"""What a decode step reads and writes beside the cache, bound once for all steps of a sequence.

Making an OrtValue takes microseconds, most of them cache misses after a run that has swept the processor's caches. A
step differs from the last one in an id and a position: on the CPU, where ONNX Runtime reads numpy's own memory, those
are written in place. (CUDA copies an input when it is bound, so there every step binds anew.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class StepIO:
    """Ids, positions and logits of one row, bound to `binding`.

    Args:
        ort: the onnxruntime module.
        binding: of the session; anything else bound to these names later makes this useless.
        vocab_size: of the model.
        dtype: of the graph's logits.
        first_logit: name and value of the input that asks for the last logits only.
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
        """Logits [1, vocab], float32, of `token` at `position` after what `mask` [1, n] covers.

        Of a float32 graph they are a view of what the next step overwrites.
        """
        self._ids[0, 0], self._position[0, 0] = token, position
        self.binding.bind_cpu_input("attention_mask", mask)  # its length changes
        session.run_with_iobinding(self.binding)
        return self._logits[0].astype(np.float32, copy=False)
