"""A tokenizer that searches the tables of an export instead of loading the whole tokenizer.json.

It has the methods of the tokenizers library's `Tokenizer` that the codec and the grammars call, and gives the same ids
and texts. The library still does what is not a search: it finds added tokens, normalises, splits, and decodes. For this
it gets a tokenizer without merges, with the characters and added tokens of the texts so far. What it returns is the
split text as single characters, and the merges of the tables join them here.

The library merges faster once it has loaded the file. So it is loaded after all when a text is long, or when many texts
have come, and when a grammar needs the whole vocabulary.
"""

from __future__ import annotations

import heapq
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from operator import index, itemgetter
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from .tables import Added, Tables

_BUDGET = 2**16  # characters of all texts together
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_KEPT_PAIRS, _KEPT_WORDS, _KEPT_TEXTS = 2**16, 2**13, 2**13
_LONGEST_WORD = 32  # symbols; longer words seldom come twice


class Encoded(NamedTuple):
    """The ids of a text, and for each whether the post-processor added it (1) or not (0)."""

    ids: list[int]
    special_tokens_mask: list[int]


class _Shell(NamedTuple):
    """A tokenizer without merges.

    Attributes:
        tokenizer: the tokenizer.
        known: the characters that it finds if they are tokens; None if it finds all of them.
        added: the contents of the added tokens that it finds.
    """

    tokenizer: Tokenizer
    known: frozenset[str] | None
    added: frozenset[str]


