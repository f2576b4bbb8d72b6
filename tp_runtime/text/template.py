"""The chat template of a model folder: this module compiles it in a sandbox, and fills it in.

A template is a program by the model's author, so it can fail in any way. It is an error of the request if the template
can fill in an ordinary message, and otherwise an error of the template.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from ..errors import ModelFormatError, RequestError, library_errors, library_text, shown
from .tools import NO_VARIABLES, TemplateVariables

_LONGEST_TEXT = 1 << 24  # characters; several times the longest context window
_MOST_STEPS = 1 << 22  # of all loops together; this takes seconds
_MOST_BITS = 1 << 12  # of an integer that a template computes
_COUNTED = "counted"  # the name of the filter around the values of every loop
_ORDINARY = ({"role": "user", "content": "a"},)


# The number of loop steps that filling in a template has taken so far.
_steps: ContextVar[Iterator[int]] = ContextVar("steps")


class _TemplateRefusal(jinja2.TemplateError):
    """The error that a template raises with its own `raise_exception`."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products and powers that would fill the memory, as jinja2's sandbox refuses long ranges.

    This also keeps jinja2 from computing them while it compiles the template.
    """

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of `left * right` or `left ** right`.

        Raises:
            OverflowError: the text or the list is too long, or the integer is too large.
        """
        size, most = 0, _MOST_BITS
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            size = bits + right.bit_length() if operator == "*" else bits * max(right, 0)
        elif operator == "*" and isinstance(left, int) and hasattr(right, "__len__"):
            size, most = left * len(right), _LONGEST_TEXT
        elif operator == "*" and isinstance(right, int) and hasattr(left, "__len__"):
            size, most = right * len(left), _LONGEST_TEXT
        if size > most:
            raise OverflowError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """The block `{% generation %}`, which marks the assistant's text for training. Here it only yields its content."""

    tags = {"generation"}  # noqa: RUF012 - the attribute jinja2 declares

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block and return its content, in a separate scope as in transformers."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compile_template(source: str, field: str) -> jinja2.Template:
    """Compile a chat template in an immutable sandbox.

    Args:
        source: the text of the template.
        field: the field at fault, for the error.

    Raises:
        ModelFormatError: the text is not valid Jinja, or is nested too deep.
    """

    def raise_exception(message: object) -> None:
        raise _TemplateRefusal(str(message))

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML characters, and the model was not trained on escaped text.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters[_COUNTED] = _counted
    del environment.globals["lipsum"]  # jinja2's text for placeholders can be of any length
    with library_errors(
        ModelFormatError,
        "the chat template is not valid Jinja",
        field=field,
        wanted="a template that transformers accepts",
        fix='restore the template from the model\'s source, or use style="completion"',
        also=(MemoryError,),  # this is how Python's parser reports an expression that is nested too deep
    ):
        tree = environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            value = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
            loop.iter = value.set_environment(environment)
        code = environment.compile(tree)
        return environment.template_class.from_code(environment, code, environment.make_globals(None))


@jinja2.pass_context  # jinja2 computes filters of constants while it compiles, except those that need the context
def _counted(_context: Context, values: Iterable[Any]) -> Iterator[Any]:
    """Yield the values that a loop goes through.

    Raises:
        OverflowError: the loops of the template have taken too many steps.
    """
    steps = _steps.get()
    for value in values:
        if next(steps) >= _MOST_STEPS:
            raise OverflowError(f"the loops take more than {_MOST_STEPS} steps")
        yield value


def fill_template(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool,
    variables: TemplateVariables = NO_VARIABLES,
) -> str:
    """Return the text of a chat.

    Args:
        template: the template, as `compile_template` returns it.
        messages: the chat, as `checked_messages` returns it.
        special_tokens: the special tokens by name, which are variables of the template.
        add_generation_prompt: whether the text ends with the beginning of the assistant's message.
        variables: the tools, the documents and the further variables of the request.

    Raises:
        RequestError: the template refuses these messages, cannot fill them in, or takes a list of parts for text.
        ModelFormatError: the template tries to leave its sandbox, or it cannot fill in an ordinary message either.
    """
    try:
        text = _filled(template, messages, special_tokens, add_generation_prompt, variables)
    except _TemplateRefusal as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"the chat template refuses this prompt: {reason}", field="messages") from None
    except SecurityError as error:
        raise ModelFormatError(
            f"the chat template tries to leave its sandbox: {library_text(error)}",
            field="chat_template",
            fix="do not use this model folder unless you know why its template does this",
        ) from None
    except Exception as error:
        reason = library_text(error)
        # A template for tools may fail without any, so that with tools nothing tells whose fault it is.
        if variables == NO_VARIABLES and not _fills_in_an_ordinary_message(template, special_tokens):
            raise ModelFormatError(
                f"the chat template cannot render any prompt: {reason}",
                field="chat_template",
                fix='restore the template from the model\'s source, or use style="completion"',
            ) from error
        raise RequestError(
            f"the chat template cannot render this prompt: {reason}",
            field="messages",
            fix="use the roles, keys and kinds of content that this model's template knows",
        ) from error
    _check_parts_were_read(text, messages)
    return text


def _check_parts_were_read(text: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Check that the template did not print a list of parts as Python prints it, which no model was trained on.

    Raises:
        RequestError: the text holds the parts of a message in Python's notation.
    """
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and str(content) in text:
            raise RequestError(
                "the model's chat template takes content as text, not as parts",
                field=f"messages[{i}].content",
                got=shown(content),
                wanted="str",
                fix="pass the text of the parts as one string",
            )


def _fills_in_an_ordinary_message(template: jinja2.Template, special_tokens: Mapping[str, Any]) -> bool:
    """Return whether the template works on one short user message, or refuses it for a reason of its own."""
    try:
        _filled(template, _ORDINARY, special_tokens, True, NO_VARIABLES)
    except _TemplateRefusal:
        return True
    except Exception:
        return False
    return True


def _filled(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool,
    variables: TemplateVariables,
) -> str:
    _steps.set(itertools.count())
    parts, size = [], 0
    # tools and documents are None and not undefined, because templates test `tools is not none`.
    for part in template.generate(
        {**special_tokens, **variables.args},
        messages=messages,
        tools=variables.tools,
        documents=variables.documents,
        add_generation_prompt=add_generation_prompt,
    ):
        size += len(part)
        if size > _LONGEST_TEXT:
            raise OverflowError(f"the text has more than {_LONGEST_TEXT} characters")
        parts.append(part)
    text = "".join(parts)
    text.encode()  # a template can write half of a surrogate pair, which is no text
    return text
