"""The string formats that are enforced, as llguidance has them or as exact patterns."""

from __future__ import annotations

# llguidance knows that February has at most 29 days, but not in which years, and allows the second 60 at any time.
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
# A fraction has at most nine digits: one of any length is allowed, and a small model might not end it.
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"

PATTERNS = {"date": f"^(?:{_DATE})$", "time": f"^(?:{_TIME})$", "date-time": f"^(?:{_DATE}T{_TIME})$"}
"""The formats that become patterns, in the syntax of llguidance."""

BUILT_IN = frozenset({"duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})
"""The formats that llguidance enforces itself. It has one more, "unknown", which allows every string."""
