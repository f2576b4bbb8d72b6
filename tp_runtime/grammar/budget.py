"""How much one grammar may hold, over all the schemas in it: what costs time and memory adds up."""

from __future__ import annotations

from decimal import Decimal

MOST_PARTS = 20_000  # schemas and literal values
MOST_PATTERNS = 100  # of patternProperties, which llguidance compares as automata: 100 take 0.4 s, 1,000 minutes

# An automaton for multiples has a state per remainder: 10,007 takes 0.05 s, and a million 18 s and 300 MB. Different
# multiples add up, and equal ones share one automaton.
MOST_MULTIPLES = 10_000


class Budget:
    """What the schemas of one grammar have taken so far.

    Each method takes more, and returns whether the grammar is still within the limit.
    """

    def __init__(self) -> None:
        self._parts = self._patterns = 0
        self._multiples: dict[Decimal, int] = {}

    def take_parts(self, parts: int) -> bool:
        """Take schemas and literal values."""
        self._parts += parts
        return self._parts <= MOST_PARTS

    def take_patterns(self, patterns: int) -> bool:
        """Take patterns of patternProperties."""
        self._patterns += patterns
        return self._patterns <= MOST_PATTERNS

    def take_multiple(self, multiple: Decimal) -> bool:
        """Take a value of multipleOf, in units of its last digit. A value that was taken before costs nothing."""
        places = max(0, -int(multiple.as_tuple().exponent))
        self._multiples[multiple] = int(multiple.scaleb(places))
        return sum(self._multiples.values()) <= MOST_MULTIPLES
