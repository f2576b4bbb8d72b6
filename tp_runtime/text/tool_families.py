"""Families of models by the notation in which they write calls: what their templates show, and what reads a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .tool_arguments import braces, llama, python_list, tagged
from .tool_json import Reader, json_after_name, json_between, whole_answer


@dataclass(frozen=True)
class Layout:
    """How a family writes calls whose arguments are JSON, so that a grammar can ask for it.

    Attributes:
        opening: the text in front of a tool's name.
        middle: the text between the name and the arguments.
        closing: the text after the arguments.
        separator: the text between two calls.
        section: the text in front of all calls.
        section_end: the text after all calls.
    """

    opening: str
    middle: str
    closing: str
    separator: str = ""
    section: str = ""
    section_end: str = ""


@dataclass(frozen=True)
class Braces:
    """How Gemma's models write calls, with the arguments in braces of their own.

    Attributes:
        opening: the text in front of a tool's name.
        closing: the text after the arguments.
        quote: the marker on both sides of text.
    """

    opening: str
    closing: str
    quote: str


@dataclass(frozen=True)
class Tags:
    """How a family writes calls whose arguments are text between tags.

    Attributes:
        opening: the text in front of a tool's name.
        middle: the text between the name and the arguments.
        closing: the text after the arguments.
        key: the text in front of an argument's name.
        value: the text between an argument's name and its value.
        value_end: the text after a value.
    """

    opening: str
    middle: str
    closing: str
    key: str
    value: str
    value_end: str


@dataclass(frozen=True)
class Notation:
    """The notation of one family.

    Attributes:
        family: its name.
        shown_by: texts of which a template of this family holds all.
        openings: texts that calls begin with.
        read: the reader of calls that begin with an opening.
        markers: texts that the family's tokenizers have as tokens of their own.
        layout: how a grammar writes calls; `Braces` and `Tags` are for arguments that are not JSON.
        bare: whether calls can also be the whole answer, as JSON without an opening.
    """

    family: str
    shown_by: tuple[str, ...]
    openings: tuple[str, ...]
    read: Reader
    markers: tuple[str, ...]
    layout: Layout | Braces | Tags
    bare: bool = False


def _in_object(before: str = "", after: str = "", name: str = "name", arguments: str = "arguments") -> Layout:
    return Layout(f'{before}{{"{name}": "', f'", "{arguments}": ', f"}}{after}", "\n")


def _in_list(section: str, section_end: str = "", name: str = "name", arguments: str = "arguments") -> Layout:
    return Layout(f'{{"{name}": "', f'", "{arguments}": ', "}", ", ", f"{section}[", f"]{section_end}")


_DEEPSEEK = tuple(f"<｜tool▁{part}｜>" for part in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"))
_SECTION, _CALL, _SEP, _CALL_END, _SECTION_END = _DEEPSEEK
_XML_ARGUMENT = r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>"

_XML_TAGS = ("<parameter=", ">\n", "\n</parameter>\n")

FUNCTION_GEMMA = Notation(
    "functiongemma",
    ("<start_function_call>",),
    ("<start_function_call>call:",),
    braces("<start_function_call>call:", "<end_function_call>", "<escape>"),
    ("<start_function_call>", "<end_function_call>", "<escape>"),
    Braces("<start_function_call>call:", "<end_function_call>", "<escape>"),
)
GEMMA_4 = Notation(
    "gemma4",
    ("<|tool_call>call:",),
    ("<|tool_call>call:",),
    braces("<|tool_call>call:", "<tool_call|>", '<|"|>'),
    ("<|tool_call>", "<tool_call|>", '<|"|>'),
    Braces("<|tool_call>call:", "<tool_call|>", '<|"|>'),
)
DEEPSEEK_V3 = Notation(
    "deepseek-v3",
    (_SECTION, "```json"),
    (_SECTION,),
    json_after_name(f"{_CALL}function{_SEP}", "\n```json", f"```{_CALL_END}", _SECTION, _SECTION_END),
    _DEEPSEEK,
    Layout(f"{_CALL}function{_SEP}", "\n```json\n", f"\n```{_CALL_END}", "\n", _SECTION, _SECTION_END),
)
DEEPSEEK_V31 = Notation(
    "deepseek-v3.1",
    (_SECTION,),
    (_SECTION,),
    json_after_name(_CALL, _SEP, _CALL_END, _SECTION, _SECTION_END),
    _DEEPSEEK,
    Layout(_CALL, _SEP, _CALL_END, "", _SECTION, _SECTION_END),
)
MISTRAL_ARGS = Notation(
    "mistral-args",
    ("[TOOL_CALLS]", "[ARGS]"),
    ("[TOOL_CALLS]",),
    json_after_name("[TOOL_CALLS]", "[ARGS]"),
    ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    Layout("[TOOL_CALLS]", "[ARGS]", ""),
)
MISTRAL = Notation(
    "mistral",
    ("[TOOL_CALLS]",),
    ("[TOOL_CALLS]",),
    json_between("[TOOL_CALLS]"),
    ("[TOOL_CALLS]",),
    _in_list("[TOOL_CALLS]"),
)
COMMAND_R7B = Notation(
    "command-r7b",
    ("<|START_ACTION|>",),
    ("<|START_ACTION|>",),
    json_between("<|START_ACTION|>", "<|END_ACTION|>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    _in_list("<|START_ACTION|>", "<|END_ACTION|>", "tool_name", "parameters"),
)
COMMAND_R = Notation(
    "command-r",
    ("Action:", '"tool_name"'),
    ("Action:```json", "Action: ```json"),
    json_between("```json", "```"),
    (),
    _in_list("Action: ```json\n", "\n```", "tool_name", "parameters"),
)
LFM = Notation(
    "lfm2",
    ("<|tool_list_start|>",),
    ("<|tool_call_start|>",),
    python_list("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    # A grammar asks for JSON, which these models write too: a schema says nothing of literals of Python.
    _in_list("<|tool_call_start|>", "<|tool_call_end|>"),
)
LFM_TAGS = replace(LFM, family="lfm2.5", shown_by=("<|tool_call_start|>",))
LFM_LIST = replace(LFM, family="lfm2.5-instruct", shown_by=("List of tools: [",))
FUNCTOOLS = Notation("functools", ("functools[",), ("functools",), json_between("functools"), (), _in_list("functools"))
NEMOTRON = Notation(
    "nemotron",
    ("<TOOLCALL>",),
    ("<TOOLCALL>",),
    json_between("<TOOLCALL>", "</TOOLCALL>"),
    ("<TOOLCALL>", "</TOOLCALL>"),
    _in_list("<TOOLCALL>", "</TOOLCALL>"),
)
APRIEL = Notation(
    "apriel",
    ("<tool_calls>",),
    ("<tool_calls>",),
    json_between("<tool_calls>", "</tool_calls>"),
    ("<tool_calls>", "</tool_calls>"),
    _in_list("<tool_calls>", "</tool_calls>"),
)
GRANITE = Notation(
    "granite",
    ("<|tool_call|>",),
    ("<|tool_call|>",),
    json_between("<|tool_call|>"),
    ("<|tool_call|>",),
    _in_list("<|tool_call|>"),
)
PHI = Notation(
    "phi4",
    ("<|tool|>",),
    ("<|tool_call|>",),
    json_between("<|tool_call|>", "<|/tool_call|>"),
    ("<|tool_call|>", "<|/tool_call|>"),
    _in_list("<|tool_call|>", "<|/tool_call|>"),
)
GLM = Notation(
    "glm",
    ("<tool_call>", "<arg_key>", "<arg_value>"),
    ("<tool_call>",),
    tagged(
        "<tool_call>",
        r"\s*([^<\n]+)",
        # A group that could run past the end of a key would be tried with every later end of one.
        r"\s*<arg_key>([^<]*(?:<(?!/arg_key>)[^<]*)*)</arg_key>\s*<arg_value>(.*?)</arg_value>",
        r"\s*</tool_call>",
    ),
    ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    Tags("<tool_call>", "\n", "</tool_call>", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
)
SEED = Notation(
    "seed",
    ("<seed:tool_call>", "<function=", "<parameter="),
    ("<seed:tool_call>",),
    tagged("<seed:tool_call>", r"\s*<function=([^>\n]+)>", _XML_ARGUMENT, r"\s*</function>\s*</seed:tool_call>"),
    ("<seed:tool_call>", "</seed:tool_call>"),
    Tags("<seed:tool_call>\n<function=", ">\n", "</function>\n</seed:tool_call>", *_XML_TAGS),
)
MINICPM = Notation(
    "minicpm",
    ('<function name="', '<param name="'),
    ('<function name="',),
    tagged('<function name="', r'([^"\n]+)">', r'\s*<param name="([^"\n]+)">(.*?)</param>', r"\s*</function>"),
    (),
    Tags('<function name="', '">', "</function>", '<param name="', '">', "</param>"),
)
QWEN_XML = Notation(
    "qwen-xml",
    ("<tool_call>", "<function=", "<parameter="),
    ("<tool_call>",),
    tagged("<tool_call>", r"\s*<function=([^>\n]+)>", _XML_ARGUMENT, r"\s*</function>\s*</tool_call>"),
    ("<tool_call>", "</tool_call>"),
    Tags("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", *_XML_TAGS),
)
HERMES = Notation(
    "hermes",
    ("<tool_call>",),
    ("<tool_call>",),
    json_between("<tool_call>", "</tool_call>"),
    ("<tool_call>", "</tool_call>"),
    _in_object("<tool_call>\n", "\n</tool_call>"),
)
FUNCTIONARY = Notation(
    "functionary",
    ("<function=", "</function>"),
    ("<function=",),
    json_after_name("<function=", ">", "</function>"),
    (),
    Layout("<function=", ">", "</function>"),
)
LLAMA = Notation(
    "llama3",
    ("ipython", '"parameters": '),
    ("<|python_tag|>",),
    llama("<|python_tag|>"),
    ("<|python_tag|>",),
    _in_object(arguments="parameters"),
    bare=True,
)
PLAIN = Notation("json", (), (), whole_answer, (), _in_object(), bare=True)

NOTATIONS = (
    FUNCTION_GEMMA,
    GEMMA_4,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    MISTRAL_ARGS,
    MISTRAL,
    COMMAND_R7B,
    COMMAND_R,
    LFM,
    LFM_TAGS,
    LFM_LIST,
    FUNCTOOLS,
    NEMOTRON,
    APRIEL,
    GRANITE,
    PHI,
    GLM,
    SEED,
    MINICPM,
    QWEN_XML,
    HERMES,
    FUNCTIONARY,
    LLAMA,
    PLAIN,
)
"""Every notation. A template is of the first family whose texts it shows; `PLAIN` is for templates that show none."""

BY_FAMILY = {notation.family: notation for notation in NOTATIONS}
