"""The exported graph in one ONNX Runtime session: forward steps over a KV cache, with a patch bound or not.

Knows nothing of text or sampling. A patch is bound per run: its tensors are graph inputs that default to rank 0, so
switching rebinds pointers and copies nothing, and runs under different patches may go on at the same time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from numbers import Integral
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelFormatError, RequestError
from ..patch import FLOAT_PRECISIONS, KV_PARTS, Delta, Patch, SlotKey
from ..storage import REEXPORT
from .bound_patch import BoundPatch
from .cuda_graphs import CapturedDecode, check_capturable
from .device import Device, check_cuda_options, create_session, input_kinds, require_onnxruntime, select_device
from .huge_pages import Range, mapped, use_huge_pages_soon, without
from .kv_buffers import ConcatenatedBuffers, InPlaceBuffers
from .kv_cache import KVCache
from .model_folder import DEFAULT_FILE, ModelFolder
from .prepared import prepared_graph
from .settings import SessionOptions, SessionSettings
from .slots import check_base, fit_slots, slot_arrays
from .step_io import StepIO
from .threads import set_threads

log = logging.getLogger("tp_runtime")

FIRST_LOGIT = "tp.first_logit"
_DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}


class Graph:
    """A session over an exported folder.

    Args:
        folder: the opened folder.
        device: `auto`, `cuda` or `cpu`.
        defaults: a patch baked in as the session's defaults (SessionOptions.add_initializer): requests under it bind
            nothing. None leaves the folder's own defaults.
        options: how the session runs; see SessionSettings.

    Attributes:
        folder, device: the folder, and the device the session is really on.
        session, ort: ONNX Runtime's session and module.
        dtype: of slots, keys and values.
        kv: how the keys and values of one sequence are kept.
        lane: where captured steps run; None if nothing is captured.
        capture_failure: why nothing is captured, where that was asked for.
        base: the base model, bound.
        default: what the session computes with nothing bound: `defaults`, the folder's default patch, or the base.
        repair: of a quantised folder that has one: the patch that makes up for the quantisation, part of the base.

    Raises:
        DeviceUnavailableError: see device.py; or `cuda_graphs` on the CPU.
        ModelFormatError: ONNX Runtime cannot load the graph.
        PatchError: `defaults` does not fit.
        RequestError: `threads`, `spin` or `cuda_options` is none, or all sessions share a pool; or `cuda_graphs` for a
            graph of the `optimum` route.
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
        self._cuda_options = check_cuda_options(settings.cuda_options)
        if settings.cuda_graphs:
            check_capturable(folder, device)
        self.ort = require_onnxruntime()
        self.folder = folder
        self.dtype = _DTYPES[folder.kv.dtype]
        session_options = self.ort.SessionOptions()
        set_threads(session_options, settings.threads, settings.spin)
        self.repair = self._folder_default if folder.default_patch and folder.default_patch.repair else None
        terms = folder.default_patch.terms if folder.default_patch else ()
        deltas: Mapping[SlotKey, Delta] | None = None if terms else {}
        if defaults is not None:
            self._check(defaults)
            defaults = self._repaired(defaults)
            terms, deltas = defaults.terms, defaults.deltas
            # The session reads these where they are: they must outlive it.
            self._baked = self._slot_values(deltas, "cpu")
            for name, value in self._baked.items():
                session_options.add_initializer(name, value)
        self.captured: CapturedDecode | None = None
        self.capture_failure: str | None = None
        self._exclusive: Callable[[], AbstractContextManager[None]] = nullcontext  # with a lane: its `alone`
        chosen = select_device("cuda" if settings.cuda_graphs and device == "auto" else device)
        self._huge_pages = settings.huge_pages
        self._taken: list[Range] = []  # memory that is to be on huge pages after the first run
        if not settings.cuda_graphs or not self._capture(chosen, session_options):
            self._open(chosen, session_options)
        prefix = None if defaults is None else defaults.prefix
        self.default = BoundPatch({}, (folder.graph_digest, terms), prefix, deltas)
        self.base = self._bind_base()

    def _open(self, device: Device, options: Any, cuda_graphs: bool = False) -> None:
        """A session, over the graph prepared for this processor if there is one and it is to run there."""
        folder = self.folder
        prepared = prepared_graph(folder) if device.kind == "cpu" else None
        model = prepared or folder.path / "model.onnx"
        before = mapped()
        self.session, self.device = create_session(model, device, options, cuda_graphs, self._cuda_options)
        self._taken = without(mapped(), before) if self._huge_pages and self.device.kind == "cpu" else []
        kinds = {value.name: value.type for value in self.session.get_outputs()}
        self._logits_dtype = np.dtype(np.float16 if kinds["logits"] == "tensor(float16)" else np.float32)
        self._ones = np.ones((1, folder.context_window), np.int64)  # masks of one sequence are its first entries
        from_numpy = self.ort.OrtValue.ortvalue_from_numpy
        self._first_logit = {every: from_numpy(np.array([0 if every else -1], np.int64)) for every in (False, True)}
        buffers = InPlaceBuffers if folder.route == "fused" else ConcatenatedBuffers
        self._steps_in_place = folder.route == "fused" and self.device.kind == "cpu"
        place = input_kinds(self.session, self.device)[f"past_key_values.0.{KV_PARTS[0]}"]
        if place != self.device.kind:
            log.warning("attention runs on the CPU: the CUDA provider has none for %s; export with fp16", self.dtype)
        self.kv = buffers(folder, self.session, self.ort, place, self.dtype)

    def _capture(self, device: Device, options: Any) -> bool:
        """Open a session with captured steps; False, with the reason in `capture_failure`, if that fails."""
        try:
            self._open(device, options, cuda_graphs=True)
            self._start_captured()
        except Exception as error:  # ONNX Runtime's own have no class in common
            self.captured, self._exclusive = None, nullcontext
            self.capture_failure = " ".join(str(error.__cause__ or error).split())
            log.warning("decode steps are not captured: %s", self.capture_failure)
            return False
        return True

    def _start_captured(self) -> None:
        assert isinstance(self.kv, InPlaceBuffers)
        first = FIRST_LOGIT, self._first_logit[False]
        kind, dtypes = self.device.kind, (self.dtype, self._logits_dtype)
        self.captured = CapturedDecode(self.folder, self.session, self.ort, kind, dtypes, first, self.kv)
        self._exclusive = self.captured.exclusive
        self.captured.capture()

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
        return BoundPatch(values, (self.folder.graph_digest, patch.terms), patch.prefix, deltas)

    def _bind_base(self) -> BoundPatch:
        terms, deltas = (self.repair.terms, self.repair.deltas) if self.repair else ((), {})
        key = self.folder.graph_digest, terms
        if key == self.default.key:
            return self.default
        return BoundPatch(self._slot_values(deltas, self.device.kind), key, deltas=deltas)

    def _repaired(self, patch: Patch) -> Patch:
        """What is bound for `patch`, which has a term: see `bind`."""
        if self.repair is None or patch.config.precision not in FLOAT_PRECISIONS:
            return patch
        return self.repair + patch

    def _check(self, patch: Patch) -> None:
        check_base(patch, self.folder.base_model, self.folder.base_digest, self.folder.precision)
        if patch.prefix is not None:
            folder, kv = self.folder, self.folder.kv
            patch.prefix.check(folder.layers, kv.heads, kv.head_dim, folder.vocab_size, folder.context_window)
            patch.prefix.check_dtype(self.dtype)
        fit_slots(patch, self.folder.slots)

    def _slot_values(
        self, deltas: Mapping[SlotKey, Delta], kind: str, only: set[SlotKey] | None = None
    ) -> dict[str, Any]:
        values = {}
        for key, slot in self.folder.slots.items():
            if only is None or key in only:
                for name, array in slot_arrays(deltas.get(key), slot, self.dtype).items():
                    values[name] = self.ort.OrtValue.ortvalue_from_numpy(array, kind, 0)
        return values

    def deltas(self, bound: BoundPatch) -> Mapping[SlotKey, Delta]:
        """What the slots add under `bound`, by (layer, site); those of the folder's own default are read on first use.

        Raises:
            ModelFormatError, PatchError: they cannot be read.
        """
        return self._folder_default.deltas if bound.deltas is None else bound.deltas

    @cached_property
    def _folder_default(self) -> Patch:
        """The folder's default patch, from its own file: a session keeps its initializers to itself."""
        assert self.folder.default_patch is not None
        if DEFAULT_FILE not in self.folder.files:
            raise ModelFormatError("has a default patch and no file of it", field=DEFAULT_FILE, fix=REEXPORT)
        patch, wanted = Patch.load(self.folder.path / DEFAULT_FILE), self.folder.default_patch.identity
        if patch.identity != wanted:
            raise ModelFormatError(
                "is not the folder's default patch", field=DEFAULT_FILE, got=patch.identity, wanted=wanted, fix=REEXPORT
            )
        return patch

    def new_cache(self, bound: BoundPatch) -> KVCache:
        """An empty cache for runs under `bound`; it begins after the patch's prefix, if it has one."""
        return KVCache(bound.key, bound.prefix)

    def content(self, cache: KVCache) -> dict[str, NDArray[Any]]:
        """Keys and values that a cache holds, by graph input name: [heads, filled, head dim], valid until it is run."""
        with self._exclusive():
            found = {past: self.kv.content(cache, past) for past, _present in self.kv.names}
        return {past: array[0] for past, array in found.items() if array is not None}

    def run(self, tokens: Sequence[int], bound: BoundPatch) -> NDArray[np.float32]:
        """Logits [T, vocab] of T ids in a cache of their own; of those after the ids that the patch's prefix replaces.

        Raises:
            RequestError: as `forward`; or `tokens` cannot follow the prefix.
        """
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
    ) -> NDArray[np.float32]:
        """Run `tokens` after what is in `cache`, and append them to it.

        Args:
            tokens: ids, at least one.
            cache: made by `new_cache` under the same patch.
            bound: the patch.
            all_logits: logits of every token instead of the last one only.
            copy: whether the logits are the caller's own. If not, the cache's next run may overwrite them: it
                saves a copy, which takes longer than picking a token does.

        Returns:
            Logits [len(tokens) or 1, vocab], float32.

        Raises:
            StaleCacheError: the cache was made under another patch or graph.
            RequestError: an id outside the vocabulary, or more tokens than the context window holds.
        """
        cache.require_key(bound.key)
        position = len(cache) + cache.skipped
        self.check_ids(tokens)
        if position + len(tokens) > self.folder.context_window:
            raise RequestError(
                "more tokens than the context window holds",
                field="tokens",
                got=position + len(tokens),
                wanted=f"at most {self.folder.context_window}",
                fix="shorten the prompt or the conversation",
            )
        with self._exclusive():
            logits = self._run(tokens, position, cache, bound, all_logits, copy)
            cache.tokens.extend(tokens)
        return logits

    def _after_run(self) -> None:
        """After the first one, weights move to huge pages; not sooner, for somebody waits for the first token."""
        if self._taken:
            taken, self._taken = self._taken, []
            use_huge_pages_soon(taken)

    def _run(
        self, tokens: Sequence[int], position: int, cache: KVCache, bound: BoundPatch, all_logits: bool, copy: bool
    ) -> NDArray[np.float32]:
        steps, length = len(tokens), cache.filled + len(tokens)
        lane = self.captured
        if lane is not None:
            taken = lane.take(cache, length, bound.values)
            if taken and steps == 1 and lane.switch(bound.key, self.deltas(bound)):
                return lane.step(tokens[0], position, length)
        self.kv.prepare(cache, length, bound.values)
        mask = self._ones[:, :length]
        if steps == 1 and self._steps_in_place:
            logits = self._step_io(cache).run(self.session, tokens[0], position, mask)
            logits = logits.copy() if copy else logits
            self._after_run()
        else:
            cache.step = None  # what it has bound is bound to something else now
            ids, positions = np.array([tokens], np.int64), np.arange(position, position + steps)[None]
            logits = self.execute(cache.binding, ids, mask, positions, all_logits=all_logits)[0]
        self.kv.adopt(cache)
        return logits

    def _step_io(self, cache: KVCache) -> StepIO:
        if cache.step is None or cache.step.binding is not cache.binding:
            first = FIRST_LOGIT, self._first_logit[False]
            cache.step = StepIO(self.ort, cache.binding, self.folder.vocab_size, self._logits_dtype, first)
        return cache.step

    def execute(
        self,
        binding: Any,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        *,
        all_logits: bool = False,
    ) -> NDArray[np.float32]:
        """One run of the session over a binding that holds keys, values and patch.

        Args:
            binding: of this session.
            ids, positions: [B, T].
            mask: [B, longest past + T], 1 on each row's tokens and 0 on the padding at its right.
            all_logits: logits of every position instead of the last one only.

        Returns:
            Logits [B, T or 1, vocab], float32.
        """
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input("position_ids", positions)
        binding.bind_ortvalue_input(FIRST_LOGIT, self._first_logit[all_logits])
        # An array of one's own: asking the binding for its outputs takes as long as they are many, two for each layer.
        rows, steps = ids.shape
        logits = np.empty((rows, steps if all_logits else 1, self.folder.vocab_size), self._logits_dtype)
        binding.bind_ortvalue_output("logits", self.ort.OrtValue.ortvalue_from_numpy(logits))
        run = self.session.run_with_iobinding if self.captured is None else self.captured.run
        run(binding)  # one that fails leaves the caches' tokens as they were
        self._after_run()
        return logits if logits.dtype == np.float32 else logits.astype(np.float32)

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Check that there are tokens, and that all are ids of the vocabulary.

        Raises:
            RequestError: they are not.
        """
        if not tokens:
            raise RequestError("no tokens", field="tokens", got=0, wanted="at least one id")
        for token in tokens:
            if type(token) is not int and (isinstance(token, bool) or not isinstance(token, Integral)):
                raise RequestError("not a token id", field="tokens", got=repr(token), wanted="a whole number")
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or highest >= self.folder.vocab_size:
            raise RequestError(
                "a token id is outside the vocabulary",
                field="tokens",
                got=lowest if lowest < 0 else highest,
                wanted=f"0..{self.folder.vocab_size - 1}",
            )
