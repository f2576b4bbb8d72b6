"""The chat template of a model folder: this module compiles it in a sandbox, with the functions that templates call."""

from __future__ import annotations

import json
from datetime import datetime

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ModelFormatError


class TemplateRefusal(jinja2.TemplateError):
    """The error that a template raises with its own `raise_exception`."""


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
        ModelFormatError: the text is not valid Jinja.
    """

    def raise_exception(message: str) -> None:
        raise TemplateRefusal(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML characters, and the model was not trained on escaped text.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelFormatError(
            f"the chat template is not valid Jinja: {error}",
            field=field,
            got=f"line {getattr(error, 'lineno', '?')}",
            wanted="a template that transformers accepts",
            fix='restore the template from the model\'s source, or use style="completion"',
        ) from None
