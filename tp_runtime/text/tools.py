"""Tools, documents and further variables of a request's chat template: this module checks them.

Tools have OpenAI's form, which transformers' templates expect: a function's name, its description, and the JSON schema
of its arguments. What the schema says is for the template to print, and for a grammar to keep the model to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError, shown
from ..patch import ENTRIES_STAND
from .plain_values import plain_object, plain_objects
from .tokenizer_files import SPECIAL_TOKENS

_TOOL = '{"type": "function", "function": {"name": str, "description": str, "parameters": {...}}}'
_CHOICES = '"auto", "none", "required" or {"type": "function", "function": {"name": str}}'

# apply_chat_template of transformers keeps the first names for itself, so no template gets them from a caller. The last
# three are functions that every template can call, and a name that jinja2 keeps.
_KEPT = (
    "conversation messages tools documents add_generation_prompt chat_template continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "raise_exception strftime_now self"
)
_RESERVED = frozenset((*_KEPT.split(), *SPECIAL_TOKENS, "additional_special_tokens"))


@dataclass(frozen=True)
class TemplateVariables:
    """What a request passes to its chat template beside the messages, checked and copied.

    Attributes:
        tools: the tools; None if the request names none, which templates tell from an empty list.
        documents: the documents; None if the request names none.
        args: further variables by name.
    """

    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    args: dict[str, Any]

    def refuse_without_template(self, raw: bool) -> None:
        """Refuse what only a template can use, for a prompt that is encoded as it is.

        Args:
            raw: whether the request asks for that; otherwise the model is of completion style.

        Raises:
            RequestError: the request passes something to a template.
        """
        given = {"tools": self.tools, "documents": self.documents, "template_args": self.args or None}
        for field, value in given.items():
            if value is not None:
                where = "raw text has" if raw else "a completion-style model has"
                raise RequestError(
                    f"{where} no chat template that could use this",
                    field=field,
                    got=shown(value),
                    wanted="None",
                    fix="leave raw=True out" if raw else "write it into the prompt, or use a chat model",
                )

    @classmethod
    def of(
        cls,
        tools: object = None,
        documents: object = None,
        template_args: object = None,
        special_tokens: Iterable[str] = (),
    ) -> TemplateVariables:
        """Check what a request passes.

        Args:
            tools: a list of tools, or None.
            documents: a list of objects, or None; templates look for "title" and "text" in each.
            template_args: an object of further variables, or None.
            special_tokens: the names of the model's special tokens, which a caller does not set.

        Raises:
            RequestError: a value is malformed or not one of JSON, or a name of `template_args` is reserved.
        """
        return cls(
            None if tools is None else checked_tools(tools),
            None if documents is None else plain_objects(documents, "documents", "a list of objects with title, text"),
            {} if template_args is None else _checked_args(template_args, special_tokens),
        )


NO_VARIABLES = TemplateVariables(None, None, {})
"""What a request passes that names no tools, no documents and no variables."""


def checked_tools(tools: object) -> list[dict[str, Any]]:
    """Check tools and return copies of them.

    Raises:
        RequestError: the value is not a list of tools in OpenAI's form, two tools have one name, or a tool is a
            function of Python.
    """
    if isinstance(tools, Sequence):
        for i, tool in enumerate(tools):
            if callable(tool):
                raise RequestError(
                    "the tool is a function of Python, and the runtime does not read type hints and docstrings",
                    field=f"tools[{i}]",
                    got=shown(tool),
                    wanted=_TOOL,
                    fix="pass its JSON schema; transformers.utils.get_json_schema makes one where transformers is",
                )
    copies = plain_objects(tools, "tools", _TOOL)
    names: dict[str, int] = {}
    for i, tool in enumerate(copies):
        name = _checked_name(tool, f"tools[{i}]")
        if name in names:
            problem = f"tools[{names[name]}] has this name already, and a call could mean either"
            raise RequestError(problem, field=f"tools[{i}].function.name", got=shown(name), fix="rename one of them")
        names[name] = i
    return copies


def tool_names(tools: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of checked tools, in order."""
    return [tool["function"]["name"] for tool in tools]


