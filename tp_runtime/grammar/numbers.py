"""The numbers of a schema: bounds, lengths and multiples, as far as they are enforced exactly.

llguidance computes with 64-bit floats, with their decimal digits, and multiples with 32-bit integers that wrap around.
A number outside of what these hold exactly would make a constraint that is slightly another one.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from ..errors import RequestError, shown
from .budget import MOST_MULTIPLES, Budget

_LARGEST = 2**53  # up to here a float holds every integer
_DIGITS = 15  # digits after the decimal point
_LONGEST = 1_000_000  # items, characters or properties


def exact_number(value: Any, path: str) -> int | float:
    """Return a number of a schema, whole ones as integers.

    Raises:
        RequestError: the value is not a number, or is not enforced exactly.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        fix = "write exclusiveMinimum and exclusiveMaximum as numbers" if isinstance(value, bool) else ""
        raise RequestError("the value is not a number", field=path, got=shown(value), wanted="a number", fix=fix)
    digits = 0 if isinstance(value, int) else -int(Decimal(repr(value)).as_tuple().exponent)
    if abs(value) > _LARGEST or digits > _DIGITS:
        wanted = f"at most 2**53 in size, with at most {_DIGITS} digits after the point"
        raise RequestError("the number cannot be enforced exactly", field=path, got=shown(value), wanted=wanted)
    return int(value) if value == int(value) else value


def beside(value: Any, path: str, sign: int) -> int | float:
    """Return the number beside an exclusive bound, which is an inclusive bound for all numbers of up to 14 digits.

    llguidance lets the bound itself through if the other bound has the same integer part: 0 where a number is above 0
    and at most 0.5.

    Args:
        value: the exclusive bound.
        path: its place, for errors.
        sign: 1 for a number above it, -1 for one below it.

    Raises:
        RequestError: as for `exact_number`.
    """
    bound = exact_number(value, path)
    places = max(0, 15 - len(str(abs(int(bound)))))
    shifted = Decimal(repr(bound)) + sign * Decimal(1).scaleb(-places)
    return int(shifted) if places == 0 else float(shifted)


def count(value: Any, path: str) -> int:
    """Return a number of items, characters or properties.

    Raises:
        RequestError: the value is not a whole number from 0 to a million.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 or value < 0:
        raise RequestError("the value is not a count", field=path, got=shown(value), wanted="a whole number, 0 or more")
    if value > _LONGEST:
        fix = "leave it out, and limit the completion with max_new_tokens"
        raise RequestError(
            "the count is too large", field=path, got=shown(value), wanted=f"at most {_LONGEST}", fix=fix
        )
    return int(value)


class Multiples:
    """The values of multipleOf in one schema. Where parts are joined, llguidance joins multiples without a check.

    Args:
        budget: what the grammar that holds the schema may still hold.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._seen: set[Decimal] = set()

    def add(self, value: Any, path: str) -> int | float:
        """Return a value of multipleOf, after the check that it and the earlier ones are enforced exactly.

        Raises:
            RequestError: the value is not a number above 0, or the multiples are too large, alone or joined.
        """
        number = exact_number(value, path)
        if number <= 0:
            raise RequestError("the value is not above 0", field=path, got=shown(value), wanted="a number above 0")
        exact = Decimal(repr(number))
        self._seen.add(exact)
        places = max(0, *(-int(each.as_tuple().exponent) for each in self._seen))
        joined = math.lcm(*(int(each.scaleb(places)) for each in self._seen))
        scaled = float(number)  # llguidance multiplies by ten until no fraction is left, and rounding can leave one
        while scaled % 1 and scaled < _LARGEST:
            scaled *= 10
        if joined > MOST_MULTIPLES or scaled > MOST_MULTIPLES:
            raise RequestError(
                "the multiple cannot be enforced",
                field=path,
                got=f"{shown(number)}, with a least common multiple of {joined} units of the last digit",
                wanted=f"at most {MOST_MULTIPLES}, together with all other multiples of the schema",
                fix="use a smaller or rounder multiple",
            )
        if not self._budget.take_multiple(exact):
            wanted = f"a sum of at most {MOST_MULTIPLES}, over the different multiples of the whole grammar"
            raise RequestError("the multiples are too large", field=path, got=shown(number), wanted=wanted)
        return number
