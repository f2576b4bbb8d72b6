"""The token ids of the edge codec compared with those of transformers, on texts that show where tokenizers differ.

In completion style this compares plain text, in chat style also `apply_chat_template`. Both directions are compared:
text to ids, and ids to text. Two rules of the codec differ from transformers on purpose, and the comparison follows
them: an EOS that the post-processor puts after a text is not used, and `clean_up_tokenization_spaces` is not applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tp_runtime.errors import ModelFormatError, TPError, library_errors, printable
from tp_runtime.text import Message, TextCodec

TEXTS = (
    "What is a token?",
    " leading, trailing ",
    "  two  and   three    spaces     ",
    "a",
    ".",
    "one\ntwo\n\nthree\r\nfour\n\n\n",
    "\ttabs\t\tand \t spaces \n\t",
    "0 7 42 1234567890 3.14159 1,000,000 0x1F",
    "don't I'll we've THEY'RE CamelCase snake_case __init__ a.b.c",
    'if (x != y) { return z[0] ** 2; } // https://example.org/?q=1&r=2#top <b>bold</b> \\n "quoted" `code`',
    "Größe naïve façade Ærøskøbing İstanbul ıi ﬁne ½ № ™",
    "漢字とかなカナ 한국어 ไทย हिन्दी العربية עברית Ελληνικά Кириллица",
    "👩‍👩‍👧 🇨🇭 ✊🏽 ☃️ 🏴󠁧󠁢󠁷󠁬󠁳󠁿",
    "e\u0301 e\u0323\u0302 Z\u0351\u036b\u0343 \u1e9b\u0323 \u00e9",
    "zero\u200bwidth no\u00a0break thin\u2009space ideographic\u3000space soft\u00adhyphen \ufeff mark \u2028 line",
    "▁ lower ▁▁ block Ġ Ċ bytes <0x0A> ##ing </w> \ufffd",
    "a" * 500,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
)
_DECODED = 2000  # the number of ids, spread over the vocabulary, that are decoded next to those of the texts
_SHOWN = 12  # the number of ids that an error shows
_REFUSED = "a refusal"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Difference:
    """The first place where the codec and transformers differ.

    Attributes:
        text: what was converted, in one line.
        got: what the codec made of it.
        wanted: what transformers made of it.
    """

    text: str
    got: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.text} gives {self.got}, and in transformers {self.wanted}"


def load_tokenizer(path: Path) -> Any:
    """Load the fast tokenizer of a folder with transformers, without the hub and without code from the folder.

    Raises:
        ModelFormatError: transformers cannot load a tokenizer from the folder, or only a slow one.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    with library_errors(
        ModelFormatError,
        "transformers cannot load the tokenizer",
        field=str(path),
        wanted="a fast tokenizer that needs no code of its own",
        fix="install what the message names, or save a fast tokenizer there with save_pretrained",
        also=(OSError,),
    ):
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, local_files_only=True, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelFormatError(
            "the tokenizer has no fast form",
            field=str(path),
            got=type(tokenizer).__name__,
            wanted="a tokenizer of the tokenizers library",
            fix="convert it with transformers to a fast tokenizer and save it with save_pretrained",
        )
    return tokenizer


def compare_ids(codec: TextCodec, path: Path) -> Difference | None:
    """Compare a codec with the tokenizer that transformers loads from a folder, a source's or an exported one.

    Args:
        codec: the codec of the folder.
        path: the folder.

    Returns:
        The first difference; None if there is none.

    Raises:
        ModelFormatError: transformers cannot load a tokenizer from the folder.
    """
    return first_difference(codec, load_tokenizer(path))


def first_difference(codec: TextCodec, tokenizer: Any) -> Difference | None:
    """Compare a codec with a tokenizer of transformers.

    Args:
        codec: the codec.
        tokenizer: a fast tokenizer.

    Returns:
        The first difference; None if there is none.
    """
    bos = tokenizer.backend_tokenizer.token_to_id(tokenizer.bos_token or "")
    if codec.bos_id != bos:
        return Difference("the BOS token", f"id {codec.bos_id}", f"id {bos}")
    eos = tokenizer.backend_tokenizer.token_to_id(tokenizer.eos_token or "")
    if eos is not None and eos not in codec.eos_ids:
        return Difference("the EOS token", f"ids {sorted(codec.eos_ids)}", f"id {eos}")
    texts = [*TEXTS, *added_token_texts(tokenizer)]
    encoded = _encoded(tokenizer, texts)
    found = next(_plain_differences(codec, encoded), None)
    if found is None and codec.style == "chat":
        found = next(_chat_differences(codec, tokenizer), None)
    return found or next(_decoding_differences(codec, tokenizer, [ids for ids in encoded.values() if ids]), None)


def first_change(before: TextCodec, after: TextCodec, tokenizer: Any) -> str | None:
    """Return the first text that two codecs convert to different ids, in one line; None if there is none.

    Args:
        before: a codec.
        after: another codec.
        tokenizer: the tokenizer of transformers whose added tokens are tried.
    """
    if before.style != after.style:
        return "every prompt"
    for text in (*TEXTS, *added_token_texts(tokenizer)):
        if _plain(before, text) != _plain(after, text):
            return short(repr(text))
    if after.style == "chat":
        for chat, prompted in _chats(tokenizer):
            rendered = _rendered(before, chat, prompted)
            if rendered != _rendered(after, chat, prompted) and rendered == _rendered(before, chat, prompted):
                return short(repr(chat))
    return None