def checked_tool_choice(tool_choice: object, tools: Sequence[Mapping[str, Any]] | None) -> str | dict[str, Any]:
    """Check which tools a request lets the model call.

    Args:
        tool_choice: "auto", "none", "required", or {"type": "function", "function": {"name": str}}.
        tools: the checked tools of the request.

    Returns:
        The choice; an object is copied.

    Raises:
        RequestError: the choice is none of these, or it wants a tool that the request does not have.
    """
    if isinstance(tool_choice, str) and tool_choice in ("auto", "none", "required"):
        if tool_choice == "required" and not tools:
            raise _no_tool("required", "at least one tool")
        return str(tool_choice)
    if not isinstance(tool_choice, Mapping):
        problem = "the choice of a tool is unknown"
        raise RequestError(problem, field="tool_choice", got=shown(tool_choice), wanted=_CHOICES)
    choice = plain_object(tool_choice, "tool_choice", _CHOICES)
    function = choice.get("function")
    if choice.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        problem = "the choice of a tool is malformed"
        raise RequestError(problem, field="tool_choice", got=shown(tool_choice), wanted=_CHOICES)
    names = tool_names(tools or ())
    if function["name"] not in names:
        raise _no_tool(function["name"], f"one of {shown(names)}" if names else "a tool of the request")
    return choice


def refuse_tools_and_documents(tools: object, documents: object) -> None:
    """Refuse tools and documents under a patch with entries, which stand where a template writes them.

    An empty list is refused too, because some templates write an introduction to the list before they go through it.

    Raises:
        RequestError: the request has tools or documents.
    """
    for field, value in (("tools", tools), ("documents", documents)):
        if value is not None:
            raise RequestError(
                f"the request has {field}, but {ENTRIES_STAND}",
                field=field,
                got=shown(value),
                wanted=f"a request without {field}",
                fix="leave them out, or use a patch of weights alone",
            )


def _checked_name(tool: dict[str, Any], path: str) -> str:
    function = tool.get("function")
    if tool.get("type", "function") != "function":
        problem = "the tool is not a function"
        raise RequestError(problem, field=f"{path}.type", got=shown(tool["type"]), wanted='"function"')
    if not isinstance(function, dict):
        fix = "put name, description and parameters into an object under the key function" if "name" in tool else ""
        raise RequestError("the tool is malformed", field=f"{path}.function", got=shown(tool), wanted=_TOOL, fix=fix)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RequestError("the tool has no name", field=f"{path}.function.name", got=shown(name), wanted="text")
    for key, kind, wanted in (("description", str, "text"), ("parameters", dict, "a JSON schema")):
        if not isinstance(function.get(key), kind | None):
            got = shown(function[key])
            raise RequestError("the tool is malformed", field=f"{path}.function.{key}", got=got, wanted=wanted)
    return name


def _checked_args(template_args: object, special_tokens: Iterable[str]) -> dict[str, Any]:
    args = plain_object(template_args, "template_args", 'variables of the template, e.g. {"enable_thinking": False}')
    reserved = _RESERVED.union(special_tokens)
    for name in args:
        if name in reserved:
            raise RequestError(
                "the runtime sets this variable of the template itself",
                field=f"template_args.{name}",
                got=shown(name),
                wanted="a variable of the template that is not reserved",
                fix=f"use the argument {name}=" if name in ("messages", "tools", "documents") else "leave it out",
            )
        if not name.isidentifier():
            problem = "a template has no variable of this name"
            raise RequestError(problem, field="template_args", got=shown(name), wanted="the name of a variable")
    return args


def _no_tool(name: str, wanted: str) -> RequestError:
    problem = "the request has no such tool" if name != "required" else "the request has no tools to call"
    return RequestError(problem, field="tool_choice", got=shown(name), wanted=wanted, fix="pass it in tools")
