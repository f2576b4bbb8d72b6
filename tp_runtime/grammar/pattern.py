"""Regular expressions: from what ECMAScript and Python both understand to the syntax of llguidance, which is Rust's.

Some texts mean other things in Rust: `[[a]]` and `[a&&b]` are sets of sets there. And \\d, \\w, \\s and the dot stand
for different sets in ECMAScript and Python. A translated expression only matches what matches in both. What one of the
languages does not have is refused.
"""

from __future__ import annotations

import re

from ..errors import RequestError, shown

_DEEPEST = 100  # groups inside groups
_MOST = 10_000  # repetitions of one element
_LARGEST = 50_000  # elements, with repetitions written out: ((a{100}){100}){100} takes 3 s and 300 MB

_SPACE = r"\t-\r\x20\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_SPACE_IN_ONE = _SPACE + r"\x1c-\x1f\x85\x{feff}"  # white space in ECMAScript or in Python
_WORD = "0-9A-Za-z_"
_WORD_IN_ONE = r"\p{L}\p{M}\p{N}_"

# For each class: what is in it in both languages, and what is in it in at least one. What a negated set excludes has to
# be the larger of the two.
_CLASSES = {
    "d": ("0-9", r"\p{Nd}"),
    "D": (r"\P{Nd}", "[^0-9]"),
    "w": (_WORD, _WORD_IN_ONE),
    "W": (f"[^{_WORD_IN_ONE}]", f"[^{_WORD}]"),
    "s": (_SPACE, _SPACE_IN_ONE),
    "S": (f"[^{_SPACE_IN_ONE}]", f"[^{_SPACE}]"),
}
_DOT = r"[^\n\r\x{2028}\x{2029}]"
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}
_UNNAMED = {
    "b": "a word boundary",
    "B": "a word boundary",
    "k": "a back-reference",
    "A": "an anchor of Python",
    "Z": "an anchor of Python",
    "z": "an anchor of Python",
}

# These are matched at a place: a copy of the rest of the text at every place would take quadratic time.
_BOUNDS = re.compile(r"\{(?P<least>[0-9]*+)(?:,(?P<most>[0-9]*+))?+\}")
_NAME = re.compile(r"\?P?<(?P<name>[^>]++)>")
_PROPERTY = re.compile(r"\{(?P<name>[\w=]++)\}")
_CODE_POINT = re.compile(r"\{(?P<digits>[0-9a-fA-F]{1,6})\}")


def translate(pattern: str, path: str) -> str:
    """Return an expression in the syntax of llguidance.

    Args:
        pattern: the expression, in the syntax that ECMAScript and Python share.
        path: the place of the expression, for errors.

    Raises:
        RequestError: the expression is malformed, or has a part that is not supported.
    """
    return _Translation(pattern, path).run()


