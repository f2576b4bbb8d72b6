"""The runtime's main interface: a model folder with its loaded patches, which takes text and returns text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from .chat import SAVED, ChatSession, Overflow, Saved
from .errors import require_positive
from .generation import PREFILL_TOKENS, PrefixCache, prefill, require_prefix_cache
from .loaded_patches import ACTIVE, Active, LoadedPatches, PatchChoice
from .opening import open_folder
from .patch import Patch
from .session import BoundPatch, Graph, KVCache, ProbeCheck, SessionOptions
from .text import (
    Message,
    Request,
    RequestEncoder,
    RequestOptions,
    Result,
    TextBatch,
    TextCodec,
    TextStream,
    absorb_prompt,
    is_several,
    run_answers,
    run_prompts,
    start_stream,
)

_MOST_ROWS = 2**16  # of a batch; more would only ask for memory that no device has


class PatchedModel:
    """A base model in a live session, with the patches that are loaded for it.

    Requests may run in several threads at the same time, each under its own patch. A KV cache serves one of them at a
    time, and any other is refused at once (BusyError). `with model.patched(p):` applies to the thread or task that
    enters it.

    Args:
        graph: the session.
        codec: the tokenizer and the chat template.
        default: the bound patch for requests that name no patch. None means the graph's own default, which it computes
            with nothing bound.
        prefix_cache: the cache from which prompts take the keys and values of earlier runs. With None every prompt is
            run from its start.
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
        self.encoder = RequestEncoder(codec, self._patches, graph.folder.vocab_size)

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
            device: `cuda`, `cpu` or `auto`. `auto` takes CUDA if it is available, and otherwise the CPU. The reason is
                logged, as a warning if this machine is set up for CUDA.
            patch: the patch for requests that name no patch. It is a Patch, the path of its file, or None for the base
                model, and it becomes part of the session when the model is loaded. By default it is the patch that the
                folder was exported with. A request may scale it by its `strength`.
            prefix_cache_bytes: the largest number of bytes for keys and values of earlier prompts. If a later prompt
                under the same patch begins with the same tokens, that part is not run again. 0 switches this off.
            verify: whether to check the digest of every file, including the weights and those of a prepared graph.
            options: the settings of the session; see SessionSettings.

        Raises:
            ModelFormatError, UnsafePathError: `path` is not a path, or the folder is not as it was exported.
            DeviceUnavailableError: `device` is unknown, or is `cuda` and CUDA is not available; or `cuda_graphs` is set
                on the CPU.
            PatchError: the patch is damaged or does not fit.
            RequestError: `prefix_cache_bytes` is not a number of bytes, or an option is not valid.
        """
        store = None if type(prefix_cache_bytes) is int and not prefix_cache_bytes else PrefixCache(prefix_cache_bytes)
        graph, codec = open_folder(path, device, patch, verify, **options)
        return cls(graph, codec, graph.base if patch is None else graph.default, store)

    # -- patches ---------------------------------------------------------------------------------------------

    @property
    def patches(self) -> Mapping[str, Patch]:
        """The loaded patches by name."""
        return self._patches.view()

    def load_patch(
        self, patch: str | Path | Patch, name: str | None = None, *, check: bool = False, replace: bool = False
    ) -> str:
        """Load a patch, so that requests can select it by its name. An error leaves the loaded patches unchanged.

        Args:
            patch: a patch, or the path of its file.
            name: the name to load it under; by default the patch's own name.
            check: whether to also run the patch's probe, which proves that the patch has the same effect on this device
                as on the host.
            replace: whether the patch may take the place of a loaded one of that name. New requests then get the new
                patch, and requests that run keep the old one to their end.

        Returns:
            The name.

        Raises:
            PatchInUseError: the name is taken, and `replace` is not set.
            PatchError: the file is damaged or the patch does not fit this model; or `check` is set, and the patch has
                no probe or the device does not reproduce it.
            RequestError: the name is not a string, or `check` or `replace` is not a boolean.
        """
        return self._patches.load(patch, name, check, replace)

    def unload_patch(self, name: str) -> None:
        """Remove a loaded patch. Afterwards the model gives the same output as before it was loaded, bit for bit.

        Raises:
            PatchTargetError: no patch of that name is loaded.
            PatchInUseError: a request or a `patched` block is using it.
        """
        self._patches.remove(name)

    @contextmanager
    def patched(self, patch: Patch | str | None, strength: float = 1.0) -> Iterator[PatchedModel]:
        """Within the context, requests of this thread or task run under `patch` unless they name another.

        Leave the context in the thread or task that entered it: another one cannot change what is active there.

        Raises:
            PatchError: the patch is not loaded or does not fit. Nothing changes in this case.
        """
        with self._patches.activate(self._patches.resolve(patch, strength)):
            yield self

    def check(self, patch: Patch | str) -> ProbeCheck:
        """Run a patch's probe, which shows whether the patch is live on this device and has the host's effect.

        Raises:
            PatchFormatError: the patch has no probe.
            PatchError: the patch is not loaded or does not fit.
        """
        return self._patches.check(patch)

    # -- requests --------------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        cache: KVCache | None = None,
        **options: Unpack[RequestOptions],
    ) -> TextStream:
        """Start a completion; iterate over the result for its text.

        The stream uses its patch and its cache from the first chunk to the end, or until it is closed or dropped.

        Args:
            prompt: one user message, or a list of messages; see Request.
            cache: a cache from `new_cache`, which continues from earlier text of the same conversation.
            options: the options of Request and the settings of Sampling, such as `temperature`.

        Raises:
            RequestError: the prompt or an option is not valid.
            PatchError: the patch is not loaded or does not fit.
            StaleCacheError: `cache` was made under another patch or by another open model.
            BusyError: another request is using `cache`. If it begins after this call, reading the stream raises it.
        """
        return start_stream(self.graph, self.encoder, Request.of(prompt, **options), cache, self.prefix_cache)

    @overload
    def generate(self, prompt: str | Sequence[Message], **options: Any) -> str: ...

    @overload
    def generate(self, prompt: list[str] | list[list[Message]], *, rows: int = 8, **options: Any) -> list[str]: ...

    def generate(self, prompt: Any, *, rows: int = 8, **options: Any) -> str | list[str]:
        """Return the whole text of one completion, or the texts of several completions that run together.

        Args:
            prompt: one prompt or several. One prompt is a string or a list of messages (one conversation), as for
                `stream`. Several prompts are a list of strings or a list of lists of messages.
            rows: with several prompts, the largest number that runs at the same time.
            options: see Request. With several prompts, every option except `stop` may be a list with a value for each
                prompt (`patch=["pirate", None]`). A single value applies to all prompts; for `tools` and `documents`
                that is a list of objects, and a list of lists is one for each prompt.

        Returns:
            The text. With several prompts, a list of texts in the order of the prompts; each text is the same as if its
            prompt ran separately, apart from rounding (docs/serving.md).

        Raises:
            RequestError, PatchError, StaleCacheError, BusyError: as for `stream`, and `rows` is not a positive integer
                or too large. With several prompts these are raised before any prompt is run.
        """
        require_positive("rows", rows, _MOST_ROWS)
        if not is_several(prompt):
            return "".join(self.stream(prompt, **options))
        return [one.text for one in run_prompts(self.graph, self.encoder, prompt, options, rows, self.prefix_cache)]

    @overload
    def complete(self, prompt: str | Sequence[Message], *, n: int, rows: int = 8, **options: Any) -> list[Result]: ...

    @overload
    def complete(self, prompt: list[str] | list[list[Message]], *, rows: int = 8, **options: Any) -> list[Result]: ...

    @overload
    def complete(self, prompt: str | Sequence[Message], **options: Any) -> Result: ...

    def complete(self, prompt: Any, *, n: int | None = None, rows: int = 8, **options: Any) -> Result | list[Result]:
        """Return a completion with everything that is known of it: ids, figures, log-probabilities, tool calls.

        Args:
            prompt: one prompt or several, as for `generate`.
            n: the number of answers to one prompt. They run together and share the run of the prompt. The seed of
                answer i is `seed` + i.
            rows: with several prompts or answers, the largest number that runs at the same time.
            options: see Request; with several prompts as for `generate`.

        Returns:
            The result; with several prompts or with `n` a list of results, in order.

        Raises:
            RequestError, PatchError, StaleCacheError, BusyError: as for `generate`, and `n` is not a positive integer,
                or is given with several prompts.
        """
        require_positive("rows", rows, _MOST_ROWS)
        if n is not None:
            require_positive("n", n, _MOST_ROWS)
            answers = run_answers(self.graph, self.encoder, prompt, n, options, rows, self.prefix_cache)
            return [one.result for one in answers]
        if is_several(prompt):
            completions = run_prompts(self.graph, self.encoder, prompt, options, rows, self.prefix_cache)
            return [one.result for one in completions]
        with self.stream(prompt, **options) as stream:
            for _chunk in stream:
                pass
        return stream.result

    def batch(self, rows: int = 8, prefill_tokens: int = PREFILL_TOKENS) -> TextBatch:
        """Return a batch, whose completions run together and may join and leave: `with model.batch() as batch:`.

        Args:
            rows: the largest number of completions that run at the same time. Further completions wait.
            prefill_tokens: the largest number of prompt tokens to run between two tokens of the running completions. A
                larger number lets a new prompt answer sooner, but the running completions wait longer for each token.

        Raises:
            RequestError: `rows` or `prefill_tokens` is not a positive integer, or `rows` is too large.
        """
        require_positive("rows", rows, _MOST_ROWS)
        return TextBatch(self.graph, self.encoder, rows, self.prefix_cache, prefill_tokens)

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

        Requests under the same patch that begin with the same tokens then take that part from the prefix cache.

        Raises:
            RequestError: the model was opened without a prefix cache, the cache cannot hold the prompt, or the prompt
                is not valid (see `stream`).
            PatchError: the patch is not loaded or does not fit.
        """
        store = require_prefix_cache(self.prefix_cache)
        request = self.encoder.encode(Request(prompt, system, raw, patch, strength))
        with self._patches.using(request.patch.loaded):
            prefill(self.graph, request.tokens, request.patch.bound, store)

    def save_prefix_cache(self, path: str | Path) -> None:
        """Write the prefix cache to a file, whole or not at all; an existing file of a prefix cache is replaced.

        Raises:
            RequestError: the model was opened without a prefix cache.
            CacheFormatError, OutputError, OSError: see PrefixCache.save. No file is left behind.
        """
        require_prefix_cache(self.prefix_cache).save(path, self.graph.folder)

    def load_prefix_cache(self, path: str | Path) -> int:
        """Add the entries of a file that `save_prefix_cache` wrote. An error leaves the prefix cache unchanged.

        Whoever writes the file decides what the model answers, as with a patch file.

        Returns:
            The number of entries that were added; the budget may leave out those that were used least recently.

        Raises:
            RequestError: the model was opened without a prefix cache.
            CacheFormatError, StaleCacheError, OSError: see PrefixCache.load.
        """
        return require_prefix_cache(self.prefix_cache).load(path, self.graph.folder)

    def absorb(
        self,
        system: str,
        name: str = "absorbed",
        *,
        patch: PatchChoice = ACTIVE,
        strength: float = 1.0,
        dtype: str | None = None,
        before_system: bool = False,
        progress: Callable[[int, int], object] | None = None,
    ) -> Patch:
        """Return a patch that stands in for a system prompt: the prompt's own keys and values, which are exact.

        Args:
            system: the system message; for a completion-style model, the text in front of every prompt.
            name: the name of the patch.
            patch: a patch of weights alone under which the keys and values are computed. The result holds these weights
                too, so it is used instead of that patch.
            strength: a factor on that patch.
            dtype: the dtype of the patch; None takes that of the keys and values, which rounds nothing.
            before_system: whether the prompt stands in front of a system message of every request, with a blank line
                between them; otherwise it stands in place of one.
            progress: a function that is called with the number of the prompt's ids that have run, and of all.

        Raises:
            RequestError, PatchError: see absorb_prompt; or the patch is not loaded.
        """
        under = self._patches.resolve(patch, strength)
        with self._patches.using(under.loaded):
            return absorb_prompt(
                self.graph, self.codec, system, under, name, dtype=dtype, before_system=before_system, progress=progress
            )

    def chat(
        self,
        system: str | None = None,
        patch: PatchChoice = ACTIVE,
        strength: float = 1.0,
        overflow: Overflow = "error",
        **options: Any,
    ) -> ChatSession:
        """Begin a chat, which keeps its keys and values between turns; see ChatSession for arguments and errors."""
        return ChatSession(self, self._patches, system, patch, strength, overflow, **options)

    def load_chat(
        self,
        path: str | Path,
        patch: PatchChoice | Saved = SAVED,
        strength: float = 1.0,
        overflow: Overflow = "error",
        **options: Any,
    ) -> ChatSession:
        """Read a chat that ChatSession.save wrote; see ChatSession.load for arguments and errors."""
        return ChatSession.load(path, self, self._patches, patch, strength, overflow, **options)

    def new_cache(self, patch: PatchChoice = ACTIVE, strength: float = 1.0) -> KVCache:
        """Return an empty KV cache for a conversation under a patch.

        Another patch or another open model, also one of the same folder, refuses it with StaleCacheError.

        Raises:
            PatchError: the patch is not loaded or does not fit.
        """
        return self.graph.new_cache(self._patches.resolve(patch, strength).bound)

    def logits(
        self, token_ids: Sequence[int], patch: PatchChoice = ACTIVE, strength: float = 1.0
    ) -> NDArray[np.float32]:
        """Return the logits of token ids.

        Under a patch with a KV prefix, T counts only the ids that the prefix does not replace.

        Returns:
            The logits [T, vocab] of the T ids, float32.

        Raises:
            RequestError: `token_ids` is not a list of ids or is empty, an id is outside the vocabulary, the ids do not
                fit the context window, or they do not start with the ids that the patch's KV prefix replaces.
            PatchError: the patch is not loaded or does not fit.
        """
        resolved = self._patches.resolve(patch, strength)
        with self._patches.using(resolved.loaded):
            return self.graph.run(token_ids, resolved.bound)
