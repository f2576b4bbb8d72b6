"""The inputs and outputs of decode steps on a device, other than caches and patches, which every step writes in place.

Binding an array of the host copies it to new memory of the device, and a bound array of the host gets all logits. Here
both stay on the device: a step writes the ids, the positions and the lengths, 24 bytes a row, and fetches the largest
logits, if the graph returns them and they suffice, and all of them otherwise.

The lengths are written as what they differ by from the width of a mask of ones (`tp.length_shift`), so the mask is
never written again. Graphs of earlier versions do not have that input, and get the whole mask with every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .best_logits import BestLogits, best_logits
from .interface import BEST_IDS, BEST_VALUES, LENGTH_SHIFT, WINDOWED_SHIFT
from .model_folder import ModelFolder
from .packed_tensors import PackedTensors

Logits = NDArray[np.float32] | list[BestLogits]  # [rows, vocab], or the largest ones of each row


class DeviceStep:
    """The inputs and outputs of steps of `rows` sequences.

    Args:
        ort: the onnxruntime module.
        folder: the model folder of the graph.
        device: the device, `cuda`, or `cpu` in tests.
        dtype: the dtype of the graph's logits.
        rows: the number of sequences.
        width: the width of the mask, if it is the same for all steps; None if each step binds its own (`bind_for`).

    Attributes:
        rows: the number of sequences.
        best: the largest logits on the device [rows, best] and their ids; None if the graph does not return them.
    """

    def __init__(
        self, ort: Any, folder: ModelFolder, device: str, dtype: DTypeLike, rows: int = 1, width: int | None = None
    ) -> None:
        self.rows = rows
        self._folder, self._device = folder, device
        self._binding: Any = None  # the binding of `bind_for`; None while that is incomplete
        self._mask_bound: tuple[int, int] | None = None  # the address and the width of the mask that is bound to it

        def value(shape: tuple[int, ...], kind: DTypeLike) -> Any:
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind), device, 0)

        shapes: dict[str, tuple[tuple[int, ...], DTypeLike]] = dict.fromkeys(
            ("input_ids", "position_ids"), ((rows, 1), np.int64)
        )
        if folder.best is not None:
            shapes[LENGTH_SHIFT], self._no_shift = ((rows,), np.int32), value((1,), np.int32)
        if folder.windowed is not None:
            shapes[WINDOWED_SHIFT] = (rows,), np.int32
        self._inputs = PackedTensors(ort, device, shapes)
        self._memory = self._inputs.new_memory()
        self._numbers = self._inputs.arrays(self._memory)
        self._mask = np.ones((rows, width or 0), np.int64)
        self._fixed_mask = None if width is None else ort.OrtValue.ortvalue_from_numpy(self._mask, device, 0)
        self._logits = value((rows, 1, folder.vocab_size), dtype)
        self.best: PackedTensors | None = None
        if folder.best is not None:
            largest = (rows, folder.best)
            self.best = PackedTensors(ort, device, {BEST_VALUES: (largest, dtype), BEST_IDS: (largest, np.int64)})

    def bind(self, binding: Any, first_logit: tuple[str, Any]) -> None:
        """Bind everything, and the input that limits the logits to the last position, to a binding of the session.

        The step must outlive the binding's use of it: the binding holds addresses.
        """
        self._inputs.bind_inputs(binding)
        binding.bind_ortvalue_input(*first_logit)
        if self._fixed_mask is not None:
            binding.bind_ortvalue_input("attention_mask", self._fixed_mask)
        binding.bind_ortvalue_output("logits", self._logits)
        if self.best is not None:
            self.best.bind_outputs(binding)

    def bind_for(self, binding: Any, first_logit: tuple[str, Any], ones: Any, width: int) -> None:
        """Bind everything to the binding that the next step runs over, as far as it is not bound to it yet.

        Args:
            binding: a binding of the session, which holds the caches and the patch.
            first_logit: see `bind`.
            ones: ones on the device [rows * `width` or more] int64, whose memory must outlive the binding.
            width: the width of the mask.
        """
        mask = ones.data_ptr(), width
        if self._binding is not binding:
            self._binding = None
            self.bind(binding, first_logit)
            self._mask_bound = None
        if self._mask_bound != mask:
            self._mask_bound = None
            binding.bind_input("attention_mask", self._device, 0, np.int64, [self.rows, width], mask[0])
            self._mask_bound = mask
        self._binding = binding

    def unbind(self, binding: Any) -> None:
        """Take out of a binding what a run of another shape cannot use: the lengths and the largest logits.

        This comes before every such run, because a run leaves largest logits of its own shape in the binding.
        """
        self._binding = None
        if self._folder.best is not None:
            binding.bind_ortvalue_input(LENGTH_SHIFT, self._no_shift)
            for name in (BEST_VALUES, BEST_IDS):
                binding.bind_output(name, self._device, 0)

    def write(
        self, tokens: Sequence[int], positions: Sequence[int], filled: Sequence[int], width: int, shifts: Sequence[int]
    ) -> None:
        """Write what a step reads.

        Args:
            tokens: the id to run in each row.
            positions: the ids' positions.
            filled: for each row the number of filled positions of full layers, this id's included.
            width: the width of the mask.
            shifts: for each row the number of positions by which windowed layers hold more.
        """
        numbers = self._numbers
        numbers["input_ids"][:, 0] = tokens
        numbers["position_ids"][:, 0] = positions
        if LENGTH_SHIFT in numbers:
            numbers[LENGTH_SHIFT][:] = filled
            numbers[LENGTH_SHIFT] -= width
        elif self._fixed_mask is not None:
            self._mask[:] = np.arange(width) < np.array(filled)[:, None]
            self._fixed_mask.update_inplace(self._mask)
        if WINDOWED_SHIFT in numbers:
            numbers[WINDOWED_SHIFT][:] = shifts
        self._inputs.send(self._memory)

    def logits(self, best: Sequence[int]) -> Logits:
        """Fetch what the last step returned.

        Args:
            best: for each row how many of the largest logits are needed; 0 for all.

        Returns:
            For each row all logits that are at least as large as the n-th largest one, if the graph returns enough of
            them for every row. Otherwise the caller's own copy of all logits [rows, vocab].
        """
        if self.best is not None and all(best):
            largest = self.best.fetch()
            pairs = zip(largest[BEST_VALUES], largest[BEST_IDS], best, strict=True)
            found = [best_logits(values, ids, number, self._folder.vocab_size) for values, ids, number in pairs]
            if (complete := [row for row in found if row is not None]) and len(complete) == self.rows:
                return complete
        return np.array(self._logits.numpy()[:, 0], np.float32)


class DeviceSteps:
    """Runs decode steps of one session whose inputs and outputs stay on the device.

    Args:
        ort: the onnxruntime module.
        folder: the model folder of the graph, which returns the largest logits.
        device: the device, `cuda`, or `cpu` in tests.
        dtype: the dtype of the graph's logits.
        first_logit: the name and the value of the input that limits the logits to the last position.
        run: a function that runs the session over a binding.
    """

    def __init__(
        self,
        ort: Any,
        folder: ModelFolder,
        device: str,
        dtype: DTypeLike,
        first_logit: tuple[str, Any],
        run: Callable[[Any], None],
    ) -> None:
        self._ort, self._folder, self._device, self._dtype = ort, folder, device, dtype
        self._first_logit, self._run = first_logit, run
        self._ones: list[Any] = []  # the masks; bindings may refer to all of them

    def new(self, rows: int) -> DeviceStep:
        """Return the inputs and outputs of decode steps of `rows` sequences."""
        return DeviceStep(self._ort, self._folder, self._device, self._dtype, rows)

    def run(
        self,
        step: DeviceStep,
        binding: Any,
        tokens: Sequence[int],
        positions: Sequence[int],
        filled: Sequence[int],
        shifts: Sequence[int],
        best: Sequence[int],
    ) -> Logits:
        """Run one id of every row over a binding that already holds keys, values and patch.

        Args:
            step: the inputs and outputs of the rows, which `new` made.
            binding: a binding of the session.
            tokens: the id to run in each row.
            positions: the ids' positions.
            filled: for each row the number of filled positions of full layers, this id's included.
            shifts: for each row the number of positions by which windowed layers hold more.
            best: for each row how many of the largest logits are needed; 0 for all.

        Returns:
            The largest logits of each row, or all [rows, vocab]; see DeviceStep.logits.
        """
        width = max(filled)
        step.bind_for(binding, self._first_logit, self._ones_of(len(tokens) * width), width)
        step.write(tokens, positions, filled, width, shifts)
        self._run(binding)
        return step.logits(best)

    def _ones_of(self, count: int) -> Any:
        """Return at least `count` ones on the device."""
        last = self._ones[-1] if self._ones else None  # another thread may append shorter ones at any time
        if last is None or last.shape()[0] < count:
            ones = np.ones(max(2 * count, self._folder.context_window), np.int64)
            last = self._ort.OrtValue.ortvalue_from_numpy(ones, self._device, 0)
            self._ones.append(last)
        return last
