"""One completion that is asked for, and the same once it is ready to run.

What a request can ask is stated here and nowhere else; a call, a stream, a row of a batch and the command line all ask
with the same object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, Unpack

from ..errors import RequestError
from ..generation import Sampling, check_max_new_tokens
from ..loaded_patches import ACTIVE, LoadedPatches, PatchChoice, ResolvedPatch
from .codec import Message, TextCodec
from .detokenize import StopScanner

_SAMPLING = frozenset(setting.name for setting in fields(Sampling))


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments that say how tokens are chosen and where a completion ends; see `Request`, `Sampling`."""

    max_new_tokens: int
    stop: Sequence[str]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


class RequestOptions(SamplingOptions, total=False):
    """The keyword arguments of a request; `Request` and `Sampling` say what each means and what its default is."""

    system: str | None
    raw: bool
    patch: PatchChoice
    strength: float


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        prompt: a string is one user message through the chat template (for a completion-style model: the text to
            continue); or a list of {"role", "content"} messages.
        system: a system message in front of the prompt (completion style: context text).
        raw: whether a string is encoded as it is, without the chat template.
        patch: a loaded patch's name, a Patch, an expression such as `0.5 * p + q`, or None for the base model. By
            default the patch that `patched` activated, else the one that the model was opened with.
        strength: a factor on the patch; a negative one inverts its effect.
        max_new_tokens: the completion has at most this many tokens.
        stop: strings that end the completion and are not part of it.
        sampling: how each token is chosen; greedy by default.

    Raises:
        RequestError: `max_new_tokens` or `stop` cannot be served.
    """

    prompt: str | Sequence[Message]
    system: str | None = None
    raw: bool = False
    patch: PatchChoice = ACTIVE
    strength: float = 1.0
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        check_max_new_tokens(self.max_new_tokens)
        StopScanner(self.stop)

    @classmethod
    def of(cls, prompt: str | Sequence[Message], **options: Unpack[RequestOptions]) -> Request:
        """A request from keyword arguments, those of `Sampling` among them.

        Raises:
            RequestError: a value cannot be served.
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
        patch: the patch that it runs under.
        sampling: how each token is chosen.
        max_new_tokens: the completion has at most this many tokens.
        scanner: finds the stop strings in the text of this completion.
    """

    tokens: list[int]
    patch: ResolvedPatch
    sampling: Sampling
    max_new_tokens: int
    scanner: StopScanner


def encode_request(request: Request, codec: TextCodec, patches: LoadedPatches) -> EncodedRequest:
    """Encode the prompt of `request` and find the patch that it runs under; the prompt's length is not checked yet.

    Raises:
        RequestError: the prompt cannot be encoded, or has a system message that the patch's KV prefix replaces.
        PatchError: the patch is not loaded or does not fit.
    """
    patch = patches.resolve(request.patch, request.strength)
    if patch.bound.prefix is not None:
        _refuse_system(request.prompt, request.system)
    tokens = codec.render(request.prompt, request.system, raw=request.raw)
    return EncodedRequest(tokens, patch, request.sampling, request.max_new_tokens, StopScanner(request.stop))


def _refuse_system(prompt: str | Sequence[Message], system: str | None) -> None:
    """Refuse a system message under a KV prefix, which stands in its place.

    The ids alone do not show one, except where the template has a default system message.
    """
    first = prompt[0] if not isinstance(prompt, str) and prompt else {}
    if system is not None or (isinstance(first, Mapping) and first.get("role") == "system"):
        raise RequestError(
            "the patch's KV prefix stands where a system message would",
            field="system",
            got=repr(str(system if system is not None else first.get("content"))[:40]),
            wanted="user messages without a system prompt",
            fix="leave it out, or use a patch without a KV prefix",
        )
