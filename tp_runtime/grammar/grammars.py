"""Compiles what a request asks for into a grammar, once, and hands out a constraint for each completion."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import RequestError, library_errors, shown
from .deep_stack import on_deep_stack
from .json_schema import lower_schema, schema_text
from .lark import check_lark
from .library import llguidance
from .matcher import GrammarConstraint
from .pattern import translate
from .problems import has_a_place, refused, same_kind
from .vocabulary import TokenizerSource, Vocabulary

_KEPT = 16  # the number of compiled grammars that are kept: an application has a few schemas and uses them again
_LONGEST = 1_000_000  # characters of a schema, an expression or a grammar

_SEARCH_S = 2.0  # seconds to look for the part of a schema that llguidance refused

# A state of the lexer takes 1 to 2 kB, and text that the model writes makes new ones: the default, 250,000, is 500 MB.
_LIMITS = {"max_lexer_states": 50_000, "verbose_errors": False}


class Grammar:
    """A compiled constraint. It does not change, and threads share it.

    Args:
        matcher: an `LLMatcher` at its beginning; only copies of it are moved.
        vocabulary: the ids of the model.
        field: the argument that the grammar came from, for errors.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary, field: str) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._field = field

    def constraint(self) -> GrammarConstraint:
        """Return the constraint of one completion, at its beginning. A copy takes 10 to 100 microseconds."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, self._field)


class Grammars:
    """The grammars of one model, compiled on demand. Threads share one object.

    Args:
        tokenizer: the tokenizer of the model.
        eos_ids: the ids that end a completion.
        width: the number of logits.
    """

    def __init__(self, tokenizer: TokenizerSource, eos_ids: Iterable[int], width: int) -> None:
        self._vocabulary = Vocabulary(tokenizer, eos_ids, width)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def compile(
        self,
        *,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ) -> Grammar:
        """Compile one of the three kinds of constraint.

        Args:
            json_schema: a JSON schema, as an object or as JSON text. The completion is one JSON value without white
                space around it, written in one line with ", " and ": " as separators.
            regex: an expression that the whole completion matches.
            grammar: a grammar in llguidance's variant of Lark, whose rule `start` the completion is.

        Returns:
            The grammar. The last few are kept, so that the same constraint is compiled once.

        Raises:
            RequestError: not exactly one kind is given, or what is given is malformed, is not supported, or is too
                large; the error's field names the part.
            ModelFormatError: the tokenizer cannot be used.
        """
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        named = {field: value for field, value in given.items() if value is not None}
        if len(named) != 1:
            raise RequestError(
                "a completion has exactly one constraint",
                field="json_schema",
                got=" and ".join(named) or "none",
                wanted="one of json_schema, regex and grammar",
            )
        ((field, value),) = named.items()
        text = schema_text(value, field) if field == "json_schema" else _text(value, field)
        if len(text) > _LONGEST:
            raise RequestError(
                "the constraint is too large",
                field=field,
                got=f"{len(text)} characters",
                wanted=f"at most {_LONGEST}",
                fix="ask for less at once",
            )
        with self._lock:
            if found := self._kept.get((field, text)):
                self._kept.move_to_end((field, text))
                return found
        matcher = on_deep_stack(_COMPILERS[field], text, self._vocabulary)
        made = Grammar(matcher, self._vocabulary, field)
        with self._lock:
            self._kept[field, text] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError("the constraint is not a text", field=field, got=shown(value), wanted="str, not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        got, wanted = repr(value[error.start]), "no lone surrogates"
        raise RequestError("the text is not valid Unicode", field=field, got=got, wanted=wanted) from None
    return value


def _compile_schema(text: str, vocabulary: Vocabulary) -> Any:
    library = llguidance("json_schema")
    lowered = lower_schema(text, "json_schema")
    tree = vocabulary.tree("json_schema")
    matcher, problem = _matcher(library, tree, _json_grammar(library, lowered.text()))
    if problem is None:
        return matcher
    if has_a_place(problem):
        # llguidance does not say where in the schema its problem lies. The smallest part that fails alone is the place.
        deadline = time.monotonic() + _SEARCH_S
        for path, part, text_of_part in lowered.parts():
            _, cause = _matcher(library, tree, _json_grammar(library, text_of_part))
            if cause is not None and same_kind(cause, problem):
                raise refused(cause, path, part)
            if time.monotonic() > deadline:
                break
    raise refused(problem, "json_schema")


def _json_grammar(library: Any, schema: str) -> str:
    wanted, fix = "at most 50 levels of objects", "move inner parts to $defs"
    with library_errors(RequestError, "the schema is nested too deep", field="json_schema", wanted=wanted, fix=fix):
        return str(library.LLMatcher.grammar_from_json_schema(schema))


def _compile_regex(text: str, vocabulary: Vocabulary) -> Any:
    library = llguidance("regex")
    return _compiled(library, library.LLMatcher.grammar_from_regex(translate(text, "regex")), vocabulary, "regex")


def _compile_lark(text: str, vocabulary: Vocabulary) -> Any:
    library = llguidance("grammar")
    return _compiled(library, library.LLMatcher.grammar_from_lark(check_lark(text, "grammar")), vocabulary, "grammar")


def _compiled(library: Any, grammar: str, vocabulary: Vocabulary, field: str) -> Any:
    matcher, problem = _matcher(library, vocabulary.tree(field), grammar)
    if problem is not None:
        raise refused(problem, field)
    return matcher


_COMPILERS: dict[str, Callable[[str, Vocabulary], Any]] = {
    "json_schema": _compile_schema,
    "regex": _compile_regex,
    "grammar": _compile_lark,
}


def _matcher(library: Any, tree: Any, grammar: str) -> tuple[Any, str | None]:
    """Compile a grammar of llguidance.

    Returns:
        The matcher, and what llguidance says is wrong; None if nothing is. A warning counts as an error: it says that
        a part of the constraint was dropped.
    """
    matcher = library.LLMatcher(tree, grammar, log_level=0, limits=library.LLParserLimits(**_LIMITS))
    if not matcher.is_error():
        if warnings := matcher.get_grammar_warnings():
            return matcher, str(warnings[0])
        # Some limits are only met when the first mask is computed.
        probe = matcher.deep_copy()
        probe.compute_bitmask()
        if not probe.is_error():
            if probe.is_stopped() and not probe.is_accepting():
                return matcher, "no text satisfies the constraint"
            return matcher, None
        matcher = probe
    return matcher, str(matcher.get_error())
