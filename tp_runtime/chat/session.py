"""A chat with a model: its messages, the patch that it runs under, and the keys and values of what was said."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..errors import BusyError, RequestError
from ..loaded_patches import ACTIVE, LoadedPatches, PatchChoice
from ..session import KVCache, Use, Uses
from ..text import EncodedRequest, Message, Request
from .overflow import Overflow, dropped_turns, require_overflow
from .saved import SAVED, Saved, SavedChat, read_chat, write_chat
from .state import ChatModel, ChatState, refuse_own_settings
from .stream import ChatResult, ChatStream
from .turns import Messages, last_turn, new_messages, without_oldest

log = logging.getLogger("tp_runtime")


class ChatSession:
    """A chat with a model, which keeps its keys and values between turns; `PatchedModel.chat` makes one.

    A turn runs only its new tokens. Keys and values belong to one patch: after a switch the next message first runs the
    dialogue again under the new one. With the patch ACTIVE that is also so if another one is active by then.

    Every change is applied as a whole or not at all: an error, Ctrl-C or a closed stream leaves the chat as it was. One
    answer is given at a time; meanwhile every other call that changes the chat raises BusyError.

    Args:
        model: the open model, with a chat template.
        patches: the model's loaded patches.
        system: the system message.
        patch: the patch, as for a request.
        strength: the factor on the patch.
        overflow: what to do when a message no longer fits the context window: "error" refuses it; "drop_oldest" gives
            the answer without the oldest turns, as many as needed for the prompt and `max_new_tokens` to fit.
        options: the options of every answer, such as `temperature`; see Request and Sampling.

    Attributes:
        loaded_from: the saved chat that this one was loaded from; None for a new one.

    Raises:
        RequestError: the model has no chat template, an option is not valid, or the patch or the template allows no
            system message.
        PatchError: the patch is not loaded or does not fit.
    """

    def __init__(
        self,
        model: ChatModel,
        patches: LoadedPatches,
        system: str | None = None,
        patch: PatchChoice = ACTIVE,
        strength: float = 1.0,
        overflow: Overflow = "error",
        **options: Any,
    ) -> None:
        if model.codec.style != "chat":
            raise RequestError(
                "the model has no chat template, so it cannot tell who says what",
                field="model",
                got=f"{model.graph.folder.base_model}, a completion-style model",
                wanted="a model with a chat template",
                fix="call generate or stream with the whole text",
            )
        require_overflow(overflow)
        refuse_own_settings(options)
        self._model, self._patches = model, patches
        self._overflow, self._options = overflow, options
        self._uses = Uses()
        self._cache: KVCache | None = None
        self.loaded_from: SavedChat | None = None
        self._state = ChatState((), system, patch, strength).checked(model, options)

    # -- what the chat is ------------------------------------------------------------------------------------

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the messages, without the system message. Turns that an answer was given without are in it."""
        return copy.deepcopy(list(self._state.messages))

    @property
    def system(self) -> str | None:
        """The system message."""
        return self._state.system

    @property
    def patch(self) -> PatchChoice:
        """The patch, as it was passed."""
        return self._state.patch

    @property
    def strength(self) -> float:
        """The factor on the patch."""
        return self._state.strength

    @property
    def runs_again(self) -> bool:
        """Whether the next answer first runs the whole dialogue again: the chat has no keys and values of its patch.

        Raises:
            PatchError: the patch is not loaded any more.
        """
        cache = self._fitting_cache(self._state)
        return bool(self._state.messages) and len(cache) <= len(cache.prefix.replaces if cache.prefix else ())

    # -- answers ---------------------------------------------------------------------------------------------

    def stream(self, message: str | Message | Sequence[Message], **overrides: Any) -> ChatStream:
        """Send a message; iterate over the result for the answer, whose end appends both to the chat.

        Args:
            message: the text of a user message, a message such as a tool's result, or a list of messages.
            overrides: options for this answer alone.

        Raises:
            RequestError: the message or an option is not valid, or the chat no longer fits the context window.
            PatchError: the patch is not loaded any more.
            BusyError: another answer is being given.
        """
        return self._answer(0, lambda messages: (*messages, *new_messages(message)), overrides)

    def send(self, message: str | Message | Sequence[Message], **overrides: Any) -> ChatResult:
        """Send a message and return the answer. The arguments and errors are those of `stream`."""
        return _whole(self.stream(message, **overrides))

    def stream_edit(self, text: str | Message, **overrides: Any) -> ChatStream:
        """Say something else in the last turn: `text` replaces the last user message and everything after it.

        Args:
            text: the new user message.
            overrides: options for this answer alone.

        Raises:
            RequestError: the chat has no turn yet; or as for `stream`.
            PatchError, BusyError: as for `stream`.
        """
        return self._answer(0, lambda messages: (*messages[: last_turn(messages)], *new_messages(text)), overrides)

    def edit_last(self, text: str | Message, **overrides: Any) -> ChatResult:
        """Replace the last user message and return the new answer. Arguments and errors are those of `stream_edit`."""
        return _whole(self.stream_edit(text, **overrides))

    def stream_retry(self, **overrides: Any) -> ChatStream:
        """Answer the last user message again. The old answer, tool results included, stays until the new one is whole.

        A seed among the chat's options is counted on by one for each retry, so that a sampled answer is another one.

        Args:
            overrides: options for this answer alone.

        Raises:
            RequestError: the chat has no turn yet; or as for `stream`.
            PatchError, BusyError: as for `stream`.
        """
        retries = self._state.retries + 1
        seed = Request.of("", **self._options).sampling.seed
        options = overrides if seed is None else {"seed": seed + retries, **overrides}
        return self._answer(retries, lambda messages: messages[: last_turn(messages) + 1], options)

    def retry(self, **overrides: Any) -> ChatResult:
        """Answer the last user message again and return that. Arguments and errors are those of `stream_retry`."""
        return _whole(self.stream_retry(**overrides))

    def _answer(self, retries: int, change: Callable[[Messages], Messages], overrides: Mapping[str, Any]) -> ChatStream:
        """Start the answer to what `change` makes of the messages."""
        refuse_own_settings(overrides)
        options: Any = {**self._options, **overrides}
        use = Use(self._uses)
        try:
            try:
                self._take(use)
                state = self._state
                messages: Messages = change(state.messages)
                dropped = 0
                if self._overflow == "drop_oldest":

                    def encode(some: Messages) -> EncodedRequest:
                        return replace(state, messages=some).encode(self._model, options)

                    dropped = dropped_turns(messages, encode, self._model.graph.folder.context_window)
                    if dropped:
                        log.warning("the context window is full: the model does not see the oldest turns (%d)", dropped)
                self._cache = self._fitting_cache(state)
                stream = self._model.stream(
                    list(without_oldest(messages, dropped)),
                    cache=self._cache,
                    **{**options, **state.settings},
                )

                def append(answer: dict[str, Any]) -> None:
                    self._state = replace(state, messages=(*messages, answer), retries=retries)

                return ChatStream(stream, dropped, append, use)
            except BaseException:
                use.end()
                raise
        except BaseException:
            use.end()  # an interrupt may arrive at the first one
            raise

    # -- changes ---------------------------------------------------------------------------------------------

    def switch(self, patch: PatchChoice, strength: float = 1.0) -> None:
        """Go on under another patch. The next message first runs the dialogue again under it.

        Args:
            patch: the patch, as for a request.
            strength: the factor on the patch.

        Raises:
            RequestError: the chat has a system message, and the patch has entries, which stand in its place.
            PatchError: the patch is not loaded or does not fit.
            BusyError: an answer is being given.
        """
        with self._changing():
            state = replace(self._state, patch=patch, strength=strength)
            self._state = state.checked(self._model, self._options)

    def set_system(self, system: str | None) -> None:
        """Change the system message; None removes it. The next message runs the dialogue again behind it.

        Raises:
            RequestError: the text is not valid, or the patch or the template allows no system message.
            BusyError: an answer is being given.
        """
        with self._changing():
            self._state = replace(self._state, system=system).checked(self._model, self._options)

    def undo(self) -> list[dict[str, Any]]:
        """Take the last turn back: the last user message and everything after it.

        Returns:
            The messages of the turn.

        Raises:
            RequestError: the chat has no turn yet.
            BusyError: an answer is being given.
        """
        with self._changing():
            messages = self._state.messages
            start = last_turn(messages)
            self._state = replace(self._state, messages=messages[:start], retries=0)
            return copy.deepcopy(list(messages[start:]))

    def clear(self) -> None:
        """Forget all messages, and keep the system message and the patch.

        Raises:
            BusyError: an answer is being given.
        """
        with self._changing():
            self._state = replace(self._state, messages=(), retries=0)

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the chat to a JSON file, whole or not at all: messages, system message, patches and the base's digest.

        Keys and values are not saved, so the chat that is loaded from the file runs its dialogue again. An existing
        file is replaced if it is a saved chat.

        Raises:
            OutputError: `path` holds something else than a saved chat.
            RequestError: the chat is larger than what is read back, or holds a value that is not one of JSON.
            PatchError: the patch is not loaded any more.
            OSError: the operating system refuses the write.
        """
        state = self._state
        resolved = self._patches.resolve(state.patch, state.strength)
        folder = self._model.graph.folder
        write_chat(path, SavedChat.of(folder, state.messages, state.system, state.patch, state.strength, resolved))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: ChatModel,
        patches: LoadedPatches,
        patch: PatchChoice | Saved = SAVED,
        strength: float = 1.0,
        overflow: Overflow = "error",
        **options: Any,
    ) -> ChatSession:
        """Read a chat that `save` wrote. The next message runs the dialogue again.

        Args:
            path: the file.
            model: the open model, of the base that the chat was saved with.
            patches: the model's loaded patches.
            patch: the patch to go on under. By default it is the one that the chat was saved under, which must be
                loaded, be the sum of loaded patches, or be the active one.
            strength: the factor on `patch`.
            overflow, options: as for a new chat. A file holds neither.

        Raises:
            ChatFormatError: the file is damaged, of another version, or of another base model.
            PatchTargetError: a patch that the chat was saved under is not loaded.
            RequestError, PatchError: as for a new chat.
        """
        saved = read_chat(path, model.graph.folder)
        if isinstance(patch, Saved):
            patch, strength = saved.find_patch(patches, str(path))
        chat = cls(model, patches, saved.system, patch, strength, overflow, **options)
        chat._state, chat.loaded_from = replace(chat._state, messages=saved.messages), saved
        return chat

    # -- inside ----------------------------------------------------------------------------------------------

    def _take(self, use: Use) -> None:
        """Begin a use of the chat. The caller ends it, also if this raises."""
        use.begin()
        if self._uses.first() is not use:
            raise BusyError(
                "the chat is giving an answer",
                field="chat",
                got="a stream that has not ended, or a call in another thread",
                wanted="a chat that nothing else uses",
                fix="read the stream to its end, stop it or close it first",
            )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        use = Use(self._uses)
        try:
            try:
                self._take(use)
                yield
            finally:
                use.end()
        finally:
            use.end()  # an interrupt may arrive at the first one

    def _fitting_cache(self, state: ChatState) -> KVCache:
        """Return the chat's cache if it was made under the patch of `state` as it is now, or else an empty one."""
        fresh, cache = self._model.new_cache(state.patch, state.strength), self._cache
        return fresh if cache is None or (cache.key, cache.session) != (fresh.key, fresh.session) else cache


def _whole(stream: ChatStream) -> ChatResult:
    try:
        try:
            for _chunk in stream:
                pass
            return stream.result
        finally:
            stream.close()
    finally:
        stream.close()  # an interrupt may arrive at the first one
