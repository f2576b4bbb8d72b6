"""The exported graph in one ONNX Runtime session: forward steps over a KV cache, with or without a patch.

This module does not handle text or sampling. A patch is bound for each run. Its tensors are graph inputs that default
to rank 0, so switching to a converted patch rebinds pointers and copies nothing, and runs under different patches may
take place at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ..errors import require_positive
from ..patch import Patch
from .bound_patch import BoundPatch, require_bound
from .device_step import DeviceStep, DeviceSteps, Logits
from .huge_pages import empty_on_huge_pages, use_huge_pages_soon
from .kv_buffers import InPlaceBuffers
from .kv_cache import KVCache, new_mark, require_cache, token_list
from .model_folder import ModelFolder
from .open_session import open_session
from .settings import SessionOptions, SessionSettings
from .step_io import StepIO
from .uses import Use


class Graph:
    """A session over an exported folder.

    Args:
        folder: the opened model folder.
        device: `auto`, `cuda` or `cpu`.
        defaults: a patch whose tensors become the session's defaults (SessionOptions.add_initializer), so that requests
            under it bind nothing. None takes the folder's default patch, if it has one.
        options: the settings of the session; see SessionSettings.

    Attributes:
        folder: the model folder.
        device: the device that the session really runs on.
        session: ONNX Runtime's session.
        ort: the onnxruntime module.
        dtype: the dtype of slots, keys and values.
        mark: the mark on the caches that this session makes; it runs no others.
        kv: the object that manages the key/value buffers of single sequences.
        device_steps: runs decode steps whose inputs and outputs stay on the device; None if they are on the host.
        captured: the captured decode buffers; None if nothing is captured.
        capture_failure: why nothing is captured although `cuda_graphs` asked for it; None otherwise.
        base: the base model as a bound patch.
        default: the patch that the session runs under if nothing is bound: `defaults`, the folder's default patch, or
            the base.
        default_patch: the patch of `default`, without the repair; None if `default` is the base.
        repair: the patch that compensates what quantisation costs, which is part of the base; None if the folder has
            none.
        bound_values: the converted tensors of the patches that ran last.

    Raises:
        DeviceUnavailableError, ModelFormatError, UnsafePathError, PatchError, RequestError: see open_session
            and SessionSettings.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: str = "auto",
        *,
        defaults: Patch | None = None,
        **options: Unpack[SessionOptions],
    ) -> None:
        settings = SessionSettings(**options)
        opened = open_session(folder, device, defaults, settings)
        self.folder, self.ort, self.dtype = folder, opened.ort, folder.kv.numpy_dtype
        self.mark = new_mark(folder.path.name)
        self.session, self.device, self.kv = opened.session, opened.device, opened.kv
        self.captured, self.capture_failure = opened.captured, opened.capture_failure
        self._binder = opened.binder
        self.repair, self.default_patch = self._binder.repair, self._binder.default_patch
        self.default, self.base = self._binder.default, self._binder.base
        self.bound_values = self._binder.values
        self._run_io = opened.run_io
        self._for_huge_pages, self._huge_pages = opened.for_huge_pages, settings.huge_pages
        self._ones = np.ones((1, folder.context_window), np.int64)  # a mask of one sequence is a view of its front
        self._steps_in_place = folder.route == "fused" and self.device.kind == "cpu"
        self.device_steps = self._new_device_steps() if folder.best is not None and self.device.kind != "cpu" else None

    def _new_device_steps(self) -> DeviceSteps:
        first, kind = self._run_io.first_logit(-1), self.device.kind
        return DeviceSteps(self.ort, self.folder, kind, self._run_io.dtype, first, self._run_binding)

    def bind(self, patch: Patch | None) -> BoundPatch:
        """Check a patch and put it on the device, ready to run; None means the base.

        Its tensors may leave the device again until it runs (bound_values.py).

        If the folder has a repair, the base includes it. A patch that was not fitted for the folder's precision is
        added to the repair. A patch that was fitted for this precision replaces the repair, because it compensates the
        same loss.

        Raises:
            BaseMismatchError: the patch was fitted on another base, or on a quantised base of another precision.
            PatchTargetError, PatchShapeError, PatchValueError: the patch does not fit the slots, or is not a patch.
        """
        return self._binder.bind(patch)

    def release(self, bound: BoundPatch) -> None:
        """Give up the converted tensors of a patch that will not run soon; it can run all the same."""
        self.bound_values.drop(bound.key)

    def new_cache(self, bound: BoundPatch) -> KVCache:
        """Return an empty cache for runs under `bound`; it begins with the patch's KV prefix, if there is one.

        Raises:
            PatchTargetError: `bound` is not a bound patch.
        """
        require_bound(bound)
        window = 0 if self.kv.plan is None else self.kv.plan.window
        cache = KVCache(bound.key, bound.prefix, bound.entries, self.kv.windowed, window)
        cache.session = self.mark
        return cache

    def require_cache(self, cache: KVCache, bound: BoundPatch) -> None:
        """Check that this session made `cache`, for runs under `bound`.

        Raises:
            RequestError: the value is not a cache.
            PatchTargetError: `bound` is not a bound patch.
            StaleCacheError: the cache was made under another patch or by another session, or is part of a batch now.
        """
        require_cache(cache)
        require_bound(bound)
        cache.require_key(bound.key)
        cache.require_session(self.mark)

    def content(self, cache: KVCache) -> dict[str, NDArray[Any]]:
        """Return a cache's keys and values [heads, filled, head dim] by graph input name, valid until its next run.

        Raises:
            RequestError: the value is not a cache.
            StaleCacheError: another session made the cache, or it is part of a batch now.
        """
        require_cache(cache)
        cache.require_session(self.mark)
        with self._exclusive():
            found = {past: self.kv.content(cache, past) for past, _present in self.kv.names}
        return {past: array[0] for past, array in found.items() if array is not None}

    def device_content(self, cache: KVCache) -> dict[str, Any]:
        """Return a cache's keys and values as OrtValues [1, heads, at least filled, head dim] by graph input name.

        They are on the device of the graph's buffers, which is not the host.
        """
        assert isinstance(self.kv, InPlaceBuffers)
        with self._exclusive():
            found = {past: self.kv.device_content(cache, past) for past, _present in self.kv.names}
        return {past: value for past, value in found.items() if value is not None}

    def new_binding(self) -> Any:
        """Return an empty ONNX Runtime binding of the session."""
        return self.session.io_binding()

    def to_device(self, array: NDArray[Any], device: str) -> Any:
        """Return an array as an OrtValue on `device` (`cpu` or `cuda`); on the CPU it shares the array's memory."""
        return self.ort.OrtValue.ortvalue_from_numpy(array, device, 0)

    def run(self, tokens: Sequence[int], bound: BoundPatch) -> NDArray[np.float32]:
        """Run ids in a fresh cache.

        Args:
            tokens: T ids; under a patch with a KV prefix they start with the ids that the prefix replaces.
            bound: the patch.

        Returns:
            Logits [T, vocab], float32, without the positions of the ids that the prefix replaces.

        Raises:
            RequestError: `forward` raises it, or `tokens` cannot follow the prefix.
        """
        tokens = token_list(tokens)
        cache = self.new_cache(bound)
        cache.require_start(tokens)
        return self.forward(tokens[len(cache) :], cache, bound, all_logits=True)

    def forward(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        bound: BoundPatch,
        *,
        all_logits: bool = False,
        copy: bool = True,
        last: int = 1,
        held: Use | None = None,
    ) -> NDArray[np.float32]:
        """Run `tokens` after the tokens that `cache` holds, and append them to it.

        Args:
            tokens: at least one id.
            cache: a cache that `new_cache` made under the same patch.
            bound: the patch.
            all_logits: whether to return the logits of every token, whatever `last` says.
            copy: whether the returned logits are the caller's own array. If not, the cache's next run may overwrite
                them. This saves a copy, which takes longer than picking a token.
            last: the number of tokens at the end whose logits are returned, at least 1.
            held: the caller's use of the cache (KVCache.take). None takes the cache for this run only.

        Returns:
            Logits [len(tokens) or at most `last`, vocab], float32.

        Raises:
            StaleCacheError: the cache was made under another patch or by another session.
            BusyError: another request or thread is using the cache.
            RequestError: `tokens` is empty or has an id outside the vocabulary, the context window cannot hold that
                many tokens, or `last` is not a positive integer.
        """
        # A decode step takes well under a millisecond, so these checks call a function only where they must.
        if type(cache) is not KVCache or cache.session is not self.mark or cache.key is not getattr(bound, "key", None):
            self.require_cache(cache, bound)
        if type(tokens) is not list:
            tokens = token_list(tokens)
        if all_logits:
            last = len(tokens)
        elif last != 1:
            require_positive("last", last)
            last = min(last, len(tokens))
        if held is not None:
            if held not in cache.uses:
                cache.require_free(held)
            return self._append(tokens, cache, bound, last, copy)
        use = Use(cache.uses)
        try:
            try:
                cache.take(use)
                return self._append(tokens, cache, bound, last, copy)
            finally:
                use.end()
        finally:
            use.end()  # an interrupt may arrive at the first one

    def forward_best(
        self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, *, best: int, last: int, held: Use
    ) -> Logits:
        """Run `tokens` like `forward` for a caller that may need no more than the `best` largest logits; 0 means all.

        A decode step on a device then leaves the other logits there, if that is certain to be enough. The caller's own
        logits are not copied.

        Returns:
            For each position all logits that are at least as large as the `best`-th largest one, or an array of all
            logits [at most `last`, vocab].

        Raises:
            What `forward` raises.
        """
        if not best or len(tokens) != 1 or (self.device_steps is None and self.captured is None):
            return self.forward(tokens, cache, bound, copy=False, last=last, held=held)
        self.require_cache(cache, bound)
        if held not in cache.uses:
            cache.require_free(held)
        return self._append(token_list(tokens), cache, bound, 1, False, best)

    def _append(
        self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, last: int, copy: bool, best: int = 0
    ) -> Any:
        step = cache.step
        if type(step) is StepIO and step.serves(cache.binding, tokens, len(cache.tokens)):  # a step after another one
            logits = step.run(self.session, tokens[0], len(cache.tokens))
            cache.tokens.append(tokens[0])
            return logits.copy() if copy else logits
        position = len(cache) + cache.skipped
        self.folder.check_ids(tokens)
        self.folder.check_length(position + len(tokens))
        with self._exclusive():
            if not cache.reaches:
                self._run_again(cache, bound)
            longest = len(tokens) if self.kv.plan is None else self.kv.plan.longest_run
            if len(tokens) > longest:
                return self._run_parts(tokens, longest, cache, bound, last)
            logits = self._run(tokens, position, cache, bound, last, copy, best)
            cache.tokens.extend(tokens)
        return logits

    def _run_parts(
        self, tokens: Sequence[int], longest: int, cache: KVCache, bound: BoundPatch, last: int
    ) -> NDArray[np.float32]:
        """Append ids in several runs of at most `longest` ids; windows.py says why."""
        before, found = len(cache), []
        try:
            for end in range(longest, len(tokens) + longest, longest):
                part = tokens[end - longest : end]
                wanted = last - max(0, len(tokens) - end)  # of the logits, those that are of this part
                logits = self._run(part, len(cache) + cache.skipped, cache, bound, min(max(wanted, 1), len(part)), True)
                cache.tokens.extend(part)
                if wanted > 0:
                    found.append(logits)
        except BaseException:
            del cache.tokens[before:]
            raise
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _run_again(self, cache: KVCache, bound: BoundPatch) -> None:
        """Compute a cache again from its ids, because its windowed layers dropped what the next id attends to."""
        again = self.new_cache(bound)
        if tokens := cache.tokens[len(again) :]:
            self._append(tokens, again, bound, 1, False)
            if self.captured is not None and self.captured.holds(again):
                self.captured.pass_on(cache)
        cache.adopt(again)

    def _after_run(self) -> None:
        """After the first run, move the weights to huge pages; doing it earlier would delay the first token."""
        if self._for_huge_pages:
            ranges, self._for_huge_pages = self._for_huge_pages, []
            use_huge_pages_soon(ranges)

    def _run(
        self,
        tokens: Sequence[int],
        position: int,
        cache: KVCache,
        bound: BoundPatch,
        last: int,
        copy: bool,
        best: int = 0,
    ) -> Any:
        steps, length = len(tokens), cache.filled + len(tokens)
        captured = self.captured
        if captured is not None:
            # A run that returns the logits of every id has one id that the cache lacks, and verifies the others.
            owned = captured.take(cache, length, bound, steps == last)
            if owned and steps == 1 and captured.switch(bound.key, bound.deltas):
                return captured.step(tokens[0], position, length, cache.shift, best)
        self.kv.prepare(cache, length, bound)
        if steps == 1 and self._steps_in_place:
            logits = self._step_io(cache).run(self.session, tokens[0], len(cache))
            logits = logits.copy() if copy else logits
            self._after_run()
        elif steps == 1 and self.device_steps is not None:
            on_device = self.device_steps
            if not isinstance(cache.step, DeviceStep):
                cache.step = on_device.new(1)
            return on_device.run(cache.step, cache.binding, [tokens[0]], [position], [length], [cache.shift], [best])
        else:
            if isinstance(cache.step, DeviceStep):
                cache.step.unbind(cache.binding)
            else:
                cache.step = None  # the run below binds other values to the inputs that it had bound
            mask = self._ones[:, :length]
            ids, positions = np.array([tokens], np.int64), np.arange(position, position + steps)[None]
            logits = self.execute(cache.binding, ids, mask, positions, last=last)[0]
        self.kv.adopt(cache)
        return logits

    def _step_io(self, cache: KVCache) -> StepIO:
        if not isinstance(cache.step, StepIO) or cache.step.binding is not cache.binding:
            lead = cache.filled - len(cache), cache.skipped
            sizes = cache.capacity, cache.shown, self.folder.context_window
            like = (1, 1, self.folder.vocab_size), self._run_io.dtype
            logits = empty_on_huge_pages(*like) if self._huge_pages else np.empty(*like)
            cache.step = StepIO(self.ort, cache.binding, lead, *sizes, logits, self._run_io.first_logit(-1))
        return cache.step

    def _run_binding(self, binding: Any) -> None:
        run = self.session.run_with_iobinding if self.captured is None else self.captured.run
        run(binding)  # a run that fails leaves the caches' tokens as they were

    def _exclusive(self) -> AbstractContextManager[None]:
        """Return a context inside of which no other thread uses the captured buffers."""
        return nullcontext() if self.captured is None else self.captured.exclusive()

    def execute(
        self,
        binding: Any,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        *,
        last: int = 1,
    ) -> NDArray[np.float32]:
        """Run the session once over a binding that already holds keys, values and patch.

        Args:
            binding: a binding of this session.
            ids: token ids [B, T].
            mask: the attention mask [B, longest past + T]; see RunIO.bind.
            positions: the ids' positions [B, T].
            last: the number of positions at the end whose logits are computed, from 1 to T.

        Returns:
            Logits [B, last, vocab], float32.
        """
        logits = self._run_io.bind(binding, ids, mask, positions, last)
        self._run_binding(binding)
        self._after_run()
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)
