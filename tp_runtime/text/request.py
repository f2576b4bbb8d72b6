"""A request for one completion, and the same request after encoding, when it is ready to run.

This module defines the options of a request; those for choosing tokens are the fields of `Sampling`. A call, a stream,
a row of a batch and the command line all use the same object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, Unpack

from ..errors import RequestError, require_flag, require_positive, shown
from ..generation import Sampling
from ..loaded_patches import ACTIVE, LoadedPatches, PatchChoice, ResolvedPatch
from ..patch import ENTRIES_STAND
from .codec import Message, TextCodec
from .detokenize import StopScanner, stop_strings

_SAMPLING = frozenset(setting.name for setting in fields(Sampling))


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments for choosing tokens and for ending a completion; see `Request` and `Sampling`."""

    max_new_tokens: int
    stop: Sequence[str] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


class RequestOptions(SamplingOptions, total=False):
    """The keyword arguments of a request; `Request` and `Sampling` document their meanings and defaults."""

    system: str | None
    raw: bool
    patch: PatchChoice
    strength: float


@dataclass(frozen=True)
class Request:
    """A request for one completion.

    Attributes:
        prompt: a string or a list of {"role", "content"} messages. A string is one user message for the chat template;
            for a completion-style model it is the text to continue.
        system: a system message in front of the prompt; for a completion-style model, the context text.
        raw: whether a string is encoded as it is, without the chat template.
        patch: the name of a loaded patch, a Patch, an expression such as `0.5 * p + q`, or None for the base model. By
            default it is the patch that `patched` activated, or else the one that the model was opened with.
        strength: a factor on the patch; a negative one inverts its effect. The base has no other strength than 1.
        max_new_tokens: the largest number of tokens of the completion.
        stop: strings that end the completion and are not part of it. None takes those of the patch (PatchConfig.stop);
            an empty list means no strings, whatever the patch has.
        sampling: the settings for choosing each token; greedy by default.

    Raises:
        RequestError: `raw` is not a boolean, `max_new_tokens` is not a positive integer, or `stop` is not a list of
            non-empty strings.
    """

    prompt: str | Sequence[Message]
    system: str | None = None
    raw: bool = False
    patch: PatchChoice = ACTIVE
    strength: float = 1.0
    max_new_tokens: int = 256
    stop: Sequence[str] | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        require_flag("raw", self.raw)
        require_positive("max_new_tokens", self.max_new_tokens)
        # An iterator can be read only once, so the strings are kept in a tuple from here on.
        object.__setattr__(self, "stop", None if self.stop is None else stop_strings(self.stop))

    @classmethod
    def of(cls, prompt: str | Sequence[Message], **options: Unpack[RequestOptions]) -> Request:
        """Build a request from keyword arguments, including those of `Sampling`.

        Raises:
            RequestError: a value is not valid.
            TypeError: an argument has an unknown name.
        """
        given: dict[str, Any] = dict(options)
        sampling = {name: given.pop(name) for name in _SAMPLING & given.keys()}
        return cls(prompt, sampling=Sampling(**sampling), **given)


@dataclass(frozen=True)
class EncodedRequest:
    """A request that is ready to run.

    Attributes:
        tokens: the ids of the prompt.
        patch: the patch that the request runs under.
        sampling: the settings for choosing each token.
        max_new_tokens: the largest number of tokens of the completion.
        scanner: the scanner that finds the stop strings in the text of this completion.
    """

    tokens: list[int]
    patch: ResolvedPatch
    sampling: Sampling
    max_new_tokens: int
    scanner: StopScanner


def encode_request(request: Request, codec: TextCodec, patches: LoadedPatches) -> EncodedRequest:
    """Encode the prompt of `request` and resolve its patch. This does not check the length of the prompt.

    Raises:
        RequestError: the prompt cannot be encoded, or has a system message where the patch's entries stand.
        PatchError: the patch is not loaded or does not fit.
    """
    patch = patches.resolve(request.patch, request.strength)
    if patch.bound.prefix is not None:
        _refuse_system(request.prompt, request.system)
    tokens = codec.render(request.prompt, request.system, raw=request.raw)
    return EncodedRequest(tokens, patch, request.sampling, request.max_new_tokens, StopScanner(_stop(request, patch)))


def _stop(request: Request, patch: ResolvedPatch) -> Sequence[str]:
    """Return the request's stop strings, or, if it does not name any, those of its patch."""
    if request.stop is not None:
        return request.stop
    return () if patch.patch is None else patch.patch.config.stop


def _refuse_system(prompt: str | Sequence[Message], system: str | None) -> None:
    """Refuse a system message under a patch with entries, which stand in its place.

    The ids do not show a system message, except if the template has a default system message.
    """
    first = prompt[0] if not isinstance(prompt, str) and prompt else {}
    if system is not None or (isinstance(first, Mapping) and first.get("role") == "system"):
        raise RequestError(
            f"the request has a system message, but {ENTRIES_STAND}",
            field="system",
            got=shown(system if system is not None else first.get("content")),
            wanted="user messages without a system prompt",
            fix="leave it out, or use a patch of weights alone",
        )
