"""The string formats that are enforced, as llguidance has them or as patterns of this project.

A pattern allows less than its format does. llguidance's own date has a 29th of February in every year, and what it
repeats without a bound, such as the digits of a duration, a small model may never end.
"""

from __future__ import annotations

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
# There is no second 60: it is valid only in the last minute of some days, in the time zone UTC.
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"

_N = "[0-9]{1,9}"
_DAYS = f"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"
_HOURS = f"T(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_DURATION = f"P(?:{_DAYS}(?:{_HOURS})?|{_HOURS}|{_N}W)"

# A hostname may have 253 characters, and the part of an address before the @ 64.
_HOSTNAME = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?\.){0,6}[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~]{1,20}"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@{_HOSTNAME}"

PATTERNS = {
    "date": f"^(?:{_DATE})$",
    "time": f"^(?:{_TIME})$",
    "date-time": f"^(?:{_DATE}T{_TIME})$",
    "duration": f"^(?:{_DURATION})$",
    "email": f"^(?:{_EMAIL})$",
    "hostname": f"^(?:{_HOSTNAME})$",
}
"""The formats that become patterns, in the syntax of llguidance."""

BUILT_IN = frozenset({"ipv4", "ipv6", "uri", "uuid"})
"""The formats that llguidance enforces itself. It has one more, "unknown", which allows every string."""