class TableTokenizer:
    """A tokenizer over tables. Threads share one object.

    Args:
        tables: the tables.
        load: a function that loads the same tokenizer from tokenizer.json.
        budget: the number of characters, of all texts together, after which it is loaded.
    """

    def __init__(self, tables: Tables, load: Callable[[], Tokenizer], budget: float = _BUDGET) -> None:
        self._tables, self._load, self._budget = tables, load, budget
        self._whole: Tokenizer | None = None
        self._characters = 0
        self._added = {token.content: token.id for token in tables.added}
        self._decoder_of = {token.id: token for token in tables.added}
        self._special = frozenset(token.content for token in tables.added if token.special)
        model = tables.settings["model"]
        self._takes_whole_words = bool(model.get("ignore_merges"))
        # Their ids appear where a character is no token, or where the shell does not have it.
        self._doubtful = frozenset(tables.symbols) if tables.sparse else frozenset()
        texts = {number: self._token(number) for number in tables.symbols}
        self._byte = {number: int(token[3:5], 16) for number, token in texts.items() if _BYTE.fullmatch(token)}
        # `typed`, because the library refuses 1.0, which equals 1.
        self._named = lru_cache(_KEPT_TEXTS, typed=True)(lambda number: self._token(_checked(number)))
        self._shown = lru_cache(_KEPT_TEXTS, typed=True)(self._unless_special)
        self._pair = lru_cache(_KEPT_PAIRS)(self._find_pair)
        self._word = lru_cache(_KEPT_WORDS)(self._merge)
        self._shell = self._make_shell(frozenset("a") if tables.sparse else None, frozenset())
        self._normalizer, self._decoder = self._shell.tokenizer.normalizer, self._shell.tokenizer.decoder

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Return the ids of a text."""
        self._characters += len(text)
        if self._characters > self._budget:
            self.load()
        if self._whole is not None:
            encoding = self._whole.encode(text, add_special_tokens=add_special_tokens)
            return Encoded(encoding.ids, encoding.special_tokens_mask)
        split = self._split(text, add_special_tokens)
        ids: list[int] = []
        mask: list[int] = []
        symbols = zip(split.ids, split.word_ids, split.special_tokens_mask, strict=True)
        for (word, special), group in groupby(symbols, key=itemgetter(1, 2)):
            found = tuple(symbol for symbol, _, _ in group)
            if not special and word is not None and len(found) > 1:
                found = self._word(found) if len(found) <= _LONGEST_WORD else self._merge(found)
            ids += found
            mask += [special] * len(found)
        return Encoded(ids, mask)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; an id that does not exist gives none."""
        if self._whole is not None:
            text: str = self._whole.decode(ids, skip_special_tokens=skip_special_tokens)
            return text
        tokens = [token for token in map(self._shown if skip_special_tokens else self._named, ids) if token]
        return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(tokens))

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token's text; None if it is no token."""
        found = self._added.get(token)
        if found is not None:
            return found
        order, wanted = self._tables.order, token.encode()
        place = bisect_left(order, wanted, key=self._bytes)
        return order[place] if place < len(order) and self._bytes(order[place]) == wanted else None

    def get_added_tokens_decoder(self) -> dict[int, Added]:
        """Return the added tokens by id."""
        return self._decoder_of

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return the ids of all tokens, from tokenizer.json."""
        vocab: dict[str, int] = self.load().get_vocab(with_added_tokens)
        return vocab

    def to_str(self) -> str:
        """Return the whole tokenizer as JSON text, from tokenizer.json."""
        return str(self.load().to_str())

    def load(self) -> Tokenizer:
        """Load tokenizer.json, unless it is loaded; from now on the library does all the work."""
        # Without a lock two threads may both load it, which costs time only. An interrupt could leave a lock held.
        if self._whole is None:
            self._whole = self._load()
        return self._whole

    # -- symbols ---------------------------------------------------------------------------------------------

    def _split(self, text: str, add_special_tokens: bool) -> Any:
        """Return the library's encoding of a text as single symbols."""
        while True:
            shell = self._shell = self._shell_for(text)
            encoding = shell.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            if shell.known is None or not (missing := self._missing(encoding.ids)):
                return encoding
            # The normaliser made characters that are tokens and that the shell does not have.
            known = None if shell.known & missing or "" in missing else shell.known | missing
            self._shell = self._make_shell(known, shell.added)

    def _missing(self, ids: Sequence[int]) -> frozenset[str]:
        """Return the characters of a split text that are tokens, though the shell did not find them.

        Bytes stand for a character that it did not find, and say which. The unknown token does not; for it, the result
        holds the empty string.
        """
        found = [number for number in ids if number in self._doubtful]
        if any(number not in self._byte for number in found):
            return frozenset({""})
        text = bytes(self._byte[number] for number in found).decode(errors="replace")
        return frozenset(character for character in text if self.token_to_id(character) is not None)

    def _shell_for(self, text: str) -> _Shell:
        shell, known = self._shell, self._shell.known
        added = frozenset(content for content in self._added if content in text) - shell.added
        if known is not None:
            characters = set(text)
            if self._normalizer is not None:
                characters.update(self._normalizer.normalize_str(text))
            if characters <= known and not added:
                return shell
            known |= characters
        elif not added:
            return shell
        return self._make_shell(known, shell.added | added)

    def _make_shell(self, known: frozenset[str] | None, added: frozenset[str]) -> _Shell:
        tables = self._tables
        vocab = {self._token(symbol): symbol for symbol in tables.symbols}
        if tables.sparse and known is None:
            vocab |= self._characters_of_model
        elif known is not None:
            vocab |= {token: found for token in known if (found := self.token_to_id(token)) is not None}
        # A token whose content a text does not hold cannot be found in it; of normalised texts this is not known.
        present = [token for token in tables.added if token.content in added or token.flags["normalized"]]
        vocab |= {token.content: token.id for token in present}
        content = {
            **tables.settings,
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": token.id, "content": token.content, **token.flags} for token in present],
            "model": {**tables.settings["model"], "vocab": vocab, "merges": [], "ignore_merges": False},
        }
        return _Shell(Tokenizer.from_str(json.dumps(content)), known, added)

    @cached_property
    def _characters_of_model(self) -> dict[str, int]:
        """The ids of all tokens that are single characters."""
        tokens = ((self._token(number), number) for number in self._tables.order)
        return {token: number for token, number in tokens if len(token) == 1}

    # -- merges ----------------------------------------------------------------------------------------------

    def _merge(self, symbols: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a word: of all merges that apply, the first of tokenizer.json, and there the leftmost."""
        if self._takes_whole_words:
            whole = self.token_to_id("".join(map(self._token, symbols)))
            if whole is not None:
                return (whole,)
        ids, count, pair = list(symbols), len(symbols), self._pair
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        queue = [(found[0], at, found[1]) for at in range(count - 1) if (found := pair(ids[at], ids[at + 1]))]
        heapq.heapify(queue)
        while queue:
            _, at, result = heapq.heappop(queue)
            right = after[at]
            if ids[at] < 0 or right >= count:  # merged into the symbol before it, or the last one
                continue
            found = pair(ids[at], ids[right])
            if found is None or found[1] != result:  # one of the two has changed since
                continue
            ids[at], ids[right] = result, -1
            after[at] = right = after[right]
            if right < count:
                before[right] = at
                if found := pair(result, ids[right]):
                    heapq.heappush(queue, (found[0], at, found[1]))
            left = before[at]
            if left >= 0 and (found := pair(ids[left], result)):
                heapq.heappush(queue, (found[0], left, found[1]))
        return tuple(number for number in ids if number >= 0)

    def _find_pair(self, left: int, right: int) -> tuple[int, int] | None:
        tables, pair = self._tables, (left << 32) + right
        place = bisect_left(tables.pairs, pair)
        if place < len(tables.pairs) and tables.pairs[place] == pair:
            return tables.ranks[place], tables.results[place]
        return None

    # -- texts -----------------------------------------------------------------------------------------------

    def _token(self, number: int) -> str:
        return self._bytes(number).decode() if number < len(self._tables.ends) else ""

    def _unless_special(self, number: Any) -> str:
        token = self._token(_checked(number))
        return "" if token in self._special else token

    def _bytes(self, number: int) -> bytes:
        ends = self._tables.ends
        return self._tables.text[ends[number - 1] if number else 0 : ends[number]]


def _checked(number: Any) -> int:
    """Return an id that the library would accept; raise what it raises for others."""
    number = index(number)
    if not 0 <= number < 2**32:
        raise OverflowError("an id is out of range")
    return int(number)
