"""The face of the runtime: a model folder, its loaded patches, text in and text out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from .errors import PatchFormatError, RequestError
from .generation import PREFILL_TOKENS, PrefixCache, generate, prefill
from .loaded_patches import ACTIVE, Active, LoadedPatches, PatchChoice, not_a_patch
from .patch import Patch
from .session import BoundPatch, Graph, KVCache, ModelFolder, ProbeCheck, SessionOptions, check_probe
from .text import EncodedRequest, Message, Request, RequestOptions, TextBatch, TextCodec, TextStream, encode_request

log = logging.getLogger("tp_runtime")


class PatchedModel:
    """A base model in a live session, and the patches loaded beside it.

    Requests may run in several threads at once, each under its own patch. `with model.patched(p):` holds for the
    thread or task that enters it.

    Args:
        graph: the session.
        codec: the tokenizer and chat template.
        default: what requests run under that name no patch; by default what the graph computes with nothing bound.
        prefix_cache: where prompts find what was run before; None runs each from its start.
    """

    def __init__(
        self,
        graph: Graph,
        codec: TextCodec,
        default: BoundPatch | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.graph, self.codec, self.prefix_cache = graph, codec, prefix_cache
        self._patches = LoadedPatches(graph, default or graph.default)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str = "auto",
        *,
        patch: Patch | str | Path | Active | None = ACTIVE,
        prefix_cache_bytes: int = 0,
        verify: bool = False,
        **options: Unpack[SessionOptions],
    ) -> PatchedModel:
        """Open an exported folder.

        Args:
            path: the folder.
            device: `cuda`, `cpu`, or `auto`: CUDA if it is there, else the CPU with the reason logged.
            patch: baked in at load time as what requests without a patch of their own get: a patch or its file; None
                for the base model. By default what the folder was exported with.
            prefix_cache_bytes: keep keys and values of prompts up to so many bytes, so that what later prompts under
                the same patch share with them is not run again; 0 keeps none.
            verify: check the digest of every file, the weights too.
            options: how the session runs; see SessionSettings.

        Raises:
            ModelFormatError, UnsafePathError: the folder is not what was exported.
            DeviceUnavailableError: `cuda` was asked for and not given, or `cuda_graphs` on the CPU, or there is no ONNX
                Runtime.
            PatchError: the patch is damaged or does not fit.
            RequestError: a number of threads or bytes, or an option, that is none; `cuda_graphs` for a graph of the
                `optimum` route.
        """
        store = None if type(prefix_cache_bytes) is int and not prefix_cache_bytes else PrefixCache(prefix_cache_bytes)
        folder = ModelFolder.open(path, verify)
        codec = TextCodec.from_folder(folder.path, "chat" if folder.style == "chat" else "completion")
        if isinstance(patch, str | Path):
            patch = Patch.load(patch)
        if not isinstance(patch, Patch | Active | None):
            raise not_a_patch(patch, "a Patch, its file, or None")
        graph = Graph(folder, device, defaults=patch if isinstance(patch, Patch) else None, **options)
        if graph.device.requested == "auto" and graph.device.reason:
            log.warning("running on the CPU: %s", graph.device.reason)
        return cls(graph, codec, graph.base if patch is None else graph.default, store)

    # -- patches ---------------------------------------------------------------------------------------------

    @property
    def patches(self) -> Mapping[str, Patch]:
        """The loaded patches by name."""
        return self._patches.view()

    def load_patch(self, patch: str | Path | Patch, name: str | None = None, *, check: bool = False) -> str:
        """Load a patch beside the model, ready to be switched on by name.

        Args:
            patch: a patch file, or a patch.
            name: what to call it; by default the name it carries.
            check: also run its probe, so that it is known to do here what it did on the host.

        Returns:
            The name.

        Raises:
            PatchInUseError: the name is taken.
            PatchError: the file is damaged, or the patch does not fit this model; or, with `check`, it has no probe or
                does not reproduce it. The loaded patches are as before.
        """
        if not isinstance(patch, Patch):
            patch = Patch.load(patch)
        name = patch.name if name is None else name
        bound = self.graph.bind(patch)
        if check:
            self._require_live(patch)
        self._patches.add(name, patch, bound)
        return name

    def unload_patch(self, name: str) -> None:
        """Forget a loaded patch; requests without one give the base model's output, bit for bit.

        Raises:
            PatchTargetError: no patch of that name is loaded.
            PatchInUseError: a request or a `patched` block is using it.
        """
        self._patches.remove(name)

    @contextmanager
    def patched(self, patch: Patch | str | None, strength: float = 1.0) -> Iterator[PatchedModel]:
        """Within the context, requests of this thread or task run under `patch` unless they name another.

        Raises:
            PatchError: the patch is not loaded or does not fit; nothing is changed then.
        """
        with self._patches.activate(self._patches.resolve(patch, strength)):
            yield self

    def check(self, patch: Patch | str) -> ProbeCheck:
        """Run a patch's probe: is it live on this device, and does it do what it did on the host?

        Raises:
            PatchFormatError: it carries no probe.
            PatchError: it is not loaded or does not fit.
        """
        return check_probe(self.graph, self._patches.by_name(patch).patch if isinstance(patch, str) else patch)

    def _require_live(self, patch: Patch) -> None:
        result = check_probe(self.graph, patch)
        if not result.ok:
            raise PatchFormatError(
                f"the patch {patch.name!r} does not do here what it did on the host",
                field="config.probe",
                got=f"max logit error {result.max_logit_error:.3g}, {'live' if result.live else 'not live'}",
                wanted="the host's logits",
                fix="export the patch again with this version, or check the device",
            )

    # -- requests --------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        cache: KVCache | None = None,
        **options: Unpack[RequestOptions],
    ) -> TextStream:
        """Start a completion; iterate over the result for its text.

        Args:
            prompt: one user message, or a list of messages; see Request.
            cache: from `new_cache`, to go on from earlier text of the same conversation.
            options: see Request, and Sampling for `temperature` and the like.

        Raises:
            RequestError: a prompt or a value that cannot be served.
            PatchError: the patch is not loaded or does not fit.
            StaleCacheError: `cache` was made under another patch.
        """
        request = self._encode(Request.of(prompt, **options))
        ids = generate(
            self.graph,
            request.tokens,
            request.patch.bound,
            sampling=request.sampling,
            max_new_tokens=request.max_new_tokens,
            eos_ids=self.codec.eos_ids,
            cache=cache,
            prefix_cache=self.prefix_cache,
        )
        using = self._patches.using(request.patch.loaded)
        return TextStream(ids, self.codec, request.scanner, len(request.tokens), using)

    def _encode(self, request: Request) -> EncodedRequest:
        return encode_request(request, self.codec, self._patches)

    @overload
    def generate(self, prompt: str | Sequence[Message], **options: Any) -> str: ...

    @overload
    def generate(self, prompt: list[str] | list[list[Message]], *, rows: int = 8, **options: Any) -> list[str]: ...

    def generate(self, prompt: Any, *, rows: int = 8, **options: Any) -> str | list[str]:
        """The whole text of a completion, or of several that run together.

        Args:
            prompt: one prompt, as for `stream`: a string, or a list of messages, which is one conversation. Or several:
                a list of strings, or of lists of messages.
            rows: of several prompts, at most this many run at once.
            options: see Request. Of several prompts each option but `stop` may be a list with a value for each
                (`patch=["pirate", None]`); a single value holds for all.

        Returns:
            The text; of several prompts a list, in their order. Each is what it would be alone.

        Raises:
            RequestError, PatchError, StaleCacheError: as `stream`; of several prompts, before any of them is run.
        """
        if not _is_several(prompt):
            return "".join(self.stream(prompt, **options))
        each = _spread(options, len(prompt))
        with self.batch(rows) as batch:
            completions = [batch.add(one, **own) for one, own in zip(prompt, each, strict=True)]
            while batch.step():
                pass
        for completion in completions:
            if completion.error is not None:
                raise completion.error
        return [completion.text for completion in completions]

    def batch(self, rows: int = 8, prefill_tokens: int = PREFILL_TOKENS) -> TextBatch:
        """Completions that run together and may come and go while others run: `with model.batch() as batch:`.

        Args:
            rows: most of them at once; what is added beyond that waits.
            prefill_tokens: while some wait for their next token, at most so many tokens of others' prompts are run
                before it. More of them let a prompt begin to answer sooner, and the others wait longer for a token.
        """
        return TextBatch(self.graph, self.codec, self._patches, rows, self.prefix_cache, prefill_tokens)

    def prefill(
        self,
        prompt: str | Sequence[Message],
        *,
        system: str | None = None,
        raw: bool = False,
        patch: PatchChoice = ACTIVE,
        strength: float = 1.0,
    ) -> None:
        """Run a prompt ahead of time, such as a system prompt that many requests share.

        Requests under the same patch that start like it find that part in the prefix cache.

        Raises:
            RequestError: the model was opened without a prefix cache, or it cannot hold the prompt; or as `stream`.
            PatchError: the patch is not loaded or does not fit.
        """
        if self.prefix_cache is None:
            raise RequestError(
                "the model keeps no prefixes",
                field="prefix_cache_bytes",
                got=0,
                wanted="a number of bytes",
                fix="from_pretrained(..., prefix_cache_bytes=...)",
            )
        request = self._encode(Request(prompt, system, raw, patch, strength))
        with self._patches.using(request.patch.loaded):
            prefill(self.graph, request.tokens, request.patch.bound, self.prefix_cache)

    def new_cache(self, patch: PatchChoice = ACTIVE, strength: float = 1.0) -> KVCache:
        """An empty KV cache for a conversation under a patch; it serves no other (contract: StaleCacheError)."""
        return self.graph.new_cache(self._patches.resolve(patch, strength).bound)

    def logits(
        self, token_ids: Sequence[int], patch: PatchChoice = ACTIVE, strength: float = 1.0
    ) -> NDArray[np.float32]:
        """Logits [T, vocab] of T token ids, float32; under a patch with a KV prefix, of those it does not replace.

        Raises:
            RequestError: no ids, ids outside the vocabulary, more than the context window, or a start that the
                patch's KV prefix cannot stand in for.
            PatchError: the patch is not loaded or does not fit.
        """
        resolved = self._patches.resolve(patch, strength)
        with self._patches.using(resolved.loaded):
            return self.graph.run(list(token_ids), resolved.bound)


def _is_several(prompt: Any) -> bool:
    """Whether these are several prompts: a list of messages is one conversation."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)


def _spread(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of several prompts: an item of each list, and what is no list for all."""
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in options.items():
        values = value if name != "stop" and isinstance(value, list | tuple) else [value] * count
        if len(values) != count:
            raise RequestError(
                "not a value for each prompt",
                field=name,
                got=f"{len(values)} values",
                wanted=f"{count}, or one value for all",
            )
        for own, item in zip(each, values, strict=True):
            own[name] = item
    return each
