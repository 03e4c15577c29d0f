"""Durations on the command line, such as 90s, 30m, 1h or 7d."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

from chatdb._core.validate import check_interval
from chatdb.errors import InvalidInputError

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(option: str, text: str, *, examples: str = "90s, 30m, 1h or 7d") -> timedelta:
    """Return the duration for a number and its unit. Raises InvalidInputError, which shows the forms."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    duration = timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else timedelta(0)
    if not duration:
        raise InvalidInputError(option, f"must be a number above 0 and its unit, such as {examples}")
    return check_interval(option, duration)
