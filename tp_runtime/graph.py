"""The exported graph in one ONNX Runtime session: forward steps over a KV cache, with a patch bound or not.

Knows nothing of text or sampling. A patch is bound per run: its tensors are graph inputs that default to rank 0, so
switching rebinds pointers and copies nothing, and runs under different patches may go on at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import CacheKey, KVCache
from .delta import Delta
from .device import create_session, require_onnxruntime, select_device
from .errors import ModelFormatError, RequestError
from .folder import REPAIR_FILE, ModelFolder
from .kv_buffers import Fresh, InPlace
from .patch import FLOAT_PRECISIONS, Patch
from .prefix import KVPrefix
from .safe_path import REEXPORT
from .slots import check_base, fit_slots, slot_arrays

FIRST_LOGIT = "tp.first_logit"
_DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}


@dataclass(frozen=True)
class BoundPatch:
    """A patch on the device: what to bind, and the cache key it runs under.

    Attributes:
        values: graph input name -> OrtValue; what is not in it keeps the session's default.
        key: of every cache made under it.
        prefix: entries put at the front of every cache made under it.
    """

    values: dict[str, Any]
    key: CacheKey
    prefix: KVPrefix | None = None


class Graph:
    """A session over an exported folder.

    Args:
        folder: the opened folder.
        device: `auto`, `cuda` or `cpu`.
        threads: threads of one operator; None lets ONNX Runtime take the cores there are.
        defaults: a patch baked in as the session's defaults (SessionOptions.add_initializer): requests under it bind
            nothing. None leaves the folder's own defaults.

    Attributes:
        folder, device: the folder, and the device the session is really on.
        base: the base model, bound.
        default: what the session computes with nothing bound: `defaults`, the folder's default patch, or the base.
        repair: of a quantised folder that has one: the patch that makes up for the quantisation, part of the base.

    Raises:
        DeviceUnavailableError: see device.py.
        ModelFormatError: ONNX Runtime cannot load the graph.
        PatchError: `defaults` does not fit.
        RequestError: `threads` is no number of threads.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: str = "auto",
        threads: int | None = None,
        defaults: Patch | None = None,
    ) -> None:
        self._ort = require_onnxruntime()
        self.folder = folder
        self._dtype = _DTYPES[folder.kv.dtype]
        options = self._ort.SessionOptions()
        if threads is not None:
            if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
                raise RequestError(
                    "not a number of threads", field="threads", got=repr(threads), wanted="a whole number >= 1, or None"
                )
            options.intra_op_num_threads = threads
        self.repair = self._read_repair(folder)
        terms = folder.default_patch.terms if folder.default_patch else ()
        if defaults is not None:
            self._check(defaults)
            defaults = self._repaired(defaults)
            terms = defaults.terms
            # The session reads these where they are: they must outlive it.
            self._baked = self._slot_values(dict(defaults.deltas), "cpu")
            for name, value in self._baked.items():
                options.add_initializer(name, value)
        self.session, self.device = create_session(folder.path / "model.onnx", select_device(device), options)
        from_numpy = self._ort.OrtValue.ortvalue_from_numpy
        self._first_logit = {every: from_numpy(np.array([0 if every else -1], np.int64)) for every in (False, True)}
        buffers = InPlace if folder.route == "fused" else Fresh
        self._kv = buffers(folder, self.session, self._ort, self.device.kind, self._dtype)
        self.default = BoundPatch({}, (folder.graph_digest, terms), None if defaults is None else defaults.prefix)
        base = self.repair.terms if self.repair else ()
        self.base = (
            self.default
            if terms == base
            else BoundPatch(
                self._slot_values(dict(self.repair.deltas) if self.repair else {}, self.device.kind),
                (folder.graph_digest, base),
            )
        )

    def bind(self, patch: Patch | None) -> BoundPatch:
        """Put a patch on the device, ready to run; None is the base.

        On a repaired folder the base is the repaired one, and a patch that was not fitted for this precision acts
        beside the repair; one that was takes its place, for it makes up for the same loss.

        Raises:
            BaseMismatchError: the patch was fitted on another base, or on a quantised one of another precision.
            PatchTargetError, PatchShapeError, PatchValueError: it does not fit the slots.
        """
        if patch is None:
            return self.base
        self._check(patch)  # first: whether it fits does not depend on its strength or on the defaults
        if not patch.terms:
            return self.base
        patch = self._repaired(patch)
        deltas = dict(patch.deltas)
        if patch.terms == self.default.key[1]:
            return self.default
        # With rank-0 defaults, slots the patch leaves alone need no binding.
        only = None if self.default.key[1] else set(deltas)
        values = self._slot_values(deltas, self.device.kind, only)
        return BoundPatch(values, (self.folder.graph_digest, patch.terms), patch.prefix)

    def _read_repair(self, folder: ModelFolder) -> Patch | None:
        """The default patch, where it repairs what the folder's precision costs."""
        if REPAIR_FILE not in folder.files:
            return None
        repair = Patch.load(folder.path / REPAIR_FILE)
        default = folder.default_patch
        if default is None or default.identity != repair.identity:
            raise ModelFormatError(
                "the repair is not the folder's default patch",
                field=REPAIR_FILE,
                got=repair.identity,
                wanted="none" if default is None else default.identity,
                fix=REEXPORT,
            )
        return repair

    def _repaired(self, patch: Patch) -> Patch:
        """What is bound for `patch`, which has a term: see `bind`."""
        alone = self.repair is None or patch.config.precision not in FLOAT_PRECISIONS
        return patch if alone or self.repair is None else self.repair + patch

    def _check(self, patch: Patch) -> None:
        check_base(patch, self.folder.base_model, self.folder.base_digest, self.folder.precision)
        if patch.prefix is not None:
            folder, kv = self.folder, self.folder.kv
            patch.prefix.check(folder.layers, kv.heads, kv.head_dim, folder.vocab_size, folder.context_window)
            patch.prefix.check_dtype(self._dtype)
        fit_slots(patch, self.folder.slots)

    def _slot_values(
        self, deltas: dict[tuple[int, str], Delta], kind: str, only: set[tuple[int, str]] | None = None
    ) -> dict[str, Any]:
        values = {}
        for key, slot in self.folder.slots.items():
            if only is None or key in only:
                for name, array in slot_arrays(deltas.get(key), slot, self._dtype).items():
                    values[name] = self._ort.OrtValue.ortvalue_from_numpy(array, kind, 0)
        return values

    def new_cache(self, bound: BoundPatch) -> KVCache:
        """An empty cache for runs under `bound`; it begins after the patch's prefix, if it has one."""
        return KVCache(bound.key, bound.prefix)

    def run(self, tokens: Sequence[int], bound: BoundPatch) -> NDArray[np.float32]:
        """Logits [T, vocab] of T ids in a cache of their own; of those after the ids that the patch's prefix replaces.

        Raises:
            RequestError: as `forward`; or `tokens` cannot follow the prefix.
        """
        cache = self.new_cache(bound)
        cache.require_start(tokens)
        return self.forward(tokens[len(cache) :], cache, bound, all_logits=True)

    def forward(
        self, tokens: Sequence[int], cache: KVCache, bound: BoundPatch, *, all_logits: bool = False
    ) -> NDArray[np.float32]:
        """Run `tokens` after what is in `cache`, and append them to it.

        Args:
            tokens: ids, at least one.
            cache: made by `new_cache` under the same patch.
            bound: the patch.
            all_logits: logits of every token instead of the last one only.

        Returns:
            Logits [len(tokens) or 1, vocab], float32.

        Raises:
            StaleCacheError: the cache was made under another patch or graph.
            RequestError: an id outside the vocabulary, or more tokens than the context window holds.
        """
        cache.require_key(bound.key)
        position = len(cache) + cache.skipped
        self._check_tokens(tokens, position)
        steps, past = len(tokens), cache.filled
        self._kv.prepare(cache, past + steps, bound.values)
        io = cache.binding
        ids = np.array([tokens], np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, past + steps), np.int64),
            "position_ids": np.arange(position, position + steps)[None],
        }
        for name, array in feeds.items():
            io.bind_cpu_input(name, array)
        io.bind_ortvalue_input(FIRST_LOGIT, self._first_logit[all_logits])
        io.bind_output("logits", "cpu")  # anew each time: the last run's buffer has the last run's shape
        self.session.run_with_iobinding(io)  # one that fails leaves the cache's own tokens as they were
        *presents, last = io.get_outputs()
        self._kv.adopt(cache, presents)
        cache.tokens.extend(tokens)
        logits = last.numpy()[0]
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def _check_tokens(self, tokens: Sequence[int], position: int) -> None:
        if not tokens:
            raise RequestError("no tokens", field="tokens", got=0, wanted="at least one id")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, Integral):
                raise RequestError("not a token id", field="tokens", got=repr(token), wanted="a whole number")
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or highest >= self.folder.vocab_size:
            raise RequestError(
                "a token id is outside the vocabulary",
                field="tokens",
                got=lowest if lowest < 0 else highest,
                wanted=f"0..{self.folder.vocab_size - 1}",
            )
        if position + len(tokens) > self.folder.context_window:
            raise RequestError(
                "more tokens than the context window holds",
                field="tokens",
                got=position + len(tokens),
                wanted=f"at most {self.folder.context_window}",
                fix="shorten the prompt or the conversation",
            )
