"""From a request to what runs: the ids of its prompt, its patch, its sampler and its constraint."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, shown
from ..generation import Constraint, Sampler, Sampling, WantedLogprobs
from ..loaded_patches import LoadedPatches, ResolvedPatch
from ..patch import BEFORE_SYSTEM, ENTRIES_STAND
from .answer import AnswerReader
from .beginning import beginnings_of, in_front_of
from .codec import Message, TextCodec
from .request import Request
from .tools import refuse_tools_and_documents

if TYPE_CHECKING:
    from ..grammar import Grammars


@dataclass(frozen=True)
class EncodedRequest:
    """A request that is ready to run, once.

    Attributes:
        tokens: the ids of the prompt.
        patch: the patch that the request runs under.
        sampler: picks the ids of this completion.
        max_new_tokens: the largest number of tokens of the completion.
        stop: the strings that end the completion.
        lookup: the largest number of ids that one step may copy.
        reader: tells reasoning, text and calls of tools in the answer apart; None if everything is text.
    """

    tokens: list[int]
    patch: ResolvedPatch
    sampler: Sampler
    max_new_tokens: int
    stop: tuple[str, ...]
    lookup: int = 0
    reader: AnswerReader | None = None


class RequestEncoder:
    """Encodes the requests of one open model. Threads share it.

    Args:
        codec: the tokenizer and the chat template.
        patches: the loaded patches, from which requests take theirs.
        vocabulary: the number of logits.
    """

    def __init__(self, codec: TextCodec, patches: LoadedPatches, vocabulary: int) -> None:
        self.codec, self.patches, self._vocabulary = codec, patches, vocabulary
        self._grammars: Grammars | None = None  # made on first use: it takes seconds for a large vocabulary
        self._lock = threading.Lock()

    def encode(self, request: Request) -> EncodedRequest:
        """Encode the prompt of a request and resolve its patch. This does not check the length of the prompt.

        Raises:
            RequestError: the prompt cannot be encoded, has a system message, tools or documents where the patch's
                entries stand, lacks the system message that they stand in front of, or has tools or documents between
                the two, or the constraint cannot be compiled.
            PatchError: the patch is not loaded or does not fit.
        """
        codec, patch = self.codec, self.patches.resolve(request.patch, request.strength)
        prefix = patch.bound.prefix
        if prefix is not None and prefix.before_system:
            _require_system(request)
            _require_behind(codec, request)
        elif prefix is not None:
            _refuse_system(request.prompt, request.system)
            refuse_tools_and_documents(request.tools, request.documents)
        tokens = codec.render(
            request.prompt,
            request.system,
            raw=request.raw,
            tools=request.tools,
            documents=request.documents,
            template_args=request.template_args,
        )
        wanted = None if request.logprobs is None else WantedLogprobs(request.logprobs, request.logprobs_mode)
        sampler = Sampler(_sampling(request, codec), codec.eos_ids, self._constraint(request, tokens), wanted)
        sampler.require_vocabulary(self._vocabulary)
        stop = tuple(_stop(request, patch))
        reader = _reader(request, codec, tokens)
        return EncodedRequest(tokens, patch, sampler, request.max_new_tokens, stop, request.lookup, reader)

    def _constraint(self, request: Request, tokens: Sequence[int]) -> Constraint | None:
        """Return what the completion is held to; None if it is free."""
        called, codec = None, self.codec
        # The room of grammars is imported for the first request that needs it: its import delays the first token.
        if request.tools and request.tool_choice not in ("auto", "none"):
            from ..grammar import check_schema
            from .tool_grammar import tool_constraint

            tail = codec.prompt_tail(tokens)
            for number, tool in enumerate(request.tools):
                check_schema(tool["function"].get("parameters") or {}, f"tools[{number}].function.parameters")
            assert codec.tool_format is not None  # without a template, `render` refuses tools
            called = tool_constraint(request.tools, request.tool_choice, codec.tool_format, codec.reasoning_tags, tail)
        if called is None and not request.constrained:
            return None
        with self._lock:
            if self._grammars is None:
                self._grammars = codec.grammars(self._vocabulary)
        if called is not None:
            return self._grammars.compile(grammar=called).constraint()
        compiled = self._grammars.compile(json_schema=request.json_schema, regex=request.regex, grammar=request.grammar)
        return compiled.constraint()


def _reader(request: Request, codec: TextCodec, tokens: Sequence[int]) -> AnswerReader | None:
    calls = codec.tool_format if request.tools and request.tool_choice != "none" else None
    # A completion that a schema or a grammar holds to its form has no room for reasoning.
    tags = None if request.raw or request.constrained else codec.reasoning_tags
    if calls is None and tags is None:
        return None
    return AnswerReader(tags, codec.prompt_tail(tokens), calls, request.tools or ())


def _sampling(request: Request, codec: TextCodec) -> Sampling:
    own = codec.sampling
    return replace(request.sampling, **{name: own[name] for name in request.from_model & own.keys()})


def _stop(request: Request, patch: ResolvedPatch) -> Sequence[str]:
    """Return the request's stop strings, or, if it does not name any, those of its patch."""
    if request.stop is not None:
        return request.stop
    return () if patch.patch is None else patch.patch.config.stop


def _refuse_system(prompt: str | Sequence[Message], system: str | None) -> None:
    """Refuse a system message under a patch with entries, which stand in its place.

    The ids do not show a system message, except if the template has a default system message.
    """
    found = _system_of(prompt, system)
    if found is not None:
        raise RequestError(
            f"the request has a system message, but {ENTRIES_STAND}",
            field="system",
            got=shown(found),
            wanted="user messages without a system prompt",
            fix="leave it out, or use a patch of weights alone, or one that was made with --before-system",
        )


def _require_system(request: Request) -> None:
    """Refuse a request without a system message under a patch whose entries stand in front of one.

    A raw prompt says with its ids what it has.
    """
    if not request.raw and _system_of(request.prompt, request.system) is None:
        raise RequestError(
            f"the request has no system message, but {BEFORE_SYSTEM}",
            field="system",
            got="none",
            wanted="a system message",
            fix="pass one, or use a patch that was made without --before-system",
        )


def _require_behind(codec: TextCodec, request: Request) -> None:
    """Refuse tools and documents that the template writes in front of the system message, behind a patch's entries.

    The ids may not show it: the prompt can begin as without them. So two prompts tell it, whose system messages have
    another beginning: tools in front of it are in the part that both have in front.
    """
    given = {field: getattr(request, field) for field in ("tools", "documents")}
    if request.raw or codec.style != "chat" or not any(value is not None for value in given.values()):
        return

    def front(**variables: object) -> set[tuple[int, ...]]:
        options: Any = {"template_args": request.template_args, **variables}
        own, other = (codec.render("Hello", system, **options) for system in ("be kind", in_front_of("be kind", "Hm:")))
        return {beginning.student for beginning in beginnings_of([(other, own)])}

    for field, value in given.items():
        if value is not None and front(**{field: value}) != front():
            raise RequestError(
                f"the chat template writes {field} in front of the system message, but {BEFORE_SYSTEM}",
                field=field,
                got=shown(value),
                wanted="None",
                fix=f"leave {field} out, or use a patch of weights alone",
            )


def _system_of(prompt: str | Sequence[Message], system: str | None) -> object:
    """Return the system message of a request, which nothing has checked yet; None if there is none."""
    if system is not None or isinstance(prompt, str) or not prompt:
        return system
    first = prompt[0]
    return first.get("content") if isinstance(first, Mapping) and first.get("role") == "system" else None
