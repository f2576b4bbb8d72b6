"""Captured decode steps: this module replays the decode steps of one sequence at a time from fixed device buffers.

The captured decode buffers hold everything that a decode step reads or writes: the token id and the position [1, 1], a
mask [1, capacity], keys and values of fixed capacity, the slots' tensors padded with zeros to the rank of a bucket
(this is exact, because the added rows of b are 0), and the last logits (device_step.py). The exported graph takes the
total length from the mask's width, so a mask of full width fixes every shape; the row's own length is written. Windowed
layers have buffers of the same capacity as full ones, whatever numbers of entries a patch has for them, because the
total length of both is fixed at capture; the shift of their lengths is one more input that is written in place. Nothing
is bound again between two steps: contents are written in place, and only the id, the position, the length and the
logits that are needed cross the bus. One CUDA graph is captured for each bucket. On the CPU the same steps run without
capture, which is how they are tested.

The rules for a capture come from ONNX Runtime's documentation of the CUDA provider and from its sources (cuda_graph.cc,
cuda_execution_provider.h, inference_session.cc, group_query_attention.cc). The rules and their consequences here are:

- A capture needs the provider option `enable_cuda_graph`, a graph without control flow, and every node except shape
  arithmetic on CUDA. ONNX Runtime refuses to create a session that cannot meet this. The CUDA provider's attention
  operator takes float16 and bfloat16 only, so graphs that compute in float32 (fp32, int8 and int4 exports) are refused;
  captured steps are meant for fp16 and int4-fp16 exports.
- Shapes and addresses must stay the same. A replay runs only the captured kernels, so inputs and outputs have to be
  bound, on the device. Values that kernels read on the host are fixed at capture: the total length, and which logits
  the run computes.
- `gpu_graph_id` in the run options names the capture: -1 is an ordinary run, and 0 is reserved. A run without the
  option is captured as 0, so every run of the session sets it.
- ONNX Runtime repeats the first run under an id before it is captured (two runs allocate, one records). A decode step
  may be repeated, because it writes its keys and values to the same place.
- `run` may not be called from several threads at the same time, and captured graphs belong to the thread that captured
  them. So the runs of the session, prefill and batches included, take turns, and two threads run them: the one that
  opened the model runs its own, without waiting for another thread to wake up, and a thread that CapturedDecode owns
  runs those of all others.
- While a capture records, CUDA calls from any thread that allocate or wait invalidate it, and a session in which a
  capture failed cannot be used any more. So all buckets are captured while the model is opened, on both threads, before
  anything else can run in it, and patches whose rank exceeds the last bucket's take ordinary steps. Open such a model
  while nothing else in the process uses the device.

`OrtValue.update_inplace` copies with cudaMemcpy and waits for the copy, so a replay that follows reads the new content.
runtime_tests/gpu/standin shows that ONNX Runtime's CUDA provider takes the captures and replays them, and
runtime_tests/gpu/test_gpu.py compares on a GPU what they compute.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import DeviceUnavailableError, RequestError
from ..patch import Delta, SlotKey
from .bound_patch import BoundPatch
from .device_step import DeviceStep, Logits
from .kv_buffers import InPlaceBuffers
from .kv_cache import CacheKey, KVCache
from .model_folder import ModelFolder
from .packed_tensors import PackedTensors
from .slots import slot_arrays

BUCKETS = (0, 4, 16, 64)  # the ranks that a decode step is captured for
CAPACITY = 4096  # positions; a longer sequence takes ordinary steps
_NOT_CAPTURED = -1


def check_capturable(folder: ModelFolder, device: str) -> None:
    """Check that the device and the graph allow captured decode steps.

    Raises:
        DeviceUnavailableError: the device is the CPU.
        RequestError: the graph concatenates keys and values.
    """
    if device == "cpu":
        raise DeviceUnavailableError(
            "CUDA graphs cannot be captured on the CPU",
            field="cuda_graphs",
            got="device='cpu'",
            wanted="device='cuda'",
            fix="leave cuda_graphs out, or use device='cuda'",
        )
    if folder.route != "fused":
        raise RequestError(
            "the tensor shapes of this graph change with every step, so no step can be captured",
            field="cuda_graphs",
            got=f"a folder of the {folder.route} route",
            wanted="a folder of the fused route",
            fix="leave cuda_graphs out, or export the model again without --route optimum",
        )


@dataclass(eq=False)
class _Bucket:
    """The slot tensors, the binding and the capture for patches up to one rank.

    Attributes:
        rank: the rank of every slot's factors a and b, padding included.
        binding: the binding of all inputs and outputs.
        slots: the slots' tensors on the device.
        options: the run options that name the capture.
        key: the cache key of the patch that `slots` hold; None while that is unknown.
    """

    rank: int
    binding: Any
    slots: PackedTensors
    options: Any
    key: CacheKey | None = None


class CapturedDecode:
    """The captured decode buffers, the threads that run the session, and the sequence that owns the buffers.

    The owner is the sequence whose keys and values are in the buffers. A caller that uses this object, or a cache that
    may own the buffers, does so inside `exclusive`. Only `run` can be called outside of it.

    Args:
        folder: the model folder of the graph; its route is `fused`.
        session: ONNX Runtime's session.
        ort: the onnxruntime module.
        device: `cuda`, or `cpu`, on which nothing is captured.
        dtypes: the dtype of slots, keys and values, and the dtype of the graph's logits.
        first_logit: the name and the value (on the host) of the input that limits the logits to the last position.
        kv: the object that manages the key/value buffers of the graph's caches.

    Attributes:
        capacity: the number of positions that the buffers have room for.
        buffers: the keys or values [1, kv heads, capacity, head dim], by graph input name. The owner's
            cache has this same dictionary as its `buffers`.
        buckets: the buckets, in ascending order of rank.
        session: ONNX Runtime's session.
        io: the inputs and outputs of a step other than keys, values and patch.
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
        from concurrent.futures import ThreadPoolExecutor  # sessions that capture nothing open without this import

        self._slots, self._dtype, self._kv, self.session = folder.slots, dtypes[0], kv, session
        self._ort, self._device = ort, device
        self._thread, self._lock = ThreadPoolExecutor(1, "tp-captured-decode"), threading.RLock()
        self._thread_id = self._thread.submit(threading.get_ident).result()
        self._turn = threading.RLock()  # one run at a time
        self._here = threading.local()  # has the attribute `captured` on the thread that opened the model
        self._owner: weakref.ref[KVCache] | None = None
        self.capacity = min(CAPACITY, folder.context_window)
        self.buffers = kv.fixed_buffers(self.capacity)
        self.io = DeviceStep(ort, folder, device, dtypes[1], width=self.capacity)
        self._not_captured = self._options(_NOT_CAPTURED)
        self.buckets = [self._bucket(rank, number, first_logit) for number, rank in enumerate(BUCKETS, start=1)]
        self._current = self.buckets[0]

    def _options(self, graph_id: int) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return options

    def _bucket(self, rank: int, number: int, first_logit: tuple[str, Any]) -> _Bucket:
        slots = PackedTensors(self._ort, self._device, self._padded_shapes(rank))
        binding = self.session.io_binding()
        self.io.bind(binding, first_logit)
        slots.bind_inputs(binding)
        for name, value in self.buffers.items():
            binding.bind_ortvalue_input(name, value)
        for past, present in self._kv.names:
            binding.bind_ortvalue_output(present, self.buffers[past])
        return _Bucket(rank, binding, slots, self._options(number))

    def _padded_shapes(self, rank: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Return shape and dtype of all slots' tensors: a [1, in, rank], b [1, rank, out], bias [1, 1, out]."""
        shapes: dict[str, tuple[tuple[int, ...], DTypeLike]] = {}
        for slot in self._slots.values():
            for name, array in slot_arrays(None, slot, self._dtype).items():
                padded = {"a": (1, slot.inputs, rank), "b": (1, rank, slot.outputs), "bias": array.shape}
                shapes[name] = padded[name.rpartition(".")[2]], self._dtype
        return shapes

    def _write(self, bucket: _Bucket, deltas: Mapping[SlotKey, Delta]) -> None:
        """Write the tensors of a patch in place, in one copy; the added rows and columns are zeros."""
        memory = bucket.slots.new_memory()
        padded = bucket.slots.arrays(memory)
        for key, slot in self._slots.items():
            for name, array in slot_arrays(deltas.get(key), slot, self._dtype).items():
                padded[name][:, : array.shape[1], : array.shape[2]] = array
        bucket.slots.send(memory)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside the context no other thread uses the buffers, but for one that reads what a dropped completion leaves.

        On the session's own thread the context takes no lock. The garbage collector may end a dropped completion on
        that thread while the thread that holds the lock waits for it, so locking there would deadlock.
        """
        if threading.get_ident() == self._thread_id:
            yield
        else:
            with self._lock:
                yield

    # -- running the session ---------------------------------------------------------------------------------

    def run(self, binding: Any, options: Any = None) -> None:
        """Run the session over a binding on a thread that captured the steps; an ordinary run, without `options`."""
        options = options or self._not_captured
        if hasattr(self._here, "captured"):
            # The lock comes before the turn, as on other threads. The garbage collector may end a dropped completion
            # inside the run, and that takes the lock, which another thread could hold while it waits for its turn.
            with self._lock:
                self._run(binding, options)
            return
        running = self._thread.submit(self._run, binding, options)
        try:
            running.result()
        except BaseException:
            from concurrent.futures import wait

            wait([running])  # after an interrupt the run continues, and writes to buffers that the caller uses next
            raise

    def _run(self, binding: Any, options: Any) -> None:
        with self._turn:
            self.session.run_with_iobinding(binding, options)

    def capture(self) -> None:
        """Capture every bucket, on the session's own thread and on this one, by steps whose logits are discarded.

        Raises:
            Exception: ONNX Runtime raises its own exception; the session cannot be used any more.
        """
        self._capture_buckets()
        self._here.captured = True  # from now on this thread runs its own steps
        self._capture_buckets()

    def _capture_buckets(self) -> None:
        for bucket in self.buckets:
            self._current = bucket
            self.step(0, 0, 1, 0)

    def step(self, token: int, position: int, length: int, shift: int, best: int = 0) -> Logits:
        """Run one more token of the sequence that owns the buffers, under the patch that `switch` selected.

        Args:
            token: the token's id.
            position: the token's position.
            length: the number of filled positions of full layers, this token included.
            shift: the number of positions by which windowed layers hold more; 0 in a graph with layers of one kind.
            best: how many of the largest logits are needed; 0 for all.

        Returns:
            The largest logits, or all [1, vocab]; see DeviceStep.logits.
        """
        self.io.write([token], [position], [length], self.capacity, [shift])
        self.run(self._current.binding, self._current.options)
        return self.io.logits([best])

    # -- the patch -------------------------------------------------------------------------------------------

    def switch(self, key: CacheKey, deltas: Mapping[SlotKey, Delta]) -> bool:
        """Select the patch that the next steps run under.

        The patch's tensors are written in place, unless its bucket still holds them.

        Args:
            key: the cache key of the patch.
            deltas: the patch's deltas, by (layer, site).

        Returns:
            Whether there is a bucket for the patch's rank.
        """
        if key == self._current.key:
            return True
        rank = max((delta.rank for delta in deltas.values()), default=0)
        bucket = next((bucket for bucket in self.buckets if bucket.rank >= rank), None)
        if bucket is None:
            return False
        if bucket.key != key:
            bucket.key = None
            self._write(bucket, deltas)
            bucket.key = key
        self._current = bucket
        return True

    # -- the sequence ----------------------------------------------------------------------------------------

    def holds(self, cache: KVCache) -> bool:
        """Whether `cache` owns the buffers."""
        return cache.buffers is self.buffers

    def pass_on(self, cache: KVCache) -> None:
        """Make `cache` the owner in place of the one that owns the buffers now, whose contents it adopts next."""
        self._owner = weakref.ref(cache)

    def take(self, cache: KVCache, length: int, patch: BoundPatch, decoding: bool) -> bool:
        """Make a sequence the owner of the buffers, if they have room for it.

        A fresh cache, or one with tokens to prefill, becomes the owner, and the previous owner gets its own copy of its
        keys and values. A decode step of a sequence that lost the buffers does not take them back, nor does a run that
        verifies a draft: if two sequences alternated, each step would copy both through the host.

        Args:
            cache: the sequence's cache.
            length: the number of filled positions of full layers after the run that follows. A sequence of which any
                layer holds more than `capacity` does not become the owner, nor does one of a batch, whose steps are
                not captured.
            patch: the patch, whose tensors ordinary runs bind.
            decoding: whether the run that follows is a decode step, or one that verifies a draft.

        Returns:
            Whether the sequence owns the buffers now.
        """
        if cache.batched or length + max(0, cache.shift) > self.capacity:
            return False
        if self.holds(cache) or (cache.buffers and decoding):
            return self.holds(cache)
        content = {past: self._kv.content(cache, past) for past in self.buffers}
        self._evict()
        for past, array in content.items():
            if array is not None and array.size:
                self._kv.refill(self.buffers[past], array)
        self._owner = weakref.ref(cache)  # this comes first, so that whoever holds the buffers is always known
        self._kv.hold(cache, self.buffers, patch)
        return True

    def _evict(self) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is None or not self.holds(owner):
            return
        from_numpy = self._ort.OrtValue.ortvalue_from_numpy
        kept = {past: from_numpy(np.array(self._kv.content(owner, past))) for past in self.buffers}
        owner.capacity = 0  # the owner's next run copies the buffers, the kept ones or, after an interrupt, these
        owner.buffers, owner.binding = kept, None
