"""Text to token ids and back: the tokenizer.json and the chat template of one model folder.

Knows nothing of graphs, patches or sampling. The ids are those of transformers: of `apply_chat_template` in
chat style, of a tokenizer called on plain text in completion style. The tests hold it against transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from tokenizers import Tokenizer

from ..errors import ModelFormatError, RequestError
from ..storage import read_json_object

Style = Literal["chat", "completion"]
Message = Mapping[str, Any]
_T = TypeVar("_T")

_FIX = "export the model again, or copy the file from its source"

# The names transformers hands to a template; one that is not set stays undefined there and here.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextCodec:
    """The tokenizer and chat template of one model folder.

    Attributes:
        style: "chat" (a string is one user message) or "completion" (a string is the text itself).
        eos_ids: every token id that ends a completion.
        bos_id: id of the beginning-of-sequence token, None if the model names none.
        template_source: the chat template's text, None in completion style.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        style: Style,
        eos_ids: frozenset[int],
        special_tokens: Mapping[str, Any],
        template: jinja2.Template | None,
        template_source: str | None = None,
    ) -> None:
        self.style: Style = style
        self.eos_ids = eos_ids
        self.bos_id: int | None = tokenizer.token_to_id(special_tokens.get("bos_token", ""))
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._template = template
        self.template_source = template_source
        # What the tokenizer puts before a text. What it may put after one, an EOS, would end a prompt that is
        # there to be continued.
        probe = tokenizer.encode("a")
        self._prefix: list[int] = probe.ids[: [*probe.special_tokens_mask, 0].index(0)]

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows, counted anew; the graph's logits may be wider (padding rows)."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    @classmethod
    def from_folder(cls, path: str | Path, style: Style | None = None) -> TextCodec:
        """Reads the tokenizer and template of a Hugging Face or exported folder.

        Args:
            path: folder with tokenizer.json and tokenizer_config.json, and what there is of
                chat_template.jinja, generation_config.json and config.json.
            style: how a string prompt is meant; None takes "chat" where the folder has a chat template.

        Raises:
            ModelFormatError: a file is missing, cannot be read, or contradicts another; style is "chat" and
                there is no template; nothing names an end-of-sequence token.
            RequestError: style is none of the known ones.
        """
        if style not in ("chat", "completion", None):
            raise RequestError("unknown style", field="style", got=repr(style), wanted="chat or completion")
        folder = Path(path)
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path)
        _check_added_tokens(tokenizer, config, config_path)
        special_tokens = _read_special_tokens(tokenizer, config, config_path)
        source = _read_template(folder, config)
        style = style or ("completion" if source is None else "chat")
        template = None
        if style == "chat":
            if source is None:
                raise ModelFormatError(
                    "the model has no chat template",
                    field=str(config_path),
                    wanted="chat_template, or chat_template.jinja beside it",
                    fix='use style="completion"',
                )
            template = _compile_template(source, str(folder))
        return cls(
            tokenizer,
            style=style,
            eos_ids=_read_eos_ids(folder, tokenizer, special_tokens),
            special_tokens=special_tokens,
            template=template,
            template_source=None if template is None else source,
        )

    def render(
        self,
        messages: Sequence[Message] | str,
        system: str | None = None,
        *,
        raw: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Turns a prompt into token ids.

        Chat style: the template over the messages (a string is one user message, `system` a system message in
        front). Completion style: `[bos] + context + query`, where the context is `system` and exactly one
        newline. The two are tokenised apart, so the query's ids are the same with and without a context.

        Args:
            messages: a string, or in chat style also a list of {"role", "content"}.
            system: system message, or context of a completion.
            raw: encode the string as it is, also in chat style.
            add_generation_prompt: whether the template opens the assistant's turn; plain text has no turns.

        Returns:
            Token ids, at least one.

        Raises:
            RequestError: the prompt is empty, malformed, does not fit the style, or the template refuses it.
        """
        if system is not None and not isinstance(system, str):
            raise RequestError("not a string", field="system", got=type(system).__name__, wanted="str")
        if raw and system is not None:
            raise RequestError(
                "raw text takes no system prompt",
                field="system",
                got=repr(system[:40]),
                wanted="None",
                fix="put the text in front of the prompt yourself, or drop raw=True",
            )
        if not raw and self._template is not None:
            chat = _as_messages(messages, system)
            ids = self._encode(self._fill(self._template, chat, add_generation_prompt), "messages")
        else:
            if not isinstance(messages, str):
                raise RequestError(
                    "raw text is a string" if raw else "a completion-style model takes no messages",
                    field="messages",
                    got=type(messages).__name__,
                    wanted="str",
                    fix="drop raw=True" if raw else 'pass the text itself, or load with style="chat"',
                )
            if not messages.strip():
                raise _empty("messages", repr(messages[:40]))
            ids = list(self._prefix)
            if system is not None:
                if not system.strip():
                    raise _empty("system", repr(system[:40]), fix="pass None for no context")
                ids += self._encode(system.rstrip("\n") + "\n", "system")
            ids += self._encode(messages, "messages")
        if not ids:
            raise _empty("messages", "a prompt of no tokens")
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turns token ids into the text they stand for.

        `clean_up_tokenization_spaces` of the tokenizer config is not applied: it rewrites what was generated
        ("a ." becomes "a."), and a streamed text could not be the text decoded at once.
        """
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _encode(self, text: str, field: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "not valid Unicode", field=field, got=repr(text[error.start]), wanted="no lone surrogates"
            ) from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _fill(self, template: jinja2.Template, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            # tools and documents are None, not undefined: templates ask `tools is not none`.
            return template.render(
                self._special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _TemplateRefusal as error:
            raise RequestError(f"the chat template refuses this: {error}", field="messages") from None
        except SecurityError as error:
            raise ModelFormatError(
                f"the chat template leaves its sandbox: {error}",
                field="chat_template",
                fix="do not use this model folder unless you know why it does so",
            ) from None
        # A template is a program of the model's author: on messages it did not foresee it fails in any way.
        except Exception as error:
            raise RequestError(
                f"the chat template cannot render this: {type(error).__name__}: {error}",
                field="messages",
                fix="use the roles and keys this model's template knows",
            ) from error


class _TemplateRefusal(jinja2.TemplateError):
    """What a template's own `raise_exception` raises."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the attribute jinja2 declares

    def parse(self, parser: Parser) -> nodes.Node:
        """Reads the block and keeps what is in it, in a scope of its own as transformers has it."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _compile_template(source: str, field: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise _TemplateRefusal(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML characters, which the model was not trained on.
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
            wanted="a template transformers would accept",
            fix='restore the template from the model\'s source, or use style="completion"',
        ) from None


def _as_messages(messages: Sequence[Message] | str, system: str | None) -> list[Message]:
    """The checked messages with `system` in front; raises RequestError."""
    if not isinstance(messages, Sequence):
        got = type(messages).__name__
        raise RequestError("not a prompt", field="messages", got=got, wanted="str or list of messages")
    chat: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    for i, message in enumerate(chat):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                got, wanted = repr(message)[:60], '{"role": str, "content": str}'
                raise RequestError("malformed message", field=f"messages[{i}].{key}", got=got, wanted=wanted)
    if not chat:
        raise _empty("messages", "no messages")
    if not chat[-1]["content"].strip():
        raise _empty("messages", f"last content {chat[-1]['content'][:40]!r}")
    if system is None:
        return chat
    if chat[0]["role"] == "system":
        problem, fix = "the messages already begin with a system message", "give the system prompt once"
        raise RequestError(problem, field="system", got=repr(system[:40]), wanted="None", fix=fix)
    return [{"role": "system", "content": system}, *chat]


def _empty(field: str, got: str, fix: str = "pass some text") -> RequestError:
    return RequestError("empty prompt", field=field, got=got, wanted="text that is not blank", fix=fix)


def _broken(path: Path, problem: str, got: object, wanted: str) -> ModelFormatError:
    return ModelFormatError(problem, field=str(path), got=got, wanted=wanted, fix=_FIX)


def _read_text(path: Path) -> str:
    return _read(path, lambda: path.read_text(encoding="utf-8"))


def _read(path: Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except FileNotFoundError:
        raise _broken(path, "missing file", got="nothing", wanted="the file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, "cannot be read", got=error, wanted="UTF-8 text") from None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, ModelFormatError, _FIX, lenient=True)


def _read_tokenizer(path: Path) -> Tokenizer:
    content = _read(path, path.read_bytes)  # as text, Gemma's 33 MB would be decoded here and encoded again there
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise _broken(path, "not a tokenizer", got=error, wanted="a file of the tokenizers library") from None
    # Settings left over from training; transformers sets both anew for each call.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_special_tokens(tokenizer: Tokenizer, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The variables a template sees: name to text, and additional_special_tokens to a list of texts."""
    named = {name: config[name] for name in _SPECIAL if config.get(name) is not None}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    tokens: dict[str, Any] = {name: _token_text(value, name, path) for name, value in named.items()}
    name = "additional_special_tokens"
    if additional := config.get(name):
        if not isinstance(additional, list):
            raise _broken(path, f"{name} is malformed", got=additional, wanted="a list")
        tokens[name] = [_token_text(value, name, path) for value in additional]
    for name in ("bos_token", "eos_token"):
        if name in tokens and tokenizer.token_to_id(tokens[name]) is None:
            raise _broken(path, f"{name} is not in tokenizer.json", got=tokens[name], wanted="a known token")
    return tokens


def _token_text(value: Any, name: str, path: Path) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise _broken(path, f"{name} is not a token", got=value, wanted='str or {"content": str}')
    return text


def _check_added_tokens(tokenizer: Tokenizer, config: dict[str, Any], path: Path) -> None:
    # transformers would append a token that only the config knows, and give ids this tokenizer does not have.
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise _broken(path, "added_tokens_decoder is malformed", got=type(added).__name__, wanted="object")
    for index, value in added.items():
        text = _token_text(value, f"added_tokens_decoder[{index}]", path)
        known = tokenizer.token_to_id(text)
        if str(known) != index:
            raise _broken(path, f"{text!r} has another id in tokenizer.json", got=index, wanted=str(known))


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.exists():
        return _read_text(beside)
    template = value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        template = named.get("default")
    if value is not None and not isinstance(template, str):
        got, wanted = str(value)[:60], 'str, or a list with a template named "default"'
        raise _broken(folder / "tokenizer_config.json", "chat_template is malformed", got, wanted)
    return template


def _read_eos_ids(folder: Path, tokenizer: Tokenizer, special_tokens: Mapping[str, Any]) -> frozenset[int]:
    # A union: files of real models disagree, and to run past an end costs more than to stop at a second one.
    ids: set[int] = set()
    if "eos_token" in special_tokens:
        ids.add(tokenizer.token_to_id(special_tokens["eos_token"]))
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = _read_json(path).get("eos_token_id") if path.exists() else None
        found = [] if value is None else value if isinstance(value, list) else [value]
        for eos in found:
            if type(eos) is not int or eos < 0:
                raise _broken(path, "eos_token_id is malformed", got=value, wanted="an id or a list of ids")
        ids.update(found)
    if not ids:
        raise _broken(folder, "no end-of-sequence token", got="none", wanted="eos_token_id or eos_token")
    return frozenset(ids)
