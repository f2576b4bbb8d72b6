"""Captured decode steps: fixed device buffers through which the steps of one sequence at a time are replayed.

A *lane* holds everything that a decode step reads or writes: ids and position [1, 1], a mask [1, capacity] that is 1 on
the filled part, keys and values of fixed capacity, the slots' tensors filled up with zeros to a rank bucket (exact: the
rows of b are 0), and the last logits. The exported graph takes a row's length from the sum of its mask and the total
length from the mask's width, so with a mask of full width every shape is fixed. Between two steps nothing is bound
anew: contents are written in place, and ids, position, mask and logits are all that crosses the bus. A CUDA graph is
captured for each bucket; on the CPU the same steps run without capture, which is how they are tested.

What ONNX Runtime asks of a capture (its documentation of the CUDA provider; cuda_graph.cc, cuda_execution_provider.h,
inference_session.cc, group_query_attention.cc of its sources), and what follows here:

- The provider option `enable_cuda_graph`; no control flow; every node on CUDA, but for shape arithmetic. A session that
  cannot is refused when it is made. The CUDA provider's attention operator takes float16 and bfloat16 only, so graphs
  that compute in float32 (fp32, int8 and int4 exports) are refused; fp16 exports are what this is for.
- Shapes and addresses stay. A replay runs nothing but the captured kernels: inputs and outputs have to be bound, on the
  device. What kernels read on the host is baked in: the total length, and which logits are asked for.
- `gpu_graph_id` in the run options names the capture: -1 is an ordinary run, 0 is reserved, without it a run is
  captured as 0. So every run of the session names one.
- The first run under an id is done several times before it is captured (two that allocate, one that records). A decode
  step may be repeated: it writes its keys and values to the same place.
- `run` may not be called from several threads, and captured graphs belong to the thread that captured them. So all runs
  of the session go through the lane's thread, prefill and batches too.
- While a capture records, CUDA calls that allocate or wait, from any thread, spoil it, and a session in which one
  failed is of no more use. So all buckets are captured while the model is opened, before anything else can run in it,
  and patches of higher rank than the last bucket take ordinary steps. Open such a model while nothing else of the
  process uses the device.

`OrtValue.update_inplace` copies with cudaMemcpy and waits for the copy, so a replay that follows reads the new content.
None of this has been run on a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import DeviceUnavailableError, RequestError
from ..patch import Delta, SlotKey
from .kv_buffers import InPlaceBuffers
from .kv_cache import CacheKey, KVCache
from .model_folder import ModelFolder
from .slots import slot_arrays

BUCKETS = (0, 4, 16, 64)  # ranks
CAPACITY = 4096  # positions; a longer sequence takes ordinary steps
_NOT_CAPTURED = -1


def check_capturable(folder: ModelFolder, device: str) -> None:
    """Check that captured steps can be asked for.

    Raises:
        DeviceUnavailableError: on the CPU.
        RequestError: of a graph that concatenates keys and values.
    """
    if device == "cpu":
        raise DeviceUnavailableError(
            "CUDA graphs were asked for, and the CPU",
            field="cuda_graphs",
            got="device='cpu'",
            wanted="device='cuda'",
            fix="leave cuda_graphs out, or use device='cuda'",
        )
    if folder.route != "fused":
        raise RequestError(
            "the shapes of this graph change with every step, so that none can be captured",
            field="cuda_graphs",
            got=f"a folder of the {folder.route} route",
            wanted="one of the fused route",
            fix="leave cuda_graphs out, or export the model again without --route optimum",
        )


@dataclass(eq=False)
class _Bucket:
    """Steps under patches of up to one rank.

    Attributes:
        rank: of every slot's pair.
        binding: of all inputs and outputs.
        slots: graph input name -> device tensor.
        options: the run options that name the capture.
        key: of the patch that `slots` hold; None while that is unknown.
    """

    rank: int
    binding: Any
    slots: dict[str, Any]
    options: Any
    key: CacheKey | None = None


class CapturedDecode:
    """The buffers, the thread that runs the session, and the sequence whose keys and values are in them.

    Whoever uses it, or a cache that may be in it, does so within `alone`; `run` needs no such care.

    Args:
        folder: of the graph; its route is `fused`.
        session, ort: ONNX Runtime's session and module.
        device: `cuda`; or `cpu`, where nothing is captured.
        dtypes: of slots, keys and values; of the graph's logits.
        first_logit: name and value (on the host) of the input that asks for the last logits only.
        kv: how the graph's caches are kept.

    Attributes:
        capacity: positions there is room for.
        buffers: graph input name -> keys or values [1, kv heads, capacity, head dim]; a cache that has them as its own
            is the one in the lane.
        buckets: by rank.
    """

    def __init__(
        self,
        folder: ModelFolder,
        session: Any,
        ort: Any,
        device: str,
        dtypes: tuple[np.dtype[Any], DTypeLike],
        first_logit: tuple[str, Any],
        kv: InPlaceBuffers,
    ) -> None:
        self._slots, self._dtype, self._kv, self._session = folder.slots, dtypes[0], kv, session
        self._ort, self._device = ort, device
        self._thread, self._lock = ThreadPoolExecutor(1, "tp-lane"), threading.RLock()
        self._thread_id = self._thread.submit(threading.get_ident).result()
        self._owner: weakref.ref[KVCache] | None = None
        self.capacity = min(CAPACITY, folder.context_window)
        self.buffers = kv.fixed_buffers(self.capacity)
        self._mask = np.zeros((1, self.capacity), np.int64)
        shapes = {"input_ids": (1, 1), "position_ids": (1, 1), "attention_mask": (1, self.capacity)}
        self._inputs = {name: self._value(np.zeros(shape, np.int64)) for name, shape in shapes.items()}
        self._logits = self._value(np.zeros((1, 1, folder.vocab_size), dtypes[1]))
        self._not_captured = self._options(_NOT_CAPTURED)
        self.buckets = [self._bucket(rank, number, first_logit) for number, rank in enumerate(BUCKETS, start=1)]
        self._current = self.buckets[0]

    def _value(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _options(self, graph_id: int) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def _bucket(self, rank: int, number: int, first_logit: tuple[str, Any]) -> _Bucket:
        slots = {name: self._value(array) for name, array in self._padded({}, rank).items()}
        binding = self._session.io_binding()
        for name, value in (*self._inputs.items(), first_logit, *slots.items(), *self.buffers.items()):
            binding.bind_ortvalue_input(name, value)
        for past, present in self._kv.names:
            binding.bind_ortvalue_output(present, self.buffers[past])
        binding.bind_ortvalue_output("logits", self._logits)
        return _Bucket(rank, binding, slots, self._options(number))

    def _padded(self, deltas: Mapping[SlotKey, Delta], rank: int) -> dict[str, NDArray[Any]]:
        """The tensors of all slots by graph input name: a [1, in, rank], b [1, rank, out], bias [1, 1, out]."""
        arrays = {}
        for key, slot in self._slots.items():
            for name, array in slot_arrays(deltas.get(key), slot, self._dtype).items():
                shape = {"a": (1, slot.inputs, rank), "b": (1, rank, slot.outputs), "bias": array.shape}
                wide = np.zeros(shape[name.rpartition(".")[2]], self._dtype)
                wide[:, : array.shape[1], : array.shape[2]] = array
                arrays[name] = wide
        return arrays

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within the context no other thread uses the lane.

        On the lane's own thread nobody is waited for: the garbage collector may end a dropped completion there, while
        the one who is alone waits for that thread.
        """
        if threading.get_ident() == self._thread_id:
            yield
        else:
            with self._lock:
                yield

    # -- running the session ---------------------------------------------------------------------------------

    def run(self, binding: Any, options: Any = None) -> None:
        """Run the session over a binding, on the lane's thread; without `options` an ordinary run."""
        running = self._thread.submit(self._session.run_with_iobinding, binding, options or self._not_captured)
        try:
            running.result()
        except BaseException:
            wait([running])  # interrupted: the run goes on, and writes to what the caller would use next
            raise

    def capture(self) -> None:
        """Capture every bucket, by a step that nobody asked for.

        Raises:
            Exception: ONNX Runtime's; the session is of no use then.
        """
        for bucket in self.buckets:
            self._current = bucket
            self.step(0, 0, 1)

    def step(self, token: int, position: int, length: int) -> NDArray[np.float32]:
        """Logits [1, vocab], float32, of one more token of the sequence in the lane, under what `switch` chose.

        Args:
            token: its id.
            position: its position.
            length: entries with it.
        """
        self._mask[0, :length], self._mask[0, length:] = 1, 0
        self._inputs["input_ids"].update_inplace(np.array([[token]], np.int64))
        self._inputs["position_ids"].update_inplace(np.array([[position]], np.int64))
        self._inputs["attention_mask"].update_inplace(self._mask)
        self.run(self._current.binding, self._current.options)
        return np.array(self._logits.numpy()[0], np.float32)

    # -- the patch -------------------------------------------------------------------------------------------

    def switch(self, key: CacheKey, deltas: Mapping[SlotKey, Delta]) -> bool:
        """Let the next steps run under a patch; returns whether there is a bucket for its rank.

        Writes its tensors in place, unless its bucket still holds them.

        Args:
            key: of the patch.
            deltas: what its slots add.
        """
        if key == self._current.key:
            return True
        rank = max((delta.rank for delta in deltas.values()), default=0)
        bucket = next((bucket for bucket in self.buckets if bucket.rank >= rank), None)
        if bucket is None:
            return False
        if bucket.key != key:
            bucket.key = None
            for name, array in self._padded(deltas, bucket.rank).items():
                if array.size:
                    bucket.slots[name].update_inplace(array)
            bucket.key = key
        self._current = bucket
        return True

    # -- the sequence ----------------------------------------------------------------------------------------

    def holds(self, cache: KVCache) -> bool:
        """Whether the keys and values of `cache` are those in the lane."""
        return cache.buffers is self.buffers

    def take(self, cache: KVCache, length: int, patch: dict[str, Any]) -> bool:
        """Let a sequence have the lane, and say whether it has; the one before keeps a copy of its own.

        A fresh cache, or one with tokens to prefill, takes it. A decode step of a sequence that lost the lane does not
        take it back: of two that take turns, each step would carry both through the host.

        Args:
            cache: the sequence's.
            length: with what is about to run; a sequence that the lane has no room for does not get it.
            patch: graph input name -> OrtValue, for ordinary runs.
        """
        if length > self.capacity:
            return False
        if self.holds(cache) or (cache.buffers and length == cache.filled + 1):
            return self.holds(cache)
        content = {past: self._kv.content(cache, past) for past in self.buffers}
        self._evict()
        for past, array in content.items():
            if array is not None and array.size:
                self._kv.refill(self.buffers[past], array)
        self._kv.hold(cache, self.buffers, patch)
        self._owner = weakref.ref(cache)
        return True

    def _evict(self) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is None or not self.holds(owner):
            return
        from_numpy = self._ort.OrtValue.ortvalue_from_numpy
        kept = {past: from_numpy(np.array(self._kv.content(owner, past))) for past in self.buffers}
        owner.buffers, owner.binding, owner.capacity = kept, None, 0  # its next run puts them on the device again
