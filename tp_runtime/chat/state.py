"""What a chat is at one moment, and the requests that it makes of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Unpack

from ..errors import RequestError, shown
from ..generation import check_request
from ..loaded_patches import ACTIVE, PatchChoice
from ..session import Graph, KVCache
from ..text import EncodedRequest, Message, Request, RequestEncoder, RequestOptions, TextCodec, TextStream
from .turns import Messages

_OWN_SETTINGS = {
    "system": "set_system(text)",
    "patch": "switch(patch, strength)",
    "strength": "switch(patch, strength)",
    "raw": "the model's stream method",
    "cache": "the model's stream method",
}
_PROBE: Messages = ({"role": "user", "content": "a"},)


class ChatModel(Protocol):
    """The parts of an open model that a chat uses; see PatchedModel."""

    graph: Graph
    codec: TextCodec
    encoder: RequestEncoder

    def new_cache(self, patch: PatchChoice = ACTIVE, strength: float = 1.0) -> KVCache:
        """Return an empty KV cache for requests under a patch."""

    def stream(
        self, prompt: str | Sequence[Message], *, cache: KVCache | None = None, **options: Unpack[RequestOptions]
    ) -> TextStream:
        """Start a completion."""


@dataclass(frozen=True)
class ChatState:
    """Everything that a chat is, apart from its keys and values. A chat changes by taking another state, in one step.

    Attributes:
        messages: the messages, without the system message.
        system: the system message.
        patch: the patch, as a request names it.
        strength: the factor on the patch.
        retries: how often the last answer was given again.
    """

    messages: Messages
    system: str | None
    patch: PatchChoice
    strength: float
    retries: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The options of a request that belong to the whole chat."""
        return {"system": self.system, "patch": self.patch, "strength": self.strength}

    def encode(self, model: ChatModel, options: Mapping[str, Any]) -> EncodedRequest:
        """Return the request for an answer to the messages.

        Raises:
            RequestError, PatchError: the request is not valid; see RequestEncoder.
        """
        request: Any = {**options, **self.settings}
        return model.encoder.encode(Request.of(list(self.messages), **request))

    def checked(self, model: ChatModel, options: Mapping[str, Any]) -> ChatState:
        """Return the state after a trial that its system message and its patch are accepted, and leave room for more.

        Raises:
            RequestError, PatchError: they are not, or an option is not valid.
        """
        request = replace(self, messages=_PROBE).encode(model, options)
        check_request(model.graph.folder, request.tokens, request.patch.bound, 1)
        return self


def refuse_own_settings(options: Mapping[str, Any]) -> None:
    """Raise RequestError if the options of an answer have one that belongs to the whole chat."""
    for name, fix in _OWN_SETTINGS.items():
        if name in options:
            raise RequestError(
                "this is a setting of the whole chat and not of one answer",
                field=name,
                got=shown(options[name]),
                wanted="the options of sampling and of the end of an answer",
                fix=f"call {fix}",
            )