def added_token_texts(tokenizer: Any) -> list[str]:
    """Return one text for each added token: within a word, alone, at the beginning of a line, doubled, in capitals."""
    tokens = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
    return [f"a{t}b {t} c  {t}{t}\n{t} {t.upper()}{t.lower()} d{t}" for t in tokens]


def short(text: str, limit: int = 120) -> str:
    """Return a text in one line of printable characters, cut to a length."""
    line = printable(text)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _attempt(call: Callable[[], _T]) -> _T | None:
    """Return what a call returns; None if it refuses its input.

    Tokenizers refuse characters that they do not know, and templates refuse roles. Libraries raise any exception then,
    and the tokenizers library also panics, which is no Exception.
    """
    try:
        with library_errors(ModelFormatError, "the input is refused"):
            return call()
    except (TPError, OSError):
        return None


def _encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, list[int] | None]:
    """Return the ids of each text in transformers, without those that the post-processor puts after it."""
    together = _attempt(lambda: tokenizer(texts).encodings)
    encodings = together or [_attempt(lambda t=text: tokenizer(t).encodings[0]) for text in texts]  # type: ignore[misc]
    pairs = zip(texts, encodings, strict=True)
    return {text: None if encoding is None else _before_suffix(encoding) for text, encoding in pairs}


def _before_suffix(encoding: Any) -> list[int]:
    """Return the ids up to the last one that is no addition of the post-processor; empty if all are additions."""
    ids, mask = list(encoding.ids), list(encoding.special_tokens_mask)
    while mask and mask[-1]:
        mask.pop()
    return ids[: len(mask)]


def _plain(codec: TextCodec, text: str) -> list[int] | None:
    return _attempt(lambda: codec.render(text, raw=True))


def _plain_differences(codec: TextCodec, encoded: Mapping[str, list[int] | None]) -> Iterator[Difference]:
    for text, wanted in encoded.items():
        # A text without tokens does not show which additions come before it.
        if wanted != [] and (difference := _ids_differ(repr(text), _plain(codec, text), wanted)):
            yield difference


def _chats(tokenizer: Any) -> Iterator[tuple[list[Message], bool]]:
    """Yield chats of one to four messages, each with and without the beginning of the assistant's next message."""
    special = " ".join(f"x{token} {token}y" for token in tokenizer.all_special_tokens)
    texts = (*TEXTS, special or "z")
    for index, text in enumerate(texts):
        user: Message = {"role": "user", "content": text}
        system: Message = {"role": "system", "content": texts[index - 1]}
        answer: Message = {"role": "assistant", "content": texts[index - 2]}
        for chat in ([user], [system, user], [user, answer, user], [system, user, answer, user]):
            yield chat, index % 2 == 0 or len(chat) == 1
            if index == 0:
                yield chat, False


def _rendered(codec: TextCodec, chat: Sequence[Message], prompted: bool) -> list[int] | None:
    return _attempt(lambda: codec.render(chat, add_generation_prompt=prompted))


def _chat_differences(codec: TextCodec, tokenizer: Any) -> Iterator[Difference]:
    for chat, prompted in _chats(tokenizer):
        got = _rendered(codec, chat, prompted)
        wanted = _attempt(
            lambda c=chat, p=prompted: tokenizer.apply_chat_template(c, add_generation_prompt=p)  # type: ignore[misc]
        )
        # The codec refuses a chat that renders to no tokens.
        difference = _ids_differ(repr(chat), got, wanted or None)
        # The text of a template may hold the time, so that it differs from one call to the next.
        if difference and got == _rendered(codec, chat, prompted):
            yield difference


def _decoding_differences(codec: TextCodec, tokenizer: Any, encoded: Sequence[list[int]]) -> Iterator[Difference]:
    size = len(tokenizer)
    spread = list(range(0, size, max(1, size // _DECODED)))
    for ids in (*encoded, spread, sorted(tokenizer.added_tokens_decoder)):
        for skip in (True, False):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            wanted = _attempt(lambda i=ids, o=options: tokenizer.decode(i, **o))  # type: ignore[misc]
            got = _attempt(lambda i=ids, s=skip: codec.decode(i, s))  # type: ignore[misc]
            if got != wanted:
                at = _first_unequal(got or "", wanted or "")
                around = slice(max(0, at - 20), at + 40)
                text = f"decoding the ids {_window(ids, 0)} {'without' if skip else 'with'} special tokens"
                yield Difference(text, *(_REFUSED if t is None else short(repr(t[around])) for t in (got, wanted)))


def _ids_differ(text: str, got: list[int] | None, wanted: list[int] | None) -> Difference | None:
    if got == wanted:
        return None
    at = _first_unequal(got or (), wanted or ())
    shown = [_REFUSED if ids is None else _window(ids, at) for ids in (got, wanted)]
    return Difference(short(text), *shown)


def _first_unequal(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the position from which on two sequences differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _window(ids: Sequence[int], at: int) -> str:
    """Return the ids around a position as text."""
    start = max(0, at - _SHOWN // 2)
    shown = ", ".join(map(str, ids[start : start + _SHOWN]))
    return f"[{'..., ' if start else ''}{shown}{', ...' if start + _SHOWN < len(ids) else ''}]"
