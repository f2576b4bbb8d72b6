"""A request for one completion.

This module defines the options of a request; those for choosing tokens are the fields of `Sampling`. A call, a stream,
a row of a batch and the command line all use the same object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict, Unpack

from ..errors import RequestError, require_flag, require_positive, shown
from ..generation import LogprobsMode, Sampling, WantedLogprobs, check_lookup
from ..loaded_patches import ACTIVE, PatchChoice
from .codec import Message
from .detokenize import stop_strings
from .tools import checked_tool_choice, checked_tools

_CONSTRAINTS = ("json_schema", "regex", "grammar")
_SAMPLING = frozenset(setting.name for setting in fields(Sampling))


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments for choosing tokens and for ending a completion; see `Request` and `Sampling`."""

    sampling: Sampling | Literal["model"]
    max_new_tokens: int
    stop: Sequence[str] | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float]
    min_new_tokens: int


class RequestOptions(SamplingOptions, total=False):
    """The keyword arguments of a request; `Request` and `Sampling` document their meanings and defaults."""

    system: str | None
    raw: bool
    patch: PatchChoice
    strength: float
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    documents: Sequence[Mapping[str, Any]] | None
    template_args: Mapping[str, Any] | None
    logprobs: int | None
    logprobs_mode: LogprobsMode
    lookup: int


@dataclass(frozen=True)
class Request:
    """A request for one completion.

    Attributes:
        prompt: a string or a list of messages, {"role", "content"} and what docs/chat-templates.md names. A string is
            one user message for the chat template; for a completion-style model it is the text to continue.
        system: a system message in front of the prompt; for a completion-style model, the context text.
        raw: whether a string is encoded as it is, without the chat template.
        patch: the name of a loaded patch, a Patch, an expression such as `0.5 * p + q`, or None for the base model. By
            default it is the patch that `patched` activated, or else the one that the model was opened with.
        strength: a factor on the patch; a negative one inverts its effect. The base has no other strength than 1.
        max_new_tokens: the largest number of tokens of the completion.
        stop: strings that end the completion and are not part of it. None takes those of the patch (PatchConfig.stop);
            an empty list means no strings, whatever the patch has.
        sampling: the settings for choosing each token; greedy by default.
        from_model: the names of the settings that the model's own sampling decides, as far as it states them.
        json_schema: a JSON schema, as a mapping or as JSON text; the completion is a JSON document that it accepts.
        regex: a regular expression that the whole completion matches.
        grammar: a grammar in llguidance's form of Lark that the whole completion follows.
        tools: the functions that the model may call, in OpenAI's form, for the chat template.
        tool_choice: "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.
        documents: documents for the chat template.
        template_args: further variables of the chat template, such as {"enable_thinking": False}.
        logprobs: the number of likeliest tokens to report for each token; None reports no log-probabilities.
        logprobs_mode: "raw" or "processed"; see WantedLogprobs.
        lookup: the largest number of ids that one step may copy from the request's own text (prompt lookup decoding,
            docs/serving.md); 0 switches it off. A batch ignores it.

    Raises:
        RequestError: a value is not valid, or two constraints are given.
    """

    prompt: str | Sequence[Message]
    system: str | None = None
    raw: bool = False
    patch: PatchChoice = ACTIVE
    strength: float = 1.0
    max_new_tokens: int = 256
    stop: Sequence[str] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    from_model: frozenset[str] = frozenset()
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] = "auto"
    documents: Sequence[Mapping[str, Any]] | None = None
    template_args: Mapping[str, Any] | None = None
    logprobs: int | None = None
    logprobs_mode: LogprobsMode = "raw"
    lookup: int = 0

    def __post_init__(self) -> None:
        require_flag("raw", self.raw)
        require_positive("max_new_tokens", self.max_new_tokens)
        # An iterator can be read only once, so the strings are kept in a tuple from here on.
        object.__setattr__(self, "stop", None if self.stop is None else stop_strings(self.stop))
        WantedLogprobs(0 if self.logprobs is None else self.logprobs, self.logprobs_mode)
        check_lookup(self.lookup)
        if self.tools is not None:
            object.__setattr__(self, "tools", checked_tools(self.tools))
        object.__setattr__(self, "tool_choice", checked_tool_choice(self.tool_choice, self.tools))
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if given and self.tools and self.tool_choice not in ("auto", "none"):
            given.append("tool_choice")
        if len(given) > 1:
            raise RequestError(
                "a completion can have one constraint",
                field=given[1],
                got=" and ".join(given),
                wanted="one of them",
                fix="state everything in one schema or grammar",
            )

    @property
    def constrained(self) -> bool:
        """Whether the request states a schema, an expression or a grammar."""
        return any(getattr(self, name) is not None for name in _CONSTRAINTS)

    @classmethod
    def of(cls, prompt: str | Sequence[Message], **options: Unpack[RequestOptions]) -> Request:
        """Build a request from keyword arguments, including those of `Sampling`.

        `sampling` is "model" for what the model's generation_config.json states, or a `Sampling`. Single settings, such
        as `temperature`, change it.

        Raises:
            RequestError: a value is not valid.
            TypeError: an argument has an unknown name.
        """
        given: dict[str, Any] = dict(options)
        settings = {name: given.pop(name) for name in _SAMPLING & given.keys()}
        base = given.pop("sampling", Sampling())
        if not isinstance(base, Sampling) and not (isinstance(base, str) and base == "model"):
            raise RequestError(
                "the sampling is unknown", field="sampling", got=shown(base), wanted='"model", or a Sampling'
            )
        if isinstance(base, Sampling):
            return cls(prompt, sampling=replace(base, **settings), **given)
        return cls(prompt, sampling=Sampling(**settings), from_model=_SAMPLING - settings.keys(), **given)
