"""One call of a tool and one answer, written as each family of models writes it."""

from __future__ import annotations

from typing import Any

from tp_runtime.text.tool_calls import ToolFormat

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "the name of a place"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "detail": {"type": "object", "properties": {"wind": {"type": "boolean"}}, "required": ["wind"]},
    },
    "required": ["city", "days"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS: dict[str, Any] = {"city": "Saint-Étienne", "days": 3, "detail": {"wind": True}}
_JSON = '{"city": "Saint-Étienne", "days": 3, "detail": {"wind": true}}'
_NAMED = f'{{"name": "get_weather", "arguments": {_JSON}}}'
_COHERE = f'[{{"tool_name": "get_weather", "parameters": {_JSON}}}]'
_DEEPSEEK_BEGIN, _DEEPSEEK_END = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
_XML = (
    "<function=get_weather>\n<parameter=city>\nSaint-Étienne\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    '<parameter=detail>\n{"wind": true}\n</parameter>\n</function>\n'
)

# What a template of the family shows, and the call as it writes it.
ANSWERS: dict[str, tuple[str, str]] = {
    "functiongemma": (
        "{{ '<start_function_call>' }}",
        "<start_function_call>call:get_weather{city:<escape>Saint-Étienne<escape>,days:3,detail:{wind:true}}"
        "<end_function_call>",
    ),
    "gemma4": (
        "{{ '<|tool_call>call:' }}",
        '<|tool_call>call:get_weather{city:<|"|>Saint-Étienne<|"|>,days:3,detail:{wind:true}}<tool_call|>',
    ),
    "deepseek-v3": (
        "<｜tool▁calls▁begin｜>```json",
        f"{_DEEPSEEK_BEGIN}function<｜tool▁sep｜>get_weather\n```json\n{_JSON}\n```{_DEEPSEEK_END}",
    ),
    "deepseek-v3.1": (
        "<｜tool▁calls▁begin｜>",
        f"{_DEEPSEEK_BEGIN}get_weather<｜tool▁sep｜>{_JSON}{_DEEPSEEK_END}",
    ),
    "mistral-args": ("[TOOL_CALLS][ARGS]", f"[TOOL_CALLS]get_weather[ARGS]{_JSON}"),
    "mistral": ("[TOOL_CALLS]", f"[TOOL_CALLS][{_NAMED}]"),
    "command-r7b": ("<|START_ACTION|>", f"<|START_ACTION|>{_COHERE}<|END_ACTION|>"),
    "command-r": ('Action: "tool_name"', f"Action: ```json\n{_COHERE}\n```"),
    "lfm2": (
        "<|tool_list_start|>",
        "<|tool_call_start|>[get_weather(city='Saint-Étienne', days=3, detail={\"wind\": true})]<|tool_call_end|>",
    ),
    "lfm2.5": ("<|tool_call_start|>", f"<|tool_call_start|>[{_NAMED}]<|tool_call_end|>"),
    "lfm2.5-instruct": (
        "List of tools: [",
        '<|tool_call_start|>[get_weather(city="Saint-Étienne", days=3, detail={"wind": True})]<|tool_call_end|>',
    ),
    "functools": ("functools[", f"functools[{_NAMED}]"),
    "nemotron": ("<TOOLCALL>", f"<TOOLCALL>[{_NAMED}]</TOOLCALL>"),
    "apriel": ("<tool_calls>", f"<tool_calls>[{_NAMED}]</tool_calls>"),
    "granite": ("<|tool_call|>", f"<|tool_call|>[{_NAMED}]"),
    "phi4": ("<|tool|>", f"<|tool_call|>[{_NAMED}]<|/tool_call|>"),
    "glm": (
        "<tool_call><arg_key><arg_value>",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Saint-Étienne</arg_value>\n<arg_key>days</arg_key>"
        '\n<arg_value>3</arg_value>\n<arg_key>detail</arg_key>\n<arg_value>{"wind": true}</arg_value>\n</tool_call>',
    ),
    "seed": ("<seed:tool_call><function=<parameter=", f"<seed:tool_call>\n{_XML}</seed:tool_call>"),
    "minicpm": (
        '<function name="<param name="',
        '<function name="get_weather"><param name="city">Saint-Étienne</param><param name="days">3</param>'
        "<param name=\"detail\">{'wind': True}</param></function>",
    ),
    "qwen-xml": ("<tool_call><function=<parameter=", f"<tool_call>\n{_XML}</tool_call>"),
    "hermes": ("<tool_call>", f"<tool_call>\n{_NAMED}\n</tool_call>"),
    "functionary": ("<function=</function>", f"<function=get_weather>{_JSON}</function>"),
    "llama3": ('ipython "parameters": ', f'{{"name": "get_weather", "parameters": {_JSON}}}'),
    "json": ("{{ tools }}", _NAMED),
}


def form_of(family: str, special_ids: dict[str, int] | None = None) -> ToolFormat:
    return ToolFormat(family, special_ids or {})
