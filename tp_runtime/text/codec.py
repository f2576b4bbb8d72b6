"""The codec converts text to token ids and back, with the tokenizer and the chat template of one model folder.

This module does not handle graphs, patches or sampling. The ids are the same as those of transformers: of
`apply_chat_template` in chat style, and of a tokenizer called on plain text in completion style. Tests compare them
with transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ModelFormatError, RequestError, library_errors, shown
from ..session import ModelFolder
from .messages import checked_messages, empty_prompt
from .plain_values import check_unicode
from .reasoning import PromptTail, ReasoningTags, recognise_reasoning_tags
from .table_tokenizer import TableTokenizer
from .tokenizer_files import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_FILES,
    AnyTokenizer,
    TokenizerFiles,
    check_added_tokens,
    read_eos_ids,
    read_sampling,
    read_special_tokens,
    read_template,
    read_tokenizer,
    read_tool_template,
    table_tokenizer,
)
from .tool_calls import recognise_tool_format
from .tools import TemplateVariables

if TYPE_CHECKING:
    import jinja2

    from ..grammar import Grammars

_TAIL = 32  # ids; the beginning of the assistant's message and a tag are shorter

Style = Literal["chat", "completion"]
Message = Mapping[str, Any]


class TextCodec:
    """The tokenizer and the chat template of one model folder.

    Attributes:
        style: "chat" (a string is one user message) or "completion" (a string is the text itself).
        eos_ids: every token id that ends a completion.
        sampling: the model's own sampling settings, by their names in Sampling; see `read_sampling`.
        bos_id: the id of the beginning-of-sequence token; None if the model has none.
        template_source: the text of the chat template; None in completion style.
        tool_template_source: the text of the chat template for requests with tools; None if they have the same one.
        tool_format: the notation in which the model writes calls of tools; None in completion style.
        reasoning_tags: the tags around the model's reasoning; None if the template shows none.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        *,
        style: Style,
        eos_ids: frozenset[int],
        special_tokens: Mapping[str, Any],
        template: jinja2.Template | None,
        template_source: str | None = None,
        tool_template: jinja2.Template | None = None,
        tool_source: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.style: Style = style
        self.sampling: Mapping[str, Any] = dict(sampling or {})
        self.eos_ids = eos_ids
        self.bos_id: int | None = tokenizer.token_to_id(special_tokens.get("bos_token", ""))
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._template, self._tool_template = template, tool_template or template
        self.tool_template_source = tool_source
        self.template_source = template_source
        special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        shows = None if template_source is None else template_source + (tool_source or "")
        self.tool_format = None if shows is None else recognise_tool_format(shows, special)
        self.reasoning_tags: ReasoningTags | None = recognise_reasoning_tags(shows, special)
        markers = [part.special_ids for part in (self.tool_format, self.reasoning_tags) if part is not None]
        self._unmarked = frozenset(special.values()).difference(*(ids.values() for ids in markers))
        # The prefix holds the ids that the tokenizer puts before a text. An EOS that it may put after the text is not
        # used, because it would end a prompt that is to be continued.
        with _tokenizer_errors("the tokenizer cannot encode text"):
            probe = tokenizer.encode("a")
        self._prefix: list[int] = probe.ids[: [*probe.special_tokens_mask, 0].index(0)]

    @classmethod
    def from_model_folder(cls, folder: ModelFolder) -> TextCodec:
        """Read the tokenizer and the template of an exported folder: its listed files, as the bytes that were hashed.

        Where the folder has the tables of its tokenizer.json, they are read in its place.

        Only an export holds files that give the token ids of transformers without transformers. A Hugging Face folder
        is opened on the host, with `tp_export.source.open_source`.

        Raises:
            ModelFormatError: a file is not the one that was exported; or as for `from_files`.
            UnsafePathError: the path of a file leads outside the folder.
        """
        tokenizer = table_tokenizer(folder)
        names = [name for name in TOKENIZER_FILES if name in folder.files and not (tokenizer and name == TOKENIZER)]
        content = {name: folder.read(name) for name in names}
        return cls._of(
            TokenizerFiles(content, str(folder.path)), tokenizer, "chat" if folder.style == "chat" else "completion"
        )

    @classmethod
    def from_files(cls, content: Mapping[str, bytes], where: str, style: Style | None = None) -> TextCodec:
        """Make a codec of the bytes of tokenizer files. No file is opened, and a name without bytes does not exist.

        Args:
            content: the bytes of each file by its name: tokenizer.json and tokenizer_config.json, and as far as the
                model has them chat_template.jinja, generation_config.json and config.json. Other names are ignored.
            where: the folder that the files are from, for errors.
            style: the meaning of a string prompt. None means "chat" if there is a chat template, and otherwise
                "completion".

        Raises:
            ModelFormatError: a file is missing, cannot be parsed, or contradicts another; `style` is "chat" and there
                is no template; or no file names an end-of-sequence token.
            RequestError: `style` is unknown.
        """
        if style not in ("chat", "completion", None):
            raise RequestError("the style is unknown", field="style", got=shown(style), wanted="chat or completion")
        return cls._of(TokenizerFiles(content, where), None, style)

    @classmethod
    def _of(cls, files: TokenizerFiles, tokenizer: AnyTokenizer | None, style: Style | None) -> TextCodec:
        """Make a codec of tokenizer files, with a tokenizer in place of tokenizer.json or with None."""
        tokenizer = read_tokenizer(files) if tokenizer is None else tokenizer
        config, config_path, where = files.json(CONFIG), files.path(CONFIG), files.where
        check_added_tokens(tokenizer, config, config_path)
        special_tokens = read_special_tokens(tokenizer, config, config_path)
        source = read_template(files, config)
        style = style or ("completion" if source is None else "chat")
        tool_source = read_tool_template(files, config)
        template = tool_template = None
        if style == "chat":
            from .template import compile_template  # only a chat needs jinja2, and its import delays the first token

            if source is None:
                raise ModelFormatError(
                    "the model has no chat template",
                    field=config_path,
                    wanted="chat_template, or the file chat_template.jinja",
                    fix='use style="completion"',
                )
            template = compile_template(source, where)
            if tool_source is not None:
                tool_template = compile_template(tool_source, where)
        return cls(
            tokenizer,
            style=style,
            eos_ids=read_eos_ids(files, tokenizer, special_tokens),
            special_tokens=special_tokens,
            template=template,
            template_source=None if template is None else source,
            tool_template=tool_template,
            tool_source=None if tool_template is None else tool_source,
            sampling=read_sampling(files),
        )

    def render(
        self,
        messages: Sequence[Message] | str,
        system: str | None = None,
        *,
        raw: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Convert a prompt to token ids.

        In chat style the template renders the messages: a string is one user message, and `system` is a system message
        in front. In completion style the ids are `[bos] + context + query`, where the context is `system` with exactly
        one newline at its end. Context and query are tokenised separately, so the query's ids are the same with and
        without a context.

        Args:
            messages: a string, or in chat style also a list of messages, as transformers takes them.
            system: the system message, or the context of a completion.
            raw: whether to encode the string as it is, also in chat style.
            add_generation_prompt: whether the template ends with the beginning of the assistant's message. This has no
                effect on plain text.
            tools: the tools that the template describes to the model, each a JSON schema in OpenAI's form.
            documents: the documents that the template quotes.
            template_args: further variables of the template, such as {"enable_thinking": False}.

        Returns:
            The token ids, at least one.

        Raises:
            RequestError: the prompt is empty or malformed, it does not fit the style, or the template refuses it.
            ModelFormatError: the template tries to leave its sandbox or cannot render any prompt, or the tokenizer
                fails on the text.
        """
        if system is not None and not isinstance(system, str):
            raise RequestError(
                "the system prompt is not a string", field="system", got=type(system).__name__, wanted="str"
            )
        if raw and system is not None:
            raise RequestError(
                "raw text cannot have a system prompt",
                field="system",
                got=shown(system),
                wanted="None",
                fix="put the text in front of the prompt, or leave raw=True out",
            )
        variables = TemplateVariables.of(tools, documents, template_args, self._special_tokens)
        if not raw and self._template is not None:
            from .template import fill_template

            chat = checked_messages(messages, system)
            template = self._template if variables.tools is None else self._tool_template
            assert template is not None
            text = fill_template(template, chat, self._special_tokens, add_generation_prompt, variables)
            ids = self._encode(text, "messages")
        else:
            variables.refuse_without_template(raw)
            if not isinstance(messages, str):
                raise RequestError(
                    "the raw prompt is not a string" if raw else "a completion-style model does not accept messages",
                    field="messages",
                    got=type(messages).__name__,
                    wanted="str",
                    fix="leave raw=True out" if raw else 'pass the text itself, or load with style="chat"',
                )
            if not messages.strip():
                raise empty_prompt("messages", shown(messages))
            ids = list(self._prefix)
            if system is not None:
                if not system.strip():
                    raise empty_prompt("system", shown(system), fix="pass None if there is no context")
                ids += self._encode(system.rstrip("\n") + "\n", "system")
            ids += self._encode(messages, "messages")
        if not ids:
            raise empty_prompt("messages", "a prompt without tokens")
        return ids

    def grammars(self, width: int) -> Grammars:
        """Return a compiler of constraints for this tokenizer and logits of that width."""
        from ..grammar import Grammars  # only a request with a constraint needs it

        return Grammars(self._tokenizer, self.eos_ids, width)

    def load_tokenizer(self) -> None:
        """Load tokenizer.json now, where its tables would be used until it pays; no later text waits for it.

        Raises:
            ModelFormatError: the file is missing, or is not the one that was exported.
        """
        if isinstance(self._tokenizer, TableTokenizer):
            self._tokenizer.load()

    def prompt_tail(self, ids: Sequence[int]) -> PromptTail:
        """Return how a prompt ends: "open" if its last text opens reasoning, "closed" if it closes it, else "none".

        Args:
            ids: the prompt, as `render` returns it.
        """
        if self.reasoning_tags is None:
            return "none"
        return self.reasoning_tags.tail_of(self.decode(ids[-_TAIL:], skip_special_tokens=False))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, keep_markers: bool = False) -> str:
        """Convert token ids to text.

        Args:
            ids: the token ids.
            skip_special_tokens: whether special tokens give no text.
            keep_markers: whether those special tokens give text that mark calls of tools or reasoning, although others
                do not.

        `clean_up_tokenization_spaces` of the tokenizer config is not applied. It rewrites generated text ("a ." becomes
        "a."), so a streamed text could differ from the text that is decoded at once. An id that the tokenizer does not
        have gives no text.

        Raises:
            RequestError: `ids` is not a list of ids.
            ModelFormatError: the tokenizer fails on the ids.
        """
        with _tokenizer_errors("the tokenizer cannot decode the ids"):
            try:
                ids = list(ids)
                if skip_special_tokens and keep_markers:
                    ids, skip_special_tokens = [i for i in ids if i not in self._unmarked], False
                text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            except (TypeError, OverflowError):
                raise RequestError(
                    "the value is not a list of token ids",
                    field="ids",
                    got=shown(ids),
                    wanted="whole numbers from 0 to 2**32 - 1",
                ) from None
        return text

    def _encode(self, text: str, field: str) -> list[int]:
        check_unicode(text, field)
        with _tokenizer_errors("the tokenizer cannot encode the text"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _tokenizer_errors(problem: str) -> AbstractContextManager[None]:
    return library_errors(
        ModelFormatError,
        problem,
        field="tokenizer.json",
        wanted="a file with which the tokenizers library does not fail",
        fix="export the model again, or copy the file from its source",
    )