class _Translation:
    """One pass over an expression. What is refused is named with its position."""

    def __init__(self, pattern: str, path: str) -> None:
        self._text = pattern
        self._path = path
        self._at = 0
        self._sizes = [0]  # the elements of the expression and of each open group so far, with repetitions
        self._last = 1  # the size of what came last
        self._repeats = False  # whether what came last can be repeated

    def run(self) -> str:
        """Return the translated expression."""
        out = []
        while self._at < len(self._text):
            out.append(self._next())
            if sum(self._sizes) > _LARGEST:
                raise self._refused("the expression is too large", f"at most {_LARGEST} elements, repetitions counted")
        if len(self._sizes) > 1:
            raise self._refused("a group is not closed", "a closing parenthesis")
        return "".join(out)

    def _next(self) -> str:
        """Translate the next element outside of a set."""
        char = self._text[self._at]
        if char in "*+?{" and (found := self._quantifier()) is not None:
            return found
        repeats, self._repeats = self._repeats, True
        self._at += 1
        self._last = 1
        self._sizes[-1] += 1
        if char == "\\":
            return self._escape()
        if char == "[":
            return self._set()
        if char == "(":
            return self._group()
        if char == ")":
            if len(self._sizes) == 1:
                raise self._refused("a parenthesis closes no group", "an opening parenthesis")
            self._last = self._sizes.pop()
            self._sizes[-1] += self._last
            return char
        if char in "^$|":
            self._repeats = False
            return char
        if char == ".":
            return _DOT
        if char in "*+?":
            self._at -= 1
            self._repeats = repeats
            raise self._refused("there is nothing to repeat", "an expression before the quantifier")
        return _literal(char)

    def _quantifier(self) -> str | None:
        """Translate a quantifier; None if the text is none here."""
        found = self._text[self._at]
        if found == "{":
            bounds = _BOUNDS.match(self._text, self._at)
            if bounds is None or not (bounds["least"] or bounds["most"]):
                return None  # {} and {,} are ordinary characters in both languages
            if not bounds["least"]:
                raise self._refused("the quantifier differs between ECMAScript and Python", "{0,n} for {,n}")
            numbers = [each for each in bounds.group("least", "most") if each]
            if any(len(each) > 6 or int(each) > _MOST for each in numbers):
                raise self._refused("the expression repeats too often", f"at most {_MOST} repetitions")
            found = bounds.group()
            self._sizes[-1] += self._last * max(int(each) for each in numbers)
        if not self._repeats:
            if found[0] == "{":
                raise self._refused("there is nothing to repeat", "an expression before the quantifier")
            return None
        self._at += len(found)
        after = self._text[self._at : self._at + 1]
        if after == "+":
            raise self._refused("a possessive quantifier is not supported", "a quantifier without + after it")
        if after == "?":
            self._at += 1  # a lazy quantifier matches the same texts
        self._repeats = False
        return found

    def _group(self) -> str:
        self._sizes.append(0)
        self._repeats = False
        if len(self._sizes) > _DEEPEST:
            raise self._refused("the expression is nested too deep", f"at most {_DEEPEST} groups inside each other")
        if self._text[self._at : self._at + 1] != "?":
            return "(?:"
        if self._text.startswith(("?=", "?!", "?<=", "?<!"), self._at):
            raise self._refused("the expression looks ahead or behind", "an expression without look-around")
        if self._text.startswith("?:", self._at):
            self._at += 2
            return "(?:"
        named = _NAME.match(self._text, self._at)
        if named and named["name"].isidentifier():
            self._at = named.end()
            return "(?:"
        raise self._refused("this kind of group is not supported", "(...), (?:...) or (?<name>...)")

    def _escape(self) -> str:
        """Translate what follows a backslash outside of a set."""
        char = self._text[self._at : self._at + 1]
        if char in _CLASSES:
            self._at += 1
            inside = _CLASSES[char][0]
            return inside if inside[0] == "[" else f"[{inside}]"
        return self._property() or _literal(self._character())

    def _property(self) -> str | None:
        r"""Translate \p{...}; None if the text is none here."""
        if self._text[self._at : self._at + 1] not in ("p", "P"):
            return None
        named = _PROPERTY.match(self._text, self._at + 1)
        if named is None or not named["name"].replace("=", "").replace("_", "").isalnum():
            raise self._refused("the class of characters is malformed", r"\p{...} or \P{...}")
        found = f"\\{self._text[self._at]}{named.group()}"
        self._at = named.end()
        return found

    def _character(self) -> str:
        """Return the character that the text after a backslash stands for."""
        char = self._text[self._at : self._at + 1]
        if not char:
            raise self._refused("the expression ends with a backslash", r"\\ for a backslash")
        if char in _UNNAMED or char in "123456789":
            what = _UNNAMED.get(char, "a back-reference")
            raise self._refused(f"{what} is not supported", "an expression without it")
        self._at += 1
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "0" and not self._text[self._at : self._at + 1].isdigit():
            return "\0"
        if char == "c" and (letter := self._text[self._at : self._at + 1]).isascii() and letter.isalpha():
            self._at += 1
            return chr(ord(letter) % 32)
        if char == "x":
            return chr(self._hexadecimal(2))
        if char == "u":
            return self._unicode()
        if char.isascii() and not char.isalnum() and char != "_" and char.isprintable():
            return char
        self._at -= 1
        raise self._refused("the escape is not known", "an escape that ECMAScript and Python share")

    def _unicode(self) -> str:
        if self._text[self._at : self._at + 1] == "{":
            if digits := _CODE_POINT.match(self._text, self._at):
                self._at = digits.end()
                return self._scalar(int(digits["digits"], 16))
            raise self._refused("the escape is malformed", r"\u{...} with a hexadecimal number")
        unit = self._hexadecimal(4)
        if 0xD800 <= unit < 0xDC00 and self._text[self._at : self._at + 2] == "\\u":
            self._at += 2
            low = self._hexadecimal(4)
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((unit - 0xD800) << 10) + low - 0xDC00)
        return self._scalar(unit)

    def _scalar(self, number: int) -> str:
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise self._refused("the escape stands for no character", "a character of Unicode, no half of a pair")
        return chr(number)

    def _hexadecimal(self, size: int) -> int:
        digits = self._text[self._at : self._at + size]
        if len(digits) < size or not all(each in "0123456789abcdefABCDEF" for each in digits):
            raise self._refused("the escape is malformed", f"{size} hexadecimal digits")
        self._at += size
        return int(digits, 16)

    def _set(self) -> str:
        """Translate a set of characters, whose bracket has been read."""
        negated = self._text[self._at : self._at + 1] == "^"
        self._at += negated
        out = ["[^" if negated else "["]
        if self._text[self._at : self._at + 1] == "]":
            raise self._refused("an empty set differs between ECMAScript and Python", r"\] for a bracket in a set")
        while True:
            char = self._text[self._at : self._at + 1]
            if not char:
                raise self._refused("a set is not closed", "a closing bracket")
            if char == "]":
                self._at += 1
                return "".join([*out, "]"])
            first = self._member(negated)
            if (
                len(first) > 1
                or self._text[self._at : self._at + 1] != "-"
                or self._text[self._at + 1 : self._at + 2] in ("]", "")
            ):
                out.append(first if len(first) > 1 else _literal(first))
                continue
            self._at += 1
            last = self._member(negated)
            if len(last) > 1:
                raise self._refused("a range ends with a class", r"\- for a hyphen in a set")
            if last < first:
                raise self._refused("a range runs backwards", "the smaller character first")
            out.append(f"{_literal(first)}-{_literal(last)}")

    def _member(self, negated: bool) -> str:
        """Return the next character of a set, or more than one character for the translation of a class."""
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return char
        char = self._text[self._at : self._at + 1]
        if char in _CLASSES:
            self._at += 1
            return _CLASSES[char][negated]
        if char == "b":
            self._at += 1
            return "\b"
        return self._property() or self._character()

    def _refused(self, problem: str, wanted: str) -> RequestError:
        around = self._text[max(0, self._at - 10) : self._at + 10]
        return RequestError(problem, field=self._path, got=f"{shown(around)} at character {self._at}", wanted=wanted)


def _literal(char: str) -> str:
    """Return a character as it stands for itself, outside and inside of sets."""
    if char.isascii() and not char.isalnum():
        return f"\\x{ord(char):02x}"
    return char if char.isascii() or char.isprintable() else f"\\x{{{ord(char):x}}}"
